"""A corpus: texts with their labels in parts to train, validate and test on."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dsdistill.harness.data import class_names
from dsdistill.harness.data.labeled_images import SPLIT_SEED, split_by_class
from dsdistill.harness.data.tables import Table
from dsdistill.harness.errors import UserError
from kd.data.text import columns, part_files
from kd.data.text.columns import Columns, Task

UNLABELLED = "-1"  # label of every test row of GLUE
Message = Mapping[str, Any]  # a turn of a conversation, with its `role` and `content`
Labels = Int[np.ndarray, " n"] | Float[np.ndarray, " n"] | tuple[Int[np.ndarray, " l"], ...]


@dataclass(frozen=True, eq=False)
class TextPart:
    """Rows of one part.

    Attributes:
        texts: One sequence of texts, or two of pairs. A text is a string; of tagged sentences the
            list of its tokens, of conversations the list of its messages.
        labels: Class of each row, its score, or the tag of each of its tokens; None without labels.
        languages: Language of each row; None where it is not said.
    """

    texts: tuple[Sequence[Any], ...]
    labels: Labels | None = None
    languages: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts[0])

    def select(self, rows: Int[np.ndarray, " m"]) -> "TextPart":
        """The rows with these numbers."""
        labels = self.labels
        if isinstance(labels, np.ndarray):
            labels = labels[rows]
        elif labels is not None:
            labels = tuple(labels[i] for i in rows)
        languages = self.languages and tuple(self.languages[i] for i in rows)
        return TextPart(
            tuple([column[i] for i in rows] for column in self.texts), labels, languages
        )


@dataclass(frozen=True, eq=False)
class Corpus:
    """Texts to train on and to judge on.

    Attributes:
        name: Short name, for folder names and reports.
        task: What is learned from them.
        train, validation, test: The parts; one that there is not has no rows.
        classes: Names of the classes or tags, in label order; empty for other tasks.
        brings_validation: Whether the validation part is the data's own.
        notes: Lines for the user: what was recognised, and what is missing.
        sha256: Changes with any row of any part.
        parallel: Whether the second text of each row is a translation of the first.
    """

    name: str
    task: Task
    train: TextPart
    validation: TextPart
    test: TextPart
    classes: tuple[str, ...]
    brings_validation: bool
    notes: tuple[str, ...]
    sha256: str
    parallel: bool = False


def load(
    data: Path,
    *,
    task: Task | None = None,
    text: str | None = None,
    label: str | None = None,
    validation_fraction: float = 0.1,
    classes: Sequence[str] | None = None,
) -> Corpus:
    """Read a file, or a folder with a file for each part.

    For causal models a file of plain text is one text with its line breaks, and the end of it
    validates; for other tasks each line is a text.

    Args:
        data: A file that `tables` reads; a folder as `part_files.find` knows it.
        task: What is learned; None: told from the columns and the labels.
        text, label: Names of columns, as for `columns.recognise`.
        validation_fraction: Share of the training rows that validates where no part does; of each
            class the same.
        classes: Names of the classes in the order that a model has them; by default the order of
            their numbers or of their names.

    Raises:
        UserError: If a file, a column or a row does not fit, with its line.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"--validation-fraction must be in [0, 1), got {validation_fraction:g}")
    parts = part_files.find(data, documents=task == "causal")
    train = parts["train"]
    if task is None and train.path.name.removesuffix(".gz").endswith(".txt"):
        raise UserError(f"{train.path} has texts and no labels: say --task mlm, causal or embed")
    found = columns.recognise(train.path, train.columns, task, text=text, label=label)
    task = task or _task(train, found)
    for other in parts.values():
        for name in found.texts:
            if name not in other.columns:
                raise UserError(f"{other.path} has no column {name}, which {train.path} has")
    notes = [f"{found.described}: {task}"]
    notes += [f"{table.path.name}: {table.note}" for table in parts.values() if table.note]
    parallel = task == "embed" and found.are_parallel(given=text is not None)
    if task == "embed":
        notes = ["; ".join([*notes, *_embedding_notes(train, found, parallel=parallel)])]
    known = _class_names(parts, found, task, classes)
    read = {
        name: _part(table, found, task, known, test=name == "test", notes=notes)
        for name, table in parts.items()
    }
    whole, brings = read["train"], "validation" in read
    validation = read.get("validation")
    is_document = task == "causal" and len(whole) == len(whole.texts) == 1
    is_document = is_document and isinstance(whole.texts[0][0], str)
    if validation is None and is_document and validation_fraction:
        whole, validation = _hold_out_end(whole, validation_fraction)
    elif validation is None:
        rest, held_out = _hold_out(whole, task, validation_fraction)
        whole, validation = whole.select(rest), whole.select(held_out)
    if task in ("classify", "tag") and len(known) < 2:
        raise UserError(f"{data} must have at least two classes, has {len(known)}")
    if not len(whole):
        raise UserError(
            f"--validation-fraction {validation_fraction:g} leaves none of so few rows of {data} "
            "to train on: lower it"
        )
    if task == "classify" and len(known) > 2 and len(train) < 2 * len(known):
        notes.append(
            f"warning: column {found.label} has {len(known)} classes in {len(train)} rows: if it "
            "holds no classes, name another with --label, or say --task regress"
        )
    test = read.get("test", whole.select(np.empty(0, np.int64)))
    return Corpus(
        part_files.short_name(data),
        task,
        whole,
        validation,
        test,
        known,
        brings,
        tuple(notes),
        _digest(parts),
        parallel,
    )


