"""Two views of an image, and recordings: what a teacher adds, beside its controls.

    python benchmarks/views.py fashion --root runs/views     28 to 7 pixels, 500 labels
    python benchmarks/views.py gray --cifar10 cifar10/       colour to gray, 2000 labels
    python benchmarks/views.py size --cifar10 cifar10/       32 to 16 pixels, 2000 labels
    python benchmarks/views.py official --digits digits/     spoken digits, the official split
    python benchmarks/views.py speakers --digits digits/     two of six speakers held out

Three seeds each; a seed draws the labelled images and the initial weights. Student and teacher are
three convolutions of stride 2 with batch norm, of 8, 16, 32 and of 24, 48, 96 channels. The
controls of a view: a teacher of the same size and labels that sees the poor view too, and one that
sees the whole image and has more labels. Nothing was tuned for these tables: the losses are the
defaults, the best epoch is the validation images'. Every training is a `kd train` line; what is
finished is only read. The last lines are a table for docs/results.md.
"""

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from torch import nn

from dsdistill.harness import paths
from dsdistill.harness.data import datasets
from dsdistill.harness.data.labeled_images import LabeledImages, draw_balanced
from kd import cli

SEEDS = 3
VALIDATION, SEVERAL = 1000, 10_000  # images; labels of the teacher that has more of them
SMALL, LARGE = "views:strided(width=8)", "views:strided(width=24)"
# The mean over all bands would leave out which band a sound is in.
SMALL_EAR, LARGE_EAR = (f"{name[:-1]}, pool=4)" for name in (SMALL, LARGE))
HELD_OUT_SPEAKERS = ("theo", "yweweler")
RECORDINGS = "--epochs 10"


