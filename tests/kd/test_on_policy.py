"""Batches whose completions the student writes: prompts, targets, draws, exact resume."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from language_support import causal_model, characters
from torch import nn

from dsdistill.harness.errors import UserError
from kd.data.batching import ChangedBatches
from kd.data.text import causal_rows
from kd.data.text.corpus import TextPart
from kd.data.text.generation import Decoding
from kd.data.text.token_batches import TokenBatches
from kd.losses import token
from kd.models.token_inputs import IGNORED
from kd.objectives.on_policy import OnPolicy
from kd.objectives.schemes import Distillation
from kd.objectives.terms import WeightedTerm
from kd.parallel import engine
from kd.recipe import Recipe
from kd.training.loop import train

TOKENIZER = characters("abcdefgh UserAint:\n")
CPU = torch.device("cpu")
PAIRS = TextPart((["ab", "abc def", "h", "fed", "a", "ce"], ["cd", "g", "efgh", "a", "bb", "dah"]))
ROWS = causal_rows.encode(PAIRS, TOKENIZER, 16)


def source(part=ROWS, size: int = 2) -> TokenBatches:
    return TokenBatches((part,), (0,), None, size, CPU)


def on_policy(student, **options) -> OnPolicy:
    given = {"share": 1.0, "decoding": Decoding(5, temperature=0.9)} | options
    return OnPolicy(student, 0, TOKENIZER.eos_token_id, **given)


def texts(batch) -> list[tuple[str, str]]:
    """What stands before the targets of each row, and the targets."""
    rows = []
    for ids, mask, targets in zip(
        batch.inputs.ids, batch.inputs.mask, batch.token_targets, strict=True
    ):
        own = targets[targets != IGNORED].tolist()
        count = int(mask.sum())
        assert ids[count - len(own) : count].tolist() == own
        first = int((targets != IGNORED).nonzero()[0])
        assert (targets[first : first + len(own)] != IGNORED).all()
        assert first == count - len(own) - 1
        rows.append((TOKENIZER.decode(ids[: first + 1]), TOKENIZER.decode(own)))
    return rows


def test_completions_are_replaced_and_prompts_are_not():
    student = causal_model(TOKENIZER)
    (batch,) = source(size=6).in_order()
    changed = on_policy(student)(batch, 7)
    prompts, answers = ([column[row] for row in batch.index.tolist()] for column in PAIRS.texts)
    assert [p for p, _ in texts(changed)] == [f"[BOS]{prompt}" for prompt in prompts]
    assert [a for _, a in texts(batch)] == [f"{answer}[EOS]" for answer in answers]
    assert [a for _, a in texts(changed)] != [a for _, a in texts(batch)]
    for _, answer in texts(changed):
        length = len(TOKENIZER(answer)["input_ids"])
        assert length == 5 or answer.endswith("[EOS]")
    assert (changed.inputs.ids[~changed.inputs.mask] == 0).all()
    assert torch.equal(changed.index, batch.index)
    assert changed.total("targets") == changed.count("targets")


def test_the_draws_are_functions_of_the_seed():
    student = causal_model(TOKENIZER, "gpt2", dropout=0.3).train()
    change = on_policy(student)
    (batch,) = source(size=6).in_order()
    before = torch.random.get_rng_state()
    one, same, other = change(batch, 1), change(batch, 1), change(batch, 2)
    assert torch.equal(one.inputs.ids, same.inputs.ids)
    assert texts(one) != texts(other)
    assert student.network.training
    assert torch.equal(before, torch.random.get_rng_state())
    assert not one.inputs.ids.requires_grad
    half = [on_policy(student, share=0.5)(batch, seed) is batch for seed in range(60)]
    assert 15 < sum(half) < 45
    assert on_policy(student, share=0.0)(batch, 1) is batch


def test_a_conversation_is_continued_at_its_last_answer():
    causal_rows.add_chat_template(TOKENIZER)
    talk = [
        {"role": ("user", "assistant")[i % 2], "content": text}
        for i, text in enumerate(["ab", "cd", "ef", "gh"])
    ]
    part = causal_rows.encode(TextPart(([talk],)), TOKENIZER, 60)
    (batch,) = source(part).in_order()
    changed = on_policy(causal_model(TOKENIZER))(batch, 0)
    expected = TOKENIZER.apply_chat_template(talk[:3], tokenize=False, add_generation_prompt=True)
    assert [p for p, _ in texts(changed)] == [expected]


@pytest.mark.parametrize(("prompt", "expected"), [(3, "[BOS]ab"), (50, "[BOS]abc")])
def test_of_a_plain_text_the_first_tokens_are_the_prompt(prompt, expected):
    part = causal_rows.encode(TextPart((["abcdef"],)), TOKENIZER, 20)
    (batch,) = source(part).in_order()
    changed = on_policy(causal_model(TOKENIZER), prompt_tokens=prompt)(batch, 0)
    assert texts(changed)[0][0] == expected


def test_samples_end_with_the_positions_of_the_model():
    student = causal_model(TOKENIZER, "gpt2", positions=10)
    (batch,) = source(size=6).in_order()
    changed = on_policy(student, decoding=Decoding(128, temperature=0.9))(batch, 0)
    assert changed.inputs.ids.shape[1] <= 10
    student(changed.inputs)


class _Divergence(nn.Module):
    """GKD's loss on the tokens with a target."""

    def forward(self, step):
        mask = step.batch.token_targets != IGNORED
        teacher = step.teacher_logits[0]
        return token.token_divergence(step.student_logits, teacher, mask, temperature=1.0, beta=0.5)


