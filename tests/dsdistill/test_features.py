"""Kernels of finite networks' features: values, gradients, fresh networks, the pool, whole runs."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import dsdistill
from dsdistill.commands import prepare
from dsdistill.commands.distil import run_kip
from dsdistill.harness.data.labeled_images import Examples, LabeledImages
from dsdistill.harness.data.preprocess import identity
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import metrics_file, run_folder
from dsdistill.kernels import features, networks
from dsdistill.kernels.features import BIAS, FeatureNetwork
from dsdistill.loops.kip_loop import run_to_end
from dsdistill.loops.plan import Phase, Plan
from dsdistill.methods import kip, ridge
from dsdistill.methods.initial_support import draw_support
from dsdistill.methods.network_sources import FreshNetworks, NetworkPool, Pool
from dsdistill.options import KipOptions, with_defaults
from dsdistill.parallel import devices
from kd.models.zoo import builtin

SMALL = FeatureNetwork(4)


def examples(seed: int, n: int) -> Examples:
    """8x8 images of three classes that differ in their means."""
    means = np.random.default_rng(0).standard_normal((3, 8, 8, 1))
    labels = np.arange(n) % 3
    noise = np.random.default_rng(seed).standard_normal((n, 8, 8, 1))
    data = LabeledImages((means[labels] + noise).astype(np.float32), labels, ("a", "b", "c"))
    return Examples(data, identity(1), is_preprocessed=True)


TRAIN, VALIDATION = examples(1, 90), examples(2, 30)
SUPPORT = draw_support(TRAIN, 2, noise=False, corruption=0, seed=0)


def noise(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def plain_features(parameters, x):
    """The same network in the terms of XLA, all images at once."""
    for block in parameters:
        x = jax.lax.conv_general_dilated(
            x, block["weights"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        mean, variance = x.mean((1, 2), keepdims=True), x.var((1, 2), keepdims=True)
        x = (x - mean) / jnp.sqrt(variance + 1e-5) * block["scale"] + block["shift"]
        window = (1, 2, 2, 1)
        x = jax.lax.reduce_window(jax.nn.relu(x), 0.0, jax.lax.add, window, window, "VALID") / 4
    return x.reshape(len(x), -1)


def random_parameters(network: FeatureNetwork, channels: int):
    """Parameters none of which is 0 or 1."""
    parameters = network.initial_parameters(jax.random.key(0), channels)
    return jax.tree.map(lambda leaf: leaf + 0.1 * noise(*leaf.shape, seed=leaf.size), parameters)


def test_features_are_those_of_the_convnet_that_kd_trains():
    network, parameters = FeatureNetwork(6), random_parameters(FeatureNetwork(6), 3)
    x = noise(73, 13, 10, 3)  # two chunks, with padding; odd sides
    module = builtin.convnet((13, 10, 3), 5, 6)[:-2]  # without Flatten and readout
    for block, i in zip(parameters, (0, 4, 8), strict=True):
        convolution, norm = module[i], module[i + 1]
        weights = np.array(block["weights"]).transpose(3, 2, 0, 1)
        convolution.weight.data = torch.from_numpy(weights.copy())
        norm.weight.data, norm.bias.data = (
            torch.from_numpy(np.array(block[name])) for name in ("scale", "shift")
        )
    with torch.no_grad():
        expected = module(torch.from_numpy(np.array(x)).permute(0, 3, 1, 2))
    found = network.features(parameters, x)
    assert found.shape == (73, network.dimension((13, 10, 3)))
    np.testing.assert_allclose(
        found, expected.permute(0, 2, 3, 1).reshape(73, -1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("stored", [0, 2**30])
def test_gradients_are_those_of_plain_convolutions(monkeypatch, stored):
    """In images and in parameters, chunk by chunk, stored or evaluated again."""
    monkeypatch.setattr(features, "MAX_STORED_BYTES", stored)
    parameters, x = random_parameters(SMALL, 2), noise(71, 9, 8, 2)
    weights = noise(71, SMALL.dimension((9, 8)), seed=1)

    def slopes(function):
        def value(parameters, x):
            return jnp.sum(weights * function(parameters, x) ** 2)

        return jax.jit(jax.grad(value, argnums=(0, 1)))(parameters, x)

    for found, expected in zip(
        jax.tree.leaves(slopes(SMALL.features)),
        jax.tree.leaves(slopes(plain_features)),
        strict=True,
    ):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * scale)


def test_the_named_kernel_is_the_mean_over_fixed_networks():
    network = networks.parse("features:convnet:4")
    assert network.name == "features:convnet:4"
    x, z = noise(5, 8, 9, 1), noise(7, 8, 9, 1, seed=1)
    fixed = features.fixed_networks(FeatureNetwork(4), 1)
    count = len(jax.tree.leaves(fixed)[0])
    expected = 0
    for i in range(count):
        member = jax.tree.map(lambda leaf, i=i: leaf[i], fixed)
        f, g = plain_features(member, x), plain_features(member, z)
        expected = expected + (f @ g.T / f.shape[1] + BIAS**2) / count
    np.testing.assert_allclose(network.kernel(x, z), expected, rtol=1e-4)
    with jax.enable_x64(True):
        k_ss = ridge.support_gram(
            network, x, ridge.support_tile(network, 5, (8, 9, 1), gradient=False)
        )
        assert k_ss.dtype == jnp.float64
        np.testing.assert_allclose(k_ss, network.kernel(x, x), rtol=1e-4)


def kip_objective(source, **changes) -> kip.KipObjective:
    return kip.KipObjective((networks.parse("features:convnet:4"),), 1e-2, source=source, **changes)


@pytest.mark.parametrize(("count", "flips"), [(1, False), (3, True)])
def test_the_loss_of_a_step_is_that_of_its_networks(count, flips):
    """Kernel, solve and loss of a step against dense formulas; its gradient by Adam's sign."""
    source = FreshNetworks(SMALL, count)
    objective = kip_objective(source, flips=flips)
    with kip.Stepper(objective, SUPPORT, TRAIN, 30, seed=3) as stepper:
        x_t, y_t = stepper.draw(5)
        before = objective.initial_state(SUPPORT)
        step = stepper.step(before, (x_t, y_t), 5)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 5), kip.NETWORK_KEY)
    with jax.enable_x64(True):
        drawn = source.draw((), key, 1)

        def loss(x_s):
            k_ss = k_st = 0
            y_s = SUPPORT.labels
            if flips:
                x_s, y_s = jnp.concatenate([x_s, x_s[:, :, ::-1]]), np.concatenate([y_s, y_s])
            for i in range(count):
                member = jax.tree.map(lambda leaf, i=i: leaf[i], drawn)
                f, g = plain_features(member, x_s), plain_features(member, x_t)
                k_ss += (f @ f.T / f.shape[1] + BIAS**2) / count
                k_st += (f @ g.T / f.shape[1] + BIAS**2) / count
            predictions = k_st.T @ ridge.solve(k_ss.astype(float), y_s, 1e-2)
            return 0.5 * jnp.mean((predictions - y_t) ** 2)

        value, slope = jax.value_and_grad(loss)(jnp.asarray(SUPPORT.images))
    np.testing.assert_allclose(step.loss, value, rtol=1e-4)
    moved, slope = np.asarray(step.state.images - before.images), np.asarray(slope)
    clear = np.abs(slope) > 0.01 * np.abs(slope).max()  # the sign of the others is rounding
    np.testing.assert_allclose(moved[clear], -0.04 * np.sign(slope[clear]), rtol=1e-3)


