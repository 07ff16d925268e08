"""`kd evaluate` of a student of texts: the figures of its task on test or other texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress
from dsdistill.harness.runs.run_folder import INPUTS_KEY
from kd.assembly import training_texts
from kd.commands.evaluation import TEACHER_CLASS_MAP, ChosenTeachers
from kd.data import data_source
from kd.data.text import causal_rows, corpus, embedding_texts, part_files
from kd.data.text.corpus import Corpus, TextPart
from kd.data.text.tokenization import EncodedPart
from kd.evaluation import text_figures
from kd.evaluation.text_figures import JudgedTexts
from kd.models import networks
from kd.models.language import saved_text_models, text_teachers
from kd.models.language.language_model import LanguageModel
from kd.models.language.task import SINGLE, Task
from kd.models.language.text_model import TextModel
from kd.models.language.text_teachers import TextTeacher
from kd.models.token_inputs import TokenInputs
from kd.models.zoo import class_names
from kd.objectives import loss_checks, terms
from kd.options import EvaluateOptions
from kd.runs import run_data

CLASS_MAP = "--class-map"


@dataclass(frozen=True, eq=False)
class ChosenTexts:
    """The texts that a student is judged on.

    Attributes:
        corpus: Data that they are of.
        part: The texts, their labels in the order of `classes`.
        which: Description of the texts.
        classes: Names of the classes or tags; empty for other tasks.
        outputs: The student's output for each class; None where the order is the same.
        classes_matched: How the classes were matched, in words; None without classes.
    """

    corpus: Corpus
    part: TextPart
    which: str
    classes: tuple[str, ...] = ()
    outputs: tuple[int, ...] | None = None
    classes_matched: str | None = None


@dataclass(frozen=True, eq=False)
class TextEvaluation:
    """A student of texts with texts to judge it on; its members are those of `Evaluation`.

    Attributes:
        options: Options of the command.
        student: The student, on the device.
        chosen: The texts.
        encoding: The texts as the student's tokenizer encodes them.
        teaches_outputs: Whether the run's loss has reached the student's outputs.
        gives_logits: Whether it has made them logits.
        device: Device of the networks.
    """

    options: EvaluateOptions
    student: TextModel
    chosen: ChosenTexts
    encoding: EncodedPart
    teaches_outputs: bool
    gives_logits: bool
    device: torch.device

    @property
    def student_name(self) -> str:
        return self.student.name

    @property
    def data_name(self) -> str:
        return self.chosen.corpus.name

    @property
    def judged_on(self) -> str:
        return self.chosen.which

    @property
    def classes_matched(self) -> str | None:
        return self.chosen.classes_matched

    def figures(self, teachers: ChosenTeachers | None) -> dict[str, Any]:
        if not self.teaches_outputs:
            progress.say(
                f"note: the loss of {self.options.run} has taught layers alone: its outputs are "
                "those of an untrained head"
            )
            if self.options.teacher is None:
                teachers = None  # of which nothing but layers was asked
        named = self._load_teachers(teachers) if teachers else []
        texts = self._judged([teacher for _, teacher in named])
        network = _OutputSelector(self.student.network, self.chosen.outputs)
        figures = text_figures.evaluate(network, texts, named)
        for note in figures.get("notes", ()):
            progress.say(note)
        return {"task": self.student.task, **figures}

    def size(self) -> dict[str, Any]:
        network = self.student.network
        return {
            "parameters": networks.parameter_count(network),
            **text_figures.latency(network, self._judged()),
        }

    def _load_teachers(self, chosen: ChosenTeachers) -> list[tuple[str, TextTeacher]]:
        classes = self.chosen.classes
        sample = list(training_texts.strings(self.chosen.part.texts[0][:1000]))
        named = []
        for name, mapping in zip(chosen.names, chosen.class_maps, strict=True):
            teacher = text_teachers.load(
                name,
                self.student,
                classes,
                sample,
                class_map=mapping,
                class_map_option=TEACHER_CLASS_MAP,
            )
            for note in teacher.resolved.notes:
                progress.say(f"teacher {name}: {note}")
            named.append((name, teacher.to(self.device)))
        return named

    def _judged(self, teachers: Sequence[TextTeacher] = ()) -> JudgedTexts:
        """The texts as the student's tokenizer and those of teachers encode them."""
        part, task = self.chosen.part, self.student.task
        parallel = self.chosen.corpus.parallel
        tokenizers, lengths, places = text_teachers.tokenizers(
            self.student, teachers, other_texts=parallel
        )
        others = zip(tokenizers[1:], lengths[1:], strict=True)
        taught = embedding_texts.of_teacher(part, parallel=parallel) if task == "embed" else part
        encodings = [_encode(taught, task, tokenizer, length) for tokenizer, length in others]
        labels = part.labels if isinstance(part.labels, np.ndarray) else None
        return JudgedTexts(
            task,
            self.chosen.classes,
            (self.encoding, *encodings),
            tokenizers,
            places,
            labels,
            part.languages,
            self.device,
            paired=task == "embed" and len(part.texts) == 2,
            parallel=parallel,
            gives_logits=self.gives_logits,
        )


