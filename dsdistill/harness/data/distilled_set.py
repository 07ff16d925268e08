"""The distilled set and its file: one `.safetensors` that NumPy, JAX and torch can read.

The header contains a SHA-256 of everything else, so a damaged file is a `DistilledSetError`, never
a partial or silently different set. Nothing is ever unpickled.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from jaxtyping import Float, Int

from dsdistill.harness import checksums
from dsdistill.harness.data import preprocess as pre
from dsdistill.harness.data.labeled_images import Examples, LabeledImages
from dsdistill.harness.errors import UserError
from dsdistill.harness.files import write_bytes

FORMAT_VERSION = 1
HEADER_KEY = "dsdistill"  # key of the header in the file's metadata
FILE_NAME = "distilled.safetensors"  # in a run's folder
MAX_PROVENANCE_DEPTH = 50  # levels of nesting: code that displays provenance recurses into it
ENCODING = "one-hot minus 1/k"  # form of `labels` before they are solved for or learned


class DistilledSetError(UserError):
    """A distilled-set file that cannot be trusted; the message names file, expected and got."""


@dataclass(frozen=True, eq=False)
class DistilledSet:
    """A few synthetic images with real-valued labels, and everything needed to use them.

    Attributes:
        images: Images as the kernel sees them, that is, after `preprocess`.
        labels: Real-valued labels, in `encoding`.
        preprocess: Fitted map from images in [0, 1]; apply it to any image to be classified.
        classes: Class names, in label order.
        provenance: JSON-compatible record: method, configuration, kernel, data, seed, versions,
            metrics.
        encoding: How an integer label is written as a row of `labels`.
    """

    images: Float[np.ndarray, "n h w c"]
    labels: Float[np.ndarray, "n k"]
    preprocess: pre.Preprocess
    classes: tuple[str, ...]
    provenance: Mapping[str, Any]
    encoding: str = ENCODING

    def __len__(self) -> int:
        return len(self.images)

    @property
    def hard_labels(self) -> Int[np.ndarray, " n"]:
        """The class of the largest label of each image."""
        return self.labels.argmax(1)

    @property
    def nbytes(self) -> int:
        """Size of images and labels together, in bytes."""
        return self.images.nbytes + self.labels.nbytes

    def examples(self) -> Examples:
        """The set as a learner's training set, with the stored labels."""
        data = LabeledImages(self.images, self.hard_labels, self.classes)
        return Examples(data, self.preprocess, targets=self.labels, is_preprocessed=True)


def save(path: Path, distilled: DistilledSet) -> None:
    """Write the file atomically: a reader sees the old file or the new one, never a part.

    Raises:
        DistilledSetError: If the set breaks a rule that `load` checks.
        OSError: If the folder cannot be written or the disk is full; an old file is kept.
    """
    metadata, tensors = pack(path, distilled)
    write_bytes(path, safetensors.numpy.save(tensors, metadata))


def pack(
    path: Path, distilled: DistilledSet
) -> tuple[dict[str, str], dict[str, Float[np.ndarray, "..."]]]:
    """Pack the set into a few strings and arrays, the inverse of `unpack`.

    Args:
        path: Path they will be written to, for messages.
        distilled: The set.

    Returns:
        The header and its checksum by name, and the arrays by name.

    Raises:
        DistilledSetError: If the set breaks a rule that `unpack` checks.
    """
    _check(path, distilled)
    tensors = _tensors(distilled)
    header = {
        "format": FORMAT_VERSION,
        "encoding": distilled.encoding,
        "classes": list(distilled.classes),
        "preprocess": {
            "kind": distilled.preprocess.kind,
            "contrast": distilled.preprocess.contrast,
        },
        "provenance": dict(distilled.provenance),
    }
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    return checksums.metadata(HEADER_KEY, text, tensors), tensors


def load(path: Path) -> DistilledSet:
    """Read and check a distilled set.

    Raises:
        DistilledSetError: If the file is missing, truncated, damaged, foreign or inconsistent.
    """
    path = Path(path)
    header, tensors, _ = checksums.load(
        path, HEADER_KEY, kind="a distilled set", error=DistilledSetError
    )
    return _assemble(path, header, tensors)


def unpack(path: Path, metadata: Mapping[str, str], tensors: dict[str, np.ndarray]) -> DistilledSet:
    """Rebuild the set from the result of `pack`.

    Raises:
        DistilledSetError: If the content is damaged, foreign or inconsistent.
    """
    header, tensors, _ = checksums.unpack(
        path, HEADER_KEY, metadata, tensors, error=DistilledSetError
    )
    return _assemble(path, header, tensors)


