"""Fashion-MNIST: Label Solve and KIP with the convolutional kernel, outer losses and ridges of KIP.

    python benchmarks/kip.py ls-1 kip-1                    the cases named, in this order
    python benchmarks/kip.py --root runs/benchmark         all of them, four hours on two cores

Every case is a few `dsdistill` commands, printed as they start. Stopped at any moment, the same
line goes on where it was; what is finished is only read. The figures go to ROOT/results.jsonl:
test accuracy by ridge regression with the same kernel, and what is chosen by, validation accuracy.
`scorecard.py` judges the sets.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dsdistill.harness.data import distilled_set

COMMON = "--kernel convnet"
KIP = "kip fashion-mnist --learn-labels --images-per-class"
NEWTON = "--optimizer gauss-newton"
MSE = "--outer mse --ridge 1e-6"  # as the recorded figures
ADAM = "--schedule cosine --learning-rate 0.2 --label-learning-rate 0.02"
SMALL = f"{KIP} 1 --kernel convnet3 --image-size 14 --validation-images 2000"
CASES = {  # name: the runs, a command line and a folder each
    **{
        f"ls-{k}": [
            (f"ls fashion-mnist {COMMON} --images-per-class {k} --seed {s}", f"ls-{k}-{s}")
            for s in range(3)
        ]
        for k in (1, 10)
    },
    "kip-1": [(f"{KIP} 1 {COMMON} {NEWTON} {MSE} --seed {s}", f"kip-1-{s}") for s in range(3)],
    "kip-1-ce": [
        (f"{KIP} 1 {COMMON} {NEWTON} --outer ce --steps 80 --seed {s}", f"kip-1-ce-{s}")
        for s in range(3)
    ],
    "kip-10-ce": [(f"{KIP} 10 {COMMON} {NEWTON} --outer ce", "kip-10-ce-0")],
    "kip-10": [(f"{KIP} 10 {COMMON} {NEWTON} {MSE} --steps 30", "kip-10-0")],
    # The two optimisers on a small problem. Adam takes eight times the targets, at the best of the
    # rates 0.05, 0.1 and 0.2 by the validation images.
    "small-adam": [(f"{SMALL} {ADAM} {MSE} --steps 1600 --target-batch 250", "small-adam")],
    "small-newton": [(f"{SMALL} {NEWTON} {MSE} --target-batch 500", "small-newton")],
    # Outer loss and ridge on the same small problem.
    **{
        f"small-ce-{ridge}": [
            (f"{SMALL} {NEWTON} --target-batch 500 --outer ce --ridge {ridge}", f"small-ce-{ridge}")
        ]
        for ridge in ("1e-6", "1e-3", "1e-2")
    },
    # Outer losses and ridges, with the fully connected kernel and Adam.
    **{
        f"fc-{k}-{outer}-{ridge}{suffix}": [
            (
                f"kip fashion-mnist --images-per-class {k} --steps 300 --outer {outer} "
                f"--ridge {ridge}{learn} --seed {s}",
                f"fc-{k}-{outer}-{ridge}{suffix}-{s}",
            )
            for s in range(3)
        ]
        for k in (1, 10)
        for outer in ("mse", "ce")
        for ridge in ("1e-6", "1e-2")
        for suffix, learn in (("", ""), ("-labels", " --learn-labels --label-learning-rate 0.004"))
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="case", help=", ".join(CASES))
    parser.add_argument("--root", type=Path, default=Path("runs/benchmark"))
    options = parser.parse_args()
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"no case {', '.join(sorted(unknown))}: {', '.join(CASES)}")
    options.root.mkdir(parents=True, exist_ok=True)
    for name in options.cases or CASES:
        line = json.dumps({"case": name} | measured(name, options.root))
        print(line, flush=True)
        with (options.root / "results.jsonl").open("a") as file:
            file.write(line + "\n")


def measured(name: str, root: Path) -> dict[str, Any]:
    """Mean and deviation of the runs of a case, and their seconds."""
    accuracies, validation, before, seconds = [], [], [], []
    for line, folder in CASES[name]:
        finish(line, root / folder)
        found = distilled_set.load(root / folder / distilled_set.FILE_NAME).provenance
        accuracies.append(found["metrics"]["test_accuracy"])
        validation.append(found["metrics"].get("validation_accuracy"))
        before.append(found["metrics"]["initial_test_accuracy"])
        seconds.append(found["seconds"])
    return {
        "command": CASES[name][0][0],
        "test_accuracy": accuracies,
        "mean": float(np.mean(accuracies)),
        "deviation": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None,
        "validation_accuracy": validation,
        "before": before,
        "seconds": seconds,
    }


def finish(line: str, folder: Path) -> None:
    """Run a command to its end, unless it is there."""
    if (folder / distilled_set.FILE_NAME).exists():
        return
    resume = ["--resume"] if folder.exists() else []
    dsdistill([*shlex.split(line), "--out", str(folder), *resume])


def dsdistill(arguments: list[str]) -> None:
    print("+ dsdistill", shlex.join(arguments), flush=True)
    code = "from dsdistill.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)


if __name__ == "__main__":
    main()
