"""Read the files in which other projects publish distilled sets, without unpickling objects.

    res_DM_CIFAR10_ConvNet_10ipc.pt        DC, DSA and DM: {"data": [[images, labels], ...]}
    images_best.pt, labels_best.pt         MTT and its successors: one tensor per file
    ConvNet_ssize100_nozca_l_aug_ckpt1.npz KIP: `images` and `labels`
    cifar10/10/best.npz                    RFAD: `images`, `labels`, `k` and `jit`
    np/step500000.npz                      FRePo: `image` and `label`
    data.pt, data_best.pt                  IDC: [images, labels]
    images.npy, labels.npy                 one array per file
    {"images": ..., "labels": ...}         plain tensors or arrays; `dsdistill export`

This module finds the arrays, and what the kind of file tells about them.

Source of the formats: the programs of VICO-UoE/DatasetCondensation (`main.py`, `main_DM.py`),
GeorgeCazenavette/mtt-distillation (`distill.py`), google-research/kip (`dataset.ipynb`),
yolky/RFAD (`distillation.py`), yongchaoz/FRePo (`lib/datadistillation/utils.py`) and
snu-mllab/Efficient-Dataset-Condensation (`condense.py`, `test.py`).
"""

import hashlib
import math
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Num

from dsdistill.harness import memory
from dsdistill.harness.errors import UserError, first_line
from dsdistill.harness.text import abbreviate_names

SUFFIXES = (".pt", ".pth", ".npz", ".npy")
REMEDY = "save its images and labels with torch.save({'images': images, 'labels': labels}, FILE)"
CONVERSION = "numpy.savez('set.npz', images=images, labels=labels)"
# The list of accuracies in a DC file holds these; they are read as `_IgnoredScalar`.
_NUMPY_SCALARS = ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_EXPORT_KEYS = ("pixels", "mean", "std", "classes")  # keys of `dsdistill export`
# Names under which projects and their users keep images and labels, in lower case.
_IMAGES = (
    *("images", "image", "imgs", "img", "x", "data", "x_train", "x_proto", "x_syn"),
    *("image_syn", "images_syn", "syn_images", "syn_data"),
)
_LABELS = (
    *("labels", "label", "y", "targets", "target", "y_train", "y_proto", "y_syn"),
    *("label_syn", "labels_syn", "syn_labels", "syn_targets"),
)
_NPY_NAME_PAIRS = (
    ("image", "label"),
    ("data", "target"),
    ("data", "label"),
    ("x", "y"),
    ("X", "y"),
)
_MTT = re.compile(r"images_(?P<unwhitened>zca_)?(?P<step>\w+)\.pt")
_IDC = re.compile(r"data(_best|\d+)?\.pt")
_KIP = re.compile(r"_ssize\d+_(?P<no>no)?zca(_|$)")


@dataclass(frozen=True, eq=False)
class RawSet:
    """Arrays as published, and what the kind of file tells about them.

    Attributes:
        kind: `DC`, `MTT`, `KIP`, `RFAD`, `FRePo`, `IDC`, `dsdistill`, `plain` or `folder`.
        images: Images in any layout and range.
        labels: One number or one row per image.
        files: All files that were read.
        notes: Notes for the report.
        pixels, labels_as: Kinds of pixels and labels that the file implies; `auto` if none.
        mean, std: Constants that the file holds, one value per channel; None if it has none.
        classes: Class names in label order that the file holds; None if it has none.
        ambiguity: Why `auto` must not decide about the pixels; empty if it may.
        ridge: Relative ridge of the project's kernel ridge regression on the set; None if unknown.
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
    ambiguity: str = ""
    ridge: float | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the file; for several files, of the lines `<digest>  <name>`."""
        hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in self.files]
        lines = (f"{sha}  {file.name}\n" for sha, file in zip(hashes, self.files, strict=True))
        joined = hashlib.sha256("".join(lines).encode()).hexdigest()
        return hashes[0] if len(hashes) == 1 else joined


def holds_pair(folder: Path) -> bool:
    """Whether a folder has the two files of MTT, or `images.npy`."""
    names = [p.name for p in folder.iterdir()]
    return "images.npy" in names or any(_MTT.fullmatch(name) for name in names)


def read(path: Path) -> RawSet:
    """Read a published set from one of `SUFFIXES`, or a folder with the two files of a set.

    Raises:
        UserError: If it is missing, damaged, unsafe or of another kind, or if it was exported from
            a whitened set, since only the set's own file holds the whitening.
    """
    if path.is_dir() and (path / "images.npy").is_file():
        return _read_npy(path / "images.npy")
    if path.is_dir():
        return _read_torch(_best_mtt_file(path))
    suffix = path.suffix.lower()
    if suffix in (".pkl", ".pickle", ".p"):
        raise UserError(
            f"{path} is a pickle, which can run any program when it is loaded, so it is not read: "
            f"in the program that wrote it, use {CONVERSION}"
        )
    if suffix not in SUFFIXES:
        raise UserError(f"{path} must be a folder or one of {', '.join(SUFFIXES)}")
    return {".npz": _read_npz, ".npy": _read_npy}.get(suffix, _read_torch)(path)


