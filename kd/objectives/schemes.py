"""Training objectives: modules that return named, weighted loss terms for a batch.

The objective as a whole is the unit to wrap for several devices, so that taps and projectors work
there; only its `student` is saved as the result.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kd.data.batching import Batch, LayerVector, Unit
from kd.models.quantised import quantised_network
from kd.models.wrapped_network import WrappedNetwork
from kd.objectives.adversary import Adversary
from kd.objectives.feature_terms import TeacherLayers
from kd.objectives.step_outputs import StepOutputs
from kd.objectives.terms import WeightedTerm
from kd.parallel import sharding

FROZEN_PREFIX = "teachers."  # of the tensors that are neither trained nor stored


class Objective(Protocol):
    """What is minimised: a `torch.nn.Module` that maps a batch to weighted loss terms.

    `Distillation`, `Mutual` and `MeanTeacher` are objectives. Another scheme is a module with these
    members, too; no training step knows it by name.
    """

    @property
    def student(self) -> WrappedNetwork:
        """The network that is saved."""
        ...

    @property
    def trained_networks(self) -> Sequence[WrappedNetwork]:
        """The networks that are trained, in the order of their calls: the student first."""
        ...

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the terms of the loss, scalars by name, each times its weight.

        Args:
            batch: Images, labels and rows, perhaps with the teachers' logits.
        """
        ...

    def train(self, mode: bool = True) -> Any:
        """Set training mode, of all but frozen teachers."""
        ...

    @property
    def units(self) -> Mapping[str, Unit]:
        """What each term that `forward` returns is the mean over, by its name."""
        ...

    def checkpoint_state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint, by their names in the module.

        Weights, projectors and memories, but no frozen teachers; what is missing is neither trained
        nor sent to other processes.
        """
        ...

    def after_step(self, step: int, total: int) -> None:
        """Follow the weights after a step has changed them.

        Args:
            step: Number of steps that are done: 1, 2, ...
            total: Number of steps of the training.
        """
        ...

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the architectures of the trained networks do not decay."""
        ...


def as_module(objective: Objective) -> nn.Module:
    """The objective as the module that it is; types cannot say that it is both."""
    assert isinstance(objective, nn.Module)
    return objective


