"""Centred networks: the prediction is f(x; theta) - f(x; theta_0), and one module everywhere."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import kd_support as support
import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

import kd
from dsdistill.harness.errors import UserError
from kd.evaluation.learners import STABLE_SHARES, network_learner
from kd.models import networks, saved_models, teachers
from kd.training import stable_rate

EASY = support.easy()
IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def _moved(name: str = "mlp:8") -> networks.Classifier:
    """A centred network whose weights are no longer those that it started with."""
    classifier = networks.build(name, (8, 8, 1), 4).centre()
    with torch.no_grad():
        for weight in classifier.network.parameters():
            weight.add_(0.1)
    return classifier


@pytest.mark.parametrize("name", ["mlp:8", "convnet:8", "kip-convnet:4", "kip-fc:8", "vit:12"])
def test_the_prediction_is_nothing_before_the_first_step(name) -> None:
    full = "small-vit:12" if name == "vit:12" else name
    classifier = networks.build(full, (8, 8, 1), 4)
    assert classifier(IMAGES).abs().max() > 0
    classifier.centre()
    assert torch.equal(classifier(IMAGES), torch.zeros(5, 4))


def test_the_prediction_is_the_difference_of_two_networks() -> None:
    classifier, start = _moved(), networks.build("mlp:8", (8, 8, 1), 4)
    assert torch.equal(classifier(IMAGES), classifier.network(IMAGES) - start(IMAGES))


def test_only_the_network_itself_is_trained() -> None:
    classifier = _moved()
    classifier(IMAGES).square().sum().backward()
    assert classifier.initial is not None
    assert all(weight.grad is None for weight in classifier.initial.parameters())
    assert all(weight.grad is not None for weight in classifier.network.parameters())
    plain = networks.build("mlp:8", (8, 8, 1), 4)
    assert networks.parameter_count(classifier) == networks.parameter_count(plain)


def test_gradients_of_images_are_those_of_the_difference() -> None:
    classifier, images = _moved(), IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(classifier(images).sum(), images)
    start = networks.build("mlp:8", (8, 8, 1), 4)
    (of_network,) = torch.autograd.grad(classifier.network(images).sum(), images)
    (of_start,) = torch.autograd.grad(start(images).sum(), images)
    torch.testing.assert_close(gradient, of_network - of_start)


def test_the_start_stays_one_fixed_function() -> None:
    """Dropout is off in it, and batch norm keeps its statistics, while the network is trained."""
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)
    )
    classifier = networks.Classifier(network).centre()
    start = classifier.initial
    assert start is not None
    before = start(IMAGES)
    classifier.train()(IMAGES)
    assert isinstance(before, torch.Tensor)
    assert torch.equal(before, start(IMAGES))  # pyright: ignore[reportArgumentType]
    assert classifier.network.training
    assert not start.network.training


def test_a_reordered_network_is_centred_still() -> None:
    classifier = _moved().eval()
    expected = classifier(IMAGES)[:, [2, 0, 1, 3]]
    saved_models.reorder_outputs("it", classifier, (2, 0, 1, 3), (8, 8, 1))
    torch.testing.assert_close(classifier(IMAGES), expected)


TRAINING = ("--student", "mlp:8", "--epochs", 3, "--batch-size", 30, "--device", "cpu", "--centred")


def _train(monkeypatch: pytest.MonkeyPatch, folder: Path, *more: object) -> Path:
    data = support.write_npz(folder / "data.npz")
    out = folder / "run"
    support.main(monkeypatch, "train", data, "--out", out, *TRAINING, *more)
    return out


def test_a_run_is_saved_loaded_and_taught_from_as_one(tmp_path, monkeypatch) -> None:
    run = _train(monkeypatch, tmp_path)
    model = saved_models.load_run(run)
    initial = model.classifier.initial
    assert initial is not None
    start = networks.build("mlp:8", (8, 8, 1), 3, seed=0)
    images = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(
        model.classifier(images), model.classifier.network(images) - start(images)
    )
    assert not torch.allclose(model.classifier.network(images), start(images))
    assert json.loads((run / "model.json").read_text())["centred"] is True
    # The trained network alone is still what its file holds.
    assert not any("initial" in name for name in model.classifier.network.state_dict())
    teacher = teachers.load(str(run), model.preprocess, model.shape, model.classes)
    expected = model.classifier(images) / model.output_temperature
    torch.testing.assert_close(teacher(images), expected)


@pytest.mark.parametrize(
    "scheme",
    [("--peers", "mlp:4"), ("--mean-teacher", 0.9), ("--ema", 0.9), ("--loss", "ce:1,heads@1,3")],
    ids=lambda scheme: scheme[0],
)
def test_every_scheme_trains_a_centred_student(scheme, tmp_path, monkeypatch) -> None:
    run = _train(monkeypatch, tmp_path, *scheme)
    classifier = saved_models.load_run(run).classifier
    assert classifier.initial is not None
    start = networks.build("mlp:8", (8, 8, 1), 3, seed=0).network.state_dict()
    for name, value in classifier.initial.network.state_dict().items():
        assert torch.equal(value, start[name])
        assert not torch.equal(value, classifier.network.state_dict()[name])


def test_a_damaged_start_is_refused(tmp_path, monkeypatch) -> None:
    run = _train(monkeypatch, tmp_path)
    start = run / "initial.safetensors"
    start.write_bytes(start.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match=r"initial.safetensors is damaged or of another run"):
        saved_models.load_run(run)
    start.unlink()
    with pytest.raises(UserError, match=r"initial.safetensors is damaged or of another run"):
        saved_models.load_run(run)


@pytest.mark.parametrize("form", ["pt2", "safetensors"])
def test_exports_answer_as_the_centred_student(form, tmp_path, monkeypatch, capsys) -> None:
    run = _train(monkeypatch, tmp_path)
    out = tmp_path / "exported"
    support.main(monkeypatch, "export", run, "--format", form, "--out", out)
    model = saved_models.load_run(run)
    images = torch.rand(3, 1, 8, 8)
    expected = model.classifier.eval()(images)
    if form == "safetensors":
        torch.testing.assert_close(saved_models.load_run(out).classifier.eval()(images), expected)
    else:
        prepared = torch.tensor(model.preprocess.apply(images.permute(0, 2, 3, 1).numpy()))
        expected = model.classifier(prepared.permute(0, 3, 1, 2))
        torch.testing.assert_close(torch.export.load(out).module()(images), expected)


def test_a_killed_training_ends_in_the_same_bits(tmp_path, monkeypatch) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    for folder in (whole, half):
        folder.mkdir()
    _train(monkeypatch, whole)
    data = support.write_npz(half / "data.npz")
    support.stop_in(monkeypatch, 4, "train", data, "--out", half / "run", *TRAINING)
    support.main(monkeypatch, "train", "--resume", "--out", half / "run")
    for name in ("student.safetensors", "initial.safetensors"):
        assert (whole / "run" / name).read_bytes() == (half / "run" / name).read_bytes()


def test_a_trained_student_is_not_centred_on_itself(tmp_path, monkeypatch) -> None:
    run = _train(monkeypatch, tmp_path)
    more = ("--student", run, "--out", tmp_path / "more", "--epochs", 1, "--device", "cpu")
    line = support.refused(monkeypatch, "train", tmp_path / "data.npz", *more, "--centred")
    assert "leave --centred out" in line
    support.main(monkeypatch, "train", tmp_path / "data.npz", *more)
    first, second = (saved_models.load_run(folder).classifier for folder in (run, more[3]))
    assert first.initial is not None
    assert second.initial is not None
    for a, b in zip(first.initial.parameters(), second.initial.parameters(), strict=True):
        assert torch.equal(a, b)


def test_timm_has_no_centred_networks(tmp_path, monkeypatch) -> None:
    run = _train(monkeypatch, tmp_path)
    assert "centred: use --format onnx" in support.refused(
        monkeypatch, "export", run, "--format", "timm"
    )


def test_curvature_is_the_largest_eigenvalue_of_the_empirical_kernel() -> None:
    network = networks.build("kip-fc:32", (8, 8, 1), 3)
    images = torch.randn(120, 1, 8, 8, generator=torch.Generator().manual_seed(1))  # two chunks
    weights = dict(network.named_parameters())
    parts = jacrev(lambda values: functional_call(network, values, (images,)))(weights)
    jacobian = torch.cat([part.detach().reshape(360, -1) for part in parts.values()], 1).double()
    largest = torch.linalg.eigvalsh(jacobian @ jacobian.T)[-1].item() / 120
    assert stable_rate.largest_curvature(network, images) == pytest.approx(largest, rel=0.05)
    assert stable_rate.largest_curvature(network, images) <= largest * 1.0001


def test_curvature_of_a_linear_network_is_known() -> None:
    """For f(x) = W x it is the largest eigenvalue of X^T X / n."""
    network = networks.Classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False)))
    rows = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5])).view(4, 1, 2, 2)
    assert stable_rate.largest_curvature(network, rows) == pytest.approx(9 / 4, rel=1e-4)
    assert network.training


@pytest.mark.parametrize(("share", "converges"), [(0.99, True), (1.05, False), (2.5, False)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_stable_rate_is_where_a_linear_network_stops_to_converge(
    share, converges, momentum
) -> None:
    from kd.losses.response import centred_mse

    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    rows = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5])).view(4, 1, 2, 2)
    labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    curvature = stable_rate.largest_curvature(networks.Classifier(network), rows)
    rate = share * stable_rate.stable_rate(curvature, momentum)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=momentum)
    losses = []
    for _ in range(600):
        optimizer.zero_grad()
        loss = centred_mse(network(rows), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert (losses[-1] < 1e-3 * losses[0]) == converges


def test_kip_networks_are_centred_unless_named_otherwise() -> None:
    for name in ("kip-fc:16", "kip-convnet:4"):
        plain, without = network_learner(name), network_learner(f"uncentred:{name}")
        assert plain.centred
        assert plain.recipe.weight_decay == 0
        assert plain.rates == STABLE_SHARES
        assert not without.centred
        assert without.recipe.weight_decay > 0
    assert network_learner("centred:mlp:8").centred
    assert not network_learner("mlp:8").centred
    assert network_learner("centred:mlp:8").recipe == network_learner("mlp:8").recipe
    assert "centred" not in (network_learner("mlp:8").identity or {})
    with pytest.raises(UserError, match="cantred"):
        network_learner("cantred:mlp:8")


def test_a_share_of_the_stable_rate_trains_a_centred_learner() -> None:
    learner = network_learner("kip-fc:64", steps=60)
    trained = learner.with_rate(1.0)(EASY, EASY, 0)
    losses = [loss for _, loss in trained.curve]
    assert losses[-1] < 0.1 * losses[0]
    assert trained.facts["flops"] == 2 * (2 * (64 * 64 + 64 * 4))
    with pytest.raises(UserError, match="mse"):
        replace(learner, recipe=replace(learner.recipe, steps=2000)).with_rate(1e3)(EASY, EASY, 0)


def test_a_wide_centred_network_predicts_as_kernel_ridge_regression() -> None:
    """The limit of infinite width: ridge regression with the kernel `fc`, without a ridge."""
    from dsdistill.harness.data import labeled_images
    from dsdistill.harness.data.labeled_images import Examples
    from dsdistill.kernels import networks as kernels
    from dsdistill.methods.ridge import RidgeLearner

    splits = support.digits()
    fitted = support.distilled(splits)
    train = Examples(
        labeled_images.LabeledImages(fitted.images, fitted.labels.argmax(1), fitted.classes),
        fitted.preprocess,
        fitted.labels,
        True,
    )
    learner = network_learner("kip-fc:4096", steps=600).with_rate(0.5)
    images = fitted.preprocess.apply(splits.test.images())
    scores = learner(train, train, 0)(images)
    expected = RidgeLearner(kernels.parse("fc"))(train, train, 0)(images)
    truth = splits.test.labels
    accuracy, limit = (np.mean(each.argmax(1) == truth) for each in (scores, expected))
    assert accuracy == pytest.approx(limit, abs=0.015)


def _wide(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))


def test_the_library_trains_the_difference_and_goes_on_with_it(tmp_path: Path) -> None:
    images, labels = torch.tensor(EASY.images()).permute(0, 3, 1, 2), EASY.data.labels
    train = [(images, torch.tensor(labels))]
    options: dict[str, Any] = {"device": "cpu", "progress": False, "checkpoint": tmp_path / "c"}
    options |= {"centred": True, "validation": train}
    student, start = _wide(0), _wide(0)
    result = kd.distill(student, None, train, epochs=3, **options)
    difference = result.student
    assert not difference.training
    with torch.no_grad():
        expected = student(images) - start(images)
        assert torch.equal(difference(images), expected)
        assert not torch.equal(student(images), start(images))
    accuracy = (expected.argmax(1).numpy() == labels).mean()
    assert result.accuracy == pytest.approx(accuracy)
    assert all(p.requires_grad for p in student.parameters())
    # The start is that of the checkpoint, not of the module of a later call.
    longer = kd.distill(_wide(1), None, train, epochs=4, **options)
    assert longer.history[:3] == result.history
    assert isinstance(longer.student, networks.Classifier)
    assert longer.student.initial is not None
    assert torch.equal(longer.student.initial.network(images), start(images))
    options["centred"] = False
    with pytest.raises(kd.UserError, match="made with student centred Sequential of"):
        kd.distill(_wide(0), None, train, epochs=4, **options)
