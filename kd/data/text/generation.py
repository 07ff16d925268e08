"""Continuations of prompts by a causal model: greedy, by beams, or sampled.

Their length is bounded, whatever the model does. What a model's own configuration says of
generation, such as a penalty for repetition, is left out: samples are the model's distribution.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int

from dsdistill.harness.errors import UserError
from kd.data.batching import derive_seed
from kd.data.text import causal_rows
from kd.data.text.causal_rows import Prompt
from kd.models.language import transformer
from kd.models.language.language_model import LanguageModel
from kd.models.zoo.huggingface import import_transformers


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: Largest number of tokens of a continuation.
        temperature: Temperature of the softmax that tokens are drawn from; None: nothing is drawn.
        beams: Number of beams of a beam search; 1 is greedy, or sampling.

    Raises:
        ValueError: If a number is out of its range, or beams are to be sampled.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    beams: int = 1

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.beams < 1:
            raise ValueError(f"beams must be at least 1, got {self.beams}")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature must be positive or None, got {self.temperature}")
        if self.temperature is not None and self.beams > 1:
            raise ValueError(f"samples need beams 1, got {self.beams}")

    def within(self, positions: int | None, longest: int) -> "Decoding":
        """The same with fewer new tokens where a model has too few positions.

        Args:
            positions: Largest number of tokens that the model takes; None: any.
            longest: Number of tokens of the longest prompt, of which the end is kept that leaves
                half of the positions free.
        """
        if positions is None:
            return self
        free = max(positions // 2, positions - longest)
        return replace(self, max_new_tokens=min(self.max_new_tokens, free))


@dataclass(frozen=True, eq=False)
class Continuations:
    """What a model wrote after prompts.

    Attributes:
        texts: Text after each prompt, without special tokens.
        complete: Whether the model ended each, before the largest number of tokens.
    """

    texts: tuple[str, ...]
    complete: Bool[np.ndarray, " n"]


def generate(
    model: LanguageModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    seed: int = 0,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    tick: Callable[[int], None] | None = None,
) -> Continuations:
    """Continue texts or conversations.

    Prompts of like length share a batch. The same prompts, in batches of the same size, give the
    same samples for a seed; another batch size gives others, since rows of a batch are drawn
    together.

    Args:
        model: Causal model on the device; its mode and the global random numbers are restored.
        tokenizer: Its tokenizer.
        prompts: Texts, or messages of conversations before the assistant's turn.
        decoding: How tokens are chosen, and their largest number.
        seed: Seed of samples.
        batch_size: Number of prompts in a batch.
        device: Device of the model.
        tick: Called after each batch with the number of prompts done.

    Raises:
        UserError: As `continue_ids`; for a conversation that does not fit the chat template.
    """
    ids = [causal_rows.prompt_ids(prompt, tokenizer) for prompt in prompts]
    order = np.argsort([-len(row) for row in ids], kind="stable")
    texts = [""] * len(ids)
    complete = np.zeros(len(ids), bool)
    end = tokenizer.eos_token_id
    for number, start in enumerate(range(0, len(ids), batch_size)):
        rows = order[start : start + batch_size]
        new = continue_ids(
            model,
            [ids[i] for i in rows],
            decoding,
            padding=tokenizer.pad_token_id,
            end=end,
            seed=derive_seed(seed, number),
            device=device,
        )
        for i, more in zip(rows, new, strict=True):
            texts[i] = _text_after(ids[i], more, tokenizer)
            complete[i] = more[-1] == end
        if tick:
            tick(start + len(rows))
    return Continuations(tuple(texts), complete)


def continue_ids(
    model: LanguageModel,
    prompts: Sequence[Int[np.ndarray, " l"]],
    decoding: Decoding,
    *,
    padding: int,
    end: int | None,
    seed: int,
    device: torch.device | str,
) -> list[Int[np.ndarray, " m"]]:
    """Continue the token ids of a batch of prompts.

    Args:
        model: Causal model; its mode and the global random numbers are restored.
        prompts: Ids of each prompt, at least one.
        decoding: How tokens are chosen; see `Decoding.within` for a model with few positions.
        padding: Id of the token for padding, which stands before short prompts.
        end: Id of the end-of-sequence token; None: all continuations have the largest length.
        seed: Seed of samples.
        device: Device of the model.

    Returns:
        The new ids of each prompt, one at least: up to the end-of-sequence token, or the largest
        number.

    Raises:
        UserError: If the model cannot generate, or a prompt is empty.
    """
    network: Any = model.network
    if not callable(getattr(network, "generate", None)):
        raise UserError(f"{type(network).__name__} does not generate texts: it is no causal model")
    if not all(map(len, prompts)):
        raise UserError(
            "a prompt is empty, and the tokenizer has no beginning-of-sequence token: give each "
            "prompt a text"
        )
    length, limit = max(map(len, prompts)), transformer.positions(network)
    decoding = decoding.within(limit, length)
    if limit is not None:
        length = min(length, limit - decoding.max_new_tokens)
        prompts = [row[-length:] for row in prompts]
    ids = np.full((len(prompts), length), padding, np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[length - len(prompt) :] = prompt
    lengths = torch.tensor([len(row) for row in prompts])
    mask = torch.arange(length) >= length - lengths[:, None]
    device = torch.device(device)
    gpus = [] if device.type == "cpu" else None  # all
    with torch.random.fork_rng(gpus), _evaluation(network):
        torch.manual_seed(seed)
        whole = network.generate(
            torch.from_numpy(ids).to(device),
            attention_mask=mask.long().to(device),
            generation_config=_configuration(model, decoding, padding, end),
        )
    return [_until(row, end) for row in whole[:, length:].cpu().numpy()]


def _configuration(model: LanguageModel, decoding: Decoding, padding: int, end: int | None) -> Any:
    network: Any = model.network
    # Models pad their vocabulary: no token has these ids.
    unused = range(model.vocabulary or network.config.vocab_size, network.config.vocab_size)
    sampled = decoding.temperature is not None
    options = {"temperature": decoding.temperature, "top_k": 0, "top_p": 1.0} if sampled else {}
    return import_transformers().GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=sampled,
        num_beams=decoding.beams,
        pad_token_id=padding,
        eos_token_id=end,
        suppress_tokens=list(unused) or None,
        use_cache=True,
        **options,
    )


@contextmanager
def _evaluation(network: Any) -> Iterator[None]:
    """Evaluation mode, and no settings of generation but those given."""
    was_training, settings = network.training, network.generation_config
    network.generation_config = import_transformers().GenerationConfig()
    network.eval()
    try:
        yield
    finally:
        network.generation_config = settings
        network.train(was_training)


def _until(row: Int[np.ndarray, " m"], end: int | None) -> Int[np.ndarray, " k"]:
    """The ids up to the first end-of-sequence token, that included."""
    places = [] if end is None else np.flatnonzero(row == end)
    return row[: places[0] + 1] if len(places) else row


def _text_after(prompt: Int[np.ndarray, " l"], new: Int[np.ndarray, " m"], tokenizer: Any) -> str:
    """The text of new tokens, with a space before it where the tokens after the prompt have one."""

    def decode(ids: Sequence[int]) -> str:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return tokenizer.decode(ids, **options)

    before, whole = decode(prompt.tolist()), decode([*prompt.tolist(), *new.tolist()])
    return whole[len(before) :] if whole.startswith(before) else decode(new.tolist())
