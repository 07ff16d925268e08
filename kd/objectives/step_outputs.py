"""The inputs of a loss term: a batch, the student's logits and the teachers'."""

from dataclasses import dataclass

from torch import Tensor

from kd.data.batching import Batch
from kd.losses.ensemble import combined_logits, label_weights, mean_logits


@dataclass(frozen=True, eq=False)
class StepOutputs:
    """A training step's batch, and the outputs of the networks for it.

    Attributes:
        batch: Images, labels and rows.
        student_logits: The student's outputs (n, k); with `mse`, estimates of centred labels.
        teacher_logits: The outputs (n, k) of each teacher.
        by_label: Whether teachers are weighted by how well they know each label.
    """

    batch: Batch
    student_logits: Tensor
    teacher_logits: tuple[Tensor, ...] = ()
    by_label: bool = False

    def combined_logits(self, temperature: float) -> Tensor:
        """Logits whose softmax at this temperature is the mean of all teachers' probabilities."""
        if len(self.teacher_logits) == 1:
            return self.teacher_logits[0]
        return combined_logits(self.teacher_logits, temperature=temperature, weights=self.weights)

    def mean_logits(self) -> Tensor:
        """The mean of the teachers' logits."""
        return mean_logits(self.teacher_logits, weights=self.weights)

    @property
    def weights(self) -> Tensor | None:
        """Weights (m, n) of m teachers for each of n images; None for equal weights."""
        if not self.by_label:
            return None
        return label_weights(self.teacher_logits, self.batch.labels_or_shares)
