"""Batches, objectives and the loop: on images that are learned in a fraction of a second."""

import contextlib
from dataclasses import replace

import kd_support as support
import numpy as np
import pytest
import torch
from torch import nn

from dsdistill.harness import labeled, metrics, preprocess
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluate import Learner
from kd import checkpoint, data, learners, networks, objectives, recipes, scoring
from kd.recipes import Recipe
from kd.train import rounds, train

CPU = torch.device("cpu")
QUICK = Recipe("sgd", lr=0.1, batch_size=16, epochs=8)


def _student(seed: int = 0) -> networks.Classifier:
    return networks.build("mlp:16", (8, 8, 1), 4, seed=seed)


def _batches(size: int = 16) -> data.Batches:
    return data.batches(support.easy(), size, CPU)


class _Stop(Exception):
    """Stands for a kill in the middle of a run."""


def test_batches_hold_every_image_once_as_nchw() -> None:
    examples = support.easy(n=33)
    batches = data.batches(examples, 8, CPU)
    seen = list(batches.shuffled(seed=1, epoch=0))
    # 33 = 4 * 8 + 1: the last image joins the batch before it.
    assert [len(b) for b in seen] == [8, 8, 8, 9]
    assert len(batches) == 4
    images = torch.cat([b.images for b in seen])
    order = torch.cat([b.labels for b in seen])
    assert images.shape == (33, 1, 8, 8)
    assert sorted(order.tolist()) == sorted(examples.data.labels.tolist())
    total = examples.images().sum()
    assert images.sum().item() == pytest.approx(float(total), rel=1e-5)


def test_order_follows_seed_and_epoch_alone() -> None:
    batches = _batches()

    def labels(seed: int, epoch: int) -> list[int]:
        return torch.cat([b.labels for b in batches.shuffled(seed, epoch)]).tolist()

    assert labels(1, 2) == labels(1, 2)
    assert labels(1, 2) != labels(1, 3)
    assert labels(1, 2) != labels(2, 1)


