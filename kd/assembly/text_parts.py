"""Assembly of the parts of a training on texts, with all checks before any writing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dsdistill.harness import shell
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress
from kd import recipe as recipe_rules
from kd import recipes
from kd.assembly import teacher_chain, training_texts
from kd.assembly.training_networks import checkpoint_gradients
from kd.assembly.training_parts import make_engine
from kd.assembly.training_texts import EncodedTexts
from kd.data import class_weights, data_source
from kd.data.class_weights import ClassWeights
from kd.data.text import (
    causal_rows,
    corpus,
    part_files,
)
from kd.data.text.corpus import Corpus
from kd.evaluation import text_scoring
from kd.models import network_names
from kd.models.language import lora, text_students, text_teachers, tokenizer
from kd.models.language.task import SINGLE, Task
from kd.models.language.text_model import TextModel
from kd.models.language.text_teachers import TextTeacher
from kd.models.token_inputs import IGNORED
from kd.models.zoo import class_names
from kd.objectives import loss_checks, terms
from kd.objectives.terms import Term
from kd.options import IMAGE_FIELDS, IMAGE_OPTIONS, TrainOptions
from kd.parallel.engine import Engine
from kd.recipe import COPYING_AUGMENTS, TEXT_AUGMENTS, Recipe
from kd.training import optimization

TEACHER_LOSS = "ce:0.1,kd:0.9:temperature=2"
# Task -> its loss on labels alone, and with a teacher.
LOSSES: Mapping[Task, tuple[str, str]] = {
    "classify": ("ce:1", TEACHER_LOSS),
    "tag": ("ce:1", TEACHER_LOSS),
    "regress": ("mse:1", "mse:0.1,logits:0.9"),
    "mlm": ("mlm:1", "mlm:1,tokens:1"),
    "causal": ("clm:1", "clm:0.5,tokens:0.5:temperature=1"),
    "embed": ("logits:1", "logits:1"),  # of embeddings: their mean squared error
}


@dataclass(frozen=True, eq=False)
class TextParts:
    """Parts of a training on texts.

    Attributes:
        corpus: Texts to train, validate and test on.
        student: The student with its initial weights.
        teacher_names: Names of the teachers; empty to train on labels alone.
        teachers: The teachers, frozen and on the device.
        peers: The other students of deep mutual learning, by name, which take the student's ids.
        tokenizers: The student's tokenizer, then those of teachers with another one.
        encoding_of_teacher: Place of each teacher's tokenizer in `tokenizers`; empty where teachers
            write texts.
        encoded: The parts of the corpus as token ids, by name; of the training part with copies.
        recipe: The resolved recipe, in which no field is left to a default.
        terms: Terms of the loss.
        on: Device, precision and processes.
        class_weights: Weights of the classes or tags in the cross-entropy; None without.
    """

    corpus: Corpus
    student: TextModel
    teacher_names: tuple[str, ...]
    teachers: tuple[TextTeacher, ...]
    peers: tuple[tuple[str, TextModel], ...]
    tokenizers: tuple[Any, ...]
    encoding_of_teacher: tuple[int, ...]
    encoded: Mapping[str, EncodedTexts]
    recipe: Recipe
    terms: tuple[Term, ...]
    on: Engine
    class_weights: ClassWeights | None = None

    @property
    def task(self) -> Task:
        """What is learned."""
        return self.corpus.task

    @property
    def teaches_outputs(self) -> bool:
        """Whether the loss reaches the student's outputs, and not its layers alone."""
        return loss_checks.teaches_outputs(self.terms, task=self.task)

    @property
    def gives_logits(self) -> bool:
        """Whether the student's outputs are logits, and not estimates of centred labels."""
        # An average of the student teaches as a teacher does, and its term is none of labels.
        taught = any(term.definition.needs_teacher for term in self.terms)
        return loss_checks.gives_logits(self.terms, alone=not taught)


def is_text(options: TrainOptions) -> bool:
    """Whether a training is one on texts, by its data and its task."""
    return options.task is not None or part_files.is_text(locate(options))


def locate(options: TrainOptions) -> Path:
    """The file or folder of the data, which may lie in the folder of named data sets."""
    return part_files.locate(options.data, options.data_root)


