"""Load a teacher from any source, check it against the data, and adapt it to them."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsdistill.harness.data.mel_images import MelFormat
from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError, first_line
from kd.models import network_names, networks, saved_models
from kd.models.adapters import build_adapter, check_channels
from kd.models.networks import Classifier
from kd.models.saved_models import Model
from kd.models.zoo import (
    class_groups,
    class_names,
    exported,
    huggingface,
    timm_zoo,
    weight_files,
    weights,
)
from kd.models.zoo.class_groups import ClassGroups
from kd.models.zoo.class_names import ClassMap, Match
from kd.models.zoo.protocol import Interpolation, PretrainedConfig, Shape

# What is taken from a teacher: answers for the data's classes; layers alone, so that it may have
# other classes or none; or layers for a student without classes.
TeacherUse = Literal["answers", "layers", "features"]


@dataclass(frozen=True)
class ResolvedTeacher:
    """The decisions about a teacher: how its images are prepared and its classes matched.

    Attributes:
        kind: Kind of its preprocessing.
        mean, std: One value per channel, for images in [0, 1].
        size: Height and width of the images that the model takes.
        interpolation: Interpolation by which images are resized to `size`.
        matched: How its outputs were matched to the data's classes, in words.
        classes: Names of the data's classes, in order; empty where they are not known.
        notes: Lines about decisions made when the model was built.
    """

    kind: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    interpolation: Interpolation
    matched: str
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Teacher(nn.Module):
    """Maps images in the data's preprocessed space to logits of the data's classes.

    The outputs of a network trained by MSE on centred labels are divided by their fitted
    temperature, so that their softmax gives calibrated probabilities.

    Attributes:
        adapter: Map from the data's preprocessed space to the model's.
        classifier: The model's classifier; taps go on the layers of its `network`.
        resolved: The decisions about preprocessing and classes.
    """

    settings: Tensor
    outputs: Tensor | None
    members: Tensor | None

    def __init__(
        self,
        model: Model,
        data: Preprocess,
        size: tuple[int, int],
        matched: Match | None = None,
        classes: tuple[str, ...] = (),
    ) -> None:
        """Adapt a model.

        Args:
            model: The model, for as many channels as the data have, or for grayscale data.
            data: Preprocessing that was applied to the images that the teacher will be given.
            size: Height and width of those images.
            matched: The output of each class; None where the outputs are the data's classes.
            classes: Names of the data's classes, in order.
        """
        super().__init__()
        matched = matched or Match("by name")
        h, w, _ = model.shape
        self.adapter = build_adapter(data, model.preprocess, size, (h, w), model.interpolation)
        self.classifier = model.classifier
        self.temperature = model.output_temperature
        self.register_buffer("outputs", _output_index(matched))
        table = None if matched.groups is None else class_groups.member_table(matched.groups)
        self.register_buffer("members", table)
        # Settings that change the logits are a buffer, so that a hash of the state covers them.
        bicubic = float(model.interpolation == "bicubic")
        self.register_buffer("settings", torch.tensor([h, w, bicubic, self.temperature]))
        fitted = model.preprocess
        mean = tuple(fitted.mean.reshape(-1, len(fitted.std)).mean(0).tolist())
        std = tuple(fitted.std.tolist())
        notes = (*model.classifier.notes, *([matched.note] if matched.note else []))
        self.resolved = ResolvedTeacher(
            fitted.kind, mean, std, (h, w), model.interpolation, matched.how, classes, notes
        )

    @property
    def by_features(self) -> bool:
        """Whether it teaches by its features alone: its outputs are not of the data's classes."""
        return self.resolved.matched == class_names.BY_FEATURES.how

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        logits = self.classifier(self.adapter(images)) / self.temperature
        logits = logits if self.outputs is None else logits[:, self.outputs]
        return logits if self.members is None else class_groups.group_logits(logits, self.members)


