"""Copies of a text whose words are exchanged for others that a language model expects there.

For each word that has letters alone and is no English stop word there are candidates: the words
that a masked language model finds likely in its place, or for a word of several pieces, which a
single mask cannot stand for, the words with the nearest embeddings.

Source: Jiao et al. (2020), arXiv:1909.10351, algorithm 1. Deviations: the nearest words are those
of the corpus by the model's own input embeddings, of which a word has the mean over its pieces,
where the paper takes GloVe's; candidates are whole words of letters other than the word itself,
where the authors' code drops only pieces from the 15 likeliest tokens; of pairs the first text, the
second and both are changed in turn, where their code changes the second beside the last change of
the first.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from dsdistill.harness.errors import UserError
from kd.data import teacher_cache
from kd.data.batching import derive_seed
from kd.data.text import words
from kd.data.text.corpus import TextPart
from kd.data.text.words import SplitText
from kd.models.language import tokenizer as tokenizers
from kd.models.language import trained_models, transformer
from kd.models.language.language_model import LanguageModel
from kd.models.token_inputs import TokenInputs

CANDIDATES = 15  # of a word
NEAREST_AMONG = 100_000  # words of the corpus, the most frequent ones
TEXTS_PER_CALL = 64  # of the language model; words of a longer text are masked in several calls
WORDS_PER_PRODUCT = 256  # bounds the memory for similarities
VERSIONED_PACKAGES = ("torch", "transformers", "scikit-learn")

Candidates = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class WordPredictor:
    """A masked language model that names likely words.

    Attributes:
        model: The model on its device, in evaluation mode.
        tokenizer: Its tokenizer.
        device: That device.
        ids: Ids of the tokens that are whole words of letters.
        names: These words.
        count: Number of candidates of a word.
    """

    model: LanguageModel
    tokenizer: Any
    device: torch.device
    ids: Int[Tensor, " words"]
    names: list[str]
    count: int = CANDIDATES

    @torch.inference_mode()
    def candidates(self, text: SplitText, places: Sequence[int]) -> list[tuple[str, ...]]:
        """Words that are likely at places of a text, the likeliest first.

        The model sees the text with the mask at the place, and behind it the whole text, so that a
        candidate means much the same. What it answers is a function of the text alone, to the bit:
        no other text is in the batch.

        Args:
            text: The text.
            places: Numbers of words. One that is cut off, since the two texts are longer than the
                model's positions, has no candidates.
        """
        candidates: list[tuple[str, ...]] = []
        for start in range(0, len(places), TEXTS_PER_CALL):
            some = places[start : start + TEXTS_PER_CALL]
            inputs = self._inputs(text, some)
            hidden = inputs.ids == self.tokenizer.mask_token_id
            logits = self._logits_at(inputs, hidden.int().argmax(dim=1))[:, self.ids]
            # One more, in case the word itself is among them.
            order = logits.topk(min(self.count + 1, len(self.ids))).indices.tolist()
            for place, row, known in zip(some, order, hidden.any(dim=1).tolist(), strict=True):
                own = text.words[place].casefold()
                names = [self.names[i] for i in row if self.names[i].casefold() != own]
                candidates.append(tuple(names[: self.count]) if known else ())
        return candidates

    def _inputs(self, text: SplitText, places: Sequence[int]) -> TokenInputs:
        masked = [text.replace(place, self.tokenizer.mask_token) for place in places]
        encoded = self.tokenizer(
            masked,
            ["".join(text.chunks)] * len(masked),
            padding=True,
            truncation=True,
            max_length=_positions(self.model, self.tokenizer),
            return_tensors="pt",
            verbose=False,
        )
        inputs = TokenInputs(
            encoded["input_ids"], encoded["attention_mask"].bool(), encoded.get("token_type_ids")
        )
        return inputs.to(self.device)

    def _logits_at(self, inputs: TokenInputs, positions: Tensor) -> Float[Tensor, "n v"]:
        """Logits at one position of each text; the head is not computed for the others."""

        def select(_module: object, _inputs: object, outputs: Any) -> Any:
            states = outputs.last_hidden_state
            rows = torch.arange(len(states), device=states.device)
            outputs.last_hidden_state = states[rows, positions][:, None]
            return outputs

        body: Any = self.model.network.base_model
        handle = body.register_forward_hook(select)
        try:
            return self.model(inputs)[:, 0].float()
        finally:
            handle.remove()


@dataclass(frozen=True, eq=False)
class MaskedReplacement:
    """TinyBERT's copies of a text: each word is exchanged for a candidate with a probability.

    Attributes:
        predictor: Names the candidates of words that are one token.
        nearest: Candidates of the corpus's words of several tokens.
        pieces: Number of tokens of each word that may be exchanged.
        copies: Number of copies of a row.
        seed: Seed of all draws; a copy depends on it, on the number of its row and on its own.
        replace_probability: Probability that a word with candidates is exchanged for one of them.
        fingerprint: SHA-256 of the model's weights and of its tokenizer.
    """

    predictor: WordPredictor
    nearest: Candidates
    pieces: Mapping[str, int]
    copies: int
    seed: int = 0
    replace_probability: float = 0.4
    fingerprint: str = ""

    def copies_of(
        self, row: int, texts: tuple[str, ...], language: str | None = None
    ) -> list[tuple[str, ...]]:
        """The copies of a row, some of which may be alike; fewer copies are the first of more.

        Args:
            row: Number of the row.
            texts: Its text, or its pair.
            language: Has no influence.
        """
        split = [words.split(text) for text in texts]
        sizes = [2 * len(text.words) for text in split]
        rng = np.random.default_rng(derive_seed(self.seed, row))
        draws = np.split(rng.random((self.copies, sum(sizes))), np.cumsum(sizes)[:-1], axis=1)
        changed = [self._change(text, x) for text, x in zip(split, draws, strict=True)]
        return words.combine(texts, changed, self.copies)

    def candidates_of(self, text: SplitText) -> dict[int, tuple[str, ...]]:
        """The candidates of each word of a text that has any, by its place."""
        counts = [self.pieces.get(word, 0) for word in text.words]
        single = [place for place, count in enumerate(counts) if count == 1]
        likely = dict(zip(single, self.predictor.candidates(text, single), strict=True))
        near = {i: self.nearest.get(text.words[i], ()) for i, n in enumerate(counts) if n > 1}
        return {place: names for place, names in (likely | near).items() if names}

    def _change(self, text: SplitText, draws: Float[np.ndarray, "copies draws"]) -> list[str]:
        """A changed version of a text for each row of uniform numbers."""
        count = len(text.words)
        action, choice = draws[:, :count], draws[:, count:]
        copies = [text.chunks.copy() for _ in range(len(draws))]
        for place, names in self.candidates_of(text).items():
            for copy in np.flatnonzero(action[:, place] < self.replace_probability):
                copies[copy][2 * place + 1] = names[int(choice[copy, place] * len(names))]
        return ["".join(chunks) for chunks in copies]

    def record(self) -> dict[str, Any]:
        """All that the copies of given texts depend on, JSON-compatible."""
        return {
            "method": "masked",
            "copies": self.copies,
            "seed": self.seed,
            "replace_probability": self.replace_probability,
            "candidates": self.predictor.count,
            "model": self.fingerprint,
            "device": self.predictor.device.type,  # likelihoods are rounded otherwise on others
            "versions": {name: version(name) for name in VERSIONED_PACKAGES},
        }


def load(
    name: str, part: TextPart, device: torch.device, *, copies: int, **numbers: Any
) -> MaskedReplacement:
    """Load a masked language model, and find the nearest words of a corpus.

    Args:
        name: `hf:` and a folder or a name on the hub, or the folder of a run.
        part: Rows of texts, or of pairs.
        device: Device of the model.
        copies: Number of copies of a row.
        **numbers: `seed` and `replace_probability` of `MaskedReplacement`.

    Raises:
        UserError: If the model cannot be had, or does not predict hidden words.
    """
    trained = trained_models.load(name, "mlm", ())
    model, tokenizer = trained.network, trained.tokenizer
    if tokenizer.mask_token_id is None:
        raise UserError(f"{name} has no mask among its tokens: --mlm needs a model of masked text")
    if model.untrained:
        raise UserError(
            f"{name} has no head that predicts hidden words (without weights: "
            f"{model.untrained[0]}): --mlm needs a masked language model, such as the one that the "
            "teacher was fine-tuned from"
        )
    digest = hashlib.sha256(teacher_cache.fingerprint(model.network).encode())
    digest.update(teacher_cache.architecture(model.network).encode())
    digest.update(tokenizers.describe(tokenizer).encode())
    model.to(device).eval().requires_grad_(False)
    ids, names = _whole_words(tokenizer)
    predictor = WordPredictor(model, tokenizer, device, torch.tensor(ids, device=device), names)
    pieces = _exchangeable(part, tokenizer)
    nearest = nearest_words(pieces, _embeddings(model))
    numbers["fingerprint"] = digest.hexdigest()
    counts = {word: len(ids) for word, ids in pieces.items()}
    return MaskedReplacement(predictor, nearest, counts, copies, **numbers)


def nearest_words(
    pieces: Mapping[str, tuple[int, ...]],
    embeddings: Float[Tensor, "v d"],
    count: int = CANDIDATES,
) -> dict[str, tuple[str, ...]]:
    """The nearest words of each word of several pieces, by the cosine of mean embeddings.

    Args:
        pieces: Ids of the pieces of each word, the most frequent word first.
        embeddings: Embedding of each id.
        count: Number of words that are wanted.
    """
    spelling: dict[tuple[int, ...], str] = {}
    for word, ids in pieces.items():
        spelling.setdefault(ids, word)  # a model without capitals knows `Film` and `film` as one
    known = list(spelling)
    place = {ids: i for i, ids in enumerate(known)}
    among = _directions(known[:NEAREST_AMONG], embeddings)
    several = [ids for ids in known if len(ids) > 1]
    nearest = {}
    for start in range(0, len(several), WORDS_PER_PRODUCT):
        some = several[start : start + WORDS_PER_PRODUCT]
        cosines = _directions(some, embeddings) @ among.T
        order = cosines.topk(min(count + 1, len(among))).indices.tolist()
        for ids, row in zip(some, order, strict=True):
            others = [spelling[known[i]] for i in row if i != place[ids]]
            nearest[ids] = tuple(others[:count])
    return {word: nearest[ids] for word, ids in pieces.items() if len(ids) > 1}


def _directions(
    spelled: Sequence[tuple[int, ...]], embeddings: Float[Tensor, "v d"]
) -> Float[Tensor, "n d"]:
    """Mean embedding of the pieces of each word, of length 1."""
    flat = torch.tensor([i for ids in spelled for i in ids], device=embeddings.device)
    starts = np.cumsum([0, *(len(ids) for ids in spelled)])[:-1]
    offsets = torch.from_numpy(starts).to(embeddings.device)
    return F.normalize(F.embedding_bag(flat, embeddings, offsets, mode="mean"), dim=1)


def _embeddings(model: LanguageModel) -> Float[Tensor, "v d"]:
    network: Any = model.network
    return network.get_input_embeddings().weight.detach().float()


def _exchangeable(part: TextPart, tokenizer: Any) -> dict[str, tuple[int, ...]]:
    """Ids of the pieces of each word that may be exchanged, the most frequent word first."""
    counts = Counter(
        word for column in part.texts for text in column for word in words.split(text).words
    )
    stop = words.english_stop_words()
    names = [
        word
        for word, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        if words.is_alphabetic(word) and word.casefold() not in stop
    ]
    return dict(zip(names, _pieces(names, tokenizer), strict=True))


def _whole_words(tokenizer: Any) -> tuple[list[int], list[str]]:
    """Ids and texts of the tokens that are words of letters, and not parts of words."""
    special = set(tokenizer.all_special_ids)
    names = {i: tokenizer.decode([i]).strip() for i in range(len(tokenizer)) if i not in special}
    letters = {i: name for i, name in names.items() if words.is_alphabetic(name)}
    pieces = _pieces(list(letters.values()), tokenizer)
    ids = [i for i, ids in zip(letters, pieces, strict=True) if ids == (i,)]
    return ids, [letters[i] for i in ids]


def _pieces(names: Sequence[str], tokenizer: Any) -> list[tuple[int, ...]]:
    """Ids of words as they stand within a text, behind a space."""
    if not names:
        return []
    encoded = tokenizer([f" {name}" for name in names], add_special_tokens=False, verbose=False)
    return [tuple(ids) for ids in encoded["input_ids"]]


def _positions(model: LanguageModel, tokenizer: Any) -> int:
    """Largest number of tokens that the model takes."""
    return min(tokenizer.model_max_length, transformer.positions(model.network) or sys.maxsize)
