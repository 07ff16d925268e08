"""KIP through a backbone: pyramids, views, one step against its whole gradient, and the command."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import kd_support
import numpy as np
import photos
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dsdistill
from dsdistill import cli
from dsdistill.commands import distil, evaluation_parts, through_backbone
from dsdistill.commands import evaluate as evaluation
from dsdistill.harness.data import distilled_set, feature_file, preprocess
from dsdistill.harness.data.labeled_images import Examples, LabeledImages, centred_one_hot
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import metrics_file
from dsdistill.harness.stopping import StopInterrupt
from dsdistill.kernels import networks
from dsdistill.loops.kip_loop import OnStep
from dsdistill.methods import pyramid, random_views, ridge
from dsdistill.methods.adam import Adam
from dsdistill.methods.initial_support import Support
from dsdistill.methods.kip import KipObjective
from dsdistill.methods.outer_loss import OUTER_LOSSES
from dsdistill.methods.pixel_kip import PixelObjective
from dsdistill.options import EvaluateOptions, KipOptions
from kd.evaluation import encoder as encoders

SIDE, D, CLASSES = photos.SIDE, 5, ("dark", "light")
WEIGHTS = np.random.default_rng(1).normal(size=(SIDE * SIDE * 3, D)).astype(np.float32) / 8


class LinearEncoder:
    """A backbone that anyone can differentiate: tanh of a matrix."""

    input_size = (SIDE, SIDE)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self.features(jnp.asarray(images)))

    def with_pullback(self, images: np.ndarray):
        rows, pullback = jax.vjp(self.features, jnp.asarray(images))
        return np.asarray(rows), lambda slope: np.asarray(pullback(jnp.asarray(slope))[0])

    @staticmethod
    def features(images: jax.Array) -> jax.Array:
        return jnp.tanh(images.reshape(len(images), -1) @ WEIGHTS)


@pytest.mark.parametrize(("size", "channels"), [(1, 1), (2, 3), (7, 3), (12, 1)])
@given(seed=st.integers(0, 99))
@settings(max_examples=5, deadline=None)
def test_a_pyramid_of_images_renders_them(size: int, channels: int, seed: int) -> None:
    images = np.random.default_rng(seed).uniform(0.02, 0.98, (3, size, size, channels))
    levels = pyramid.of_images(jnp.asarray(images, jnp.float32))
    np.testing.assert_allclose(pyramid.render(levels), images, atol=1e-4)
    assert [level.shape[1] for level in levels] == list(pyramid.sizes(size))


def test_the_coarse_levels_of_a_pyramid_hold_what_they_can() -> None:
    levels = pyramid.of_images(jnp.full((1, 8, 8, 3), 0.8))
    assert float(jnp.abs(levels[0]).max()) > 0.1
    for level in levels[1:]:
        np.testing.assert_allclose(level, 0, atol=1e-6)


def test_extreme_pixels_can_still_be_learned() -> None:
    levels = pyramid.of_images(jnp.array([0.0, 1.0]).reshape(2, 1, 1, 1))
    slope = jax.grad(lambda x: pyramid.render(x).sum())(levels)
    np.testing.assert_allclose(pyramid.render(levels).ravel(), [0.02, 0.98], atol=1e-5)
    assert all(float(jnp.abs(part).min()) > 0.03 for part in slope)


def test_noise_is_gray_on_average_and_repeats() -> None:
    images = pyramid.render(pyramid.noise(jax.random.key(0), (20, 16, 16, 3)))
    assert abs(float(images.mean()) - 0.5) < 0.05
    assert 0.05 < float(images.std()) < 0.4
    again = pyramid.render(pyramid.noise(jax.random.key(0), (20, 16, 16, 3)))
    np.testing.assert_array_equal(images, again)


def draw(images: np.ndarray, seed: int = 0, count: int = 1, **changes: float) -> np.ndarray:
    options = {"min_scale": 0.3, "hflip": 0.0} | changes
    size = images.shape[1], images.shape[2]
    return np.asarray(
        random_views.draw(jax.random.key(seed), jnp.asarray(images), count, size, **options)
    )


def test_views_are_crops_of_their_images() -> None:
    """On a slope of brightness a crop is a straight part of it."""
    slope = np.broadcast_to(np.linspace(0, 1, 16)[:, None, None], (16, 16, 1))
    images = np.stack([slope, slope.swapaxes(0, 1)]).astype(np.float32)
    views = draw(images, count=6)
    assert views.shape == (12, 16, 16, 1)
    assert views.min() >= 0
    assert views.max() <= 1 + 1e-6
    for i, view in enumerate(views[..., 0]):
        along, across = (view.mean(1), view) if i % 2 == 0 else (view.mean(0), view.T)
        np.testing.assert_allclose(across, along[:, None] * np.ones(16), atol=1e-5)
        steps = np.diff(along)[2:-2]
        np.testing.assert_allclose(steps, steps.mean(), rtol=0.02)
        assert 0.3 * 0.8 / 15 < steps.mean() <= 1.01 / 15  # of the area: a side is its root
    assert len({view.tobytes() for view in views[::2]}) == 6


def test_views_are_mirrored_by_their_share() -> None:
    images = np.random.default_rng(0).random((1, 8, 8, 3)).astype(np.float32)
    straight, mirrored = draw(images, 3, hflip=0.0), draw(images, 3, hflip=1.0)
    np.testing.assert_array_equal(straight[:, :, ::-1], mirrored)


def toy_objective(**changes: object) -> PixelObjective:
    regression = KipObjective(
        (networks.parse("linear"),), 1e-2, outer=OUTER_LOSSES["ce"], learn_labels=True
    )
    rng = np.random.default_rng(0)
    fitted = preprocess.Preprocess(
        "centre",
        rng.normal(size=D).astype(np.float32),
        np.full(D, 0.5, np.float32),
    )
    given = PixelObjective(regression, Adam(0.03, 0.01), LinearEncoder(), fitted, views=3)
    return replace(given, **changes)  # pyright: ignore[reportArgumentType]


def toy_support() -> Support:
    images = np.random.default_rng(2).uniform(0.1, 0.9, (2, SIDE, SIDE, 3)).astype(np.float32)
    return Support(images, centred_one_hot(np.arange(2), 2), np.zeros((2, SIDE, SIDE, 1), bool))


def toy_targets() -> Examples:
    rng, labels = np.random.default_rng(3), np.arange(12) % 2
    rows = rng.normal(size=(12, 1, 1, D)) + labels[:, None, None, None]
    data = LabeledImages(rows.astype(np.float32), labels, CLASSES)
    return Examples(data, preprocess.identity(D), is_preprocessed=True)


def test_a_step_is_adam_on_the_gradient_of_the_whole() -> None:
    """The gradient through JAX, the backbone and JAX again is that of one function of all."""
    objective, support = toy_objective(), toy_support()
    state = objective.initial_state(support)
    key = jax.random.fold_in(jax.random.key(7), 0)
    with objective.stepper(support, toy_targets(), 12, 7) as stepper:
        x_t, y_t = stepper.draw(0)
        step = stepper.step(state, (x_t, y_t), 0)

    def loss(learned: dict) -> jax.Array:
        views = random_views.draw(
            key, pyramid.render(learned["images"]), 3, (SIDE, SIDE), min_scale=0.5, hflip=0.5
        )
        rows = LinearEncoder.features(views)[:, None, None, :]
        z = (rows - objective.preprocess.mean) / objective.preprocess.std
        y = jnp.concatenate([learned["labels"]] * 3)
        kernel = networks.parse("linear").kernel
        alpha = ridge.solve(kernel(z, z).astype(jnp.float64), y, 1e-2)
        scores = ridge.predict(kernel(z, jnp.asarray(x_t)), alpha)
        weights = jnp.full(12, 1 / 12)
        return OUTER_LOSSES["ce"].value(scores, jnp.asarray(y_t), weights, lambda part: part)

    learned = {"images": state.moments.levels, "labels": state.labels}
    with jax.enable_x64(True):
        value, slope = jax.jit(jax.value_and_grad(loss))(learned)
    assert step.loss == pytest.approx(float(value), rel=1e-5)
    moved, _ = objective.adam.move(learned, slope, state.moments.moments, jnp.float32(1))
    for mine, its in zip(step.state.moments.levels, moved["images"], strict=True):
        np.testing.assert_allclose(mine, its, atol=2e-4)  # of 0.03: Adam's first step is a sign
    np.testing.assert_allclose(step.state.labels, moved["labels"], atol=2e-4)
    np.testing.assert_array_equal(step.state.images, pyramid.render(step.state.moments.levels))


def test_steps_lower_the_loss_and_keep_pixels_in_range() -> None:
    objective, support = toy_objective(), toy_support()
    state, losses = objective.initial_state(support), []
    with objective.stepper(support, toy_targets(), 12, 0) as stepper:
        for number in range(40):
            step = stepper.step(state, stepper.draw(number), number)
            state = step.state
            losses.append(step.loss)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert 0 < float(state.images.min()) < float(state.images.max()) < 1


def test_a_step_that_is_not_finite_ends_the_run() -> None:
    objective, support = toy_objective(), toy_support()
    state = objective.initial_state(support)
    with objective.stepper(support, toy_targets(), 12, 0) as stepper:
        x_t, y_t = stepper.draw(0)
        with pytest.raises(UserError, match=r"not finite at step 0.*--ridge"):
            stepper.step(state, (np.full_like(x_t, np.nan), y_t), 0)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of two classes, one of them grayscale, and a run with batch normalisation."""
    folder = tmp_path_factory.mktemp("pixels")
    rng = np.random.default_rng(0)
    classes = {"dark": photos.shaded(rng, 90, 50), "light": photos.shaded(rng, 160, 50)}
    photos.write(folder / "photos", classes, train=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        given = ("--student", "resnet18(channels=(8,8,8,8))", "--steps", 4, "--out", "backbone")
        kd_support.main(patch, "train", "photos", *given)
    return folder


@pytest.fixture
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(work)
    monkeypatch.setenv("XDG_CACHE_HOME", str(work / "cache"))
    return work


def options(out: Path, **changes: object) -> KipOptions:
    given = KipOptions(
        "photos",
        features="backbone",
        images_per_class=1,
        steps=6,
        views=2,
        real_views=2,
        target_batch=20,
        device="cpu",
        out=out,
    )
    return replace(given, **changes)  # pyright: ignore[reportArgumentType]


def test_an_encoder_differentiates_its_backbone(inside: Path, monkeypatch) -> None:
    encoder = encoders.load("backbone", "embedding", (SIDE, SIDE, 3))
    images = np.random.default_rng(0).random((5, SIDE, SIDE, 3)).astype(np.float32)
    slope = np.random.default_rng(1).normal(size=(5, encoder.width)).astype(np.float32)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2)).clone().requires_grad_()
    (encoder.backbone(x) * torch.from_numpy(slope)).sum().backward()
    assert x.grad is not None
    expected = x.grad.permute(0, 2, 3, 1).numpy()
    rows, pullback = encoder.with_pullback(images)
    np.testing.assert_array_equal(rows, encoder(images))
    np.testing.assert_allclose(pullback(slope), expected, atol=1e-5)
    monkeypatch.setattr(encoders, "CHUNK", 2)
    rows_in_chunks, pullback = encoder.with_pullback(images)
    np.testing.assert_allclose(rows_in_chunks, rows, atol=1e-5)
    np.testing.assert_allclose(pullback(slope), expected, atol=1e-5)


