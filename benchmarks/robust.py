"""Adversarially robust students side by side: one small network, one robust teacher.

    python benchmarks/robust.py --root runs/robust            all of them, hours on two cores
    python benchmarks/robust.py rslad pgd --seeds 1           the methods named

Fashion-MNIST, attacks of eps 0.1 on pixels in [0, 1]. The teachers are trained by PGD and by labels
alone, for 1200 steps of 64 images; the student has 6,000 weights and 400 such steps. Weights and
temperatures of losses are the published ones, and one learning rate is for all: nothing was tuned.
Every training and every evaluation is a `kd` line, printed as it starts; what is finished is only
read: stopped at any moment, the same line goes on. First all trainings and PGD on 1000 test images,
then AutoAttack, seed after seed. The last lines are a table for docs/results.md.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

EPS = 0.1
ADVERSARY = f"--adversary pgd:eps={EPS}:steps=5"
STUDENT, TEACHER = "strided:network(width=8)", "strided:network(width=16)"
STEPS, TEACHER_STEPS = 400, 1200
COMMON = "--device cpu --lr 0.1"
TEACHERS = {"robust": f"{ADVERSARY} --loss adv-ce:1", "natural": "--loss ce:1"}
METHODS = {  # name: options
    "pgd": f"{ADVERSARY} --loss adv-ce:1",
    "rslad": f"{ADVERSARY} --teacher {{root}}/robust --loss rslad:5/6,kd:1/6:temperature=1",
    "ard": f"{ADVERSARY} --teacher {{root}}/robust --loss ard:1:temperature=30",
    "trades": f"{ADVERSARY} --loss ce:1,trades:6",
    "kd-natural": "--teacher {root}/natural --loss kd:1:temperature=1",
    "kd-robust": "--teacher {root}/robust --loss kd:1:temperature=1",
    "adaad": f"{ADVERSARY} --teacher {{root}}/robust --loss adaad:1",
    "rslad-natural": f"{ADVERSARY} --teacher {{root}}/natural "
    "--loss rslad:5/6,kd:1/6:temperature=1",
}
GRADIENT = {  # column: attack
    "PGD-20": f"pgd:eps={EPS}:steps=20",
    "PGD-50": f"pgd:eps={EPS}:steps=50",
    "PGD-20, eps 1": "pgd:eps=1:steps=20",
}
HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("methods", nargs="*", metavar="method", help=", ".join(METHODS))
    parser.add_argument("--root", type=Path, default=Path("runs/robust"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1000, help="test images for AutoAttack")
    options = parser.parse_args()
    if unknown := set(options.methods) - set(METHODS):
        parser.error(f"no method {', '.join(sorted(unknown))}: {', '.join(METHODS)}")
    root, methods = options.root.resolve(), options.methods or list(METHODS)
    root.mkdir(parents=True, exist_ok=True)
    for name, line in TEACHERS.items():
        train(TEACHER, TEACHER_STEPS, line, root / name)
    runs = {name: [root / name] for name in TEACHERS}
    runs |= {name: [root / f"{name}-{seed}" for seed in range(options.seeds)] for name in methods}
    for seed in range(options.seeds):
        for name in methods:
            line = f"{METHODS[name].format(root=root)} --seed {seed}"
            train(STUDENT, STEPS, line, runs[name][seed])
            attack(runs[name][seed], GRADIENT.values())
    for name in TEACHERS:
        attack(root / name, GRADIENT.values())
    ensemble = f"autoattack:eps={EPS}:images={options.images}"
    for number in range(options.seeds):
        for folders in runs.values():
            if number < len(folders):
                attack(folders[number], [ensemble])
    columns = {**GRADIENT, f"AutoAttack, {options.images} images": ensemble}
    print(f"| | n | clean, all test images | {' | '.join(columns)} |")
    print("|---|" + "---|" * (2 + len(columns)))
    for name, folders in runs.items():
        print(row(name, folders, columns.values()))


def train(student: str, steps: int, line: str, folder: Path) -> None:
    """Run a training unless it is finished."""
    if (folder / "report.json").exists():
        return
    resume = ["--resume"] if (folder / "config.json").exists() else []
    options = shlex.split(f"--steps {steps} {COMMON} {line}")
    trusted = ["--trust-module", TEACHER] if "--teacher" in options else []
    out = ["--out", str(folder), *resume]
    kd("train", "fashion-mnist", "--student", student, *options, *trusted, *out)


def attack(folder: Path, attacks: Iterable[str]) -> None:
    """Measure a run under attacks, each unless its figure is there."""
    path = folder / "attacks.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    trusted = ("--trust-module", f"{STUDENT},{TEACHER}")
    for each in attacks:
        if each not in figures:
            line = ("evaluate", str(folder), "--robust", each, *trusted, "--device", "cpu")
            measured = json.loads(kd(*line, "--json"))
            figures |= {"clean": measured["accuracy"], each: measured["robust_accuracy"]}
            path.write_text(json.dumps(figures, indent=2))


def kd(*arguments: str) -> str:
    """Run a command in this folder, where the networks are; return what it prints."""
    print("+ kd", shlex.join(arguments), file=sys.stderr, flush=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    command = [sys.executable, "-m", "kd", *arguments]
    options = {"check": True, "cwd": HERE, "env": environment, "text": True}
    return subprocess.run(command, stdout=subprocess.PIPE, **options).stdout


def row(name: str, folders: list[Path], attacks: Iterable[str]) -> str:
    """One line of the table: means and sample deviations in percent."""
    figures = [json.loads((folder / "attacks.json").read_text()) for folder in folders]
    columns = [[100 * each[key] for each in figures] for key in ("clean", *attacks)]
    return f"| {name} | {len(folders)} | {' | '.join(map(spread, columns))} |"


def spread(values: list[float]) -> str:
    """Mean and sample deviation."""
    mean = f"{np.mean(values):.1f}"
    return f"{mean} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
