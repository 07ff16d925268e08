"""Pack the state of a training as arrays and JSON, and restore it.

A training resumes bit for bit on the same machine. Random numbers, learning rates and the order of
the images need no state: they are functions of the seed and the step.
"""

import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsdistill.harness.errors import UserError, first_line
from dsdistill.harness.reports import schema
from kd.data import teacher_cache
from kd.models.wrapped_network import WrappedNetwork
from kd.parallel import sharding
from kd.recipe import METRICS, Metric, Recipe
from kd.training.optimization import mean_weights

Weights = Mapping[str, Tensor]
META_TYPES = {  # types in a checkpoint's JSON part
    "step": int,
    "epoch": int,
    "stale": int,
    "seconds": float,
    "meter": Mapping[str, float] | None,
    "recipe": Mapping[str, Any],
}
# Parts of a recipe that follow from the length of the training, which may change on resume.
LENGTH_FIELDS = ("epochs", "steps", "warmup", "cooldown", "milestones", "patience")
PackedState = tuple[Mapping[str, np.ndarray], Mapping[str, Any]]  # arrays, and JSON


@dataclass(frozen=True, eq=False)
class BestEpoch:
    """The weights after an epoch that is among the best.

    Attributes:
        epoch: Number of the epoch, counted from 1.
        figures: Validation metrics after it; empty without validation images.
        weights: Weights of the network that was validated: the average, where there is one.
            Without those of `LeftOut`.
    """

    epoch: int
    figures: Mapping[str, float]
    weights: Weights


@dataclass(frozen=True, eq=False)
class TrainingState:
    """The progress of a training after some step.

    Attributes:
        step: Number of finished steps.
        epoch: Number of finished epochs.
        kept: The best epochs so far, the best first.
        stale: Number of consecutive validations without improvement.
        meter: Sums of the `Meter` of an unfinished round; None at the end of a round.
        stopped: Whether it was ended early, other than by its patience.
    """

    step: int = 0
    epoch: int = 0
    kept: tuple[BestEpoch, ...] = ()
    stale: int = 0
    meter: Mapping[str, float] | None = None
    stopped: bool = False

    @property
    def best_epoch(self) -> int:
        return self.kept[0].epoch if self.kept else 0

    @property
    def best_accuracy(self) -> float | None:
        return self.kept[0].figures.get("accuracy") if self.kept else None

    @property
    def best(self) -> dict[str, Tensor]:
        """The mean of the kept weights; usually those of one epoch."""
        return mean_weights([dict(kept.weights) for kept in self.kept])


@dataclass(frozen=True)
class LeftOut:
    """Weights of the student that no step changes and that a checkpoint does not hold.

    Attributes:
        names: Their names in the student's network; empty where all weights are stored.
        sha256: SHA-256 of them, which a training that goes on must have too.
    """

    names: frozenset[str] = frozenset()
    sha256: str = ""

    @classmethod
    def of_student(cls, student: WrappedNetwork) -> "LeftOut":
        """The frozen weights of a student which come from elsewhere, such as below adapters."""
        if not student.frozen_elsewhere:
            return cls()
        # A weight that is tied to another one stands in the state under both names.
        every = student.network.named_parameters(remove_duplicate=False)
        frozen = {name: weight for name, weight in every if not weight.requires_grad}
        return cls(frozenset(frozen), teacher_cache.hash_tensors(frozen))

    def of_objective(self, objective: nn.Module) -> set[str]:
        """Their names in an objective: in the student, and in an average of it that teaches it."""
        prefixes = [
            f"{name}.network."
            for name, module in objective.named_modules()
            if isinstance(module, WrappedNetwork) and module.frozen_elsewhere
        ]
        return {prefix + name for prefix in prefixes for name in self.names}


def copy_weights(network: nn.Module, left_out: Container[str] = ()) -> dict[str, Tensor]:
    """Copy the network's weights and buffers, all but some."""
    state = network.state_dict()
    return {name: w.detach().clone() for name, w in state.items() if name not in left_out}


def check(saved: PackedState, recipe: Recipe) -> None:
    """Refuse a checkpoint that is not of `kd train`, or of another recipe.

    Args:
        saved: Result of `pack`, with the `recipe` as JSON except in earlier versions.
        recipe: Recipe of the training that resumes; its length may be another one.

    Raises:
        UserError: If the checkpoint does not fit.
    """
    meta = saved[1]
    try:
        schema.check("the checkpoint", meta, META_TYPES)
    except ValueError as error:
        raise UserError(
            f"{error}, so it is not of `kd train`: start anew in another --out"
        ) from error
    if missing := {"step", "epoch", "kept", "optimizer", "groups"} - meta.keys():
        raise UserError(
            f"the checkpoint is not of `kd train` (it lacks {min(missing)}): start anew in "
            "another folder"
        )
    if changed := changed_field(meta.get("recipe") or {}, recipe):
        name, stored, now = changed
        raise UserError(
            f"the checkpoint was made with {name.replace('_', ' ')} {stored}, and the training has "
            f"{now} now: put back config.json, or start anew in another folder"
        )


def changed_field(stored: Mapping[str, Any], recipe: Recipe) -> tuple[str, Any, Any] | None:
    """The first field but its lengths in which a recipe differs from a stored one; None if none.

    Returns:
        Its name, the stored value and that of the recipe, as JSON.
    """
    fixed = {name: value for name, value in stored.items() if name not in LENGTH_FIELDS}
    return first_change(fixed, asdict(recipe))


