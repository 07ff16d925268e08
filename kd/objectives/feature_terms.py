"""Terms of features: taps on both networks, a projector between them, and a loss of `kd.losses`.

Each function below builds a module that maps the outputs of a step to the loss, the sum over all
pairs of layers. Where no layers are named, losses of vectors compare the embeddings, the inputs of
the two classifiers; losses of maps need names. Of texts a vector is the mean over real tokens where
a layer gives one for each, and there are no maps.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsdistill.harness.errors import UserError
from kd.data.batching import Batch, LayerVector
from kd.losses import adversarial, contrastive
from kd.losses.ranges import Factor, Flag, Range, ShareBelowOne, Temperature
from kd.models.language.text_teachers import TextTeacher
from kd.models.teachers import Teacher
from kd.models.token_inputs import TokenInputs
from kd.models.wrapped_network import WrappedNetwork
from kd.objectives.loss_spec import LayerPair
from kd.objectives.projectors import (
    Discriminator,
    Embedder,
    EmbeddingMemory,
    Fusion,
    GaussianRegressor,
    MaskedGenerator,
    Projector,
    Regressor,
    match_sizes,
)
from kd.objectives.step_outputs import StepOutputs
from kd.objectives.taps import (
    EMBEDDING,
    FeatureLayout,
    Sample,
    Taps,
    as_map,
    as_vector,
    probe,
    try_out,
)

LossFunction = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class TeacherLayers:
    """What a term takes from the layers of one teacher.

    Attributes:
        teacher: Number of the teacher.
        count_bytes: Bytes in float32 of what it takes for texts of these lengths in tokens; for
            images the lengths are ones.
        vectors: Width of each vector, if it takes nothing but vectors of images or texts.
        read: Reads the vectors of the teacher's last forward pass, for the batch that the teacher
            was given.
    """

    teacher: int
    count_bytes: Callable[[Int[np.ndarray, " n"]], int]
    vectors: Mapping[LayerVector, int] = field(default_factory=dict)
    read: Callable[[Batch], Mapping[LayerVector, Tensor]] | None = None


@dataclass(frozen=True, eq=False)
class TermContext:
    """The networks, layers and data that a term of features is built for.

    Attributes:
        student: The student.
        teacher: The teacher; None for a term of the student only.
        number: Number of the teacher, from 0.
        sample: What the networks are tried on: the shape of an image, or texts.
        classes: Number of classes of the data.
        images: Number of images or texts in the training set; 0 if unknown.
        seed: Seed of the projectors' weights.
        pairs: Pairs of a student's layer and a teacher's layer.
        teacher_sample: What the teacher is tried on, where that is another thing; else None.
    """

    student: WrappedNetwork
    teacher: Teacher | TextTeacher | WrappedNetwork | None
    number: int
    sample: Sample
    classes: int
    images: int
    seed: int
    pairs: tuple[LayerPair, ...]
    teacher_sample: Sample | None = None

    @property
    def teacher_network(self) -> nn.Module:
        """The network with the teacher's layers."""
        assert self.teacher is not None
        within = self.teacher
        return (within if isinstance(within, WrappedNetwork) else within.classifier).network

    def layers(self, *, default: bool) -> tuple[LayerPair, ...]:
        """The pairs of layers; without any, the embeddings if `default`.

        Raises:
            UserError: If there are no pairs, and not `default`.
        """
        if self.pairs:
            return self.pairs
        if not default and isinstance(self.sample, TokenInputs):
            raise UserError("this loss needs layers, as in heads@0,2")
        if not default:
            raise UserError(
                "a loss of maps needs layers, as in at:1000@layer2,layer3 "
                "or fitnet@layer3=blocks.5 (student=teacher)"
            )
        return ((EMBEDDING, EMBEDDING),)


