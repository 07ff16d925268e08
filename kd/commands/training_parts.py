"""Assembly of the parts of a training from its options, with all checks before any writing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from dsdistill.harness import shell
from dsdistill.harness.data import datasets, paired_folder
from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress
from kd import attack, recipe, recipes
from kd.attack import Attack, Pgd
from kd.commands import private_data, quantised_training, teacher_chain
from kd.data import data_source, transfer_images
from kd.data.data_source import DataSource
from kd.data.files import file_source
from kd.data.files.file_source import FileSource
from kd.evaluation import robustness
from kd.models import network_names, networks, saved_models, student_view, teachers
from kd.models.language import text_students
from kd.models.networks import Classifier
from kd.models.saved_models import Model
from kd.models.teachers import Teacher
from kd.models.zoo import class_names
from kd.objectives import loss_checks, terms
from kd.objectives.adversary import Adversary, bounds_after
from kd.objectives.schemes import Distillation, MeanTeacher, Mutual, Objective
from kd.objectives.terms import Term
from kd.options import TEXT_FIELDS, TEXT_OPTIONS, TrainOptions, told
from kd.parallel import engine
from kd.parallel.engine import Engine
from kd.recipe import Recipe
from kd.training import dry_run, optimization

DEFAULT_STUDENT = "convnet"
# Figures of images by which the best epoch can be chosen.
IMAGE_METRICS = ("accuracy", "nll", "robust_accuracy")


@dataclass(frozen=True, eq=False)
class TeacherData:
    """Another picture of every image, which the teachers see in its place.

    Attributes:
        source: The pictures, in the rows and parts of the images.
        preprocess: Preprocessing of the pictures.
    """

    source: DataSource
    preprocess: Preprocess


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


def assemble(options: TrainOptions) -> TrainingParts:
    """Resolve names, load data, student and teachers, and check that they fit together.

    Raises:
        UserError: If a name is unknown, a file is missing, or parts do not fit together.
    """
    _refuse_text_options(options)
    named = recipes.by_name(options.recipe) if options.recipe else None
    name = options.student or (named and named.student) or DEFAULT_STUDENT
    if not Path(name).is_dir():
        networks.check_name(name)
    on = make_engine(options, named)
    source = _source(options, named, saved_models.class_order(name))
    taught = teacher_chain.last_teacher(options) or (named and named.teacher)
    names = tuple(network_names.parse_names("--teacher", taught)) if taught else ()
    alone = not (names or options.peers or options.mean_teacher is not None)
    say = progress.say if on.is_main_process else _say_nothing
    student = _student(options, name, source, say)
    teacher_data = _teacher_data(options, named, source)
    loaded_teachers = _teachers(options, names, source, student, teacher_data)
    peers = _peers(options, source)
    chosen = _recipe(options, named, source.distilled is not None, student)
    chosen = replace(chosen, loss=chosen.loss or _default_loss(chosen, source, peers, alone))
    assert chosen.loss is not None
    loss_terms = terms.parse(chosen.loss)
    chosen = loss_checks.apply_smoothing(loss_terms, chosen, options.given)
    outputs = "logits" if loss_checks.gives_logits(loss_terms, alone=alone) else "centred labels"
    student = replace(student, outputs=outputs)
    for network in (student.classifier, *loaded_teachers, *peers):
        network.to(on.device)
    if (bits := quantised_training.read_bits(options)) is not None:
        student = quantised_training.quantise_student(
            student, source, chosen, on, bits, readers=options.readers, say=say
        )
    parts = TrainingParts(
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
    )
    _check(parts, options, alone)
    for remark in loss_checks.remarks(loss_terms, images=source.count):
        say(remark)
    return parts


def _default_loss(
    chosen: Recipe,
    source: DataSource | FileSource,
    peers: Sequence[Classifier],
    alone: bool,
) -> str:
    """The loss where neither the user nor the recipe names one."""
    if chosen.adversary is not None:
        return recipes.ADVERSARIAL_LABEL_LOSS if alone else recipes.ADVERSARIAL_TEACHER_LOSS
    if alone:
        return "mse:1" if source.distilled is not None else recipes.LABEL_LOSS
    if isinstance(source, DataSource) and source.transfer is not None:
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
        classes=len(parts.source.classes),
        images=parts.source.count,
        smoothing=parts.recipe.label_smoothing,
        seed=parts.seed,
        teacher_sample=parts.teacher_source.shape,
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
        classes=len(parts.source.classes),
        images=parts.source.count,
        on=parts.on,
        mixed=_mixes_images(parts.recipe),
        centred=parts.source.distilled is not None,
        teacher_shapes=[parts.teacher_source.shape] * len(parts.teachers)
        if parts.teacher_data is not None
        else (),
    )


def _mixes_images(recipe: Recipe) -> bool:
    return recipe.mixup > 0 or recipe.cutmix > 0


def _check(parts: TrainingParts, options: TrainOptions, alone: bool) -> None:
    """Refuse a loss, a recipe and a scheme that do not fit each other."""
    recipe = parts.recipe
    _check_augment(recipe, parts.source)
    _check_attacks(parts, options)
    if options.transfer is not None:
        loss_checks.check_unlabelled(parts.terms)
    _check_pairs(recipe, parts)
    weighted = options.teacher_weights is not None
    loss_checks.check_teaching(parts.terms, recipe, alone=alone, weighted=weighted)
    taught = [term for term in parts.terms if term.definition.needs_teacher]
    featured = [term.name for term in taught if term.definition.reads_layers]
    if featured and not parts.teachers:
        raise UserError(f"--loss {featured[0]} uses layers of a teacher: add --teacher")
    if not parts.teachers and len(taught) == len(parts.terms):
        raise UserError(
            f"--loss {recipe.loss} has no term that uses labels, and without --teacher nothing "
            "else teaches them: add ce:1"
        )
    layered = [term.name for term in parts.terms if term.definition.reads_layers]
    if layered and parts.peers:
        raise UserError(
            f"--loss {layered[0]} uses layers of one student: leave it out, or leave --peers out"
        )
    mixed = _mixes_images(recipe)
    if mixed and recipe.batch_size % 2:
        raise UserError(
            "--mixup and --cutmix pair the images of a batch: --batch-size must be even, got "
            f"{recipe.batch_size}"
        )
    classes = len(parts.source.classes)
    loss_checks.check(parts.terms, classes=classes, batch_size=recipe.batch_size, mixed=mixed)
    optimization.check_optimizer(recipe)


def _check_augment(recipe: Recipe, source: DataSource | FileSource) -> None:
    """Refuse augmentation that is for the other kind of data, images or recordings."""
    if recipe.augment == "specaugment" and source.mel is None:
        raise UserError(
            f"--augment specaugment is for recordings, and {source.name} holds images: use "
            "--augment crop-flip"
        )
    if recipe.augment == "crop-flip" and recipe.hflip > 0 and source.mel is not None:
        raise UserError(
            "--augment crop-flip plays half of the recordings backwards: use --augment "
            "specaugment, or add --hflip 0"
        )


def _check_attacks(parts: TrainingParts, options: TrainOptions) -> None:
    """Refuse attacks that do not fit the loss, the images or the processes."""
    preprocess, other = parts.student.preprocess, None
    if parts.peers:
        other = "--peers"
    elif parts.source.distilled is not None:
        other = "a distilled set, whose images are no pixels in [0, 1]"
    elif parts.on.is_fsdp2:
        other = "FSDP, which takes the student apart"
    against = loss_checks.check_adversary(parts.terms, parts.recipe.adversary, other=other)
    trained = training_attack(parts.recipe)
    if against is not None and trained is not None:
        bounds_after(preprocess, trained.eps)
    robustness.check(judging_attacks(parts, options), preprocess, len(parts.source.classes))


def _check_pairs(recipe: Recipe, parts: TrainingParts) -> None:
    """Refuse augmentation that the teachers' own pictures cannot follow."""
    if parts.teacher_data is None:
        return
    own, theirs = parts.source, parts.teacher_data.source
    moving = [term.name for term in parts.terms if term.definition.against == "moving teacher"]
    if moving:
        raise UserError(
            f"--loss {moving[0]} shows the teacher images that change with the student, and "
            "--teacher-data has no such ones: use rslad or ard"
        )
    if recipe.augment == "specaugment" and theirs.mel is None:
        raise UserError(
            "--augment specaugment shifts recordings, and --teacher-data holds images, which do "
            "not follow: leave it out"
        )
    if recipe.cutmix > 0 and own.shape[:2] != theirs.shape[:2]:
        raise UserError(
            "--cutmix pastes one rectangle into images of one size, and those of --teacher-data "
            f"are {theirs.shape[0]}x{theirs.shape[1]}, not {own.shape[0]}x{own.shape[1]}: use "
            "--mixup"
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


def _source(
    options: TrainOptions, named: Recipe | None, classes: tuple[str, ...] | None
) -> DataSource | FileSource:
    """Resolve the data: streamed from files for random crops, and otherwise loaded as a whole."""
    size = options.given.get("image_size") or (named and named.image_size)
    augment = options.given.get("augment") or (named and named.augment)
    if options.pate is not None:
        if augment in recipe.STREAMED_AUGMENTS:
            raise UserError(
                f"--pate answers images that are loaded as a whole, which --augment {augment} does "
                "not: leave it out"
            )
        return private_data.source(options, size, classes)
    if augment in recipe.STREAMED_AUGMENTS:
        if options.transfer is not None:
            raise UserError(
                f"--transfer is decoded before the training, and --augment {augment} reads files "
                "while it goes on: use --augment crop-flip"
            )
        if options.sound is not None:
            raise UserError(
                f"--seconds, --mel-bands and --sample-rate are for recordings, and --augment "
                f"{augment} is for images: leave them out"
            )
        return file_source.resolve(
            options.data,
            root=options.data_root,
            image_size=size,
            validation_fraction=data_source.fraction_or_default(options.validation_fraction),
            channels=options.channels,
            classes=classes,
        )
    source = data_source.resolve(
        options.data,
        root=options.data_root,
        image_size=size,
        validation_fraction=options.validation_fraction,
        channels=options.channels,
        classes=classes,
        sound=options.sound,
    )
    return source if options.transfer is None else _with_transfer(options, source)


def _with_transfer(options: TrainOptions, source: DataSource) -> DataSource:
    """Replace the training images by those of `--transfer`.

    Raises:
        UserError: If the data or the transfer set do not fit.
    """
    name = options.transfer
    assert name is not None
    if source.distilled is not None:
        raise UserError(
            f"--transfer takes validation and test images from DATA, and {options.data} is a "
            "distilled set: name the real data set, or leave --transfer out"
        )
    if source.mel is not None:
        raise UserError("--transfer is for images, and the data are recordings: leave it out")
    if datasets.absolute_name(name) == datasets.absolute_name(options.data):
        raise UserError(
            f"--transfer {name} is DATA itself, and would train on its validation images: leave "
            "it out, and use --loss kd:1 to leave the labels out"
        )
    if options.teacher_weights == "by-label":
        raise UserError(
            "--teacher-weights by-label takes labels, and the images of --transfer have none: "
            "leave it out"
        )
    images = transfer_images.load(
        name, root=options.data_root, shape=source.shape, classes=source.classes
    )
    return replace(source, transfer=images)


def _teacher_data(
    options: TrainOptions, named: Recipe | None, source: DataSource | FileSource
) -> TeacherData | None:
    """Load the teachers' own pictures; None where they see the student's images.

    Raises:
        UserError: If the data have no files, or a file has no counterpart.
    """
    if options.teacher_data is None or teacher_chain.is_taught_by_chain(options):
        return None
    if options.transfer is not None:
        raise UserError(
            "--teacher-data has another picture of every image of DATA, and --transfer trains on "
            "others: leave one of them out"
        )
    splits = source.splits if isinstance(source, DataSource) else None
    if splits is None or splits.layout is None or source.distilled is not None:
        raise UserError(
            "--teacher-data has a file for each file of a folder that is decoded before the "
            "training: give such a folder as DATA, without --augment imagenet"
        )
    size = options.given.get("image_size") or (named and named.image_size)
    folder = options.teacher_data.expanduser()
    pictures = DataSource(
        folder.resolve().stem, paired_folder.load(folder, splits, splits.layout, size)
    )
    return TeacherData(pictures, pictures.fit(None))


def _student(
    options: TrainOptions, name: str, source: DataSource | FileSource, say: Callable[[str], None]
) -> Model:
    """Build the student before training, with the preprocessing of its images."""
    if source.distilled is not None and options.preprocess is not None:
        raise UserError("a distilled set brings its preprocessing: leave --preprocess out")
    if Path(name).is_dir():
        return replace(_load_earlier_student(options, name, source, say), output_temperature=1.0)
    shape, classes = source.shape, source.classes
    if options.pretrained and options.preprocess is None and source.distilled is None:
        fitted = networks.pretrained_preprocess(name, shape[-1])
    else:
        fitted = source.fit(options.preprocess)
    text = options.student_view
    view = None if text is None else student_view.parse(text, shape, fitted)
    classifier = networks.build(
        name, shape, len(classes), seed=options.seed, pretrained=options.pretrained, view=view
    )
    for note in classifier.notes:
        say(f"student {name}: {note}")
    _apply_memory_options(options, classifier.network)
    if options.centred:
        classifier.centre()
    return Model(classifier, name, classes, shape, fitted, mel=source.mel)


def _load_earlier_student(
    options: TrainOptions, name: str, source: DataSource | FileSource, say: Callable[[str], None]
) -> Model:
    """Load the student of an earlier run, to train it further."""
    if options.pretrained or options.preprocess is not None:
        raise UserError(
            f"{name} brings its weights and its preprocessing: "
            "leave --pretrained and --preprocess out"
        )
    if options.centred:
        raise UserError(
            f"{name} is a trained student, of which --centred would subtract what it has learned "
            "(a centred one stays centred): leave --centred out"
        )
    if options.student_view is not None:
        raise UserError(f"{name} brings its view of the images: leave --student-view out")
    model = saved_models.load_run(Path(name), typed=typed_names(options))
    if model.bits is not None and options.quantize is None:
        raise UserError(
            f"{name} is a quantised student: add --quantize {model.bits.text} to train it further"
        )
    saved_models.check_recordings(f"student {name}", model.mel, source.mel)
    model = saved_models.match_classes(f"student {name}", model, source.shape, source.classes, say)
    if source.distilled is not None and not source.distilled.preprocess.same_as(model.preprocess):
        raise UserError(
            f"student {name} was trained with another preprocessing than the distilled set's: "
            "give it as --teacher, or train a new student"
        )
    _apply_memory_options(options, model.classifier.network)
    return model


def _say_nothing(line: str) -> None:
    """Do nothing with a line that another process prints."""


def _apply_memory_options(options: TrainOptions, network: nn.Module) -> None:
    """Set memory format and gradient checkpointing, before any tap or wrapper."""
    if options.channels_last:
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if options.checkpoint_gradients:
        checkpoint_gradients(network)


def checkpoint_gradients(network: nn.Module) -> None:
    """Let a network compute activations twice instead of keeping them.

    Args:
        network: The network, before any tap or wrapper.

    Raises:
        UserError: If it has no switch for that.
    """
    for name in ("set_grad_checkpointing", "gradient_checkpointing_enable"):  # timm, Hugging Face
        enable = getattr(network, name, None)
        if enable is not None:
            enable()
            return
    raise UserError(
        f"--checkpoint-gradients works for networks of timm and Hugging Face, and "
        f"{type(network).__name__} has no such switch: leave it out"
    )


def _peers(options: TrainOptions, source: DataSource | FileSource) -> tuple[Classifier, ...]:
    names = network_names.split_names(options.peers or "")  # a network may come twice
    classes = len(source.classes)
    return tuple(
        networks.build(name, source.shape, classes, seed=options.seed + 1 + i)
        for i, name in enumerate(names)
    )


def _teachers(
    options: TrainOptions,
    names: Sequence[str],
    source: DataSource | FileSource,
    student: Model,
    data: TeacherData | None,
) -> tuple[Teacher, ...]:
    """Load the teachers, adapted to the student's images and frozen."""
    if teacher_chain.is_taught_by_chain(options):
        options = replace(options, **dict.fromkeys(teacher_chain.FIRST_TEACHER_OPTIONS))
    maps = class_names.read_class_maps(options.class_map, names)
    fitted = student.preprocess if data is None else data.preprocess
    seen = source if data is None else data.source
    images = fitted, seen.shape, source.classes
    inputs = told(vars(options), len(names))
    typed = typed_names(options)
    return tuple(
        teachers.load(name, *images, class_map=mapping, typed=typed, mel=seen.mel, **given)
        for name, mapping, given in zip(names, maps, inputs, strict=True)
    )


def typed_names(options: TrainOptions) -> list[str]:
    """Names of networks that the user has typed, now or at the start of a run that is resumed."""
    lists = options.student, options.teacher, options.peers, options.assistants
    return network_names.names_in(*lists, options.trust_module)


def _recipe(options: TrainOptions, named: Recipe | None, distilled: bool, student: Model) -> Recipe:
    layer_norm = any(isinstance(m, nn.LayerNorm) for m in student.classifier.modules())
    base = named or recipes.default(distilled=distilled, layer_norm=layer_norm)
    if named is None and options.quantize and quantised_training.is_trained(options):
        base = recipes.quantising(base)
    return recipe.override(base, options.given)
