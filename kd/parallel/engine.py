"""Devices, processes and precision: an Accelerator, and what it is asked for.

`kd train` runs on one device; `accelerate launch -m kd train` and `torchrun -m kd train` on many.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dsdistill.harness.errors import UserError, first_line
from kd.parallel import sharding

Engine = Accelerator
Shared = TypeVar("Shared")


def make(device: str = "cpu", precision: str = "no") -> Engine:
    """An engine for a device that is there.

    Args:
        device: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`; of several processes
            each takes its own GPU.
        precision: `no`, `bf16`, `fp16`; `mixed` is bf16 where the GPU computes with it, else fp16,
            and `no` on a CPU.

    Raises:
        UserError: If the device is not there, or cannot compute so; for FSDP on one device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = _require_device(device).type
    if ":" in device:
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    spread = sharding.requested_plugin()
    engine = Accelerator(
        cpu=kind == "cpu", mixed_precision=resolve_precision(precision, kind), fsdp_plugin=spread
    )
    # cuDNN's default algorithms add up in no fixed order: a resumed run would be another one.
    torch.backends.cudnn.deterministic = True
    if kind != engine.device.type:
        raise UserError(
            f"asked for --device {device}, but this process computes on {engine.device}"
        )
    if spread:
        sharding.check(engine)
    return engine


def decide_on_main(on: Engine, decide: Callable[[], Shared]) -> Shared:
    """What the first process decides, in all of them; its error too, so that none waits in vain.

    Raises:
        UserError: In every process, if the first one does.
    """
    found: list[Any] = [None, None]
    if on.is_main_process:
        try:
            found[0] = decide()
        except UserError as error:
            found[1] = error
    found = broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def resolve_precision(precision: str, kind: str) -> str:
    """The precision that `mixed` stands for on a kind of device.

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
        raise UserError(f"device {name!r} is not there ({first}): use --device cpu") from error
    return device