class TappedPairs:
    """The features of pairs of layers, tapped and probed.

    Attributes:
        pairs: Pairs of a student's layer and a teacher's layer.
        layouts: Layouts of the two features of each pair.
    """

    def __init__(self, context: TermContext, pairs: Sequence[LayerPair]) -> None:
        """Put taps on both networks, and try these out.

        Raises:
            UserError: If there is no such layer, or no trained weight before one of the student's.
        """
        assert context.teacher is not None
        self.pairs = tuple(pairs)
        self.student = Taps(context.student.network, [s for s, _ in pairs])
        self.teacher = Taps(context.teacher_network, [t for _, t in pairs])
        ours = probe(context.student, self.student, context.sample, trained=True)
        sample = context.sample if context.teacher_sample is None else context.teacher_sample
        theirs = probe(context.teacher, self.teacher, sample)
        self.layouts = [(ours[s], theirs[t]) for s, t in self.pairs]

    def read(self) -> list[tuple[Tensor, Tensor]]:
        """Read the features of the last step, pair by pair."""
        ours, theirs = self.student.read(), self.teacher.read()
        return [(ours[s], theirs[t]) for s, t in self.pairs]

    def read_vectors(
        self, batch: Batch, teacher: int, place: Literal["mean", "first"]
    ) -> list[tuple[Tensor, Tensor]]:
        """Read the vectors of the last step, pair by pair; the teacher's where the batch has them.

        Args:
            batch: Batch of the step.
            teacher: Number of the teacher.
            place: Which vectors of a feature.
        """
        features = self.student.read()
        mask = _token_mask(batch.inputs)
        ours = {s.layer: _vector(features[s.layer], s, mask, place) for s, _ in self.layouts}
        if batch.teacher_vectors is None:
            theirs = self._read_teacher(batch, teacher, place)
        else:
            theirs = batch.teacher_vectors[teacher]
        return [(ours[s], theirs[LayerVector(t, place)]) for s, t in self.pairs]

    def teacher_layers(
        self, teacher: int, place: Literal["mean", "first"] | None = None
    ) -> TeacherLayers:
        """What is taken from the teacher: whole features, or with `place` their vectors.

        Args:
            teacher: Number of the teacher.
            place: Which vectors.
        """
        if place is None:
            return TeacherLayers(teacher, self._teacher_bytes)
        widths = {LayerVector(t.layer, place): t.channels for _, t in self.layouts}
        read = partial(self._read_teacher, teacher=teacher, place=place)
        return TeacherLayers(teacher, self._teacher_bytes, widths, read)

    def _read_teacher(
        self, batch: Batch, teacher: int, place: Literal["mean", "first"]
    ) -> dict[LayerVector, Tensor]:
        features, mask = self.teacher.read(), _token_mask(batch.inputs_of(teacher))
        return {
            LayerVector(t.layer, place): _vector(features[t.layer], t, mask, place)
            for _, t in self.layouts
        }

    def _teacher_bytes(self, lengths: Int[np.ndarray, " n"]) -> int:
        layouts = {t.layer: t for _, t in self.layouts}.values()
        tokens, rows = int(lengths.sum()), len(lengths)
        return 4 * sum(
            t.channels * (tokens if t.size is None else rows * math.prod(t.size)) for t in layouts
        )


def _token_mask(inputs: Tensor | TokenInputs) -> Bool[Tensor, "n l"] | None:
    return inputs.mask if isinstance(inputs, TokenInputs) else None


def _vector(
    feature: Tensor,
    layout: FeatureLayout,
    mask: Bool[Tensor, "n l"] | None,
    place: Literal["mean", "first"],
) -> Float[Tensor, "n d"]:
    return feature[:, 0] if place == "first" else as_vector(feature, layout, mask)


class ProjectedFeatures(nn.Module):
    """The features of pairs of layers, projected to the arguments of a loss.

    Each pair has its own projector. Losses of vectors take the means over positions, of texts over
    real tokens.

    Attributes:
        teacher_layers: What is taken from the teacher.
        projectors: One per pair; called with both features, it returns the loss's arguments.
    """

    def __init__(
        self, context: TermContext, make: Callable[..., nn.Module], *, default: bool
    ) -> None:
        super().__init__()
        self.teacher, self._takes_vectors = context.number, default
        if isinstance(context.sample, TokenInputs) and not default:
            raise UserError(
                "at, fitnet, mgd, review and vid compare maps of images, which texts have not: use "
                "hidden, cosine, or a loss of vectors such as srd"
            )
        self.tapped = TappedPairs(context, context.layers(default=default))
        self.teacher_layers = self.tapped.teacher_layers(self.teacher, "mean" if default else None)
        layouts = self.tapped.layouts
        if default:
            layouts = [(_vector_layout(s), _vector_layout(t)) for s, t in layouts]
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)
            self.projectors = nn.ModuleList(make(s, t) for s, t in layouts)

    def read(self, step: StepOutputs) -> list[tuple[Tensor, Tensor]]:
        """Read the features of the last step, pair by pair."""
        if not self._takes_vectors:
            return self.tapped.read()
        return self.tapped.read_vectors(step.batch, self.teacher, "mean")

    def forward(self, step: StepOutputs) -> list[tuple[Tensor, ...]]:
        """Read and project the features, pair by pair."""
        pairs = zip(self.projectors, self.read(step), strict=True)
        return [projector(*features) for projector, features in pairs]


def _vector_layout(layout: FeatureLayout) -> FeatureLayout:
    """The layout of a feature after its mean over positions."""
    return FeatureLayout(layout.layer, "vector", layout.channels)


class LayerPairLoss(nn.Module):
    """The loss of every pair of layers, summed."""

    def __init__(self, tapped: ProjectedFeatures, function: LossFunction) -> None:
        super().__init__()
        self.tapped, self.function = tapped, function

    def forward(self, step: StepOutputs) -> Tensor:
        return torch.stack([self.function(*features) for features in self.tapped(step)]).sum()