def assemble(options: TrainOptions) -> TextParts:
    """Resolve names, read the texts, load student and teachers, and check that they fit together.

    Raises:
        UserError: If a name is unknown, a file is missing, or parts do not fit together.
    """
    _refuse_image_options(options)
    path = locate(options)
    if not path.exists():
        raise UserError(
            f"no such file or folder of texts: {options.data} (nor one of that name in "
            f"{options.data_root})"
        )
    options = teacher_chain.last_student(options)
    named = recipes.by_name(options.recipe) if options.recipe else None
    name = options.student or (named and named.student)
    if name is None:
        raise UserError(f"--student must name a network of texts: {text_students.KINDS}")
    on = make_engine(options, named)
    say = progress.say if on.is_main_process else _say_nothing
    taught = teacher_chain.last_teacher(options) or (named and named.teacher)
    names = tuple(network_names.parse_names("--teacher", taught)) if taught else ()
    texts = _load_corpus(options, path)
    if texts.task == "embed" and (not names or options.mean_teacher is not None):
        raise UserError("--task embed fits the embeddings of a teacher: name it with --teacher")
    student = _student(options, name, names, texts)
    for note in student.network.notes:
        say(f"student {student.name}: {note}")
    peers = _peers(options, student, texts)
    for peer_name, peer in peers:
        for note in peer.network.notes:
            say(f"peer {peer_name}: {note}")
    alone = not (names or peers or options.mean_teacher is not None)
    chosen, loss_terms = _recipe(options, named, texts, student, alone)
    writes = chosen.augment == "teacher"  # the teacher's texts teach, and not its answers
    if writes and len(names) != 1:
        raise UserError(
            f"--augment teacher takes the texts of one teacher: --teacher must name one, got "
            f"{', '.join(names) or 'none'}"
        )
    _check_loss(options, chosen, loss_terms, texts, alone=alone or writes)
    loss_checks.check_students(loss_terms, chosen, teachers=bool(names), peers=bool(peers))
    teachers = _teachers(options, names, student, texts, loss_terms, writes=writes)
    for network in (student.network, *teachers, *(peer.network for _, peer in peers)):
        network.to(on.device)
    # A teacher that writes texts for the student does not see the student's.
    tokenizers, lengths, encoding_of_teacher = text_teachers.tokenizers(
        student, () if writes else teachers, other_texts=texts.parallel
    )
    training, complete = training_texts.choose(
        options, chosen, texts, tokenizers, teachers, on, say, max_length=student.max_length
    )
    encode_part = partial(
        training_texts.encode_all, texts.task, tokenizers, lengths, parallel=texts.parallel
    )
    encoded = {"train": encode_part(training, complete)}
    for part, content in (("validation", texts.validation), ("test", texts.test)):
        if len(content):
            encoded[part] = encode_part(content)
    for remark in loss_checks.remarks(loss_terms, images=len(encoded["train"])):
        say(remark)
    return TextParts(
        texts,
        student,
        names,
        teachers,
        peers,
        tokenizers,
        encoding_of_teacher,
        encoded,
        chosen,
        loss_terms,
        on,
        _class_weights(options, texts, encoded["train"]),
    )


def _class_weights(
    options: TrainOptions, texts: Corpus, train: EncodedTexts
) -> ClassWeights | None:
    """The weights of the classes or tags that are asked for; None without any."""
    if options.class_weights is None:
        return None
    labels = train.labels
    if texts.task == "tag":
        targets = train.encodings[0].targets
        assert targets is not None
        labels = targets[targets != IGNORED]
    assert labels is not None
    return class_weights.make(options.class_weights, texts.classes, labels)


def _refuse_image_options(options: TrainOptions) -> None:
    plain = TrainOptions()
    given = [name for name in IMAGE_OPTIONS if getattr(options, name) != getattr(plain, name)]
    given += [name for name in IMAGE_FIELDS if name in options.given]
    if given:
        raise UserError(f"{shell.flag(given[0])} is for images, and {options.data} are texts")
    if options.given.get("augment") not in (None, "none", *TEXT_AUGMENTS):
        raise UserError(
            f"--augment {options.given['augment']} is for images: of texts there are "
            f"{', '.join(TEXT_AUGMENTS)}"
        )
    if options.recipe and options.recipe not in recipes.OF_TEXTS:
        recipes.by_name(options.recipe)
        raise UserError(
            f"--recipe {options.recipe} is for images, and {options.data} are texts: use "
            f"{', '.join(recipes.OF_TEXTS)}"
        )