def _best_mtt_file(folder: Path) -> Path:
    if (best := folder / "images_best.pt").is_file():
        return best
    names = sorted(p.name for p in folder.glob("images_*.pt"))
    raise UserError(
        f"{folder} has no images_best.pt: give one of its files ({abbreviate_names(names)})"
    )


def _read_torch(path: Path) -> RawSet:
    import torch

    content = _load_torch(path)
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        return _read_dc(path, content["data"])
    if isinstance(content, dict) and (names := _pair(path, content)):
        keep = {*names, *_EXPORT_KEYS}
        return _build_set(
            path, {k: _to_numpy(path, v) for k, v in content.items() if k in keep}, names
        )
    if isinstance(content, (list, tuple)) and len(content) == 2:
        images, labels = (_to_numpy(path, part) for part in content)
        return RawSet("IDC" if _IDC.fullmatch(path.name) else "plain", images, labels, (path,))
    if isinstance(content, torch.Tensor):
        return _read_mtt(path, _to_numpy(path, content))
    raise UserError(f"{path} holds no images with labels under a known name: {REMEDY}")


def _read_dc(path: Path, experiments: list[Any]) -> RawSet:
    """Read a file of Dataset Condensation, which holds the sets of all its repetitions."""
    last = experiments[-1] if experiments else None
    if not isinstance(last, (list, tuple)) or len(last) != 2:
        raise UserError(f"{path}: 'data' must be a list of [images, labels]: {REMEDY}")
    images, labels = (_to_numpy(path, part) for part in last)
    note = f"the last of {len(experiments)} sets in the file was taken"
    return RawSet("DC", images, labels, (path,), (note,) if len(experiments) > 1 else ())


def _read_mtt(path: Path, images: np.ndarray) -> RawSet:
    """Read two files of MTT, images and labels; a whitened run also saves unwhitened images."""
    match = _MTT.fullmatch(path.name)
    if match is None:
        raise UserError(f"{path} holds a single tensor, but no labels: {REMEDY}")
    labels_file = path.with_name(f"labels_{match['step']}.pt")
    labels = _to_numpy(labels_file, _load_torch(labels_file))
    raw = RawSet("MTT", images, labels, (path, labels_file))
    if match["unwhitened"]:
        return replace(raw, pixels="unit", notes=("the images are those with ZCA undone",))
    if any(path.parent.glob("images_zca_*.pt")):
        return replace(raw, pixels="zca-mtt")
    if images.ndim == 4 and 3 in (images.shape[1], images.shape[3]):
        raw = replace(raw, ambiguity="most colour sets of MTT are whitened by ZCA, others are not")
    return raw


