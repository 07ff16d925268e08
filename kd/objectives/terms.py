"""The terms of a loss: pure functions, and modules that apply them to a training step.

The table `TERMS` has for each name its function, the weight in its paper, and its inputs: labels,
logits, or features of layers. A new loss is a function in `kd.losses` and a row in this table.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from dsdistill.harness.errors import UserError
from kd.losses import ensemble, feature, relation, response
from kd.models.networks import Classifier, Shape
from kd.models.teachers import Teacher
from kd.objectives import feature_terms, loss_spec
from kd.objectives.feature_terms import LossFunction
from kd.objectives.loss_spec import TermSpec
from kd.objectives.step_outputs import StepOutputs

# Applies a loss at a temperature to the student's logits and those of all teachers.
TeacherCombiner = Callable[[StepOutputs, LossFunction, float], Tensor]


def mean_probability_loss(step: StepOutputs, function: LossFunction, temperature: float) -> Tensor:
    """Apply a loss to the mean of the teachers' probabilities at the loss's temperature."""
    return function(step.student_logits, step.combined_logits(temperature))


def mean_logit_loss(step: StepOutputs, function: LossFunction, temperature: float) -> Tensor:
    """Apply a loss of logits that are not softened to the mean of the teachers' logits."""
    return function(step.student_logits, step.mean_logits())


def mean_standardised_loss(step: StepOutputs, function: LossFunction, temperature: float) -> Tensor:
    """KL divergence from the mean probabilities of standardised teachers, for `standardised_kl`."""
    if len(step.teacher_logits) == 1:
        return function(step.student_logits, step.teacher_logits[0])
    logits = step.student_logits, *step.teacher_logits
    student, *teachers = (response.standardise(x) for x in logits)
    options = {"temperature": temperature, "weights": step.weights}
    teacher = ensemble.combined_logits(teachers, **options)
    return response.logit_kl(student, teacher, temperature=temperature)


@dataclass(frozen=True)
class TermDefinition:
    """A row of the table.

    Attributes:
        function: The loss; its keyword-only arguments are the parameters of the term.
        weight: Published weight; for `cc`, whose paper has none, that of a public reproduction.
        inputs: `labels`, `logits`, `logits and labels`, or `features`.
        make: For features: builds the module of the term from a `feature_terms.TermContext` and
            the function.
        images: Smallest number of images in a batch.
        classes: Smallest number of classes.
        whole: Whether each image must be of one class, not mixed.
        combine: For logits: applies the function to the logits of several teachers.
    """

    function: Callable[..., Any]
    weight: float
    inputs: str
    make: Callable[..., nn.Module] | None = None
    images: int = 1
    classes: int = 2
    whole: bool = False
    combine: TeacherCombiner = mean_probability_loss


TERMS: Mapping[str, TermDefinition] = {
    "ce": TermDefinition(response.cross_entropy, 1, "labels"),
    "mse": TermDefinition(response.centred_mse, 1, "labels", whole=True),
    "kd": TermDefinition(response.logit_kl, 0.9, "logits"),
    "fm": TermDefinition(response.function_matching, 1, "logits"),
    "dkd": TermDefinition(response.dkd, 1, "logits and labels", classes=3, whole=True),
    "dist": TermDefinition(response.dist, 2, "logits", images=2),
    "ls": TermDefinition(
        response.standardised_kl, 9, "logits", classes=3, combine=mean_standardised_loss
    ),
    "logits": TermDefinition(response.logit_mse, 1, "logits", combine=mean_logit_loss),
    "hard": TermDefinition(response.hard_distillation, 0.5, "logits"),
    "fitnet": TermDefinition(feature.fitnet, 100, "features", feature_terms.regressor_term),
    "at": TermDefinition(feature.attention_transfer, 1000, "features", feature_terms.map_term),
    "review": TermDefinition(feature.hierarchical_context, 1, "features", feature_terms.FusionTerm),
    "vid": TermDefinition(feature.vid, 1, "features", feature_terms.variational_term),
    "mgd": TermDefinition(feature.mgd, 2e-5, "features", feature_terms.generator_term),
    "srd": TermDefinition(feature.log_sum, 2, "features", feature_terms.projector_term, images=2),
    "rkd-distance": TermDefinition(
        relation.rkd_distance, 25, "features", feature_terms.vector_term, images=2
    ),
    "rkd-angle": TermDefinition(
        relation.rkd_angle, 50, "features", feature_terms.vector_term, images=3
    ),
    "sp": TermDefinition(
        relation.similarity_preserving, 3000, "features", feature_terms.vector_term, images=2
    ),
    "pkt": TermDefinition(
        relation.probabilistic_transfer, 3e4, "features", feature_terms.vector_term, images=2
    ),
    "cc": TermDefinition(
        relation.correlation_congruence, 100, "features", feature_terms.vector_term, images=2
    ),
    "crd": TermDefinition(
        feature_terms.crd_parameters, 0.8, "features", feature_terms.CrdTerm, whole=True
    ),
    "heads": TermDefinition(
        response.self_distillation, 1, "features", feature_terms.DeepSupervisionTerm
    ),
}
TERM_FUNCTIONS = {name: row.function for name, row in TERMS.items()}


