"""Weights that FSDP spreads over processes: gathered to be judged, averaged and saved.

What is trained is spread, with its gradients and the optimizer's state. Frozen teachers stay whole
in every process: they have neither, and gathering them at each step would cost more than it saves.
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
    """FSDP in its second version, where `accelerate launch --use_fsdp` asks for it.

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
    """Refuse FSDP where Accelerate would leave it out without a word."""
    if not on.is_fsdp2:
        where = f"{on.num_processes} x {on.device.type}"
        raise UserError(f"FSDP needs several GPUs, and this is {where}: leave --use_fsdp out")


def shard(
    on: Accelerator, objective: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, Any]:
    """Objective and optimizer as `Accelerator.prepare` spreads them, what is frozen left whole.

    Raises:
        UserError: If modules are to be wrapped that cannot be.
    """
    assert on.state.fsdp_plugin is not None
    frozen = [module for module in objective.modules() if _is_frozen(module)]
    on.state.fsdp_plugin.ignored_modules = frozen
    try:
        return on.prepare(objective, optimizer)
    except ValueError as error:
        raise UserError(f"FSDP cannot wrap these modules: {first_line(error)}") from error


def unshard(value: Tensor) -> Tensor:
    """A tensor with the shares of all processes, each of which must call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def distribute_like(value: Tensor, own: Tensor) -> Tensor:
    """A whole tensor in the shape, on the device and as spread as another one.

    Raises:
        RuntimeError: If it has not as many elements.
    """
    value = value.view(own.shape).to(own.device)
    if not isinstance(own, DTensor):
        return value
    return distribute_tensor(value, own.device_mesh, own.placements)


def gather(network: nn.Module, into: nn.Module) -> nn.Module:
    """A spread network's weights, and the first process's buffers, in a whole copy of it."""
    found = {name: unshard(value) for name, value in network.state_dict().items()}
    for name, _ in network.named_buffers():
        if name in found:
            distributed.broadcast(found[name], src=0)
    into.load_state_dict(found)
    return into


def _is_frozen(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return bool(own) and not any(parameter.requires_grad for parameter in own)