class Distillation(nn.Module):
    """A weighted sum of terms of labels, or of labels and frozen teachers.

    Attributes:
        student: The network that is trained.
        terms: Terms of the loss; their projectors are trained too.
        teachers: Networks that map the student's images to logits; always in evaluation mode,
            without gradients.
        by_label: Whether several teachers are weighted, for each image, by how well they know its
            label; else they have equal weights.
        adversary: Attack on the student whose images the terms of adversaries are of; None without
            such terms.
    """

    def __init__(
        self,
        student: WrappedNetwork,
        terms: Sequence[WeightedTerm],
        teachers: Sequence[nn.Module] = (),
        *,
        by_label: bool = False,
        adversary: Adversary | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.terms = nn.ModuleList(terms)
        self.teachers = nn.ModuleList(teacher.requires_grad_(False) for teacher in teachers)
        self.by_label = by_label
        self.adversary = adversary
        self.needs_answers = any(term.needs_answers for term in terms)
        self.needs_features = any(term.needs_teacher_features for term in terms)
        self.needs_logits = any(
            term.needs_teacher and not list(_teacher_layers(term)) for term in terms
        )
        self.train(self.training)

    def train(self, mode: bool = True) -> "Distillation":
        super().train(mode)
        self.teachers.eval()
        return self

    @property
    def trained_networks(self) -> Sequence[WrappedNetwork]:
        return (self.student,)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        terms = list(_weighted_terms(self.terms))
        answers = self._teacher_logits(batch)
        changed = self._adversarial_step(batch, answers)
        if changed is not None and not any(term.reads_clean for term in terms):
            step = replace(changed, adversarial=changed)  # one pass of the student less
        else:
            # After the changed images, for taps read what the network did last.
            outputs = self.student(batch.inputs)
            step = StepOutputs(batch, outputs, answers, self.by_label, changed)
        return {term.name: term(step) for term in terms}

    def teacher_layers(self) -> list[tuple[str, TeacherLayers]]:
        """What each term takes from the layers of each teacher, with the name of the term."""
        return [
            (term.name, layers)
            for term in _weighted_terms(self.terms)
            for layers in _teacher_layers(term)
        ]

    @property
    def needs_vectors_alone(self) -> bool:
        """Whether terms take nothing but vectors from teachers' layers, if anything."""
        return all(layers.vectors for _, layers in self.teacher_layers())

    @torch.no_grad()
    def ask(self, teacher: int, batch: Batch) -> tuple[Tensor, dict[LayerVector, Tensor]]:
        """A teacher's logits of a batch, and the vectors that terms take from its layers.

        Args:
            teacher: Number of the teacher.
            batch: The batch, on the teacher's device.
        """
        logits = self.teachers[teacher](batch.inputs_of(teacher)).float()
        vectors: dict[LayerVector, Tensor] = {}
        for _, layers in self.teacher_layers():
            if layers.teacher == teacher and layers.read is not None:
                vectors |= layers.read(batch)
        return logits, vectors

    @property
    def units(self) -> Mapping[str, Unit]:
        return {term.name: term.unit for term in _weighted_terms(self.terms)}

    def checkpoint_state(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.state_dict().items() if not k.startswith(FROZEN_PREFIX)}

    def after_step(self, step: int, total: int) -> None:
        pass

    def no_weight_decay(self) -> set[str]:
        return no_weight_decay_names(self.student, "student.network.")

    def _adversarial_step(self, batch: Batch, answers: tuple[Tensor, ...]) -> StepOutputs | None:
        """The outputs for the images that the attack has changed; None without an attack."""
        adversary, teachers = self.adversary, tuple(self.teachers)
        if adversary is None:
            return None
        together = None
        if adversary.needs_answers:
            together = StepOutputs(batch, answers[0], answers, self.by_label).combined_logits(1.0)
        images = adversary.change(batch, self.student, teachers, together, by_label=self.by_label)
        changed = replace(batch, inputs=images)
        if adversary.asks_teachers:
            with torch.no_grad():
                answers = tuple(teacher(changed.inputs) for teacher in teachers)
                if self.needs_features:  # taps read what the teachers did last
                    for teacher in teachers:
                        teacher(batch.inputs)
        return StepOutputs(changed, self.student(changed.inputs), answers, self.by_label)

    def _teacher_logits(self, batch: Batch) -> tuple[Tensor, ...]:
        if not self.needs_answers:
            return ()
        if batch.teacher_vectors is not None or not self.needs_features:
            known = batch.teacher_logits
            if known is not None:
                return known
        with torch.no_grad():
            return tuple(teacher(batch.inputs_of(i)) for i, teacher in enumerate(self.teachers))


class Mutual(nn.Module):
    """Deep mutual learning: students that teach each other while they learn.

    Each student minimises its terms of labels, and the mean over the other students of its terms
    with a teacher. Deviation: all take their steps at once, where the paper takes them in turn.

    Attributes:
        student: The first student, which is saved.
        peers: The other students.
        terms: Terms of the loss of each student.

    Source: Zhang, Xiang, Hospedales and Lu (2018), arXiv:1706.00384, equations 5 to 9.
    """

    def __init__(
        self,
        student: WrappedNetwork,
        peers: Sequence[WrappedNetwork],
        terms: Sequence[WeightedTerm],
    ) -> None:
        super().__init__()
        self.student = student
        self.peers = nn.ModuleList(peers)
        self.terms = nn.ModuleList(terms)

    @property
    def trained_networks(self) -> Sequence[WrappedNetwork]:
        peers = (peer for peer in self.peers if isinstance(peer, WrappedNetwork))
        return (self.student, *peers)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        outputs = [network(batch.inputs) for network in self.trained_networks]
        losses: dict[str, Tensor] = {}
        for i, logits in enumerate(outputs):
            others = [other.detach() for j, other in enumerate(outputs) if j != i]
            for term in _weighted_terms(self.terms):
                teachers = others if term.needs_teacher else [logits.detach()]
                values = [term(StepOutputs(batch, logits, (other,))) for other in teachers]
                losses[_numbered(term.name, i)] = torch.stack(values).mean()
        return losses

    @property
    def units(self) -> Mapping[str, Unit]:
        students = range(len(self.trained_networks))
        terms = list(_weighted_terms(self.terms))
        return {_numbered(term.name, i): term.unit for i in students for term in terms}

    def checkpoint_state(self) -> dict[str, Tensor]:
        return self.state_dict()

    def after_step(self, step: int, total: int) -> None:
        pass

    def no_weight_decay(self) -> set[str]:
        names = no_weight_decay_names(self.student, "student.network.")
        for i, peer in enumerate(self.trained_networks[1:]):
            names |= no_weight_decay_names(peer, f"peers.{i}.network.")
        return names


class MeanTeacher(nn.Module):
    """Self-distillation from the moving average of the student's own weights.

    Attributes:
        inner: The distillation from this average.
        decay: Decay of the average, which starts as a copy and follows faster at first.

    Source: Tarvainen and Valpola (2017), arXiv:1703.01780, also for the ramp of the decay,
    min(1 - 1/(step + 1), decay).
    """

    def __init__(
        self,
        student: WrappedNetwork,
        terms: Sequence[WeightedTerm],
        *,
        decay: float,
        adversary: Adversary | None = None,
    ) -> None:
        super().__init__()
        self.inner = Distillation(student, terms, [copy.deepcopy(student)], adversary=adversary)
        self.decay = decay

    @property
    def student(self) -> WrappedNetwork:
        return self.inner.student

    @property
    def trained_networks(self) -> Sequence[WrappedNetwork]:
        return (self.student,)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.inner(batch)

    @property
    def units(self) -> Mapping[str, Unit]:
        return self.inner.units

    def checkpoint_state(self) -> dict[str, Tensor]:
        return self.state_dict()

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        keep = min(1 - 1 / (step + 1), self.decay)
        average = self.inner.teachers[0].state_dict()
        for name, value in self.student.state_dict().items():
            if value.is_floating_point():
                average[name].lerp_(sharding.unshard(value), 1 - keep)
            else:
                average[name].copy_(value)

    def no_weight_decay(self) -> set[str]:
        return no_weight_decay_names(self.student, "inner.student.network.")


def _numbered(name: str, student: int) -> str:
    """The name of a term of one of several students; the first has it plain."""
    return name if student == 0 else f"{name}_{student + 1}"


def _weighted_terms(terms: nn.ModuleList) -> Iterator[WeightedTerm]:
    for term in terms:
        assert isinstance(term, WeightedTerm)
        yield term


def _teacher_layers(term: WeightedTerm) -> Iterator[TeacherLayers]:
    for module in term.modules():
        layers = getattr(module, "teacher_layers", None)
        if isinstance(layers, TeacherLayers):
            yield layers


def no_weight_decay_names(student: WrappedNetwork, prefix: str) -> set[str]:
    """Names of parameters without decay: timm's, such as position embeddings, and learned steps."""
    names = getattr(student.network, "no_weight_decay", lambda: ())
    steps = quantised_network.step_names(student.network)
    return {prefix + name for name in (*names(), *steps)}
