"""What a training step minimises: a module that returns named, weighted loss terms for a batch.

The objective as a whole is the unit to wrap for several devices; its `student` alone is saved.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from kd.data import Batch
from kd.losses import response
from kd.networks import Classifier

Labels = Literal["hard", "centred"]


class Supervised(nn.Module):
    """Labels alone.

    Attributes:
        student: Trained.
        labels: `hard` is cross-entropy on class indices. `centred` is MSE on the stored
            real-valued labels, or on one-hot labels minus 1/k where none are stored; the student
            then estimates centred labels, and its outputs are no logits.
    """

    def __init__(self, student: Classifier, labels: Labels = "hard") -> None:
        super().__init__()
        self.student = student
        self.labels: Labels = labels

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        outputs = self.student(batch.images)
        if self.labels == "hard":
            return {"ce": response.cross_entropy(outputs, batch.labels)}
        targets = batch.labels if batch.targets is None else batch.targets
        return {"mse": response.centred_mse(outputs, targets)}


class Offline(nn.Module):
    """alpha · T² · KL(teacher ‖ student) + (1 - alpha) · CE(student, label), with a frozen teacher.

    On a distilled set the teacher thereby relabels the images, and the label of the second term is
    the class of the largest stored label: centred labels are no probabilities, so they cannot
    enter a cross-entropy themselves.

    Attributes:
        student: Trained.
        teacher: In evaluation mode and without gradients, whatever `train` is called with.
        temperature: T of the first term; the cross-entropy is at T = 1.
        alpha: In [0, 1].

    Source: Hinton, Vinyals and Dean (2015), arXiv:1503.02531, section 2.
    """

    def __init__(
        self, student: Classifier, teacher: nn.Module, *, temperature: float, alpha: float
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature = temperature
        self.alpha = alpha

    def train(self, mode: bool = True) -> "Offline":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.student(batch.images)
        kl = response.logit_kl(logits, self._answer(batch), temperature=self.temperature)
        ce = response.cross_entropy(logits, batch.labels)
        return {"kl": self.alpha * kl, "ce": (1 - self.alpha) * ce}

    def _answer(self, batch: Batch) -> Tensor:
        if batch.teacher_logits is not None:
            return batch.teacher_logits
        with torch.no_grad():
            return self.teacher(batch.images)


Objective = Supervised | Offline
