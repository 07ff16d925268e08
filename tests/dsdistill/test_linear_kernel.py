"""The linear kernel: its sums, its labels, its classifier, and the probe beside it."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from sklearn.linear_model import LogisticRegression

from dsdistill.harness.data import preprocess
from dsdistill.harness.data.labeled_images import Examples, LabeledImages, centred_one_hot
from dsdistill.harness.errors import UserError
from dsdistill.kernels import networks
from dsdistill.methods import label_solve, linear_probe, linear_sums, ridge

LINEAR = networks.parse("linear")
D, K = 12, 4
CLASSES = ("a", "b", "c", "d")


def features(n: int, seed: int) -> Examples:
    """Overlapping classes around means of different sizes, as half-precision features."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(9).normal(size=(K, D)) + np.linspace(0, 9, D)
    labels = rng.integers(0, K, n)
    values = (means[labels] + 1.5 * rng.normal(size=(n, D))).astype(np.float16)
    data = LabeledImages(values.reshape(n, 1, 1, D), labels, CLASSES)
    return Examples(data, preprocess.fit("centre", data.chunks, data.shape))


TRAIN = features(600, 0)
TEST = TRAIN.preprocess.apply(features(300, 1).data.images())


def mapped(images: np.ndarray) -> np.ndarray:
    flat = images.reshape(len(images), -1).astype(np.float64)
    return np.concatenate([flat / np.sqrt(D), np.ones((len(flat), 1))], 1)


def solve(images: np.ndarray, strength: float = 1e-6) -> np.ndarray:
    *_, sums = label_solve.accumulate(LINEAR, images, TRAIN)
    return label_solve.solve(LINEAR, images, sums, strength)


def test_features_are_centred_and_have_a_mean_norm_of_root_d() -> None:
    x = TRAIN.images().reshape(600, D)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
    assert np.linalg.norm(x, axis=1).mean() == pytest.approx(np.sqrt(D), rel=1e-5)
    assert np.ptp(TRAIN.preprocess.std) == 0  # one scale: directions keep their sizes
    np.testing.assert_allclose(
        TRAIN.preprocess.invert(TRAIN.images()), TRAIN.data.images(), atol=1e-4
    )


