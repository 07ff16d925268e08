"""Where a training stands, as arrays and JSON: enough to go on bit for bit on the same machine.

Random numbers, learning rates and the order of the images need no state: they are functions of the
seed and the step.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsdistill.harness.errors import UserError, first_line
from dsdistill.harness.reports import schema
from kd.parallel import sharding
from kd.recipe import Recipe
from kd.training.optimization import mean_weights

Weights = Mapping[str, Tensor]
META_TYPES = {  # of a checkpoint's figures
    "step": int,
    "epoch": int,
    "stale": int,
    "seconds": float,
    "meter": Mapping[str, float] | None,
    "recipe": Mapping[str, Any],
}
PackedState = tuple[Mapping[str, np.ndarray], Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class BestEpoch:
    """The weights after an epoch that is among the best.

    Attributes:
        epoch: Counted from 1.
        figures: Of the validation images then; empty without any.
        weights: Of the network that was validated: the average, where there is one.
    """

    epoch: int
    figures: Mapping[str, float]
    weights: Weights


@dataclass(frozen=True, eq=False)
class TrainingState:
    """A training after some step.

    Attributes:
        step, epoch: How many are done; the epoch of the step may be unfinished.
        kept: The best epochs so far, the best first.
        stale: Validations in a row that found nothing better.
        meter: Sums of the figures of a round that is not over.
    """

    step: int = 0
    epoch: int = 0
    kept: tuple[BestEpoch, ...] = ()
    stale: int = 0
    meter: Mapping[str, float] | None = None

    @property
    def best_epoch(self) -> int:
        return self.kept[0].epoch if self.kept else 0

    @property
    def best_accuracy(self) -> float | None:
        return self.kept[0].figures.get("accuracy") if self.kept else None

    @property
    def best(self) -> dict[str, Tensor]:
        """The mean of the weights that were kept; usually they are one epoch's."""
        return mean_weights([dict(kept.weights) for kept in self.kept])


def copy_weights(network: nn.Module) -> dict[str, Tensor]:
    """The network's weights and buffers as they are now."""
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def check(saved: PackedState, recipe: Recipe) -> None:
    """Refuse what is no checkpoint of `kd train`, or one of another recipe.

    Args:
        saved: What `pack` gave; with the `recipe` as JSON, but for earlier versions.
        recipe: Of the training that is to go on.

    Raises:
        UserError: If it is.
    """
    meta = saved[1]
    try:
        schema.check("the checkpoint", meta, META_TYPES)
    except ValueError as error:
        raise UserError(
            f"{error}, and so none of `kd train`: start anew in another --out"
        ) from error
    if missing := {"step", "epoch", "kept", "optimizer", "groups"} - meta.keys():
        raise UserError(
            f"the checkpoint is none of `kd train` (it lacks {min(missing)}): start anew in "
            "another folder"
        )
    stored, now = meta.get("recipe") or {}, json.loads(json.dumps(asdict(recipe)))
    for name in stored:
        if name in now and stored[name] != now[name]:
            raise UserError(
                f"the checkpoint was made with {name.replace('_', ' ')} {stored[name]}, and the "
                f"training has {now[name]} now: put back config.json, or start anew in another "
                "folder"
            )


