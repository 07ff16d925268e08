"""Whether a model's classes are the data's: by name, by number alone, or through a class map.

A teacher whose outputs stand in another order than the data's classes teaches nonsense without any
error, so everything that can be compared is compared.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dsdistill.harness.errors import UserError, unknown

ClassMap = Mapping[str, str | int]  # class of the data -> class of the teacher, by name or number


@dataclass(frozen=True)
class Match:
    """How a model's outputs belong to the data's classes.

    Attributes:
        how: In words, for reports.
        outputs: The model's output of each class of the data; None where they are the same.
    """

    how: str
    outputs: tuple[int, ...] | None = None


def match(
    who: str, its: Sequence[str] | int, classes: Sequence[str], class_map: ClassMap | None = None
) -> Match:
    """Find a model's output of each class of the data.

    Names are compared without regard to case, spaces, hyphens and underscores; commas part
    synonyms, of which one is enough. Names that are mere numbers of the classes say nothing.

    Args:
        who: How messages call the model.
        its: Its class names in the order of its outputs, or only their number.
        classes: Of the data, in order.
        class_map: Needed unless the classes are the same in the same order.

    Raises:
        UserError: If they are not, or the map does not give each class one output of its own.
    """
    if class_map is not None:
        return Match("by the class map", _mapped(who, its, classes, class_map))
    count = its if isinstance(its, int) else len(its)
    if count != len(classes):
        raise UserError(
            f"{who} has {count} classes, the data have {len(classes)}: they must match, or "
            "--class-map FILE must say which are which"
        )
    if isinstance(its, int) or _numbers(its) or _numbers(classes):
        return Match("by their number alone")
    for i, (a, b) in enumerate(zip(its, classes, strict=True)):
        if not _same(a, b):
            raise UserError(
                f"{who} calls class {i} {a!r}, the data call it {b!r}"
                f"{_reordered(its, classes)}: --class-map FILE must say which are which"
            )
    return Match("by name")


def read_class_map(path: Path) -> dict[str, str | int]:
    """A class map: a JSON object of the data's class names and the teacher's names or numbers.

    Raises:
        UserError: If the file is missing, no such object, or names a class twice.
    """
    try:
        found = json.loads(path.read_text(), object_pairs_hook=lambda pairs: _once(path, pairs))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read the class map {path}: {error}") from error
    if not isinstance(found, dict) or not all(_is_class(v) for v in found.values()):
        raise UserError(
            f"the class map {path} must be one JSON object whose values are class names or "
            'numbers, as in {"cat": "tabby", "dog": 207}'
        )
    return found


def read_class_maps(
    text: str | None, names: Sequence[str]
) -> tuple[dict[str, str | int] | None, ...]:
    """The class map of each teacher; None where its classes are the data's.

    Args:
        text: One file for all teachers, or a comma-separated file for each in their order, where
            nothing stands for none.
        names: The teachers.

    Raises:
        UserError: If there are as many files as neither one nor teachers, or one cannot be read.
    """
    if text is None:
        return (None,) * len(names)
    files = [text] if Path(text).exists() else [part.strip() for part in text.split(",")]
    if len(files) not in (1, len(names)):
        raise UserError(
            f"--class-map has {len(files)} files for {len(names)} teachers: give one for all, or "
            "one for each, with nothing between the commas where the classes are the data's"
        )
    maps = [read_class_map(Path(file)) if file else None for file in files]
    return tuple(maps) if len(maps) == len(names) else (maps[0],) * len(names)


def with_synonyms(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names; those of ImageNet's 1000 classes with their synsets and synonyms.

    Libraries call the same class `n01440764`, `tench` and `tench, Tinca tinca`, and folders too.
    """
    known = imagenet(len(names)) if len(names) == 1000 else None
    if known is None:
        return names
    same = sum(_same(a, b) for a, b in zip(names, known, strict=True))
    # torchvision renames two, to tell crane from crane and maillot from maillot.
    if same < 990:
        return names
    return tuple(f"{b}, {a}" for a, b in zip(names, known, strict=True))


@lru_cache
def imagenet(count: int) -> tuple[str, ...] | None:
    """Synset and synonyms of each class of the ImageNet that has so many, if there is one."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return tuple(f"{name}, {info.label_name_to_description(name)}" for name in info.label_names())


def _mapped(
    who: str, its: Sequence[str] | int, classes: Sequence[str], class_map: ClassMap
) -> tuple[int, ...]:
    if foreign := [name for name in class_map if name not in classes]:
        raise unknown("class of the data in the class map", foreign[0], classes)
    if left := [name for name in classes if name not in class_map]:
        raise UserError(f"the class map leaves out {len(left)} of the data's classes: {_few(left)}")
    outputs = [_output(who, its, class_map[name]) for name in classes]
    for i, output in enumerate(outputs):
        if (j := outputs.index(output)) != i:
            raise UserError(
                f"the class map gives {classes[j]!r} and {classes[i]!r} the same class of {who}, "
                f"{class_map[classes[i]]!r}: each needs its own"
            )
    return tuple(outputs)


def _output(who: str, its: Sequence[str] | int, wanted: str | int) -> int:
    """The output of the class of that name or number."""
    count = its if isinstance(its, int) else len(its)
    if isinstance(wanted, int):
        if not 0 <= wanted < count:
            raise UserError(f"the class map asks for class {wanted} of {who}, which has {count}")
        return wanted
    if isinstance(its, int):
        raise UserError(
            f"the class map asks for class {wanted!r} of {who}, whose class names are not known: "
            f"give numbers from 0 to {count - 1}"
        )
    exact = [i for i, name in enumerate(its) if name == wanted]
    found = exact or [i for i, name in enumerate(its) if _same(name, wanted)]
    if not found:
        near = difflib.get_close_matches(wanted, its, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UserError(f"the class map asks for class {wanted!r}, which {who} has not{hint}")
    if len(found) > 1:
        raise UserError(
            f"the class map asks for class {wanted!r}, of which {who} has {len(found)}, numbers "
            f"{', '.join(map(str, found))}: give the number"
        )
    return found[0]


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"the class map {path} has class {twice!r} twice")
    return found


def _is_class(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _reordered(its: Sequence[str], classes: Sequence[str]) -> str:
    known = set().union(*map(_synonyms, its))
    same = all(known & _synonyms(name) for name in classes)
    return " (the same names in another order)" if same else ""


def _numbers(names: Sequence[str]) -> bool:
    """Whether the i-th name is i, or Hugging Face's LABEL_i, for every i."""
    return all(name in (str(i), f"LABEL_{i}") for i, name in enumerate(names))


def _same(a: str, b: str) -> bool:
    return _plain(a) == _plain(b) or bool(_synonyms(a) & _synonyms(b))


def _synonyms(name: str) -> set[str]:
    return {_plain(part) for part in name.split(",")} - {""}


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
