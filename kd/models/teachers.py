"""A teacher from wherever it comes, checked against the data and adapted to them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError, first_line
from kd.models import networks, saved_models
from kd.models.adapters import build_adapter, check_channels
from kd.models.networks import Classifier
from kd.models.saved_models import Model
from kd.models.zoo import class_names, exported, timm_zoo, weights
from kd.models.zoo.class_names import ClassMap, Match
from kd.models.zoo.protocol import Interpolation, PretrainedConfig, Shape


@dataclass(frozen=True)
class ResolvedTeacher:
    """What was found out about a model: how its images are prepared and its classes matched.

    Attributes:
        kind: Of the preprocessing.
        mean, std: One value a channel, of images in [0, 1].
        size: Height and width of the images it is given.
        interpolation: How they are resized to that.
        matched: How its outputs belong to the data's classes.
        classes: Names of the data's classes, in order; none where they are not known.
        notes: Lines about what was decided when it was made.
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

    A network trained by MSE on centred labels answers with its outputs divided by their fitted
    temperature, so that a softmax of them are calibrated probabilities.

    Attributes:
        adapter: From the data's preprocessed space to the model's.
        classifier: The model's; its `network` is what has layers.
        resolved: What was found out about it.
    """

    settings: Tensor
    outputs: Tensor | None

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
            model: Its channels are the data's, or the data are grayscale.
            data: What was applied to the images that the teacher will be given.
            size: Height and width of those.
            matched: Which output is which class; None where they are the same by name.
            classes: Of the data, in order.
        """
        super().__init__()
        matched = matched or Match("by name")
        h, w, _ = model.shape
        self.adapter = build_adapter(data, model.preprocess, size, (h, w), model.interpolation)
        self.classifier = model.classifier
        self.temperature = model.output_temperature
        self.register_buffer("outputs", _output_index(matched))
        # What is no tensor by itself but changes the answers: a hash of the state tells all.
        bicubic = float(model.interpolation == "bicubic")
        self.register_buffer("settings", torch.tensor([h, w, bicubic, self.temperature]))
        fitted = model.preprocess
        mean = tuple(fitted.mean.reshape(-1, len(fitted.std)).mean(0).tolist())
        std = tuple(fitted.std.tolist())
        notes = (*model.classifier.notes, *([matched.note] if matched.note else []))
        how = model.interpolation, matched.how
        self.resolved = ResolvedTeacher(fitted.kind, mean, std, (h, w), *how, classes, notes)

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        logits = self.classifier(self.adapter(images)) / self.temperature
        return logits if self.outputs is None else logits[:, self.outputs]


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
) -> Teacher:
    """A frozen teacher in evaluation mode.

    Published weights bring what they want. A file of weights does not: the normalisation that the
    architecture's published weights want is assumed, and, unless it takes one size alone, the
    data's image size; of a built-in network, and of a program without a card, all that is the
    data's. The last three arguments say otherwise, but for an earlier run, which knows.

    Args:
        name: Folder of an earlier run of `kd train`; a name as in `kd.models.networks`, whose
            published weights are loaded; NAME@FILE; or FILE.pt2. A built-in network has no
            published weights and is refused.
        preprocess: What was applied to the images that it will be given.
        shape: Of those images.
        classes: Of the data, in order.
        class_map: Class of the data -> class of the teacher, where they differ.
        class_map_option: By which the user gives one, for messages.
        image_size: Height and width of the images that it is given.
        mean, std: One value a channel, of images in [0, 1].

    Raises:
        UserError: If there is no such teacher, or it does not fit the data.
    """
    who = f"teacher {name}"
    told = image_size, mean, std

    def match(its: Sequence[str] | int) -> Match:
        return class_names.match(who, its, classes, class_map, class_map_option)

    if Path(name).is_dir():
        if told != (None, None, None):
            raise UserError(
                f"{who} is an earlier run and brings its preprocessing: leave "
                "--teacher-image-size, --teacher-mean and --teacher-std out"
            )
        model = saved_models.load_run(Path(name))
        found: tuple[Model, Match] = model, match(model.classes)
    elif name.endswith(exported.SUFFIX):
        found = _load_program(name, preprocess, shape, match)
    elif networks.parse(name).file is not None:
        found = _load_weights_file(name, preprocess, shape, len(classes), match, image_size)
    else:
        found = _load_published(name, shape, match, image_size)
    model, matched = found
    model = _apply_overrides(model, *told)
    check_channels(who, model.shape[2], shape[2])
    teacher = Teacher(model, preprocess, shape[:2], matched, classes).eval().requires_grad_(False)
    _check_image_size(who, teacher, shape)
    return teacher


def matching_notes(teacher: Teacher) -> tuple[str, ...]:
    """Lines about what was decided about a teacher, where its accuracy is not looked at."""
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
) -> tuple[Model, Match]:
    """From a zoo, with all the classes it has, on images of its own size."""
    own, who = networks.pretrained_config(name), f"teacher {name}"
    matched = match(own.classes)  # before a long download
    check_channels(who, len(own.mean), shape[2])
    if image_size is not None:
        name, own = _with_image_size(name, own, image_size)
    return _build_model(name, own, own.classes, pretrained=True), matched


