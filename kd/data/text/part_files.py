"""Files of the parts of a text data set: one file, a folder with a file for each, saved data sets.

A folder has `train.tsv` (or any other suffix that `tables` reads) and, where it has them,
`validation.tsv` or `dev.tsv`, and `test.tsv`. A part may be divided as on the hub, into
`train-00000-of-00002.parquet` and so on. A folder that Hugging Face's `datasets` saved is read by
that library.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsdistill.harness.data import tables, walk
from dsdistill.harness.data.tables import Table
from dsdistill.harness.errors import UserError, first_line

PARTS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "dev", "valid", "val", "validation_matched", "dev_matched"),
    "test": ("test", "test_matched"),
}
_SHARD = re.compile(r"-[0-9]{5}-of-[0-9]{5}$")  # end of a file's name, as the hub has them
_SAVED_DICT, _SAVED = "dataset_dict.json", "state.json"


def is_text(data: Path) -> bool:
    """Whether a path holds text, to tell it from images.

    Args:
        data: A file or a folder. A folder of images may have a table `train.csv` too; and a
            `.json` file is no image, though it is refused with the formats that can be read.
    """
    if data.is_file():
        return tables.table_suffix(data) is not None or data.suffix.lower() == ".json"
    if not data.is_dir():
        return False
    if any((data / name).is_file() for name in (_SAVED_DICT, _SAVED)):
        return True
    return "train" in _files(data) and not walk.holds_images(data)


def find_lone_part(data: Path) -> Path | None:
    """The file of texts to judge on in a folder that has none to train on; None elsewhere.

    Args:
        data: A file or a folder.
    """
    if not data.is_dir() or is_text(data):
        return None
    files = _files(data)
    return next((files[part][0] for part in ("test", "validation") if part in files), None)


def locate(data: str, root: Path) -> Path:
    """The file or folder of texts that a user names.

    Args:
        data: A path, or the name of a data set.
        root: Folder of the named data sets, whose texts may lie in a folder `text`.
    """
    path = Path(data).expanduser()
    if not path.exists() and len(path.parts) == 1:
        named = root / "text" / path
        return named if named.exists() else root / path
    return path


def find(data: Path, *, documents: bool = False) -> dict[str, Table]:
    """Read the parts of a text data set.

    Args:
        data: A file of training rows, or a folder; the only file of one is its training part,
            whatever its name.
        documents: Whether each file of plain text is one text, as for `tables.read`.

    Returns:
        `train` and, where there are any, `validation` and `test`.

    Raises:
        UserError: If there is no training part, two files of one part, or a file does not fit.
    """
    if data.is_file():
        return {"train": tables.read(data, documents=documents)}
    if not data.is_dir():
        raise UserError(f"there is no file or folder {data}")
    if any((data / name).is_file() for name in (_SAVED_DICT, _SAVED)):
        return _load_saved(data)
    files = _files(data)
    if not files and len(lone := _readable(data)) == 1:
        files = {"train": lone}
    for part, paths in files.items():
        if len(paths) > 1 and not all(map(_is_shard, paths)):
            names = " and ".join(path.name for path in paths)
            raise UserError(f"{data} has two files of its {part} part, {names}: remove one")
    if "train" not in files:
        kinds = ", ".join(tables.SUFFIXES)
        raise UserError(f"{data} has no train file of texts ({kinds}, with .gz or without)")
    return {
        part: _join([tables.read(path, documents=documents) for path in paths])
        for part, paths in files.items()
    }


def short_name(data: Path) -> str:
    """A name for folders and reports: that of the folder, or of the file without its suffixes."""
    name = data.resolve().name
    return name.split(".")[0] or name if data.is_file() else name


def _files(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for path in _readable(folder):
        stem = _SHARD.sub("", path.name.split(".")[0].lower())
        for part, names in PARTS.items():
            if stem in names:
                files.setdefault(part, []).append(path)
    return files


def _is_shard(path: Path) -> bool:
    return _SHARD.search(path.name.split(".")[0]) is not None


def _join(shards: Sequence[Table]) -> Table:
    """One table of the rows of several.

    Raises:
        UserError: If they have other columns.
    """
    first = shards[0]
    if len(shards) == 1:
        return first
    for other in shards:
        if other.columns.keys() != first.columns.keys():
            raise UserError(f"{other.path} must have the columns of {first.path}")
    columns = {name: [x for each in shards for x in each.columns[name]] for name in first.columns}
    whole = first.path.with_name(first.path.name.replace("-00000-", "-*-", 1))
    return Table(whole, columns)


def _readable(folder: Path) -> list[Path]:
    paths = sorted(folder.iterdir())
    return [path for path in paths if tables.table_suffix(path) is not None and path.is_file()]


def _load_saved(folder: Path) -> dict[str, Table]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{folder} was saved by the library datasets, which is needed to read it: "
            "pip install 'dsdistill[text]'"
        ) from error
    try:
        saved: Any = datasets.load_from_disk(str(folder))
    except Exception as error:  # formats and versions share no base class
        raise UserError(f"{folder} cannot be read by datasets: {first_line(error)}") from error
    parts = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    read = {}
    for part, names in PARTS.items():
        own = [name for name in names if name in parts]
        if own:
            read[part] = _as_table(folder / own[0], parts[own[0]])
    if "train" not in read:
        raise UserError(f"{folder} has no part train, but {', '.join(sorted(map(str, parts)))}")
    return read


def _as_table(path: Path, rows: Any) -> Table:
    names = {}
    for column, feature in rows.features.items():
        inner = getattr(feature, "feature", feature)  # of a list of tags
        if getattr(inner, "names", None):
            names[column] = tuple(inner.names)
    if not len(rows):
        raise UserError(f"{path} has no rows")
    return Table(path, {name: list(rows[name]) for name in rows.column_names}, names=names)