class WeightedTerm(nn.Module):
    """A term of a loss, times its weight.

    Attributes:
        name: Name in the table.
        weight: Factor of the term.
        measure: Module that maps `StepOutputs` to the unweighted term.
        needs_teacher: Whether the term takes a teacher's outputs.
        needs_teacher_features: Whether the term takes features of a teacher's layers.
    """

    def __init__(
        self,
        name: str,
        weight: float,
        measure: nn.Module,
        *,
        needs_teacher: bool,
        needs_teacher_features: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.weight, self.measure = name, weight, measure
        self.needs_teacher = needs_teacher
        self.needs_teacher_features = needs_teacher_features

    def forward(self, step: StepOutputs) -> Tensor:
        return self.weight * self.measure(step)


class LabelTerm(nn.Module):
    """A loss of the student's outputs and the labels."""

    def __init__(self, function: Callable[..., Tensor], *, centred: bool) -> None:
        super().__init__()
        self.function, self.centred = function, centred

    def forward(self, step: StepOutputs) -> Tensor:
        batch = step.batch
        if self.centred:
            labels = batch.labels if batch.targets is None else batch.targets
        else:
            labels = batch.labels_or_shares
        return self.function(step.student_logits, labels)


class LogitTerm(nn.Module):
    """A loss of the student's logits and the teachers'."""

    def __init__(
        self, function: LossFunction, temperature: float, labels: bool, combine: TeacherCombiner
    ) -> None:
        super().__init__()
        self.function, self.temperature, self.labels = function, temperature, labels
        self.combine = combine

    def forward(self, step: StepOutputs) -> Tensor:
        if self.labels:
            teacher = step.combined_logits(self.temperature)
            return self.function(step.student_logits, teacher, step.batch.labels)
        return self.combine(step, self.function, self.temperature)


def build(
    specs: Sequence[TermSpec],
    student: Classifier,
    teachers: Sequence[Teacher] = (),
    *,
    shape: Shape = (1, 1, 1),
    classes: int = 0,
    images: int = 0,
    smoothing: float = 0.0,
    seed: int = 0,
) -> list[WeightedTerm]:
    """Build the modules of terms; terms of features put taps on the networks.

    Args:
        specs: The parsed terms.
        student, teachers: Networks before they are wrapped or compiled. With several teachers, a
            term of features is the mean over the teachers, with a projector for each.
        shape: Height, width and channels of an image.
        classes: Number of classes, for `heads`.
        images: Number of training images, for the memory of `crd`.
        smoothing: Label smoothing of `ce`, unless the term has a parameter of its own.
        seed: Seed of the projectors' weights.

    Raises:
        UserError: For an unknown layer, or layers in a term without features.
    """
    contexts = [
        partial(feature_terms.TermContext, student, teacher, shape, classes, images, seed + i)
        for i, teacher in enumerate(teachers or (None,))
    ]
    return [_build_term(spec, contexts, smoothing) for spec in specs]


def needs_teacher(spec: TermSpec) -> bool:
    """Whether a term takes a teacher's outputs."""
    return TERMS[spec.name].inputs != "labels" and spec.name != "heads"


def check(specs: Sequence[TermSpec], *, classes: int, batch_size: int, mixed: bool) -> None:
    """Refuse terms that cannot work with the data.

    Args:
        specs: The parsed terms.
        classes: Number of classes.
        batch_size: Number of images in a batch.
        mixed: Whether images are mixed.

    Raises:
        UserError: With the term and what it needs.
    """
    for spec in specs:
        row = TERMS[spec.name]
        if mixed and row.whole:
            raise UserError(
                f"--loss {spec.name} needs whole labels, one class for each image: leave --mixup "
                "and --cutmix out"
            )
        if classes < row.classes:
            raise UserError(
                f"--loss {spec.name} needs {row.classes} classes or more, and the data have "
                f"{classes}: use kd"
            )
        if batch_size < (least := min_images(spec)):
            raise UserError(
                f"--loss {spec.name} compares the images of a batch: --batch-size must be at "
                f"least {least}, got {batch_size}"
            )


def remarks(specs: Sequence[TermSpec], *, images: int) -> list[str]:
    """Lines about terms whose parameters are lowered for lack of images.

    Args:
        specs: The parsed terms.
        images: Number of training images; 0 if unknown.
    """
    lines = []
    for spec in specs:
        negatives = spec.parameters.get("negatives")
        if negatives is None and spec.name == "crd":
            negatives = loss_spec.parameters(TERMS[spec.name].function)["negatives"]
        if negatives is not None and negatives > images - 1 > 0:
            lines.append(
                f"--loss {spec.name} compares each image with {images - 1} others, as many as "
                f"there are, and not with negatives={negatives}"
            )
    return lines


def teaches_labels(spec: TermSpec) -> bool:
    """Whether a term teaches the student the labels."""
    return not needs_teacher(spec)


def needs_raw_logits(spec: TermSpec) -> bool:
    """Whether a term needs a teacher's logits and not only their probabilities."""
    row = TERMS[spec.name]
    return needs_teacher(spec) and row.make is None and row.combine is not mean_probability_loss


def min_images(spec: TermSpec) -> int:
    """The smallest number of images that a term can compare."""
    if spec.name == "dist" and spec.parameters.get("intra") == 0:
        return 1  # only rows are compared
    return TERMS[spec.name].images


def _build_term(
    spec: TermSpec, contexts: Sequence[Callable[..., feature_terms.TermContext]], smoothing: float
) -> WeightedTerm:
    row = TERMS[spec.name]
    weight = row.weight if spec.weight is None else spec.weight
    parameters = loss_spec.parameters(row.function) | dict(spec.parameters)
    if row.inputs != "features" and spec.layers:
        raise UserError(
            f"--loss {spec.name} takes {row.inputs}, not features: leave its layers out"
        )
    taught = needs_teacher(spec)
    if row.inputs == "labels":
        if spec.name == "ce" and "smoothing" not in spec.parameters:
            parameters["smoothing"] = smoothing
        measure = LabelTerm(partial(row.function, **parameters), centred=spec.name == "mse")
    elif row.make is None:
        with_labels = row.inputs == "logits and labels"
        temperature = parameters.get("temperature", 1.0)
        function = partial(row.function, **parameters)
        measure = LogitTerm(function, temperature, with_labels, row.combine)
    else:
        make, function = row.make, partial(row.function, **parameters)
        used = contexts if taught else contexts[:1]
        each = [make(context(spec.layers), function) for context in used]
        measure = each[0] if len(each) == 1 else feature_terms.MeanOverTeachers(each)
    features = taught and row.make is not None
    return WeightedTerm(
        spec.name, weight, measure, needs_teacher=taught, needs_teacher_features=features
    )
