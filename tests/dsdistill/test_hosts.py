"""Several hosts as processes on loopback: the result of one host, and an end after failures."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dsdistill.harness.data import distilled_set

DSDISTILL = Path(sys.executable).with_name("dsdistill")
TIMEOUT = 240  # of two processes that may share one core
KIP = "kip digits --images-per-class 2 --steps 6 --learn-labels --augment all --target-batch 130"
# The solution amplifies rounding, less so with a larger damping.
NEWTON = (
    "kip digits --images-per-class 2 --steps 4 --learn-labels --target-batch 130 "
    "--optimizer gauss-newton --damping 30"
)
LS = "ls digits --images-per-class 1 --kernel CR-flatten"
ENDLESS = "kip digits --outer mse --images-per-class 2 --steps 100000 --out run --target-batch"


def start(
    folder: Path, line: str, hosts: str, program: Sequence[object] = (DSDISTILL,)
) -> subprocess.Popen[str]:
    """Start one host in its own working folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [*program, *line.split(), "--hosts", hosts],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def pair(
    folder: Path, line: str, other: str | None = None, program: Sequence[object] = (DSDISTILL,)
) -> list[subprocess.Popen[str]]:
    """Start two hosts without a shared folder; the command of the second may differ."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    lines = (line, other or line)
    return [start(folder / f"host{i}", lines[i], f"{address},{i}/2", program) for i in (0, 1)]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each process."""
    try:
        texts = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]


def steps(run: Path) -> list[int]:
    text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
    return [json.loads(line)["step"] for line in text.splitlines(keepends=True) if line[-1] == "\n"]


def at_work(processes: list[subprocess.Popen[str]], run: Path, beyond: int) -> None:
    """Wait until the run has made a number of steps."""
    began = time.monotonic()
    while max(steps(run), default=0) <= beyond:
        assert all(process.poll() is None for process in processes), ended(processes)
        assert time.monotonic() - began < TIMEOUT
        time.sleep(0.05)


def bereft(processes: list[subprocess.Popen[str]], how: signal.Signals) -> str:
    """Send the second host a signal, and return the last line of the first."""
    processes[1].send_signal(how)
    try:
        code, _, error = ended(processes[:1])[0]
    finally:
        processes[1].kill()
    assert code == 1
    assert "Traceback" not in error
    return error.splitlines()[-1]


@pytest.mark.parametrize("line", [KIP, NEWTON, LS], ids=["kip", "newton", "ls"])
def test_two_hosts_give_the_support_of_one(dsdistill, tmp_path, line):
    alone = dsdistill(*line.split(), "--out", "alone")
    assert alone.returncode == 0, alone.stderr
    (code, out, error), second = ended(pair(tmp_path, f"{line} --out run"))
    assert code == 0, error
    assert out.startswith("run: ")
    assert out.count("\n") == 1
    assert second == (0, "", "")
    assert list((tmp_path / "host1").iterdir()) == []
    names = {path.name.split(".tfevents")[0] for path in (tmp_path / "host0" / "run").iterdir()}
    assert names == {path.name.split(".tfevents")[0] for path in (tmp_path / "alone").iterdir()}
    one, two = (
        distilled_set.load(tmp_path / name / distilled_set.FILE_NAME)
        for name in ("alone", "host0/run")
    )
    assert two.provenance["machine"]["hosts"] == 2
    # Adam divides by the size of the gradient: where the gradient is rounding, so is the step.
    np.testing.assert_allclose(two.images, one.images, atol=1e-4)
    np.testing.assert_allclose(two.labels, one.labels, atol=1e-4)
    assert two.provenance["metrics"] == pytest.approx(one.provenance["metrics"], rel=1e-3)


def test_a_stop_is_agreed_on_and_a_death_ends_the_run(dsdistill, tmp_path):
    """SIGTERM to the second host, resume, SIGKILL to it, resume on one host."""
    run = tmp_path / "host0" / "run"
    processes = pair(tmp_path, f"{ENDLESS} 10ms")
    at_work(processes, run, beyond=10)
    processes[1].send_signal(signal.SIGTERM)
    (code, _, error), (other, *_) = ended(processes)
    assert (code, other) == (1, 1)
    assert error.strip().endswith("stopped; continue with `dsdistill kip --resume --out run`")
    reached = steps(run)
    assert reached == list(range(1, len(reached) + 1))

    processes = pair(tmp_path, "kip --resume --out run")
    at_work(processes, run, beyond=reached[-1] + 10)
    last = bereft(processes, signal.SIGKILL)
    assert "continues from its last checkpoint with --resume --out run" in last
    assert steps(run)[-1] > reached[-1]

    reached = steps(run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"steps": reached[-1] + 20}))
    done = dsdistill("kip", "--resume", "--out", run)
    assert done.returncode == 0, done.stderr
    assert steps(run) == list(range(1, reached[-1] + 21))
    assert (
        distilled_set.load(run / distilled_set.FILE_NAME).provenance["metrics"]["test_accuracy"]
        > 0.9
    )


