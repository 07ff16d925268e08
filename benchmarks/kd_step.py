"""Images a second of `kd`'s training loop against a bare loop, and against timm's task.

    python benchmarks/kd_step.py                 on the CPU
    python benchmarks/kd_step.py --device cuda

All four do the same student and teacher passes, the same loss and the same SGD step, in turns in
one process: `kd.training.loop` with everything that it does besides; a hand-written loop; a loop
over timm's LogitDistillationTask; and `kd.training.loop` with the teacher's answers known, against
a hand-written loop that never runs the teacher. Every turn takes them in another order.
Each line gives the ratio of `kd` to the others, the median over the turns, since a machine that is
shared slows down for seconds at a time; in brackets the quartiles. Above 1 it is faster. A turn is
one epoch: copying the weights, which `kd` does after a round of at least a hundred steps or a fifth
of the training, is not in it.
"""

import argparse
import functools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from timm.task import LogitDistillationTask
from timm.task.distillation import DistillationTeacher
from torch import nn

from dsdistill.harness.data import preprocess
from dsdistill.harness.data.labeled_images import Examples, LabeledImages
from kd.data import batching
from kd.models import networks
from kd.objectives import terms
from kd.objectives.schemes import Distillation
from kd.parallel import engine
from kd.recipe import Recipe
from kd.training.loop import train

T, ALPHA = 4.0, 0.9
CASES = {  # device: student, teacher, height and width, channels, batch
    "cpu": [
        ("convnet:32", "convnet:128", 28, 1, 64),
        ("resnet18", "resnet34", 32, 3, 32),
        ("mobilenetv3_small_050", "resnet18", 64, 3, 32),
    ],
    "cuda": [
        ("convnet:128", "convnet:128", 32, 3, 256),
        ("resnet18", "resnet34", 128, 3, 128),
        ("resnet50", "beit_base_patch16_224", 224, 3, 64),
    ],
}
WARM_UP = 3  # steps that are not timed


@dataclass(frozen=True, eq=False)
class Case:
    """Freshly made networks and images, on the device."""

    student: networks.Classifier
    teacher: networks.Classifier
    batches: batching.ResidentBatches
    device: torch.device


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=CASES)
    parser.add_argument("--turns", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="a turn")
    options = parser.parse_args()
    print(torch.cuda.get_device_name() if options.device == "cuda" else "CPU", torch.__version__)
    for student, teacher, size, channels, batch in CASES[options.device]:
        epoch = WARM_UP + options.steps
        case = made(student, teacher, size, channels, batch, epoch, options.device)
        loops = {"kd": ours, "bare": bare, "timm": timms, "known": known, "alone": alone}
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        for turn in range(options.turns):
            for name in random.Random(turn).sample(list(loops), len(loops)):
                seconds[name].append(loops[name](case, options.steps))
        rate = {name: batch / median(found) for name, found in seconds.items()}
        print(
            f"{student} from {teacher}, {size}x{size}x{channels}, batch {batch}: "
            f"{rate['kd']:.0f} images/s, {ratio(seconds, 'bare', 'kd')} of a bare loop, "
            f"{ratio(seconds, 'timm', 'kd')} of timm's task (itself "
            f"{ratio(seconds, 'bare', 'timm')} of the bare loop); with known answers "
            f"{rate['known']:.0f} images/s, {ratio(seconds, 'alone', 'known')} of a bare loop "
            f"without its teacher",
            flush=True,
        )


def ratio(seconds: dict[str, list[float]], rival: str, own: str) -> str:
    """Median and quartiles of how many times faster our loop was, turn by turn."""
    found = [a / b for a, b in zip(seconds[rival], seconds[own], strict=True)]
    low, middle, high = np.quantile(found, (0.25, 0.5, 0.75))
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def made(
    student: str, teacher: str, size: int, channels: int, batch: int, epoch: int, device: str
) -> Case:
    shape, n = (size, size, channels), epoch * batch
    rng = np.random.default_rng(0)
    images = rng.normal(size=(n, *shape)).astype(np.float32)
    labels = np.arange(n) % 10
    examples = Examples(
        LabeledImages(images, labels, tuple("0123456789")), preprocess.identity(channels)
    )
    where = torch.device(device)
    build = functools.partial(networks.build, shape=shape, classes=10, seed=1)
    ours, theirs = (build(name).to(where) for name in (student, teacher))
    return Case(ours, theirs, batching.prepare_resident(examples, batch, where), where)


