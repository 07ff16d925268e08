"""Terms of features: taps on both networks, a projector between them, and a loss of `kd.losses`.

Each function below makes a module that is called with what a step has seen and returns the loss,
the sum over all pairs of layers. Where no layers are named, losses of vectors compare the
embeddings, the inputs of the two classifiers; those of maps need names.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch import Tensor, nn

from dsdistill.harness.errors import UserError
from kd.losses import contrastive, response
from kd.losses.ranges import Range, Share, ShareBelowOne, Temperature
from kd.models.networks import Classifier, Shape
from kd.models.teachers import Teacher
from kd.objectives.loss_spec import LayerPair
from kd.objectives.projectors import (
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
from kd.objectives.taps import EMBEDDING, FeatureLayout, Taps, as_map, as_vector, probe

LossFunction = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class TermContext:
    """Where features are compared.

    Attributes:
        student, teacher: The networks; no teacher for what looks at the student alone.
        shape: Height, width and channels of an image of the data.
        classes: Of the data.
        images: In the training set.
        seed: Of projectors.
        pairs: Of layers of the student and of the teacher.
    """

    student: Classifier
    teacher: Teacher | None
    shape: Shape
    classes: int
    images: int
    seed: int
    pairs: tuple[LayerPair, ...]

    def layers(self, *, default: bool) -> tuple[LayerPair, ...]:
        """The pairs, or the embeddings if none were named and that will do."""
        if self.pairs:
            return self.pairs
        if not default:
            raise UserError(
                "a loss of maps needs layers, as in at:1000@layer2,layer3 "
                "or fitnet@layer3=blocks.5 (student=teacher)"
            )
        return ((EMBEDDING, EMBEDDING),)


class ProjectedFeatures(nn.Module):
    """Features of pairs of layers, through one projector a pair, to one loss.

    Attributes:
        projectors: Of each pair; called with both features, they return the loss's arguments.
    """

    def __init__(
        self, place: TermContext, make: Callable[..., nn.Module], *, default: bool
    ) -> None:
        super().__init__()
        pairs = place.layers(default=default)
        assert place.teacher is not None
        self.pairs = pairs
        self.student = Taps(place.student.network, [s for s, _ in pairs])
        self.teacher = Taps(place.teacher.classifier.network, [t for _, t in pairs])
        ours = probe(place.student, self.student, place.shape, trained=True)
        theirs = probe(place.teacher, self.teacher, place.shape)
        with torch.random.fork_rng():
            torch.manual_seed(place.seed)
            self.projectors = nn.ModuleList(make(ours[s], theirs[t]) for s, t in pairs)

    def read(self) -> list[tuple[Tensor, Tensor]]:
        """The features of the last step, pair by pair."""
        ours, theirs = self.student.read(), self.teacher.read()
        return [(ours[s], theirs[t]) for s, t in self.pairs]

    def forward(self) -> list[tuple[Tensor, ...]]:
        """The projected features, pair by pair."""
        pairs = zip(self.projectors, self.read(), strict=True)
        return [projector(*features) for projector, features in pairs]


class LayerPairLoss(nn.Module):
    """The loss of every pair of layers, summed."""

    def __init__(self, tapped: ProjectedFeatures, function: LossFunction) -> None:
        super().__init__()
        self.tapped, self.function = tapped, function

    def forward(self, seen: StepOutputs) -> Tensor:
        return torch.stack([self.function(*features) for features in self.tapped()]).sum()


class MeanOverTeachers(nn.Module):
    """The mean of what a term is with each of several teachers."""

    def __init__(self, each: Sequence[nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleList(each)

    def forward(self, seen: StepOutputs) -> Tensor:
        return torch.stack([measure(seen) for measure in self.each]).mean()


def function_matching(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher ‖ student) at temperature 1, batch mean.

    Source: Beyer et al. (2022), arXiv:2106.05237, section 3.
    """
    return response.logit_kl(student_logits, teacher_logits, temperature=1)


def regressor_term(place: TermContext, function: LossFunction) -> nn.Module:
    """Maps of the student through a 1x1 convolution."""
    return LayerPairLoss(ProjectedFeatures(place, Regressor, default=False), function)


def variational_term(place: TermContext, function: LossFunction) -> nn.Module:
    """Maps of the student as the mean of a Gaussian."""
    return LayerPairLoss(ProjectedFeatures(place, GaussianRegressor, default=False), function)


def generator_term(place: TermContext, function: LossFunction) -> nn.Module:
    """Maps generated from masked ones."""
    return LayerPairLoss(ProjectedFeatures(place, MaskedGenerator, default=False), function)


def projector_term(place: TermContext, function: LossFunction) -> nn.Module:
    """Vectors of the student through a linear map."""
    return LayerPairLoss(ProjectedFeatures(place, Projector, default=True), function)


def map_term(place: TermContext, function: LossFunction) -> nn.Module:
    """Maps as they are, at the smaller of the two sizes."""
    return LayerPairLoss(ProjectedFeatures(place, _PooledMaps, default=False), function)


