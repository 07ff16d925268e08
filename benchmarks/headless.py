"""A student without a head learns a foreign teacher's features on unlabelled images of CIFAR-10.

    python benchmarks/headless.py --cifar10 cifar10/ --foreign tinyimagenet-10x500/

The teacher is a network of ten classes of Tiny-ImageNet. The student, a smaller network, sees 300
images of each class of CIFAR-10 without labels (`--head none --transfer`). A linear probe and the
20 nearest neighbours, fitted on 150 other labelled images of each class, judge its embedding on 200
test images of each; the regularisation of the probe is chosen on a tenth of the labelled images,
which are held out. Beside it: the same student untrained; trained on these labels alone, with as
many steps, and then without its head; and taught by a teacher that has not been trained, which must
not help as much. Three seeds, which draw the images and the first weights. Nothing was tuned. Every
training is a `kd train` line; what is finished is only read.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from kd import cli
from kd.data import data_source
from kd.evaluation import probes
from kd.models import headless, saved_models
from kd.recipe import Recipe

SEEDS = 3
LABELLED, UNLABELLED, TEST = 150, 300, 200  # images per class
STUDENT, TEACHER = "convnet:16", "convnet:32"
FOREIGN_EPOCHS, EPOCHS = 6, 12
ROWS = {  # text of each row, options of its training
    "untrained": ("student, first weights", "--student {student} --steps 1 --lr 1e-9"),
    "labels": (
        "student of these labels alone",
        "--student {student} --epochs {longer}",
    ),
    "random": (
        "control: student of an untrained teacher's features",
        "--student {student} --head none --transfer {loose} --teacher {root}/blank "
        "--epochs {epochs}",
    ),
    "taught": (
        "**student of the foreign teacher's features, no labels**",
        "--student {student} --head none --transfer {loose} --teacher {root}/foreign "
        "--epochs {epochs}",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cifar10", type=Path, required=True, help="train/CLASS and test/CLASS")
    parser.add_argument("--foreign", type=Path, required=True, help="folder of other classes")
    parser.add_argument("--root", type=Path, default=Path("runs/headless"))
    options = parser.parse_args()
    root = options.root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    foreign = options.foreign.resolve()
    colours = f"--student {TEACHER} --image-size 32"
    _train(foreign, f"{colours} --epochs {FOREIGN_EPOCHS}", root / "foreign")
    _train(foreign, f"{colours} --steps 1 --lr 1e-9", root / "blank")
    results: dict[str, list[dict]] = {name: [] for name in ROWS}
    for seed in range(SEEDS):
        labelled, loose = _draw(options.cifar10.resolve(), root / f"data-{seed}", seed)
        for name, (_, line) in ROWS.items():
            # As many steps as on the unlabelled images.
            longer = EPOCHS * UNLABELLED // LABELLED
            values = {"student": STUDENT, "epochs": EPOCHS, "longer": longer}
            filled = line.format(**values, loose=loose, root=root)
            out = root / f"{name}-{seed}"
            report = _train(labelled, f"{filled} --image-size 32 --seed {seed}", out)
            measured = _probe(out, labelled) | {"test_accuracy": report["test_accuracy"]}
            results[name].append(measured)
            print(seed, name, measured, flush=True)
    print("\n| | linear probe, % | nearest neighbours, % | its own head, % |\n|---|---|---|---|")
    for name, (text, _) in ROWS.items():
        keys = ("linear_probe_accuracy", "nearest_neighbours_accuracy", "test_accuracy")
        cells = [_mean([row[key] for row in results[name]]) for key in keys]
        print(f"| {text} | {' | '.join(cells)} |")


def _mean(values: list[float | None]) -> str:
    if any(value is None for value in values):
        return ""
    percents = 100 * np.array(values)
    return f"{percents.mean():.1f} ± {percents.std(ddof=1):.1f}"


def _draw(cifar: Path, folder: Path, seed: int) -> tuple[Path, Path]:
    """Link labelled and test images in class folders, and others without classes in one."""
    labelled, loose = folder / "labelled", folder / "loose"
    if folder.exists():
        return labelled, loose
    partial, rng = folder.with_suffix(".partial"), np.random.default_rng(seed)
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "loose").mkdir(parents=True)
    for classes in sorted((cifar / "train").iterdir()):
        known = sorted(classes.iterdir())
        for i, row in enumerate(rng.permutation(len(known))[: LABELLED + UNLABELLED]):
            source = known[row]
            if i < LABELLED:
                _link(source, partial / "labelled" / "train" / classes.name / source.name)
            else:
                _link(source, partial / "loose" / f"{classes.name}-{source.name}")
        test = sorted((cifar / "test" / classes.name).iterdir())
        for row in rng.permutation(len(test))[:TEST]:
            _link(test[row], partial / "labelled" / "test" / classes.name / test[row].name)
    partial.rename(folder)
    return labelled, loose


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(source, target)


def _probe(run: Path, data: Path) -> dict:
    """Figures of the embedding of a run, whose head is left out where it has one."""
    model = saved_models.load_run(run)
    if model.has_head:
        headless.remove_head(str(run), model.classifier, model.shape)
    source = data_source.resolve(str(data), root=data, image_size=32, classes=None)
    known = Recipe(), model.preprocess, torch.device("cpu")
    train, test = source.sample(probes.TRAIN_IMAGES, *known), source.test(*known)
    assert test is not None
    return probes.figures(model.classifier, train, source.validation(*known), test)


def _train(data: Path, line: str, out: Path) -> dict:
    """The report of a training, which is run in this process unless it is finished."""
    if not (out / "report.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        sys.argv = ["kd", "train", str(data), *shlex.split(line), "--out", str(out)]
        cli.main()
    return json.loads((out / "report.json").read_text())


if __name__ == "__main__":
    main()
