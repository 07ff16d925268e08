"""Train a network on nodes from labels, or from a teacher that may see the graph: GLNN and LSP.

    teacher = Gcn(graph.width, graph.classes)
    distill(teacher, None, graph)
    student = Perceptron(graph.width, graph.classes)
    distill(student, teacher, graph)

Every step takes the whole graph. The loop, the optimizer and the choice of the best epoch are those
of `kd.distill`.

Source: Zhang et al. (2022), arXiv:2110.08727 (graph-less neural networks); Yang et al. (2020),
arXiv:2003.10477 (local structure preserving). The loss on labels is over the nodes of `train`, that
of the teacher over all nodes of the graph.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Self, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsdistill.harness.errors import UserError, first_line, name_arguments
from dsdistill.harness.runs import progress as progress_display
from kd import api_arguments
from kd.api import DistillResult
from kd.api_arguments import RecipeFields
from kd.data.batching import Batch, Unit
from kd.evaluation import scoring
from kd.graphs.graph import UNKNOWN, Graph
from kd.graphs.networks import GraphNetwork, Perceptron
from kd.losses.graph import local_structure as local_structure_loss
from kd.models.wrapped_network import WrappedNetwork, logits
from kd.models.zoo.modes import evaluation_mode
from kd.objectives import loss_checks, terms
from kd.objectives.schemes import no_weight_decay_names
from kd.objectives.step_outputs import StepOutputs
from kd.objectives.terms import Term, WeightedTerm
from kd.parallel import engine
from kd.recipe import Recipe, override
from kd.training import borrowing, dry_run, optimization
from kd.training.loop import train as run_training
from kd.training.rounds import Callback, RoundRecorder

# Optimizer, length and patience of GLNN's published code, with the weight decay of GCN's paper; on
# labels alone as from a teacher.
RECIPE = Recipe(
    epochs=500,
    optimizer="adam",
    lr=0.01,
    weight_decay=5e-4,
    schedule="constant",
    patience=50,
    validate_every=1,
)
LABEL_LOSS, TEACHER_LOSS = "ce:1", "kd:1:temperature=1"
Validate = Callable[[nn.Module], Mapping[str, float]]
_WITHOUT_EFFECT = ("accumulate", "precision")  # an epoch is one batch; sparse products are float32
_TAKEN = ("labels", "logits", "logits and labels")  # inputs of the terms of these trainings


class NodeClassifier(WrappedNetwork):
    """A network on the nodes of one graph: node numbers in, logits out.

    Attributes:
        graph: The graph.
    """

    def __init__(self, network: nn.Module, graph: Graph) -> None:
        super().__init__(network)
        self.graph = graph

    def forward(self, nodes: Int[Tensor, " m"]) -> Float[Tensor, "m k"]:
        if isinstance(self.network, GraphNetwork):
            return logits(self.network(self.graph))[nodes]
        if isinstance(self.network, Perceptron) and len(nodes) == len(self.graph):
            return self.network(self.graph.inputs)[nodes]  # sparse where they may be
        return logits(self.network(self.graph.features[nodes]))

    def with_network(self, network: nn.Module) -> Self:
        return type(self)(network, self.graph)


@dataclass(frozen=True, eq=False)
class NodeBatches:
    """Nodes of a graph as the one batch of an epoch, as a `BatchSource` and to evaluate on.

    Attributes:
        batch: Node numbers as inputs, labels, and the teacher's logits where there is a teacher.
    """

    batch: Batch

    @property
    def device(self) -> torch.device:
        return self.batch.labels.device

    @property
    def sizes(self) -> list[int]:
        return [len(self.batch)]

    def __len__(self) -> int:
        return 1

    def epoch(
        self, seed: int, epoch: int, *, first: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Yield the batch, unless the epoch is entered after it."""
        return iter([self.batch][first:])

    def in_order(self, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Yield the batch."""
        return iter([self.batch])


class NodeDistillation(nn.Module):
    """A weighted sum of terms: of labels over the nodes that have one, of the teacher over all.

    Attributes:
        student: The network that is trained.
        terms: Terms of the loss.
        structure: Weight of local structure preserving, the teacher's embeddings and σ; None
            without it.
    """

    def __init__(
        self,
        student: NodeClassifier,
        terms: Sequence[WeightedTerm],
        labelled: Sequence[bool],
        structure: "LocalStructure | None",
    ) -> None:
        """Make the objective.

        Args:
            student, terms, structure: Attributes.
            labelled: For each term whether it takes labels.
        """
        super().__init__()
        self.student = student
        self.terms = nn.ModuleList(terms)
        self.labelled, self.structure = tuple(labelled), structure

    @property
    def trained_networks(self) -> Sequence[WrappedNetwork]:
        return (self.student,)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        hidden = None
        if self.structure is None:
            outputs = self.student(batch.inputs)
        else:
            network, graph = self.student.network, self.student.graph
            assert isinstance(network, GraphNetwork)
            hidden = network.hidden(graph)
            outputs = logits(network.last(hidden, graph))
        step = StepOutputs(batch, outputs, batch.teacher_logits or ())
        with_label = _labelled_nodes(step)
        values = {
            term.name: term(with_label if takes_labels else step)
            for term, takes_labels in zip(_weighted(self.terms), self.labelled, strict=True)
        }
        if self.structure is not None and hidden is not None:
            values["local_structure"] = self.structure(hidden, self.student.graph)
        return values

    @property
    def units(self) -> Mapping[str, Unit]:
        names = [term.name for term in _weighted(self.terms)]
        return dict.fromkeys(names + ["local_structure"] * (self.structure is not None), "rows")

    def checkpoint_state(self) -> dict[str, Tensor]:
        return self.state_dict()

    def after_step(self, step: int, total: int) -> None:
        pass

    def no_weight_decay(self) -> set[str]:
        return no_weight_decay_names(self.student, "student.network.")


@dataclass(frozen=True, eq=False)
class LocalStructure:
    """Local structure preserving.

    Attributes:
        weight: Factor of the loss.
        teacher: The teacher's embeddings of all nodes.
    """

    weight: float
    teacher: Float[Tensor, "n m"]

    def __call__(self, student: Float[Tensor, "n d"], graph: Graph) -> Tensor:
        return self.weight * local_structure_loss(student, self.teacher, graph.neighbours)


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    graph: Graph,
    *,
    loss: str | None = None,
    local_structure: float = 0.0,
    device: str = "auto",
    seed: int = 0,
    callbacks: Callback | Sequence[Callback] | None = None,
    progress: bool = True,
    **recipe_fields: Unpack[RecipeFields],
) -> DistillResult:
    """Train a network on the nodes of a graph, from a teacher or from labels alone.

    The student is trained in place, as by `kd.distill`. Labels of validation nodes only choose the
    best epoch, and those of test nodes are not read.

    Args:
        student: A `GraphNetwork`, or a module that maps features (n, d) to logits (n, k).
        teacher: A trained network of either kind; None for none.
        graph: The graph that is trained on. For the inductive setting it is the one that
            `Graph.hold_out` returns.
        loss: Weighted terms as for `kd.distill`: those of labels and of logits. The default with a
            teacher is `kd:1:temperature=1`, as published, and without one `ce:1`.
        local_structure: Weight of local structure preserving, where student and teacher are both
            `GraphNetwork`s; published: 100.
        device: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`.
        seed: Seed of dropout.
        callbacks, progress: As for `kd.distill`.
        **recipe_fields: Fields of `RECIPE` to change: `epochs`, `lr`, `weight_decay`, ...

    Returns:
        The student and the figures of the training; `accuracy` is that on validation nodes.

    Raises:
        UserError: If an argument breaks a rule, networks, graph and loss do not fit together, or
            the loss is not finite.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(name_arguments(api_arguments.PHRASES, api_arguments.TEXTS))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for name, module in (("student", student), ("teacher", teacher)):
            if not isinstance(module, nn.Module) and (name == "student" or module is not None):
                raise UserError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
        taught_by = [teacher] if teacher is not None else []
        recipe = _recipe(loss, recipe_fields, graph, taught=bool(taught_by))
        chosen = _terms(recipe, graph, alone=not taught_by, structure=local_structure > 0)
        stack.enter_context(borrowing.borrow(student, taught_by))
        on = stack.enter_context(engine.temporary(device))
        if on.num_processes > 1:
            raise UserError("kd.graphs trains in one process: start it without torchrun")
        graph = graph.to(on.device)
        classifier = NodeClassifier(student.to(on.device), graph)
        nodes = torch.arange(len(graph), device=on.device)
        if not (taught_by or isinstance(student, GraphNetwork)):
            nodes = graph.train  # nothing is learned from the others
        classes = _count_outputs("student", classifier, nodes)
        if classes < graph.classes:
            raise UserError(f"student has {classes} outputs, and the graph {graph.classes} classes")
        known = torch.isin(nodes, graph.train)
        labels = torch.where(known, graph.labels[nodes], UNKNOWN)
        answers = tuple(_answers(each.to(on.device), graph, classes) for each in taught_by)
        batch = Batch(nodes, labels, teacher_logits=answers or None, index=nodes)
        objective = NodeDistillation(
            classifier,
            terms.build(chosen, classifier, smoothing=recipe.label_smoothing, seed=seed),
            ["labels" in term.definition.inputs for term in chosen],
            _structure(local_structure, student, teacher, graph),
        )
        assert recipe.loss is not None
        dry_run.check_batch(objective, recipe.loss, batch, on=on)
        recorder = RoundRecorder(api_arguments.check_callbacks(callbacks), ())
        show = stack.enter_context(progress_display.bar(recipe.epochs or 1)) if progress else None
        state = run_training(
            objective,
            NodeBatches(batch),
            recipe,
            seed,
            on=on,
            validate=_validator(classifier, on) if len(graph.validation) else None,
            stop_early=lambda: recorder.stop,
            log=recorder,
            show=show,
        )
        student.load_state_dict(state.best)
        figures = state.kept[0].figures
        return DistillResult(
            student,
            tuple(recorder.rounds),
            state.best_epoch,
            figures.get("accuracy"),
            figures.get("nll"),
            state.epoch,
            state.step,
            time.perf_counter() - started,
        )


def predict(network: nn.Module, graph: Graph) -> Float[Tensor, "n k"]:
    """Logits of all nodes in evaluation mode, without gradients; the network's mode is restored.

    Args:
        network: A `GraphNetwork`, or a module that maps features to logits.
        graph: The graph, on the network's device.
    """
    nodes = torch.arange(len(graph), device=graph.features.device)
    with evaluation_mode(network), torch.no_grad():
        return NodeClassifier(network, graph)(nodes)


def accuracy(network: nn.Module, graph: Graph, nodes: Int[Tensor, " m"]) -> float:
    """Share of nodes whose class a network names rightly, in evaluation mode.

    Args:
        network, graph: As for `predict`.
        nodes: Numbers of nodes that have a label.
    """
    right = predict(network, graph)[nodes].argmax(1) == graph.labels[nodes]
    return right.float().mean().item()


def _recipe(loss: str | None, fields: Mapping[str, Any], graph: Graph, *, taught: bool) -> Recipe:
    """The recipe with its loss, checked."""
    given = api_arguments.check_fields(fields)
    for name in _WITHOUT_EFFECT:
        if name in given:
            raise UserError(f"{name} has no effect on the nodes of a graph: leave it out")
    if not len(graph.validation):
        api_arguments.refuse_validation_fields(given)
    if loss is not None and not isinstance(loss, str):
        raise UserError(f"loss must be a text such as ce:0.5,kd:0.5, got {loss!r}")
    recipe = override(RECIPE, given)
    patience = recipe.patience if len(graph.validation) else None
    loss = loss or (TEACHER_LOSS if taught else LABEL_LOSS)
    return replace(recipe, loss=loss, patience=patience)


def _terms(recipe: Recipe, graph: Graph, *, alone: bool, structure: bool) -> tuple[Term, ...]:
    """The terms of a loss, which must be of labels and of logits."""
    assert recipe.loss is not None
    chosen = terms.parse(recipe.loss)
    for term in chosen:
        needs = term.definition
        if needs.inputs not in _TAKEN or needs.centred or needs.of_texts:
            raise UserError(
                f"loss {term.name} is not for nodes of a graph: use ce, terms of logits such as kd "
                "or dist, or local_structure"
            )
    loss_checks.check_teaching(chosen, recipe, alone=alone, weighted=False, extra=structure)
    loss_checks.check(chosen, classes=graph.classes, batch_size=len(graph), mixed=False)
    optimization.check_optimizer(recipe)
    return chosen


def _count_outputs(name: str, classifier: NodeClassifier, nodes: Int[Tensor, " n"]) -> int:
    """Number of a network's outputs for a node, tried in evaluation mode."""
    try:
        with evaluation_mode(classifier), torch.no_grad():
            outputs = classifier(nodes)
    except Exception as error:  # a network may raise anything
        raise UserError(
            f"{name} cannot take the graph's {classifier.graph.width} features of a node: "
            f"{first_line(error)}"
        ) from error
    if outputs.ndim != 2 or len(outputs) != len(nodes):
        raise UserError(
            f"{name} must give logits ({len(nodes)}, k) for {len(nodes)} nodes, got "
            f"{tuple(outputs.shape)}"
        )
    return outputs.shape[1]


def _answers(teacher: nn.Module, graph: Graph, classes: int) -> Float[Tensor, "n k"]:
    """The teacher's logits of all nodes."""
    classifier = NodeClassifier(teacher, graph)
    count = _count_outputs("teacher", classifier, torch.arange(len(graph)).to(graph.labels.device))
    if count != classes:
        raise UserError(f"teacher has {count} outputs for a node, and the student {classes}")
    return predict(teacher, graph)


def _structure(
    weight: float, student: nn.Module, teacher: nn.Module | None, graph: Graph
) -> LocalStructure | None:
    """The term of local structure preserving, with the teacher's embeddings."""
    if not 0 <= weight < float("inf"):
        raise UserError(f"local_structure must be a weight of 0 or more, got {weight}")
    if weight == 0:
        return None
    for name, network in (("student", student), ("teacher", teacher)):
        if not isinstance(network, GraphNetwork):
            raise UserError(
                f"local_structure compares what neighbours do in the hidden layers of two graph "
                f"networks, and the {name} is none: leave it out, or give a Gcn or Sage"
            )
    assert isinstance(teacher, GraphNetwork)
    with evaluation_mode(teacher), torch.no_grad():
        return LocalStructure(weight, teacher.hidden(graph))


def _validator(classifier: NodeClassifier, on: engine.Engine) -> Validate:
    """A function that measures a network on the validation nodes."""
    nodes = classifier.graph.validation
    batches = NodeBatches(Batch(nodes, classifier.graph.labels[nodes]))

    def validate(network: nn.Module) -> dict[str, float]:
        return scoring.validate(classifier.with_network(network), batches, on, logits=True)

    return validate


def _labelled_nodes(step: StepOutputs) -> StepOutputs:
    """The step of the nodes that have a label."""
    batch = step.batch
    known = batch.labels != UNKNOWN
    return StepOutputs(
        Batch(batch.images[known], batch.labels[known]),
        step.student_logits[known],
        tuple(answers[known] for answers in step.teacher_logits),
    )


def _weighted(modules: nn.ModuleList) -> Iterator[WeightedTerm]:
    for module in modules:
        assert isinstance(module, WeightedTerm)
        yield module
