"""Modules of a user's program, borrowed for a training and given back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from dsdistill.harness.errors import UserError
from kd.objectives import taps


@contextmanager
def borrow(student: nn.Module, others: Sequence[nn.Module]) -> Iterator[None]:
    """Give modules back on their devices, without hooks of ours, also after an error.

    All parameters require gradients as they did before, and have none. The others are in their
    training or evaluation mode again; the student is in evaluation mode.

    Args:
        student: The network that is trained inside the block.
        others: Its teachers, and losses that are modules.
    """
    modules = [student, *others]
    devices = [device_of(module) for module in modules]
    with _restore(modules, [part for other in others for part in other.modules()]):
        try:
            yield
        finally:
            for module, device in zip(modules, devices, strict=True):
                taps.remove(module)
                module.to(device)
                module.zero_grad(set_to_none=True)
            student.eval()


@contextmanager
def freeze(module: nn.Module) -> Iterator[None]:
    """Hold a module in evaluation mode, its parameters without gradients, and give it back."""
    with _restore([module], list(module.modules())):
        module.eval().requires_grad_(False)
        yield


@contextmanager
def _restore(modules: Sequence[nn.Module], parts: Sequence[nn.Module]) -> Iterator[None]:
    """Put parts back into their modes; parameters of modules require gradients as before."""
    trained = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    modes = [(part, part.training) for part in parts]
    try:
        yield
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        for part, training in modes:
            part.training = training


def device_of(module: nn.Module) -> torch.device:
    """The device of a module; the CPU for one without tensors.

    Raises:
        UserError: If its tensors are on several devices.
    """
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise UserError(
            f"{type(module).__name__} has tensors on {names}: move it to one device first"
        )
    return next(iter(devices), torch.device("cpu"))