def _read_npz(path: Path) -> RawSet:
    _require_memory(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            names = sorted(file.files)
            if not (pair := _pair(path, names)):
                raise UserError(f"{path} must hold 'images' and 'labels', has {names}")
            keep = [name for name in names if name in (*pair, *_EXPORT_KEYS, "jit")]
            for name in keep:
                _require_header(path, file.zip, name)
            arrays = {name: file[name] for name in keep}
    except UserError:
        raise
    except Exception as error:  # numpy raises OSError, ValueError, BadZipFile, zlib.error, EOFError
        raise UserError(f"{path} is not a readable .npz: {_explain_error(error)}") from error
    raw = _build_set(path, arrays, pair)
    if raw.kind != "plain":
        return raw
    if pair == ("images", "labels") and {"k", "jit"} <= set(names):
        return replace(raw, kind="RFAD", labels_as="centred", ridge=_ridge(path, arrays["jit"]))
    if pair == ("image", "label") and len(names) == 2:
        return replace(raw, kind="FRePo", labels_as="centred")
    if match := _KIP.search(path.stem):
        pixels = "standardised" if match["no"] else "zca"
        return replace(raw, kind="KIP", labels_as="centred", pixels=pixels)
    return raw


def _ridge(path: Path, jitter: np.ndarray) -> float:
    if jitter.size != 1 or jitter.dtype.kind != "f" or not 0 < jitter.item() < 1:
        raise UserError(
            f"{path}: RFAD's 'jit' must be one number between 0 and 1, got {jitter.dtype} of shape "
            f"{jitter.shape}: {REMEDY}"
        )
    return float(jitter.item())


def _read_npy(path: Path) -> RawSet:
    """Read images from one file, and labels from another one beside it."""
    names = [
        path.name.replace(image, label)
        for image, label in _NPY_NAME_PAIRS
        if image in path.name.split(".")[0]
    ]
    labels = next((file for name in names if (file := path.with_name(name)).is_file()), None)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if labels is None:
        expected = abbreviate_names(names) if names else "labels.npy beside images.npy"
        raise UserError(f"{path} holds a single array, but no labels: add {expected}")
    return RawSet("plain", _array(path), _array(labels), (path, labels))


def _array(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            _require_array(path, file, path.stat().st_size)
        return np.load(path, allow_pickle=False)
    except UserError:
        raise
    except Exception as error:  # as for .npz
        raise UserError(f"{path} is not a readable .npy: {_explain_error(error)}") from error


def _explain_error(error: Exception) -> str:
    text = first_line(error, kind=True)
    pickled = "Object arrays" in text
    return f"{text}; in the program that wrote it, use {CONVERSION}" if pickled else text


def _require_header(path: Path, archive: zipfile.ZipFile, name: str) -> None:
    """Refuse an array of an archive whose shape needs more bytes than it has, before allocation."""
    entry = name if name in archive.namelist() else f"{name}.npy"
    with archive.open(entry) as file:
        _require_array(path, file, archive.getinfo(entry).file_size)


def _require_array(path: Path, file: IO[bytes], size: int) -> None:
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise UserError(f"{path}: arrays must have format (1, 0) or (2, 0), got {version}")
    shape, _, dtype = read_header(file)
    if dtype.hasobject:  # NumPy itself refuses to load it
        return
    needed = math.prod(shape) * dtype.itemsize
    if needed > size:
        raise UserError(f"{path}: an array claims the shape {shape}, which its {size} bytes lack")
    memory.require(9 * math.prod(shape), f"an array of {path}", "take a smaller set")


def _pair(path: Path, names: Mapping[Any, Any] | Sequence[str]) -> tuple[str, str] | None:
    """Find the names of images and labels among others; None if there are none.

    Raises:
        UserError: If several names could be those of images or labels.
    """
    if {"images", "labels"} <= set(names):
        return "images", "labels"
    texts = [name for name in names if isinstance(name, str)]
    images = [name for name in texts if name.lower() in _IMAGES]
    labels = [name for name in texts if name.lower() in _LABELS]
    if not images or not labels:
        return None
    if len(images) > 1 or len(labels) > 1:
        raise UserError(
            f"{path} has several arrays that could be its images or labels "
            f"({abbreviate_names(images + labels)}): keep one of each, as 'images' and 'labels'"
        )
    return images[0], labels[0]


def _build_set(path: Path, arrays: dict[str, np.ndarray], pair: tuple[str, str]) -> RawSet:
    """Make a set of arrays by name; those of `dsdistill export` include their preprocessing."""
    raw = RawSet("plain", arrays[pair[0]], arrays[pair[1]], (path,))
    if pair != ("images", "labels"):
        raw = replace(raw, notes=(f"images are its {pair[0]!r}, labels its {pair[1]!r}",))
    if "classes" in arrays:
        raw = replace(raw, classes=tuple(map(str, arrays["classes"].ravel().tolist())))
    if not {"images", "pixels", "mean", "std"} <= arrays.keys():
        return raw
    parts = images, pixels, mean, std = [arrays[k] for k in ("images", "pixels", "mean", "std")]
    consistent = images.shape == pixels.shape and mean.shape == std.shape == images.shape[-1:]
    if not consistent or any(part.dtype.kind != "f" for part in parts):
        raise UserError(
            f"{path}: images, pixels, mean and std do not go together: export the set again"
        )
    with np.errstate(all="ignore"):  # values that are not finite are refused later
        plain = images * std + mean
    if not np.allclose(pixels, plain, atol=1e-3, equal_nan=True):
        raise UserError(f"{path} is exported from a whitened set: evaluate its .safetensors file")
    ours = replace(raw, kind="dsdistill", pixels="standardised", labels_as="centred")
    return replace(ours, mean=mean, std=std)


class _IgnoredScalar:
    """Stand-in for a NumPy scalar in a torch file; ignores its arguments."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def _load_torch(path: Path) -> Any:
    import torch

    _require_memory(path)
    allowed: list[Any] = [(_IgnoredScalar, name) for name in _NUMPY_SCALARS]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and numbers, or is no torch file; nothing in it was "
            f"run: {REMEDY}"
        ) from error
    except Exception as error:  # a damaged file has many ways to fail
        raise UserError(
            f"{path} is not a complete torch file: {first_line(error, kind=True)}"
        ) from error


def _to_numpy(path: Path, tensor: Any) -> np.ndarray:
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise UserError(f"{path} must hold tensors, got {type(tensor).__name__}: {REMEDY}")
    unusual = tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized
    if unusual or tensor.is_meta or tensor.is_complex():
        raise UserError(f"{path} must hold plain tensors of real numbers: {REMEDY}")
    # A tensor that stores one number can state any shape.
    memory.require(9 * tensor.numel(), f"a tensor of {path}", "its shape is not to be trusted")
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _require_memory(path: Path) -> None:
    """Refuse a missing file, and an archive that unpacks to more than the free memory."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            needed = sum(part.file_size for part in archive.infolist())
    except Exception:  # not an archive, or a damaged one: its reader reports that
        return
    memory.require(needed, str(path), "take a smaller set")