def pack(
    state: TrainingState,
    modules: Mapping[str, Weights],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
) -> PackedState:
    """Named arrays and a JSON-compatible remainder, for `runs.Run.save_state`.

    Args:
        state: What to say of it all.
        modules: What else has a state: `objective`, and `average` where there is one.
        optimizer, scaler: Their states.
    """
    tensors = {f"{m}.{k}": v for m, weights in modules.items() for k, v in weights.items()}
    tensors |= {f"kept.{i}.{k}": v for i, x in enumerate(state.kept) for k, v in x.weights.items()}
    stored = optimizer.state_dict()
    rest: dict[str, dict[str, Any]] = {}
    for index, values in stored["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            elif value is not None:
                rest.setdefault(str(index), {})[key] = value
    meta = {
        "step": state.step,
        "epoch": state.epoch,
        "kept": [{"epoch": x.epoch, "figures": dict(x.figures)} for x in state.kept],
        "stale": state.stale,
        "meter": state.meter,
        "optimizer": rest,
        "groups": [
            {k: _to_number(v) for k, v in group.items()} for group in stored["param_groups"]
        ],
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    whole = {name: sharding.unshard(value.detach()) for name, value in tensors.items()}
    return {name: value.cpu().numpy() for name, value in whole.items()}, meta


def unpack(
    saved: PackedState,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
    *,
    network: nn.Module,
) -> TrainingState:
    """Put modules, optimizer and scaler where `pack` found them.

    Args:
        saved: What `pack` gave.
        modules: Under the names that they were packed with.
        optimizer, scaler: Freshly made.
        network: Whose weights were kept; for their devices.

    Raises:
        UserError: If it was packed with other networks or another recipe.
    """
    try:
        return _restore(saved, modules, optimizer, scaler, network)
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        first = first_line(error)
        raise UserError(
            f"the checkpoint is of another network, loss or recipe ({first}): start anew in "
            "another folder"
        ) from error


def _restore(
    saved: PackedState,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    network: nn.Module,
) -> TrainingState:
    arrays, meta = saved
    for name, module in modules.items():
        # Not strict: an objective's frozen teachers are not stored.
        module.load_state_dict(_select_prefix(arrays, f"{name}.", module), strict=False)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in meta["optimizer"].items()}
    for name in arrays:
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            value = torch.from_numpy(arrays[name].copy())
            if value.shape == weights[int(index)].shape:
                value = sharding.distribute_like(value, weights[int(index)])
            moments.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": moments, "param_groups": meta["groups"]})
    if scaler is not None:
        scaler.load_state_dict(meta["scaler"])
    kept = tuple(
        BestEpoch(x["epoch"], x["figures"], _select_prefix(arrays, f"kept.{i}.", network))
        for i, x in enumerate(meta["kept"])
    )
    # An older checkpoint says nothing of `stale`, and its training had no patience to lose.
    return TrainingState(meta["step"], meta["epoch"], kept, meta.get("stale", 0), meta["meter"])


def after_validation(
    state: TrainingState,
    network: nn.Module,
    figures: Mapping[str, float] | None,
    *,
    metric: str,
    keep: int,
) -> TrainingState:
    """The state after a validation: the best epochs are kept, of equal ones the later.

    The later of two equals had the lower learning rate, but is no better for `stale`. Without
    figures the last epoch is the best.
    """
    found = BestEpoch(state.epoch, figures or {}, copy_weights(network))
    if figures is None:
        return TrainingState(state.step, state.epoch, (found,))
    sign = -1 if metric == "nll" else 1
    better = not state.kept or sign * figures[metric] > sign * state.kept[0].figures[metric]

    def order(kept: BestEpoch) -> tuple[float, int]:
        return sign * kept.figures[metric], kept.epoch

    best = sorted([*state.kept, found], key=order, reverse=True)[:keep]
    return TrainingState(state.step, state.epoch, tuple(best), 0 if better else state.stale + 1)


def _to_number(value: Any) -> Any:
    """A number where an optimizer keeps an option as a tensor, as timm's LAMB does."""
    return value.item() if isinstance(value, Tensor) else value


def _select_prefix(
    arrays: Mapping[str, np.ndarray], prefix: str, like: nn.Module
) -> dict[str, Tensor]:
    """The tensors under a prefix, on the devices of the module's own."""
    own = like.state_dict()
    names: Iterable[str] = (name for name in arrays if name.startswith(prefix))
    found = {name.removeprefix(prefix): torch.from_numpy(arrays[name].copy()) for name in names}
    return {name: sharding.distribute_like(value, own[name]) for name, value in found.items()}