def _load_corpus(options: TrainOptions, path: Path) -> Corpus:
    return corpus.load(
        path,
        task=options.task,
        text=options.text,
        label=options.label,
        validation_fraction=data_source.fraction_or_default(options.validation_fraction),
    )


def _student(
    options: TrainOptions, name: str, teacher_names: Sequence[str], texts: Corpus
) -> TextModel:
    layers = options.keep_layers
    columns = texts.train.texts
    student = text_students.build(
        name,
        texts.task,
        texts.classes,
        teacher=teacher_names[0] if teacher_names else None,
        tokenizer_source=options.tokenizer,
        texts=(text for column in columns for text in training_texts.strings(column)),
        seed=options.seed,
        max_length=options.max_length,
        pairs=len(columns) == 2 and texts.task not in SINGLE,
        keep_layers=None if layers is None else text_students.parse_layers(layers),
    )
    if texts.task == "causal" and not isinstance(columns[0][0], str):
        note = causal_rows.add_chat_template(student.tokenizer)
        student.network.notes += (note,) if note else ()
    if options.checkpoint_gradients:
        checkpoint_gradients(student.network.network)
    if options.lora is not None:
        lora.add(student.network, options.lora, seed=options.seed)
    return student


def _peers(
    options: TrainOptions, student: TextModel, texts: Corpus
) -> tuple[tuple[str, TextModel], ...]:
    """Build the other students, fresh ones with the student's tokenizer.

    Raises:
        UserError: If one divides texts into other tokens, or is no student of its own.
    """
    columns = texts.train.texts
    fresh = text_students.is_fresh(student.name)
    source = options.tokenizer if fresh else options.student
    sample = list(training_texts.strings(columns[0][:1000]))
    peers: list[tuple[str, TextModel]] = []
    # A network may come twice.
    for number, name in enumerate(network_names.split_names(options.peers or ""), 1):
        peer = text_students.build(
            name,
            texts.task,
            texts.classes,
            tokenizer_source=source if text_students.is_fresh(name) else None,
            texts=(text for column in columns for text in training_texts.strings(column)),
            seed=options.seed + number,
            max_length=student.max_length,
            pairs=student.pairs,
        )
        if not tokenizer.same_ids(student.tokenizer, peer.tokenizer, sample):
            raise UserError(
                f"--peers {name} divides texts into other tokens than the student {student.name}: "
                "name networks with the same tokenizer"
            )
        peers.append((name, peer))
    return tuple(peers)


def _recipe(
    options: TrainOptions, named: Recipe | None, texts: Corpus, student: TextModel, alone: bool
) -> tuple[Recipe, tuple[Term, ...]]:
    """The recipe with all its fields, and its terms."""
    pretrained = not text_students.is_fresh(student.name)
    base = named or recipes.default_of_texts(pretrained=pretrained)
    chosen = recipe_rules.override(base, options.given)
    if "metric" not in options.given:
        chosen = replace(chosen, metric=text_scoring.default_metric(texts.task, texts.classes))
    if texts.task == "regress" and "loss" not in options.given and options.recipe:
        chosen = replace(chosen, loss=recipes.REGRESSION_LOSSES.get(options.recipe, chosen.loss))
    loss = chosen.loss or LOSSES[texts.task][0 if alone else 1]
    if options.peers and chosen.loss is None and texts.task in ("classify", "tag"):
        loss = recipes.MUTUAL_LOSS
    loss_terms = terms.parse(loss)
    chosen = loss_checks.apply_smoothing(loss_terms, replace(chosen, loss=loss), options.given)
    return chosen, loss_terms