def strided(in_channels: int, num_classes: int, width: int, pool: int = 1) -> nn.Module:
    """Three convolutions of stride 2 with batch norm, means of pool x pool parts, a linear one."""
    layers: list[nn.Module] = []
    channels = (in_channels, width, 2 * width, 4 * width)
    for fan_in, fan_out in pairwise(channels):
        convolution = nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(fan_out), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(pool), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(channels[-1] * pool**2, num_classes))


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: Name of the row, and of the folders of its trainings.
        text: What the table says.
        options: Options of `kd train`.
        teacher: Row whose network teaches; None for labels alone.
        more: Whether it has more labels.
    """

    name: str
    text: str
    options: str
    teacher: str | None = None
    more: bool = False


def view_rows(view: str, epochs: int) -> list[Row]:
    """Rows of a student that sees the poor view, its teachers and its controls."""
    poor, length = f"--student-view {view}", f"--epochs {epochs}"
    small, large = f"--student '{SMALL}' {poor} {length}", f"--student '{LARGE}' {length}"
    return [
        Row("alone", "student, labels alone", small),
        Row("teacher", "teacher of the whole image", large),
        Row("taught", "student of this teacher", small, "teacher"),
        Row("poor", "control: teacher of the poor view", f"{large} {poor}"),
        Row("taught-poor", "student of this control", small, "poor"),
        Row("more", "control: teacher of the whole image, 10,000 labels", large, more=True),
        Row("taught-more", "student of this control", small, "more"),
    ]


SOUND_ROWS = [
    Row("alone", "student, labels alone", f"--student '{SMALL_EAR}' {RECORDINGS}"),
    Row("teacher", "teacher", f"--student '{LARGE_EAR}' {RECORDINGS}"),
    Row("taught", "student of this teacher", f"--student '{SMALL_EAR}' {RECORDINGS}", "teacher"),
]
TABLES: Mapping[str, list[Row]] = {
    "fashion": view_rows("size:7", 40),
    "gray": view_rows("gray", 20),
    "size": view_rows("size:16", 20),
    "official": SOUND_ROWS,
    "speakers": SOUND_ROWS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--root", type=Path, default=Path("runs/views"))
    parser.add_argument("--cifar10", type=Path, help="folder with train/CLASS and test/CLASS")
    parser.add_argument("--digits", type=Path, help="folder with train/DIGIT and test/DIGIT")
    options = parser.parse_args()
    root = options.root.resolve() / options.table
    root.mkdir(parents=True, exist_ok=True)
    reports: dict[str, list[dict]] = {row.name: [] for row in TABLES[options.table]}
    linear = []
    for seed in range(SEEDS):
        data, more = _prepare_data(options, root, seed)
        if options.table in ("official", "speakers") and not linear:
            linear.append(linear_model(data))
            print(f"| linear model on the same images | {100 * linear[0]:.1f} |", flush=True)
        for row in TABLES[options.table]:
            taught = f" --teacher {root}/{row.teacher}-{seed}" if row.teacher else ""
            out = root / f"{row.name}-{seed}"
            line = f"{row.options}{taught} --seed {seed}"
            reports[row.name].append(_train(more if row.more else data, line, out))
            figures = reports[row.name][-1]
            print(seed, row.name, figures["validation_accuracy"], figures["test_accuracy"])
            sys.stdout.flush()
    print("\n| | test accuracy, % | minus labels alone |\n|---|---|---|")
    alone = _percents(reports["alone"])
    for row in TABLES[options.table]:
        accuracies = _percents(reports[row.name])
        gain = _mean(accuracies - alone) if row.teacher else ""
        print(f"| {row.text} | {_mean(accuracies)} | {gain} |")


def _percents(reports: list[dict]) -> np.ndarray:
    return 100 * np.array([report["test_accuracy"] for report in reports])


def _mean(values: np.ndarray) -> str:
    return f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"


def _train(data: Path, line: str, out: Path) -> dict:
    """The report of a training, which is run in this process unless it is finished."""
    if not (out / "report.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        sys.argv = ["kd", "train", str(data), *shlex.split(line), "--out", str(out)]
        if "--teacher" in line:
            sys.argv += ["--trust-module", f"{LARGE},{LARGE_EAR}"]
        cli.main()
    return json.loads((out / "report.json").read_text())


def _prepare_data(options: argparse.Namespace, root: Path, seed: int) -> tuple[Path, Path]:
    """Folders of few and of more labels with the same validation and test images."""
    if options.table == "fashion":
        return _fashion(root, seed)
    if options.table in ("gray", "size"):
        return _cifar(options.cifar10, root, seed)
    data = options.digits if options.table == "official" else _speakers(options.digits, root)
    return data, data


def _fashion(root: Path, seed: int) -> tuple[Path, Path]:
    splits = datasets.load("fashion-mnist", root=paths.data_root(), validation_fraction=0.1)
    few, more = root / f"few-{seed}", root / "more"
    for folder, count, drawn in ((few, 500, seed), (more, SEVERAL, SEEDS)):
        if folder.exists():
            continue
        half = folder.with_name(f"{folder.name}.half")
        shutil.rmtree(half, ignore_errors=True)
        _write_images(half / "train", _draw(splits.train, count, drawn))
        _write_images(half / "val", _draw(splits.validation, VALIDATION, 0))
        _write_images(half / "test", splits.test)
        half.rename(folder)
    return few, more


def _draw(images: LabeledImages, count: int, seed: int) -> LabeledImages:
    return images.select(draw_balanced(images.labels, count, np.random.default_rng(seed)))


def _write_images(folder: Path, images: LabeledImages) -> None:
    from PIL import Image

    for number, (pixels, label) in enumerate(zip(images.images(), images.labels, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[:, :, 0]).save(folder / str(label) / f"{number:05}.png")


def _cifar(cifar10: Path, root: Path, seed: int) -> tuple[Path, Path]:
    few, more = root / f"few-{seed}", root / "more"
    for folder, count, drawn in ((few, 200, seed), (more, SEVERAL // 10, SEEDS)):
        if folder.exists():
            continue
        half = folder.with_name(f"{folder.name}.half")
        shutil.rmtree(half, ignore_errors=True)
        for name in sorted(path.name for path in (cifar10 / "train").iterdir()):
            train = sorted((cifar10 / "train" / name).iterdir())
            held = VALIDATION // 10
            order = np.random.default_rng(drawn).permutation(len(train) - held)[:count]
            _link(half / "val" / name, train[-held:])
            _link(half / "train" / name, [train[i] for i in order])
            _link(half / "test" / name, sorted((cifar10 / "test" / name).iterdir())[:500])
        half.rename(folder)
    return few, more


def _speakers(digits: Path, root: Path) -> Path:
    """All recordings again, those of two speakers as the test part."""
    folder = root / "by-speaker"
    if not folder.exists():
        half = folder.with_name("by-speaker.half")
        shutil.rmtree(half, ignore_errors=True)
        for file in sorted(digits.rglob("*.wav")):
            held = file.stem.split("_")[1] in HELD_OUT_SPEAKERS
            _link(half / ("test" if held else "train") / file.parent.name, [file])
        half.rename(folder)
    return folder


def _link(folder: Path, files: Iterable[Path]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / file.name).symlink_to(file.resolve())


def linear_model(data: Path) -> float:
    """Test accuracy of multinomial logistic regression on standardised values.

    The strength of its decay is the best of four on the validation recordings.
    """
    from sklearn.linear_model import LogisticRegression

    splits = datasets.load(str(data), root=paths.data_root())
    parts = [part.images().reshape(len(part), -1) / 255.0 for part in _parts(splits)]
    mean, std = parts[0].mean(0), parts[0].std(0) + 1e-6
    train, validation, test = ((part - mean) / std for part in parts)
    fitted = [
        LogisticRegression(C=c, max_iter=300).fit(train, splits.train.labels)
        for c in (1e-4, 1e-3, 1e-2, 1e-1)
    ]
    best = max(fitted, key=lambda model: model.score(validation, splits.validation.labels))
    return float(best.score(test, splits.test.labels))


def _parts(splits: datasets.Splits) -> tuple[LabeledImages, LabeledImages, LabeledImages]:
    return splits.train, splits.validation, splits.test


if __name__ == "__main__":
    main()