def _assemble(path: Path, stored: Any, tensors: Mapping[str, np.ndarray]) -> DistilledSet:
    """Build the set that a header and named arrays describe, with every check."""
    header = _check_header(path, stored)
    try:
        fitted = pre.Preprocess(
            header["preprocess"]["kind"],
            tensors["preprocess.mean"],
            tensors["preprocess.std"],
            tensors.get("preprocess.whiten"),
            tensors.get("preprocess.unwhiten"),
            header["preprocess"]["contrast"],
        )
        distilled = DistilledSet(
            tensors["images"],
            tensors["labels"],
            fitted,
            tuple(header["classes"]),
            header["provenance"],
            header["encoding"],
        )
    except KeyError as error:
        raise DistilledSetError(f"{path}: incomplete distilled set, lacks {error}") from error
    _check(path, distilled)
    if unknown := sorted(tensors.keys() - _tensors(distilled).keys()):
        raise DistilledSetError(f"{path}: unknown tensors {unknown}")
    return distilled


def locate(run: Path) -> Path:
    """Path of the distilled-set file in a run's folder, or the path itself if it is a file."""
    return run / FILE_NAME if run.is_dir() else run


def _check_header(path: Path, header: Any) -> dict[str, Any]:
    """Check the type of each field of a header; a valid checksum does not vouch for its author."""
    version = header.get("format") if isinstance(header, dict) else None
    if version != FORMAT_VERSION:
        raise DistilledSetError(f"{path}: expected format {FORMAT_VERSION}, got {version}")
    fields = {"encoding": str, "classes": list, "preprocess": dict, "provenance": dict}
    for name, kind in fields.items():
        got = type(header.get(name))
        if got is not kind:
            raise DistilledSetError(f"{path}: {name} must be a {kind.__name__}, got {got.__name__}")
    try:
        json.dumps(header, allow_nan=False)  # as `save` does: such a set could not be saved
    except ValueError as error:
        raise DistilledSetError(f"{path}: the header has a number that is not finite") from error
    return header


def _tensors(distilled: DistilledSet) -> dict[str, np.ndarray]:
    fitted = distilled.preprocess
    named = {
        "images": distilled.images,
        "labels": distilled.labels,
        "preprocess.mean": fitted.mean,
        "preprocess.std": fitted.std,
        "preprocess.whiten": fitted.whiten,
        "preprocess.unwhiten": fitted.unwhiten,
    }
    # A transposed view would be written in memory order, so all arrays are made contiguous.
    return {name: np.ascontiguousarray(a) for name, a in named.items() if a is not None}


def _check(path: Path, distilled: DistilledSet) -> None:
    """Check every rule of the format, for both `save` and `load`."""
    images, fitted, classes = distilled.images, distilled.preprocess, distilled.classes
    if images.ndim != 4 or 0 in images.shape:
        raise DistilledSetError(f"{path}: images must be (n, h, w, c), got {images.shape}")
    d, channels = math.prod(images.shape[1:]), images.shape[-1]
    expected = {
        "images": images.shape,
        "labels": (len(images), len(classes)),
        "preprocess.mean": (channels,),
        "preprocess.std": (channels,),
    }
    if not all(isinstance(name, str) for name in classes) or len(set(classes)) < len(classes):
        raise DistilledSetError(f"{path}: classes must be distinct names, got {classes}")
    if len(classes) < 2:
        raise DistilledSetError(f"{path}: expected at least two classes, got {len(classes)}")
    if fitted.kind not in pre.KINDS:
        raise DistilledSetError(f"{path}: unknown preprocessing {fitted.kind!r}")
    if fitted.kind == "zca":
        expected |= {"preprocess.whiten": (d, d), "preprocess.unwhiten": (d, d)}
    tensors = _tensors(distilled)
    if tensors.keys() != expected.keys():
        raise DistilledSetError(
            f"{path}: expected tensors {sorted(expected)}, got {sorted(tensors)}"
        )
    for name, shape in expected.items():
        array = tensors[name]
        if array.shape != shape or array.dtype != np.float32:
            raise DistilledSetError(
                f"{path}: {name} must be float32 {shape}, got {array.dtype} {array.shape}"
            )
        if not np.isfinite(array).all():
            raise DistilledSetError(f"{path}: {name} has NaN or infinite values")
    if not _is_shallow(distilled.provenance, MAX_PROVENANCE_DEPTH):
        raise DistilledSetError(
            f"{path}: provenance is nested more than {MAX_PROVENANCE_DEPTH} values deep"
        )
    if (fitted.std <= 0).any():
        raise DistilledSetError(f"{path}: preprocess.std must be positive")
    if not isinstance(fitted.contrast, float) or not 0 <= fitted.contrast < math.inf:
        raise DistilledSetError(f"{path}: contrast must be a finite float, got {fitted.contrast!r}")


def _is_shallow(value: Any, depth: int) -> bool:
    """Whether a JSON value is nested at most `depth` levels deep."""
    if not isinstance(value, Mapping | list | tuple):
        return True
    inner = value.values() if isinstance(value, Mapping) else value
    return depth > 0 and all(_is_shallow(item, depth - 1) for item in inner)