def first_change(
    stored: Mapping[str, Any], current: Mapping[str, Any]
) -> tuple[str, Any, Any] | None:
    """The first name with another value than a stored one, and both as JSON; None if none."""
    now = json.loads(json.dumps(dict(current)))
    names = (name for name in stored if name in now and stored[name] != now[name])
    return next(((name, stored[name], now[name]) for name in names), None)


def adapt_to_length(saved: PackedState, recipe: Recipe) -> PackedState:
    """A stored training, with its patience anew and no early end if its length is another now.

    Args:
        saved: Result of `pack`, with the `recipe` as JSON except in earlier versions.
        recipe: Recipe of the training that resumes.
    """
    arrays, meta = saved
    stored = meta.get("recipe")
    if stored and any(stored.get(name) != getattr(recipe, name) for name in ("epochs", "steps")):
        meta = {**meta, "stale": 0, "stopped": False}
    return arrays, meta


def pack(
    state: TrainingState,
    modules: Mapping[str, Weights],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
    left_out: LeftOut = LeftOut(),
) -> PackedState:
    """Pack a training as named arrays and JSON-compatible values, for `run_folder.Run.save_state`.

    Args:
        state: Progress of the training.
        modules: Tensors of `objective`, and of `average` where there is one, that are stored.
        optimizer: Optimizer of the training.
        scaler: Gradient scaler of fp16; None without one.
        left_out: Weights that are not among them.
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
        "stopped": state.stopped,
        "meter": state.meter,
        "optimizer": rest,
        "groups": [{k: to_number(v) for k, v in group.items()} for group in stored["param_groups"]],
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    if left_out.names:
        meta["left_out"] = left_out.sha256
    # One by one: all sharded tensors at once, whole, may not fit the device.
    whole = (sharding.unshard(value.detach()).cpu().numpy() for value in tensors.values())
    return dict(zip(tensors, whole, strict=True)), meta


def unpack(
    saved: PackedState,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
    *,
    network: nn.Module,
    left_out: LeftOut = LeftOut(),
) -> TrainingState:
    """Restore modules, optimizer and scaler from a checkpoint.

    Args:
        saved: Result of `pack`.
        modules: Modules under the names that they were packed with; changed in place.
        optimizer, scaler: New optimizer and scaler; changed in place.
        network: Network whose weights were kept; gives their devices and layout.
        left_out: Weights that need not be in it, and were loaded again.

    Returns:
        The progress of the training.

    Raises:
        UserError: If it was packed with other networks or another recipe.
    """
    if saved[1].get("left_out", left_out.sha256) != left_out.sha256:
        raise UserError(
            f"the frozen weights of the student are others (SHA-256 was "
            f"{str(saved[1]['left_out'])[:12]}, is {left_out.sha256[:12] or 'none'}): put back the "
            "model that the training began with, or start anew in another folder"
        )
    try:
        return _restore(saved, modules, optimizer, scaler, network, left_out)
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
    left_out: LeftOut,
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
        BestEpoch(x["epoch"], x["figures"], _kept_weights(arrays, i, network, left_out))
        for i, x in enumerate(meta["kept"])
    )
    # Older checkpoints have no `stale`: their trainings had no patience. Nor have they `stopped`.
    stale, stopped = meta.get("stale", 0), meta.get("stopped", False)
    return TrainingState(meta["step"], meta["epoch"], kept, stale, meta["meter"], stopped)


def _kept_weights(
    arrays: Mapping[str, np.ndarray], number: int, network: nn.Module, left_out: LeftOut
) -> dict[str, Tensor]:
    """The weights of a kept epoch; a checkpoint of an earlier version holds all of them."""
    stored = _select_prefix(arrays, f"kept.{number}.", network)
    return {name: value for name, value in stored.items() if name not in left_out.names}


def after_validation(
    state: TrainingState,
    network: nn.Module,
    figures: Mapping[str, float] | None,
    *,
    metric: Metric,
    keep: int,
    left_out: Container[str] = (),
) -> TrainingState:
    """Update the kept epochs after a validation; of equal epochs the later is better.

    The later of two equal epochs had the lower learning rate, but does not reset `stale`. Without
    figures the last epoch is the best.

    Args:
        state: Progress of the training.
        network: Network that was validated.
        figures: Its validation metrics; None without validation images.
        metric: Metric that orders the epochs.
        keep: Number of epochs to keep.
        left_out: Names of weights that are not kept, for no step changes them.
    """
    latest = BestEpoch(state.epoch, figures or {}, copy_weights(network, left_out))
    if figures is None:
        return TrainingState(state.step, state.epoch, (latest,))
    sign = METRICS[metric].sign
    better = not state.kept or sign * figures[metric] > sign * state.kept[0].figures[metric]

    def order(kept: BestEpoch) -> tuple[float, int]:
        return sign * kept.figures[metric], kept.epoch

    best = sorted([*state.kept, latest], key=order, reverse=True)[:keep]
    return TrainingState(state.step, state.epoch, tuple(best), 0 if better else state.stale + 1)


def to_number(value: Any) -> Any:
    """Convert an option that an optimizer keeps as a tensor, as timm's LAMB does, to a number."""
    return value.item() if isinstance(value, Tensor) else value


def _select_prefix(
    arrays: Mapping[str, np.ndarray], prefix: str, like: nn.Module
) -> dict[str, Tensor]:
    """Select the tensors under a prefix, with the devices and layout of the module's tensors."""
    present = like.state_dict()
    names: Iterable[str] = (name for name in arrays if name.startswith(prefix))
    stored = {name.removeprefix(prefix): torch.from_numpy(arrays[name].copy()) for name in names}
    return {name: sharding.distribute_like(value, present[name]) for name, value in stored.items()}
