"""Match a model's classes with the data's: by name, by position, or through a class map.

A teacher whose outputs are in another order than the data's classes teaches nonsense without any
error, so everything that can be compared is compared, and every assumption is reported.
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
    """The match of a model's outputs with the data's classes.

    Attributes:
        how: Description of the match, for reports.
        outputs: The model's output for each class of the data; None where the order is the same.
        assumed: Whether the order of the model's classes is assumed, for lack of names.
        note: Warning about the assumption; None where there is nothing to warn of.
        groups: Group of each class of `outputs`, whose probabilities are summed; None where the
            outputs are the data's own classes.
    """

    how: str
    outputs: tuple[int, ...] | None = None
    assumed: bool = False
    note: str | None = None
    groups: tuple[int, ...] | None = None


# Of a model whose outputs are of no use here.
BY_FEATURES = Match("by its features alone")


def match(
    who: str,
    model_classes: Sequence[str] | int,
    classes: Sequence[str],
    class_map: ClassMap | None = None,
    option: str | None = "--class-map",
) -> Match:
    """Find a model's output for each class of the data.

    Names are compared without regard to case, spaces, hyphens, underscores and the form of
    Unicode; whole numbers by their value, so that `007` is `7`. ImageNet's classes are recognised
    by synset and by each of their synonyms. The order does not matter where names are known:
    outputs are taken in the order of the data's classes.

    Where the model has no names, or one side has only the numbers 0, 1, 2, ..., positions decide:
    the natural order for classes that are numbers, the data's order for others.

    Args:
        who: Name of the model in messages.
        model_classes: Class names in the order of the model's outputs, or only their number.
        classes: Names of the data's classes, in order.
        class_map: Class of the data -> class of the model, where names differ or the assumed order
            is wrong.
        option: Option of the class map, for messages; None where there is no such option.

    Raises:
        UserError: If the classes are not the same, or the map does not give each class one output
            of its own.
    """
    matched = _match(who, model_classes, classes, class_map, option)
    if isinstance(matched, str):
        raise UserError(matched)
    return matched


def match_if_same(
    who: str,
    model_classes: Sequence[str] | int,
    classes: Sequence[str],
    class_map: ClassMap | None = None,
    option: str | None = "--class-map",
) -> Match:
    """As `match`, for a model whose features are enough: they are where the classes differ.

    Raises:
        UserError: If there is a class map that does not give each class one output of its own.
    """
    matched = _match(who, model_classes, classes, class_map, option)
    return BY_FEATURES if isinstance(matched, str) else matched


def _match(
    who: str,
    model_classes: Sequence[str] | int,
    classes: Sequence[str],
    class_map: ClassMap | None,
    option: str | None,
) -> Match | str:
    """The match, or a line that says why there is none."""
    if class_map is not None:
        return Match("by the class map", _map_outputs(who, model_classes, classes, class_map))
    count = model_classes if isinstance(model_classes, int) else len(model_classes)
    if count == 0:
        return f"{who} has no head, and this needs answers for classes: use a loss of layers alone"
    if count != len(classes):
        remedy = "" if option is None else f", or {option} FILE must say which are which"
        return f"{who} has {count} classes, the data have {len(classes)}: they must match{remedy}"
    if isinstance(model_classes, int) or are_placeholders(model_classes):
        return _match_by_position(classes, option)
    outputs = match_by_name(model_classes, classes)
    if outputs is not None:
        same = outputs == tuple(range(count))
        return Match("by name" if same else "by name, in another order", None if same else outputs)
    if _are_consecutive_numbers(model_classes) and not any(map(_is_number, classes)):
        return _match_by_position(classes, option)
    if _are_consecutive_numbers(classes) and not any(map(_is_number, model_classes)):
        return _match_by_position(classes, option)
    remedy = "they must match" if option is None else f"{option} FILE must say which are which"
    return f"{who} {_describe_difference(model_classes, classes)}: {remedy}"


def are_placeholders(names: Sequence[str]) -> bool:
    """Whether the names are Hugging Face's placeholders LABEL_0, LABEL_1, ..."""
    return all(name == f"LABEL_{i}" for i, name in enumerate(names))


