"""Try one step of a training, on images of noise or a few texts, before anything is written.

The effect of a loss on a student is certain only when it is computed: a term may raise for a small
number of images or classes, give NaN, or leave a part of the student untrained. Each of these is an
error of one line here, instead of a traceback in the middle of a training, or no error at all.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from dsdistill.harness import imports
from dsdistill.harness.errors import UserError, first_line
from kd.data import batching
from kd.data.batching import Batch
from kd.models.networks import Shape
from kd.models.token_inputs import TokenInputs
from kd.models.wrapped_network import WrappedNetwork
from kd.objectives.schemes import Objective, as_module
from kd.parallel.engine import Engine

MAX_IMAGES = 4  # of the batch; more only cost time
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
    several: bool = False,
    world: int | None = None,
    teacher_shapes: Sequence[Shape] = (),
) -> None:
    """Compute a loss and its gradient for a batch like the smallest of an epoch.

    Weights, buffers and random numbers are left unchanged. With several processes, weights that the
    student's outputs do not depend on, such as a mask token, are frozen: the processes would wait
    for their gradients.

    Args:
        objective: The objective, before it is wrapped or compiled.
        loss: Text of the loss, for messages.
        sizes: Number of images of each batch of an epoch, over all processes.
        shape: Height, width and channels of an image.
        classes: Number of classes.
        images: Number of images in the training set; 0 if unknown.
        on: Engine of the training.
        mixed: Whether the images are mixed, so that their labels are shares of several classes.
        centred: Whether the data have real-valued labels.
        several: Whether an image has any number of labels.
        world: Number of processes that share a batch; None for all.
        teacher_shapes: Shape of each teacher's images, where they have their own.

    Raises:
        UserError: If the loss cannot be computed, is not finite, or leaves trained weights of a
            network without any gradient.
    """
    n = min(smallest_share(sizes, world or on.num_processes), MAX_IMAGES)
    batch = noise_batch(
        n, shape, classes, images=images, mixed=mixed, centred=centred, several=several
    )
    if teacher_shapes:
        h, w, c = teacher_shapes[0]
        noise = torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(0))
        batch = replace(batch, teacher_inputs=(noise,) * len(teacher_shapes))
    check_batch(objective, loss, batch, on=on)


def check_batch(
    objective: Objective, loss: str, batch: Batch, *, on: Engine, trains_outputs: bool = True
) -> None:
    """Compute a loss and its gradient for a batch, as `check`.

    Args:
        objective: The objective, before it is wrapped or compiled.
        loss: Text of the loss, for messages.
        batch: A few images or texts, on any device.
        on: Engine of the training.
        trains_outputs: Whether all weights that the student's outputs depend on must get a
            gradient; else some must, and with several processes the others are frozen.

    Raises:
        UserError: As for `check`.
    """
    module = as_module(objective).to(on.device)
    batch = batching.move(batch, on.device)
    networks = objective.trained_networks
    with (
        _preserve_state(objective),
        torch.random.fork_rng(),
        on.autocast(),
        _report_errors(loss, batch),
    ):
        used = _weights_with_gradient(module, _sum_outputs(networks, batch))
        torch.manual_seed(SEED)
        terms = module(batch)
        taught = _weights_with_gradient(module, torch.stack(list(terms.values())).sum())
    _check_finite(loss, terms, batch)
    left = [name for name in used if name not in taught]
    if left and (trains_outputs or len(left) == len(used)):
        raise UserError(_no_gradient_message(loss, left, len(used)))
    if on.num_processes > 1:
        with _preserve_state(objective), torch.random.fork_rng():
            # In training a network may leave out layers at random, here it has them all.
            module.eval()
            used += _weights_with_gradient(module, _sum_outputs(networks, batch))
        _freeze_unused(networks, {*used, *taught} if trains_outputs else {*taught}, module)


def smallest_share(sizes: Sequence[int], world: int) -> int:
    """Number of images in the smallest share of a batch that a process gets."""
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
    several: bool = False,
) -> Batch:
    """Build a batch of noise, with the classes in turn as labels; the same for the same arguments.

    Args:
        n: Number of images.
        shape: Height, width and channels of an image.
        classes: Number of classes.
        images: Number of images in the training set, whose first rows the batch gets; 0: no rows.
        mixed: Whether each image is a mix of two classes.
        centred: Whether the batch also has real-valued labels.
        several: Whether labels are 0 or 1 for each class.
    """
    h, w, c = shape
    noise = torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(n) % classes
    one_hot = nn.functional.one_hot(labels, classes).float()
    return Batch(
        noise,
        one_hot if several else labels,
        targets=one_hot - 1 / classes if centred else None,
        class_shares=0.7 * one_hot + 0.3 * one_hot.flip(0) if mixed else None,
        index=torch.arange(n) % images if images else None,
    )


@contextmanager
def _preserve_state(objective: Objective) -> Iterator[None]:
    """Set training mode inside the block; restore the mode and all buffers afterwards."""
    module = as_module(objective)
    frozen = module.state_dict().keys() - objective.checkpoint_state().keys()
    buffers = (buffer for name, buffer in module.named_buffers() if name not in frozen)
    copies, was_training = [(buffer, buffer.clone()) for buffer in buffers], module.training
    module.train()
    try:
        yield
    finally:
        module.train(was_training)
        module.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in copies:
                buffer.copy_(before)


@contextmanager
def _report_errors(loss: str, batch: Batch) -> Iterator[None]:
    """Turn any error inside the block into one line: networks and losses may raise anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        first = first_line(error) + imports.place(error)
        n = len(batch)
        what = "text" if isinstance(batch.inputs, TokenInputs) else "image"
        remedy = "raise --batch-size" if n == 1 else "choose another loss, student or --batch-size"
        rows = f"1 {what}" if n == 1 else f"{n} {what}s"
        raise UserError(
            f"--loss {loss} cannot be computed for a batch of {rows} ({first}): {remedy}"
        ) from error