LABELS = noise(6, 3, seed=5)  # unbalanced: no gradient of a readout is 0


def pool_step(source: NetworkPool):
    """The compiled training step of a pool, a function of its state and a key."""
    images = jnp.asarray(SUPPORT.images)

    def share(at: tuple[Pool, jax.Array], real: jax.Array, rows: jax.Array) -> Pool:
        return source.train(*at, images, LABELS)

    return jax.jit(lambda state, key: devices.shard_targets(share)((state, key), 1, images))


def test_a_pool_trains_the_network_that_a_step_has_used():
    source = NetworkPool(SMALL, seed=1, size=3, lifetime=100, learning_rate=0.01)
    before = source.initial_state((8, 8, 1), 3)
    key = jax.random.key(7)
    after = pool_step(source)(before, key)
    used = [i for i in range(3) if after.ages[i] != before.ages[i]]
    assert len(used) == 1
    i = used[0]
    drawn = source.draw(before, key, 1)
    for leaf, whole in zip(*map(jax.tree.leaves, (drawn, before.networks)), strict=True):
        np.testing.assert_array_equal(leaf[0], whole[i])

    def loss(learned):
        parameters, head = learned
        outputs = plain_features(parameters, SUPPORT.images) @ head["weights"] + head["bias"]
        return 0.5 * jnp.mean((outputs - LABELS) ** 2)

    member = jax.tree.map(lambda leaf: leaf[i], (before.networks, before.heads))
    adam = optax.adam(0.01)
    change, _ = adam.update(jax.grad(loss)(member), adam.init(member))
    expected = optax.apply_updates(member, change)
    found = (after.networks, after.heads)
    for new, old, want in zip(
        *map(jax.tree.leaves, (found, (before.networks, before.heads), expected)), strict=True
    ):
        others = [j for j in range(3) if j != i]
        np.testing.assert_array_equal(new[jnp.array(others)], old[jnp.array(others)])
        np.testing.assert_allclose(new[i], want, atol=2e-5)
    assert loss(jax.tree.map(lambda leaf: leaf[i], found)) < loss(member)


