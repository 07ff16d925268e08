"""Read files of weights: a `.safetensors` file, or a checkpoint as torch saves it, under any name.

From timm, torchvision's reference scripts, Lightning, SuperGradients and others. Only tensors,
numbers and texts are read, so that no code in a file can run.

timm's `load_state_dict` is not used. It takes the first of four keys and drops the others: of the
checkpoints of RT-DETR, `model` beside `ema`, it returns the weights that are not averaged, without
a word. It reads eight of the fourteen forms that the tests write (ten with the types allowed here):
not those of SuperGradients, of compiled parts, or safetensors under another name. Its
`clean_state_dict` merges `module.a` with `a`.
"""

import argparse
import pathlib
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dsdistill.harness.data import image_files
from dsdistill.harness.errors import UserError, first_line
from dsdistill.harness.text import abbreviate_names, shorten
from kd.models import seals

Tensors = Mapping[str, Tensor]

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt", ".pkl")
MAX_WRAPPER_DEPTH = 4  # levels of nested dictionaries that are searched
# Keys under which trainers keep a network's weights; averages first, since those are for use.
_AVERAGED_KEYS = ("state_dict_ema", "model_ema", "ema_net", "ema_state_dict", "ema")
_PLAIN_KEYS = (
    *("state_dict", "model_state_dict", "model", "net", "network", "module", "student"),
    "model_state",
)


@dataclass(frozen=True)
class StoredWeights:
    """The tensors of a file.

    Attributes:
        path: The file.
        tensors: Tensors by their names in the file.
        averaged: Key under which they were, if they are a moving average; else None.
    """

    path: Path
    tensors: Tensors
    averaged: str | None = None


def read(path: Path) -> StoredWeights:
    """Read the tensors of a file, out of the dictionaries in which trainers nest them.

    Raises:
        UserError: If the file is missing or damaged, or holds no tensors, or more than tensors.
    """
    require_file(path)
    found = _load_safetensors(path) if _is_safetensors(path) else _load_torch(path)
    averaged = None
    for depth in range(MAX_WRAPPER_DEPTH, 0, -1):
        if (key := _weights_key(found, depth)) is None:
            break
        if key in _AVERAGED_KEYS and averaged is None:
            averaged = key
        found = found[key]
    tensors = {_strip_compile_mark(str(k)): v for k, v in found.items() if isinstance(v, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no weights by name: save the network's state_dict()")
    return StoredWeights(path, tensors, averaged)


def require_file(path: Path) -> None:
    """Refuse a path of weights that is no file.

    Raises:
        UserError: If it is a folder, or is not there.
    """
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file.suffix in SUFFIXES)
        held = f", which holds {abbreviate_names(inside)}" if inside else ""
        raise UserError(f"{path} is a folder{held}: give a file of weights after @")
    if not path.is_file():
        raise UserError(f"there is no file {path}")


def _is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors by its suffix, or by its first bytes: a length and `{`."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        first = file.read(9)
    return len(first) == 9 and first[8:] == b"{" and int.from_bytes(first[:8], "little") < 2**27


def _load_safetensors(path: Path) -> Mapping[str, Any]:
    if path.name == seals.WEIGHTS:  # of a run, which may have its checksum
        seals.verify(path.parent, path.name)
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        _refuse_foreign_file(path)
        raise UserError(f"{path} is not a whole .safetensors file: {error}") from error


def _load_torch(path: Path) -> Mapping[str, Any]:
    try:
        with torch.serialization.safe_globals(_safe_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # errors are reported once, below
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        _refuse_foreign_file(path)
        raise UserError(
            f"{path} holds more than tensors{_describe_unsafe_globals(path)}, or is no file of "
            "torch; nothing in it was run: save the network's state_dict() alone"
        ) from error
    except Exception as error:  # a damaged file has many ways to fail
        _refuse_foreign_file(path)
        if "TorchScript" in str(error):
            raise UserError(
                f"{path} is a TorchScript program, of which nothing was run: save the network's "
                "state_dict(), or export it with torch.export as .pt2"
            ) from error
        raise UserError(f"{path} is not readable: {first_line(error)}") from error
    if not isinstance(found, Mapping):
        raise UserError(f"{path} holds no weights by name: save the network's state_dict()")
    return found


def _refuse_foreign_file(path: Path) -> None:
    """Say what a file is that could not be read, where its first bytes tell.

    Raises:
        UserError: For an empty file, a pointer of Git LFS, and text such as a web page.
    """
    with path.open("rb") as file:
        start = file.read(200)
    if not start:
        raise UserError(f"{path} is an empty file: fetch it again")
    if start.startswith(image_files.LFS_PREFIX):
        raise UserError(f"{path} is a Git LFS pointer and not the weights: run git lfs pull")
    first = start.decode("utf-8", "ignore").strip()
    words = " ".join(first.split())
    if words.isprintable() and len(first.encode()) >= len(start.strip()) - 3:
        raise UserError(
            f"{path} is a text file and no weights (it begins with {shorten(words)!r}): fetch the "
            "file of weights itself"
        )


def _safe_globals() -> list[Any]:
    """Types that trainers save beside the weights and that run no code when they are created."""
    scalar: Any = np.float64(0).__reduce__()[0]  # creates a number from a dtype and bytes
    dtypes = {type(np.dtype(kind)) for kind in (*"?bBhHiIlLqQefdgFD", "S", "U")}
    return [
        *(argparse.Namespace, np.dtype, *dtypes, pathlib.PosixPath, pathlib.PurePosixPath),
        # NumPy 1 and 2 have different names for it.
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    ]


def _describe_unsafe_globals(path: Path) -> str:
    """Name, in brackets, other objects that loading the checkpoint would create."""
    try:
        with torch.serialization.safe_globals(_safe_globals()):
            found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # no zip file, or a damaged one
        return ""
    return f" ({', '.join(sorted(found)[:3])})" if found else ""


def _weights_key(found: Mapping[str, Any], depth: int = MAX_WRAPPER_DEPTH) -> str | None:
    """The key of the weights in a trainer's checkpoint; None if it has none."""
    return next(
        (k for k in (*_AVERAGED_KEYS, *_PLAIN_KEYS) if _has_tensors(found.get(k), depth)), None
    )


def _has_tensors(value: Any, depth: int) -> bool:
    if not isinstance(value, Mapping) or depth == 0:  # a pickle may contain itself
        return False
    held = any(isinstance(v, Tensor) for v in value.values())
    return held or _weights_key(value, depth - 1) is not None


def _strip_compile_mark(name: str) -> str:
    """Remove the prefix that torch.compile adds at any depth."""
    return name.replace("_orig_mod.", "")
