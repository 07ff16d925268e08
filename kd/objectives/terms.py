"""The terms of a loss: pure functions, and modules that apply them to a training step.

The table `TERMS` has for each name its function, the weight in its paper, and all that the term
needs or changes, so that no other place knows a term by its name. A new loss is a function in
`kd.losses`, its short name in `kd.losses.short_names`, and a row in this table, by `_label_row`,
`_logit_row`, `_adversarial_row`, `_feature_row`, `_state_row` or `_token_row`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from dsdistill.harness.errors import UserError
from kd.data.batching import Unit
from kd.losses import ensemble, response, short_names
from kd.models.language.text_teachers import TextTeacher
from kd.models.teachers import Teacher
from kd.models.token_inputs import TokenInputs
from kd.models.wrapped_network import WrappedNetwork
from kd.objectives import feature_terms, loss_spec, token_terms
from kd.objectives.adversary import Against
from kd.objectives.feature_terms import LossFunction, TermContext
from kd.objectives.loss_spec import LayerPair
from kd.objectives.step_outputs import StepOutputs
from kd.objectives.taps import Sample, try_out

Parameters = Mapping[str, Any]
# Applies a loss at a temperature to the student's logits and those of all teachers.
TeacherCombiner = Callable[[StepOutputs, LossFunction, float], Tensor]
# A user's loss of the student's logits, the teachers' (None without them), and the labels.
LossOfLogits = Callable[[Tensor, Tensor | None, Tensor], Tensor]
LabelKind = Literal["one", "several", "any"]
# Builds the module of a term from its function and, for each teacher, networks and layers.
TermMaker = Callable[[partial, Sequence[TermContext]], nn.Module]


def mean_probability_loss(step: StepOutputs, function: LossFunction, temperature: float) -> Tensor:
    """Apply a loss to the mean of the teachers' probabilities at the loss's temperature."""
    return function(step.student_logits, step.combined_logits(temperature))


def mean_binary_loss(step: StepOutputs, function: LossFunction, temperature: float) -> Tensor:
    """Apply a loss to the mean of the teachers' probabilities of each class by itself."""
    if len(step.teacher_logits) == 1:
        return function(step.student_logits, step.teacher_logits[0])
    teacher = ensemble.combined_binary_logits(step.teacher_logits, temperature=temperature)
    return function(step.student_logits, teacher)


def labelled_loss(step: StepOutputs, function: LossFunction, temperature: float) -> Tensor:
    """Apply a loss to the labels and the mean of the teachers' probabilities."""
    return function(step.student_logits, step.combined_logits(temperature), step.batch.labels)


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


def _always(parameters: Parameters) -> bool:
    return True


def _per_row(parameters: Parameters) -> Unit:
    """Count images, or texts."""
    return "rows"


def _per_token(parameters: Parameters) -> Unit:
    """Count real tokens."""
    return "tokens"


def _per_target(parameters: Parameters) -> Unit:
    """Count tokens with a target."""
    return "targets"


def _per_chosen_token(parameters: Parameters) -> Unit:
    """Count real tokens, or with `targets` those with a target."""
    return "targets" if parameters["targets"] else "tokens"


def _no_remark(parameters: Parameters, images: int) -> str | None:
    """Make no remark, whatever the parameters."""


