"""Training on nodes: what is learned from what, and what is refused."""

from dataclasses import replace

import graph_support
import pytest
import torch
from torch import nn

from dsdistill.harness.errors import UserError
from kd.graphs import training
from kd.graphs.graph import Graph
from kd.graphs.networks import Gcn, GraphNetwork, Perceptron, Sage

GRAPH = graph_support.small()


def _student(seed: int = 0) -> Perceptron:
    return Perceptron(GRAPH.width, 2, hidden=16, dropout=0.0, seed=seed)


class Fixed(GraphNetwork):
    """A teacher whose answers are a table."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, graph: Graph) -> torch.Tensor:
        return self.table


def _fit(network: nn.Module, teacher: nn.Module | None, graph: Graph = GRAPH, **options):
    options = {"epochs": 60, "patience": None, "progress": False} | options
    return training.distill(network, teacher, graph, **options)


def test_a_graph_network_learns_what_edges_say_and_its_student_learns_it_without_them() -> None:
    teacher = Gcn(GRAPH.width, 2, hidden=16, dropout=0.0)
    _fit(teacher, None)
    alone, student = _student(), _student()
    _fit(alone, None)
    _fit(student, teacher, epochs=200)
    taught, plain = (training.accuracy(x, GRAPH, GRAPH.test) for x in (student, alone))
    assert training.accuracy(teacher, GRAPH, GRAPH.test) > 0.85
    assert taught > plain + 0.1


def test_labels_outside_of_train_are_not_learned_from() -> None:
    """Validation labels choose the epoch; with one epoch nothing is chosen."""
    others = GRAPH.labels.clone()
    others[GRAPH.validation] = 1 - others[GRAPH.validation]
    others[GRAPH.test] = 1 - others[GRAPH.test]
    students = []
    for labels in (GRAPH.labels, others):
        student = _student()
        _fit(
            student, Gcn(GRAPH.width, 2), replace(GRAPH, labels=labels), loss="ce:1,kd:1", epochs=1
        )
        students.append(student.state_dict())
    for name, weight in students[0].items():
        assert torch.equal(weight, students[1][name])


def test_the_loss_of_labels_is_over_train_and_that_of_the_teacher_over_all_nodes() -> None:
    table = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    student, losses = _student(), []
    logits = training.predict(student, GRAPH)
    label_loss = nn.functional.cross_entropy(logits[GRAPH.train], GRAPH.labels[GRAPH.train])
    answers = nn.functional.kl_div(
        logits.log_softmax(1), table.log_softmax(1), reduction="batchmean", log_target=True
    )
    _fit(
        student,
        Fixed(table),
        loss="ce:0.25,kd:0.75:temperature=1",
        epochs=1,
        callbacks=lambda figures: losses.append(figures.losses),
    )
    assert losses[0]["ce"] == pytest.approx(0.25 * label_loss.item(), rel=1e-5)
    assert losses[0]["kd"] == pytest.approx(0.75 * answers.item(), rel=1e-5)


def test_a_teacher_of_permuted_answers_teaches_nothing() -> None:
    teacher = Gcn(GRAPH.width, 2, hidden=16, dropout=0.0)
    _fit(teacher, None)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    student = _student()
    _fit(student, Fixed(training.predict(teacher, GRAPH)[order]), epochs=200)
    assert training.accuracy(student, GRAPH, GRAPH.test) < 0.75


def test_the_same_seed_gives_the_same_bits_and_random_numbers_go_on() -> None:
    results = []
    for seed in (5, 5, 6):
        student = Perceptron(GRAPH.width, 2, dropout=0.5)
        torch.manual_seed(1)
        _fit(student, None, epochs=3, seed=seed)
        results.append((student.state_dict()["layers.0.weight"], torch.rand(1)))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][0], results[2][0])
    assert results[0][1] == results[1][1] == results[2][1]


def test_the_student_has_the_weights_of_its_best_epoch() -> None:
    student = _student()
    result = _fit(student, None, epochs=30, lr=0.1)
    assert result.student is student
    assert not student.training
    best = max(r.validation["accuracy"] for r in result.history)
    assert result.accuracy == best
    assert training.accuracy(student, GRAPH, GRAPH.validation) == pytest.approx(best)


def test_patience_ends_a_training() -> None:
    result = _fit(_student(), None, epochs=400, patience=5)
    figures = [r.validation["accuracy"] for r in result.history]
    assert 5 < len(figures) == result.epochs < 400
    # None of the last five is better than the best before, and none before had five such.
    assert max(figures[-5:]) <= max(figures[:-5])
    assert figures[-6] > max(figures[:-6], default=0)


def test_a_module_of_ones_own_takes_features() -> None:
    student = nn.Sequential(nn.Linear(GRAPH.width, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    teacher = Sage(GRAPH.width, 2)
    modes = [module.training for module in teacher.modules()]
    _fit(student, teacher, epochs=2)
    assert [module.training for module in teacher.modules()] == modes
    assert all(weight.requires_grad and weight.grad is None for weight in teacher.parameters())
    outside = student(GRAPH.features[:3])
    torch.testing.assert_close(outside, training.predict(student, GRAPH)[:3])


def test_local_structure_brings_the_neighbourhoods_of_two_networks_together() -> None:
    teacher = Gcn(GRAPH.width, 2, hidden=16, dropout=0.0)
    _fit(teacher, None)
    last = []
    for weight in (0.0, 100.0):
        student = Gcn(GRAPH.width, 2, hidden=4, dropout=0.0, seed=1)
        _fit(student, teacher, loss="ce:1,kd:1", local_structure=weight, epochs=40)
        with torch.no_grad():
            hidden = student.hidden(GRAPH), teacher.hidden(GRAPH)
            last.append(training.local_structure_loss(*hidden, GRAPH.neighbours).item())
    assert last[1] < 0.5 * last[0]


def test_local_structure_may_be_all_that_the_teacher_gives() -> None:
    result = _fit(Gcn(5, 2, hidden=4), Gcn(5, 2), loss="ce:1", local_structure=100, epochs=1)
    assert set(result.history[0].losses) == {"ce", "local_structure"}


def test_without_validation_nodes_the_last_epoch_counts() -> None:
    graph = replace(GRAPH, validation=GRAPH.validation[:0])
    result = _fit(_student(), None, graph, epochs=60)
    assert (result.epochs, result.best_epoch, result.accuracy) == (60, 60, None)
    with pytest.raises(UserError, match="patience has no effect without validation"):
        _fit(_student(), None, graph, patience=3)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        (nn.Linear(4, 2), None, {}, "student cannot take the graph's 5 features"),
        (nn.Linear(5, 1), None, {}, "student has 1 outputs, and the graph 2 classes"),
        (nn.Linear(5, 2), nn.Linear(5, 3), {}, "teacher has 3 outputs for a node"),
        (None, None, {}, "student must be a torch.nn.Module, got NoneType"),
        (nn.Linear(5, 2), "gcn", {}, "teacher must be a torch.nn.Module, got str"),
        (nn.Linear(5, 2), None, {"loss": "kd:1"}, "loss kd needs a teacher"),
        (nn.Linear(5, 2), Gcn(5, 2), {"loss": "ce:1"}, "has no term that uses the teacher"),
        (nn.Linear(5, 2), Gcn(5, 2), {"loss": "sp:1"}, "loss sp is not for nodes of a graph"),
        (nn.Linear(5, 2), None, {"loss": "mse:1"}, "loss mse is not for nodes of a graph"),
        (nn.Linear(5, 2), Gcn(5, 2), {"loss": "dkd:1"}, "dkd needs 3 classes"),
        (nn.Linear(5, 2), None, {"accumulate": 2}, "accumulate has no effect on the nodes"),
        (nn.Linear(5, 2), Gcn(5, 2), {"local_structure": 1}, "the student is none"),
        (Gcn(5, 2), nn.Linear(5, 2), {"local_structure": 1}, "the teacher is none"),
        (Gcn(5, 2), Gcn(5, 2), {"local_structure": -1}, "a weight of 0 or more, got -1"),
        (nn.Linear(5, 2), None, {"width": 3}, "unknown argument of kd.distill"),
    ],
)
def test_what_does_not_fit_is_refused(student, teacher, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _fit(student, teacher, **options)
