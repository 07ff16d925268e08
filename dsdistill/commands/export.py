"""Export a distilled set for programs that do not read `.safetensors`, and read exports back."""

import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dsdistill.harness import checksums, files, memory
from dsdistill.harness.data import distilled_set, folder_names
from dsdistill.harness.data.distilled_set import DistilledSet, DistilledSetError
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress

SUFFIX = {"folder": "", "npz": ".npz", "torch": ".pt"}
# Text entries by which `read` recognises an export.
HEADER_KEYS = (distilled_set.HEADER_KEY, checksums.CHECKSUM_KEY)
MIN_REPORTED_CLIPPING = 0.01  # share of clipped values from which a message reports it


def write(path: Path, kind: str, out: Path | None) -> Path:
    """Export a set; return the path of the export.

    `folder` writes 8-bit PNGs for the eye: the preprocessing is undone, values beyond black and
    white are clipped, and real-valued labels are reduced to their largest class. Each image of a
    whitened set is shown with the mean contrast of the training images, since whitening has lost
    the image's own. A class folder has the name of its class, changed where a file system might
    refuse it; `classes.json` maps the folders to the classes.

    `npz` and `torch` keep everything: `images` as the kernel saw them, `labels`, `pixels` (the
    images with the preprocessing undone), the preprocessing (`mean`, `std`, and of a whitened set
    `whiten` and `unwhiten`), and in `dsdistill` a JSON text with the kind of preprocessing, the
    classes, the encoding of the labels and the provenance. `dsdistill evaluate` reads either.

    Args:
        path: The set's file, or its run's folder.
        kind: `folder`, `npz` or `torch`.
        out: Path of the export; by default beside the set's file. It appears only when complete.

    Raises:
        UserError: If the set cannot be read, or `out` exists or has another suffix.
    """
    file = distilled_set.locate(path)
    distilled = distilled_set.load(file)
    out = out or file.with_name(f"{file.stem}-{kind}{SUFFIX[kind]}")
    if SUFFIX[kind] and out.suffix != SUFFIX[kind]:
        raise UserError(f"--out must end in {SUFFIX[kind]} for --format {kind}, got {out}")
    if os.path.lexists(out):
        raise UserError(f"{out} exists already: choose another --out")
    writers: dict[str, Callable[[Path, DistilledSet], None]] = {
        "folder": _write_folder,
        "npz": _write_npz,
        "torch": _write_torch,
    }
    absolute = Path(os.path.abspath(out))
    parent = next(folder for folder in absolute.parents if folder.is_dir())
    with tempfile.TemporaryDirectory(dir=parent, prefix=".export-") as hidden:
        staged = Path(hidden) / "set"
        writers[kind](staged, distilled)
        absolute.parent.mkdir(parents=True, exist_ok=True)
        os.rename(staged, absolute)
    return out


def read(path: Path) -> DistilledSet | None:
    """Read a set that `write` exported as `npz` or `torch`; None for any other file.

    Raises:
        DistilledSetError: If the file is an export that is damaged or inconsistent.
    """
    if not path.is_file() or path.suffix not in (".npz", ".pt"):
        return None
    try:
        content = _read_npz(path) if path.suffix == ".npz" else _read_torch(path)
    except Exception:  # the reader of published sets explains what is wrong with the file
        return None
    if not isinstance(content, dict) or not set(HEADER_KEYS) <= content.keys():
        return None
    metadata = {name: content[name] for name in HEADER_KEYS}
    names = {"images": "images", "labels": "labels"}
    names |= {part: f"preprocess.{part}" for part in ("mean", "std", "whiten", "unwhiten")}
    tensors = {names[key]: value for key, value in content.items() if key in names}
    texts = all(isinstance(text, str) for text in metadata.values())
    if not texts or not all(isinstance(array, np.ndarray) for array in tensors.values()):
        raise DistilledSetError(
            f"{path} is damaged: an export holds nothing but arrays; export the set again"
        )
    return distilled_set.unpack(path, metadata, tensors)


def _arrays(distilled: DistilledSet) -> dict[str, np.ndarray]:
    fitted = distilled.preprocess
    named = {
        "images": distilled.images,
        "labels": distilled.labels,
        "pixels": fitted.invert(distilled.images),
        "mean": fitted.mean,
        "std": fitted.std,
        "whiten": fitted.whiten,
        "unwhiten": fitted.unwhiten,
    }
    return {name: np.ascontiguousarray(a) for name, a in named.items() if a is not None}


def _write_npz(path: Path, distilled: DistilledSet) -> None:
    metadata, _ = distilled_set.pack(path, distilled)
    texts = {name: np.array(text) for name, text in metadata.items()}
    # NumPy cannot store lone surrogates: they are replaced.
    classes = np.array([name.encode("utf-8", "replace").decode() for name in distilled.classes])
    with path.open("wb") as opened:
        named: dict[str, Any] = {"classes": classes, **texts, **_arrays(distilled)}
        np.savez_compressed(opened, **named)


def _write_torch(path: Path, distilled: DistilledSet) -> None:
    import torch

    metadata, _ = distilled_set.pack(path, distilled)
    tensors = {name: torch.from_numpy(array) for name, array in _arrays(distilled).items()}
    content = io.BytesIO()
    torch.save({**metadata, **tensors}, content)
    files.write_bytes(path, content.getvalue())


def _read_npz(path: Path) -> Any:
    with np.load(path, allow_pickle=False) as file:
        if not set(HEADER_KEYS) <= set(file.files):
            return None
        size = sum(info.file_size for info in file.zip.infolist())
        memory.require(2 * size, str(path), "take a smaller set")
        arrays = {name: file[name] for name in file.files if name != "classes"}
    return {name: str(a) if name in HEADER_KEYS else a for name, a in arrays.items()}


def _read_torch(path: Path) -> Any:
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        return None
    return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in content.items()}


def _write_folder(path: Path, distilled: DistilledSet) -> None:
    from PIL import Image

    if distilled.images.shape[-1] not in (1, 3):
        raise UserError(
            f"--format folder needs 1 or 3 channels, got {distilled.images.shape[-1]}: use "
            "--format npz or torch"
        )
    pixels = distilled.preprocess.invert(distilled.images)
    clipped = float(((pixels < 0) | (pixels > 1)).mean())
    bytes_ = np.round(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    names = folder_names.from_classes(distilled.classes)
    for index, (image, label) in enumerate(zip(bytes_, distilled.hard_labels, strict=True)):
        folder = path / names[label]
        # Whatever the class is called, its folder lies directly in `path`.
        assert folder.resolve().parent == path.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
            folder / f"{index:05}.png"
        )
    used = {names[label]: distilled.classes[label] for label in distilled.hard_labels}
    # JSON escapes, so that a name with a lone surrogate can be written too.
    text = json.dumps(dict(sorted(used.items())), indent=2)
    files.write_bytes(path / folder_names.CLASSES_FILE, f"{text}\n".encode())
    if clipped >= MIN_REPORTED_CLIPPING:
        progress.say(
            f"{clipped:.1%} of the pixel values lie beyond black and white and are clipped in the "
            "PNGs, which are for the eye: train on --format npz or torch, which keep every number"
        )