def likely_orders(classes: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The orders in which libraries number class folders of these names.

    Returns:
        Name of each order -> the classes in this order, as positions in `classes`.
    """
    natural = sorted(range(len(classes)), key=lambda i: natural_key(classes[i]))
    plain = sorted(range(len(classes)), key=lambda i: classes[i])
    return {
        "natural order, as timm sorts folders": tuple(natural),
        "the order of code points, as torchvision sorts folders": tuple(plain),
    }


def read_class_map(path: Path) -> dict[str, str | int]:
    """Read a class map: a JSON object of the data's class names and the teacher's names or numbers.

    Raises:
        UserError: If the file is missing, is not such an object, or has a class twice.
    """
    try:
        class_map = json.loads(
            path.read_text(), object_pairs_hook=lambda pairs: _require_unique_keys(path, pairs)
        )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read the class map {path}: {error}") from error
    if not isinstance(class_map, dict) or not all(map(_is_name_or_number, class_map.values())):
        raise UserError(
            f"the class map {path} must be one JSON object whose values are class names or "
            'numbers, as in {"cat": "tabby", "dog": 207}'
        )
    return class_map


def read_class_maps(
    text: str | None, names: Sequence[str], option: str = "--class-map"
) -> tuple[dict[str, str | int] | None, ...]:
    """Read the class map of each teacher; None where its classes are the data's.

    Args:
        text: One file for all teachers, or a comma-separated list with one file per teacher, empty
            for a teacher that needs none; None: no teacher needs one.
        names: Names of the teachers.
        option: The option, for messages.

    Raises:
        UserError: If the number of files is neither 1 nor the number of teachers, or a file cannot
            be read.
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
    """Add synset and synonyms to each of ImageNet's 1000 classes; return other names as they are.

    Libraries and folders call the same class `n01440764`, `tench` and `tench, Tinca tinca`.
    """
    known = imagenet_names(len(names)) if len(names) == 1000 else None
    if known is None:
        return names
    same = sum(_share_key(a, b) for a, b in zip(names, known, strict=True))
    # torchvision renames two, to distinguish the two cranes and the two maillots.
    if same < 990:
        return names
    return tuple(f"{b}, {a}" for a, b in zip(names, known, strict=True))


@lru_cache
def imagenet_names(count: int) -> tuple[str, ...] | None:
    """Synset and synonyms of each class of the ImageNet with `count` classes; None without one."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return tuple(f"{name}, {info.label_name_to_description(name)}" for name in info.label_names())


def abbreviate(names: Sequence[str]) -> str:
    """The first three names, quoted, for messages."""
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")


def _map_outputs(
    who: str, model_classes: Sequence[str] | int, classes: Sequence[str], class_map: ClassMap
) -> tuple[int, ...]:
    if foreign := [name for name in class_map if name not in classes]:
        raise unknown_name("class of the data in the class map", foreign[0], classes)
    if left := [name for name in classes if name not in class_map]:
        raise UserError(
            f"the class map leaves out {len(left)} of the data's classes: {abbreviate(left)}"
        )
    outputs = [_find_output(who, model_classes, class_map[name]) for name in classes]
    for i, output in enumerate(outputs):
        if (j := outputs.index(output)) != i:
            raise UserError(
                f"the class map gives {quote(classes[j])} and {quote(classes[i])} the same class "
                f"of {who}, {quote(str(class_map[classes[i]]))}: each needs its own"
            )
    return tuple(outputs)


def _find_output(who: str, model_classes: Sequence[str] | int, target: str | int) -> int:
    """The model's output for one entry of a class map, a class name or number."""
    count = model_classes if isinstance(model_classes, int) else len(model_classes)
    if isinstance(target, int):
        if not 0 <= target < count:
            raise UserError(f"the class map asks for class {target} of {who}, which has {count}")
        return target
    if isinstance(model_classes, int):
        raise UserError(
            f"the class map asks for class {target!r} of {who}, whose class names are not known: "
            f"give numbers from 0 to {count - 1}"
        )
    outputs = _candidates(target, model_classes)
    if not outputs:
        near = difflib.get_close_matches(target, model_classes, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UserError(f"the class map asks for class {target!r}, which {who} does not have{hint}")
    if len(outputs) > 1:
        raise UserError(
            f"the class map asks for class {target!r}, of which {who} has {len(outputs)}, numbers "
            f"{', '.join(map(str, outputs))}: give the number"
        )
    return outputs[0]


def _require_unique_keys(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"the class map {path} has class {quote(twice)} twice")
    return unique


def _is_name_or_number(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _match_by_position(classes: Sequence[str], option: str | None) -> Match:
    """Match a model without class names; the order of its classes can only be assumed."""
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
    """A warning if the libraries sort these class folders differently; None if they agree."""
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


def match_by_name(model_classes: Sequence[str], classes: Sequence[str]) -> tuple[int, ...] | None:
    """The output of each class, if every class has exactly one of its own; else None."""
    tables = [_positions_by_key(model_classes, key) for key in _KEY_FUNCTIONS]
    outputs = []
    for i, name in enumerate(classes):
        hits = (
            {output for part in key(name) for output in table.get(part, ())}
            for key, table in zip(_KEY_FUNCTIONS, tables, strict=True)
        )
        best = next(filter(None, hits), set())
        # ImageNet has two cranes: if both sides have one at the same position, they are the same.
        if len(best) != 1 and i not in best:
            return None
        outputs.append(i if len(best) > 1 else best.pop())
    return tuple(outputs) if len(set(outputs)) == len(outputs) else None


def _describe_difference(model_classes: Sequence[str], classes: Sequence[str]) -> str:
    """Describe the first class of the data that the model does not have exactly once."""
    for name in classes:
        hits = _candidates(name, model_classes)
        if not hits:
            unmatched = (a for a in model_classes if not _candidates(a, classes))
            example = next(unmatched, model_classes[0])
            return (
                f"has no class {quote(name)} of the data, "
                f"which have none such as its {quote(example)}"
            )
        if len(hits) > 1:
            number = len(hits)
            return f"has {number} classes that could be {quote(name)} of the data"
    return "has one class that could be several of the data's"


def _candidates(name: str, model_classes: Sequence[str]) -> list[int]:
    """The outputs that could be a class: those of the exact name, or else of a similar one."""
    for key in _KEY_FUNCTIONS:
        keys = key(name)
        if outputs := [i for i, other in enumerate(model_classes) if keys & key(other)]:
            return outputs
    return []


def _positions_by_key(names: Sequence[str], key: Callable[[str], set[str]]) -> dict[str, set[int]]:
    positions: dict[str, set[int]] = {}
    for i, name in enumerate(names):
        for part in key(name):
            positions.setdefault(part, set()).add(i)
    return positions


def _are_consecutive_numbers(names: Sequence[str]) -> bool:
    """Whether the names are the numbers 0, 1, 2, ..., as in an array of labels, in any order."""
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

    A comma separates synonyms only in ImageNet's descriptions; elsewhere it is part of the name.
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


# From the strictest to the loosest sense in which two names can be the same.
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
    # Folder names come in two forms of Unicode: macOS separates letters and accents.
    whole = unicodedata.normalize("NFD", name).casefold()
    whole = unicodedata.normalize("NFC", whole)
    return " ".join(whole.replace("_", " ").replace("-", " ").split())