def ours(case: Case, steps: int, batches: batching.ResidentBatches | None = None) -> float:
    """Seconds a step of `kd.training.loop`."""
    specs = terms.parse(f"ce:{1 - ALPHA},kd:{ALPHA}:temperature={T}")
    objective = Distillation(case.student, terms.build(specs, case.student), [case.teacher])
    recipe = Recipe(steps=WARM_UP + steps, lr=1e-3, batch_size=case.batches.size)
    marks: list[float] = []

    def show(done: int, **_: float) -> None:
        if done == WARM_UP or done == WARM_UP + steps:
            synchronised(case.device)
            marks.append(time.perf_counter())

    on = engine.make(case.device.type)
    train(objective, batches or case.batches, recipe, 0, on=on, show=show)
    return (marks[1] - marks[0]) / steps


def known(case: Case, steps: int) -> float:
    """The same with a table of the teacher's answers."""
    with torch.inference_mode():
        logits = torch.cat([case.teacher(b.images) for b in case.batches.in_order()])

    return ours(case, steps, replace(case.batches, teacher_logits=(logits.clone(),)))


def bare(case: Case, steps: int) -> float:
    """Seconds a step of the shortest loop that does the same."""
    case.teacher.eval()

    def loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        outputs = case.student(images)
        with torch.no_grad():
            answers = case.teacher(images)
        return distillation(outputs, answers, labels)

    return timed(case, loss, case.student, steps)


def alone(case: Case, steps: int) -> float:
    """The same without a teacher: its answers are constant."""
    answers = torch.randn(case.batches.size, 10, device=case.device)

    def loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return distillation(case.student(images), answers[: len(images)], labels)

    return timed(case, loss, case.student, steps)


def timms(case: Case, steps: int) -> float:
    """Seconds a step of timm's task."""
    channels = case.batches.examples.data.shape[-1]
    config = {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    for network in (case.student, case.teacher):
        network.pretrained_cfg = config  # pyright: ignore[reportArgumentType]
    task = LogitDistillationTask(
        case.student,
        DistillationTeacher(case.teacher, device=case.device),
        nn.CrossEntropyLoss(),
        distill_loss_weight=ALPHA,
        task_loss_weight=1 - ALPHA,
        temperature=T,
        device=case.device,
        verbose=False,
    )
    task.train()
    return timed(case, lambda images, labels: task(images, labels)["loss"], task, steps)


def timed(
    case: Case,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    trained: nn.Module,
    steps: int,
) -> float:
    """Seconds a step of SGD on a loss."""
    trained.train()
    case.teacher.eval()
    # Weight decay as in the recipe: another pass over all weights, a tenth of a step of ResNet-18.
    settings = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    optimizer = torch.optim.SGD(case.student.parameters(), 1e-3, **settings)
    images, began = stream(case), 0.0
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            synchronised(case.device)
            began = time.perf_counter()
        batch = next(images)
        optimizer.zero_grad()
        loss(batch.images, batch.labels).backward()
        optimizer.step()
    synchronised(case.device)
    return (time.perf_counter() - began) / steps


def distillation(
    outputs: torch.Tensor, answers: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    q, p = (F.log_softmax(x / T, dim=1) for x in (outputs, answers))
    kl = T * T * F.kl_div(q, p, reduction="batchmean", log_target=True)
    return ALPHA * kl + (1 - ALPHA) * F.cross_entropy(outputs, labels)


def stream(case: Case) -> Iterator[batching.Batch]:
    for epoch in range(1_000_000):
        yield from case.batches.epoch(0, epoch)


def synchronised(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
