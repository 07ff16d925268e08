"""The Gauss-Newton step: its derivative, its solution, and steps that are too long."""

import functools
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsdistill.harness.data.labeled_images import Examples, LabeledImages
from dsdistill.harness.data.preprocess import identity
from dsdistill.harness.errors import UserError
from dsdistill.kernels import gram, networks
from dsdistill.methods import gauss_newton, kip, ridge
from dsdistill.methods.adam import Adam
from dsdistill.methods.gauss_newton import GaussNewton, GaussNewtonState, Problem
from dsdistill.methods.initial_support import draw_support
from dsdistill.methods.outer_loss import OUTER_LOSSES, OuterLoss, SquaredError
from dsdistill.methods.targets import TargetBatches
from dsdistill.parallel import devices

NETWORKS = {name: networks.parse(name) for name in ("fc", "CR-flatten")}
STRENGTH, MSE = 1e-3, SquaredError()


def examples(n: int = 60) -> Examples:
    """Images of three classes that differ in their means."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 3
    images = rng.standard_normal((3, 6, 6, 1))[labels] + rng.standard_normal((n, 6, 6, 1))
    data = LabeledImages(images.astype(np.float32), labels, ("a", "b", "c"))
    return Examples(data, identity(1), is_preprocessed=True)


TRAIN = examples()
SUPPORT = draw_support(TRAIN, 1, noise=False, corruption=0, seed=0)
X_T, Y_T = TargetBatches(TRAIN, 9, 0).draw(0)
WEIGHTS = np.full(len(X_T), 1 / len(X_T))


def compiled(work):
    """Run `work` inside `devices.shard_targets` with all targets on one device."""
    assert jax.device_count() == 1
    share = devices.shard_targets(lambda whole, real, x_t: work(*whole))
    program = jax.jit(lambda *whole: share(whole, len(X_T), X_T))

    def run(*arguments):
        with jax.enable_x64(True):
            return program(*arguments)

    return run


def alone(work, *arguments):
    """Run `work` once."""
    return compiled(work)(*arguments)


def problem(name: str, free: np.ndarray | None = None, outer: OuterLoss = MSE) -> Problem:
    slopes = gauss_newton.require_slopes(NETWORKS[name])
    free = np.ones(SUPPORT.images.shape, bool) if free is None else free
    arrays = map(jnp.asarray, (free, X_T, Y_T, WEIGHTS))
    return Problem(slopes, STRENGTH, *arrays, len(X_T), outer)


def support() -> dict[str, jax.Array]:
    labels = SUPPORT.labels + np.random.default_rng(1).standard_normal(SUPPORT.labels.shape) / 9
    return {"images": jnp.asarray(SUPPORT.images), "labels": jnp.asarray(labels, jnp.float32)}


def change(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(v.shape).astype(np.float32) for n, v in support().items()}


def predicted(name: str, at: dict[str, np.ndarray]) -> np.ndarray:
    """Predictions by the definition, in float64."""
    with jax.enable_x64(True):
        x_s, x_t = (jnp.asarray(x, jnp.float64) for x in (at["images"], X_T))
        kernel = NETWORKS[name].kernel
        return np.asarray(
            ridge.predict(kernel(x_s, x_t), ridge.solve(kernel(x_s, x_s), at["labels"], STRENGTH))
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_the_derivative_is_that_of_the_predictions(name):
    """J agrees with a central difference, and <J v, u> = <v, J^T u>."""
    at, v = support(), change(2)
    u = np.random.default_rng(3).standard_normal(Y_T.shape)

    def both(at, v, u):
        p, forward, backward = gauss_newton.linearise(problem(name), at, at)
        return p, forward(v), backward(u)

    p, along, back = alone(both, at, v, u)
    far, near = ({n: np.float64(at[n]) + s * v[n] for n in at} for s in (1e-5, -1e-5))
    expected = (predicted(name, far) - predicted(name, near)) / 2e-5
    np.testing.assert_allclose(p, predicted(name, at), atol=1e-5)
    np.testing.assert_allclose(along, expected, atol=2e-5 * np.abs(expected).max())
    inner = sum(float(np.sum(np.float64(v[n]) * back[n])) for n in v)
    assert inner == pytest.approx(float(np.sum(along * u)), rel=1e-5)


def test_frozen_pixels_neither_move_nor_count():
    free = np.random.default_rng(4).random(SUPPORT.images.shape) < 0.5

    def both(at, v, u):
        _, forward, backward = gauss_newton.linearise(problem("fc", free), at, at)
        return forward(v), backward(u)["images"]

    at, v = support(), change(2)
    along, back = alone(both, at, v, np.ones(Y_T.shape))
    other = v | {"images": np.where(free, v["images"], 7)}
    np.testing.assert_array_equal(alone(both, at, other, np.ones(Y_T.shape))[0], along)
    assert (np.asarray(back)[~free] == 0).all()
    assert (np.asarray(back)[free] != 0).all()


def stepped(
    at: dict,
    last: GaussNewtonState,
    *,
    rate: float,
    damping: float,
    outer: OuterLoss = MSE,
):
    """One step, with the loss from the definition of KIP."""
    step = _step(outer, damping, gauss_newton.ITERATIONS, gauss_newton.PROBES)
    return step(at, last, np.float32(rate))


@functools.cache
def _step(outer: OuterLoss, damping: float, *constants: int):
    """The program of a step with these constants of `gauss_newton`."""
    kernel = NETWORKS["fc"].kernel

    def of(at, last, rate):
        def loss(values):
            x_s = values["images"].astype(jnp.float64)
            k_ss, k_st = kernel(x_s, x_s), kernel(x_s, jnp.asarray(X_T, jnp.float64))
            predictions = ridge.predict(k_st, ridge.solve(k_ss, values["labels"], STRENGTH))
            return outer.value(predictions, Y_T, WEIGHTS, devices.total)

        options = {"rate": rate, "damping": damping, "key": jax.random.key(0)}
        return gauss_newton.step(problem("fc", outer=outer), at, at, last, loss, **options)

    return compiled(of)


def model_of(outer: OuterLoss, predictions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gradient of an outer loss, and rows R with R^T R = H."""

    def work(predictions):
        model = outer.quadratic(predictions, jnp.asarray(Y_T), jnp.asarray(WEIGHTS))
        return model.gradient, jax.vmap(model.root)(jnp.eye(Y_T.size).reshape(-1, *Y_T.shape))

    gradient, roots = alone(work, predictions)
    return np.asarray(gradient), np.asarray(roots).reshape(Y_T.size, Y_T.size)


