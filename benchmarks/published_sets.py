"""Distilled sets that others published, scored beside the figures of their authors.

    python benchmarks/published_sets.py dc-fashion-mnist-1=res_DC_FashionMNIST_ConvNet_1ipc.pt \\
        rfad-cifar10-10=cifar10/10/best.npz --cifar10 FOLDER --root runs/published

Each set is one `dsdistill evaluate`, printed as it starts; stopped at any moment, the same line
goes on where it was. The files are their authors' and not part of this project: `SETS` says where
they lie. --cifar10 names a folder of class folders where torchvision's files are not at hand; its
pictures may be JPEGs, on which accuracies are up to about a point lower. The last lines are a
table. Two cores take about 40 minutes for all.
"""

import argparse
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dsdistill.harness.reports import report, words

SEEDS = 2
_PROGRAM = "from dsdistill.cli import main; main()"  # of this Python


@dataclass(frozen=True)
class Published:
    """One published file.

    Attributes:
        source: Repository, and the file's path in it.
        data: What it was distilled from.
        learners: Of `dsdistill evaluate`.
        authors: Test accuracy in percent that the authors give, and of which learner.
    """

    source: str
    data: str
    learners: str
    authors: str


_RFAD = "yolky/RFAD: distilled_images_final/cifar10"
_POOL = "Distill-Generalization-Group/Distill-Generalization: result"
SETS = {
    "dc-fashion-mnist-1": Published(
        "gauravnuti/Text_Dataset_Condensation: result/res_DC_FashionMNIST_ConvNet_1ipc.pt",
        "fashion-mnist",
        "ridge,convnet",
        "70.5 (convnet, DC's paper; this file is another run)",
    ),
    "dc-cifar10-1": Published(
        f"{_POOL}/res_DC_CIFAR10_ConvNet_1ipc.pt",
        "cifar10",
        "ridge,convnet",
        "28.3 (convnet, DC's paper; this file is another run)",
    ),
    "rfad-cifar10-1": Published(
        f"{_RFAD}/1/best.npz", "cifar10", "ridge:convnet3", "53.6 (network of width 1024)"
    ),
    "rfad-cifar10-10": Published(
        f"{_RFAD}/10/best.npz", "cifar10", "ridge:convnet3", "66.3 (network of width 1024)"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sets", nargs="+", metavar="NAME=FILE", help=", ".join(SETS))
    parser.add_argument("--root", type=Path, default=Path("runs/published"))
    parser.add_argument("--cifar10", default="cifar10", help="a folder of class folders")
    options = parser.parse_args()
    files = dict(given.partition("=")[::2] for given in options.sets)
    if unknown := set(files) - set(SETS):
        parser.error(f"no set {', '.join(sorted(unknown))}: {', '.join(SETS)}")
    folders = {
        name: evaluated(name, Path(file), options.root, options.cifar10)
        for name, file in files.items()
    }
    print("\n".join(table({name: report.load(folder) for name, folder in folders.items()})))


def evaluated(name: str, file: Path, root: Path, cifar10: str) -> Path:
    """The folder of a set's evaluation, made unless it is finished."""
    out, entry = root / name, SETS[name]
    if not (out / report.NAME).exists():
        data = cifar10 if entry.data == "cifar10" else entry.data
        line = ["evaluate", str(file), "--data", data, "--learners", entry.learners]
        line += ["--controls", "random", "--seeds", str(SEEDS), "--out", str(out)]
        line += ["--resume"] if (out / "config.json").exists() else []
        print("dsdistill", shlex.join(line), flush=True)
        subprocess.run([sys.executable, "-c", _PROGRAM, *line], check=True)
    return out


def table(reports: dict[str, report.Report]) -> list[str]:
    """Markdown, one row for each set and learner."""
    lines = [
        "| set | learner | distilled | random images | the authors' |",
        "|---|---|---|---|---|",
    ]
    for name, found in reports.items():
        for learner in found.learners:
            rows = (found.row(learner, arm) for arm in ("distilled", "random"))
            cells = [words.accuracy(row) if row else words.NOTHING for row in rows]
            lines.append(f"| {name} | {learner} | {' | '.join(cells)} | {SETS[name].authors} |")
    return lines


if __name__ == "__main__":
    main()
