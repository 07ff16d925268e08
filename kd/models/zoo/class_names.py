"""Whether a model's classes are the data's: by name, by position, or through a class map.

A teacher whose outputs stand in another order than the data's classes teaches nonsense without any
error, so everything that can be compared is compared, and what must be assumed is said.
"""

import difflib
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dsdistill.harness.data.class_names import natural_key
from dsdistill.harness.errors import UserError, unknown_name
from dsdistill.harness.text import quote

ClassMap = Mapping[str, str | int]  # class of the data -> class of the teacher, by name or number

_SYNSET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Match:
    """How a model's outputs belong to the data's classes.

    Attributes:
        how: In words, for reports.
        outputs: The model's output of each class of the data; None where they are the same.
        assumed: Whether the order of the model's classes is a guess, for want of names.
        note: What the user should know about the guess.
    """

    how: str
    outputs: tuple[int, ...] | None = None
    assumed: bool = False
    note: str | None = None


def match(
    who: str,
    its: Sequence[str] | int,
    classes: Sequence[str],
    class_map: ClassMap | None = None,
    option: str | None = "--class-map",
) -> Match:
    """Find a model's output of each class of the data.

    Names are compared without regard to case, spaces, hyphens, underscores and the form of
    Unicode; whole numbers by their value, so that `007` is `7`. ImageNet's classes are known by
    synset and by each of their synonyms. The order does not matter where names are known: outputs
    are taken in the order of the data's classes.

    Where the model has no names, or one side has only the numbers 0, 1, 2, ..., positions decide:
    in the natural order of classes that are numbers, and in the data's order of others.

    Args:
        who: How messages call the model.
        its: Its class names in the order of its outputs, or only their number.
        classes: Of the data, in order.
        class_map: Needed where names differ or the assumed order is wrong.
        option: By which the user gives one, for messages; None where there is no such option.

    Raises:
        UserError: If the classes are not the same, or the map does not give each class one output
            of its own.
    """
    if class_map is not None:
        return Match("by the class map", _map_outputs(who, its, classes, class_map))
    count = its if isinstance(its, int) else len(its)
    if count != len(classes):
        raise UserError(
            f"{who} has {count} classes, the data have {len(classes)}: they must match"
            + ("" if option is None else f", or {option} FILE must say which are which")
        )
    if isinstance(its, int) or _are_placeholders(its):
        return _match_by_position(classes, option)
    outputs = _match_by_name(its, classes)
    if outputs is not None:
        same = outputs == tuple(range(count))
        return Match("by name" if same else "by name, in another order", None if same else outputs)
    if _are_consecutive_numbers(its) and not any(map(_is_number, classes)):
        return _match_by_position(classes, option)
    if _are_consecutive_numbers(classes) and not any(map(_is_number, its)):
        return _match_by_position(classes, option)
    remedy = "they must match" if option is None else f"{option} FILE must say which are which"
    raise UserError(f"{who} {_describe_difference(its, classes)}: {remedy}")


