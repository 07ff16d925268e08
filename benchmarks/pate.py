"""PATE on Fashion-MNIST: 200 teachers, 500 noisy answers, a student that saw no private image.

    python benchmarks/pate.py --root runs/pate

The 60,000 training images are private, 5,000 of the test images public, and the other 5,000 test
the student. Three runs; each trains its teachers anew, and draws its own noise. Teachers and
student are small, for two CPU cores. Nothing was chosen on test images. Every training is a `kd
train` line, printed as it starts; what is finished is only read. The last lines are a table for
docs/results.md.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

STUDENT = "--student convnet:16 --steps 300 --optimizer adamw --lr 3e-3 --augment crop-flip"
TEACHERS = "teachers=200,network=mlp:64,steps=40"
ROWS = {  # name: settings
    "sigma 40, 500 answers": "sigma=40,answers=500",
    "sigma 1e-3, 500 answers: no privacy": "sigma=1e-3,answers=500",
}
SEEDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("runs/pate"))
    parser.add_argument("--rows", type=int, default=len(ROWS), help="the first N rows alone")
    options = parser.parse_args()
    lines: list[str] = ["| votes | epsilon | test accuracy, % | seconds |", "|---|---|---|---|"]
    for number, (name, settings) in enumerate(list(ROWS.items())[: options.rows]):
        folders = [options.root / f"{number}-{seed}" for seed in range(SEEDS)]
        reports = [train(settings, seed, folder) for seed, folder in enumerate(folders)]
        values = 100 * np.array([report["test_accuracy"] for report in reports])
        seconds = np.mean([report["seconds"] for report in reports])
        spread = f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"
        lines.append(f"| {name} | {reports[0]['epsilon']:.2f} | {spread} | {seconds:.0f} |")
        print("\n".join(lines), flush=True)


def train(settings: str, seed: int, folder: Path) -> dict:
    """The report of a run, which is trained unless it is there."""
    if not (folder / "report.json").exists():
        line = (
            f"train fashion-mnist --pate {TEACHERS},{settings} --public test:5000 {STUDENT} "
            f"--seed {seed} --out {shlex.quote(str(folder))}"
        )
        resume = ["--resume"] if folder.exists() else []
        print("+ kd", line, *resume, flush=True)
        subprocess.run([sys.executable, "-m", "kd", *shlex.split(line), *resume], check=True)
    return json.loads((folder / "report.json").read_text())


if __name__ == "__main__":
    main()
