"""Methods of knowledge distillation side by side: one small student, one strong teacher.

    python benchmarks/kd_methods.py --root runs/methods          all of them, two hours on two cores
    python benchmarks/kd_methods.py scratch kd dkd               the methods named

Fashion-MNIST, the built-in convnet: the teachers have 128 channels and five epochs, the student 8
channels and three, five seeds a method. Loss weights are the published ones; nothing was tuned
for this table. Every training is a `kd train` line, printed as it starts; what is finished is only
read, and a line of figures a method goes to ROOT/results.jsonl. The last lines are a table for
docs/results.md.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

STUDENT = "--student convnet:8 --epochs 3"
TAUGHT = "--teacher {root}/teacher-0 --cache {root}/answers"
LAYERS = "2,6,10"  # the ReLUs of the three blocks, of 28x28, 14x14 and 7x7 maps in both networks
METHODS = {  # name: options
    "scratch": "",
    "kd": f"{TAUGHT} --loss ce:0.1,kd:0.9:temperature=4",
    "dkd": f"{TAUGHT} --loss ce:1,dkd:1",
    "dist": f"{TAUGHT} --loss ce:1,dist:2",
    "at": f"--teacher {{root}}/teacher-0 --loss ce:1,at:1000@{LAYERS}",
    "rkd": "--teacher {root}/teacher-0 --loss ce:1,rkd-distance:25,rkd-angle:50",
    "crd": "--teacher {root}/teacher-0 --loss ce:1,crd:0.8:negatives=4096",
    "mutual": "--peers convnet:8",
    "mean-teacher": "--mean-teacher 0.999 --loss ce:1,kd:1:temperature=1",
    "two-teachers": "--teacher {root}/teacher-0,{root}/teacher-1 --cache {root}/answers "
    "--loss ce:0.1,kd:0.9:temperature=4",
}
SEEDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("methods", nargs="*", metavar="method", help=", ".join(METHODS))
    parser.add_argument("--root", type=Path, default=Path("runs/methods"))
    options = parser.parse_args()
    unknown = set(options.methods) - set(METHODS)
    if unknown:
        parser.error(f"no method {', '.join(sorted(unknown))}: {', '.join(METHODS)}")
    root = options.root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    for seed in (0, 1):
        line = f"--student convnet --epochs 5 --seed {seed}"
        print("teacher", seed, trained(line, root / f"teacher-{seed}")["test_accuracy"])
    rows = []
    for name in options.methods or METHODS:
        line = f"{STUDENT} {METHODS[name].format(root=root)}"
        reports = [trained(f"{line} --seed {s}", root / f"{name}-{s}") for s in range(SEEDS)]
        found = summed(name, reports)
        with (root / "results.jsonl").open("a") as file:
            file.write(json.dumps(found) + "\n")
        rows.append(row(found))
        print(rows[-1], flush=True)
    print("\n".join(["", *HEAD, *rows]))


def trained(line: str, folder: Path) -> dict:
    """The report of a training, which is run unless it is there."""
    if not (folder / "report.json").exists():
        resume = ["--resume"] if folder.exists() else []
        arguments = ["train", "fashion-mnist", *shlex.split(line), "--out", str(folder), *resume]
        print("+ kd", shlex.join(arguments), flush=True)
        subprocess.run([sys.executable, "-m", "kd", *arguments], check=True)
    return json.loads((folder / "report.json").read_text())


def summed(name: str, reports: list[dict]) -> dict:
    """Means over the seeds, and the deviation of the accuracy."""
    accuracies = [report["test_accuracy"] for report in reports]
    names = ("seconds", "peak_memory", "startup_seconds")
    costs = {key: float(np.mean([report[key] for report in reports])) for key in names}
    mean, deviation = float(np.mean(accuracies)), float(np.std(accuracies, ddof=1))
    return {"method": name, "test_accuracy": accuracies, "mean": mean, "std": deviation} | costs


HEAD = (
    "| method | test accuracy, % | training | start | peak memory |",
    "|---|---|---|---|---|",
)


def row(found: dict) -> str:
    """One line of the table."""
    return (
        f"| {found['method']} | {100 * found['mean']:.2f} ± {100 * found['std']:.2f} | "
        f"{found['seconds']:.0f} s | {found['startup_seconds']:.1f} s | "
        f"{found['peak_memory'] / 2**20:.0f} MiB |"
    )


if __name__ == "__main__":
    main()
