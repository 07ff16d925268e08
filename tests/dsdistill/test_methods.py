"""KIP and Label Solve: gradients, draws, and what is learned."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsdistill.harness.data.labeled_images import Examples, LabeledImages, centred_one_hot
from dsdistill.harness.data.preprocess import identity
from dsdistill.harness.errors import UserError
from dsdistill.kernels import gram, networks
from dsdistill.kernels.dense import fc_ntk
from dsdistill.methods import kip, label_solve, ridge
from dsdistill.methods.adam import Adam
from dsdistill.methods.initial_support import Support, draw_support
from dsdistill.methods.outer_loss import OUTER_LOSSES
from dsdistill.methods.targets import TargetBatches


@pytest.fixture(scope="module")
def train() -> Examples:
    """90 images of three classes that differ in their means, the last class scarcer."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [40, 35, 15])
    means = rng.standard_normal((3, 6, 6, 1))
    images = (means[labels] + rng.standard_normal((90, 6, 6, 1))).astype(np.float32)
    return Examples(
        LabeledImages(images, labels, ("a", "b", "c")), identity(1), is_preprocessed=True
    )


def objective(**changes) -> kip.KipObjective:
    return kip.KipObjective((networks.parse("fc"),), **changes)


def start(train: Examples, **changes) -> Support:
    options = {"noise": False, "corruption": 0.0, "seed": 0} | changes
    return draw_support(train, 2, **options)


def run(train: Examples, steps: int = 5, support: Support | None = None, **changes):
    support = support or start(train)
    stream = kip.distill(objective(**changes), support, train, steps=steps, target_batch=60, seed=0)
    return list(stream)