def load(
    name: str,
    preprocess: Preprocess,
    shape: Shape,
    classes: tuple[str, ...],
    *,
    class_map: ClassMap | None = None,
    class_map_option: str = "--class-map",
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    typed: Iterable[str] = (),
    mel: MelFormat | None = None,
    use: TeacherUse = "answers",
    groups: ClassGroups | None = None,
    several_labels: bool = False,
) -> Teacher:
    """Load a frozen teacher in evaluation mode.

    Published weights come with their preprocessing. A file of weights does not: the normalisation
    of the architecture's published weights is assumed, and the data's image size unless the network
    takes only one size. For a built-in network, for one of the user's own code, and for a program
    without a card, the data's preprocessing and size are assumed. `image_size`, `mean` and `std`
    override these assumptions; an earlier run brings its preprocessing and accepts none of them.

    Args:
        name: Folder of an earlier run of `kd train`; a name as in `kd.models.networks`, whose
            published weights are loaded; NAME@FILE; or FILE.pt2. A built-in network has no
            published weights and is refused. A `module:attribute` has the weights that its code
            gives it, and is imported: pass only what the user has typed.
        preprocess: Preprocessing that was applied to the images that the teacher will be given.
        shape: Height, width and channels of those images.
        classes: Names of the data's classes, in order.
        class_map: Class of the data -> class of the teacher, where they differ.
        class_map_option: Option of the class map, for messages.
        image_size: Height and width of the images that the model takes.
        mean, std: One value per channel, for images in [0, 1].
        typed: Names that the user has typed, as for `saved_models.load_run`.
        mel: Format of the recordings that the images are of; None for other images.
        use: What is taken from it. For anything but answers its head may be missing.
        groups: The classes that are joined to `classes`, which the teacher may know in their place.
        several_labels: Whether an image of the data has any number of labels. A run says whether it
            learned such ones; of other teachers it is assumed.

    Raises:
        UserError: If there is no such teacher, or it does not fit the data.
    """
    who = f"teacher {name}"

    def match(model_classes: Sequence[str] | int) -> Match:
        if use == "features":
            return class_names.BY_FEATURES
        compare = class_names.match if use == "answers" else class_names.match_if_same
        if groups is not None:
            rest = groups, class_map, class_map_option
            return class_groups.match(compare, who, model_classes, *rest)
        return compare(who, model_classes, classes, class_map, class_map_option)

    model, matched = load_model(
        name,
        preprocess,
        shape,
        max(len(classes), 1),
        match,
        image_size=image_size,
        mean=mean,
        std=std,
        typed=typed,
        needs_head=use == "answers",
    )
    if Path(name).is_dir() or model.has_several_labels:
        if use == "answers":
            saved_models.check_label_kind(who, model, several_labels)
        elif model.has_several_labels != several_labels:
            matched = class_names.BY_FEATURES
    check_channels(who, model.shape[2], shape[2])
    saved_models.check_recordings(who, model.mel, mel)
    teacher = Teacher(model, preprocess, shape[:2], matched, classes).eval().requires_grad_(False)
    _check_image_size(who, teacher, shape)
    return teacher


def load_model(
    name: str,
    preprocess: Preprocess,
    shape: Shape,
    classes: int,
    match: Callable[[Sequence[str] | int], Match],
    *,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    typed: Iterable[str] = (),
    needs_head: bool = True,
) -> tuple[Model, Match]:
    """Load a trained model from any source, with the preprocessing that `load` describes.

    Args:
        name, preprocess, shape, image_size, mean, std, typed: As for `load`.
        classes: Number of classes, where the name does not say it.
        match: Called with the model's class names, or with their number, before a long download.
        needs_head: Whether the weights must have a last layer; else it may be new and mean nothing.

    Raises:
        UserError: If there is no such model.
    """
    who, overrides = f"teacher {name}", (image_size, mean, std)
    if Path(name).is_dir():
        if overrides != (None, None, None):
            raise UserError(
                f"{who} is an earlier run and brings its preprocessing: leave "
                "--teacher-image-size, --teacher-mean and --teacher-std out"
            )
        model = saved_models.load_run(Path(name), typed=typed)
        matched = match(model.classes)
    elif name.endswith(exported.SUFFIX):
        model, matched = _load_program(name, preprocess, shape, match)
    elif networks.is_user_module(name):
        model, matched = _load_user_module(name, preprocess, shape, classes, match, image_size)
    elif network_names.parse(name).file is not None:
        model, matched = _load_weights_file(
            name, preprocess, shape, classes, match, image_size, needs_head=needs_head
        )
    else:
        model, matched = _load_published(name, shape, match, image_size, needs_head=needs_head)
    return _apply_overrides(model, *overrides), matched


def matching_notes(teacher: Teacher) -> tuple[str, ...]:
    """Lines about the decisions on a teacher, for use where its accuracy is not measured."""
    matched = teacher.resolved.matched
    return (
        *([] if matched == "by name" else [f"classes matched {matched}"]),
        *teacher.resolved.notes,
    )


