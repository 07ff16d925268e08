"""Students of texts by name.

hf:ID, hf:DIR   a model with its weights and its tokenizer
runs/earlier    the student of an earlier run, to train further, also for another task
teacher         a copy of the teacher; with some of its blocks by `keep_layers`
bilstm:150      a fresh bidirectional LSTM
bert:4x312      a fresh BERT of four blocks of 312 values
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsdistill.harness.errors import UserError
from kd.models.language import (
    bilstm,
    text_model,
    tokenizer,
    trained_models,
    transformer,
)
from kd.models.language.task import Task
from kd.models.language.text_model import TextModel
from kd.models.zoo import allocation, class_names

TEACHER, WORDS, CHARACTERS = "teacher", "words", "characters"
KINDS = "hf:ID, hf:DIR, a run's folder, teacher, bilstm, bilstm:HIDDEN or bert:BLOCKSxWIDTH"
_BILSTM = re.compile(r"bilstm(?::([1-9][0-9]*))?")


def build(
    name: str,
    task: Task,
    classes: tuple[str, ...],
    *,
    teacher: str | None = None,
    tokenizer_source: str | None = None,
    texts: Iterable[str] = (),
    seed: int = 0,
    max_length: int | None = None,
    pairs: bool = False,
    keep_layers: Sequence[int] | None = None,
) -> TextModel:
    """Build a student: fresh, with published weights, or a copy of a trained model.

    Lines about a new head, about its blocks and about the order of its classes are in the network's
    `notes`.

    Args:
        name: Name as in the module's docstring.
        task: What it is trained for.
        classes: Names of the data's classes or tags, in label order; empty for other tasks.
        teacher: Name of the teacher, of which a student may be a copy, and whose tokenizer a fresh
            student has by default.
        tokenizer_source: Tokenizer of a fresh student: `words` or `characters`, those of the
            training texts; or the name of a model or a folder. None: the teacher's.
        texts: Training texts, for `words` and `characters`.
        seed: Seed of all new weights.
        max_length: Largest number of tokens of a text; None: that of an earlier run, of a fresh
            student the teacher's; or 128, or as many as the network takes.
        pairs: Whether the data are pairs of texts.
        keep_layers: Numbers of the blocks that a copy has, from 0; None: all.

    Raises:
        UserError: If there is no such student, or it does not fit the data or the options.
    """
    if name == TEACHER:
        if teacher is None:
            raise UserError("--student teacher is a copy of the teacher: name it with --teacher")
        name = teacher
    if not is_fresh(name):
        if not trained_models.is_name(name):
            raise UserError(f"unknown student of texts {name!r}: known are {KINDS}")
        if tokenizer_source is not None:
            raise UserError(f"{name} brings its tokenizer: leave --tokenizer out")
        model = _trained(name, task, classes, seed, max_length, pairs, keep_layers)
        return _fit_embedding(model, teacher, seed)
    if keep_layers is not None:
        raise UserError(f"--keep-layers needs blocks with weights, and {name} is a fresh network")
    own = _tokenizer(name, tokenizer_source, teacher, texts)
    model = _fresh(name, task, classes, own, seed, max_length, pairs, teacher)
    return _fit_embedding(model, teacher, seed)


def parse_layers(text: str) -> tuple[int, ...]:
    """The numbers in a list such as `1,3,5`.

    Raises:
        UserError: If it is no such list.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise UserError(f"--keep-layers must be numbers of blocks from 0, as 1,3,5, got {text!r}")
    return tuple(map(int, parts))


def is_fresh(name: str) -> bool:
    """Whether a name means a network with random weights; a folder of that name is a run."""
    named = name.startswith("bert:") or _BILSTM.fullmatch(name) is not None
    return named and not Path(name).is_dir()


def _trained(
    name: str,
    task: Task,
    classes: tuple[str, ...],
    seed: int,
    max_length: int | None,
    pairs: bool,
    keep_layers: Sequence[int] | None,
) -> TextModel:
    model = trained_models.load(name, task, classes, pairs=pairs, seed=seed)
    length = text_model.choose_length(
        name, model.max_length if max_length is None else max_length, model.positions
    )
    model, notes = _with_classes(name, model, classes, seed)
    if keep_layers is not None:
        if not hasattr(model.network.network, "base_model_prefix"):
            raise UserError(f"--keep-layers needs a transformer, and {name} is a {model.name}")
        smaller = transformer.keep_blocks(model.network, keep_layers, task, model.tokenizer)
        kept = ",".join(map(str, keep_layers))
        model = replace(model, network=smaller, name=f"{model.name}[{kept}]")
        notes = (*notes, f"a copy of {name} with its blocks {kept}")
    text_model.require_same_pairs(name, model, pairs)
    model.network.notes = (*model.network.notes, *notes)
    return replace(model, max_length=length, pairs=pairs)