@pytest.mark.parametrize("name", OUTER_LOSSES)
def test_gradient_equals_finite_differences(train, name):
    """The gradient of the whole loss, through kernel, tiles and solution, in float64."""
    support = start(train)
    y_s, y_t = jnp.asarray(support.labels, float), jnp.asarray(train.labels())
    with jax.enable_x64(True):
        x_s, x_t = jnp.asarray(support.images, float), jnp.asarray(train.images(), float)

        def loss(x):
            k_ss = ridge.support_gram(networks.parse("fc"), x, gram.Tile(4, 4))
            k_st = gram.gram(fc_ntk, x, x_t, gram.Tile(4, 32))
            predictions = ridge.predict(k_st, ridge.solve(k_ss, y_s, 1e-3))
            weights = jnp.full(len(y_t), 1 / len(y_t))
            return OUTER_LOSSES[name].value(predictions, y_t, weights, lambda part: part)

        direction = jnp.asarray(np.random.default_rng(1).standard_normal(x_s.shape))
        slope = (jax.grad(loss)(x_s) * direction).sum()
        step = 1e-5
        difference = (loss(x_s + step * direction) - loss(x_s - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=1e-5)


def test_first_step_is_adam_on_the_reference_loss(train):
    """Loss and step agree with the authors' formulas, all in float64."""
    support = start(train)
    with jax.enable_x64(True):
        drawn = TargetBatches(train, 60, 0).draw(0)
        x_s, y_s, x_t, y_t = (
            jnp.asarray(a, jnp.float64) for a in (support.images, support.labels, *drawn)
        )

        def loss(x):
            k_ss, k_ts = fc_ntk(x, x), fc_ntk(x_t, x)
            regular = k_ss + 1e-2 * jnp.trace(k_ss) / len(x) * jnp.eye(len(x))
            return 0.5 * jnp.mean((k_ts @ jnp.linalg.inv(regular) @ y_s - y_t) ** 2)

        value, gradient = jax.value_and_grad(loss)(x_s)
        gradient = np.asarray(gradient)
    first = run(train, steps=1)[0]
    np.testing.assert_allclose(first.loss, value, rtol=1e-4)
    moved = np.asarray(first.state.images) - support.images
    adam = -0.04 * gradient / (np.abs(gradient) + 1e-8)  # the first step corrects its own bias
    clear = np.abs(gradient) > 1e-3 * np.abs(gradient).max()
    np.testing.assert_allclose(moved[clear], adam[clear], rtol=1e-3)


def test_the_loss_falls(train):
    losses = [step.loss for step in run(train, steps=40)]
    assert np.mean(losses[-5:]) < 0.3 * losses[0]


def test_labels_move_only_if_asked(train):
    fixed, learned = run(train)[-1].state, run(train, learn_labels=True)[-1].state
    np.testing.assert_array_equal(fixed.labels, start(train).labels)
    assert np.abs(learned.labels - start(train).labels).max() > 0.01


def test_labels_have_a_rate_of_their_own(train):
    """Adam's first step moves every value by its learning rate."""
    support = start(train)
    first = run(train, 1, learn_labels=True, optimizer=Adam(label_learning_rate=0.2))[0].state
    assert np.abs(first.images - support.images).max() == pytest.approx(0.04, rel=1e-3)
    assert np.abs(first.labels - support.labels).max() == pytest.approx(0.2, rel=1e-3)
    assert first.images.dtype == first.labels.dtype == jnp.float32


def test_without_a_schedule_the_steps_are_those_of_optax(train):
    """The rates are applied after Adam; the result is that of `optax.adam`, to the bit."""
    import optax

    support, shape = start(train), start(train).images.shape
    gradients = [jnp.asarray(np.random.default_rng(i).random(shape), jnp.float32) for i in (1, 2)]
    adam, expected = optax.adam(0.04), jnp.asarray(support.images)
    moments, state = adam.init(expected), objective().initial_state(support)
    for gradient in gradients:
        change, moments = adam.update(gradient, moments)
        expected = expected + change
        factor = kip.schedule_factor(objective(), state.moments.count)
        moved, after = Adam().move(
            {"images": state.images}, {"images": gradient}, state.moments, factor
        )
        state = kip.State(moved["images"], state.labels, after)
    np.testing.assert_array_equal(state.images, expected)


def test_the_cosine_falls_from_the_full_rate_to_nothing(train):
    states = [start(train).images, *(s.state.images for s in run(train, 8, cosine_steps=8))]
    moves = [np.abs(b - a).max() for a, b in itertools.pairwise(states)]
    assert moves[0] == pytest.approx(0.04, rel=1e-3)
    assert moves[-1] < 0.04 * 0.06  # (1 + cos(7/8 pi)) / 2 = 0.038, and Adam's step is below 1
    factors = [
        float(kip.schedule_factor(objective(cosine_steps=8), jnp.int32(i))) for i in (0, 4, 8, 9)
    ]
    np.testing.assert_allclose(factors, [1, 0.5, 0, 0], atol=1e-7)
    with jax.enable_x64(True):
        assert kip.schedule_factor(objective(cosine_steps=8), jnp.int32(3)).dtype == jnp.float32


def test_each_step_draws_one_of_several_networks(train):
    """The draw depends on seed and step; a network's loss is that of a run with it alone."""
    both = networks.parse("fc"), networks.parse("fc", 2)
    options = {"steps": 12, "target_batch": 60, "seed": 0}
    steps = list(kip.distill(kip.KipObjective(both), start(train), train, **options))
    assert {step.network for step in steps} == {0, 1}
    alone = kip.KipObjective((both[steps[0].network],))
    first = next(kip.distill(alone, start(train), train, **options))
    assert first.loss == steps[0].loss
    np.testing.assert_array_equal(first.state.images, steps[0].state.images)
    late = kip.distill(kip.KipObjective(both), start(train), train, **options, done=5)
    assert [step.network for step in late] == [step.network for step in steps[5:]]


def test_a_step_counts_its_pairs(train):
    assert run(train, 1)[0].pairs == 6 * (6 + 55)  # one class has 15 images for a share of 20


def test_same_seed_same_support_to_the_bit(train):
    once, again = run(train)[-1].state.images, run(train)[-1].state.images
    np.testing.assert_array_equal(once, again)


def test_continuing_gives_what_the_whole_run_gives(train):
    support, whole = start(train), run(train, steps=6)
    half = whole[2]
    rest = kip.distill(
        objective(),
        support,
        train,
        steps=6,
        target_batch=60,
        seed=0,
        state=half.state,
        done=half.done,
    )
    np.testing.assert_array_equal(list(rest)[-1].state.images, whole[-1].state.images)


def test_corrupted_pixels_stay_and_are_the_fraction_asked_for(train):
    support = start(train, corruption=0.4)
    assert support.frozen.mean() == pytest.approx(0.4, abs=0.12)  # of 216 pixels
    learned = np.asarray(run(train, support=support)[-1].state.images)
    frozen = np.broadcast_to(support.frozen, learned.shape)
    np.testing.assert_array_equal(learned[frozen], support.images[frozen])
    assert (learned[~frozen] != support.images[~frozen]).all()


def test_support_is_real_balanced_and_drawn_by_the_seed(train):
    support = start(train)
    real = train.images()
    assert all((image == real).all((1, 2, 3)).any() for image in support.images)
    np.testing.assert_array_equal(support.labels, centred_one_hot(np.array([0, 0, 1, 1, 2, 2]), 3))
    assert not np.array_equal(support.images, start(train, seed=1).images)
    noise = start(train, noise=True).images
    assert not any((image == real).all((1, 2, 3)).any() for image in noise)


def test_target_batches_are_balanced_capped_and_without_repeats(train):
    batches = TargetBatches(train, 60, 0)
    labels = batches.draw(3)[1].argmax(1)
    assert np.bincount(labels).tolist() == [20, 20, 15]  # the last class has no more
    images = batches.draw(3)[0]
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images) == batches.size
    np.testing.assert_array_equal(batches.draw(3)[0], images)
    assert not np.array_equal(batches.draw(4)[0], images)


