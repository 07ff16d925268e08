"""The terms that a loss is composed of: pure functions, and what they are applied to.

The table `TERMS` says for each name which function it is, the weight that its paper gives it, and
what it looks at: labels, logits, or features of layers. A new loss is a function in `kd.losses`
and a row here.
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
from kd.objectives.loss_spec import TermSpec
from kd.objectives.step_outputs import StepOutputs

LogitLoss = Callable[..., Tensor]
TeacherCombiner = Callable[
    [StepOutputs, LogitLoss, float], Tensor
]  # of a loss of logits at a temperature


def mean_probability_loss(seen: StepOutputs, function: LogitLoss, temperature: float) -> Tensor:
    """Several teachers are the mean of their probabilities at the loss's own temperature."""
    return function(seen.outputs, seen.teacher(temperature))


def mean_logit_loss(seen: StepOutputs, function: LogitLoss, temperature: float) -> Tensor:
    """Several teachers are the mean of their logits, which are not softened."""
    return function(seen.outputs, seen.mean_logits())


def mean_standardised_loss(seen: StepOutputs, function: LogitLoss, temperature: float) -> Tensor:
    """Several teachers are each standardised before their probabilities are averaged."""
    if len(seen.answers) == 1:
        return function(seen.outputs, seen.answers[0])
    outputs, *answers = (response.standardise(x) for x in (seen.outputs, *seen.answers))
    options = {"temperature": temperature, "weights": seen.weights}
    teacher = ensemble.combined_logits(answers, **options)
    return response.logit_kl(outputs, teacher, temperature=temperature)


@dataclass(frozen=True)
class TermDefinition:
    """A row of the table.

    Attributes:
        function: Its keyword-only arguments are the parameters of the term.
        weight: The published one; of `cc`, whose paper gives none, that of a public reproduction.
        looks_at: `labels`, `logits`, `logits and labels`, or `features`.
        make: Of a term of features: what brings them to a common shape, see `feature_terms`.
        images: Least number of images in a batch.
        classes: Least number of classes.
        whole: Whether an image must be of one class: mixed ones will not do.
        together: Of a term of logits: how it takes several teachers' answers.
    """

    function: Callable[..., Any]
    weight: float
    looks_at: str
    make: Callable[..., nn.Module] | None = None
    images: int = 1
    classes: int = 2
    whole: bool = False
    together: TeacherCombiner = mean_probability_loss


TERMS: Mapping[str, TermDefinition] = {
    "ce": TermDefinition(response.cross_entropy, 1, "labels"),
    "mse": TermDefinition(response.centred_mse, 1, "labels", whole=True),
    "kd": TermDefinition(response.logit_kl, 0.9, "logits"),
    "fm": TermDefinition(feature_terms.function_matching, 1, "logits"),
    "dkd": TermDefinition(response.dkd, 1, "logits and labels", classes=3, whole=True),
    "dist": TermDefinition(response.dist, 2, "logits", images=2),
    "ls": TermDefinition(
        response.standardised_kl, 9, "logits", classes=3, together=mean_standardised_loss
    ),
    "logits": TermDefinition(response.logit_mse, 1, "logits", together=mean_logit_loss),
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
        feature_terms.self_distillation, 1, "features", feature_terms.DeepSupervisionTerm
    ),
}
TERM_FUNCTIONS = {name: row.function for name, row in TERMS.items()}


