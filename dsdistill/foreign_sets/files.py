"""The files in which other projects publish distilled sets: read, never unpickled.

    res_DM_CIFAR10_ConvNet_10ipc.pt        DC, DSA and DM: {"data": [[images, labels], ...]}
    images_best.pt, labels_best.pt         MTT and its successors: a tensor each
    ConvNet_ssize100_nozca_l_aug_ckpt1.npz KIP: `images` and `labels`
    {"images": ..., "labels": ...}         plain tensors or arrays; `dsdistill export`

This module finds the arrays, and what the kind of file says of them.

Source of the formats: the programs of VICO-UoE/DatasetCondensation (`main.py`, `main_DM.py`),
GeorgeCazenavette/mtt-distillation (`distill.py`) and google-research/kip (`dataset.ipynb`).
"""

import hashlib
import pickle
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Num

from dsdistill.harness import memory
from dsdistill.harness.errors import UserError

SUFFIXES = (".pt", ".pth", ".npz")
REMEDY = "save its images and labels with torch.save({'images': images, 'labels': labels}, FILE)"
# A DC file's list of accuracies consists of these; they are read as `_Ignored`.
_NUMPY_SCALARS = ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_NAMES = ("images", "labels", "pixels", "mean", "std", "classes")
_MTT = re.compile(r"images_(?P<unwhitened>zca_)?(?P<step>\w+)\.pt")
_KIP = re.compile(r"_ssize\d+_(?P<no>no)?zca(_|$)")


@dataclass(frozen=True, eq=False)
class Raw:
    """Arrays as published, and what the kind of file says of them.

    Attributes:
        kind: `DC`, `MTT`, `KIP`, `dsdistill`, `plain` or `folder`.
        images: In any layout and range.
        labels: One number or one row an image.
        files: All that was read.
        notes: For the report.
        pixels, labels_as: What the kind of file says of them; `auto` where it does not.
        mean, std: One value a channel, where the file holds them.
        classes: Names in label order, where the file holds them.
        unclear: Why `auto` must not decide about the pixels; empty where it may.
    """

    kind: str
    images: Num[np.ndarray, "n ..."]
    labels: Num[np.ndarray, "n ..."]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    pixels: str = "auto"
    labels_as: str = "auto"
    mean: Num[np.ndarray, " c"] | None = None
    std: Num[np.ndarray, " c"] | None = None
    classes: tuple[str, ...] | None = None
    unclear: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 of the file; of several, that of the lines `<digest>  <name>`."""
        each = [hashlib.sha256(file.read_bytes()).hexdigest() for file in self.files]
        lines = (f"{sha}  {file.name}\n" for sha, file in zip(each, self.files, strict=True))
        return each[0] if len(each) == 1 else hashlib.sha256("".join(lines).encode()).hexdigest()


def holds_pair(folder: Path) -> bool:
    """Whether a folder has the two files of MTT."""
    return any(_MTT.fullmatch(p.name) for p in folder.iterdir())


def read(path: Path) -> Raw:
    """Read a published set from a `.pt`, `.pth` or `.npz` file, or a folder with MTT's files.

    Raises:
        UserError: If it is missing, damaged, hostile or none of these, or if it was exported from
            a whitened set, whose own file has the whitening.
    """
    if path.is_dir():
        return _torch(_best(path))
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} must be a folder or one of {', '.join(SUFFIXES)}")
    return _npz(path) if path.suffix == ".npz" else _torch(path)


def line(error: Exception) -> str:
    """An error of another library in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split("\n")[0].split())


