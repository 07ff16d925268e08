"""Features of images in one `.npz`, written as they come and read as a memory map.

    images    (n, 1, 1, d) float16: features, as images of one pixel with d channels
    labels    (n,) class of each
    classes   (k,) names, in label order
    parts     (n,) 0 training, 1 validation, 2 test
    sources   (n,) row of the plain image: its own, or for a further view that of the image it shows
    record    JSON: data, backbone, layer, preprocessing, and the checksums of all of them

The members are not compressed, so each lies in the file as the `.npy` that it is: `numpy.load`
reads them, and `read` maps the features at their place. One file can be moved and copied without
losing a part, which a folder of `.npy` files cannot.

Until it is whole, its features stand in the folder `<file>.partial`, from which a stopped
extraction continues.
"""

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from jaxtyping import Float, Int

from dsdistill.harness import files
from dsdistill.harness.data.labeled_images import DataError, LabeledImages
from dsdistill.harness.errors import UserError, one_line
from dsdistill.harness.memory import format_bytes
from dsdistill.harness.runs import locks, progress

FORMAT_VERSION = 1
PARTS = ("train", "validation", "test")  # in the order of their numbers in `parts`
RECORD = "record"
FEATURES = "images.npy"  # of the file and, with all rows so far, of the partial folder
PARTIAL_SUFFIX = ".partial"  # of the folder of a file that is not whole
# Members of a record that say which layers a network has; absent in those of earlier versions.
LAYERS, PACKAGES = "layers_sha256", "packages"
STATE = "state.json"  # of the partial folder: the record, and the number of rows that are safe
# Images in a forward pass. A feature depends on the images beside it to the last bit, so what is
# continued, and what is to be equal in a file and in memory, has one number.
BATCH = 64
CHUNK_BYTES = 1 << 24  # that are copied or checked at a time
LOCAL_HEADER_BYTES = 30  # of a zip member, before its name and its extra field


@dataclass(frozen=True, eq=False)
class Features:
    """Features of a data set and of further views of its training images.

    Attributes:
        images: All rows, mapped from the file, with labels and class names.
        parts: Number of each row's part, an index into `PARTS`.
        sources: Row of the plain image that each row shows.
        record: How they were made.
    """

    images: LabeledImages
    parts: Int[np.ndarray, " n"]
    sources: Int[np.ndarray, " n"]
    record: Mapping[str, Any]

    @property
    def draw_order(self) -> tuple[int, ...]:
        """Class indices in the order in which images of the data are drawn."""
        order = self.record.get("draw_order")
        return tuple(order) if order else tuple(range(len(self.images.classes)))

    def part(self, name: str) -> LabeledImages | None:
        """The plain images of a part; None where it has none."""
        rows = np.arange(len(self.images))
        chosen = rows[(self.parts == PARTS.index(name)) & (self.sources == rows)]
        return self.images.select(chosen) if len(chosen) else None

    def with_views(self, part: LabeledImages) -> LabeledImages:
        """The rows of some plain images, followed by those of their further views."""
        assert part.rows is not None, "a part is a selection"
        rows = np.arange(len(self.images))
        further = rows[np.isin(self.sources, part.rows) & (self.sources != rows)]
        return self.images.select(np.concatenate([part.rows, further]))


def as_half(
    features: Float[np.ndarray, "m d"],
    remedy: str = "choose another --layer, such as one behind a normalisation",
) -> Float[np.ndarray, "m d"]:
    """Features as float16, contiguous.

    Args:
        features: Features of any type of number.
        remedy: What to do where that is not possible, for the message.

    Raises:
        UserError: If a value is not finite, or too large for float16.
    """
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(features, np.float16)
    if not np.isfinite(half).all():
        largest = float(np.abs(features).max())
        raise UserError(
            f"features up to {largest:.3g} do not fit into float16, being beyond 65504: {remedy}"
        )
    return half


