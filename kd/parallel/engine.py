"""Create the Accelerator for a device, a precision and any number of processes.

`kd train` runs on one device; `accelerate launch -m kd train` and `torchrun -m kd train` on many.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import broadcast_object_list

from dsdistill.harness import agreement
from dsdistill.harness.errors import UserError, first_line
from kd.parallel import sharding

Engine = Accelerator
Shared = TypeVar("Shared")


def make(device: str = "cpu", precision: str = "no") -> Engine:
    """Create an engine for an available device.

    Args:
        device: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`; each of several
            processes takes its own GPU.
        precision: `no`, `bf16`, `fp16`; `mixed` is bf16 where the GPU supports it, else fp16, and
            `no` on a CPU.

    Raises:
        UserError: If the device is not available, or does not support the precision; for FSDP on
            one device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = _require_device(device).type
    if ":" in device:
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    fsdp_plugin = sharding.requested_plugin()
    engine = Accelerator(
        cpu=kind == "cpu",
        mixed_precision=resolve_precision(precision, kind),
        fsdp_plugin=fsdp_plugin,
    )
    # cuDNN's default algorithms sum in no fixed order, so a resumed run would differ.
    torch.backends.cudnn.deterministic = True
    if kind != engine.device.type:
        raise UserError(
            f"asked for --device {device}, but this process computes on {engine.device}"
        )
    if fsdp_plugin:
        sharding.check(engine)
    return engine


@contextmanager
def deterministic() -> Iterator[None]:
    """Let cuDNN sum in a fixed order inside the block, as in a training."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


@contextmanager
def temporary(device: str = "cpu", precision: str = "no") -> Iterator[Engine]:
    """Create an engine as `make` does, and restore all global settings at the end.

    Accelerate keeps one precision and one device for a whole process, and refuses others later; a
    program that uses Accelerate itself finds its own again.

    Raises:
        UserError: As `make`.
    """
    # A process group, once there, stays.
    one_process = int(os.environ.get("WORLD_SIZE", "1")) == 1
    shared = [AcceleratorState._shared_state, GradientState._shared_state]
    if one_process and not torch.distributed.is_initialized():
        shared.append(PartialState._shared_state)
    states = [dict(values) for values in shared]
    variable = os.environ.get("ACCELERATE_TORCH_DEVICE")
    for values in shared:
        values.clear()
    try:
        with deterministic():
            yield make(device, precision)
    finally:
        for values, before in zip(shared, states, strict=True):
            values.clear()
            values.update(before)
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
        if variable is not None:
            os.environ["ACCELERATE_TORCH_DEVICE"] = variable


def decide_on_main(on: Engine, decide: Callable[[], Shared]) -> Shared:
    """Decide in the first process, and broadcast its decision or its error to all processes.

    A decision that depends on files or clocks could differ between processes, and processes that
    diverge would deadlock.

    Args:
        on: Engine of the training.
        decide: Function that returns the decision; called in the first process only.

    Raises:
        UserError: In every process, if `decide` raises it or an OSError in the first one.
    """
    if on.num_processes == 1:
        return decide()
    return agreement.decide(
        decide,
        decides=on.is_main_process,
        broadcast=lambda answer: broadcast_object_list([answer])[0],
    )


def resolve_precision(precision: str, kind: str) -> str:
    """Resolve `mixed` to the precision for a kind of device; return others as they are.

    Raises:
        UserError: For fp16 on a CPU.
    """
    if precision == "mixed":
        if kind == "cpu":
            return "no"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision == "fp16" and kind == "cpu":
        raise UserError("--precision fp16 needs a GPU: use bf16 or no with --device cpu")
    return precision


def _require_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = first_line(error)
        raise UserError(f"device {name!r} is not available ({first}): use --device cpu") from error
    return device
