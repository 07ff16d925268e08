"""The inputs of a loss term: a batch, the student's logits and the teachers'."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from dsdistill.harness.errors import UserError
from kd.data.batching import Batch
from kd.losses.ensemble import combined_logits, label_weights, mean_logits
from kd.models.token_inputs import IGNORED, TokenInputs


@dataclass(frozen=True, eq=False)
class StepOutputs:
    """A training step's batch, and the outputs of the networks for it.

    Attributes:
        batch: Images or texts, labels and rows.
        student_logits: The student's outputs (n, k), or (n, l, k) of tokens; with `mse`, estimates
            of centred labels.
        teacher_logits: The outputs of each teacher, of the same shape.
        by_label: Whether teachers are weighted by how well they know each label.
        adversarial: The step at the images that an attack on the student has changed; None without
            one.
    """

    batch: Batch
    student_logits: Tensor
    teacher_logits: tuple[Tensor, ...] = ()
    by_label: bool = False
    adversarial: "StepOutputs | None" = None

    @property
    def at_adversaries(self) -> "StepOutputs":
        """The step at the images that an attack has changed."""
        assert self.adversarial is not None
        return self.adversarial

    @property
    def mask(self) -> Bool[Tensor, "n l"]:
        """Which tokens of the student's texts are real."""
        return _mask(self.batch.inputs)

    def teacher_mask(self, teacher: int) -> Bool[Tensor, "n l"]:
        """Which tokens of the texts are real that the teacher with this number sees."""
        return _mask(self.batch.inputs_of(teacher))

    @property
    def rows(self) -> "StepOutputs":
        """The step with one row (k) of logits for each label.

        It is the step itself where the networks answer for whole images or texts; where they
        answer for tokens, the tokens with a target, and this target as the label.

        Raises:
            UserError: If the networks answer for tokens, and none has a target.
        """
        if self.student_logits.ndim != 3 or not isinstance(self.batch.inputs, TokenInputs):
            return self
        if self.batch.token_targets is None:
            raise UserError(
                "the outputs are of tokens, which have no targets here: use --loss tokens"
            )
        return self.tokens(self.batch.token_targets != IGNORED)

    def tokens(self, chosen: Bool[Tensor, "n l"]) -> "StepOutputs":
        """The step with one row of logits for each chosen token, and its target as the label."""
        targets = self.batch.token_targets
        if targets is None:
            targets = torch.full_like(chosen, IGNORED, dtype=torch.long)
        return StepOutputs(
            Batch(self.batch.inputs, targets[chosen]),
            self.student_logits[chosen],
            tuple(logits[chosen] for logits in self.teacher_logits),
            self.by_label,
        )

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


def _mask(inputs: Tensor | TokenInputs) -> Bool[Tensor, "n l"]:
    assert isinstance(inputs, TokenInputs), "the batch holds images"
    return inputs.mask