def _load_weights_file(
    name: str,
    preprocess: Preprocess,
    shape: Shape,
    classes: int,
    match: Callable[[Sequence[str] | int], Match],
    image_size: int | None,
) -> tuple[Model, Match]:
    """From a file of weights, with as many classes and channels as it has."""
    found, who = networks.parse(name), f"teacher {name}"
    assert found.file is not None
    stored = weights.read(found.file)
    if found.zoo is None:
        plain = networks.build(found.text, shape, classes)
        count, _ = _classes_and_channels(who, stored, plain, found, classes, shape[2])
        matched = match(count)
        classifier = networks.build(name, shape, count, adapt=False)
        return Model(classifier, name, _output_names(count), shape, preprocess), matched
    own = found.zoo.pretrained_config(found.base)
    channels = len(own.mean)
    plain = networks.build(found.text, (*own.size, channels), classes)
    h, w, _ = found.zoo.input_shape(plain.network, shape)
    count, channels = _classes_and_channels(who, stored, plain, found, classes, channels)
    # The file does not say in which order its classes stand.
    matched = match(count)
    fitted = own.preprocess(channels)
    mean, std = tuple(fitted.mean.tolist()), tuple(fitted.std.tolist())
    own = replace(own, size=(h, w), mean=mean, std=std)
    size = image_size
    if (
        size is None
        and found.zoo is timm_zoo
        and not timm_zoo.split_arguments(found.base)[1].get("img_size")
    ):
        names, _ = weights.prepare(stored, plain.network)
        size = timm_zoo.stored_size(plain.network, names)
    if size is not None:
        name, own = _with_image_size(name, own, size)
    return _build_model(name, own, count, pretrained=False), matched


def _classes_and_channels(
    who: str,
    stored: weights.StoredWeights,
    plain: Classifier,
    found: networks.NetworkName,
    classes: int,
    channels: int,
) -> tuple[int, int]:
    """Classes and channels of the weights in a file.

    Raises:
        UserError: If they have no classes.
    """
    tensors, _ = weights.prepare(stored, plain.network, found.convert, classes)
    count, channels = weights.infer_classes_and_channels(tensors, plain.network, classes, channels)
    if count is None:
        raise UserError(
            f"{who} has no last layer: "
            f"{weights.describe_missing_head(stored, plain.network.state_dict())}; a network "
            "without classes can be a student but not a teacher"
        )
    return count, channels


def _with_image_size(name: str, own: PretrainedConfig, size: int) -> tuple[str, PretrainedConfig]:
    """A name and what it wants, for images of another size than the network is made for.

    Others than timm's, and those that take any size, keep their names.
    """
    found = networks.parse(name)
    if found.zoo is not timm_zoo or own.size == (size, size):
        return name, own
    plain = networks.build(found.text, (*own.size, len(own.mean)), 2)
    if timm_zoo.input_shape(plain.network, (size, size, 3))[:2] == (size, size):
        return name, own
    text = timm_zoo.with_image_size(found.text, size)
    name = f"{text}@{found.file}" if found.file else text
    return name, replace(own, size=(size, size))


def _load_program(
    name: str,
    preprocess: Preprocess,
    shape: Shape,
    match: Callable[[Sequence[str] | int], Match],
) -> tuple[Model, Match]:
    """From the file of an exported program, as its card says if it has one."""
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
        channels = program.shape[2]
        if card and not (fitted.mean.shape == fitted.std.shape == (channels,)):
            raise ValueError(f"mean and std are not {channels} values each")
        if card and not (np.isfinite(fitted.mean).all() and (fitted.std > 0).all()):
            raise ValueError("mean and std are not finite and positive")
        if outputs not in get_args(saved_models.OutputKind) or interpolation not in get_args(
            Interpolation
        ):
            raise ValueError("outputs or interpolation is none that kd writes")
        if not 0 < temperature < math.inf:
            raise ValueError("output_temperature is not positive")
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the {exported.CARD} inside {path} is not whole: {error!r}") from error
    if len(names) != program.classes:
        raise UserError(f"{path} names {len(names)} classes and has {program.classes} outputs")
    # Without a card there are no names.
    matched = match(names if card else program.classes)
    classifier = Classifier(program.network, interpolation=interpolation)
    return Model(classifier, name, names, program.shape, fitted, outputs, temperature), matched


def _require_names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError("classes is no list of names")
    return tuple(value)


def _build_model(
    name: str, own: PretrainedConfig, classes: tuple[str, ...] | int, *, pretrained: bool
) -> Model:
    """A zoo's network, prepared for as it wants."""
    shape, names = (*own.size, len(own.mean)), _output_names(classes)
    classifier = networks.build(name, shape, len(names), pretrained=pretrained, adapt=False)
    classifier.interpolation = own.interpolation
    return Model(classifier, name, names, shape, own.preprocess())


def _apply_overrides(
    model: Model,
    image_size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Model:
    """The model with what the user knows better."""
    if image_size is not None:
        model = replace(model, shape=(image_size, image_size, model.shape[2]))
    if mean is None and std is None:
        return model
    fitted = model.preprocess
    m, s = (
        np.asarray(own if value is None else value, np.float32)
        for own, value in ((fitted.mean, mean), (fitted.std, std))
    )
    if len(m) != model.shape[2] or len(s) != model.shape[2] or (s <= 0).any():
        raise UserError(
            f"mean and std of {model.name} must be {model.shape[2]} values each, and std positive"
        )
    return replace(model, preprocess=Preprocess("standardise", m, s))


def _check_image_size(who: str, teacher: Teacher, shape: Shape) -> None:
    """Refuse a teacher that cannot take the data's images, now and not in the first step."""
    h, w, c = shape
    try:
        with torch.no_grad():
            teacher(torch.zeros(1, c, h, w))
    except Exception as error:  # networks raise whatever they like
        (own_h, own_w), size = teacher.resolved.size, f"{h}x{w}"
        raise UserError(
            f"{who} cannot take {size} images brought to {own_h}x{own_w}: {first_line(error)}"
        ) from error


def _output_names(classes: tuple[str, ...] | int) -> tuple[str, ...]:
    return tuple(map(str, range(classes))) if isinstance(classes, int) else classes


def _output_index(matched: Match) -> Tensor | None:
    return None if matched.outputs is None else torch.tensor(matched.outputs)
