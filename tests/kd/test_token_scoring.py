"""Figures of language models against sums by hand."""

import math

import pytest
import torch
from language_support import causal_model, characters

from dsdistill.harness.errors import UserError
from kd.data.text import causal_rows
from kd.data.text.corpus import TextPart
from kd.data.text.token_batches import MaskedTokens, TokenBatches
from kd.evaluation import token_scoring
from kd.parallel import engine

TEXTS = ["the cat sat on the mat", "a", "n\u00e9e", "cats and mats are not hats"]
TOKENIZER = characters("".join(TEXTS))
CPU = torch.device("cpu")


def batches(size: int, **options) -> TokenBatches:
    part = causal_rows.encode(TextPart((TEXTS,)), TOKENIZER, 9)
    return TokenBatches((part,), (0,), None, size, CPU, **options)


def by_hand(model) -> tuple[float, float, int]:
    """Sum of nats, number of right predictions and of targets, row by row without padding."""
    part = batches(1).parts[0]
    nats, right, count = 0.0, 0, 0
    for a, b in zip(part.offsets[:-1], part.offsets[1:], strict=True):
        ids = torch.from_numpy(part.ids[a:b]).long()[None]
        with torch.no_grad():
            logits = model.network.eval()(ids).logits[0, :-1, : len(TOKENIZER)]
        nats -= float(logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum())
        right += int((logits.argmax(-1) == ids[0, 1:]).sum())
        count += ids.shape[1] - 1
    return nats, right, count


@pytest.mark.parametrize("size", [1, 3, 100])
def test_each_target_counts_once_whatever_its_batch(size):
    model = causal_model(TOKENIZER).train()
    nats, right, count = by_hand(model)
    model.train()
    data = batches(size)
    text_bytes = data.parts[0].text_bytes
    assert text_bytes == sum(len(text.encode()) for text in TEXTS)
    with engine.temporary() as on:
        figures = token_scoring.validate(model, data, on, text_bytes=text_bytes)
    assert figures["nll"] == pytest.approx(nats / count, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert figures["accuracy"] == right / count
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    assert model.training


def test_the_same_tokens_are_hidden_in_every_validation():
    model = causal_model(TOKENIZER)
    data = batches(3, masked=MaskedTokens(0.3, mask=1, special=(0, 2, 3), size=len(TOKENIZER)))
    with engine.temporary() as on:
        first, second = (token_scoring.validate(model, data, on) for _ in range(2))
    assert first == second
    assert "bits_per_byte" not in first


def test_a_perplexity_beyond_all_numbers_is_infinite():
    assert token_scoring.perplexity(1e4) == math.inf


def test_texts_without_a_token_to_predict_are_refused():
    nothing = MaskedTokens(0.5, 1, tuple(range(len(TOKENIZER))), len(TOKENIZER))
    with pytest.raises(UserError, match="no token to predict"):
        token_scoring.validate(causal_model(TOKENIZER), batches(3, masked=nothing))


def test_one_process_alone_measures_all_texts():
    model = causal_model(TOKENIZER)
    everyone = token_scoring.validate(model, batches(3), engine.make())
    assert token_scoring.validate(model, batches(3)) == everyone
