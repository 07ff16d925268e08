"""One step of a training on made-up images, before anything is written.

What a loss does to a student is known for certain only when it is computed: a term may raise for
so few images or classes, give no number, or leave a part of the student as it was initialised.
Each is said here in one line, and not by a traceback in the middle of a training, or never.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dsdistill.harness.errors import UserError, first_line
from kd.data import batching
from kd.data.batching import Batch
from kd.models.networks import Classifier, Shape
from kd.objectives.schemes import Distillation, MeanTeacher, Mutual, Objective
from kd.parallel.engine import Engine

MAX_IMAGES = 4  # more only cost time
SEED = 0


def check(
    objective: Objective,
    loss: str,
    sizes: Sequence[int],
    *,
    shape: Shape,
    classes: int,
    images: int,
    on: Engine,
    mixed: bool = False,
    centred: bool = False,
) -> None:
    """Compute a loss and its gradient as the smallest batch of an epoch will.

    Weights, buffers and random numbers are left as they were. Weights that the student's outputs
    do not depend on, such as a mask token, are frozen: several processes would wait for their
    gradients.

    Args:
        objective: Not wrapped and not compiled yet.
        loss: As it was written, for messages.
        sizes: Images of each batch of an epoch, over all processes.
        shape: Height, width and channels of an image.
        classes: Their number.
        images: In the training set; 0 where nobody knows.
        on: Where it computes.
        mixed: Whether the images are mixed, so that their labels are shares of several classes.
        centred: Whether the data have real-valued labels.

    Raises:
        UserError: If the loss cannot be computed, is not finite, or leaves trained weights of a
            network without any gradient.
    """
    objective.to(on.device)
    n = min(smallest_share(sizes, on.num_processes), MAX_IMAGES)
    made_up = noise_batch(n, shape, classes, images=images, mixed=mixed, centred=centred)
    made_up = batching.move(made_up, on.device)
    networks = _trained_networks(objective)
    with (
        _preserve_state(objective),
        torch.random.fork_rng(),
        on.autocast(),
        _report_errors(loss, n),
    ):
        used = _weights_with_gradient(objective, _sum_outputs(networks, made_up))
        torch.manual_seed(SEED)
        terms = objective(made_up)
        taught = _weights_with_gradient(objective, torch.stack(list(terms.values())).sum())
    _check_finite(loss, terms)
    if left := [name for name in used if name not in taught]:
        raise UserError(_no_gradient_message(loss, left, len(used)))
    if on.num_processes > 1:
        with _preserve_state(objective), torch.random.fork_rng():
            # In training a network may leave out layers at random, here it has them all.
            objective.eval()
            used += _weights_with_gradient(objective, _sum_outputs(networks, made_up))
        _freeze_unused(networks, {*used, *taught}, objective)


def smallest_share(sizes: Sequence[int], world: int) -> int:
    """Images of the smallest part of a batch that a process gets."""
    return min(
        len(batching.share_positions(n, rank, world)) for n in set(sizes) for rank in range(world)
    )


def noise_batch(
    n: int,
    shape: Shape,
    classes: int,
    *,
    images: int = 0,
    mixed: bool = False,
    centred: bool = False,
) -> Batch:
    """Noise with labels in turn: a batch that depends on its form alone.

    Args:
        n: Images.
        shape: Height, width and channels.
        classes: Their number.
        images: In the training set, of which these are the first; 0: their rows are not known.
        mixed: Whether each is a mix of two classes.
        centred: Whether it has real-valued labels too.
    """
    h, w, c = shape
    noise = torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(n) % classes
    whole = nn.functional.one_hot(labels, classes).float()
    return Batch(
        noise,
        labels,
        targets=whole - 1 / classes if centred else None,
        shares=0.7 * whole + 0.3 * whole.flip(0) if mixed else None,
        index=torch.arange(n) % images if images else None,
    )


def _trained_networks(objective: Objective) -> list[Classifier]:
    """The networks that are trained."""
    if isinstance(objective, Mutual):
        peers = [peer for peer in objective.peers if isinstance(peer, Classifier)]
        return [objective.student, *peers]
    return [objective.student]


@contextmanager
def _preserve_state(objective: Objective) -> Iterator[None]:
    """Training mode inside; buffers, such as running averages, and the mode as they were after."""
    plain = objective.inner if isinstance(objective, MeanTeacher) else objective
    frozen = plain.teachers.buffers() if isinstance(plain, Distillation) else ()
    known, was = set(map(id, frozen)), objective.training
    kept = [(buffer, buffer.clone()) for buffer in objective.buffers() if id(buffer) not in known]
    objective.train()
    try:
        yield
    finally:
        objective.train(was)
        objective.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)


@contextmanager
def _report_errors(loss: str, n: int) -> Iterator[None]:
    """An error inside as one line: networks and losses raise whatever they like."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        first = first_line(error)
        remedy = "raise --batch-size" if n == 1 else "choose another loss, student or --batch-size"
        images = "1 image" if n == 1 else f"{n} images"
        raise UserError(
            f"--loss {loss} cannot be computed for a batch of {images} ({first}): {remedy}"
        ) from error


def _sum_outputs(networks: Sequence[Classifier], batch: Batch) -> Tensor:
    """A number that every weight behind the outputs of the networks has a gradient of."""
    # As in the objective, which calls them in this order: what they draw at random is the same.
    torch.manual_seed(SEED)
    return torch.stack([network(batch.images).float().sum() for network in networks]).sum()


def _weights_with_gradient(objective: Objective, value: Tensor) -> list[str]:
    """The trained weights that a value depends on, by name."""
    objective.zero_grad(set_to_none=True)
    if value.requires_grad:
        value.backward()
    return [name for name, weight in objective.named_parameters() if weight.grad is not None]


def _check_finite(loss: str, terms: dict[str, Tensor]) -> None:
    for name, value in terms.items():
        if not torch.isfinite(value):
            raise UserError(
                f"--loss {loss}: {name} is {value.item():g} on images of noise: check its weight, "
                "its parameters and the teacher"
            )


def _no_gradient_message(loss: str, left: Sequence[str], count: int) -> str:
    short = (name.removeprefix("inner.").removeprefix("student.network.") for name in left)
    modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in short))
    shown = ", ".join(modules[:3]) + (", ..." if len(modules) > 3 else "")
    return (
        f"--loss {loss} sends no gradient to {len(left)} of the {count} weights that make the "
        f"student's outputs, those of {shown}, which would keep their first values: add a term on "
        "the outputs, such as ce:1 or kd:1"
    )


def _freeze_unused(networks: Sequence[Classifier], reached: set[str], objective: Objective) -> None:
    own = {id(weight) for network in networks for weight in network.parameters()}
    for name, weight in objective.named_parameters():
        if id(weight) in own and name not in reached:
            weight.requires_grad_(False)
