"""Batches, objectives and the loop: on images that are learned in a fraction of a second."""

import contextlib
import json
from dataclasses import replace

import kd_support as support
import numpy as np
import pytest
import torch
from torch import nn

from dsdistill.harness.data import labeled_images, preprocess
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import metrics
from dsdistill.harness.evaluation.protocol import Learner
from kd import recipes
from kd.data import augment, batching
from kd.evaluation import learners, scoring
from kd.models import networks
from kd.objectives import terms
from kd.objectives.schemes import Distillation, MeanTeacher, Mutual
from kd.parallel import engine
from kd.recipe import Recipe
from kd.training import checkpoint
from kd.training.loop import train

CPU = torch.device("cpu")
QUICK = Recipe(lr=0.1, batch_size=16, epochs=8, warmup=0.4)


def _student(seed: int = 0) -> networks.Classifier:
    return networks.build("mlp:16", (8, 8, 1), 4, seed=seed)


def _batches(size: int = 16) -> batching.ResidentBatches:
    return batching.prepare_resident(support.easy(), size, CPU)


def _objective(
    student: networks.Classifier, loss: str = "ce:1", teachers: tuple[nn.Module, ...] = ()
) -> Distillation:
    return Distillation(student, _terms(loss), teachers)


def _terms(loss: str) -> list[terms.WeightedTerm]:
    return terms.build(terms.parse(loss), _student())


class _Stop(Exception):
    """Stands for a kill in the middle of a run."""


def test_batches_hold_every_image_once_as_nchw() -> None:
    examples = support.easy(n=33)
    batches = batching.prepare_resident(examples, 8, CPU)
    seen = list(batches.epoch(seed=1, epoch=0))
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
        return torch.cat([b.labels for b in batches.epoch(seed, epoch)]).tolist()

    assert labels(1, 2) == labels(1, 2)
    assert labels(1, 2) != labels(1, 3)
    assert labels(1, 2) != labels(2, 1)