def _with_classes(
    name: str, model: TextModel, classes: tuple[str, ...], seed: int
) -> tuple[TextModel, tuple[str, ...]]:
    """The model with outputs in the order of the data's classes, or with a new head for these."""
    if model.classes == classes:
        return model, ()
    unnamed = class_names.are_placeholders(model.classes) and len(model.classes) == len(classes)
    if unnamed:
        matched = class_names.match(name, model.classes, classes, option=None)
        model = trained_models.reorder_classes(name, model, matched.outputs, classes)
        return model, (f"classes matched {matched.how}",)
    same_number = len(model.classes) == len(classes)
    outputs = class_names.match_by_name(model.classes, classes) if same_number else None
    if outputs is not None:
        order = None if outputs == tuple(range(len(classes))) else outputs
        model = trained_models.reorder_classes(name, model, order, classes)
        return model, () if order is None else ("classes matched by name, in another order",)
    own, data = class_names.abbreviate(model.classes), class_names.abbreviate(classes)
    model = trained_models.new_head(name, model, model.task, classes, seed)
    return model, (f"a new head, since {name} has the classes {own} and the data have {data}",)


def _fit_embedding(model: TextModel, teacher: str | None, seed: int) -> TextModel:
    """A model of embeddings that can be compared with the teacher's; any other one as it is."""
    if model.task != "embed" or teacher is None:
        return model
    width, normalise = trained_models.embedding_width(teacher)
    if isinstance(model.network.network, bilstm.BiLstm):
        if model.embedding_width != width:
            raise UserError(
                f"{model.name} gives embeddings of {model.embedding_width} values, and the "
                f"teacher's have {width}: train a fresh one"
            )
        return model
    network = transformer.fit_embedding(
        model.network, model.tokenizer, width=width, normalise=normalise, seed=seed
    )
    return replace(model, network=network)


def _tokenizer(name: str, source: str | None, teacher: str | None, texts: Iterable[str]) -> Any:
    if source == WORDS:
        return tokenizer.train_on_words(texts)
    if source == CHARACTERS:
        return tokenizer.train_on_characters(texts)
    source = source or teacher
    if source is None:
        raise UserError(
            f"{name} has no tokenizer: it takes that of --teacher, or of --tokenizer hf:ID, or "
            "--tokenizer words"
        )
    return trained_models.load_tokenizer(source)


def _fresh(
    name: str,
    task: Task,
    classes: tuple[str, ...],
    own: Any,
    seed: int,
    max_length: int | None,
    pairs: bool,
    teacher: str | None,
) -> TextModel:
    if max_length is None and teacher:
        max_length = trained_models.usual_length(teacher)
    heads = trained_models.heads(teacher) if teacher else None
    length = text_model.choose_length(name, max_length, None)
    match = _BILSTM.fullmatch(name)
    with allocation.limited(name):
        if match is None:
            network = transformer.fresh(
                name, task, classes, own, seed=seed, positions=length, heads=heads
            )
        elif task not in ("classify", "regress", "embed"):
            raise UserError(
                f"{name} has one answer for a text: --task {task} needs a transformer, as "
                "bert:4x312"
            )
        elif pairs and not tokenizer.marks_second_text(own):
            raise UserError(
                f"{name} compares two texts, and the tokenizer does not say where the second one "
                "begins: use --tokenizer words"
            )
        else:
            hidden = int(match[1] or bilstm.HIDDEN)
            outputs, normalise = max(len(classes), 1), None
            if task == "embed":
                if teacher is None:
                    raise UserError(f"{name} has as many outputs as its teacher: name one")
                outputs, normalise = trained_models.embedding_width(teacher)
            network = bilstm.build(
                len(own), outputs, hidden, pairs=pairs, normalise=normalise, seed=seed
            )
    return TextModel(network, name, task, classes, own, length, pairs)
