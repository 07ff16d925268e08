"""On-policy distillation: a student learns from its teacher on what the student itself writes."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int

from dsdistill.harness.errors import UserError
from kd.data import batching
from kd.data.batching import Batch, Unit, derive_seed
from kd.data.text import causal_rows, generation, token_batches
from kd.data.text.generation import Decoding
from kd.models.language import transformer
from kd.models.language.language_model import LanguageModel
from kd.models.token_inputs import IGNORED
from kd.parallel.engine import Engine

SAMPLES = Decoding(max_new_tokens=128, temperature=0.9)


@dataclass(frozen=True, eq=False)
class OnPolicy:
    """Replaces the completions of some batches by samples of the student, as it is then.

    A change for `ChangedBatches`: whether a batch is replaced, and its samples, are functions of
    the batch's seed and the student's weights, so that a resumed training draws the same. No
    gradient passes through the samples. Any loss on targets of tokens can follow; that of GKD is
    the divergence `tokens` with beta 0.5, whose temperature is another one than the sampler's.

    The prompt of a row is what stands before its last completion: of a conversation all up to the
    assistant's last turn. A plain text, which is learned from its first token on, has none; its
    first `prompt_tokens` tokens are the prompt, half of it at most.

    Attributes:
        student: The student, not wrapped; in evaluation mode while it writes.
        padding: Id of the token for padding.
        end: Id of the end-of-sequence token; None: all samples have the largest length.
        share: Probability that a batch is replaced, in [0, 1].
        decoding: How samples are drawn; shorter where the model has too few positions.
        prompt_tokens: Largest number of tokens of a plain text that are its prompt.
        on: Engine of the training; None is one process.

    Raises:
        UserError: If the weights are sharded.
        ValueError: If a number is out of its range.

    Source: Agarwal et al. (2024), arXiv:2306.13649, algorithm 1, with lambda 0.5; temperature 0.9
    and 128 tokens are those of its public implementation in TRL. There each process draws for
    itself whether a batch is replaced, here all draw the same.
    """

    student: LanguageModel
    padding: int
    end: int | None
    share: float = 0.5
    decoding: Decoding = SAMPLES
    prompt_tokens: int = causal_rows.PROMPT_TOKENS
    on: Engine | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be in 0 to 1, got {self.share}")
        if self.prompt_tokens < 1:
            raise ValueError(f"prompt_tokens must be at least 1, got {self.prompt_tokens}")
        if self.on is not None and self.on.is_fsdp2:
            raise UserError("--on-policy needs a student whose weights are whole: leave FSDP out")

    def __call__(self, batch: Batch, seed: int) -> Batch:
        """The batch, or one with the same prompts and the student's completions.

        Args:
            batch: Texts with targets of their tokens.
            seed: Seed of the batch, the same in all processes.
        """
        if np.random.default_rng(seed).random() >= self.share:
            return batch
        prompts = _prompts(batch, self.prompt_tokens)
        first = 0 if batch.index is None else int(batch.index[0])  # processes draw different ones
        with nullcontext() if self.on is None else self.on.autocast():
            new = generation.continue_ids(
                self.student,
                prompts,
                self._decoding(max(map(len, prompts))),
                padding=self.padding,
                end=self.end,
                seed=derive_seed(seed, first),
                device=batch.labels.device,
            )
        return self._with_totals(_replace_completions(batch, prompts, new, self.padding))

    def _decoding(self, longest: int) -> Decoding:
        limit = transformer.positions(self.student.network)
        if limit is None:
            return self.decoding
        tokens = max(1, min(self.decoding.max_new_tokens, limit - longest))
        return replace(self.decoding, max_new_tokens=tokens)

    def _with_totals(self, batch: Batch) -> Batch:
        """The batch with its numbers of tokens over all processes, each of which must call this."""
        if self.on is None or self.on.num_processes == 1:
            return batch
        units: tuple[Unit, ...] = ("tokens", "targets")
        counts = torch.tensor([batch.count(unit) for unit in units], device=self.on.device)
        sums: torch.Tensor = self.on.reduce(counts)  # pyright: ignore[reportAssignmentType]
        return replace(batch, totals=dict(zip(units, map(int, sums.tolist()), strict=True)))


def _prompts(batch: Batch, prompt_tokens: int) -> list[Int[np.ndarray, " l"]]:
    """The ids of each row before its last completion."""
    inputs, targets = batch.inputs, batch.token_targets
    assert targets is not None
    assert not isinstance(inputs, torch.Tensor)
    rows = []
    lengths = inputs.mask.sum(1).tolist()
    every, flags = inputs.ids.cpu().numpy(), (targets != IGNORED).cpu().numpy()
    for ids, row_flags, length in zip(every, flags, lengths, strict=True):
        begins = np.flatnonzero(row_flags & ~np.append(False, row_flags[:-1]))
        # The first target is predicted at the last token of the prompt.
        count = begins[-1] + 1 if len(begins) else length
        if len(begins) and begins[-1] == 0:
            count = causal_rows.prompt_length(length, prompt_tokens)
        rows.append(ids[:count])
    return rows


def _replace_completions(
    batch: Batch, prompts: list[np.ndarray], new: list[np.ndarray], padding: int
) -> Batch:
    rows = list(zip(prompts, new, strict=True))
    inputs = token_batches.pad([np.concatenate(row) for row in rows], padding)
    targets = [
        np.concatenate([np.full(len(prompt) - 1, IGNORED), more, [IGNORED]])
        for prompt, more in rows
    ]
    changed = replace(
        batch,
        inputs=inputs,
        token_targets=token_batches.fill(targets, IGNORED, inputs.ids.shape[1]),
        totals=None,
        counts=None,
        teacher_inputs=None,
        teacher_logits=None,
    )
    return batching.move(changed, batch.labels.device)