def test_a_diverging_run_stops_with_the_remedy(train):
    with pytest.raises(UserError, match=r"not finite at step .*--ridge .*--learning-rate"):
        run(train, steps=50, optimizer=Adam(1e30))


def test_a_kernel_that_is_not_finite_is_traced_to_its_image(train):
    images = start(train).images.copy()
    images[4, 1, 2] = 3e19  # its square overflows in float32
    network = networks.parse("CRP-flatten")
    with pytest.raises(UserError, match=r"support image 4, .* not finite before ReLU 1 of 1"):
        next(label_solve.accumulate(network, images, train))
    support, one = replace(start(train), images=images), kip.KipObjective((network,))
    with pytest.raises(UserError, match=r"step 0, support image 4, .*: raise --ridge"):
        next(kip.distill(one, support, train, steps=1, target_batch=30, seed=0))


def solve_labels(network, support, train, *, ridge=1e-6):
    *_, total = label_solve.accumulate(network, support, train)
    return label_solve.solve(network, support, total, ridge)


def test_label_solve_equals_the_formula(train):
    support = start(train)
    labels = solve_labels(networks.parse("fc"), support.images, train, ridge=1e-2)
    with jax.enable_x64(True):
        x_s, x_t = (jnp.asarray(a, jnp.float64) for a in (support.images, train.images()))
        k_ss, k_st = np.asarray(fc_ntk(x_s, x_s)), np.asarray(fc_ntk(x_s, x_t))
    jitter = 1e-2 / 6 * np.eye(6)
    expected = (k_ss + jitter) @ np.linalg.inv(k_st @ k_st.T + jitter) @ k_st @ train.labels()
    np.testing.assert_allclose(labels, expected, rtol=1e-4, atol=1e-5)


def test_label_solve_streams(train, monkeypatch):
    support = start(train).images
    whole = solve_labels(networks.parse("fc"), support, train)
    monkeypatch.setattr(label_solve, "CHUNK", 32)  # 90 targets: two chunks and a padded one
    parts = list(label_solve.accumulate(networks.parse("fc"), support, train))
    assert [sums.done for sums in parts] == [32, 64, 90]
    tiled = label_solve.solve(networks.parse("fc"), support, parts[-1], 1e-6)
    np.testing.assert_allclose(tiled, whole, rtol=1e-4, atol=1e-5)
    *_, continued = label_solve.accumulate(networks.parse("fc"), support, train, parts[0])
    np.testing.assert_array_equal(continued.gram_tt, parts[-1].gram_tt)


def test_label_solve_refuses_a_support_larger_than_the_data(train):
    many = np.zeros((91, 6, 6, 1), np.float32)
    with pytest.raises(UserError, match="91 support images, 90 training images"):
        next(label_solve.accumulate(networks.parse("fc"), many, train))