class _OutputSelector(torch.nn.Module):
    """A network's outputs in the order of the data's classes."""

    def __init__(self, network: LanguageModel, outputs: tuple[int, ...] | None) -> None:
        super().__init__()
        self.network, self.outputs = network, outputs

    def forward(self, inputs: TokenInputs) -> torch.Tensor:
        logits = self.network(inputs)
        return logits if self.outputs is None else logits[..., list(self.outputs)]


def prepare(options: EvaluateOptions, device: torch.device) -> TextEvaluation:
    """Load a student of texts and the texts to judge it on, and match their classes.

    Args:
        options: Options of the command.
        device: Device of the networks.

    Raises:
        UserError: If run or data are missing or do not fit together.
    """
    if options.robust is not None:
        raise UserError(
            f"--robust changes pixels of images, and {options.run} is a student of texts: leave it "
            "out"
        )
    student = saved_text_models.load_run(options.run)
    config = run_data.read_config(options.run)
    chosen = _match_classes(options, student, _choose(options, config, student))
    columns = len(chosen.part.texts)
    if student.task not in SINGLE and student.pairs != (columns == 2):
        takes = "pairs of texts" if student.pairs else "single texts"
        raise UserError(
            f"the student of {options.run} takes {takes}, and {chosen.corpus.name} has {columns} "
            f"column{'' if columns == 1 else 's'} of texts: give other DATA"
        )
    for note in chosen.corpus.notes:
        progress.say(f"{chosen.corpus.name}: {note}")
    part, task = chosen.part, student.task
    part = embedding_texts.of_student(part) if task == "embed" else part
    encoding = _encode(part, task, student.tokenizer, student.max_length)
    if encoding.truncated:
        count = len(encoding) + encoding.left_out
        progress.say(
            f"{encoding.truncated / count:.1%} of the texts are longer than the "
            f"student's {student.max_length} tokens and are cut"
        )
    loss = run_data.read_recipe(options.run).loss
    loss_terms = terms.parse(loss) if loss else ()
    teaches = not loss_terms or loss_checks.teaches_outputs(loss_terms, task=task)
    taught = any(term.definition.needs_teacher for term in loss_terms)
    logits = loss_checks.gives_logits(loss_terms, alone=not taught)
    student.network.to(device)
    return TextEvaluation(options, student, chosen, encoding, teaches, logits, device)


def _encode(part: TextPart, task: Task, tokenizer: Any, max_length: int) -> EncodedPart:
    if task == "causal" and not isinstance(part.texts[0][0], str):
        causal_rows.add_chat_template(tokenizer)
    return training_texts.encode(part, task, tokenizer, max_length)