@pytest.mark.parametrize("name", OUTER_LOSSES)
def test_the_step_solves_the_damped_problem(name, monkeypatch):
    """The step equals the dense solution after as many iterations as there are unknowns."""
    monkeypatch.setattr(gauss_newton, "ITERATIONS", 400)
    monkeypatch.setattr(gauss_newton, "PROBES", 2000)  # the mean of the diagonal, nearly exactly
    at = support()
    outer = OUTER_LOSSES[name]
    first = gauss_newton.initial_state(at)
    *_, after = stepped(at, first, rate=0.1, damping=0.5, outer=outer)
    unit = np.eye(sum(v.size for v in at.values()))

    def jacobian(at):
        _, _, backward = gauss_newton.linearise(problem("fc"), at, at)
        rows = jax.vmap(backward)(jnp.eye(Y_T.size).reshape(-1, *Y_T.shape))
        return jnp.concatenate([rows[n].reshape(Y_T.size, -1) for n in at], 1)

    gradient, roots = model_of(outer, predicted("fc", at))
    j = np.float64(alone(jacobian, at))
    diagonal = ((roots @ j) ** 2).sum(0)
    n = at["images"].size
    means = np.concatenate([np.full(n, diagonal[:n].mean()), np.full(9, diagonal[n:].mean())])
    curvature = (roots @ j).T @ (roots @ j)
    expected = np.linalg.solve(curvature + 0.5 * means * unit, j.T @ gradient.ravel())
    direction = np.concatenate([np.ravel(after.direction[name]) for name in at])
    np.testing.assert_allclose(direction, expected, atol=0.03 * np.abs(expected).max())


