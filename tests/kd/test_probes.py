"""Probes of embeddings, against loops by hand and a probe of scikit-learn's alone."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from kd.evaluation import probes
from kd.evaluation.probes import Embeddings


def _clusters(n: int, seed: int, spread: float = 1.0) -> Embeddings:
    """Three Gaussian classes in seven dimensions around fixed centres."""
    centres = 2 * np.random.default_rng(0).standard_normal((3, 7))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    values = centres[labels] + spread * rng.standard_normal((n, 7))
    return Embeddings(values.astype(np.float32), labels)


def _by_hand(known: Embeddings, neighbours: int) -> float:
    """Leave-one-out accuracy by cosines in a loop."""
    units = known.values.astype(np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    right = 0
    for i, unit in enumerate(units):
        similar = units @ unit
        similar[i] = -np.inf
        nearest = np.argsort(-similar)[:neighbours]
        right += np.bincount(known.labels[nearest], minlength=3).argmax() == known.labels[i]
    return right / len(units)


def test_each_image_is_judged_by_its_neighbours_among_the_others() -> None:
    known = _clusters(60, seed=1, spread=2.5)
    for neighbours in (1, 4, 20):
        expected = _by_hand(known, neighbours)
        assert probes.leave_one_out_accuracy(known, neighbours=neighbours) == expected
        assert expected < 1  # else an image could have counted as its own neighbour


def test_lengths_and_rotations_change_nothing() -> None:
    known = _clusters(60, seed=1, spread=2.5)
    rng = np.random.default_rng(5)
    rotation = np.linalg.qr(rng.standard_normal((7, 7)))[0]
    turned = known.values @ rotation * rng.uniform(0.5, 2, (60, 1))
    accuracies = [
        probes.leave_one_out_accuracy(Embeddings(values, known.labels))
        for values in (known.values, turned)
    ]
    assert accuracies[0] == accuracies[1]


def test_fewer_images_than_neighbours_are_all_asked() -> None:
    # Two of each class: the two of the other class outvote the one of an image's own.
    known = Embeddings(np.eye(4, dtype=np.float32), np.array([0, 0, 1, 1]))
    assert probes.leave_one_out_accuracy(known) == 0


def test_the_linear_probe_is_a_logistic_regression_of_standardised_values() -> None:
    train, test = _clusters(150, seed=2), _clusters(90, seed=3)
    mean, std = train.values.mean(0), train.values.std(0)
    oracle = LogisticRegression(C=1.0, max_iter=1000)
    oracle.fit((train.values - mean) / std, train.labels)
    expected = oracle.score((test.values - mean) / std, test.labels)
    measured = probes.measure(train, None, test)
    assert measured.linear == pytest.approx(expected, abs=1 / 90)  # one image at a boundary
    assert 0.9 < measured.linear <= 1
    assert measured.train_images == 150


def test_the_regularisation_is_chosen_on_validation_images() -> None:
    # Few images of many values, of which one in two says something, with noisy labels.
    rng = np.random.default_rng(0)
    direction = rng.standard_normal(60)

    def draw(n: int) -> Embeddings:
        values = rng.standard_normal((n, 60))
        return Embeddings(values, (values @ direction + 8 * rng.standard_normal(n) > 0).astype(int))

    train, validation, test = draw(80), draw(500), draw(2000)
    mean, std = train.values.mean(0), train.values.std(0)
    scores = []
    for strength in probes.STRENGTHS:
        oracle = LogisticRegression(C=strength, max_iter=1000)
        oracle.fit((train.values - mean) / std, train.labels)
        scores.append([oracle.score((x.values - mean) / std, x.labels) for x in (validation, test)])
    best = int(np.argmax([on_validation for on_validation, _ in scores]))
    measured = probes.measure(train, validation, test).linear
    assert measured == pytest.approx(scores[best][1], abs=2 / 2000)
    assert abs(measured - probes.measure(train, None, test).linear) > 4 / 2000


def test_shuffled_labels_are_not_found() -> None:
    train, test = _clusters(150, seed=2), _clusters(300, seed=3)
    shuffled = Embeddings(train.values, np.random.default_rng(0).permutation(train.labels))
    measured = probes.measure(shuffled, None, test)
    assert measured.linear < 0.6
    assert measured.nearest < 0.6
