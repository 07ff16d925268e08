"""Shard weights over processes with FSDP, and gather them for validation, averages and checkpoints.

Trained weights are sharded, with their gradients and the optimizer's state. Frozen teachers stay
whole in every process: they have neither, and gathering them at each step would cost more than it
saves.

`torch.distributed.checkpoint.state_dict` gathers the same tensors to the bit and is not used. With
resnet18, AdamW and a frozen resnet50 on one CPU process, saving took 94 ms instead of 5 and loading
989 ms instead of 476; with two sharded processes they were alike. It names the optimizer's state by
parameters, and checkpoints number it: a map both ways would be more code than it replaces.
"""

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dsdistill.harness.errors import UserError, first_line


def requested_plugin() -> FullyShardedDataParallelPlugin | None:
    """The plugin of FSDP2, if `accelerate launch --use_fsdp` requests it; else None.

    Raises:
        UserError: If its options do not go together.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    try:
        return FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"these options of FSDP do not go together: {error}") from error


def check(on: Accelerator) -> None:
    """Refuse FSDP where Accelerate would silently ignore it.

    Raises:
        UserError: If the engine does not use FSDP2.
    """
    if not on.is_fsdp2:
        where = f"{on.num_processes} x {on.device.type}"
        raise UserError(f"FSDP needs several GPUs, and this is {where}: leave --use_fsdp out")


def shard(
    on: Accelerator, objective: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, Any]:
    """Shard objective and optimizer with `Accelerator.prepare`; frozen modules stay whole.

    Raises:
        UserError: If FSDP cannot wrap a module.
    """
    assert on.state.fsdp_plugin is not None
    frozen = [module for module in objective.modules() if _is_frozen(module)]
    on.state.fsdp_plugin.ignored_modules = frozen
    try:
        return on.prepare(objective, optimizer)
    except ValueError as error:
        raise UserError(f"FSDP cannot wrap these modules: {first_line(error)}") from error


def unshard(value: Tensor) -> Tensor:
    """Gather a tensor from all processes, each of which must call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def distribute_like(value: Tensor, like: Tensor) -> Tensor:
    """Give a whole tensor the shape, the device and the sharding of another one.

    Raises:
        RuntimeError: If the numbers of elements differ.
    """
    value = value.view(like.shape).to(like.device)
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements)


def gather(network: nn.Module, into: nn.Module) -> nn.Module:
    """Gather a sharded network's weights, and the first process's buffers, into a whole copy."""
    state = {name: unshard(value) for name, value in network.state_dict().items()}
    for name, _ in network.named_buffers():
        if name in state:
            distributed.broadcast(state[name], src=0)
    into.load_state_dict(state)
    return into


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters(recurse=False))
    return bool(parameters) and not any(p.requires_grad for p in parameters)
