"""Assembly of the parts of a training on images from its options, and what is made of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from dsdistill.harness import shell
from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress
from kd import attack, recipe, recipes
from kd.assembly import (
    own_teacher,
    pruned_training,
    quantised_training,
    teacher_chain,
    training_images,
    training_networks,
)
from kd.assembly.training_images import TeacherData
from kd.attack import Attack, Pgd
from kd.data import class_weights
from kd.data.class_weights import ClassWeights
from kd.data.data_source import DataSource
from kd.data.files.file_source import FileSource
from kd.evaluation import multi_label_scoring
from kd.models import network_names, networks, saved_models
from kd.models.language import text_students
from kd.models.networks import Classifier
from kd.models.saved_models import Model
from kd.models.teachers import Teacher, TeacherUse
from kd.objectives import loss_checks, terms
from kd.objectives.adversary import Adversary, bounds_after
from kd.objectives.schemes import Distillation, MeanTeacher, Mutual, Objective
from kd.objectives.terms import Term
from kd.options import TEXT_FIELDS, TEXT_OPTIONS, TrainOptions
from kd.parallel import engine
from kd.parallel.engine import Engine
from kd.recipe import Recipe
from kd.recipes import FEATURE_LOSS
from kd.training import dry_run

DEFAULT_STUDENT = "convnet"
# Figures of images by which the best epoch can be chosen.
ONE_CLASS_METRICS = ("accuracy", "nll", "macro_f1", "balanced_accuracy", "robust_accuracy")
IMAGE_METRICS = (*ONE_CLASS_METRICS, *multi_label_scoring.METRICS)


@dataclass(frozen=True, eq=False)
class TrainingParts:
    """Parts of a training.

    Attributes:
        source: Training, validation and test data.
        student: The student with its initial weights.
        teacher_names: Names of the teachers; empty to train on labels alone.
        teachers: The teachers, frozen and on the device.
        peers: The other students of deep mutual learning.
        recipe: The resolved recipe, in which no field is left to a default.
        terms: Terms of the loss.
        on: Device, precision and processes.
        seed: Seed of all random choices.
        readers: Number of processes that read image files.
        teacher_data: Images of the teachers' own, one for each of the source's; None where the
            teachers see the source's.
        unpruned: The student before it was pruned; None of one that is not.
        class_weights: Weights of the classes in the cross-entropy of labels; None without.
    """

    source: DataSource | FileSource
    student: Model
    teacher_names: tuple[str, ...]
    teachers: tuple[Teacher, ...]
    peers: tuple[Classifier, ...]
    recipe: Recipe
    terms: tuple[Term, ...]
    on: Engine
    seed: int
    readers: int
    teacher_data: TeacherData | None = None
    unpruned: Model | None = None
    class_weights: ClassWeights | None = None

    @property
    def teacher_source(self) -> DataSource | FileSource:
        """The images that the teachers see."""
        return self.source if self.teacher_data is None else self.teacher_data.source

    @property
    def teacher_preprocess(self) -> Preprocess:
        """What is done to them before an adapter of a teacher gets them."""
        if self.teacher_data is None:
            return self.student.preprocess
        return self.teacher_data.preprocess

    def learns_alone(self, options: TrainOptions) -> bool:
        """Whether nothing but labels teaches the student."""
        return not (self.teacher_names or self.peers or options.mean_teacher is not None)


def assemble(options: TrainOptions) -> TrainingParts:
    """Resolve names, load data, student and teachers; `training_checks` asks if they fit.

    Raises:
        UserError: If a name is unknown, or a file is missing.
    """
    _refuse_text_options(options)
    named = recipes.by_name(options.recipe) if options.recipe else None
    name = options.student or (named and named.student) or DEFAULT_STUDENT
    if not Path(name).is_dir():
        networks.check_name(name)
    on = make_engine(options, named)
    source = training_images.load(options, named, saved_models.class_order(name))
    taught = teacher_chain.last_teacher(options) or (named and named.teacher)
    names = tuple(network_names.parse_names("--teacher", taught)) if taught else ()
    alone = not (names or options.peers or options.mean_teacher is not None)
    say = progress.say if on.is_main_process else _say_nothing
    student = training_networks.load_student(options, name, source, say)
    if source.groups is not None:
        student = replace(student, class_groups=source.groups.by_name)
    unpruned = None
    if options.prune is not None:
        unpruned, student = pruned_training.prune_student(student, options.prune, say)
    training_networks.apply_memory_options(options, student.classifier.network)
    if options.centred:
        student.classifier.centre()
    teacher_data = training_images.load_teacher_data(options, named, source)
    peers = training_networks.load_peers(options, source)
    chosen = _recipe(options, named, source, student)
    usual = _default_loss(chosen, source, names, peers, alone)
    chosen = replace(chosen, loss=chosen.loss or (usual if student.has_head else FEATURE_LOSS))
    assert chosen.loss is not None
    loss_terms = terms.parse(chosen.loss)
    if not student.has_head:
        loss_checks.check_headless(loss_terms)
    loss_checks.check_labels(loss_terms, several=source.has_several_labels)
    weights = _class_weights(options, source, loss_terms)
    use = _teacher_use(options, student, loss_terms)
    loaded_teachers = training_networks.load_teachers(
        options, names, source, student, teacher_data, use
    )
    chosen = loss_checks.apply_smoothing(loss_terms, chosen, options.given)
    if student.has_head:
        logits = loss_checks.gives_logits(loss_terms, alone=alone)
        answers = "independent logits" if source.has_several_labels else "logits"
        student = replace(student, outputs=answers if logits else "centred labels")
    for network in (student.classifier, *loaded_teachers, *peers):
        network.to(on.device)
    if (bits := quantised_training.read_bits(options)) is not None:
        student = quantised_training.quantise_student(
            student, source, chosen, on, bits, readers=options.readers, say=say
        )
    return TrainingParts(
        source,
        student,
        names,
        loaded_teachers,
        peers,
        chosen,
        loss_terms,
        on,
        options.seed,
        options.readers,
        teacher_data,
        unpruned,
        weights,
    )


def _teacher_use(options: TrainOptions, student: Model, loss_terms: Sequence[Term]) -> TeacherUse:
    """What the loss takes from the teachers."""
    if not student.has_head:
        return "features"
    weighted = options.teacher_weights is not None
    return "answers" if weighted or loss_checks.takes_answers(loss_terms) else "layers"


def _class_weights(
    options: TrainOptions, source: DataSource | FileSource, loss_terms: Sequence[Term]
) -> ClassWeights | None:
    """The weights of the classes that are asked for; None without any.

    Raises:
        UserError: If the loss has no use for them, or labels are not known before the training.
    """
    if options.class_weights is None:
        return None
    loss_checks.check_class_weights(loss_terms)
    labels = source.train_labels
    if labels is None:
        raise UserError(
            f"--class-weights counts the labels of all training images, and {options.data} gives "
            "them only while it is read: use a folder of class folders, or leave the weights out"
        )
    return class_weights.make(options.class_weights, source.classes, labels)


def _default_loss(
    chosen: Recipe,
    source: DataSource | FileSource,
    teachers: Sequence[str],
    peers: Sequence[Classifier],
    alone: bool,
) -> str:
    """The loss where neither the user nor the recipe names one."""
    if source.has_several_labels:
        if alone:
            return recipes.SEVERAL_LABELS_LOSS
        return recipes.SEVERAL_LABELS_MUTUAL_LOSS if peers else recipes.SEVERAL_LABELS_TEACHER_LOSS
    if chosen.adversary is not None:
        return recipes.ADVERSARIAL_LABEL_LOSS if alone else recipes.ADVERSARIAL_TEACHER_LOSS
    if alone:
        return "mse:1" if source.distilled is not None else recipes.LABEL_LOSS
    by_answers = isinstance(source, DataSource) and (
        source.transfer is not None or source.from_weights
    )
    if teachers and by_answers:
        return recipes.TRANSFER_LOSS
    return recipes.MUTUAL_LOSS if peers else recipes.TEACHER_LOSS


def _refuse_text_options(options: TrainOptions) -> None:
    """Refuse options, a student and a recipe of texts."""
    plain = TrainOptions()
    given = [name for name in TEXT_OPTIONS if getattr(options, name) != getattr(plain, name)]
    given += [name for name in TEXT_FIELDS if name in options.given]
    texts = [shell.flag(name) for name in given]
    if options.given.get("augment") in recipe.TEXT_AUGMENTS:
        texts.append(f"--augment {options.given['augment']}")
    if options.given.get("metric", IMAGE_METRICS[0]) not in IMAGE_METRICS:
        texts.append(f"--metric {options.given['metric']}")
    if options.recipe in recipes.OF_TEXTS:
        texts.append(f"--recipe {options.recipe}")
    student = options.student
    if options.copies_teacher or (student is not None and text_students.is_fresh(student)):
        texts.append(f"--student {student}")
    if texts:
        raise UserError(
            f"{texts[0]} is for texts, and {options.data} is no file or folder of texts: "
            "leave it out, or name such data"
        )


def build_objective(parts: TrainingParts, options: TrainOptions) -> Objective:
    """Build the objective of a training, with its taps and projectors."""
    student = parts.student.classifier
    loss_terms = terms.build(
        parts.terms,
        student,
        parts.teachers,
        sample=parts.source.shape,
        classes=max(len(parts.source.classes), 1),
        images=parts.source.count,
        smoothing=parts.recipe.label_smoothing,
        seed=parts.seed,
        teacher_sample=parts.teacher_source.shape,
        class_weights=parts.class_weights and parts.class_weights.tensor(parts.on.device),
    )
    if parts.peers:
        return Mutual(student, parts.peers, loss_terms)
    adversary = None
    against = loss_checks.check_adversary(parts.terms, parts.recipe.adversary)
    if against is not None and (trained := training_attack(parts.recipe)) is not None:
        bounds = bounds_after(parts.student.preprocess, trained.eps)
        adversary = Adversary(trained, bounds, against)
    if options.mean_teacher is not None:
        decay = options.mean_teacher
        return MeanTeacher(student, loss_terms, decay=decay, adversary=adversary)
    by_label = options.teacher_weights == "by-label"
    return Distillation(student, loss_terms, parts.teachers, by_label=by_label, adversary=adversary)


def training_attack(recipe: Recipe) -> Pgd | None:
    """The attack that a student is trained against; None without one."""
    return None if recipe.adversary is None else attack.parse_adversary(recipe.adversary)


def judging_attacks(parts: TrainingParts, options: TrainOptions) -> tuple[Attack, ...]:
    """The attacks that a finished student is judged under; PGD where it was trained against one."""
    trained = training_attack(parts.recipe)
    if options.robust is None and trained is None:
        return ()
    return attack.parse_robust(options.robust or "pgd", eps=trained and trained.eps)


def check_step(parts: TrainingParts, objective: Objective, sizes: Sequence[int]) -> None:
    """Refuse a loss that does not work with these data and networks, see `kd.training.dry_run`.

    Args:
        parts: Parts of the training.
        objective: Its objective, not yet compiled.
        sizes: Number of images of each batch of an epoch, over all processes.

    Raises:
        UserError: If the loss raises, is not finite, or trains no weights.
    """
    assert parts.recipe.loss is not None
    dry_run.check(
        objective,
        parts.recipe.loss,
        sizes,
        shape=parts.source.shape,
        classes=max(len(parts.source.classes), 1),
        images=parts.source.count,
        on=parts.on,
        mixed=parts.recipe.mixes_images,
        centred=parts.source.distilled is not None,
        several=parts.source.has_several_labels,
        teacher_shapes=[parts.teacher_source.shape] * len(parts.teachers)
        if parts.teacher_data is not None
        else (),
    )


def make_engine(options: TrainOptions, named: Recipe | None) -> Engine:
    """Create the engine for the device and precision of the options, or of the recipe.

    Raises:
        UserError: If there is no such device, or no GPU for a recipe made for one.
    """
    precision = options.given.get("precision") or (named.precision if named else "no")
    if named and named.gpu and options.device == "auto" and not torch.cuda.is_available():
        raise UserError(
            f"recipe {options.recipe} is made for a GPU and there is none: "
            "add --device cpu to run it on the CPU nevertheless"
        )
    return engine.make(options.device, precision)


def _say_nothing(line: str) -> None:
    """Do nothing with a line that another process prints."""


def _recipe(
    options: TrainOptions, named: Recipe | None, source: DataSource | FileSource, student: Model
) -> Recipe:
    distilled = source.distilled is not None
    layer_norm = any(isinstance(m, nn.LayerNorm) for m in student.classifier.modules())
    base = named or recipes.default(distilled=distilled, layer_norm=layer_norm)
    if named is None and own_teacher.is_adapted(options) and own_teacher.is_trained(options):
        base = recipes.adapting(base)
    chosen = recipe.override(base, options.given)
    if source.has_several_labels and "metric" not in options.given:
        return replace(chosen, metric=multi_label_scoring.METRICS[0])
    return chosen