@dataclass(frozen=True)
class TermDefinition:
    """A row of the table: a loss, and what its term needs.

    Attributes:
        function: The loss; its keyword-only arguments are the parameters of the term.
        weight: Published weight; for `cc`, whose paper has none, that of a public reproduction.
        inputs: What the loss takes, for messages: `labels`, `logits`, `features`, ...
        make: Builds the module that maps `StepOutputs` to the term without its weight.
        needs_teacher: Whether the term takes a teacher's outputs.
        reads_layers: Whether it reads layers of the networks.
        centred: Whether it fits the student's outputs to centred labels: they are no logits then.
        needs_logits: Whether the student's outputs must be logits.
        smooths_labels: Whether it has a parameter `smoothing`, by default the recipe's.
        weighs_classes: Whether it takes weights of classes, for its cross-entropy of labels.
        label_kind: Labels that it works with: one class an image, several labels, or any.
        needs_raw_logits: Whether it needs a teacher's logits and not only their probabilities.
        images: Smallest number of images in a batch.
        compares_images: Whether it compares images with each other, given its parameters; else one
            image is enough.
        classes: Smallest number of classes; 1 if the networks may give scores.
        whole: Whether each image must be of one class, not mixed.
        needs_rows: Whether it knows each training image by its number.
        unit: What the term is the mean over, given its parameters; of a loss of logits whose
            networks answer for tokens it is the tokens with a target.
        of_maps: Whether it takes maps, which only images have.
        of_texts: Whether it takes tokens, which only texts have.
        of_tokens: Whether it takes the networks' answers for tokens.
        aligned: Whether it compares token by token, so that student and teacher need the same ones.
        task: Task that gives its targets; None: any, or none are needed.
        against: What the attack drives the student away from whose images the term is of; None:
            it is of the images as they are.
        remark: A line about its parameters and the number of training images, or None.
    """

    function: Callable[..., Any]
    weight: float
    inputs: str
    make: TermMaker
    needs_teacher: bool = True
    reads_layers: bool = False
    centred: bool = False
    needs_logits: bool = False
    smooths_labels: bool = False
    weighs_classes: bool = False
    label_kind: LabelKind = "one"
    needs_raw_logits: bool = False
    images: int = 1
    compares_images: Callable[[Parameters], bool] = _always
    classes: int = 2
    whole: bool = False
    needs_rows: bool = False
    unit: Callable[[Parameters], Unit] = _per_row
    of_maps: bool = False
    of_texts: bool = False
    of_tokens: bool = False
    aligned: bool = False
    task: str | None = None
    against: Against | None = None
    remark: Callable[[Parameters, int], str | None] = _no_remark

    @property
    def uses_labels(self) -> bool:
        """Whether the term, or the attack that it is against, takes labels."""
        alone = not self.needs_teacher and self.against != "itself"
        return alone or self.whole or self.against == "labels"


def _label_row(
    function: LossFunction, weight: float, *, centred: bool = False, **needs: Any
) -> TermDefinition:
    """Define a term of the student's outputs and the labels."""

    def make(function: partial, contexts: Sequence[TermContext]) -> nn.Module:
        return LabelTerm(function, centred=centred)

    return TermDefinition(
        function, weight, "labels", make, needs_teacher=False, centred=centred, **needs
    )


def _logit_row(
    function: LossFunction,
    weight: float,
    combine: TeacherCombiner = mean_probability_loss,
    *,
    inputs: str = "logits",
    **needs: Any,
) -> TermDefinition:
    """Define a term of the student's logits and those of all teachers, which `combine` applies."""

    def make(function: partial, contexts: Sequence[TermContext]) -> nn.Module:
        return LogitTerm(function, combine, needs.get("images", 1))

    return TermDefinition(function, weight, inputs, make, **needs)


def _adversarial_row(
    function: LossFunction, weight: float, against: Against, make: TermMaker, **needs: Any
) -> TermDefinition:
    """Define a term of images that an attack on the student has changed."""
    options = {"needs_logits": True, "against": against, **needs}
    return TermDefinition(function, weight, "logits of adversaries", make, **options)


def _make_adversarial_label_term(
    function: partial, contexts: Sequence[TermContext]
) -> "AdversarialTerm":
    return AdversarialTerm(LabelTerm(function, centred=False))


def _make_adversarial_logit_term(
    function: partial, contexts: Sequence[TermContext]
) -> "AdversarialTerm":
    return AdversarialTerm(LogitTerm(function, mean_probability_loss))


def _make_stability_term(function: partial, contexts: Sequence[TermContext]) -> "StabilityTerm":
    return StabilityTerm(function)


def _feature_row(
    function: Callable[..., Any],
    weight: float,
    make_one: Callable[[TermContext, partial], nn.Module],
    *,
    needs_teacher: bool = True,
    **needs: Any,
) -> TermDefinition:
    """Define a term of layers, which is the mean over the teachers if it needs any."""

    def make(function: partial, contexts: Sequence[TermContext]) -> nn.Module:
        each = [make_one(context, function) for context in contexts[: None if needs_teacher else 1]]
        return each[0] if len(each) == 1 else feature_terms.MeanOverTeachers(each)

    options = {"needs_teacher": needs_teacher, "reads_layers": True, "label_kind": "any", **needs}
    return TermDefinition(function, weight, "features", make, **options)


def _state_row(
    function: Callable[..., Any],
    weight: float,
    make_one: Callable[[TermContext, partial], nn.Module],
    **needs: Any,
) -> TermDefinition:
    """Define a term of the blocks of transformers, which compares them token by token."""
    options = {"unit": _per_token, "of_texts": True, "aligned": True, **needs}
    return _feature_row(function, weight, make_one, **options)


