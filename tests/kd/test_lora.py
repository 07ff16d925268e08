"""Adapters of low rank: what is trained, what they compute, and the merged network."""

import contextlib
import sys

import pytest
import torch
import transformers
from language_support import causal_model, characters
from torch import nn

from dsdistill.harness.errors import UserError
from kd.data.text import causal_rows
from kd.data.text.token_batches import TokenBatches
from kd.losses import token
from kd.models.language import lora
from kd.models.language.bilstm import BiLstm
from kd.models.language.language_model import LanguageModel
from kd.models.token_inputs import TokenInputs
from kd.objectives.schemes import Distillation, MeanTeacher
from kd.objectives.terms import WeightedTerm
from kd.parallel import engine
from kd.recipe import Recipe
from kd.training.checkpoint import LeftOut
from kd.training.loop import train

TOKENIZER = characters("abcdefgh ")
INPUTS = TokenInputs(
    torch.randint(2, 13, (3, 7), generator=torch.Generator().manual_seed(0)),
    torch.arange(7) < torch.tensor([7, 3, 5])[:, None],
    torch.tensor([[0, 0, 1, 1, 1, 1, 1]] * 3),
)


def classifier() -> LanguageModel:
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LanguageModel(
            transformers.BertForSequenceClassification(config), config=config.to_dict()
        )


MAKERS = {
    "bert": classifier,
    "llama": lambda: causal_model(TOKENIZER),
    "gpt2": lambda: causal_model(TOKENIZER, "gpt2"),
}


@pytest.fixture(params=MAKERS)
def model(request):
    return MAKERS[request.param]().eval()


def outputs(model) -> torch.Tensor:
    with torch.no_grad():
        return model(INPUTS)