def some(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _best(folder: Path) -> Path:
    if (best := folder / "images_best.pt").is_file():
        return best
    found = sorted(p.name for p in folder.glob("images_*.pt"))
    raise UserError(f"{folder} has no images_best.pt: give one of its files ({some(found)})")


def _torch(path: Path) -> Raw:
    import torch

    found = _load_torch(path)
    if isinstance(found, dict) and isinstance(found.get("data"), list):
        return _condensed(path, found["data"])
    if isinstance(found, dict) and {"images", "labels"} <= found.keys():
        return _named(path, {k: _numpy(path, v) for k, v in found.items() if k in _NAMES})
    if isinstance(found, (list, tuple)) and len(found) == 2:
        images, labels = (_numpy(path, part) for part in found)
        return Raw("plain", images, labels, (path,))
    if isinstance(found, torch.Tensor):
        return _matched_trajectory(path, _numpy(path, found))
    raise UserError(f"{path} holds no images with labels that are known here: {REMEDY}")


def _condensed(path: Path, experiments: list[Any]) -> Raw:
    """Dataset Condensation saves the sets of all its repetitions in one file."""
    last = experiments[-1] if experiments else None
    if not isinstance(last, (list, tuple)) or len(last) != 2:
        raise UserError(f"{path}: 'data' must be a list of [images, labels]: {REMEDY}")
    images, labels = (_numpy(path, part) for part in last)
    several = f"the last of {len(experiments)} sets in the file was taken"
    return Raw("DC", images, labels, (path,), (several,) if len(experiments) > 1 else ())


def _matched_trajectory(path: Path, images: np.ndarray) -> Raw:
    """MTT saves images and labels in two files; of a whitened run also images made plain again."""
    named = _MTT.fullmatch(path.name)
    if named is None:
        raise UserError(f"{path} holds one tensor, and its labels are nowhere: {REMEDY}")
    beside = path.with_name(f"labels_{named['step']}.pt")
    labels = _numpy(beside, _load_torch(beside))
    raw = Raw("MTT", images, labels, (path, beside))
    if named["unwhitened"]:
        return replace(raw, pixels="unit", notes=("the images are those with ZCA undone",))
    if any(path.parent.glob("images_zca_*.pt")):
        return replace(raw, pixels="zca-mtt")
    if images.ndim == 4 and 3 in (images.shape[1], images.shape[3]):
        raw = replace(raw, unclear="most colour sets of MTT are whitened by ZCA, others are not")
    return raw


def _npz(path: Path) -> Raw:
    _require_memory(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            names = sorted(file.files)
            found = {name: file[name] for name in names if name in _NAMES}
    except Exception as error:  # numpy raises OSError, ValueError, BadZipFile, zlib.error, EOFError
        raise UserError(f"{path} is not a readable .npz: {line(error)}") from error
    if not {"images", "labels"} <= found.keys():
        raise UserError(f"{path} must hold 'images' and 'labels', has {names}")
    raw = _named(path, found)
    named = _KIP.search(path.stem)
    if raw.kind != "plain" or named is None:
        return raw
    return replace(raw, kind="KIP", labels_as="centred", pixels="auto" if named["no"] else "zca")


def _named(path: Path, found: dict[str, np.ndarray]) -> Raw:
    """Arrays by name; those of `dsdistill export` carry their preprocessing."""
    raw = Raw("plain", found["images"], found["labels"], (path,))
    if "classes" in found:
        raw = replace(raw, classes=tuple(map(str, found["classes"].ravel().tolist())))
    if not {"pixels", "mean", "std"} <= found.keys():
        return raw
    parts = images, pixels, mean, std = [found[k] for k in ("images", "pixels", "mean", "std")]
    alike = images.shape == pixels.shape and mean.shape == std.shape == images.shape[-1:]
    if not alike or any(part.dtype.kind != "f" for part in parts):
        raise UserError(f"{path}: images, pixels, mean and std do not go together")
    with np.errstate(all="ignore"):  # what is not finite is refused later
        plain = images * std + mean
    if not np.allclose(pixels, plain, atol=1e-3, equal_nan=True):
        raise UserError(f"{path} is exported from a whitened set: evaluate its .safetensors file")
    ours = replace(raw, kind="dsdistill", pixels="standardised", labels_as="centred")
    return replace(ours, mean=mean, std=std)


class _Ignored:
    """Stands for a NumPy scalar in a file of torch: nothing is computed from what it is given."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def _load_torch(path: Path) -> Any:
    import torch

    _require_memory(path)
    allowed: list[Any] = [(_Ignored, name) for name in _NUMPY_SCALARS]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and numbers, or is no file of torch; nothing in it "
            f"was run: {REMEDY}"
        ) from error
    except Exception as error:  # a damaged file has many ways to fail
        raise UserError(f"{path} is not a whole file of torch: {line(error)}") from error


def _numpy(path: Path, tensor: Any) -> np.ndarray:
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise UserError(f"{path} must hold tensors, has a {type(tensor).__name__}: {REMEDY}")
    odd = tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized
    if odd or tensor.is_meta or tensor.is_complex():
        raise UserError(f"{path} must hold plain tensors of real numbers: {REMEDY}")
    # A tensor of one stored number can claim any shape.
    memory.require(9 * tensor.numel(), f"a tensor of {path}", "its shape is not to be trusted")
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _require_memory(path: Path) -> None:
    """Refuse a missing file, and an archive that unpacks to more than there is memory."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            needed = sum(part.file_size for part in archive.infolist())
    except Exception:  # not an archive, or a damaged one: what reads it will say so
        return
    memory.require(needed, str(path), "take a smaller set")