def _token_row(
    name: str,
    function: Callable[..., Any],
    term: Callable[[str, partial, Sequence[TermContext]], nn.Module],
    unit: Callable[[Parameters], Unit],
    *,
    inputs: str,
    **needs: Any,
) -> TermDefinition:
    """Define a term of weight 1 of the networks' answers for tokens."""
    options = {"unit": unit, "of_texts": True, "of_tokens": True, **needs}
    return TermDefinition(function, 1, inputs, partial(term, name), **options)


def _compares_columns(parameters: Parameters) -> bool:
    """Whether DIST compares columns, the images of a class, and not rows alone."""
    return parameters["intra"] != 0


TERMS: Mapping[str, TermDefinition] = {
    "ce": _label_row(short_names.ce, 1, smooths_labels=True, weighs_classes=True),
    "mse": _label_row(short_names.mse, 1, centred=True, whole=True, classes=1),
    "kd": _logit_row(short_names.kd, 0.9),
    "fm": _logit_row(short_names.fm, 1),
    "dkd": _logit_row(
        short_names.dkd, 1, labelled_loss, inputs="logits and labels", classes=3, whole=True
    ),
    "dist": _logit_row(short_names.dist, 2, images=2, compares_images=_compares_columns),
    "ls": _logit_row(short_names.ls, 9, mean_standardised_loss, classes=3, needs_raw_logits=True),
    "logits": _logit_row(
        short_names.logits, 1, mean_logit_loss, needs_raw_logits=True, classes=1, label_kind="any"
    ),
    "hard": _logit_row(short_names.hard, 0.5),
    "bce": _label_row(short_names.bce, 1, weighs_classes=True, label_kind="several"),
    # The authors' weight of 10 is beside a cross-entropy that is summed over the batch.
    "mld": _logit_row(short_names.mld, 0.9, mean_binary_loss, label_kind="several"),
    "adv-ce": _adversarial_row(
        short_names.adv_ce,
        1,
        "labels",
        _make_adversarial_label_term,
        needs_teacher=False,
        smooths_labels=True,
        weighs_classes=True,
        whole=True,
    ),
    "trades": _adversarial_row(
        short_names.trades, 6, "itself", _make_stability_term, needs_teacher=False
    ),
    "ard": _adversarial_row(short_names.ard, 1, "labels", _make_adversarial_logit_term, whole=True),
    "rslad": _adversarial_row(short_names.rslad, 5 / 6, "teacher", _make_adversarial_logit_term),
    "adaad": _adversarial_row(short_names.adaad, 1, "moving teacher", _make_adversarial_logit_term),
    "fitnet": _feature_row(short_names.fitnet, 100, feature_terms.regressor_term, of_maps=True),
    "at": _feature_row(short_names.at, 1000, feature_terms.map_term, of_maps=True),
    "review": _feature_row(short_names.review, 1, feature_terms.FusionTerm, of_maps=True),
    "vid": _feature_row(short_names.vid, 1, feature_terms.variational_term, of_maps=True),
    "mgd": _feature_row(short_names.mgd, 2e-5, feature_terms.generator_term, of_maps=True),
    "srd": _feature_row(short_names.srd, 2, feature_terms.projector_term, images=2),
    "rkd-distance": _feature_row(short_names.rkd_distance, 25, feature_terms.vector_term, images=2),
    "rkd-angle": _feature_row(short_names.rkd_angle, 50, feature_terms.vector_term, images=3),
    "sp": _feature_row(short_names.sp, 3000, feature_terms.vector_term, images=2),
    "pkt": _feature_row(short_names.pkt, 3e4, feature_terms.vector_term, images=2),
    "cc": _feature_row(short_names.cc, 100, feature_terms.vector_term, images=2),
    "irg": _feature_row(short_names.irg, 5, feature_terms.graph_term, images=2),
    "crd": _feature_row(
        feature_terms.crd_parameters,
        0.8,
        feature_terms.CrdTerm,
        whole=True,
        needs_rows=True,
        label_kind="one",
        remark=feature_terms.crd_remark,
    ),
    "adv": _feature_row(
        feature_terms.discriminator_parameters, 0.1, feature_terms.DiscriminatorTerm
    ),
    "heads": _feature_row(
        short_names.heads,
        1,
        feature_terms.DeepSupervisionTerm,
        needs_teacher=False,
        needs_logits=True,
        weighs_classes=True,
        label_kind="one",
    ),
    "hidden": _state_row(short_names.hidden, 1, token_terms.HiddenTerm),
    "scores": _state_row(short_names.scores, 1, token_terms.ScoresTerm),
    # The authors' weights of 10 to 1000 are of a mean over all values: 0.003 to 0.3 for BERT-base.
    "patient": _state_row(
        short_names.patient, 100, token_terms.PatientTerm, unit=_per_row, aligned=False
    ),
    "cosine": _state_row(short_names.cosine, 1, token_terms.CosineTerm),
    "relations": _state_row(short_names.relations, 1, token_terms.RelationsTerm),
    "mlm": _token_row(
        "mlm",
        short_names.mlm,
        token_terms.TokenLabelTerm,
        _per_target,
        inputs="targets of tokens",
        needs_teacher=False,
        task="mlm",
    ),
    "clm": _token_row(
        "clm",
        short_names.clm,
        token_terms.TokenLabelTerm,
        _per_target,
        inputs="targets of tokens",
        needs_teacher=False,
        task="causal",
    ),
    "tokens": _token_row(
        "tokens",
        short_names.tokens,
        token_terms.TokenLogitTerm,
        _per_chosen_token,
        inputs="logits of tokens",
        aligned=True,
    ),
}


