"""What centred networks learn from a KIP set, beside ridge regression and uncentred ones.

    python benchmarks/centred.py --root runs/centred

One set of Fashion-MNIST by KIP with `fc`, and the rows of docs/results.md on centred learners: a
hidden layer of 512 with and without centring, the limit of a wide one, and the KIP papers' convnet
at a width for a CPU. An hour on two cores. Stopped at any moment, the same line goes on where it
was.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from scorecard import dsdistill

from dsdistill.harness.data import distilled_set
from dsdistill.harness.reports import report

EVALUATIONS = {  # name: options
    "fc-512": ("--learners", "ridge,kip-fc:512,uncentred:kip-fc:512", "--steps", "300"),
    "fc-4096": ("--learners", "ridge,kip-fc:4096", "--steps", "1000", "--seeds", "3"),
    "convnet-32": ("--learners", "kip-convnet:32", "--steps", "300", "--seeds", "3"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("runs/centred"))
    root = parser.parse_args().root
    run = root / "kip-fc-10"
    if not (run / distilled_set.FILE_NAME).exists():
        again = ["--resume"] if run.exists() else []
        dsdistill("kip", "fashion-mnist", "--steps", "300", "--out", str(run), *again)
    for name, what in EVALUATIONS.items():
        out = root / name
        if not (out / report.FILE_NAME).exists():
            again = ["--resume"] if out.exists() else []
            dsdistill(
                "evaluate", str(run), *what, "--controls", "random", "--out", str(out), *again
            )


if __name__ == "__main__":
    main()