def as_stored(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as it is read back from a file."""
    return json.loads(json.dumps({"format": FORMAT_VERSION, **record}))


def changed(stored: Mapping[str, Any], current: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first member of two records that differs, and both values; None if there is none.

    The layers of a record that has none on record are not compared.

    Args:
        stored: Record of what was written before.
        current: Record of what would be written now, from `as_stored`.
    """
    unknown = set() if LAYERS in stored else {LAYERS, PACKAGES}
    for name in sorted((stored.keys() | current.keys()) - unknown):
        if stored.get(name) != current.get(name):
            return name, stored.get(name), current.get(name)
    return None


def note_unknown_layers(path: Path, stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Say in one line where a record does not say which layers the network had."""
    if LAYERS in current and LAYERS not in stored:
        progress.say(
            f"note: {path} was written by an earlier version: whether the network had the same "
            "layers, not only the same weights, cannot be checked"
        )


def layer_hash(name: str, record: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the layers of a record, by a name for messages; empty where it has none.

    The name holds the versions of the packages, since another version may print equal layers
    otherwise: it is compared only with what the same versions have stored.

    Args:
        name: Name of the network, such as `the backbone`.
        record: Record of features.
    """
    if LAYERS not in record:
        return {}
    return {f"layers of {name} ({record[PACKAGES]})": record[LAYERS]}


def is_feature_file(path: Path) -> bool:
    """Whether a file is an `.npz` of features, by its members."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {FEATURES, f"{RECORD}.npy"} <= set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def refuse(data: str) -> None:
    """Refuse a file of features where images are needed.

    Args:
        data: Name or path of a data set.

    Raises:
        UserError: If it is such a file.
    """
    path = Path(data).expanduser()
    if path.suffix == ".npz" and is_feature_file(path):
        raise UserError(f"{data} holds features: give the images that they are of")


def read(path: Path) -> Features:
    """Check a file's checksums and map its features.

    Raises:
        DataError: If it is damaged, incomplete or of a later version.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise DataError(f"{path} is damaged: {damaged} does not match its checksum")
            info = archive.getinfo(FEATURES)
        with np.load(path, allow_pickle=False) as members:
            names = ("labels", "classes", "parts", "sources")
            labels, classes, parts, sources = (members[name] for name in names)
            record = json.loads(str(members[RECORD]))
            stored = info.compress_type == zipfile.ZIP_STORED
            images = _map(path, info) if stored else members["images"]
    except DataError:
        raise
    except Exception as error:  # zip, NumPy and JSON have their own errors
        raise DataError(f"{path} is not a readable file of features: {one_line(error)}") from error
    if record.get("format") != FORMAT_VERSION:
        raise DataError(f"{path}: expected format {FORMAT_VERSION}, got {record.get('format')}")
    n, k = len(labels), len(classes)
    if images.ndim != 4 or images.shape[:3] != (n, 1, 1) or images.dtype.kind != "f":
        raise DataError(f"{path}: expected {n} features (n, 1, 1, d), got {images.shape}")
    limits = {"labels": (labels, k), "parts": (parts, len(PARTS)), "sources": (sources, n)}
    for name, (values, end) in limits.items():
        whole = values.shape == (n,) and values.dtype.kind in "iu"
        if not whole or (n and not 0 <= values.min() <= values.max() < end):
            raise DataError(f"{path}: {name} must be {n} integers from 0 to {end - 1}")
    data = LabeledImages(images, labels.astype(np.int64), tuple(map(str, classes.tolist())))
    return Features(data, parts.astype(np.int64), sources.astype(np.int64), record)


def _map(path: Path, info: zipfile.ZipInfo) -> np.ndarray:
    """Map the array of a member that is not compressed."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        # The last two numbers of the local header; its extra field may differ from the directory's.
        name, extra = struct.unpack("<HH", file.read(LOCAL_HEADER_BYTES)[-4:])
        file.seek(name + extra, os.SEEK_CUR)
        shape, fortran, dtype = _read_array_header(file)
        order = "F" if fortran else "C"
        return np.memmap(path, dtype, "r", offset=file.tell(), shape=shape, order=order)


def _read_array_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _write_header(file: IO[bytes], n: int, d: int) -> None:
    header = {"descr": "<f2", "fortran_order": False, "shape": (n, 1, 1, d)}
    np.lib.format.write_array_header_1_0(file, header)


class PartialFeatures:
    """Features that are written row by row into `<file>.partial`, until `finish` makes the file.

    Attributes:
        done: Number of rows that are safely on disk; a later start continues there.
        skipped: Rows of plain images that are left out of the file, in all their views, and why.
    """

    def __init__(
        self, path: Path, record: Mapping[str, Any], shape: tuple[int, int], *, resume: bool
    ) -> None:
        """Begin a file, or continue one.

        Args:
            path: The file to be made.
            record: JSON-compatible description; all that the features depend on.
            shape: Number of rows n, and of values d of each.
            resume: Whether to continue where an earlier process stopped.

        Raises:
            UserError: If the file exists, another process is at work on it, there is nothing or
                something else to continue, or the disk has too little space.
        """
        self.path, self.folder = path, path.with_name(f"{path.name}{PARTIAL_SUFFIX}")
        self.record = as_stored(record)
        self.shape, self.done = shape, 0
        self.skipped: dict[int, str] = {}
        if path.exists():
            raise UserError(f"{path} is finished: choose another --out, or remove it")
        if resume and not (self.folder / STATE).is_file():
            raise UserError(f"nothing to resume: there is no {self.folder / STATE}")
        if not resume and self.folder.exists():
            raise UserError(
                f"{self.folder} has the features of an earlier start: add --resume to continue "
                "it, or remove it"
            )
        if resume:
            self._check_state()
        self._require_space()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = locks.acquire(self.folder)
        except locks.LockHeld as error:
            raise UserError(f"{self.folder} is in use by {error}: wait until it is done") from error
        self._file = (self.folder / FEATURES).open("r+b" if resume else "w+b")
        _write_header(self._file, *shape)
        self._start = self._file.tell()
        self._file.truncate(self._start + self.done * self._row_bytes)
        self._file.seek(0, os.SEEK_END)
        self._rows = self.done
        if not resume:
            self.save()

    @property
    def _row_bytes(self) -> int:
        return 2 * self.shape[1]

    def append(self, features: Float[np.ndarray, "m d"]) -> None:
        """Add rows, as float16.

        Raises:
            UserError: If a value is not finite, or too large for float16.
        """
        half = as_half(features)
        self._file.write(half.data)
        self._rows += len(half)

    def skip(self, row: int, why: str) -> None:
        """Leave the plain image of a row out of the file, and all further views of it.

        Args:
            row: Row of the plain image. Its rows are appended all the same, with any values.
            why: Name of the image and the reason, for messages and for the record.
        """
        self.skipped[row] = why

    def save(self) -> None:
        """Make all rows so far safe."""
        self._file.flush()
        os.fsync(self._file.fileno())
        state = {"rows": self._rows, "shape": self.shape, "record": self.record}
        if self.skipped:
            state["skipped"] = {str(row): why for row, why in self.skipped.items()}
        files.write_json(self.folder / STATE, state)
        self.done = self._rows

    def finish(
        self,
        labels: Int[np.ndarray, " n"],
        classes: tuple[str, ...],
        parts: Int[np.ndarray, " n"],
        sources: Int[np.ndarray, " n"],
    ) -> None:
        """Write the file as a whole, and remove the folder.

        Args:
            labels, parts, sources: One value per row.
            classes: Class names, in label order.
        """
        assert self._rows == self.shape[0], "all rows are there"
        self.save()
        kept = np.flatnonzero(~np.isin(sources, [*self.skipped]))
        left_out = {"unreadable": [self.skipped[row] for row in sorted(self.skipped)]}
        record = self.record | (left_out if self.skipped else {})
        arrays = {
            "labels": labels[kept].astype(np.int64),
            "classes": np.array(classes),
            "parts": parts[kept].astype(np.uint8),
            "sources": np.searchsorted(kept, sources[kept]).astype(np.int64),
            RECORD: np.array(json.dumps(record, sort_keys=True)),
        }
        whole = self.folder / "features.npz"
        with whole.open("wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                # A member without a date: equal features are equal files.
                with archive.open(zipfile.ZipInfo(FEATURES), "w", force_zip64=True) as member:
                    _write_header(member, len(kept), self.shape[1])
                    self._copy_rows(kept, member)
                for name, array in arrays.items():
                    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        self.close()
        os.replace(whole, self.path)
        shutil.rmtree(self.folder)

    def close(self) -> None:
        """Close the file and release the folder; what `save` has made safe stays."""
        self._file.close()
        self._lock.release()

    def _copy_rows(self, rows: Int[np.ndarray, " m"], target: IO[bytes]) -> None:
        """Copy rows, in rising order, a run of neighbours at a time."""
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
            if not len(run):
                continue
            self._file.seek(self._start + int(run[0]) * self._row_bytes)
            left = len(run) * self._row_bytes
            while left:
                chunk = self._file.read(min(left, CHUNK_BYTES))
                target.write(chunk)
                left -= len(chunk)

    def _check_state(self) -> None:
        """Take over the rows of an earlier start with the same record."""
        state = files.read_json(self.folder / STATE)
        try:
            rows, shape, record = int(state["rows"]), tuple(state["shape"]), dict(state["record"])
            skipped = {int(row): str(why) for row, why in dict(state.get("skipped", {})).items()}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.folder / STATE} is damaged: remove {self.folder}") from error
        if (change := changed(record, self.record)) is not None:
            name, before, now = change
            raise UserError(
                f"{self.folder} was begun with another {name} ({before}, now {now}): continue with "
                "the same, or remove it"
            )
        note_unknown_layers(self.folder, record, self.record)
        self.record = record  # what nobody has checked does not get on record
        size = (self.folder / FEATURES).stat().st_size if (self.folder / FEATURES).exists() else 0
        if shape != self.shape or not 0 <= rows <= shape[0] or size < rows * self._row_bytes:
            raise UserError(f"{self.folder} is damaged: remove it, and start anew")
        self.done, self.skipped = rows, skipped

    def _require_space(self) -> None:
        """Refuse features for which the disk has no space, in the folder and in the file."""
        parent = next(p for p in self.path.absolute().parents if p.exists())
        needed = (2 * self.shape[0] - self.done) * self._row_bytes
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise UserError(
                f"{self.shape[0]} features of {self.shape[1]} values need "
                f"{format_bytes(needed)} in {parent} while they are written, "
                f"{format_bytes(free)} is free: choose another --out, or fewer --views"
            )
