"""Where a training stands, as arrays and JSON: enough to go on bit for bit on the same machine.

Random numbers need no state: everything random in an epoch is derived from (seed, epoch).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class State:
    """A finished epoch of a training.

    Attributes:
        epoch, step: How many are done.
        best_epoch: After which the validation accuracy was highest; the last one without
            validation images.
        best_accuracy: That accuracy, a fraction; None without validation images.
        best: A copy of the network's weights then.
    """

    epoch: int = 0
    step: int = 0
    best_epoch: int = 0
    best_accuracy: float | None = None
    best: Weights = field(default_factory=dict)


def copy(network: nn.Module) -> dict[str, Tensor]:
    """The network's weights and buffers as they are now."""
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def pack(
    state: State, network: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Named arrays and a JSON-compatible remainder, for `runs.Run.save_state`."""
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"best.{k}": v for k, v in state.best.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in moments.items() if v is not None}
    meta = {name: getattr(state, name) for name in _META}
    return {name: value.detach().cpu().numpy() for name, value in tensors.items()}, meta


def unpack(
    arrays: Mapping[str, np.ndarray],
    meta: Mapping[str, Any],
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> State:
    """Put network and optimizer where `pack` found them."""
    tensors = {name: torch.from_numpy(value.copy()) for name, value in arrays.items()}
    shapes = network.state_dict()

    def weights(prefix: str) -> dict[str, Tensor]:
        # The file has no scalars: a counter of batch norm comes back with one dimension.
        found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        return {k: v.view_as(shapes[k]).to(shapes[k].device) for k, v in found.items()}

    network.load_state_dict(weights("network."))
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = value.view(()) if key == "step" else value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return State(**{name: meta[name] for name in _META}, best=weights("best."))


_META = ("epoch", "step", "best_epoch", "best_accuracy")
