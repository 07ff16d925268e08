"""`kd.StudentClassifier` with scikit-learn: cloned, validated, and in a pipeline."""

import copy
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import kd

DIGITS = load_digits()
IMAGES, NAMES = DIGITS.images[:300] / 16, np.array([f"digit {i}" for i in DIGITS.target[:300]])


def network(width: int = 8, classes: int = 10) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(9 * width, classes))


def classifier(**options) -> kd.StudentClassifier:
    common = {"epochs": 6, "lr": 0.02, "optimizer": "adamw", "device": "cpu"}
    return kd.StudentClassifier(**{"student": network(), **common, **options})


def test_classes_are_learned_by_their_names() -> None:
    student = network()
    before = copy.deepcopy(student.state_dict())
    fitted = classifier(student=student, teacher=network(16), loss="ce:1,kd:0.1").fit(IMAGES, NAMES)
    assert list(fitted.classes_) == sorted(set(NAMES))
    assert fitted.score(IMAGES, NAMES) > 0.8
    probabilities = fitted.predict_proba(IMAGES[..., None])
    assert probabilities.shape == (300, 10)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    assert (fitted.classes_[probabilities.argmax(1)] == fitted.predict(IMAGES)).all()
    # What was given is not changed.
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_it_is_cloned_and_cross_validated() -> None:
    one = classifier(epochs=4)
    scores = cross_val_score(clone(one), IMAGES, NAMES, cv=2)
    assert (scores > 0.3).all()
    assert (cross_val_score(one, IMAGES, NAMES, cv=2) == scores).all()
    with pytest.raises(NotFittedError):
        clone(one.fit(IMAGES, NAMES)).predict(IMAGES)


def test_rows_of_pixels_go_through_a_pipeline() -> None:
    rows = IMAGES.reshape(300, 64)
    steps = StandardScaler(), classifier(image_shape=(8, 8, 1))
    search = GridSearchCV(make_pipeline(*steps), {"studentclassifier__lr": [1e-6, 0.02]}, cv=2)
    search.fit(rows, NAMES)
    assert search.best_params_ == {"studentclassifier__lr": 0.02}
    again = pickle.loads(pickle.dumps(search.best_estimator_))
    assert (again.predict(rows) == search.predict(rows)).all()


def test_images_are_held_out_for_the_best_epoch() -> None:
    options = {"validation_fraction": 0.2, "options": {"patience": 3, "validate_every": 1}}
    fitted = classifier(**options).fit(IMAGES, NAMES)
    assert fitted.result_.accuracy is not None
    assert fitted.result_.steps % 4 == 0  # 240 images in batches of 64


@pytest.mark.parametrize(
    ("arguments", "X", "y", "message"),
    [
        ({}, IMAGES.reshape(300, 64), NAMES, r"rows with image_shape=\(h, w, c\), got \(300, 64\)"),
        ({"image_shape": (4, 4, 1)}, IMAGES.reshape(300, 64), NAMES, "rows of 64 values"),
        ({}, IMAGES, NAMES[:9], "y must be one class for each of 300 images"),
        ({}, IMAGES.astype(str), NAMES, "X must be numbers"),
        ({"student": network(classes=3)}, IMAGES, NAMES, "3 outputs, and y has 10 classes"),
        ({"validation_fraction": 1.0}, IMAGES, NAMES, r"validation_fraction must be in \[0, 1\)"),
        ({"validation_fraction": 0.01}, IMAGES, NAMES, "does not fit these images: The test_size"),
        ({"options": {"epochs": 3}}, IMAGES, NAMES, "options: epochs is set by the classifier"),
        ({"options": {"patiense": 3}}, IMAGES, NAMES, "did you mean 'patience'"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments: dict, X, y, message: str) -> None:
    with pytest.raises(kd.UserError, match=message) as error:
        classifier(**arguments).fit(X, y)
    assert "\n" not in str(error.value)
