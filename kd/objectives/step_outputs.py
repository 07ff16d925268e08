"""What the terms of a loss look at."""

from dataclasses import dataclass

from torch import Tensor

from kd.data.batching import Batch
from kd.losses.ensemble import combined_logits, label_weights, mean_logits


@dataclass(frozen=True, eq=False)
class StepOutputs:
    """A step's batch, and what the networks answered to it.

    Attributes:
        batch: Images, labels, rows.
        outputs: The student's.
        answers: The teachers' logits.
        by_label: Whether teachers are weighted by how well they know each label.
    """

    batch: Batch
    outputs: Tensor
    answers: tuple[Tensor, ...] = ()
    by_label: bool = False

    def teacher(self, temperature: float) -> Tensor:
        """Logits whose softmax at this temperature is that of all teachers together."""
        if len(self.answers) == 1:
            return self.answers[0]
        return combined_logits(self.answers, temperature=temperature, weights=self.weights)

    def mean_logits(self) -> Tensor:
        """The mean of the teachers' logits."""
        return mean_logits(self.answers, weights=self.weights)

    @property
    def weights(self) -> Tensor | None:
        """Weights (m, n) of the teachers for each image; None where all count alike."""
        if not self.by_label:
            return None
        labels = self.batch.labels if self.batch.shares is None else self.batch.shares
        return label_weights(self.answers, labels)
