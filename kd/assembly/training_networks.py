"""The networks of a training on images: student, peers and teachers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from dsdistill.harness.errors import UserError
from kd.assembly import teacher_chain
from kd.assembly.training_images import TeacherData
from kd.data.data_source import DataSource
from kd.data.files.file_source import FileSource
from kd.models import headless, network_names, networks, saved_models, student_view, teachers
from kd.models.networks import Classifier
from kd.models.saved_models import Model
from kd.models.teachers import Teacher, TeacherUse
from kd.models.zoo import class_names
from kd.options import TrainOptions, teacher_inputs


def load_student(
    options: TrainOptions, name: str, source: DataSource | FileSource, say: Callable[[str], None]
) -> Model:
    """Build the student before training, with the preprocessing of its images.

    What else is asked of its network comes afterwards: pruning, memory options, centring.
    """
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
    has_head = options.head == "trained"
    count = len(classes) if has_head else headless.BUILT_CLASSES
    classifier = networks.build(
        name, shape, count, seed=options.seed, pretrained=options.pretrained, view=view
    )
    for note in classifier.notes:
        say(f"student {name}: {note}")
    if not has_head:
        headless.remove_head(f"student {name}", classifier, shape)
        return Model(classifier, name, (), shape, fitted, "embedding", mel=source.mel)
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
    if model.bits is not None and options.prune is not None:
        raise UserError(
            f"{name} is a quantised student, whose channels are not pruned: prune the run in "
            "float32 that it was made of, and quantize the pruned student"
        )
    if model.bits is not None and options.quantize is None:
        raise UserError(
            f"{name} is a quantised student: add --quantize {model.bits.text} to train it further"
        )
    saved_models.check_recordings(f"student {name}", model.mel, source.mel)
    who = f"student {name}"
    if options.head == "none":
        saved_models.check_shape(who, model, source.shape)
        model = headless.without_head(who, model, say)
    elif not model.has_head:
        saved_models.check_shape(who, model, source.shape)
        model = headless.add_head(who, model, source.classes, options.seed, say)
    else:
        model = saved_models.match_classes(who, model, source.shape, source.classes, say)
    if source.distilled is not None and not source.distilled.preprocess.same_as(model.preprocess):
        raise UserError(
            f"student {name} was trained with another preprocessing than the distilled set's: "
            "give it as --teacher, or train a new student"
        )
    return model


def apply_memory_options(options: TrainOptions, network: nn.Module) -> None:
    """Set memory format and gradient checkpointing, before any tap or wrapper.

    Args:
        options: Options of the training.
        network: The student's network.

    Raises:
        UserError: If it has no switch for gradient checkpointing.
    """
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


def load_peers(options: TrainOptions, source: DataSource | FileSource) -> tuple[Classifier, ...]:
    names = network_names.split_names(options.peers or "")  # a network may come twice
    classes = len(source.classes)
    return tuple(
        networks.build(name, source.shape, classes, seed=options.seed + 1 + i)
        for i, name in enumerate(names)
    )


def load_teachers(
    options: TrainOptions,
    names: Sequence[str],
    source: DataSource | FileSource,
    student: Model,
    data: TeacherData | None,
    use: TeacherUse,
) -> tuple[Teacher, ...]:
    """Load the teachers, adapted to the student's images and frozen."""
    if teacher_chain.is_taught_by_chain(options):
        options = replace(options, **dict.fromkeys(teacher_chain.FIRST_TEACHER_OPTIONS))
    maps = class_names.read_class_maps(options.class_map, names)
    fitted = student.preprocess if data is None else data.preprocess
    seen = source if data is None else data.source
    images = fitted, seen.shape, source.classes
    inputs = teacher_inputs(vars(options), len(names))
    typed = typed_names(options)
    return tuple(
        teachers.load(
            name,
            *images,
            class_map=mapping,
            typed=typed,
            mel=seen.mel,
            use=use,
            groups=source.groups,
            several_labels=source.has_several_labels,
            **given,
        )
        for name, mapping, given in zip(names, maps, inputs, strict=True)
    )


def typed_names(options: TrainOptions) -> list[str]:
    """Names of networks that the user has typed, now or at the start of a run that is resumed."""
    lists = options.student, options.teacher, options.peers, options.assistants
    return network_names.names_in(*lists, options.trust_module)