def test_the_kernel_is_the_inner_product_of_its_map() -> None:
    assert LINEAR.feature_map is not None
    x, z = TRAIN.images()[:5], TEST[:7]
    products = LINEAR.kernel(jnp.asarray(x), jnp.asarray(z))
    np.testing.assert_allclose(products, mapped(x) @ mapped(z).T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(LINEAR.feature_map(jnp.asarray(x)), mapped(x), rtol=1e-6)


def test_sums_over_classes_are_sums_over_centred_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_sums, "CHUNK", 250)  # 600 is no multiple of it
    assert LINEAR.feature_map is not None
    phi, y = mapped(TRAIN.images()), TRAIN.labels()
    soft = replace(TRAIN, targets=y)
    for train in (TRAIN, soft):
        *_, sums = linear_sums.accumulate(LINEAR.feature_map, train)
        assert sums.done == 600
        np.testing.assert_allclose(sums.gram_tt, phi.T @ phi, rtol=1e-6, atol=1e-4)
        np.testing.assert_allclose(sums.gram_ty, phi.T @ y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("n", [3, D + 1])
@pytest.mark.parametrize("strength", [1e-6, 1e4])
def test_labels_are_those_of_the_kernel_matrix(n: int, strength: float) -> None:
    images = TRAIN.images()[:n]
    whole = replace(LINEAR, feature_map=None)
    *_, sums = label_solve.accumulate(whole, images, TRAIN)
    expected = label_solve.solve(whole, images, sums, strength)
    np.testing.assert_allclose(solve(images, strength), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n", [D + 1, D + 2, 40])
@pytest.mark.parametrize("kind", ["real", "noise"])
def test_from_d_plus_1_images_on_solved_labels_are_the_whole_training_set(
    n: int, kind: str
) -> None:
    """The caveat of label learning with features: the images carry nothing."""
    noise = np.random.default_rng(3).normal(size=(n, 1, 1, D)).astype(np.float32)
    images = noise if kind == "noise" else TRAIN.images()[-n:]
    own = ridge.fit(LINEAR, images, solve(images), 1e-9)(TEST)
    full = ridge.RidgeLearner(LINEAR, limit=None)(TRAIN, TRAIN, 0)(TEST)
    np.testing.assert_allclose(own, full, atol=2e-3)
    assert (own.argmax(1) == full.argmax(1)).all()
    hard = centred_one_hot(TRAIN.data.labels[-n:], K)
    assert (ridge.fit(LINEAR, images, hard, 1e-9)(TEST).argmax(1) != full.argmax(1)).any()


def test_fewer_images_do_not_give_the_classifier() -> None:
    images = TRAIN.images()[: D // 2]
    own = ridge.fit(LINEAR, images, solve(images), 1e-9)(TEST)
    full = ridge.RidgeLearner(LINEAR, limit=None)(TRAIN, TRAIN, 0)(TEST)
    assert (own.argmax(1) != full.argmax(1)).any()


def test_the_classifier_of_any_number_of_images_is_ridge_regression() -> None:
    phi, y = mapped(TRAIN.images()), TRAIN.labels().astype(np.float64)
    strength = 1e-2 * np.trace(phi.T @ phi) / 600
    weights = np.linalg.solve(phi.T @ phi + strength * np.eye(D + 1), phi.T @ y)
    own = ridge.RidgeLearner(LINEAR, 1e-2, limit=None)(TRAIN, TRAIN, 0)(TEST)
    np.testing.assert_allclose(own, mapped(TEST) @ weights, atol=1e-5)
    # The same in terms of the kernel, with fewer images than values and with more.
    for n in (D, D + 2):
        images, labels = TRAIN.images()[:n], TRAIN.labels()[:n]
        k = mapped(images) @ mapped(images).T
        alpha = np.linalg.solve(k + 1e-2 * np.trace(k) / n * np.eye(n), labels)
        expected = mapped(TEST) @ mapped(images).T @ alpha
        np.testing.assert_allclose(
            ridge.fit(LINEAR, images, labels, 1e-2)(TEST), expected, atol=1e-4
        )


def test_label_solve_keeps_no_matrix_of_support_and_targets() -> None:
    *_, sums = label_solve.accumulate(LINEAR, TRAIN.images()[:200], TRAIN)
    assert sums.gram_tt.shape == (D + 1, D + 1)
    assert sums.gram_ty.shape == (D + 1, K)


def test_weights_and_biases_of_the_linear_kernel_are_fixed() -> None:
    with pytest.raises(UserError, match="leave --w-std and --b-std out"):
        networks.parse("linear", b_std=1.0)
    with pytest.raises(UserError, match="has no depth"):
        networks.parse("linear", 2)


@pytest.mark.parametrize("strength", [1e-1, 1e-4])
def test_the_probe_is_the_logistic_regression_of_scikit_learn(strength: float) -> None:
    phi, labels = mapped(TRAIN.images())[:, :-1], TRAIN.data.labels
    theirs = LogisticRegression(C=1 / (strength * 600), max_iter=5000, tol=1e-8).fit(phi, labels)
    [weights] = linear_probe.fit(TRAIN, (strength,))
    scores = linear_probe._scores(weights, TEST)
    expected = theirs.predict_proba(mapped(TEST)[:, :-1])
    np.testing.assert_allclose(scipy.special.softmax(scores, 1), expected, atol=5e-3)


def test_the_probe_learns_from_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its minimum the mean predicted probability of each class is its mean share."""
    monkeypatch.setattr(linear_probe, "CHUNK", 64)
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(K), 600).astype(np.float32)
    soft = replace(TRAIN, targets=shares - np.float32(1 / K))
    [weights] = linear_probe.fit(soft, (1e-3,))
    predicted = scipy.special.softmax(linear_probe._scores(weights, TRAIN.images()), 1)
    np.testing.assert_allclose(predicted.mean(0), shares.mean(0), atol=1e-3)


def test_labels_beyond_probabilities_are_cut_off() -> None:
    labels = np.array([[1.75, -0.25, -0.75, -0.75], [-0.25, 0.75, -0.25, -0.25]], np.float32)
    np.testing.assert_allclose(
        linear_probe.probabilities(labels), [[1, 0, 0, 0], [0, 1, 0, 0]], atol=1e-6
    )
    nothing = np.full((1, K), -1.0, np.float32)
    np.testing.assert_allclose(linear_probe.probabilities(nothing), 1 / K)


def test_the_probe_chooses_its_strength_on_validation_images() -> None:
    probe = linear_probe.LinearProbe()
    few = Examples(TRAIN.data.select(np.arange(8)), TRAIN.preprocess)
    chosen = probe(few, TRAIN, 0)(TEST)
    every = [linear_probe._scores(w, TEST) for w in linear_probe.fit(few, linear_probe.STRENGTHS)]
    accuracies = [
        (linear_probe._scores(w, TRAIN.images()).argmax(1) == TRAIN.data.labels).mean()
        for w in linear_probe.fit(few, linear_probe.STRENGTHS)
    ]
    assert len(set(accuracies)) > 1
    best = every[int(np.argmax(accuracies))]
    assert (chosen.argmax(1) == best.argmax(1)).mean() > 0.99