def vector_term(place: TermContext, function: LossFunction) -> nn.Module:
    """Vectors as they are: the mean over positions."""
    return LayerPairLoss(ProjectedFeatures(place, _PooledVectors, default=True), function)


class _PooledMaps(nn.Module):
    def __init__(self, student: FeatureLayout, teacher: FeatureLayout) -> None:
        super().__init__()
        self.layouts = student, teacher
        for layout in self.layouts:
            if layout.size == (1, 1):
                raise UserError(
                    f"layer {layout.layer!r} has a single position, and a map of one position says "
                    "nothing of where: tap an earlier layer"
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
    """Maps of all stages, from shallow to deep, each together with the deeper ones."""

    def __init__(self, place: TermContext, function: LossFunction) -> None:
        super().__init__()
        layouts: list[tuple[FeatureLayout, FeatureLayout]] = []

        def noted(*pair: FeatureLayout) -> nn.Module:  # the projector is one of all pairs together
            layouts.append((pair[0], pair[1]))
            return nn.Identity()

        self.tapped, self.function = ProjectedFeatures(place, noted, default=False), function
        for (before, _), (layer, _) in itertools.pairwise(layouts):
            if math.prod(layer.size or ()) > math.prod(before.size or ()):
                raise UserError(
                    f"--loss review takes layers from shallow to deep, and {layer.layer!r} has a "
                    f"larger map than {before.layer!r} before it: give them in the other order"
                )
        with torch.random.fork_rng():
            torch.manual_seed(place.seed)
            self.fusion = Fusion([s for s, _ in layouts], [t for _, t in layouts])

    def forward(self, seen: StepOutputs) -> Tensor:
        students, teachers = zip(*self.tapped.read(), strict=True)
        fused = self.fusion(students, teachers)
        return torch.stack([self.function(*pair) for pair in fused]).sum()


class CrdTerm(nn.Module):
    """Embeddings against a memory of all training images: CRD.

    The parameters of `crd_parameters` are what the memory and its loss are made with.
    """

    def __init__(self, place: TermContext, function: partial) -> None:
        super().__init__()
        if place.images == 0:
            raise UserError(
                "--loss crd remembers each training image, and these are read from front to back "
                "without a number: leave it out, or use a folder"
            )
        options = dict(function.keywords)
        self.temperature = options.pop("temperature")
        make = partial(Embedder, dim=options["dim"])
        self.tapped = ProjectedFeatures(place, make, default=True)
        if len(self.tapped.pairs) > 1:
            raise UserError("--loss crd compares one pair of layers")
        self.memory = EmbeddingMemory(place.images, seed=place.seed, **options)

    def forward(self, seen: StepOutputs) -> Tensor:
        (embeddings,) = self.tapped()
        assert seen.batch.index is not None
        scores = self.memory(*embeddings, seen.batch.index, temperature=self.temperature)
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
    """The parameters of contrastive representation distillation, see `CrdTerm`."""


class DeepSupervisionTerm(nn.Module):
    """Deep supervision: shallow layers get classifiers, which learn from labels and from the last.

    Of each head (1 - alpha) CE + alpha KL(student ‖ head) at T, the student's logits fixed; the
    heads are left out of what is saved. Deviation: no pull of shallow features towards deep ones.

    Source: Zhang et al. (2019), "Be your own teacher", arXiv:1905.08094, equations 1 to 3.
    """

    def __init__(self, place: TermContext, function: LossFunction) -> None:
        super().__init__()
        layers = [student for student, _ in place.layers(default=False)]
        self.taps = Taps(place.student.network, layers)
        self.layouts = probe(place.student, self.taps, place.shape, trained=True)
        self.function = function
        with torch.random.fork_rng():
            torch.manual_seed(place.seed)
            self.heads = nn.ModuleList(
                nn.Linear(self.layouts[layer].channels, place.classes) for layer in layers
            )
        self.layers = layers

    def forward(self, seen: StepOutputs) -> Tensor:
        features = self.taps.read()
        labels = seen.batch.labels if seen.batch.shares is None else seen.batch.shares
        outputs = [
            head(as_vector(features[layer], self.layouts[layer]))
            for head, layer in zip(self.heads, self.layers, strict=True)
        ]
        return torch.stack([self.function(o, seen.outputs, labels) for o in outputs]).sum()


def self_distillation(
    head_logits: Tensor,
    student_logits: Tensor,
    labels: Tensor,
    *,
    alpha: Share = 0.3,
    temperature: Temperature = 3.0,
) -> Tensor:
    """(1 - alpha) CE(head, labels) + alpha T² KL(student ‖ head); no gradient into the student."""
    ce = response.cross_entropy(head_logits, labels)
    kl = response.logit_kl(head_logits, student_logits, temperature=temperature)
    return (1 - alpha) * ce + alpha * kl