def _check_loss(
    options: TrainOptions,
    chosen: Recipe,
    loss_terms: tuple[Term, ...],
    texts: Corpus,
    *,
    alone: bool,
) -> None:
    """Refuse a loss, a recipe and options that do not fit each other."""
    if options.class_map is not None and not texts.classes:
        raise UserError(f"--class-map has no effect on --task {texts.task}: leave it out")
    if options.class_weights is not None:
        if not texts.classes:
            raise UserError(f"--class-weights has no effect on --task {texts.task}: leave it out")
        loss_checks.check_class_weights(loss_terms)
    weighted = options.teacher_weights is not None
    if options.teacher_weights == "by-label" and texts.task in ("regress", "embed"):
        raise UserError(
            f"--teacher-weights by-label needs classes, which --task {texts.task} has not: leave "
            "it out"
        )
    loss_checks.check_texts(loss_terms, task=texts.task, same_ids=True)
    text_scoring.check_metric(chosen.metric, texts.task, texts.classes)
    if texts.task == "embed" and chosen.metric != "cosine" and texts.train.labels is None:
        raise UserError(f"--metric {chosen.metric} needs scores of pairs: name them with --label")
    loss_checks.check_teaching(loss_terms, chosen, alone=alone, weighted=weighted)
    loss_checks.check(
        loss_terms,
        classes=max(len(texts.classes), 1) if texts.task not in SINGLE else 1 << 31,
        batch_size=chosen.batch_size,
        mixed=False,
    )
    optimization.check_optimizer(chosen)
    if options.peers:
        _check_peers(options, chosen)
    writers = {
        "--on-policy": ("a student that writes", bool(chosen.on_policy)),
        "--augment teacher": ("a teacher that writes", chosen.augment == "teacher"),
    }
    for option, (who, given) in writers.items():
        if given and texts.task != "causal":
            raise UserError(f"{option} needs {who}: --task causal, not {texts.task}")
    if chosen.on_policy and not any(term.definition.needs_teacher for term in loss_terms):
        raise UserError(
            f"--on-policy lets a teacher judge what the student writes, and --loss {chosen.loss} "
            "has no teacher: add --teacher and tokens:1"
        )
    if (chosen.augment == "masked") != (options.mlm is not None):
        raise UserError("--augment masked and --mlm NAME need each other")
    if chosen.augment not in COPYING_AUGMENTS:
        return
    if texts.parallel:
        raise UserError(
            f"--augment {chosen.augment} changes texts, which their translations do not follow: "
            "leave it out"
        )
    labelled = [term.name for term in loss_terms if term.definition.inputs == "labels"]
    if labelled or texts.task not in ("classify", "regress", "embed"):
        what = f"--loss {labelled[0]}" if labelled else f"--task {texts.task}"
        raise UserError(
            f"--augment {chosen.augment} makes copies without labels, and {what} needs them: "
            "use losses of the teacher's answers alone, such as kd:1, or leave it out"
        )


def _check_peers(options: TrainOptions, chosen: Recipe) -> None:
    """Refuse what students that teach each other do not have."""
    for option, given in (("lora", options.lora), ("keep_layers", options.keep_layers)):
        if given is not None:
            raise UserError(
                f"{shell.flag(option)} changes one student, and --peers are several: leave it out"
            )
    if chosen.on_policy:
        raise UserError("--on-policy lets one student write: leave it out, or leave --peers out")


def _teachers(
    options: TrainOptions,
    names: Sequence[str],
    student: TextModel,
    texts: Corpus,
    loss_terms: tuple[Term, ...],
    *,
    writes: bool,
) -> tuple[TextTeacher, ...]:
    class_map = None if teacher_chain.is_taught_by_chain(options) else options.class_map
    maps = class_names.read_class_maps(class_map, names)
    head = loss_checks.teaches_outputs(loss_terms, task=texts.task)
    sample = list(training_texts.strings(texts.train.texts[0][:1000]))
    teachers = tuple(
        text_teachers.load(name, student, texts.classes, sample, class_map=mapping, head=head)
        for name, mapping in zip(names, maps, strict=True)
    )
    aligned = [term.name for term in loss_terms if term.definition.aligned]
    if not writes:
        for name, teacher in zip(names, teachers, strict=True):
            text_teachers.require_same_tokens(name, teacher, texts.task, aligned)
        same_ids = all(teacher.own_tokenizer is None for teacher in teachers)
        if aligned and texts.parallel:
            raise UserError(
                f"--loss {aligned[0]} compares token by token, and a text and its translation have "
                "other tokens: use logits, or a loss of vectors such as rkd-distance"
            )
        loss_checks.check_texts(loss_terms, task=texts.task, same_ids=same_ids)
    return teachers


def _say_nothing(line: str) -> None:
    """Do nothing with a line that another process prints."""