@dataclass(frozen=True)
class Term:
    """A term of a loss, as the user gave it.

    Attributes:
        name: Name in the table.
        definition: Row of the table.
        weight: Factor of the term.
        given: Parameters that were given.
        layers: Pairs of layers, for terms of features.
    """

    name: str
    definition: TermDefinition
    weight: float
    given: Parameters
    layers: tuple[LayerPair, ...] = ()

    @property
    def parameters(self) -> dict[str, Any]:
        """All parameters of the term, those that were not given at their defaults."""
        return loss_spec.parameters(self.definition.function) | dict(self.given)

    @property
    def unit(self) -> Unit:
        """What the term is the mean over, unless the networks' answers change it."""
        return self.definition.unit(self.parameters)

    @property
    def smoothing(self) -> float | None:
        """Label smoothing that was given to the term; None without it."""
        return self.given.get("smoothing") if self.definition.smooths_labels else None

    @property
    def min_images(self) -> int:
        """The smallest number of images that the term can compare."""
        compares = self.definition.compares_images(self.parameters)
        return self.definition.images if compares else 1


def parse(loss: str) -> tuple[Term, ...]:
    """Parse a loss as on the command line, see `kd.objectives.loss_spec`.

    Raises:
        UserError: For an unknown term or parameter, or a value out of its range.
    """
    specs = loss_spec.parse(loss, {name: row.function for name, row in TERMS.items()})
    rows = (TERMS[spec.name] for spec in specs)
    return tuple(
        Term(
            spec.name,
            row,
            row.weight if spec.weight is None else spec.weight,
            spec.parameters,
            spec.layers,
        )
        for spec, row in zip(specs, rows, strict=True)
    )


class WeightedTerm(nn.Module):
    """A term of a loss, times its weight.

    Attributes:
        name: Name in the table.
        weight: Factor of the term.
        measure: Module that maps `StepOutputs` to the unweighted term.
        needs_teacher: Whether the term takes a teacher's outputs.
        needs_teacher_features: Whether the term takes features of a teacher's layers.
        unit: What the term is the mean over.
        against: Of adversaries, what the attack drives the student away from; else None.
    """

    def __init__(
        self,
        name: str,
        weight: float,
        measure: nn.Module,
        *,
        needs_teacher: bool,
        needs_teacher_features: bool = False,
        unit: Unit = "rows",
        against: Against | None = None,
    ) -> None:
        super().__init__()
        self.name, self.weight, self.measure = name, weight, measure
        self.needs_teacher = needs_teacher
        self.unit: Unit = unit
        self.against: Against | None = against
        self.needs_teacher_features = needs_teacher_features

    @property
    def needs_answers(self) -> bool:
        """Whether the term takes the teachers' answers for the images as they are."""
        return self.needs_teacher and self.against != "moving teacher"

    @property
    def reads_clean(self) -> bool:
        """Whether the term takes the student's outputs for the images as they are."""
        return self.against in (None, "itself")

    def forward(self, step: StepOutputs) -> Tensor:
        return self.weight * self.measure(step)


class LabelTerm(nn.Module):
    """A loss of the student's outputs and the labels."""

    def __init__(self, function: Callable[..., Tensor], *, centred: bool) -> None:
        super().__init__()
        self.function, self.centred = function, centred

    def forward(self, step: StepOutputs) -> Tensor:
        rows = step.rows
        batch = rows.batch
        if not len(batch):  # no token with a target
            return 0 * step.student_logits.sum()
        if self.centred:
            labels = batch.labels if batch.targets is None else batch.targets
        else:
            labels = batch.labels_or_shares
        return self.function(rows.student_logits, labels)