class WeightedTerm(nn.Module):
    """A term of a loss: its weight times what it measures.

    Attributes:
        name: In the table.
        needs_teacher: Whether it looks at a teacher's answers.
        needs_teacher_features: And at more than its logits.
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

    def forward(self, seen: StepOutputs) -> Tensor:
        return self.weight * self.measure(seen)


class LabelTerm(nn.Module):
    """A loss of outputs and labels."""

    def __init__(self, function: Callable[..., Tensor], *, centred: bool) -> None:
        super().__init__()
        self.function, self.centred = function, centred

    def forward(self, seen: StepOutputs) -> Tensor:
        labels = seen.batch.targets if self.centred else seen.batch.shares
        return self.function(seen.outputs, seen.batch.labels if labels is None else labels)


class LogitTerm(nn.Module):
    """A loss of the student's logits and the teachers'."""

    def __init__(
        self, function: LogitLoss, temperature: float, labels: bool, together: TeacherCombiner
    ) -> None:
        super().__init__()
        self.function, self.temperature, self.labels = function, temperature, labels
        self.together = together

    def forward(self, seen: StepOutputs) -> Tensor:
        if self.labels:
            teacher = seen.teacher(self.temperature)
            return self.function(seen.outputs, teacher, seen.batch.labels)
        return self.together(seen, self.function, self.temperature)


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
    """The terms as modules; those of features have their taps on the networks.

    Args:
        specs: What was written.
        student, teachers: Not wrapped and not compiled yet. A term of features is the mean of what
            it is with each teacher, with a projector for each.
        shape: Height, width and channels of an image.
        classes: Their number, for `heads`.
        images: Number of training images, for the memory of `crd`.
        smoothing: Of labels in `ce`.
        seed: Of the projectors' weights.

    Raises:
        UserError: For a layer that is not there, or layers where none are looked at.
    """
    places = [
        partial(feature_terms.TermContext, student, teacher, shape, classes, images, seed + i)
        for i, teacher in enumerate(teachers or (None,))
    ]
    return [_build_term(spec, places, smoothing) for spec in specs]


def needs_teacher(spec: TermSpec) -> bool:
    """Whether a term looks at a teacher."""
    return TERMS[spec.name].looks_at != "labels" and spec.name != "heads"


def check(specs: Sequence[TermSpec], *, classes: int, batch_size: int, mixed: bool) -> None:
    """Refuse terms that cannot work with the data.

    Args:
        specs: What was written.
        classes: Their number.
        batch_size: Images of a batch.
        mixed: Whether images are mixed.

    Raises:
        UserError: With the term and what it needs.
    """
    for spec in specs:
        row = TERMS[spec.name]
        if mixed and row.whole:
            raise UserError(
                f"--loss {spec.name} needs whole labels, an image of one class each: leave --mixup "
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
    """Lines about what a term does otherwise than it says, for want of images.

    Args:
        specs: What was written.
        images: Number of training images; 0 where nobody knows.
    """
    lines = []
    for spec in specs:
        asked = spec.parameters.get("negatives")
        if asked is None and spec.name == "crd":
            asked = loss_spec.parameters(TERMS[spec.name].function)["negatives"]
        if asked is not None and asked > images - 1 > 0:
            lines.append(
                f"--loss {spec.name} compares each image with {images - 1} others, as many as "
                f"there are, and not with negatives={asked}"
            )
    return lines


def teaches_labels(spec: TermSpec) -> bool:
    """Whether a term tells the student which classes the images are of."""
    return not needs_teacher(spec)


def needs_raw_logits(spec: TermSpec) -> bool:
    """Whether a term looks at more than the probabilities that a teacher's logits stand for."""
    row = TERMS[spec.name]
    return needs_teacher(spec) and row.make is None and row.together is not mean_probability_loss


def min_images(spec: TermSpec) -> int:
    """The least number of images that a term can compare."""
    if spec.name == "dist" and spec.parameters.get("intra") == 0:
        return 1  # the rows alone
    return TERMS[spec.name].images


def _build_term(
    spec: TermSpec, places: Sequence[Callable[..., feature_terms.TermContext]], smoothing: float
) -> WeightedTerm:
    row = TERMS[spec.name]
    weight = row.weight if spec.weight is None else spec.weight
    given = loss_spec.parameters(row.function) | dict(spec.parameters)
    if row.looks_at != "features" and spec.layers:
        raise UserError(f"--loss {spec.name} looks at {row.looks_at}: leave its layers out")
    taught = needs_teacher(spec)
    if row.looks_at == "labels":
        if spec.name == "ce" and "smoothing" not in spec.parameters:
            given["smoothing"] = smoothing
        measure = LabelTerm(partial(row.function, **given), centred=spec.name == "mse")
    elif row.make is None:
        with_labels = row.looks_at == "logits and labels"
        temperature = given.get("temperature", 1.0)
        function = partial(row.function, **given)
        measure = LogitTerm(function, temperature, with_labels, row.together)
    else:
        make, function = row.make, partial(row.function, **given)
        each = [make(place(spec.layers), function) for place in places[: None if taught else 1]]
        measure = each[0] if len(each) == 1 else feature_terms.MeanOverTeachers(each)
    features = taught and row.make is not None
    return WeightedTerm(
        spec.name, weight, measure, needs_teacher=taught, needs_teacher_features=features
    )