def test_data_too_large_for_the_device_give_the_same_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    splits = support.digits()
    fitted = preprocess.fit("standardise", splits.train.chunks, splits.train.shape)
    examples = labeled_images.Examples(splits.train, fitted)
    resident = batching.prepare_resident(examples, 100, CPU)
    monkeypatch.setattr(batching, "MAX_RESIDENT_BYTES", 0)
    streamed = batching.prepare_resident(examples, 100, CPU)
    assert resident.images is not None
    assert streamed.images is None
    for a, b in zip(resident.epoch(0, 0), streamed.epoch(0, 0), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_an_epoch_can_be_entered_anywhere() -> None:
    batches = _batches(7)
    whole = list(batches.epoch(3, 1))
    entered = list(batches.epoch(3, 1, first=2))
    assert [b.labels.tolist() for b in entered] == [b.labels.tolist() for b in whole[2:]]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_each_batch(world: int) -> None:
    batches = batching.prepare_resident(support.easy(n=33), 16, CPU, world)
    assert batches.sizes == [16, 17]  # the last image alone cannot be shared
    shares = [list(batches.epoch(0, 0, rank=rank, world=world)) for rank in range(world)]
    for number, whole in enumerate(batches.epoch(0, 0)):
        rows = [part[number].index for part in shares]
        assert all(len(row) >= 2 for row in rows)
        assert {part[number].total_images for part in shares} == {len(whole)}
        assert sorted(torch.cat(rows).tolist()) == sorted(whole.index.tolist())


def _rounds(recipe: Recipe, size: int, validation_images: int | None = None) -> list[int]:
    """Steps after which a training on 40 images is validated."""
    validated: list[int] = []
    done = 0

    def validate(network: nn.Module) -> dict[str, float]:
        validated.append(done)
        return {"accuracy": 0.0, "nll": 0.0}

    def show(step: int, **_: float) -> None:
        nonlocal done
        done = step

    train(
        _objective(_student()),
        _batches(size),
        replace(recipe, lr=1e-3, warmup=0),
        0,
        validate=validate,
        validation_images=validation_images,
        show=show,
    )
    return validated


def test_long_epochs_are_validated_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd.training.steps.LONG_EPOCH_STEPS", 1)
    assert _rounds(replace(QUICK, epochs=3), 16, validation_images=10**9) == [3, 6, 9]


def test_short_epochs_are_validated_at_most_forty_times_evenly() -> None:
    assert _rounds(replace(QUICK, epochs=4), 16) == [3, 6, 9, 12]  # three steps each
    found = _rounds(replace(QUICK, epochs=100), 40)
    assert len(found) == 40
    assert found[-1] == 100
    assert set(np.diff([0, *found])) == {2, 3}
    # A number of steps may end inside an epoch: here of 20 batches.
    assert _rounds(replace(QUICK, epochs=None, steps=47), 2) == [20, 40, 47]


def test_validations_take_at_most_a_tenth_of_the_work_but_there_are_five() -> None:
    recipe = replace(QUICK, epochs=100)
    # 100 epochs of 40 images, each three passes: a tenth of them is twelve times 100 images.
    assert len(_rounds(recipe, 40, validation_images=100)) == 12
    assert len(_rounds(recipe, 40, validation_images=30)) == 40
    assert _rounds(recipe, 40, validation_images=10**6) == [20, 40, 60, 80, 100]


def test_validations_come_as_often_as_asked() -> None:
    recipe = replace(QUICK, epochs=9, validate_every=4)
    assert _rounds(recipe, 40, validation_images=10**6) == [4, 8, 9]


def test_a_training_ends_when_its_patience_does() -> None:
    accuracies = iter([0.1, 0.5, 0.5, 0.4, 0.3, 0.9])
    recipe = replace(QUICK, epochs=6, patience=3)
    state = train(
        _objective(_student()), _batches(), recipe, 0,
        validate=lambda network: {"accuracy": next(accuracies)},
    )  # fmt: skip
    # Nothing is better than the second; an equal one is chosen, but is no better.
    assert (state.epoch, state.best_epoch, state.stale) == (5, 3, 3)
    values = iter([3.0, 2.0, 2.5, 2.5, 0.1])
    recipe = replace(recipe, metric="nll", patience=2)
    state = train(
        _objective(_student()), _batches(), recipe, 0,
        validate=lambda network: {"accuracy": 0.5, "nll": next(values)},
    )  # fmt: skip
    assert (state.epoch, state.best_epoch) == (4, 2)


def test_the_loss_goes_down_and_the_steps_are_counted() -> None:
    student, figures = _student(), []
    state = train(
        _objective(student),
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
        train(_objective(student), _batches(), recipe, seed)
        return nn.utils.parameters_to_vector(student.parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_the_best_epoch_is_chosen_by_validation() -> None:
    student, accuracies, seen = _student(), iter([0.1, 0.7, 0.7, 0.2]), []

    def validate(network: nn.Module) -> dict[str, float]:
        seen.append(checkpoint.copy_weights(network))
        return {"accuracy": next(accuracies)}

    recipe = replace(QUICK, epochs=4)
    state = train(_objective(student), _batches(), recipe, 0, validate=validate)
    assert (state.best_epoch, state.best_accuracy, state.epoch) == (3, 0.7, 4)
    assert all(torch.equal(state.best[k], seen[2][k]) for k in state.best)
    assert not all(torch.equal(state.best[k], v) for k, v in student.network.state_dict().items())


def test_a_loss_that_is_not_finite_names_term_and_step_and_keeps_the_checkpoint() -> None:
    student, saved = _student(), []
    recipe = replace(QUICK, lr=1e30, epochs=5)
    message = r"loss term 'ce' is (nan|inf) at step \d+, training images \d+, .*lower --lr"
    with pytest.raises(UserError, match=message):
        train(
            _objective(student),
            _batches(),
            recipe,
            0,
            save=lambda state: saved.append(state[0]),
        )
    assert all(np.isfinite(a).all() for arrays in saved for a in arrays.values())


STOPPED = [
    ("mlp:16", {}),
    ("mlp:16", {"optimizer": "adamw", "lr": 0.01}),
    ("mlp:16", {"optimizer": "lamb", "lr": 0.01, "average_best": 2, "clip": 1.0}),
    ("test_resnet", {"ema": 0.9, "accumulate": 2, "mixup": 0.4, "augment": "crop-flip"}),
    ("mlp:16", {"patience": 2}),
]


@pytest.mark.parametrize(("name", "changes"), STOPPED)
def test_a_training_stopped_in_an_epoch_goes_on_bit_for_bit(
    name: str, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "kd.training.saving.MAX_SECONDS_BETWEEN_CHECKPOINTS", 0.0
    )  # after every step
    recipe = replace(QUICK, batch_size=8, epochs=4, **changes)

    def run(
        stop: int | None, saved: checkpoint.PackedState | None = None
    ) -> checkpoint.PackedState:
        student = networks.build(name, (8, 8, 1), 4, seed=0)
        batches = augment.augment_batches(_batches(8), recipe, 4)
        kept: list[checkpoint.PackedState] = []

        def show(done: int, **_: float) -> None:
            if done == stop:
                raise _Stop

        def validate(network: nn.Module) -> dict[str, float]:
            if recipe.patience:
                return {"accuracy": 0.5}  # so that the first validation is the best one
            judged = student.with_network(network)
            return scoring.validate(judged, _batches(), engine.make(), logits=True)

        def save(state: checkpoint.PackedState) -> None:
            # As a file would hold them: copies, and through JSON.
            arrays = {k: v.copy() for k, v in state[0].items()}
            kept.append((arrays, json.loads(json.dumps(state[1]))))

        with contextlib.suppress(_Stop):
            train(
                _objective(student), batches, recipe, 3,
                validate=validate, saved=saved, save=save, show=show,
            )  # fmt: skip
        return kept[-1] if kept else saved or ({}, {})

    # With patience, after the second validation, which found nothing better.
    stop = 13 if recipe.patience else 8
    whole, stopped = run(None), run(stop)
    assert stopped[1]["step"] == stop - 1
    assert whole[1]["step"] > stop
    resumed = run(None, stopped)
    for meta in (whole[1], resumed[1]):
        meta["meter"].pop("seconds")
    assert resumed[1] == whole[1]
    assert resumed[0].keys() == whole[0].keys()
    assert all(np.array_equal(resumed[0][k], whole[0][k]) for k in whole[0])
    # A training of 4 epochs of 5 steps; two validations after the first end a patience of 2.
    expected = 15 if recipe.patience else 4 * (-(-5 // recipe.accumulate))
    assert whole[1]["step"] == expected
    assert run(None, whole) is whole  # what is over does not go on


def test_accumulated_batches_are_one_large_batch() -> None:
    """The mean gradient of parts of unequal size is that of the whole, to float32 rounding."""

    def weights(batch_size: int, accumulate: int) -> torch.Tensor:
        student = _student()
        recipe = replace(QUICK, batch_size=batch_size, accumulate=accumulate, epochs=3)
        examples = support.easy(n=38)
        train(_objective(student), batching.prepare_resident(examples, batch_size, CPU), recipe, 0)
        return nn.utils.parameters_to_vector(student.parameters())

    # Batches of 19, or of 7, 7 and 5.
    whole = weights(38, 1)
    assert torch.allclose(weights(16, 3), whole, rtol=0, atol=1e-6)
    assert not torch.allclose(weights(16, 1), whole, rtol=0, atol=1e-3)


def test_the_average_is_what_is_validated_and_kept() -> None:
    student, seen = _student(), []

    def validate(network: nn.Module) -> dict[str, float]:
        seen.append(checkpoint.copy_weights(network))
        return {"accuracy": 0.5}

    recipe = replace(QUICK, ema=0.9, epochs=2)
    state = train(_objective(student), _batches(), recipe, 0, validate=validate)
    assert all(torch.equal(state.best[k], seen[-1][k]) for k in state.best)
    now = student.network.state_dict()
    assert not any(torch.equal(state.best[k], now[k]) for k in now)


def test_the_best_epochs_are_averaged() -> None:
    student, seen, accuracies = _student(), [], iter([0.1, 0.7, 0.3, 0.6])

    def validate(network: nn.Module) -> dict[str, float]:
        seen.append(checkpoint.copy_weights(network))
        return {"accuracy": next(accuracies)}

    recipe = replace(QUICK, epochs=4, average_best=2)
    state = train(_objective(student), _batches(), recipe, 0, validate=validate)
    assert [kept.epoch for kept in state.kept] == [2, 4]
    for name, value in state.best.items():
        assert torch.allclose(value, (seen[1][name] + seen[3][name]) / 2, atol=1e-7)


def test_the_metric_may_be_the_nll() -> None:
    values = iter([3.0, 1.0, 2.0])
    recipe = replace(QUICK, epochs=3, metric="nll")
    state = train(
        _objective(_student()), _batches(), recipe, 0,
        validate=lambda network: {"accuracy": 0.0, "nll": next(values)},
    )  # fmt: skip
    assert state.best_epoch == 2


def test_distillation_terms_by_hand() -> None:
    student, teacher = _student(0), _student(1)
    objective = _objective(student, "ce:0.25,kd:0.75:temperature=3", (teacher,))
    batch = next(_batches().in_order())
    terms = objective(batch)
    q, p = (torch.log_softmax(m(batch.images).double() / 3, 1) for m in (student, teacher))
    kl = 9 * (p.exp() * (p - q)).sum(1).mean()
    ce = nn.functional.cross_entropy(student(batch.images), batch.labels)
    assert terms["kd"].item() == pytest.approx(0.75 * kl.item(), rel=1e-4)
    assert terms["ce"].item() == pytest.approx(0.25 * ce.item(), rel=1e-5)
    known = replace(batch, teacher_logits=(teacher(batch.images).detach(),))
    assert torch.equal(objective(known)["kd"], terms["kd"])


def test_mixed_images_have_mixed_labels() -> None:
    batch = next(_batches().in_order())
    shares = torch.rand(len(batch), 4).softmax(1)
    student = _student()
    found = _objective(student)(replace(batch, class_shares=shares))["ce"]
    expected = -(shares * student(batch.images).log_softmax(1)).sum(1).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_teacher_is_frozen_and_in_evaluation_mode() -> None:
    teacher = networks.build("test_resnet", (8, 8, 1), 4, seed=1)
    before = checkpoint.copy_weights(teacher)
    objective = _objective(_student(), "ce:0.5,kd:0.5", (teacher,))
    train(objective, _batches(), replace(QUICK, epochs=1), 0)
    assert objective.student.training
    assert not teacher.training
    after = teacher.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)  # batch norm's averages too
    assert not any(name.startswith("teachers") for name in objective.checkpoint_state())


def test_students_that_teach_each_other() -> None:
    students = [_student(0), _student(1), _student(2)]
    objective = Mutual(students[0], students[1:], _terms("ce:1,kd:1:temperature=1"))
    batch = next(_batches().in_order())
    found = objective(batch)
    assert set(found) == {"ce", "kd", "ce_2", "kd_2", "ce_3", "kd_3"}
    q = [student(batch.images).log_softmax(1) for student in students]
    # The second student learns from the first and the third.
    kl = [(q[j].exp() * (q[j] - q[1])).sum(1).mean().item() for j in (0, 2)]
    assert found["kd_2"].item() == pytest.approx(sum(kl) / 2, rel=1e-4)
    found["kd_2"].backward()
    assert all(p.grad is None for p in students[0].parameters())
    assert any(p.grad is not None for p in students[1].parameters())
    before = scoring.outputs(students[1], _batches())
    train(objective, _batches(), replace(QUICK, epochs=1), 0)
    assert not np.allclose(scoring.outputs(students[1], _batches()), before)


def test_a_student_follows_its_own_average() -> None:
    student = _student()
    objective = MeanTeacher(student, _terms("ce:1,kd:1"), decay=0.75)
    start = checkpoint.copy_weights(student)
    nn.init.constant_(student.get_parameter("network.1.bias"), 8.0)
    objective.after_step(1, 10)  # keeps a half
    average = objective.inner.teachers[0].state_dict()
    half = (start["network.1.bias"] + 8) / 2
    assert torch.allclose(average["network.1.bias"], half)
    objective.after_step(9, 10)  # keeps three quarters
    assert torch.allclose(
        objective.inner.teachers[0].state_dict()["network.1.bias"], (3 * half + 8) / 4
    )
    assert any(name.startswith("inner.teachers") for name in objective.checkpoint_state())
    train(objective, _batches(), replace(QUICK, epochs=1), 0)


def test_a_student_comes_to_agree_with_its_teacher() -> None:
    student, teacher = _student(0), _student(1)
    recipe = replace(QUICK, epochs=30)
    objective = _objective(student, "kd:1", (teacher,))
    train(objective, _batches(), recipe, 0)
    a, b = (scoring.outputs(m, _batches()) for m in (student, teacher))
    assert metrics.agreement(a, b) > 0.8


def test_stored_labels_are_used_where_there_are_some() -> None:
    examples = support.easy()
    stored = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    batch = next(batching.prepare_resident(replace(examples, targets=stored), 40, CPU).in_order())
    student = _student()
    loss = _objective(student, "mse:1")(batch)["mse"]
    outputs = student(batch.images).detach().numpy()
    assert loss.item() == pytest.approx(0.5 * ((outputs - stored) ** 2).sum(1).mean(), rel=1e-5)


def test_fitted_temperature_minimises_the_nll() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 3)) * 2
    draws = rng.random((4000, 1))
    labels = (draws > metrics.softmax(logits).cumsum(1)).sum(1)
    # The labels were drawn from softmax(logits); of logits / 10 that is the temperature 0.1.
    assert metrics.fit_temperature(logits / 10, labels) == pytest.approx(0.1, rel=0.1)


def test_a_network_is_a_learner() -> None:
    examples = support.easy()
    network: Learner = replace(
        learners.network_learner("mlp:16"), recipe=replace(recipes.SMALL, steps=60)
    )
    scores = network(examples, examples, 0)(examples.images())
    assert scores.shape == (40, 4)
    assert metrics.accuracy(scores, examples.data.labels) > 0.9
    # Estimates of one-hot labels minus 1/k.
    assert abs(scores.sum(1)).mean() < 0.5
    again = network(examples, examples, 0)(examples.images())
    assert np.array_equal(scores, again)


def test_unknown_learner() -> None:
    with pytest.raises(UserError, match="did you mean 'convnet'"):
        learners.network_learner("convnett")
