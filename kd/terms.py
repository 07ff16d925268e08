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
from kd import composition, featuring
from kd.composition import Spec
from kd.losses import feature, relation, response
from kd.networks import Classifier, Shape
from kd.seen import Seen
from kd.teachers import Teacher


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        function: Its keyword-only arguments are the parameters of the term.
        weight: The published one; of `cc`, whose paper gives none, that of a public reproduction.
        looks_at: `labels`, `logits`, `logits and labels`, or `features`.
        make: Of a term of features: what brings them to a common shape, see `kd.featuring`.
    """

    function: Callable[..., Any]
    weight: float
    looks_at: str
    make: Callable[..., nn.Module] | None = None


TERMS: Mapping[str, Row] = {
    "ce": Row(response.cross_entropy, 1, "labels"),
    "mse": Row(response.centred_mse, 1, "labels"),
    "kd": Row(response.logit_kl, 0.9, "logits"),
    "fm": Row(featuring.function_matching, 1, "logits"),
    "dkd": Row(response.dkd, 1, "logits and labels"),
    "dist": Row(response.dist, 2, "logits"),
    "ls": Row(response.standardised_kl, 9, "logits"),
    "logits": Row(response.logit_mse, 1, "logits"),
    "hard": Row(response.hard_distillation, 0.5, "logits"),
    "fitnet": Row(feature.fitnet, 100, "features", featuring.regressed),
    "at": Row(feature.attention_transfer, 1000, "features", featuring.pooled),
    "review": Row(feature.hierarchical_context, 1, "features", featuring.Fused),
    "vid": Row(feature.vid, 1, "features", featuring.variational),
    "mgd": Row(feature.mgd, 2e-5, "features", featuring.generated),
    "srd": Row(feature.log_sum, 2, "features", featuring.projected),
    "rkd-distance": Row(relation.rkd_distance, 25, "features", featuring.vectors),
    "rkd-angle": Row(relation.rkd_angle, 50, "features", featuring.vectors),
    "sp": Row(relation.similarity_preserving, 3000, "features", featuring.vectors),
    "pkt": Row(relation.probabilistic_transfer, 3e4, "features", featuring.vectors),
    "cc": Row(relation.correlation_congruence, 100, "features", featuring.vectors),
    "crd": Row(featuring.contrast, 0.8, "features", featuring.Contrasted),
    "heads": Row(featuring.self_taught, 1, "features", featuring.Heads),
}
FUNCTIONS = {name: row.function for name, row in TERMS.items()}


class Weighted(nn.Module):
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

    def forward(self, seen: Seen) -> Tensor:
        return self.weight * self.measure(seen)


class Labelled(nn.Module):
    """A loss of outputs and labels."""

    def __init__(self, function: Callable[..., Tensor], *, centred: bool) -> None:
        super().__init__()
        self.function, self.centred = function, centred

    def forward(self, seen: Seen) -> Tensor:
        labels = seen.batch.targets if self.centred else seen.batch.shares
        return self.function(seen.outputs, seen.batch.labels if labels is None else labels)


class Answered(nn.Module):
    """A loss of the student's logits and the teachers'."""

    def __init__(self, function: Callable[..., Tensor], temperature: float, labels: bool) -> None:
        super().__init__()
        self.function, self.temperature, self.labels = function, temperature, labels

    def forward(self, seen: Seen) -> Tensor:
        teacher = seen.teacher(self.temperature)
        if self.labels:
            return self.function(seen.outputs, teacher, seen.batch.labels)
        return self.function(seen.outputs, teacher)


def build(
    specs: Sequence[Spec],
    student: Classifier,
    teacher: Teacher | None = None,
    *,
    shape: Shape = (1, 1, 1),
    classes: int = 0,
    images: int = 0,
    smoothing: float = 0.0,
    seed: int = 0,
) -> list[Weighted]:
    """The terms as modules; those of features have their taps on the networks.

    Args:
        specs: What was written.
        student, teacher: Not wrapped and not compiled yet. Of several teachers the first.
        shape: Height, width and channels of an image.
        classes: Their number, for `heads`.
        images: Number of training images, for the memory of `crd`.
        smoothing: Of labels in `ce`.
        seed: Of the projectors' weights.

    Raises:
        UserError: For a layer that is not there, or layers where none are looked at.
    """
    place = partial(featuring.Place, student, teacher, shape, classes, images, seed)
    return [_term(spec, place, smoothing) for spec in specs]


def needs_teacher(spec: Spec) -> bool:
    """Whether a term looks at a teacher."""
    return TERMS[spec.name].looks_at != "labels" and spec.name != "heads"


def _term(spec: Spec, place: Callable[..., featuring.Place], smoothing: float) -> Weighted:
    row = TERMS[spec.name]
    weight = row.weight if spec.weight is None else spec.weight
    given = composition.parameters(row.function) | dict(spec.parameters)
    if row.looks_at != "features" and spec.layers:
        raise UserError(f"--loss {spec.name} looks at {row.looks_at}: leave its layers out")
    taught = needs_teacher(spec)
    if row.looks_at == "labels":
        if spec.name == "ce" and "smoothing" not in spec.parameters:
            given["smoothing"] = smoothing
        measure = Labelled(partial(row.function, **given), centred=spec.name == "mse")
    elif row.make is None:
        with_labels = row.looks_at == "logits and labels"
        temperature = given.get("temperature", 1.0)
        measure = Answered(partial(row.function, **given), temperature, with_labels)
    else:
        measure = row.make(place(spec.layers), partial(row.function, **given))
    features = taught and row.make is not None
    return Weighted(
        spec.name, weight, measure, needs_teacher=taught, needs_teacher_features=features
    )
