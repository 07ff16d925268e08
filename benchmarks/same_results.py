"""Fingerprints of short runs of every kind, to compare two versions of the project to the bit.

    python benchmarks/same_results.py --root runs/before > before.txt      on one commit
    python benchmarks/same_results.py --root runs/after > after.txt        on another
    diff before.txt after.txt

Each line is a run, an array or figure of it, and its SHA-256 or value. Five minutes on two cores.
"""

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy

RUNS = {
    "kip-digits": "dsdistill kip digits --steps 200",
    "kip-newton": "dsdistill kip digits --optimizer gauss-newton --learn-labels --steps 20",
    "kip-warm-up": "dsdistill kip digits --kernel fc,fc(2) --warm-up fc:20 --steps 60 "
    "--augment shift",
    "kip-convnet": "dsdistill kip digits --kernel CRP-flatten --images-per-class 1 --steps 10",
    "kip-fashion": "dsdistill kip fashion-mnist --steps 50",
    "ls-digits": "dsdistill ls digits",
    "ls-conv": "dsdistill ls digits --kernel conv --images-per-class 1",
    "teacher": "kd train digits --student convnet:16 --epochs 4",
    "kd": "kd train digits --student mlp:16 --teacher teacher --epochs 3 --loss ce:0.1,kd:0.9",
    "at": "kd train digits --student convnet:8 --teacher teacher --epochs 2 "
    "--loss ce:1,at:1000@2,6",
    "crd": "kd train digits --student mlp:16 --teacher teacher --epochs 2 "
    "--loss ce:1,crd:0.8:negatives=256",
    "evaluate": "dsdistill evaluate kip-digits --learners ridge,mlp:32 --controls random,full "
    "--seeds 2 --steps 50",
}
FIGURES = ("test_accuracy", "validation_accuracy", "nll", "best_step", "validation_loss")
PROGRAMS = {name: f"from {name}.cli import main; main()" for name in ("dsdistill", "kd")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, required=True)
    root = parser.parse_args().root
    root.mkdir(parents=True, exist_ok=True)
    for name, text in RUNS.items():
        folder = root / name
        program, *words = shlex.split(text)
        if not folder.exists():
            line = [sys.executable, "-c", PROGRAMS[program], *words, "--out", name]
            env = os.environ | {"DSDISTILL_CACHE": str(root.resolve() / "cache")}
            done = subprocess.run(line, cwd=root, env=env, capture_output=True, text=True)
            if done.returncode:
                print(name, "failed:", done.stderr.strip().splitlines()[-1], flush=True)
                continue
        print("\n".join(f"{name} {line}" for line in fingerprint(folder)), flush=True)


def fingerprint(folder: Path) -> list[str]:
    """One line for each array and figure of a finished run."""
    lines = []
    for file in ("distilled.safetensors", "student.safetensors"):
        if (folder / file).exists():
            arrays = safetensors.numpy.load_file(folder / file)
            lines += [f"{key} {_digest(arrays[key])}" for key in sorted(arrays)]
    if (folder / "metrics.jsonl").exists():
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        losses = [json.loads(line).get("loss") for line in text.splitlines()]
        lines.append(f"losses {hashlib.sha256(repr(losses).encode()).hexdigest()}")
    if (folder / "report.json").exists():
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        lines += [f"{key} {report[key]!r}" for key in FIGURES if key in report]
        for row in report.get("results", []):
            lines.append(f"{row['learner']} {row['arm']} {row['seed']} {row['accuracy']!r}")
    return lines


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


if __name__ == "__main__":
    main()
