"""Transfer sets on Fashion-MNIST: what a small student learns from a teacher's answers alone.

    python benchmarks/data_free.py --root runs/data-free            three seeds
    python benchmarks/data_free.py --seeds 1 --cifar cifar10        seed 0, CIFAR-10 in a folder

One teacher with batch norm for each seed; of it images are inverted with and without the statistics
of its batch norm layers, and made by a generator. Beside them stand noise, CIFAR-10 in gray, real
images, and a set of KIP, all as `kd train fashion-mnist --transfer SET`: the data give figures
alone, and the weights of the last epoch count, for nothing is chosen on validation images. The
control is the real images, whose answers belong to other images of the batch. Every run is a line
of a command, printed as it starts; what is finished is only read, and what was stopped goes on. The
last lines are a table for docs/results.md.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import dsdistill.cli
import kd.cli
from dsdistill.harness import paths
from dsdistill.harness.data import datasets, distilled_set, labeled_images, preprocess
from dsdistill.harness.data.distilled_set import DistilledSet
from kd.objectives.schemes import Distillation

DATA, IMAGES, SIDE = "fashion-mnist", 1000, 28
TEACHER, STUDENT = "data_free:network(width=24)", "data_free:network(width=8)"
TEACHER_STEPS, STUDENT_STEPS = 800, 400
NO_CHOICE = f"--steps {STUDENT_STEPS} --validate-every {STUDENT_STEPS}"  # of the last epoch
CONTROL = "real, answers permuted"
SYNTHESES = {
    "inversion, batch norm": "--method inversion --steps 100 --bn-weight 5",
    "inversion, no batch norm": "--method inversion --steps 100 --bn-weight 0",
    "generator": "--method generator --steps 400 --width 16",
}
ROWS = (
    *(
        "inversion, batch norm",
        "inversion, no batch norm",
        "noise",
        "smooth noise",
        "gray CIFAR-10",
    ),
    *("real", CONTROL, "KIP, 10 per class", "real, 10 per class", "generator"),
)


def network(num_classes: int, in_channels: int, width: int) -> nn.Module:
    """Three 3x3 convolutions of stride 2 with batch norm, the mean over the map, a linear layer."""
    layers: list[nn.Module] = []
    fan_in = in_channels
    for channels in (width, 2 * width, 4 * width):
        convolution = nn.Conv2d(fan_in, channels, 3, stride=2, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
        fan_in = channels
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(fan_in, num_classes)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("runs/data-free"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cifar", default="cifar10", help="CIFAR-10: its name, or a folder")
    options = parser.parse_args()
    root = options.root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in ROWS}
    for seed in range(options.seeds):
        teacher = root / f"teacher-{seed}"
        line = f"train {DATA} --student '{TEACHER}' --steps {TEACHER_STEPS} --seed {seed}"
        print("teacher", finished(line, teacher)["test_accuracy"], flush=True)
        for name in ROWS:
            images = transfer_set(root, teacher, name, seed, options.cifar)
            line = (
                f"train {DATA} --transfer {shlex.quote(str(images))} --teacher {teacher} "
                f"--trust-module '{TEACHER}' --student '{STUDENT}' {NO_CHOICE} --seed {seed}"
            )
            out = root / f"student-{_word(name)}-{seed}"
            reports[name].append(finished(line, out, permuted=name == CONTROL))
    print("\n".join(table(reports)), flush=True)


def transfer_set(root: Path, teacher: Path, name: str, seed: int, cifar: str) -> Path:
    """The set of a row, which is made unless it is there."""
    if name in SYNTHESES:
        out = root / f"set-{_word(name)}-{seed}"
        line = f"synthesize {teacher} {SYNTHESES[name]} --images {IMAGES} --seed {seed}"
        run(kd.cli.main, "kd", f"{line} --trust-module '{TEACHER}'", out, "distilled.safetensors")
        return out
    if name.startswith("KIP"):
        out = root / f"set-{_word(name)}-{seed}"
        line = f"kip {DATA} --images-per-class 10 --kernel fc --steps 100 --seed {seed}"
        run(dsdistill.cli.main, "dsdistill", line, out, "distilled.safetensors")
        return out
    name = "real" if name == CONTROL else name
    path = root / f"set-{_word(name)}-{seed}.safetensors"
    if not path.exists():
        save(path, plain_images(name, np.random.default_rng(seed), cifar), name)
    return path


def save(path: Path, images: np.ndarray, name: str) -> None:
    """Write images as a distilled set, which is trained on whole; its labels say nothing."""
    pixels = preprocess.unit_range(images)
    classes = tuple(map(str, range(10)))
    labels = np.zeros((len(images), len(classes)), np.float32)
    made = DistilledSet(pixels, labels, preprocess.identity(1), classes, {"method": name})
    distilled_set.save(path, made)


def plain_images(name: str, rng: np.random.Generator, cifar: str) -> np.ndarray:
    """Images (n, h, w, 1) of a row that no network made, as bytes."""
    if name == "noise":
        return rng.integers(0, 256, (IMAGES, SIDE, SIDE, 1), dtype=np.uint8)
    if name == "smooth noise":
        return smooth_noise(rng)
    if name == "gray CIFAR-10":
        splits = datasets.load(cifar, root=paths.data_root(), image_size=SIDE, channels=1)
        rows = rng.choice(len(splits.train), IMAGES, replace=False)
        return splits.train.select(np.sort(rows)).images()
    train = datasets.load(DATA, root=paths.data_root()).train
    per_class = 10 if name.endswith("10 per class") else IMAGES // 10
    return train.select(labeled_images.draw_per_class(train, per_class, rng)).images()


def smooth_noise(rng: np.random.Generator) -> np.ndarray:
    """Noise of several scales, each enlarged to the whole image, summed and stretched."""
    total = torch.zeros(IMAGES, 1, SIDE, SIDE)
    for side in (2, 4, 7, 14, SIDE):
        coarse = torch.from_numpy(rng.standard_normal((IMAGES, 1, side, side), np.float32))
        total += F.interpolate(coarse, (SIDE, SIDE), mode="bilinear") * (SIDE / side) ** 0.5
    low, high = total.amin((1, 2, 3), keepdim=True), total.amax((1, 2, 3), keepdim=True)
    return ((total - low) / (high - low) * 255).byte().permute(0, 2, 3, 1).numpy()


def finished(line: str, out: Path, *, permuted: bool = False) -> dict[str, Any]:
    """The report of a training, which is made unless it is there."""
    with answers_permuted(permuted):
        run(kd.cli.main, "kd", line, out, "report.json")
    return json.loads((out / "report.json").read_text())


def run(main: Callable[[], None], program: str, line: str, out: Path, result: str) -> None:
    """Run a command in this process, or go on with it, unless its result is there."""
    if (out / result).exists():
        return
    words = [*shlex.split(line), "--out", str(out)]
    if (out / "config.json").exists():
        code = ["--trust-module", f"{TEACHER},{STUDENT}"] if program == "kd" else []
        words = [words[0], "--resume", "--out", str(out), *code]
    print("+", shlex.join([program, *words]), flush=True)
    sys.argv = [program, *words]
    main()


@contextmanager
def answers_permuted(permuted: bool) -> Iterator[None]:
    """Give each image of a batch the teacher's answer to another one."""
    original = Distillation._teacher_logits

    def permute(self: Distillation, batch: Any) -> tuple[torch.Tensor, ...]:
        return tuple(torch.roll(logits, 1, 0) for logits in original(self, batch))

    if permuted:
        Distillation._teacher_logits = permute
    try:
        yield
    finally:
        Distillation._teacher_logits = original


def table(reports: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Lines of the table: means and sample deviations over the seeds."""
    lines = [
        "| transfer set | images | student, test % | entropy of the mean answer, % of ln 10 |",
        "|---|---|---|---|",
    ]
    for name, members in reports.items():
        accuracy = [100 * report["test_accuracy"] for report in members]
        share = [100 * r["transfer"]["mean_answer_entropy_share"] for r in members]
        images = members[0]["train_images"]
        lines.append(f"| {name} | {images} | {_spread(accuracy)} | {np.mean(share):.0f} |")
    return lines


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def _word(text: str) -> str:
    return text.replace(",", "").replace(" ", "-").lower()


if __name__ == "__main__":
    main()