def _load_published(
    name: str,
    shape: Shape,
    match: Callable[[Sequence[str] | int], Match],
    image_size: int | None,
    *,
    needs_head: bool,
) -> tuple[Model, Match]:
    """Load published weights, with all their classes, for images of their size."""
    published, who = networks.pretrained_config(name), f"teacher {name}"
    matched = match(published.classes)  # before a long download
    check_channels(who, len(published.mean), shape[2])
    if image_size is not None:
        name, published = _with_image_size(name, published, image_size)
    built = published.classes
    if not needs_head and network_names.parse(name).zoo is huggingface:
        # Only for another number of classes does the library accept weights without a last layer.
        built, matched = published.count + 1, class_names.BY_FEATURES
    return _build_model(name, published, built, pretrained=True), matched


def _load_user_module(
    name: str,
    preprocess: Preprocess,
    shape: Shape,
    classes: int,
    match: Callable[[Sequence[str] | int], Match],
    image_size: int | None,
) -> tuple[Model, Match]:
    """Load a network of the user's own code, with its own number of classes."""
    parts, who = network_names.parse(name), f"teacher {name}"
    h, w, channels = shape
    taken = (image_size or h, image_size or w, channels)
    classifier, count = networks.build_as_it_is(parts.text, taken, classes)
    if parts.file is not None:
        stored = weight_files.read(parts.file)
        count, _ = _classes_and_channels(who, stored, classifier, parts, count, channels)
    matched = match(count)
    if parts.file is not None:
        classifier = networks.build(name, taken, count, adapt=False)
    return Model(classifier, name, _output_names(count), taken, preprocess), matched


def _load_weights_file(
    name: str,
    preprocess: Preprocess,
    shape: Shape,
    classes: int,
    match: Callable[[Sequence[str] | int], Match],
    image_size: int | None,
    *,
    needs_head: bool,
) -> tuple[Model, Match]:
    """Load a file of weights, with as many classes and channels as it has."""
    parts, who = network_names.parse(name), f"teacher {name}"
    assert parts.file is not None
    stored = weight_files.read(parts.file)
    if parts.zoo is None:
        plain = networks.build(parts.text, shape, classes)
        count, _ = _classes_and_channels(
            who, stored, plain, parts, classes, shape[2], needs_head=needs_head
        )
        matched = match(count)
        adapt = count == 0
        classifier = networks.build(name, shape, count or classes, adapt=adapt)
        return Model(classifier, name, _output_names(count), shape, preprocess), matched
    published = parts.zoo.pretrained_config(parts.base)
    channels = len(published.mean)
    plain = networks.build(parts.text, (*published.size, channels), classes)
    h, w, _ = parts.zoo.input_shape(plain.network, shape)
    count, channels = _classes_and_channels(
        who, stored, plain, parts, classes, channels, needs_head=needs_head
    )
    # The file does not give the order of its classes.
    matched = match(count)
    fitted = published.preprocess(channels)
    mean, std = tuple(fitted.mean.tolist()), tuple(fitted.std.tolist())
    assumed = replace(published, size=(h, w), mean=mean, std=std)
    size = image_size
    if (
        size is None
        and parts.zoo is timm_zoo
        and not timm_zoo.split_arguments(parts.base)[1].get("img_size")
    ):
        names, _ = weights.prepare(stored, plain.network)
        size = timm_zoo.stored_size(plain.network, names)
    if size is not None:
        name, assumed = _with_image_size(name, assumed, size)
    adapt = count == 0  # the last layer stays new
    return _build_model(name, assumed, count or classes, pretrained=False, adapt=adapt), matched


def _classes_and_channels(
    who: str,
    stored: weight_files.StoredWeights,
    plain: Classifier,
    parts: network_names.NetworkName,
    classes: int,
    channels: int,
    *,
    needs_head: bool = True,
) -> tuple[int, int]:
    """Count the classes and channels of the weights in a file; 0 classes without a last layer.

    Raises:
        UserError: If the weights have no last layer.
    """
    tensors, _ = weights.prepare(stored, plain.network, parts.convert, classes)
    count, channels = weights.infer_classes_and_channels(tensors, plain.network, classes, channels)
    if count is None and needs_head:
        raise UserError(
            f"{who} has no last layer: "
            f"{weights.describe_missing_head(stored, plain.network.state_dict())}; a network "
            "without classes can be a student, and teach by a loss of layers alone, such as srd:2"
        )
    return count or 0, channels


