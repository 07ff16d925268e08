"""Students of few bits on Fashion-MNIST: float, calibrated, trained, trained with a teacher.

    python benchmarks/quantised.py --root runs/quantised         all rows
    python benchmarks/quantised.py convnet:16                     those of one student

The float student is trained for a few hundred steps; every other run starts from it. The teacher is
the student's own copy in float32. The control is the same teacher, whose answers belong to other
images of the batch. Every run is a `kd train` or `kd quantize` line, printed as it starts, in this
process; what is finished is only read. Accuracies are those of the exported ONNX files in
onnxruntime's default session. The last lines are a table for docs/results.md.
"""

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd import cli
from kd.objectives.schemes import Distillation

DATA = "fashion-mnist"
SEEDS = 3
FLOAT = {"convnet:16": 600, "mobilenetv3_small_050": 400}  # steps
ADAPT = "--steps {steps}"
TAUGHT = "--loss ce:0.5,kd:0.5:temperature=1"
STEPS = {"convnet:16": 200, "mobilenetv3_small_050": 100}
CONTROL = "control"
ROWS: dict[str, dict[str, str]] = {  # student -> name of a row: options behind the float run
    "convnet:16": {
        "W8A8 calibrated": "quantize --bits w8a8",
        "W4A4 trained": f"train --quantize w4a4 {ADAPT} --loss ce:1",
        "W2A2 calibrated": "quantize --bits w2a2",
        "W2A2 trained": f"train --quantize w2a2 {ADAPT} --loss ce:1",
        "W2A2 trained, taught": f"train --quantize w2a2 {ADAPT} {TAUGHT}",
        f"W2A2 trained, {CONTROL}": f"train --quantize w2a2 {ADAPT} {TAUGHT}",
    },
    "mobilenetv3_small_050": {
        "W8A8 calibrated": "quantize --bits w8a8",
        "W8A8 trained": f"train --quantize w8a8 {ADAPT} --loss ce:1",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("students", nargs="*", metavar="student", help=", ".join(ROWS))
    parser.add_argument("--root", type=Path, default=Path("runs/quantised"))
    options = parser.parse_args()
    root = options.root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    students = options.students or list(ROWS)
    reports = {student: {name: [] for name in ROWS[student]} for student in students}
    for seed in range(SEEDS):
        for student in students:
            measure(root, student, seed, reports[student])
    lines = [line for student in students for line in rows(student, reports[student])]
    print("\n".join([HEAD, *lines]), flush=True)


def measure(root: Path, student: str, seed: int, reports: dict[str, list[dict[str, Any]]]) -> None:
    """Make the runs of a student with one seed, and add their reports."""
    start = root / f"{_word(student)}-float-{seed}"
    line = f"--student {student} --steps {FLOAT[student]} --seed {seed}"
    finished(["train", DATA, *shlex.split(line)], start)
    for name, words in ROWS[student].items():
        folder = root / f"{_word(student)}-{_word(name)}-{seed}"
        arguments = _arguments(words.format(steps=STEPS[student]), start, seed)
        reports[name].append(finished(arguments, folder, permuted=CONTROL in name))


def finished(arguments: list[str], folder: Path, *, permuted: bool = False) -> dict[str, Any]:
    """The report of a run, which is made unless it is there."""
    if not (folder / "report.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        line = [*arguments, "--out", str(folder)]
        print("+ kd", shlex.join(line), "(answers permuted)" * permuted, flush=True)
        sys.argv = ["kd", *line]
        with answers_permuted(permuted):
            cli.main()
    return json.loads((folder / "report.json").read_text())


@contextmanager
def answers_permuted(permuted: bool) -> Iterator[None]:
    """Give each image of a batch the teacher's answer to another one."""
    original = Distillation._teacher_logits

    def permute(self: Distillation, batch: Any) -> tuple[torch.Tensor, ...]:
        return tuple(torch.roll(logits, 1, 0) for logits in original(self, batch))

    if permuted:
        Distillation._teacher_logits = permute
    try:
        yield
    finally:
        Distillation._teacher_logits = original


HEAD = (
    "| student | bits | accuracy of the file, % | minus float | bytes | of float | ms | "
    "float, ms |\n|---|---|---|---|---|---|---|---|"
)


def rows(student: str, reports: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Lines of the table: means and sample deviations over the seeds, differences paired."""
    first = next(iter(reports.values()))
    lines = [f"| {student} | float | {_spread([_of(r, 'float_file') for r in first])} | | | | | |"]
    for name, members in reports.items():
        accuracy, plain = (
            [_of(report, key) for report in members] for key in ("file", "float_file")
        )
        bytes_, float_bytes = (members[0][key]["bytes"] for key in ("file", "float_file"))
        latency, float_latency = (
            np.median([report[key]["latency_ms_batch_1"] for report in members])
            for key in ("file", "float_file")
        )
        lines.append(
            f"| {student} | {name} | {_spread(accuracy)} | "
            f"{_spread(np.subtract(accuracy, plain))} | {bytes_:,} | {bytes_ / float_bytes:.2f} | "
            f"{latency:.2f} | {float_latency:.2f} |"
        )
    return lines


def _of(report: dict[str, Any], key: str) -> float:
    return 100 * report[key]["test_accuracy"]


def _spread(values: Any) -> str:
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def _arguments(words: str, start: Path, seed: int) -> list[str]:
    command, *rest = shlex.split(words)
    if command == "quantize":
        return [command, str(start), *rest]
    return [command, DATA, "--student", str(start), *rest, "--seed", str(seed)]


def _word(text: str) -> str:
    return text.replace(",", "").replace(":", "-").replace(" ", "-").lower()


if __name__ == "__main__":
    main()