class MeanOverTeachers(nn.Module):
    """The mean of a term over several teachers."""

    def __init__(self, each: Sequence[nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleList(each)

    def forward(self, step: StepOutputs) -> Tensor:
        return torch.stack([measure(step) for measure in self.each]).mean()


def regressor_term(context: TermContext, function: LossFunction) -> nn.Module:
    """A loss of maps, the student's through a 1x1 convolution."""
    return LayerPairLoss(ProjectedFeatures(context, Regressor, default=False), function)


def variational_term(context: TermContext, function: LossFunction) -> nn.Module:
    """A loss of maps, the student's through the mean of a Gaussian."""
    return LayerPairLoss(ProjectedFeatures(context, GaussianRegressor, default=False), function)


def generator_term(context: TermContext, function: LossFunction) -> nn.Module:
    """A loss of maps, the student's masked and regenerated."""
    return LayerPairLoss(ProjectedFeatures(context, MaskedGenerator, default=False), function)


def projector_term(context: TermContext, function: LossFunction) -> nn.Module:
    """A loss of vectors, the student's through a linear map."""
    return LayerPairLoss(ProjectedFeatures(context, Projector, default=True), function)


def map_term(context: TermContext, function: LossFunction) -> nn.Module:
    """A loss of unprojected maps, at the smaller of the two sizes."""
    return LayerPairLoss(ProjectedFeatures(context, _PooledMaps, default=False), function)


def vector_term(context: TermContext, function: LossFunction) -> nn.Module:
    """A loss of unprojected vectors, the means over positions."""
    return LayerPairLoss(ProjectedFeatures(context, _PooledVectors, default=True), function)


def graph_term(context: TermContext, function: partial) -> nn.Module:
    """A loss of how a batch relates in several layers, and of how that changes between them.

    Raises:
        UserError: If there is one layer, and the changes count.
    """
    tapped = ProjectedFeatures(context, _PooledVectors, default=True)
    if len(tapped.projectors) < 2 and function.keywords["transformation"]:
        raise UserError(
            "--loss irg compares how relations change from layer to layer: name two layers or "
            "more, as in irg@layer2,layer3, or give transformation=0"
        )
    return LayersLoss(tapped, function)


class LayersLoss(nn.Module):
    """A loss of all layers of each side together."""

    def __init__(self, tapped: ProjectedFeatures, function: LossFunction) -> None:
        super().__init__()
        self.tapped, self.function = tapped, function

    def forward(self, step: StepOutputs) -> Tensor:
        students, teachers = zip(*self.tapped(step), strict=True)
        return self.function(students, teachers)


class _PooledMaps(nn.Module):
    def __init__(self, student: FeatureLayout, teacher: FeatureLayout) -> None:
        super().__init__()
        self.layouts = student, teacher
        for layout in self.layouts:
            if layout.size == (1, 1):
                raise UserError(
                    f"layer {layout.layer!r} has a single position, and a loss of maps compares "
                    "several: tap an earlier layer"
                )

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return match_sizes(as_map(student, self.layouts[0]), as_map(teacher, self.layouts[1]))


class _PooledVectors(nn.Module):
    def __init__(self, student: FeatureLayout, teacher: FeatureLayout) -> None:
        super().__init__()
        self.layouts = student, teacher

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return as_vector(student, self.layouts[0]), as_vector(teacher, self.layouts[1])


class FusionTerm(nn.Module):
    """A loss of the maps of all stages, each fused with the deeper ones: ReviewKD."""

    def __init__(self, context: TermContext, function: LossFunction) -> None:
        super().__init__()
        layouts: list[tuple[FeatureLayout, FeatureLayout]] = []

        def record(*pair: FeatureLayout) -> nn.Module:  # one fusion projects all pairs together
            layouts.append((pair[0], pair[1]))
            return nn.Identity()

        self.tapped, self.function = ProjectedFeatures(context, record, default=False), function
        for (before, _), (layer, _) in itertools.pairwise(layouts):
            if math.prod(layer.size or ()) > math.prod(before.size or ()):
                raise UserError(
                    f"--loss review takes layers from shallow to deep, and {layer.layer!r} has a "
                    f"larger map than {before.layer!r} before it: give them in the other order"
                )
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)
            self.fusion = Fusion([s for s, _ in layouts], [t for _, t in layouts])

    def forward(self, step: StepOutputs) -> Tensor:
        students, teachers = zip(*self.tapped.read(step), strict=True)
        fused = self.fusion(students, teachers)
        return torch.stack([self.function(*pair) for pair in fused]).sum()


class CrdTerm(nn.Module):
    """A contrastive loss of embeddings and a memory of all training images: CRD.

    The parameters of `crd_parameters` configure the memory and its loss.
    """

    def __init__(self, context: TermContext, function: partial) -> None:
        super().__init__()
        if context.images == 0:
            raise UserError(
                "--loss crd remembers each training image by its number, and images of an archive "
                "have none: leave it out, or use a folder"
            )
        options = dict(function.keywords)
        self.temperature = options.pop("temperature")
        make = partial(Embedder, dim=options["dim"])
        self.tapped = ProjectedFeatures(context, make, default=True)
        if len(self.tapped.projectors) > 1:
            raise UserError("--loss crd compares one pair of layers")
        self.memory = EmbeddingMemory(context.images, seed=context.seed, **options)

    def forward(self, step: StepOutputs) -> Tensor:
        (embeddings,) = self.tapped(step)
        assert step.batch.index is not None
        scores = self.memory(*embeddings, step.batch.index, temperature=self.temperature)
        ours, theirs = self.memory.log_z
        return contrastive.crd(
            *scores, student_log_z=ours, teacher_log_z=theirs, n_data=self.memory.n_data
        )


def crd_parameters(
    *,
    temperature: Temperature = 0.07,
    dim: Annotated[int, Range(1, 8192)] = 128,
    momentum: ShareBelowOne = 0.5,
    negatives: Annotated[int, Range(1, 1_000_000)] = 16384,
) -> None:
    """State the parameters of contrastive representation distillation, see `CrdTerm`."""


def crd_remark(parameters: Mapping[str, Any], images: int) -> str | None:
    """Say that there are fewer negatives than asked for, where the training has fewer images.

    Args:
        parameters: Those of `crd_parameters`.
        images: Number of training images; 0 if unknown.
    """
    negatives = parameters["negatives"]
    if not negatives > images - 1 > 0:
        return None
    return (
        f"--loss crd compares each image with {images - 1} others, as many as there are, and not "
        f"with negatives={negatives}"
    )


class DiscriminatorTerm(nn.Module):
    """A discriminator of vectors, or of logits, which the student is trained to fool.

    Vectors of the student go through a linear map first, which is trained with the student. The
    parameters are those of `discriminator_parameters`.
    """

    def __init__(self, context: TermContext, function: partial) -> None:
        super().__init__()
        options = dict(function.keywords)
        self.number, self.tapped = context.number, None
        if options.pop("logits"):
            if context.pairs:
                raise UserError("--loss adv with logits=1 reads no layers: leave them out")
            channels = [try_out(context.student, context.sample).shape[-1]]
        else:
            self.tapped = ProjectedFeatures(context, Projector, default=True)
            channels = [teacher.channels for _, teacher in self.tapped.tapped.layouts]
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)
            self.discriminators = nn.ModuleList(Discriminator(c, **options) for c in channels)

    def forward(self, step: StepOutputs) -> Tensor:
        if self.tapped is None:
            rows = step.rows
            pairs: Sequence[tuple[Tensor, ...]] = [
                (rows.student_logits, rows.teacher_logits[self.number])
            ]
        else:
            pairs = self.tapped(step)
        scores = (d(*pair) for d, pair in zip(self.discriminators, pairs, strict=True))
        return torch.stack([adversarial.discrimination(*pair) for pair in scores]).sum()