def test_a_step_lowers_the_loss_of_its_batch_and_remembers_its_direction():
    at = support()
    loss, moved, after = stepped(at, gauss_newton.initial_state(at), rate=0.3, damping=0.1)
    lower, *_ = stepped(moved, after, rate=0.3, damping=0.1)
    assert float(lower) < float(loss)
    assert int(after.count) == 1
    for name, direction in after.direction.items():
        taken = np.asarray(at[name] - moved[name])
        np.testing.assert_allclose(taken, 0.3 * np.asarray(direction), atol=1e-6)


def test_a_step_too_far_is_taken_back_and_the_damping_grows_until_one_is_kept():
    at = support()
    after = replace(
        gauss_newton.initial_state(at), direction={n: jnp.asarray(v) for n, v in at.items()}
    )
    boosts, kept = [], False
    for _ in range(30):
        before = at
        _, at, after = stepped(at, after, rate=30.0, damping=1e-6)
        boosts.append(float(after.boost))
        kept = any((np.asarray(at[n]) != np.asarray(before[n])).any() for n in at)
        if kept:
            break
        assert boosts[-1] == gauss_newton.DAMPING_RISE ** len(boosts)
    assert kept
    assert len(boosts) > 1


def test_images_alone_when_labels_are_not_learned():
    objective = kip.KipObjective((NETWORKS["fc"],), optimizer=GaussNewton(0.3))
    *_, last = kip.distill(objective, SUPPORT, TRAIN, steps=3, target_batch=30, seed=0)
    np.testing.assert_array_equal(last.state.labels, SUPPORT.labels)
    assert (np.asarray(last.state.images) != SUPPORT.images).all()


def test_ten_steps_do_what_a_hundred_of_adam_do():
    losses = {}
    for optimizer, steps in ((Adam(0.04), 101), (GaussNewton(0.5), 11)):
        objective = kip.KipObjective((NETWORKS["fc"],), optimizer=optimizer, learn_labels=True)
        *_, last = kip.distill(objective, SUPPORT, TRAIN, steps=steps, target_batch=60, seed=0)
        losses[type(optimizer)] = last.loss
    assert losses[GaussNewton] < losses[Adam]


def test_a_kernel_without_slopes_is_refused():
    network = replace(
        NETWORKS["fc"], slopes=None, engine=networks.Engine.NEURAL_TANGENTS, name="mine:net"
    )
    with pytest.raises(UserError, match="mine:net is computed by neural-tangents: use --optimizer"):
        gauss_newton.require_slopes(network)


def test_slopes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="lower --target-batch"):
        gauss_newton.check_memory(np.broadcast_to(np.float32(0), (5000, 224, 224, 3)), 100_000)


def test_slopes_that_do_not_fit_are_refused_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(gram, "free_bytes", lambda: 1e3)
    network = replace(NETWORKS["fc"], kernel=None, slopes=None)  # can compute nothing
    objective = kip.KipObjective((network,), optimizer=GaussNewton())
    with pytest.raises(UserError, match=r"need .* lower --target-batch"):
        next(kip.distill(objective, SUPPORT, TRAIN, steps=1, target_batch=60, seed=0))


def test_the_command(dsdistill, tmp_path):
    out = tmp_path / "run"
    options = ["--optimizer", "gauss-newton", "--learn-labels", "--steps", 8, "--out", out]
    done = dsdistill("kip", "digits", "--images-per-class", 1, "--target-batch", 200, *options)
    assert done.returncode == 0, done.stderr
    config = (Path(out) / "config.json").read_text()
    assert '"schedule": "cosine"' in config
    assert '"learning_rate": 0.3' in config
    for wrong, words in (
        (["--learning-rate", 2], "is a fraction of the step"),
        (["--label-learning-rate", 0.1], "--label-learning-rate needs --optimizer adam"),
        (["--damping", 0], "--damping must be positive"),
    ):
        done = dsdistill("kip", "digits", *options[:3], *wrong, "--out", tmp_path / "no")
        assert done.returncode == 1
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "no").exists()