def likely_orders(classes: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Orders in which the libraries that read class folders number classes of these names.

    Returns:
        The name of each order, and the classes in it, as positions in `classes`.
    """
    natural = sorted(range(len(classes)), key=lambda i: natural_key(classes[i]))
    plain = sorted(range(len(classes)), key=lambda i: classes[i])
    return {
        "natural order, as timm sorts folders": tuple(natural),
        "the order of code points, as torchvision sorts folders": tuple(plain),
    }


def read_class_map(path: Path) -> dict[str, str | int]:
    """A class map: a JSON object of the data's class names and the teacher's names or numbers.

    Raises:
        UserError: If the file is missing, no such object, or names a class twice.
    """
    try:
        found = json.loads(
            path.read_text(), object_pairs_hook=lambda pairs: _require_unique_keys(path, pairs)
        )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read the class map {path}: {error}") from error
    if not isinstance(found, dict) or not all(_is_name_or_number(v) for v in found.values()):
        raise UserError(
            f"the class map {path} must be one JSON object whose values are class names or "
            'numbers, as in {"cat": "tabby", "dog": 207}'
        )
    return found


def read_class_maps(
    text: str | None, names: Sequence[str], option: str = "--class-map"
) -> tuple[dict[str, str | int] | None, ...]:
    """The class map of each teacher; None where its classes are the data's.

    Args:
        text: One file for all teachers, or a comma-separated file for each in their order, where
            nothing stands for none.
        names: The teachers.
        option: As the user wrote it, for messages.

    Raises:
        UserError: If there are as many files as neither one nor teachers, or one cannot be read.
    """
    if text is None:
        return (None,) * len(names)
    files = class_map_files(text)
    if len(files) not in (1, len(names)):
        raise UserError(
            f"{option} has {len(files)} files for {len(names)} teachers: give one for all, or "
            "one for each, with nothing between the commas where the classes are the data's"
        )
    maps = [read_class_map(Path(file)) if file else None for file in files]
    return tuple(maps) if len(maps) == len(names) else (maps[0],) * len(names)


def class_map_files(text: str) -> list[str]:
    """The files that `--class-map` names; an empty name for a teacher that needs none."""
    return [text] if Path(text).exists() else [part.strip() for part in text.split(",")]


def with_synonyms(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names; those of ImageNet's 1000 classes with their synsets and synonyms.

    Libraries call the same class `n01440764`, `tench` and `tench, Tinca tinca`, and folders too.
    """
    known = imagenet_names(len(names)) if len(names) == 1000 else None
    if known is None:
        return names
    same = sum(_share_key(a, b) for a, b in zip(names, known, strict=True))
    # torchvision renames two, to tell crane from crane and maillot from maillot.
    if same < 990:
        return names
    return tuple(f"{b}, {a}" for a, b in zip(names, known, strict=True))


@lru_cache
def imagenet_names(count: int) -> tuple[str, ...] | None:
    """Synset and synonyms of each class of the ImageNet that has so many, if there is one."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return tuple(f"{name}, {info.label_name_to_description(name)}" for name in info.label_names())


def abbreviate(names: Sequence[str]) -> str:
    """The first of many names, for messages."""
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")


def _map_outputs(
    who: str, its: Sequence[str] | int, classes: Sequence[str], class_map: ClassMap
) -> tuple[int, ...]:
    if foreign := [name for name in class_map if name not in classes]:
        raise unknown_name("class of the data in the class map", foreign[0], classes)
    if left := [name for name in classes if name not in class_map]:
        raise UserError(
            f"the class map leaves out {len(left)} of the data's classes: {abbreviate(left)}"
        )
    outputs = [_find_output(who, its, class_map[name]) for name in classes]
    for i, output in enumerate(outputs):
        if (j := outputs.index(output)) != i:
            raise UserError(
                f"the class map gives {quote(classes[j])} and {quote(classes[i])} the same class of "
                f"{who}, {quote(str(class_map[classes[i]]))}: each needs its own"
            )
    return tuple(outputs)


def _find_output(who: str, its: Sequence[str] | int, wanted: str | int) -> int:
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
    found = _candidates(wanted, its)
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


def _require_unique_keys(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"the class map {path} has class {quote(twice)} twice")
    return found


def _is_name_or_number(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _match_by_position(classes: Sequence[str], option: str | None) -> Match:
    """The match of a model that has no names; the order of its classes can only be assumed."""
    k = len(classes)
    numbers = all(map(_is_number, classes))
    order = sorted(range(k), key=lambda i: int(classes[i])) if numbers else list(range(k))
    named = "natural order" if numbers else "the data's order"
    shown = ", ".join(classes[i] for i in order[:3]) + (", ..." if k > 3 else "")
    outputs = tuple(order.index(i) for i in range(k))
    return Match(
        f"by position alone: outputs 0..{k - 1} taken as classes {shown}, {named}",
        None if outputs == tuple(range(k)) else outputs,
        assumed=True,
        note=_order_warning(classes, option),
    )


def _order_warning(classes: Sequence[str], option: str | None) -> str | None:
    """A line where the order of a model's classes depends on who sorted the folders."""
    natural, plain = likely_orders(classes).values()
    if natural == plain:
        return None
    i = next(i for i, (a, b) in enumerate(zip(natural, plain, strict=True)) if a != b)
    remedy = "; if the order assumed is not that of the training, "
    remedy = "" if option is None else f"{remedy}{option} FILE says which are which"
    return (
        "the libraries sort these class folders differently: output "
        f"{i} is {quote(classes[natural[i]])} for timm (natural order, without case) and "
        f"{quote(classes[plain[i]])} for torchvision (code points){remedy}"
    )


def _match_by_name(its: Sequence[str], classes: Sequence[str]) -> tuple[int, ...] | None:
    """The output of each class, where every class has exactly one of its own."""
    tables = [_positions_by_key(its, key) for key in _KEY_FUNCTIONS]
    outputs = []
    for i, name in enumerate(classes):
        hits = (
            {output for part in key(name) for output in table.get(part, ())}
            for key, table in zip(_KEY_FUNCTIONS, tables, strict=True)
        )
        best = next(filter(None, hits), set())
        # ImageNet has two cranes: where both sides have them at the same place, they are the same.
        if len(best) != 1 and i not in best:
            return None
        outputs.append(i if len(best) > 1 else best.pop())
    return tuple(outputs) if len(set(outputs)) == len(outputs) else None


def _describe_difference(its: Sequence[str], classes: Sequence[str]) -> str:
    """In words, the first class of the data that the model does not have once."""
    for name in classes:
        hits = _candidates(name, its)
        if not hits:
            own = next((a for a in its if not _candidates(a, classes)), its[0])
            return (
                f"has no class {quote(name)} of the data, which have none such as its {quote(own)}"
            )
        if len(hits) > 1:
            number = len(hits)
            return f"has {number} classes that could be {quote(name)} of the data"
    return "has one class that could be several of the data's"


def _candidates(name: str, its: Sequence[str]) -> list[int]:
    """The outputs that could be of a class: those of that very name, or else of a like one."""
    for key in _KEY_FUNCTIONS:
        wanted = key(name)
        if found := [i for i, other in enumerate(its) if wanted & key(other)]:
            return found
    return []


def _positions_by_key(names: Sequence[str], key: Callable[[str], set[str]]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for i, name in enumerate(names):
        for part in key(name):
            found.setdefault(part, set()).add(i)
    return found


def _are_placeholders(names: Sequence[str]) -> bool:
    """Whether they are Hugging Face's LABEL_0, LABEL_1, ..., which say nothing."""
    return all(name == f"LABEL_{i}" for i, name in enumerate(names))


def _are_consecutive_numbers(names: Sequence[str]) -> bool:
    """Whether they are the numbers 0, 1, 2, ..., as of an array of labels, in any order."""
    return all(map(_is_number, names)) and {*map(int, names)} == {*range(len(names))}


def _is_number(name: str) -> bool:
    return name.isdecimal()


def _share_key(a: str, b: str) -> bool:
    return any(key(a) & key(b) for key in _KEY_FUNCTIONS)


def _exact_key(name: str) -> set[str]:
    return {name}


def _spelling_key(name: str) -> set[str]:
    return {_normalise_spelling(name)}


def _synonym_keys(name: str) -> set[str]:
    """Spellings that mean the same: the value of a number, the synonyms of a class of ImageNet.

    A comma parts synonyms in ImageNet's own descriptions alone; elsewhere it is part of the name.
    """
    if _is_number(name):
        return {str(int(name))}
    parts = {_normalise_spelling(part) for part in name.split(",")} - {""}
    synset = name.partition(",")[0].strip()
    if _SYNSET.fullmatch(synset):
        description = name.partition(",")[2]
        return {_normalise_spelling(name), *parts} | (
            {_normalise_spelling(description)} if description else set()
        )
    known = _synset_by_description().get(_normalise_spelling(name)) if "," in name else None
    return {_normalise_spelling(name), *parts, known} if known else {_normalise_spelling(name)}


# From the closest to the widest sense in which two names can be the same.
_KEY_FUNCTIONS = (_exact_key, _spelling_key, _synonym_keys)


@lru_cache
def _synset_by_description() -> Mapping[str, str]:
    """The synset of each of ImageNet's descriptions, such as `tench, Tinca tinca`."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo("imagenet-22k")
    return {
        _normalise_spelling(info.label_name_to_description(name)): name
        for name in info.label_names()
    }


@lru_cache(maxsize=65536)
def _normalise_spelling(name: str) -> str:
    # Folders of one name come in two forms of Unicode: macOS takes letters and accents apart.
    whole = unicodedata.normalize("NFD", name).casefold()
    whole = unicodedata.normalize("NFC", whole)
    return " ".join(whole.replace("_", " ").replace("-", " ").split())