def test_data_too_large_for_the_device_give_the_same_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    splits = support.digits()
    fitted = preprocess.fit("standardise", splits.train.chunks, splits.train.shape)
    examples = labeled.Examples(splits.train, fitted)
    resident = data.batches(examples, 100, CPU)
    monkeypatch.setattr(data, "RESIDENT_BYTES", 0)
    streamed = data.batches(examples, 100, CPU)
    assert resident.resident is not None
    assert streamed.resident is None
    for a, b in zip(resident.shuffled(0, 0), streamed.shuffled(0, 0), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_warm_up_then_cosine_to_zero() -> None:
    recipe = Recipe("sgd", lr=1.0, batch_size=1, steps=100, warmup=0.1)
    rates = [recipe.lr_at(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 1e-3


def test_rounds_are_epochs_or_fifths() -> None:
    assert list(rounds(0, 300, 100)) == [range(1), range(1, 2), range(2, 3)]
    assert len(list(rounds(0, 1000, 1))) == 5
    assert list(rounds(800, 1000, 1)) == [range(800, 1000)]
    # A number of steps may end inside an epoch.
    assert list(rounds(0, 250, 100))[-1] == range(2, 3)


def test_the_loss_goes_down_and_the_steps_are_counted() -> None:
    student, figures = _student(), []
    state = train(
        objectives.Supervised(student),
        _batches(),
        replace(QUICK, epochs=40),
        seed=0,
        show=lambda done, **shown: figures.append(shown["ce"]),
    )
    assert state.step == len(figures) == 40 * 3
    assert figures[-1] < 0.2 * figures[0]
    assert metrics.accuracy(scoring.outputs(student, _batches()), _batches().labels.numpy()) > 0.9


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_same_seed_gives_the_same_student(optimizer: str) -> None:
    recipe = replace(QUICK, optimizer=optimizer, lr=0.01, epochs=2)

    def weights(seed: int) -> torch.Tensor:
        student = _student(seed)
        train(objectives.Supervised(student), _batches(), recipe, seed)
        return nn.utils.parameters_to_vector(student.parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_the_best_epoch_is_chosen_by_validation() -> None:
    student, accuracies, seen = _student(), iter([0.1, 0.7, 0.7, 0.2]), []

    def validate() -> float:
        seen.append(checkpoint.copy(student.network))
        return next(accuracies)

    recipe = replace(QUICK, epochs=4)
    state = train(objectives.Supervised(student), _batches(), recipe, 0, validate=validate)
    assert (state.best_epoch, state.best_accuracy, state.epoch) == (3, 0.7, 4)
    assert all(torch.equal(state.best[k], seen[2][k]) for k in state.best)
    assert not all(torch.equal(state.best[k], v) for k, v in student.network.state_dict().items())


def test_a_loss_that_is_not_finite_names_term_and_step_and_keeps_the_checkpoint() -> None:
    student, saved = _student(), []
    recipe = replace(QUICK, lr=1e30, epochs=5)
    with pytest.raises(UserError, match=r"loss term 'ce' is (nan|inf) at step \d+ .*lower --lr"):
        train(
            objectives.Supervised(student),
            _batches(),
            recipe,
            0,
            save=lambda arrays, meta: saved.append(arrays),
        )
    assert all(np.isfinite(a).all() for arrays in saved for a in arrays.values())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["mlp:16", "test_resnet"])
def test_a_stopped_training_goes_on_bit_for_bit(optimizer: str, name: str) -> None:
    recipe = replace(QUICK, optimizer=optimizer, lr=0.01, epochs=4)

    def run(stop: int | None, saved=None):
        student, kept = networks.build(name, (8, 8, 1), 4, seed=0), []

        def show(done: int, **_: float) -> None:
            if done == stop:
                raise _Stop

        def validate() -> float:
            return metrics.accuracy(scoring.outputs(student, _batches()), _batches().labels.numpy())

        def save(arrays, meta) -> None:
            # As a file would hold them: without scalars.
            kept.append(({k: np.ascontiguousarray(v).copy() for k, v in arrays.items()}, meta))

        objective = objectives.Supervised(student)
        options = {"validate": validate, "saved": saved, "save": save, "show": show}
        with contextlib.suppress(_Stop):
            train(objective, _batches(), recipe, 3, **options)
        return kept[-1]

    whole = run(None)
    stopped = run(8)  # in the middle of the third of four epochs
    assert stopped[1]["epoch"] == 2
    resumed = run(None, stopped)
    assert resumed[1] == whole[1]
    assert resumed[0].keys() == whole[0].keys()
    assert all(np.array_equal(resumed[0][k], whole[0][k]) for k in whole[0])


def test_distillation_terms_by_hand() -> None:
    student, teacher = _student(0), _student(1)
    objective = objectives.Offline(student, teacher, temperature=3.0, alpha=0.75)
    batch = next(_batches().in_order())
    terms = objective(batch)
    q, p = (torch.log_softmax(m(batch.images).double() / 3, 1) for m in (student, teacher))
    kl = 9 * (p.exp() * (p - q)).sum(1).mean()
    ce = nn.functional.cross_entropy(student(batch.images), batch.labels)
    assert terms["kl"].item() == pytest.approx(0.75 * kl.item(), rel=1e-4)
    assert terms["ce"].item() == pytest.approx(0.25 * ce.item(), rel=1e-5)
    known = replace(batch, teacher_logits=teacher(batch.images).detach())
    assert torch.equal(objective(known)["kl"], terms["kl"])


def test_the_teacher_is_frozen_and_in_evaluation_mode() -> None:
    teacher = networks.build("test_resnet", (8, 8, 1), 4, seed=1)
    before = checkpoint.copy(teacher)
    objective = objectives.Offline(_student(), teacher, temperature=4.0, alpha=0.5)
    train(objective, _batches(), replace(QUICK, epochs=1), 0)
    assert objective.student.training
    assert not teacher.training
    after = teacher.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)  # batch norm's averages too


def test_a_student_comes_to_agree_with_its_teacher() -> None:
    student, teacher = _student(0), _student(1)
    recipe = replace(QUICK, epochs=30)
    objective = objectives.Offline(student, teacher, temperature=4.0, alpha=1.0)
    train(objective, _batches(), recipe, 0)
    a, b = (scoring.outputs(m, _batches()) for m in (student, teacher))
    assert metrics.agreement(a, b) > 0.8


def test_stored_labels_are_used_where_there_are_some() -> None:
    examples = support.easy()
    stored = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    batch = next(data.batches(replace(examples, targets=stored), 40, CPU).in_order())
    student = _student()
    loss = objectives.Supervised(student, "centred")(batch)["mse"]
    outputs = student(batch.images).detach().numpy()
    assert loss.item() == pytest.approx(0.5 * ((outputs - stored) ** 2).sum(1).mean(), rel=1e-5)


def test_fitted_temperature_minimises_the_nll() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 3)) * 2
    draws = rng.random((4000, 1))
    labels = (draws > metrics.softmax(logits).cumsum(1)).sum(1)
    # The labels were drawn from softmax(logits); of logits / 10 that is the temperature 0.1.
    assert scoring.fit_temperature(logits / 10, labels) == pytest.approx(0.1, rel=0.1)


def test_a_network_is_a_learner() -> None:
    examples = support.easy()
    network: Learner = replace(learners.learner("mlp:16"), recipe=replace(recipes.SMALL, steps=60))
    scores = network(examples, examples, 0)(examples.images())
    assert scores.shape == (40, 4)
    assert metrics.accuracy(scores, examples.data.labels) > 0.9
    # Estimates of one-hot labels minus 1/k.
    assert abs(scores.sum(1)).mean() < 0.5
    again = network(examples, examples, 0)(examples.images())
    assert np.array_equal(scores, again)


def test_unknown_learner() -> None:
    with pytest.raises(UserError, match="did you mean 'convnet'"):
        learners.learner("convnett")