def discriminator_parameters(
    *,
    width: Annotated[int, Range(1, 8192)] = 128,
    reversal: Factor = 1.0,
    logits: Flag = 0,
) -> None:
    """State the parameters of a discriminator, see `DiscriminatorTerm`."""


class DeepSupervisionTerm(nn.Module):
    """Deep supervision: classifiers on shallow layers, taught by the labels and the last layer.

    The loss of each head is (1 - alpha) CE + alpha KL(student ‖ head) at T, with the student's
    logits fixed; the heads are not saved with the student. Deviation: no loss between shallow and
    deep features.

    Source: Zhang et al. (2019), "Be your own teacher", arXiv:1905.08094, equations 1 to 3.
    """

    def __init__(self, context: TermContext, function: LossFunction) -> None:
        super().__init__()
        layers = [student for student, _ in context.layers(default=False)]
        self.taps = Taps(context.student.network, layers)
        self.layouts = probe(context.student, self.taps, context.sample, trained=True)
        self.function = function
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)
            self.heads = nn.ModuleList(
                nn.Linear(self.layouts[layer].channels, context.classes) for layer in layers
            )
        self.layers = layers

    def forward(self, step: StepOutputs) -> Tensor:
        features = self.taps.read()
        labels = step.batch.labels_or_shares
        mask = step.mask if isinstance(step.batch.inputs, TokenInputs) else None
        outputs = [
            head(as_vector(features[layer], self.layouts[layer], mask))
            for head, layer in zip(self.heads, self.layers, strict=True)
        ]
        return torch.stack([self.function(o, step.student_logits, labels) for o in outputs]).sum()