def _with_image_size(
    name: str, config: PretrainedConfig, size: int
) -> tuple[str, PretrainedConfig]:
    """Change the name and configuration of a network to images of another size.

    Networks of other zoos than timm, and networks that take any size, keep both.
    """
    parts = network_names.parse(name)
    if parts.zoo is not timm_zoo or config.size == (size, size):
        return name, config
    plain = networks.build(parts.text, (*config.size, len(config.mean)), 2)
    if timm_zoo.input_shape(plain.network, (size, size, 3))[:2] == (size, size):
        return name, config
    text = timm_zoo.with_image_size(parts.text, size)
    name = f"{text}@{parts.file}" if parts.file else text
    return name, replace(config, size=(size, size))


def _load_program(
    name: str,
    preprocess: Preprocess,
    shape: Shape,
    match: Callable[[Sequence[str] | int], Match],
) -> tuple[Model, Match]:
    """Load an exported program, with the preprocessing and classes of its card if it has one."""
    path = Path(name).expanduser()
    program = exported.load(path, shape)
    card = program.card
    try:
        names = _require_names(card["classes"]) if card else _output_names(program.classes)
        fitted = (
            saved_models.load_preprocess(card["preprocess"], path.parent) if card else preprocess
        )
        outputs, interpolation = (
            card.get("outputs", "logits"),
            card.get("interpolation", "bilinear"),
        )
        temperature = float(card.get("output_temperature", 1.0))
        mel = saved_models.read_recordings(card or {})
        channels = program.shape[2]
        if card and not (fitted.mean.shape == fitted.std.shape == (channels,)):
            raise ValueError(f"mean and std are not {channels} values each")
        if card and not (np.isfinite(fitted.mean).all() and (fitted.std > 0).all()):
            raise ValueError("mean and std are not finite and positive")
        if outputs not in get_args(saved_models.OutputKind) or interpolation not in get_args(
            Interpolation
        ):
            raise ValueError("kd writes no such outputs or interpolation")
        if not 0 < temperature < math.inf:
            raise ValueError("output_temperature is not positive")
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the {exported.CARD} inside {path} is not whole: {error!r}") from error
    if outputs == "embedding":
        raise UserError(
            f"{path} gives embeddings, and no layer of an exported program can be read: give its "
            "run as the teacher"
        )
    if len(names) != program.classes:
        raise UserError(f"{path} names {len(names)} classes and has {program.classes} outputs")
    # Without a card the classes have no names.
    matched = match(names if card else program.classes)
    classifier = Classifier(program.network, interpolation=interpolation)
    model = Model(classifier, name, names, program.shape, fitted, outputs, temperature, mel)
    return model, matched


def _require_names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError("classes is not a list of names")
    return tuple(value)


def _build_model(
    name: str,
    config: PretrainedConfig,
    classes: tuple[str, ...] | int,
    *,
    pretrained: bool,
    adapt: bool = False,
) -> Model:
    """Build a zoo's network with the preprocessing that it expects."""
    shape, names = (*config.size, len(config.mean)), _output_names(classes)
    classifier = networks.build(name, shape, len(names), pretrained=pretrained, adapt=adapt)
    classifier.interpolation = config.interpolation
    return Model(classifier, name, names, shape, config.preprocess())


def _apply_overrides(
    model: Model,
    image_size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Model:
    """Replace the model's image size, mean and std by the user's, where given."""
    if image_size is not None:
        model = replace(model, shape=(image_size, image_size, model.shape[2]))
    if mean is None and std is None:
        return model
    fitted = model.preprocess
    m, s = (
        np.asarray(default if value is None else value, np.float32)
        for default, value in ((fitted.mean, mean), (fitted.std, std))
    )
    if len(m) != model.shape[2] or len(s) != model.shape[2] or (s <= 0).any():
        raise UserError(
            f"mean and std of {model.name} must be {model.shape[2]} values each, and std positive"
        )
    return replace(model, preprocess=Preprocess("standardise", m, s))


def _check_image_size(who: str, teacher: Teacher, shape: Shape) -> None:
    """Refuse a teacher that cannot take the data's images, before the first step."""
    h, w, c = shape
    try:
        with torch.no_grad():
            teacher(torch.zeros(1, c, h, w))
    except Exception as error:  # a network may raise anything
        model_h, model_w = teacher.resolved.size
        raise UserError(
            f"{who} cannot take {h}x{w} images resized to {model_h}x{model_w}: {first_line(error)}"
        ) from error


def _output_names(classes: tuple[str, ...] | int) -> tuple[str, ...]:
    return tuple(map(str, range(classes))) if isinstance(classes, int) else classes


def _output_index(matched: Match) -> Tensor | None:
    return None if matched.outputs is None else torch.tensor(matched.outputs)