def test_a_network_starts_anew_at_the_end_of_its_life():
    source = NetworkPool(SMALL, size=1, lifetime=3)
    state, lives, train = source.initial_state((8, 8, 1), 3), [], pool_step(source)
    for step in range(6):
        state = train(state, jax.random.key(step))
        lives.append((int(state.ages[0]), bool(np.any(state.heads["bias"]))))
    # Its readout starts at 0 again, and so do the moments of Adam.
    assert lives == [(1, True), (2, True), (0, False)] * 2
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.moments))
    ages = NetworkPool(SMALL, size=4, lifetime=8).initial_state((8, 8, 1), 3).ages
    assert list(ages) == [0, 2, 4, 6]


def walk(source, *, warm_up: int = 0) -> Plan:
    main = Phase(kip_objective(source, learn_labels=True), 5)
    first = Phase(kip.KipObjective((networks.parse("fc"),), learn_labels=True), warm_up)
    return Plan((first, main) if warm_up else (main,), target_batch=30, seed=0)


def opened(folder: Path) -> run_folder.Run:
    resume = (folder / "config.json").exists()
    return run_folder.start(folder, {}, result="result", resume=resume)


SOURCES = {
    "fresh": FreshNetworks(SMALL, 2),
    "pool": NetworkPool(SMALL, size=2, lifetime=2, learning_rate=0.01),
}


@pytest.mark.parametrize(
    ("name", "warm_up", "stop"), [("fresh", 0, 3), ("pool", 0, 3), ("pool", 2, 2), ("pool", 2, 5)]
)
def test_resume_is_exact_with_the_networks_of_every_step(
    name, warm_up, stop, tmp_path, monkeypatch
):
    """Also from the end of a warm-up without networks, whose checkpoint has none."""
    plan = walk(SOURCES[name], warm_up=warm_up)
    best, last = run_to_end(opened(tmp_path / "whole"), plan, SUPPORT, TRAIN, VALIDATION)
    write = metrics_file.Metrics.write

    def stopping(self, step: int, **figures: float) -> None:
        if step == stop + 1:
            raise KeyboardInterrupt
        write(self, step, **figures)

    with monkeypatch.context() as context:
        context.setattr(metrics_file.Metrics, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_to_end(opened(tmp_path / "cut"), plan, SUPPORT, TRAIN, VALIDATION)
    found, end = run_to_end(opened(tmp_path / "cut"), plan, SUPPORT, TRAIN, VALIDATION)
    for one, other in zip(*map(jax.tree.leaves, (end.state, last.state)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (found.step, found.loss) == (best.step, best.loss)
    texts = [(tmp_path / x / "metrics.jsonl").read_text() for x in ("whole", "cut")]
    assert texts[0] == texts[1]


def test_a_run_is_stored_with_a_kernel_that_anyone_can_predict_with(tmp_path):
    options = KipOptions(
        "digits",
        kernel="features:convnet:8",
        images_per_class=1,
        steps=3,
        target_batch=50,
        support_flips=True,
        out=tmp_path / "run",
    )
    run_kip(options)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["networks"] == "pool"
    loaded = dsdistill.load(tmp_path / "run")
    data = dsdistill.load_data("digits", progress=False)
    scores = loaded.predictor()(data.test[0])
    accuracy = np.mean(scores.argmax(1) == data.test[1])
    np.testing.assert_allclose(accuracy, loaded.figures["test_accuracy"], atol=1e-9)


WRONG = {
    "features:resnet": ({}, "unknown network of features 'resnet'"),
    "features:convnet:0": ({}, "a width is a positive whole number"),
    "features:convnet:x": ({}, "a width is a positive whole number"),
    "features:convnet:4": ({"depth": 2}, "takes no --depth"),
    "features:convnet:4,fc": ({}, "stands alone"),
    "fc": ({"networks": "pool"}, "--networks pool is for kernels of features"),
    "features:convnet": ({"optimizer": "gauss-newton"}, "gauss-newton"),
    "features:convnet:5": ({"image_size": 6}, "at least 8x8"),
    "features:convnet:6": ({"w_std": 1.0}, "leave --w-std and --b-std out, got 1 and 0.1"),
    "fc(2)": (
        {"optimizer": "gauss-newton", "support_flips": True},
        "--support-flips needs --optimizer adam",
    ),
}


@pytest.mark.parametrize("kernel", WRONG)
def test_wrong_input_is_one_line(kernel):
    changes, message = WRONG[kernel]
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        prepare.prepare(with_defaults(KipOptions("digits", kernel=kernel, **changes)))
    assert "\n" not in str(caught.value)


def test_deviations_of_a_warm_up_or_an_earlier_run_are_no_error():
    given = KipOptions("digits", kernel="features:convnet:4", b_std=0.2, images_per_class=1)
    prepare.prepare(with_defaults(replace(given, warm_up="fc")))
    prepare.prepare(with_defaults(given), {})
