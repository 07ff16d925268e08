"""Time from the start of a process to the first figures of a short run, beside other versions.

    python benchmarks/startup.py                               this version
    python benchmarks/startup.py --beside ../before --repeats 5

The runs of all versions alternate, after one of each that is not counted, so that other work on
the machine and the caches of files meet all of them. A run has its first figures when its
`metrics.jsonl` is no longer empty: after the first step and a validation, or after an epoch of 21
steps. Medians of wall time and of computing time, user and system, of the process until then.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = {
    "kip": "dsdistill kip digits --steps 1",
    "train": "kd train digits --student convnet:8 --epochs 1",
    "teacher": "kd train digits --student mlp:64 --teacher {teacher} --epochs 1",
}
TEACHER = "kd train digits --student mlp:64 --epochs 1"
PROGRAMS = {name: f"from {name}.cli import main; main()" for name in ("dsdistill", "kd")}
POLL_SECONDS = 0.005


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="other source trees")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=list(RUNS))
    options = parser.parse_args()
    trees = [Path(__file__).parents[1], *(path.resolve() for path in options.beside)]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        first_figures(TEACHER, trees[0], root / "teacher", root)
        for run in options.runs:
            text = RUNS[run].format(teacher=root / "teacher")
            times: dict[Path, list[tuple[float, float]]] = {tree: [] for tree in trees}
            for repeat in range(options.repeats + 1):
                for i, tree in enumerate(trees):
                    out = root / f"{run}-{i}-{repeat}"
                    times[tree].append(first_figures(text, tree, out, root))
            for tree, measured in times.items():
                wall, computing = map(statistics.median, zip(*measured[1:], strict=True))
                print(f"{run:8} {tree.name:16} wall {wall:6.2f} s  computing {computing:5.2f} s")


def first_figures(text: str, tree: Path, out: Path, root: Path) -> tuple[float, float]:
    """Run a command to its end; return seconds of wall time and of computing to its figures."""
    program, *words = shlex.split(text)
    line = [sys.executable, "-c", PROGRAMS[program], *words, "--out", str(out)]
    env = os.environ | {"PYTHONPATH": str(tree), "DSDISTILL_CACHE": str(root / "cache")}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # else every run compiles the sources again
    began, metrics = time.monotonic(), out / "metrics.jsonl"
    quiet = subprocess.DEVNULL
    with subprocess.Popen(line, env=env, cwd=root, stdout=quiet, stderr=quiet) as process:
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                raise SystemExit(f"no figures were written by: {text}")
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - began
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])  # user and system, as proc(5) numbers them
    return seconds, ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
