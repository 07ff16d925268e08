"""Weights in a file for a named architecture: `resnet18@FILE`.

A `.safetensors` file, or a `.pth`, `.pt` or `.bin` file as torch saves it; of the latter only
tensors are read, so that no code in it can run.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dsdistill.harness.errors import UserError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# Where trainers keep a network's weights; averaged ones first, since those are what is used.
_KEYS = (
    *("state_dict_ema", "model_ema", "ema_net", "ema_state_dict"),
    *("state_dict", "model_state_dict", "model", "net", "network", "module", "student"),
)
# What wrappers put before the names.
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.")
# Tables and counters that some releases of a library store and others compute.
_COMPUTED = ("num_batches_tracked", "relative_position_index", "attn_mask")


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, out of whatever a trainer has wrapped them in.

    Raises:
        UserError: If it is missing or damaged, or holds no tensors, or more than tensors.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    found = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    while (inner := _inner(found)) is not None:
        found = inner
    tensors = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no weights by name: save the network's state_dict()")
    return tensors


def load_into(network: nn.Module, path: Path, name: str) -> None:
    """Give a network the weights of a file.

    Args:
        network: Of the number of classes that is wanted.
        path: The file.
        name: Of the architecture, for messages.

    Raises:
        UserError: If the file holds those of another architecture or number of classes.
    """
    own = network.state_dict()
    given = _unwrapped(read(path), own)
    ours = {k for k in own if k in given or not k.endswith(_COMPUTED)}
    theirs = {k for k in given if k in own or not k.endswith(_COMPUTED)}
    missing, foreign = sorted(ours - theirs), sorted(theirs - ours)
    if missing or foreign:
        found = [_some("without", missing), _some("with unknown", foreign)]
        raise UserError(
            f"{path} does not hold the weights of {name}: it is {', '.join(filter(None, found))}"
        )
    differ = [(k, tuple(given[k].shape), tuple(own[k].shape)) for k in sorted(ours)]
    if differ := [(k, a, b) for k, a, b in differ if a != b]:
        k, a, b = differ[-1]  # heads come last in most networks
        if a and b and all((x[:1], y[:1], x[1:]) == (a[:1], b[:1], y[1:]) for _, x, y in differ):
            raise UserError(f"{path} holds weights of {name} for {a[0]} classes, not for {b[0]}")
        raise UserError(f"{path} does not fit {name}: {k} has shape {a}, not {b}")
    network.load_state_dict({k: given[k] for k in ours}, strict=False)


def made_for(
    tensors: Mapping[str, Tensor], network: nn.Module, classes: int, channels: int
) -> tuple[int, int]:
    """Classes and channels that weights are for, by where their shapes differ from a network's.

    Args:
        tensors: Of a file.
        network: Of the same architecture, for `classes` and `channels`.
    """
    own, heads, stems = network.state_dict(), set(), set()
    given = _unwrapped(tensors, own)
    shapes = [(tuple(given[k].shape), tuple(own[k].shape)) for k in own if k in given]
    for theirs, ours in shapes:
        if theirs[1:] == ours[1:] and ours[:1] == (classes,):
            heads.add(theirs[0])
        if (theirs[:1], theirs[2:]) == (ours[:1], ours[2:]) and ours[1:2] == (channels,):
            stems.add(theirs[1])
    # Where not one number alone differs it is another architecture, which `load_into` will say.
    return _only(heads - {classes}, classes), _only(stems - {channels}, channels)


def _only(found: set[int], otherwise: int) -> int:
    return found.pop() if len(found) == 1 else otherwise


def _safetensors(path: Path) -> Mapping[str, Any]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is not a whole .safetensors file: {error}") from error


def _torch(path: Path) -> Mapping[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, or is no file of torch; nothing in it was run: save "
            "the network's state_dict() alone"
        ) from error
    except Exception as error:  # a damaged file has many ways to fail
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} is not readable: {first}") from error
    if not isinstance(found, Mapping):
        raise UserError(f"{path} holds no weights by name: save the network's state_dict()")
    return found


def _inner(found: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The weights inside what a trainer saves beside its own state; None if these are they."""
    return next((found[k] for k in _KEYS if isinstance(found.get(k), Mapping)), None)


def _unwrapped(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With names as in a network, which may have had wrappers around it when it was saved."""
    found = dict(tensors)
    while not found.keys() & own.keys():
        wrapper = next((p for p in _PREFIXES if all(k.startswith(p) for k in found)), None)
        if wrapper is None:
            break
        found = {k.removeprefix(wrapper): v for k, v in found.items()}
    return found


def _some(word: str, names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{word} {names[0]}{more}" if names else ""