IMPATIENT = """
from dsdistill.cli import main
from dsdistill.parallel import heartbeat
heartbeat.MAX_SILENT_SECONDS = 12.0
main()
"""


def test_a_silent_host_counts_as_lost(tmp_path):
    """A host hangs without breaking a connection."""
    processes = pair(tmp_path, f"{ENDLESS} 50", program=(sys.executable, "-c", IMPATIENT))
    at_work(processes, tmp_path / "host0" / "run", beyond=10)
    assert bereft(processes, signal.SIGSTOP) == (
        "dsdistill: host 1 has given no sign of life for 12 s: the run continues from its last "
        "checkpoint with --resume --out run, on any number of hosts"
    )


def test_ctrl_c_stops_all_hosts(tmp_path):
    processes = pair(tmp_path, f"{ENDLESS} 50")
    at_work(processes, tmp_path / "host0" / "run", beyond=10)
    processes[0].send_signal(signal.SIGINT)
    for code, _, error in ended(processes):
        assert code == 1
        assert error.strip().endswith("stopped; continue with `dsdistill kip --resume --out run`")
    assert (tmp_path / "host0" / "run" / "checkpoint.safetensors").exists()


def test_hosts_of_different_options_part_at_once(tmp_path):
    for code, _, error in ended(pair(tmp_path, f"{KIP} --out run", f"{KIP} --seed 1 --out run")):
        assert code == 1
        assert error.splitlines()[-1] == (
            "dsdistill: all hosts need the same seed: host 0 has 0, host 1 has 1"
        )
    assert not (tmp_path / "host0" / "run").exists()


def test_what_host_0_refuses_every_host_refuses(tmp_path):
    (tmp_path / "host0" / "run").mkdir(parents=True)
    (tmp_path / "host0" / "run" / "thesis.txt").write_text("precious")
    for code, _, error in ended(pair(tmp_path, f"{KIP} --out run")):
        assert code == 1
        assert error.splitlines()[-1] == (
            "dsdistill: run is not empty and holds no run: choose another --out"
        )


def test_a_wrong_text_is_one_line(dsdistill, tmp_path):
    done = dsdistill("kip", "--hosts", "two")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("dsdistill: --hosts must be ADDRESS:PORT,INDEX/COUNT")
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken_is_one_line(dsdistill_process, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = dsdistill_process("kip", "--hosts", f"127.0.0.1:{port},0/2")
    assert done.returncode == 1
    assert done.stderr == (
        f"dsdistill: --hosts: cannot listen on port {port} (Address already in use): choose "
        "another port on all hosts\n"
    )
    assert list(tmp_path.iterdir()) == []


SHARED = """
import re, sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
from dsdistill.methods import kip, label_solve
from dsdistill.kernels import gram, networks
from dsdistill.methods.initial_support import Support
from dsdistill.parallel import devices
gram.plan_tile = lambda *_, **__: gram.Tile(2, 3)
network = networks.parse("CR-flatten")
rng = np.random.default_rng(0)
x_s, x_t = (rng.standard_normal((n, 5, 4, 1)).astype(np.float32) for n in (4, 13))
y_s, y_t = np.eye(4, 3, dtype=np.float32), np.eye(13, 3, dtype=np.float32)
support = Support(x_s, y_s, np.zeros((4, 5, 4, 1), bool))
objective = kip.KipObjective((network,), learn_labels=True, augment=("flip", "shift", "rotate"))
state = devices.replicate(objective.initial_state(support))

def computed(program, *arguments):
    compiled = program.lower(*arguments).compile()
    words = r" (all-[a-z]+|collective-[a-z]+|reduce-scatter)[a-z-]*\\("
    print(*re.findall(words, compiled.as_text()))
    return jax.tree.leaves(program(*arguments))

with jax.enable_x64(True):
    step = kip._compile_update(objective, network, support, 13)
    add = label_solve._compile_sum(network, x_s, 13)
    arrays = computed(step, state, x_t, y_t, jax.random.key(0), None)
    arrays += computed(add, np.zeros((4, 4)), np.zeros((4, 3)), 11, x_t, y_t)
np.savez(sys.argv[2], *arrays)
"""


def test_one_sum_over_the_devices_whatever_the_tiles(tmp_path):
    """13 targets give the same numbers on three devices and on one.

    KIP's gradient and Label Solve's sums need one all-reduce each. KIP also divides the kernel of
    the support: before that, its rows are gathered and their cotangents summed.
    """
    found, words = [], []
    for count in (1, 3):
        path = tmp_path / f"{count}.npz"
        line = [sys.executable, "-c", SHARED, str(count), str(path)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT)
        assert done.returncode == 0, done.stderr
        words.append(done.stdout.split())
        with np.load(path) as arrays:
            found.append([arrays[name] for name in arrays.files])
    assert words[1] == ["all-gather", *["all-reduce"] * 3]
    for one, many in zip(*found, strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-5 * abs(one).max())