def _sum_outputs(networks: Sequence[WrappedNetwork], batch: Batch) -> Tensor:
    """Sum the outputs of the networks: every weight that they depend on gets a gradient."""
    # The objective calls the networks in this order too, so their random draws are the same.
    torch.manual_seed(SEED)
    return torch.stack([network(batch.inputs).float().sum() for network in networks]).sum()


def _weights_with_gradient(module: nn.Module, value: Tensor) -> list[str]:
    """Names of the trained weights that a value depends on."""
    module.zero_grad(set_to_none=True)
    if value.requires_grad:
        value.backward()
    return [name for name, weight in module.named_parameters() if weight.grad is not None]


def _check_finite(loss: str, terms: dict[str, Tensor], batch: Batch) -> None:
    rows = "texts" if isinstance(batch.inputs, TokenInputs) else "images of noise"
    for name, value in terms.items():
        if not torch.isfinite(value):
            raise UserError(
                f"--loss {loss}: {name} is {value.item():g} on {rows}: check its weight, its "
                "parameters and the teacher"
            )


def _no_gradient_message(loss: str, left: Sequence[str], count: int) -> str:
    short = (name.removeprefix("inner.").removeprefix("student.network.") for name in left)
    modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in short))
    shown = ", ".join(modules[:3]) + (", ..." if len(modules) > 3 else "")
    return (
        f"--loss {loss} sends no gradient to {len(left)} of the {count} weights that the student's "
        f"outputs depend on, those of {shown}, which would keep their initial values: add a term "
        "on the outputs, such as ce:1 or kd:1"
    )


def _freeze_unused(
    networks: Sequence[WrappedNetwork], reached: set[str], module: nn.Module
) -> None:
    """Freeze the weights of the networks whose names are not in `reached`."""
    of_networks = {id(weight) for network in networks for weight in network.parameters()}
    for name, weight in module.named_parameters():
        if id(weight) in of_networks and name not in reached:
            weight.requires_grad_(False)
