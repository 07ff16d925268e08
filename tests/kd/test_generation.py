"""Continuations of prompts: padding, bounds, ends, beams and samples."""

import numpy as np
import pytest
import torch
import transformers
from language_support import causal_model, characters
from torch import nn

from dsdistill.harness.errors import UserError
from kd.data.text import generation
from kd.data.text.generation import Decoding
from kd.models.language.language_model import LanguageModel

TOKENIZER = characters("abcdefgh ")
PROMPTS = ["a", "abc def", "hgfedcba", "cab"]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    return causal_model(TOKENIZER, request.param)


def greedy_by_hand(model, prompt: str, count: int) -> str:
    """The most probable tokens one after the other, from whole passes without padding."""
    ids = [TOKENIZER.bos_token_id, *TOKENIZER(prompt)["input_ids"]]
    start = len(ids)
    with torch.no_grad():
        for _ in range(count):
            logits = model.network.eval()(torch.tensor([ids])).logits[0, -1, : len(TOKENIZER)]
            ids.append(int(logits.argmax()))
            if ids[-1] == TOKENIZER.eos_token_id:
                break
    return TOKENIZER.decode(ids[start:], skip_special_tokens=True)


def test_prompts_of_any_length_share_a_batch(model):
    expected = tuple(greedy_by_hand(model, prompt, 6) for prompt in PROMPTS)
    for size in (1, 4):
        answers = generation.generate(model, TOKENIZER, PROMPTS, Decoding(6), batch_size=size)
        assert answers.texts == expected


def test_samples_are_a_function_of_the_seed_and_leave_the_model_as_it_was(model):
    model.train()
    before = torch.random.get_rng_state()

    def texts(seed):
        answers = generation.generate(
            model, TOKENIZER, PROMPTS, Decoding(12, temperature=1.0), seed=seed
        )
        return answers.texts

    assert texts(0) == texts(0) != texts(1)
    assert (
        len(
            set(
                generation.generate(
                    model, TOKENIZER, ["a"] * 8, Decoding(12, temperature=1.0)
                ).texts
            )
        )
        > 1
    )
    assert model.network.training
    assert torch.equal(before, torch.random.get_rng_state())


def test_samples_follow_the_models_distribution():
    model = causal_model(TOKENIZER)
    model.network.generation_config.top_k = 1  # the model's own settings have no effect
    answers = generation.generate(
        model, TOKENIZER, ["a"] * 2000, Decoding(1, temperature=2.0), batch_size=2000
    )
    ids = torch.tensor([[TOKENIZER.bos_token_id, *TOKENIZER("a")["input_ids"]]])
    with torch.no_grad():
        logits = model.network(ids).logits[0, -1, : len(TOKENIZER)]
    expected = torch.softmax(logits / 2.0, 0)
    for token in "abcdefgh ":
        share = float(expected[TOKENIZER.convert_tokens_to_ids(token)])
        assert answers.texts.count(token) / 2000 == pytest.approx(share, abs=0.05)


def test_beams_find_the_most_probable_pair_of_tokens():
    model = causal_model(TOKENIZER, seed=10)
    size, prompt = len(TOKENIZER), [2, 5, 7]
    every = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    rows = torch.cat([torch.tensor(prompt).expand(len(every), -1), every], dim=1)
    with torch.no_grad():
        scores = model.network.eval()(rows).logits[..., :size].log_softmax(-1)
    both = scores[:, -3:-1].gather(2, every[..., None]).sum((1, 2))
    options = {"padding": 0, "end": None, "seed": 0, "device": "cpu"}
    greedy, best = (
        generation.continue_ids(model, [np.array(prompt)], Decoding(2, beams=beams), **options)
        for beams in (1, size)
    )
    assert best[0].tolist() == every[both.argmax()].tolist() != greedy[0].tolist()


class _Constant(nn.Module):
    """Makes a model always say one token."""

    def __init__(self, head, token: int) -> None:
        super().__init__()
        self.head, self.token = head, token

    def forward(self, hidden):
        logits = self.head(hidden)
        return torch.full_like(logits, -100.0).index_fill(-1, torch.tensor([self.token]), 100.0)


@pytest.mark.parametrize(("token", "text", "ended"), [("[EOS]", "", True), ("b", "bbbb", False)])
def test_generation_ends_and_says_where_the_model_did_not(token, text, ended):
    model = causal_model(TOKENIZER)
    head = _Constant(model.network.lm_head, TOKENIZER.convert_tokens_to_ids(token))
    model.network.lm_head = head
    model.network.generation_config.no_repeat_ngram_size = 1  # has no effect
    answers = generation.generate(model, TOKENIZER, PROMPTS, Decoding(4))
    assert answers.texts == (text,) * 4
    assert answers.complete.tolist() == [ended] * 4


def test_ids_without_a_token_are_never_chosen():
    model = causal_model(TOKENIZER)
    model.network.lm_head = _Constant(model.network.lm_head, len(TOKENIZER) + 2)
    ids = generation.continue_ids(
        model, [np.array([2, 4])], Decoding(5), padding=0, end=3, seed=0, device="cpu"
    )
    assert max(ids[0]) < len(TOKENIZER)


@pytest.mark.parametrize(
    ("prompt", "tokens", "read", "new"),
    [(3, 4, 3, 4), (6, 4, 6, 4), (8, 4, 6, 4), (8, 9, 5, 5), (2, 20, 2, 8), (20, 1, 9, 1)],
)
def test_prompts_and_continuations_fit_the_positions(prompt, tokens, read, new):
    model = causal_model(TOKENIZER, "gpt2", positions=10)
    ids = np.random.default_rng(0).integers(4, 13, prompt)
    options = {"padding": 0, "end": None, "seed": 0, "device": "cpu"}
    (answer,) = generation.continue_ids(model, [ids], Decoding(tokens), **options)
    (same,) = generation.continue_ids(model, [ids[-read:]], Decoding(new), **options)
    assert answer.tolist() == same.tolist()
    assert len(answer) == new


def test_positions_are_those_that_the_network_takes():
    """RoBERTa begins to count its positions after the id of padding."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.RobertaConfig(
        vocab_size=20, intermediate_size=16, max_position_embeddings=10, is_decoder=True, **sizes
    )
    model = LanguageModel(transformers.RobertaForCausalLM(config))
    options = {"padding": 1, "end": None, "seed": 0, "device": "cpu"}
    (answer,) = generation.continue_ids(model, [np.array([5, 6, 7])], Decoding(20), **options)
    assert len(answer) == 5  # of eight


def test_spaces_before_an_answer_are_part_of_it():
    class Words:
        """Decodes as SentencePiece does: the space before the first token is lost."""

        def decode(self, ids, **options):
            return " ".join("abcdefgh"[i] for i in ids)

    assert generation._text_after(np.array([0, 1]), np.array([2, 3]), Words()) == " c d"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"beams": 0}, "beams must be at least 1"),
        ({"temperature": 0.0}, "must be positive"),
        ({"temperature": float("nan")}, "must be positive"),
        ({"temperature": 1.0, "beams": 2}, "samples need beams 1"),
    ],
)
def test_settings_that_are_none(settings, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**settings)


def test_models_and_prompts_that_cannot_be_continued():
    with pytest.raises(UserError, match="Linear does not generate texts"):
        generation.generate(LanguageModel(nn.Linear(2, 2)), TOKENIZER, ["a"], Decoding(2))
    bare = characters("abcdefgh ", bos=False)
    with pytest.raises(UserError, match="a prompt is empty"):
        generation.generate(causal_model(bare), bare, ["a", ""], Decoding(2))
