"""A student as a classifier of scikit-learn: arrays in, `fit`, `predict` and `score`."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import train_test_split
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dsdistill.harness.errors import UserError
from kd import api
from kd.data import batching
from kd.models.networks import Classifier
from kd.training import borrowing


class StudentClassifier(ClassifierMixin, BaseEstimator):
    """A network that learns from labels and teachers, as a classifier of scikit-learn.

    X is an array of images (n, h, w, c), or (n, h, w) for one channel, or of rows (n, h*w*c) with
    `image_shape`. Its values are converted to float32 and otherwise taken as they are. y holds the
    class of each image: numbers or names.

    `fit` trains a copy of the student, so `clone` and cross-validation start anew each time. The
    networks must have an output for each class, in the order of `classes_`.

    Args:
        student: Network of images (n, c, h, w); returns logits.
        teacher: A network of the same images, or several; None to train on labels alone.
        loss: Weighted terms, as for `kd.distill`.
        epochs: Number of passes over the training images.
        optimizer: Optimizer by name.
        lr: Largest learning rate.
        batch_size: Number of images in a batch.
        image_shape: Height, width and channels of the images, where X holds rows.
        validation_fraction: Share of the images that are held out to choose the best epoch.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        seed: Seed of the images held out, of their order, and of all randomness in the training.
        progress: Whether to show a bar on standard error.
        options: Further arguments of `kd.distill` by name, such as `patience`.

    Attributes:
        classes_: The classes of y in order.
        student_: The trained copy of the student.
        result_: The figures of the training, a `kd.DistillResult`.
    """

    classes_: np.ndarray
    student_: nn.Module
    result_: api.DistillResult

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Sequence[nn.Module] | None = None,
        *,
        loss: str | None = None,
        epochs: int | None = None,
        optimizer: str | None = None,
        lr: float | None = None,
        batch_size: int = 64,
        image_shape: tuple[int, int, int] | None = None,
        validation_fraction: float = 0.0,
        device: str = "auto",
        seed: int = 0,
        progress: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.loss = loss
        self.epochs = epochs
        self.optimizer = optimizer
        self.lr = lr
        self.batch_size = batch_size
        self.image_shape = image_shape
        self.validation_fraction = validation_fraction
        self.device = device
        self.seed = seed
        self.progress = progress
        self.options = options

    def fit(
        self, X: Shaped[np.ndarray, "n ..."], y: Shaped[np.ndarray, " n"]
    ) -> "StudentClassifier":
        """Train a copy of the student.

        Args:
            X: Images.
            y: Class of each image.

        Returns:
            The classifier itself.

        Raises:
            UserError: If the arrays, the networks and the arguments do not fit together.
        """
        if not 0 <= self.validation_fraction < 1:
            raise UserError(
                f"validation_fraction must be in [0, 1), got {self.validation_fraction}"
            )
        for name in self.options or {}:
            if name in {*self.get_params(deep=False), "train", "validation"}:
                raise UserError(
                    f"options: {name} is set by the classifier itself: give it as an argument of "
                    "StudentClassifier, validation images as validation_fraction"
                )
        images = self._to_tensor(X)
        self.classes_, labels = np.unique(np.asarray(y), return_inverse=True)
        if labels.shape != (len(images),):
            raise UserError(f"y must be one class for each of {len(images)} images, got {y!r:.40}")
        rows: Any = np.arange(len(labels))
        held_out: Any = None
        if self.validation_fraction:
            try:
                rows, held_out = train_test_split(
                    rows,
                    test_size=self.validation_fraction,
                    stratify=labels,
                    random_state=self.seed,
                )
            except ValueError as error:
                raise UserError(
                    f"validation_fraction does not fit these images: {error}"
                ) from error
        targets = torch.from_numpy(labels)

        def load(part: np.ndarray, *, shuffle: bool) -> DataLoader:
            data = TensorDataset(images[part], targets[part])
            return DataLoader(data, self.batch_size, shuffle=shuffle)

        student = copy.deepcopy(self.student)
        outputs = api.count_classes("student", Classifier(student), images)
        if outputs != len(self.classes_):
            raise UserError(
                f"student has {outputs} outputs, and y has {len(self.classes_)} classes: give it a "
                "last layer of as many"
            )
        more: dict[str, Any] = {"optimizer": self.optimizer, "lr": self.lr, **(self.options or {})}
        self.result_ = api.distill(
            student,
            self.teacher,
            load(rows, shuffle=True),
            validation=None if held_out is None else load(held_out, shuffle=False),
            loss=self.loss,
            epochs=self.epochs,
            device=self.device,
            seed=self.seed,
            progress=self.progress,
            **more,
        )
        self.student_ = self.result_.student
        return self

    def predict(self, X: Shaped[np.ndarray, "n ..."]) -> Shaped[np.ndarray, " n"]:
        """The most probable class of each image."""
        check_is_fitted(self)
        return self.classes_[self._outputs(self._to_tensor(X)).argmax(1).numpy()]

    def predict_proba(self, X: Shaped[np.ndarray, "n ..."]) -> Float[np.ndarray, "n k"]:
        """The probability of each class, in the order of `classes_`."""
        check_is_fitted(self)
        return self._outputs(self._to_tensor(X)).softmax(1).numpy()

    def _outputs(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        classifier, device = Classifier(self.student_), borrowing.device_of(self.student_)
        with torch.inference_mode():
            parts = [classifier(x.to(device)) for x in images.split(batching.SCORE_BATCH)]
        return torch.cat(parts).float().cpu()

    def _to_tensor(self, X: Shaped[np.ndarray, "n ..."]) -> Float[Tensor, "n c h w"]:
        array = np.asarray(X)
        if array.ndim == 2 and self.image_shape is not None:
            h, w, c = self.image_shape
            if array.shape[1] != h * w * c:
                raise UserError(
                    f"X has rows of {array.shape[1]} values, and image_shape {h}x{w}x{c} has "
                    f"{h * w * c}"
                )
            array = array.reshape(-1, h, w, c)
        array = array[..., None] if array.ndim == 3 else array
        if array.ndim != 4 or not len(array) or array.dtype.kind not in "fiub":
            raise UserError(
                "X must be numbers (n, h, w, c) or (n, h, w), or rows with image_shape=(h, w, c), "
                f"got {array.shape} of {array.dtype}"
            )
        return batching.to_nchw(array)