def _choose(options: EvaluateOptions, config: Mapping[str, Any], student: TextModel) -> ChosenTexts:
    """Choose the texts to judge on.

    Of the data that the run was trained on, and of other data with such parts, these are the test
    texts, or else the validation texts; of other data without parts, all texts.
    """
    name = options.data or config.get("data")
    if not isinstance(name, str):
        raise UserError(f"{options.run} does not say what it was trained on: give DATA")
    path = part_files.locate(name, options.data_root)
    if lone := part_files.find_lone_part(path):
        path, name = lone, str(lone)
    fraction = data_source.fraction_or_default(config.get("validation_fraction"))
    columns = {name: getattr(options, name) or config.get(name) for name in ("text", "label")}
    data = _load(path, columns, student, fraction)
    is_of_run = options.data is None or _is_training_data(config, path, options, data)
    if not is_of_run and not data.brings_validation:
        data = _load(path, columns, student, 0.0)  # nothing is held out of other data
    if len(data.test):
        return ChosenTexts(data, data.test, f"test texts of {data.name}")
    if data.brings_validation:
        return ChosenTexts(data, data.validation, f"validation texts of {data.name}")
    if not is_of_run:
        return ChosenTexts(data, data.train, f"all texts of {name}")
    if not len(data.validation):
        raise UserError(
            f"nothing to judge on: {data.name} has no test texts, and none were held out for "
            "validation: give other DATA"
        )
    held_out = "the share of the texts that the training has held out for validation"
    return ChosenTexts(data, data.validation, held_out)


def _load(
    path: Path, columns: Mapping[str, str | None], student: TextModel, fraction: float
) -> Corpus:
    return corpus.load(path, task=student.task, validation_fraction=fraction, **columns)


def _is_training_data(
    config: Mapping[str, Any], path: Path, options: EvaluateOptions, data: Corpus
) -> bool:
    """Whether these are the data that the run was trained on, by path or by hash."""
    stored = config.get("data")
    same_path = isinstance(stored, str) and (
        part_files.locate(stored, options.data_root).resolve() == path.resolve()
    )
    return same_path or config.get(INPUTS_KEY, {}).get("texts") == data.sha256


def _match_classes(
    options: EvaluateOptions, student: TextModel, chosen: ChosenTexts
) -> ChosenTexts:
    """Match the labels of the texts with the student's outputs, by name or by the class map.

    Of texts that lack some of the student's classes, all its outputs count nevertheless.
    """
    data, who = chosen.corpus, f"student {options.run}"
    if not data.classes:
        if options.class_map is not None:
            raise UserError(f"{CLASS_MAP} has no effect on --task {student.task}: leave it out")
        return chosen
    if options.class_map is not None:
        mapping = class_names.read_class_map(options.class_map)
        matched = class_names.match(who, student.classes, data.classes, mapping)
        return replace(
            chosen,
            classes=data.classes,
            outputs=matched.outputs,
            classes_matched=matched.how,
        )
    places = class_names.match_by_name(student.classes, data.classes)
    if places is None:
        class_names.match(who, student.classes, data.classes, option=CLASS_MAP)  # says what differs
        raise UserError(
            f"{who} calls its classes {class_names.abbreviate(student.classes)}, "
            f"{data.name} {class_names.abbreviate(data.classes)}: they must match, or {CLASS_MAP} "
            "FILE must say which are which"
        )
    missing = [name for i, name in enumerate(student.classes) if i not in places]
    if missing:
        progress.say(f"note: {data.name} has no class {class_names.abbreviate(missing)}")
    part = replace(chosen.part, labels=_renumber(chosen.part.labels, np.array(places)))
    matched = {"classes": student.classes, "classes_matched": "by name"}
    return replace(chosen, part=part, **matched)


def _renumber(labels: Any, places: np.ndarray) -> Any:
    """Classes, or tags of texts, by their numbers among the student's."""
    return places[labels] if isinstance(labels, np.ndarray) else tuple(places[x] for x in labels)