@pytest.fixture(scope="module")
def finished(work: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        patch.setenv("XDG_CACHE_HOME", str(work / "cache"))
        return distil.run_kip(options(work / "finished"))


def test_a_run_saves_pixels_that_any_command_reads(finished: Path) -> None:
    distilled = distilled_set.load(finished / distilled_set.FILE_NAME)
    assert distilled.images.shape == (2, SIDE, SIDE, 3)
    assert 0 < distilled.images.min() < distilled.images.max() < 1
    assert distilled.preprocess.kind == "none"
    np.testing.assert_array_equal(distilled.labels, centred_one_hot(np.arange(2), 2))
    record = distilled.provenance
    assert record["backbone"]["layer"] == "embedding"
    assert record["kernel"] == "fc(1) on the features of backbone"
    assert record["config"]["outer"] == "ce"
    assert record["config"]["image_size"] == SIDE
    assert (finished / "distilled.png").is_file()
    assert not (finished / through_backbone.FEATURES_FILE).exists()


def test_a_stopped_run_ends_in_the_same_bits(
    inside: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = inside / "stopped", metrics_file.Metrics.write

    def stopping(self, step: int, **figures: float) -> None:
        write(self, step, **figures)
        if step == 3:
            raise StopInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metrics_file.Metrics, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            distil.run_kip(options(out))
    assert feature_file.read(out / through_backbone.FEATURES_FILE).record["views"] == 2
    distil.run_kip(KipOptions(out=out, resume=True))
    mine, its = (distilled_set.load(run / distilled_set.FILE_NAME) for run in (out, finished))
    np.testing.assert_array_equal(mine.images, its.images)
    config = json.loads((out / "config.json").read_text())
    assert config["features"] == str(inside / "backbone")


def test_evaluate_judges_it_through_its_backbone(inside: Path, finished: Path) -> None:
    given = EvaluateOptions(
        finished, learners="ridge,linear-probe@backbone", controls="random", seeds=1, device="cpu"
    )
    found = evaluation.run_trainings(evaluation_parts.assemble(given), [0], None)
    own = distilled_set.load(finished / distilled_set.FILE_NAME).provenance["metrics"]
    ours = [r for r in found if r.learner.startswith("ridge") and r.arm == "distilled"]
    assert ours[0].accuracy == pytest.approx(own["test_accuracy"], abs=1e-6)
    whole = distilled_set.load(finished / distilled_set.FILE_NAME)
    config = {**whole.provenance["config"], "layer": "layer3"}
    other = replace(whole, provenance={**whole.provenance, "config": config})
    with pytest.raises(UserError, match="made on the layer 'layer3'"):
        evaluation_parts.make_learners(
            ["ridge"], other, evaluation_parts.assemble(given).splits, given
        )
    with pytest.raises(UserError, match=r"through a backbone.*ridge@"):
        dsdistill.load(finished).predictor()


@pytest.fixture(scope="module")
def data(work: Path) -> dsdistill.ImageData:
    return dsdistill.load_data(work / "photos", image_size=SIDE, progress=False)


def by_call(data: dsdistill.ImageData, **changes: Any) -> dsdistill.Distilled:
    """As the command of `options`."""
    given = {
        "classes": data.classes,
        "features": "backbone",
        "images_per_class": 1,
        "steps": 6,
        "views": 2,
        "real_views": 2,
        "target_batch": 20,
        "device": "cpu",
        "progress": False,
    }
    return dsdistill.kip(*data.train, **given | changes)


def test_a_call_returns_the_set_of_the_command(
    inside: Path, finished: Path, data: dsdistill.ImageData
) -> None:
    by_command, before = dsdistill.load(finished), set(inside.iterdir())
    called = by_call(data)
    np.testing.assert_array_equal(called.images, by_command.images)
    np.testing.assert_array_equal(called.labels, by_command.labels)
    assert called.figures["validation_loss"] == by_command.figures["validation_loss"]
    assert called.preprocess.kind == "none"
    assert called.provenance["kernel"] == by_command.provenance["kernel"]
    assert called.provenance["backbone"] == by_command.provenance["backbone"]
    assert set(inside.iterdir()) == before
    with pytest.raises(UserError, match=r"through a backbone.*ridge@.*backbone as a learner"):
        called.predictor()
    report = dsdistill.evaluate(
        called,
        train=data.train,
        test=data.test,
        learners=["ridge"],
        controls=[],
        seeds=1,
        progress=False,
    )
    [row, *_] = report.rows
    assert row.accuracy is not None
    assert row.accuracy.mean == pytest.approx(by_command.figures["test_accuracy"], abs=1e-6)


def stop_at(number: int) -> OnStep:
    def stop(step: int, figures: Mapping[str, float]) -> None:
        if step == number:
            raise KeyboardInterrupt

    return stop


def test_a_stopped_call_goes_on_to_the_same_bits(
    inside: Path, finished: Path, data: dsdistill.ImageData, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        by_call(data, checkpoint=tmp_path / "run", on_step=stop_at(3))
    features = tmp_path / "run" / through_backbone.FEATURES_FILE
    assert features.exists()
    with pytest.raises(UserError, match="started with views 2, got 3"):
        by_call(data, checkpoint=tmp_path / "run", views=3)
    with pytest.raises(UserError, match="started with features"):
        by_call(data, checkpoint=tmp_path / "run", **pixels())
    steps: list[int] = []
    seen = {"checkpoint": tmp_path / "run", "on_step": lambda step, figures: steps.append(step)}
    expected = dsdistill.load(finished).images
    np.testing.assert_array_equal(by_call(data, **seen).images, expected)
    assert not features.exists()
    assert steps[-1] == 6
    assert 1 not in steps
    steps.clear()
    np.testing.assert_array_equal(by_call(data, **seen).images, expected)
    assert not steps
    with pytest.raises(UserError, match="other data or arguments: choose another checkpoint"):
        by_call(data, **seen | pixels())


def pixels() -> dict[str, Any]:
    """Arguments of a call without a backbone that are otherwise those of one."""
    without = {"features": None, "views": 3, "device": "auto", "outer": "ce", "ridge": 1e-2}
    return without | {"learning_rate": 0.05, "schedule": "cosine"}


class Wrapped(torch.nn.Module):
    """The backbone of a run as a module of one's own, with a part that training changes."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self.backbone = encoders.load(run, "embedding", (SIDE, SIDE, 3)).backbone
        self.dropout = torch.nn.Dropout(0.9)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.backbone(images))


def test_a_module_is_a_backbone_too(
    inside: Path, finished: Path, data: dsdistill.ImageData, tmp_path: Path
) -> None:
    """Of the same features, the set is the same; the module comes back as it was."""
    module = Wrapped("backbone").train().requires_grad_(True)
    given: dict[str, Any] = {"features": module, "device": "auto", "checkpoint": tmp_path / "run"}
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        by_call(data, **given, on_step=stop_at(3))
    assert all(part.training for part in module.modules())
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    called = by_call(data, **given)
    np.testing.assert_array_equal(called.images, dsdistill.load(finished).images)
    np.testing.assert_array_equal(by_call(data, **given).images, called.images)
    assert called.provenance["kernel"] == "fc(1) on the features of a module"
    with pytest.raises(UserError, match=r"features and no pixels: name a kernel of pixels"):
        called.predictor()
    arrays: dict[str, Any] = {"train": data.train, "test": data.test, "controls": [], "seeds": 1}
    with pytest.raises(UserError, match="a module that only its maker has: leave ridge out"):
        dsdistill.evaluate(called, **arrays, learners=["ridge"], progress=False)
    chosen = [
        dsdistill.select(*data.train, features=each, images_per_class=1, progress=False).images
        for each in (module, inside / "backbone")
    ]
    np.testing.assert_array_equal(chosen[0], chosen[1])
    with torch.no_grad():
        next(module.parameters()).add_(1)
    with pytest.raises(UserError, match="other data or arguments: choose another checkpoint"):
        by_call(data, **given)


class Pooled(torch.nn.Module):
    def __init__(self, *, flat: bool = True, detached: bool = False) -> None:
        super().__init__()
        self.flat, self.detached = flat, detached

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = images.mean((2, 3), keepdim=not self.flat)
        return rows.detach() if self.detached else rows


def test_a_module_without_parameters_sees_grayscale(data: dsdistill.ImageData) -> None:
    images, labels = data.train
    gray = images.mean(-1).astype(np.uint8)
    given: dict[str, Any] = {"images_per_class": 1, "steps": 2, "progress": False}
    called = dsdistill.kip(gray, labels, features=Pooled().double(), target_batch=9, **given)
    assert called.images.shape == (2, SIDE, SIDE, 1)
    assert called.provenance["backbone"]["weights_sha256"]
    with pytest.raises(UserError, match="features learns square images, got 8x6: crop or resize"):
        dsdistill.kip(gray[:, :, :6], labels, features=Pooled(), **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": Pooled(flat=False)}, r"features \(2, d\) of 2 images, got \(2, 3, 1, 1\)"),
        ({"features": Pooled(detached=True)}, "have no gradient in the images"),
        ({"features": torch.nn.Linear(5, 2)}, r"cannot take images \(2, 3, 8, 8\)"),
        ({"features": len}, "a torch module, whose gradient is needed, got builtin_function"),
        ({"features": Pooled(), "layer": "fc"}, "layer is for networks by their names"),
        ({"features": Pooled(), "device": "cpu"}, "device is for networks by their names"),
        ({"features": "nowhere/run", "device": "cpu"}, "nowhere/run"),
        (
            {"features": None, "views": 3, "device": "auto", "real_views": 5},
            "real_views needs",
        ),
        ({"augment": "flip", "device": "cpu"}, "augment does not go with features"),
    ],
)
def test_a_wrong_network_of_a_call_is_one_line(
    inside: Path, data: dsdistill.ImageData, tmp_path: Path, changes: dict, message: str
) -> None:
    given = {"device": "auto", "checkpoint": tmp_path / "run"} | changes
    with pytest.raises(UserError, match=message) as error:
        by_call(data, **given)
    assert "\n" not in str(error.value)
    assert "--" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_noise_is_a_start_too(inside: Path, tmp_path: Path) -> None:
    run = distil.run_kip(options(tmp_path / "noise", init="noise", steps=2))
    assert distilled_set.load(run / distilled_set.FILE_NAME).images.shape == (2, SIDE, SIDE, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": "nowhere/run"}, "nowhere/run"),
        ({"layer": "nowhere"}, "nowhere"),
        ({"optimizer": "gauss-newton"}, "--features needs --optimizer adam"),
        ({"augment": "flip"}, "--augment does not go with --features"),
        ({"preprocess": "zca"}, "--preprocess does not go with --features"),
        ({"warm_up": "fc"}, "--warm-up does not go with --features"),
        ({"corruption": 0.5}, "--corruption does not go with --features"),
        ({"support_flips": True}, "--support-flips does not go with --features"),
        ({"target_batch": "2s"}, "--target-batch must be a number of images with --features"),
        ({"views": 0}, "--views must be at least 1, got 0"),
        ({"real_views": 0}, "--real-views must be at least 1, got 0"),
        ({"min_scale": 1.5}, r"--min-scale must be in \(0, 1\], got 1.5"),
        ({"kernel": "convnet"}, "convnet"),
        ({"kernel": "linear", "ridge": 1e-6, "views": 9}, "singular for more than 9 images"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    inside: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        distil.run_kip(options(tmp_path / "run", **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_several_hosts_are_refused_before_they_wait(
    inside: Path, data: dsdistill.ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command before it connects; by a call, and on `--resume`, before it loads anything."""
    given = options(tmp_path / "run", hosts="127.0.0.1:1,0/2")
    with pytest.raises(UserError, match="on one host: start the command once, with --hosts none"):
        cli.kip(given)
    monkeypatch.setattr(encoders, "load", None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="features works on one host: call it in one process"):
        by_call(data)
    assert not (tmp_path / "run").exists()


def test_options_of_a_backbone_need_one(tmp_path: Path) -> None:
    given = KipOptions("digits", views=4, out=tmp_path / "run")
    with pytest.raises(UserError, match="--views needs --features"):
        distil.run_kip(given)