class LogitTerm(nn.Module):
    """A loss of the student's logits and the teachers'; 0 of fewer tokens than it can compare."""

    def __init__(self, function: partial, combine: TeacherCombiner, least: int = 1) -> None:
        super().__init__()
        self.function, self.combine, self.least = function, combine, least
        self.temperature = function.keywords.get("temperature", 1.0)

    def forward(self, step: StepOutputs) -> Tensor:
        rows = step.rows
        if rows is not step and len(rows.batch) < self.least:
            return 0 * step.student_logits.sum()
        return self.combine(rows, self.function, self.temperature)


class AdversarialTerm(nn.Module):
    """A term at the images that an attack has changed."""

    def __init__(self, measure: nn.Module) -> None:
        super().__init__()
        self.measure = measure

    def forward(self, step: StepOutputs) -> Tensor:
        return self.measure(step.at_adversaries)


class StabilityTerm(nn.Module):
    """A loss of the student's logits for changed images and for the same images as they are."""

    def __init__(self, function: partial) -> None:
        super().__init__()
        self.function = function

    def forward(self, step: StepOutputs) -> Tensor:
        return self.function(step.at_adversaries.student_logits, step.student_logits)


class UserTerm(nn.Module):
    """A user's function of the student's logits, the teachers' mean logits, and the labels."""

    def __init__(self, function: LossOfLogits) -> None:
        super().__init__()
        self.function = function

    def forward(self, step: StepOutputs) -> Tensor:
        teacher = step.mean_logits() if step.teacher_logits else None
        return self.function(step.student_logits, teacher, step.batch.labels_or_shares)


def user_term(name: str, function: LossOfLogits, *, taught: bool) -> WeightedTerm:
    """Build the term of a user's function, with weight 1.

    Args:
        name: Name of the term in the figures of a training.
        function: The function; a module's parameters are trained too.
        taught: Whether there are teachers, whose logits it gets.
    """
    return WeightedTerm(name, 1.0, UserTerm(function), needs_teacher=taught)


def build(
    terms: Sequence[Term],
    student: WrappedNetwork,
    teachers: Sequence[Teacher | TextTeacher | WrappedNetwork] = (),
    *,
    sample: Sample = (1, 1, 1),
    classes: int = 0,
    images: int = 0,
    smoothing: float = 0.0,
    seed: int = 0,
    teacher_sample: Sample | None = None,
    class_weights: Tensor | None = None,
) -> list[WeightedTerm]:
    """Build the modules of terms; terms of features put taps on the networks.

    Args:
        terms: Terms of the loss, from `parse`.
        student, teachers: Networks before they are wrapped or compiled. With several teachers, a
            term of features is the mean over the teachers, with a projector for each.
        sample: What the networks are tried on: height, width and channels of an image, or texts.
        classes: Number of classes, for `heads`.
        images: Number of training images or texts, for the memory of `crd`.
        smoothing: Label smoothing of `ce` and `adv-ce`, unless the term has one of its own.
        seed: Seed of the projectors' weights.
        teacher_sample: What the teachers are tried on; None for `sample`.
        class_weights: Weight of each class in the cross-entropy of labels, on the device of the
            training; None for 1.

    Raises:
        UserError: For an unknown layer, or layers in a term without features.
    """
    contexts = [
        partial(TermContext, student, teacher, i, sample, classes, images, seed + i)
        for i, teacher in enumerate(teachers or (None,))
    ]
    answers_for_tokens = isinstance(sample, TokenInputs) and try_out(student, sample).ndim == 3
    return [
        _build_term(
            term,
            [make(term.layers, teacher_sample) for make in contexts],
            smoothing,
            answers_for_tokens,
            class_weights,
        )
        for term in terms
    ]


def _build_term(
    term: Term,
    contexts: Sequence[TermContext],
    smoothing: float,
    answers_for_tokens: bool,
    class_weights: Tensor | None,
) -> WeightedTerm:
    needs, parameters = term.definition, term.parameters
    on_answers = not (needs.reads_layers or needs.of_tokens)
    if term.layers and not needs.reads_layers:
        raise UserError(
            f"--loss {term.name} takes {needs.inputs}, not features: leave its layers out"
        )
    if needs.smooths_labels and term.smoothing is None:
        parameters["smoothing"] = smoothing
    if needs.weighs_classes and class_weights is not None:
        parameters["class_weights"] = class_weights
    return WeightedTerm(
        term.name,
        term.weight,
        needs.make(partial(needs.function, **parameters), contexts),
        needs_teacher=needs.needs_teacher,
        needs_teacher_features=needs.needs_teacher and needs.reads_layers,
        unit="targets" if answers_for_tokens and on_answers else term.unit,
        against=needs.against,
    )
