"""The library's images from a network alone: a plain module in, images and its answers out.

import kd

made = kd.synthesize(teacher, (3, 32, 32), images=5000, low=low, high=high)
kd.distill(student, teacher, made.batches(128), loss="kd:1:temperature=4")
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsdistill.harness.errors import UserError, first_line, name_arguments
from dsdistill.harness.runs import progress as progress_display
from kd import api_arguments
from kd.evaluation import answer_balance
from kd.parallel import engine
from kd.synthesis import making, settings
from kd.synthesis.plausibility import KnownNetwork
from kd.training import borrowing

PHRASES = {
    "--method inversion": 'method="inversion"',
    "--method generator": 'method="generator"',
    "add --bn-weight 0": "give bn_weight=0",
}


@dataclass(frozen=True, eq=False)
class SynthesisResult:
    """Images that a network finds plausible.

    Attributes:
        images: The images, on the CPU, as the network takes them.
        labels: Its most probable class of each.
        probabilities: All its probabilities.
        mean_answer_entropy: Entropy of their mean in nats, at most ln k: how evenly the images
            cover the classes.
    """

    images: Float[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    probabilities: Float[Tensor, "n k"]
    mean_answer_entropy: float

    def batches(self, size: int) -> "torch.utils.data.DataLoader[tuple[Tensor, ...]]":
        """A loader of (images, labels) in a new order each epoch.

        Args:
            size: Images of a batch.
        """
        pairs = torch.utils.data.TensorDataset(self.images, self.labels)
        return torch.utils.data.DataLoader(pairs, batch_size=size, shuffle=True)


def synthesize(
    teacher: nn.Module,
    shape: tuple[int, int, int],
    *,
    method: settings.Method = "inversion",
    images: int = settings.IMAGES,
    low: float | Sequence[float] | None = None,
    high: float | Sequence[float] | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    bn_weight: float | None = None,
    tv_weight: float | None = None,
    balance_weight: float | None = None,
    width: int | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> SynthesisResult:
    """Make images from a network's weights alone, for a student to learn its answers from.

    The network comes back as it was, on its device, in its modes and without hooks; torch's random
    numbers go on as if nothing had been made. Nothing is written.

    Args:
        teacher: Network of images (n, c, h, w) that returns logits (n, k).
        shape: Channels, height and width of an image.
        method: `inversion` optimises pixels until the network calls them their classes and their
            statistics are those of its batch norm layers; `generator` trains a network from noise.
        images: Number of images.
        low, high: Smallest and largest value of a pixel, or of each channel: (0 - mean) / std and
            (1 - mean) / std. Without them pixels have no bounds.
        steps: Steps for each batch of images, by default 500; of the generator in all, 2000.
        batch_size: Images whose statistics are compared, by default 256 and 128.
        lr: Learning rate of Adam, by default 0.1 and 0.001.
        bn_weight: Weight of the distance from the statistics, by default 10 and 1; 0 for a network
            without batch norm.
        tv_weight: Weight of the total variation of inversion.
        balance_weight: Weight of the balance of classes of the generator.
        width: Channels of the generator's last hidden layer.
        device: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`.
        seed: Seed of all random choices.
        progress: Whether to show a bar on standard error.

    Returns:
        The images with the network's answers.

    Raises:
        UserError: A ValueError of one line: an argument breaks a rule, the network cannot take such
            images, or the loss is not finite.

    Source: Yin et al. (2020), arXiv:1912.08795; Chen et al. (2019), arXiv:1904.01186.
    """
    given = {
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "bn_weight": bn_weight,
        "tv_weight": tv_weight,
        "balance_weight": balance_weight,
        "width": width,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(name_arguments(PHRASES, api_arguments.TEXTS))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        numbers = settings.resolve(method, images, given)
        if not isinstance(seed, int) or seed < 0:
            raise UserError(f"seed must be a whole number of 0 or more, got {seed!r}")
        home = borrowing.device_of(teacher)
        stack.enter_context(borrowing.freeze(teacher))
        on = stack.enter_context(engine.temporary(device))
        stack.callback(teacher.to, home)
        teacher.to(on.device)
        bounds = _bounds(low, high, shape[0], on.device)
        known = KnownNetwork(
            teacher, (*shape[1:], shape[0]), _count_classes(teacher, shape, on.device), 1.0, bounds
        )
        numbers = settings.fit(
            numbers, who="teacher", classes=known.classes, has_batch_norm=known.has_batch_norm
        )
        synthesis = making.begin(known, numbers, seed, on.device)
        stack.enter_context(progress_display.silenced(not progress))
        show = stack.enter_context(progress_display.bar(synthesis.total))
        making.run(synthesis, lambda done, loss: show(done, loss=loss))
        judgement = making.judge(known, synthesis.images(), numbers, on.device)
        balance = answer_balance.measure(judgement.probabilities)
        return SynthesisResult(
            synthesis.images(),
            torch.from_numpy(judgement.classes),
            torch.from_numpy(judgement.probabilities).float(),
            balance.entropy,
        )


def _bounds(
    low: float | Sequence[float] | None,
    high: float | Sequence[float] | None,
    channels: int,
    device: torch.device,
) -> tuple[Tensor, Tensor] | None:
    """Smallest and largest value of each channel; None without any."""
    if low is None and high is None:
        return None
    ends = []
    for name, value in (("low", low), ("high", high)):
        end = torch.as_tensor(float("nan") if value is None else value, dtype=torch.float32)
        if end.shape not in ((), (channels,)) or not end.isfinite().all():
            raise UserError(
                f"{name} must be a number, or one for each of {channels} channels, and low and "
                f"high go together; got {value!r}"
            )
        ends.append(end.expand(channels)[:, None, None].to(device))
    if not (ends[0] < ends[1]).all():
        raise UserError(f"low must be below high, got {low} and {high}")
    return ends[0], ends[1]


def _count_classes(teacher: nn.Module, shape: tuple[int, int, int], device: torch.device) -> int:
    """Number of outputs, tried on two black images."""
    try:
        with torch.no_grad():
            outputs = teacher(torch.zeros(2, *shape, device=device))
    except Exception as error:  # a network may raise anything
        raise UserError(f"teacher cannot take images {(2, *shape)}: {first_line(error)}") from error
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != 2:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise UserError(f"teacher must give logits (2, k) for 2 images, got {got}")
    return outputs.shape[1]