def check_messages(messages: Sequence[Message]) -> None:
    """Refuse a conversation without turns, or with one that has no role or no text.

    Args:
        messages: The turns.

    Raises:
        UserError: With the beginning of the conversation.
    """
    if not messages:
        raise UserError("a conversation has no turn: remove its row")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"each message must have a role and a content, got {excerpt(messages)}")
        if not isinstance(message.get("content"), str):
            raise UserError(f"the content of a message must be a text, got {excerpt(messages)}")


def excerpt(messages: Any) -> str:
    """The beginning of a conversation, for messages to the user."""
    text = json.dumps(messages, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _embedding_notes(table: Table, found: Columns, *, parallel: bool) -> list[str]:
    """Sentences on what the columns are for where embeddings are learned."""
    notes = []
    if parallel:
        first, second = found.texts
        notes.append(f"{second} is a translation of {first}: both fit the teacher's {first}")
    elif len(found.texts) == 2:
        notes.append("each text of a pair fits the teacher's embedding of it")
    others = [name for name in columns.LABELS if name in table.columns and name not in found.texts]
    if found.label is None and others:
        more = f", unless --label {others[0]} names scores" if len(found.texts) == 2 else ""
        notes.append(f"the column {others[0]} is not used: the teacher teaches{more}")
    return notes


def _task(table: Table, found: Columns) -> Task:
    if found.texts[0] in columns.TOKENS:
        return "tag"
    assert found.label is not None
    names = table.names.get(found.label)
    scores = names is None and columns.labels_are_scores(table.columns[found.label])
    return "regress" if scores else "classify"


def _class_names(
    parts: Mapping[str, Table], found: Columns, task: Task, classes: Sequence[str] | None
) -> tuple[str, ...]:
    """Names of the classes of the training part, in label order."""
    if task not in ("classify", "tag"):
        return ()
    assert found.label is not None
    table = parts["train"]
    values = [_names(table, found, task, row) for row in range(len(table))]
    names = {name for row in values for name in row}
    own = table.names.get(found.label)
    order = tuple(own) if own else class_names.sort(sorted(names))
    if classes is None:
        return order
    if matched := class_names.match(classes, order):
        return tuple(order[i] for i in matched)
    raise UserError(
        f"the labels of {table.path} are {', '.join(order[:10])}, and the model has "
        f"{', '.join(list(classes)[:10])}: they must be the same names"
    )


def _names(table: Table, found: Columns, task: Task, row: int) -> list[str]:
    """Names of the label of a row, or of its tags.

    Raises:
        UserError: If there is none.
    """
    assert found.label is not None
    value, names = table.columns[found.label][row], table.names.get(found.label)
    values = value if task == "tag" else [value]
    if not isinstance(values, list):
        raise UserError(
            f"{table.place(row)}: {found.label} must be a list with a tag for each token, got "
            f"{values!r}"
        )
    for each in values:
        if each is None or each == "" or (isinstance(each, float) and math.isnan(each)):
            raise UserError(f"{table.place(row)} has no {found.label}: add it, or remove the row")
        if not isinstance(each, str | int | float):
            raise UserError(
                f"{table.place(row)}: {found.label} must be one name or number, got {each!r}"
            )
    if names is not None:
        return [names[each] if each != -1 else UNLABELLED for each in values]
    return [str(each).strip() for each in values]


def _part(
    table: Table,
    found: Columns,
    task: Task,
    classes: tuple[str, ...],
    *,
    test: bool,
    notes: list[str],
) -> TextPart:
    texts = tuple(_texts(table, name, task) for name in found.texts)
    languages = found.language and found.language in table.columns
    part = TextPart(
        texts,
        None,
        tuple(map(str, table.columns[found.language])) if languages and found.language else None,
    )
    if found.label is None:
        return part
    if test and _is_unlabelled(table, found.label):
        notes.append(
            f"{table.path} has no labels: the student is judged on the validation part instead"
        )
        return part.select(np.empty(0, np.int64))
    if found.label not in table.columns:
        raise UserError(f"{table.path} has no column {found.label}: its rows cannot be judged")
    return replace(part, labels=_labels(table, found, task, classes))


def _is_unlabelled(table: Table, label: str) -> bool:
    values = table.columns.get(label)
    return values is None or all(str(value).strip() == UNLABELLED for value in values)


def _texts(table: Table, name: str, task: Task) -> Sequence[Any]:
    values = table.columns[name]
    is_conversation = task == "causal" and name == columns.CONVERSATION
    for row, value in enumerate(values):
        place = f"{table.place(row)}: {name}"
        if is_conversation:
            if not isinstance(value, list):
                raise UserError(f"{place} must be a list of messages, got {_shown(value)}")
            try:
                check_messages(value)
            except UserError as error:
                raise UserError(f"{table.place(row)}: {error}") from error
        elif task == "tag":
            if not isinstance(value, list):
                raise UserError(f"{place} must be a list of tokens, got {_shown(value)}")
            for token in value:
                _check_text(f"{place}: a token", token)
        else:
            _check_text(place, value)
    plain = task != "tag" and not is_conversation
    if plain and not any(map(str.strip, values)):
        raise UserError(f"{table.path} has no text in column {name}: name another with --text")
    return values


def _check_text(what: str, value: object) -> None:
    if not isinstance(value, str):
        raise UserError(f"{what} must be a text, got {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can hold `\\ud800` alone
        raise UserError(f"{what} holds half of a surrogate pair, which is no character") from error


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)[:60]


def _labels(table: Table, found: Columns, task: Task, classes: tuple[str, ...]) -> Labels:
    assert found.label is not None
    rows = range(len(table))
    if task in ("regress", "embed"):
        return np.array([_score(table, found.label, row) for row in rows], np.float32)
    position = {name: i for i, name in enumerate(classes)}

    def numbers(row: int) -> list[int]:
        names = _names(table, found, task, row)
        for name in names:
            if name not in position:
                raise UserError(
                    f"{table.place(row)}: the label {name!r} is none of the training rows' "
                    f"({', '.join(classes[:10])})"
                )
        return [position[name] for name in names]

    if task != "tag":
        return np.array([numbers(row)[0] for row in rows], np.int64)
    tags = tuple(np.array(numbers(row), np.int64) for row in rows)
    for row, (own, tokens) in enumerate(zip(tags, table.columns[found.texts[0]], strict=True)):
        if len(own) != len(tokens):
            raise UserError(
                f"{table.place(row)} has {len(tokens)} tokens and {len(own)} tags: there must be a "
                "tag for each token"
            )
    return tags


def _score(table: Table, label: str, row: int) -> float:
    value = table.columns[label][row]
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise UserError(f"{table.place(row)}: {label} must be a number, got {value!r}")
    return score


def _hold_out(part: TextPart, task: Task, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows that remain and rows that validate: the same for every seed."""
    if task == "classify" and isinstance(part.labels, np.ndarray):
        return split_by_class(part.labels, fraction)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(part))
    count = round(fraction * len(part))
    return np.sort(order[count:]), np.sort(order[:count])


def _hold_out_end(part: TextPart, fraction: float) -> tuple[TextPart, TextPart]:
    """The only text of a part in two: before and from the line in which its last share begins."""
    text = part.texts[0][0]
    place = round((1 - fraction) * len(text))
    place = text.rfind("\n", 0, place) + 1 or place
    return TextPart(([text[:place]],)), TextPart(([text[place:]],))


def _digest(parts: Mapping[str, Table]) -> str:
    sha = hashlib.sha256()
    for name in sorted(parts):
        content = {key: list(values) for key, values in sorted(parts[name].columns.items())}
        text = json.dumps([name, content], ensure_ascii=False, default=repr)
        sha.update(text.encode("utf-8", "surrogatepass"))
    return sha.hexdigest()