def step(model) -> None:
    """Train a little, so that the adapters are no longer zero."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(INPUTS).float().log_softmax(-1)[..., 0].mean().backward()
        optimizer.step()


def test_new_adapters_change_nothing_and_the_class_stays(model):
    pytest.importorskip("peft")
    before, kind = outputs(model), type(model.network)
    assert lora.add(model, 4) is model
    assert type(model.network) is kind
    torch.testing.assert_close(outputs(model), before, rtol=0, atol=0)


def test_only_adapters_and_a_head_of_classes_are_trained(model):
    pytest.importorskip("peft")
    lora.add(model, 4)
    trained = {name for name, p in model.network.named_parameters() if p.requires_grad}
    whole = {name for name in trained if "lora_" not in name}
    expected = {"classifier.weight", "classifier.bias"} | {
        f"bert.pooler.dense.{part}" for part in ("weight", "bias")
    }
    assert whole == (set() if model.vocabulary else expected)
    frozen = {
        name: p.clone() for name, p in model.network.named_parameters() if name not in trained
    }
    step(model)
    after = dict(model.network.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in frozen.items())
    layers = {"bert": 6, "llama": 7, "gpt2": 4}[model.network.config.model_type]
    assert len(trained - whole) == 2 * 2 * layers  # two matrices, two blocks


def test_the_merged_network_is_a_plain_one_with_the_same_outputs(model):
    pytest.importorskip("peft")
    names = list(model.network.state_dict())
    untrained = outputs(model)
    step(lora.add(model, 4))
    trained = outputs(model)
    assert not torch.allclose(trained, untrained, atol=1e-3)
    merged = lora.merge(model).eval()
    assert list(merged.network.state_dict()) == names
    assert not any("lora" in type(module).__module__ for module in merged.network.modules())
    torch.testing.assert_close(outputs(merged), trained, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs(model), trained, rtol=0, atol=0)
    assert (merged.vocabulary, merged.config) == (model.vocabulary, model.config)


def test_an_adapted_layer_adds_the_scaled_product():
    pytest.importorskip("peft")
    model = lora.add(classifier(), 4, scale=3.0)
    layer = model.network.bert.encoder.layer[0].attention.self.query
    x = torch.randn(5, 32)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    b.data.normal_()
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 3.0 * x @ a.T @ b.T)


def test_adapters_are_a_function_of_the_seed():
    pytest.importorskip("peft")
    before = torch.random.get_rng_state()
    one, same, other = (lora.add(classifier(), 4, seed=seed) for seed in (0, 0, 1))
    weights = [x.network.state_dict() for x in (one, same, other)]
    name = next(key for key in weights[0] if "lora_A" in key)
    assert torch.equal(weights[0][name], weights[1][name])
    assert not torch.equal(weights[0][name], weights[2][name])
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'dsdistill\[lora\]'"):
        lora.add(classifier(), 4)


def test_ranks_and_students_that_do_not_fit():
    with pytest.raises(UserError, match="at least 1, got 0"):
        lora.add(classifier(), 0)
    pytest.importorskip("peft")
    with pytest.raises(UserError, match="needs a transformer as student, got BiLstm"):
        lora.add(LanguageModel(BiLstm(30, 4, 12, pairs=False)), 4)


def test_a_diverged_training_is_not_merged():
    pytest.importorskip("peft")
    model = lora.add(classifier(), 4)
    layer = model.network.bert.encoder.layer[0].attention.self.query
    layer.lora_B["default"].weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="cannot be merged"):
        lora.merge(model)


def run(steps: int, saved=None, *, base: LanguageModel | None = None, whole=False, **recipe):
    """Train adapters for six steps, or stop before; return the merged weights and what was saved.

    Args:
        steps: Steps after which to stop.
        saved: What an earlier call saved.
        base: The model below the adapters; None for the usual one.
        whole: Whether checkpoints hold the base too, as those of earlier versions do.
        recipe: Further fields of the recipe.
    """
    part = causal_rows.encode_texts(["abc def", "hgfedcba", "cab", "fade"] * 2, TOKENIZER, 12)
    source = TokenBatches((part,), (0,), None, 2, torch.device("cpu"))
    student = lora.add(base or causal_model(TOKENIZER), 4, dropout=0.1)
    if whole:
        student.frozen_elsewhere = False
    measure = _CrossEntropy()
    term = WeightedTerm("clm", 1.0, measure, needs_teacher=False, unit="targets")
    states = []
    chosen = Recipe(steps=6, batch_size=2, optimizer="adamw", lr=1e-2, **recipe)
    with engine.temporary() as on, contextlib.suppress(KeyboardInterrupt):
        options = {"saved": saved, "save": states.append, "on": on}
        options["stopping"] = lambda: measure.calls == steps
        state = train(Distillation(student, [term]), source, chosen, 0, **options)
        student.network.load_state_dict(state.best, strict=False)
    return lora.merge(student).network.state_dict(), states[-1]


@pytest.mark.parametrize("recipe", [{}, {"ema": 0.5, "average_best": 2}], ids=["last", "average"])
def test_a_checkpoint_holds_the_adapters_alone(recipe):
    pytest.importorskip("peft")
    expected, _ = run(6, **recipe)
    _, saved = run(4, **recipe)
    arrays, meta = saved
    kinds = {name.rpartition("lora_")[1] or name for name in arrays if "optimizer" not in name}
    assert kinds == {"lora_"}
    assert {name.partition(".")[0] for name in arrays} == {
        *("objective", "kept", "optimizer"),
        *(["average"] if recipe else []),
    }
    assert len(meta["left_out"]) == 64
    again, _ = run(6, saved, **recipe)
    assert all(torch.equal(expected[name], again[name]) for name in expected)


def test_a_checkpoint_with_all_weights_goes_on():
    """As earlier versions wrote them."""
    pytest.importorskip("peft")
    expected, _ = run(6)
    _, saved = run(4, whole=True)
    assert "left_out" not in saved[1]
    assert any("embed_tokens" in name for name in saved[0])
    again, later = run(6, saved)
    assert all(torch.equal(expected[name], again[name]) for name in expected)
    assert not any("embed_tokens" in name for name in later[0])


def test_adapters_do_not_go_on_upon_another_base():
    pytest.importorskip("peft")
    _, saved = run(2)
    other = causal_model(TOKENIZER)
    next(other.parameters()).data[0] += 1
    with pytest.raises(UserError, match="the frozen weights of the student are others"):
        run(6, saved, base=other)
    with pytest.raises(UserError, match="is none"):
        run(6, saved, whole=True)


def test_an_average_that_teaches_is_stored_without_the_base_too():
    pytest.importorskip("peft")
    student = lora.add(classifier(), 4)
    objective = MeanTeacher(student, [], decay=0.9)
    left_out = LeftOut.of_student(student)
    absent = left_out.of_objective(objective)
    stored = objective.checkpoint_state().keys() - absent
    trained = {n for n, p in student.network.named_parameters() if p.requires_grad}
    prefixes = ("inner.student.network.", "inner.teachers.0.network.")
    assert stored == {prefix + name for prefix in prefixes for name in trained}


def test_a_training_of_adapters_resumes_to_the_bit():
    pytest.importorskip("peft")
    whole, _ = run(6)
    _, saved = run(2)
    assert saved[1]["step"] == 2
    again, _ = run(6, saved)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    start = causal_model(TOKENIZER).network.state_dict()
    changed = {name for name in whole if not torch.equal(whole[name], start[name])}
    assert len(changed) == 14  # the linear layers of two blocks of Llama


class _CrossEntropy(nn.Module):
    calls = 0

    def forward(self, step):
        self.calls += 1
        return token.token_cross_entropy(step.student_logits, step.batch.token_targets)
