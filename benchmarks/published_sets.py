"""Distilled sets that others published, scored beside the figures of their authors.

    python benchmarks/published_sets.py dc-cifar10-10=res_DC_CIFAR10_ConvNet_10ipc.pt \\
        rfad-cifar10-10=cifar10/10/best.npz --cifar10 FOLDER --root runs/published

Each set is one `dsdistill evaluate`, printed as it starts; stopped at any moment, the same line
goes on where it was. The files are their authors' and not part of this project: `SETS` says where
they lie. --cifar10 names a folder of class folders where torchvision's files are not at hand; its
pictures may be JPEGs, which are not quite the published data. The last lines are a table.
"""

import argparse
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dsdistill.harness.reports import report, wording

SEEDS = 2
_PROGRAM = "from dsdistill.cli import main; main()"  # of this Python


@dataclass(frozen=True)
class Published:
    """One published file.

    Attributes:
        source: Repository, and the file's path in it.
        data: What it was distilled from.
        learners: Of `dsdistill evaluate`.
        authors: Test accuracies in percent that the authors give.
    """

    source: str
    data: str
    learners: str
    authors: str


_RFAD = "yolky/RFAD: distilled_images_final/cifar10"
_POOL = "Distill-Generalization-Group/Distill-Generalization: result"
SETS = {  # accuracies of the `.pt` files are those that they hold, of their authors' own networks
    "dc-cifar10-1": Published(
        f"{_POOL}/res_DC_CIFAR10_ConvNet_1ipc.pt",
        "cifar10",
        "ridge,mlp,convnet",
        "mlp 28.1, convnet 26.5",
    ),
    "dc-cifar10-10": Published(
        f"{_POOL}/res_DC_CIFAR10_ConvNet_10ipc.pt",
        "cifar10",
        "ridge,mlp,convnet",
        "mlp 27.2, convnet 42.2",
    ),
    "cam-dm-cifar10-10": Published(
        # In an earlier commit.
        "miaostudy/DatasetCondensation: result_0902/res_CAMDM_CIFAR10_ConvNet_10ipc.pt",
        "cifar10",
        "ridge,convnet",
        "convnet 47.9",
    ),
    "rfad-cifar10-1": Published(
        f"{_RFAD}/1/best.npz", "cifar10", "ridge:convnet3", "a centred network of width 1024: 53.6"
    ),
    "rfad-cifar10-10": Published(
        f"{_RFAD}/10/best.npz", "cifar10", "ridge:convnet3", "a centred network of width 1024: 66.3"
    ),
    "dc-fashion-mnist-1": Published(
        "gauravnuti/Text_Dataset_Condensation: result/res_DC_FashionMNIST_ConvNet_1ipc.pt",
        "fashion-mnist",
        "ridge,convnet",
        "none in the file",
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
    if not (out / report.FILE_NAME).exists():
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
            cells = [wording.accuracy(row) if row else wording.NOTHING for row in rows]
            lines.append(f"| {name} | {learner} | {' | '.join(cells)} | {SETS[name].authors} |")
    return lines


if __name__ == "__main__":
    main()