def run(steps: int, saved=None, share: float = 0.5):
    student = causal_model(TOKENIZER, "gpt2", dropout=0.1)
    term = WeightedTerm("tokens", 1.0, _Divergence(), needs_teacher=True, unit="targets")
    objective = Distillation(student, [term], [causal_model(TOKENIZER, seed=5)])
    lengths = []

    def change(batch, seed):
        changed = on_policy(student, share=share)(batch, seed)
        lengths.append((changed is batch, changed.inputs.ids.tolist()))
        return changed

    kept = []
    recipe = Recipe(steps=8, batch_size=2, optimizer="adamw", lr=1e-3)
    with engine.temporary() as on:
        try:
            train(
                objective,
                ChangedBatches(source(), change),
                recipe,
                3,
                on=on,
                saved=saved,
                save=kept.append,
                stopping=lambda: len(lengths) == steps,
            )
        except KeyboardInterrupt:
            assert steps < 8
    return student.network.state_dict(), lengths, kept[-1]


def test_a_resumed_training_draws_the_same_batches_and_ends_with_the_same_bits():
    weights, batches, _ = run(8)
    assert {own for own, _ in batches} == {True, False}  # some are the student's and some are not
    _, first, saved = run(4)  # in the middle of the second epoch
    again, rest, _ = run(8, saved)
    assert first + rest == batches
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_the_students_samples_change_with_its_weights():
    _, batches, _ = run(8, share=1.0)
    assert len({str(ids) for _, ids in batches}) == 8


class _TwoProcesses:
    """An engine of two processes with the same share."""

    num_processes, is_fsdp2, device = 2, False, CPU

    def autocast(self):
        return nullcontext()

    def reduce(self, counts):
        return 2 * counts


def test_processes_know_the_tokens_of_the_whole_batch():
    (batch,) = source(size=6).in_order()
    batch = replace(batch, totals={"tokens": 999, "targets": 999}, total_images=12)
    changed = on_policy(causal_model(TOKENIZER), on=_TwoProcesses())(batch, 0)
    for unit in ("tokens", "targets"):
        assert changed.total(unit) == 2 * changed.count(unit)
    assert changed.total("rows") == 12


def test_processes_draw_different_samples_for_equal_prompts():
    part = causal_rows.encode(TextPart((["ab"] * 4, ["c"] * 4)), TOKENIZER, 9)
    student = causal_model(TOKENIZER)
    first, second = (next(source(part, 4).epoch(0, 0, rank=rank, world=2)) for rank in range(2))
    one, other = (on_policy(student)(batch, 0) for batch in (first, second))
    assert [a for _, a in texts(one)] != [a for _, a in texts(other)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, "share must be in 0 to 1"),
        ({"share": np.nan}, "share must be in 0 to 1"),
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1"),
    ],
)
def test_settings_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        on_policy(causal_model(TOKENIZER), **options)


def test_sharded_students_are_refused():
    with pytest.raises(UserError, match="leave FSDP out"):
        on_policy(causal_model(TOKENIZER), on=type("Sharded", (), {"is_fsdp2": True})())
