"""Terms of blocks and tokens on real networks, against loops over each text without padding."""

import contextlib
import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import text_terms_support as support
import torch
from torch.nn import functional as F

from dsdistill.harness.errors import UserError
from kd.data.batching import Batch
from kd.models.language import blocks
from kd.models.token_inputs import IGNORED, TokenInputs
from kd.objectives import terms, token_terms
from kd.recipe import Recipe
from kd.training.checkpoint import LeftOut
from kd.training.steps import Trainer

# A student of two blocks and a teacher of four: of other width, and of the same.
STUDENT, WIDE, NARROW = (2, 12, 3), (4, 24, 3), (4, 12, 3)


class Text:
    """What a network computes for one text, in float64 and without padding."""

    def __init__(self, model, ids: torch.Tensor) -> None:
        network = copy.deepcopy(model.network).double().eval()
        network.set_attn_implementation("eager")
        with torch.no_grad():
            out = network(ids[None], output_hidden_states=True)
        self.states = [state[0] for state in out.hidden_states]  # embeddings, then each block
        self.logits = out.logits[0]
        self.layers = network.bert.encoder.layer
        self.heads = network.config.num_attention_heads

    def project(self, block: int, name: str, heads: int = 0) -> torch.Tensor:
        """Queries, keys or values (h, l, d) of a block."""
        linear = getattr(self.layers[block].attention.self, name)
        return linear(self.states[block]).unflatten(-1, (heads or self.heads, -1)).transpose(0, 1)

    def scores(self, block: int) -> torch.Tensor:
        query, key = self.project(block, "query"), self.project(block, "key")
        return query @ key.mT / query.shape[-1] ** 0.5


def texts(model, whole: Batch) -> list[Text]:
    rows = zip(whole.inputs.ids, whole.inputs.mask, strict=True)
    return [Text(model, ids[mask]) for ids, mask in rows]


def mean(values) -> float:
    values = [float(torch.as_tensor(value).detach()) for value in values]
    return sum(values) / len(values)


def kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    p, q = teacher.softmax(-1), student.softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


def value(loss: str, student, *teachers, task: str = "classify") -> float:
    (term,) = support.objective(loss, student, *teachers, task=task)(support.batch(task)).values()
    return term.item()


@pytest.fixture(scope="module")
def pair():
    return support.bert(*STUDENT, seed=1), support.bert(*WIDE, seed=2)


@pytest.fixture(scope="module")
def narrow():
    return support.bert(*STUDENT, seed=1), support.bert(*NARROW, seed=3)


@pytest.mark.parametrize(
    ("loss", "layers"),
    [("hidden", [(0, 0), (1, 2), (2, 4)]), ("hidden@0=-1,embeddings=0", [(1, 4), (0, 1)])],
)
def test_hidden_states_go_through_one_linear_map(pair, loss, layers):
    made = support.objective(loss, *pair)
    whole = support.batch()
    linear = copy.deepcopy(made.terms[0].measure.map).double()
    both = list(zip(*(texts(model, whole) for model in pair), strict=True))
    expected = sum(
        mean(
            (linear(s.states[a][j]) - t.states[b][j]).square().mean()
            for s, t in both
            for j in range(len(s.states[0]))
        )
        for a, b in layers
    )
    assert made(whole)["hidden"].item() == pytest.approx(expected, rel=1e-4)


def test_angles_of_the_last_block(narrow):
    both = list(zip(*(texts(model, support.batch()) for model in narrow), strict=True))
    expected = mean(
        1 - F.cosine_similarity(s.states[2][j], t.states[4][j], dim=0)
        for s, t in both
        for j in range(len(s.states[0]))
    )
    assert value("cosine", *narrow) == pytest.approx(expected, rel=1e-4)
    assert value("cosine@-1", *narrow) == pytest.approx(expected, rel=1e-4)


def test_angles_of_other_widths_need_a_map(pair, narrow):
    made = support.objective("cosine", *pair)
    assert [type(x).__name__ for x in made.terms[0].measure.maps] == ["Linear"]
    made(support.batch())["cosine"].backward()
    assert made.terms[0].measure.maps[0].weight.grad.abs().sum() > 0
    same = support.objective("cosine", *narrow).terms[0].measure
    assert not list(same.parameters())


def test_the_first_token_of_all_but_the_last_block(narrow):
    both = list(zip(*(texts(model, support.batch()) for model in narrow), strict=True))
    unit = [[x.states[i][0] / x.states[i][0].norm() for x, i in zip(y, (1, 2), strict=True)]
            for y in both]  # fmt: skip
    expected = 100 * mean((a - b).square().sum() for a, b in unit)
    assert value("patient", *narrow) == pytest.approx(expected, rel=1e-4)


def test_attention_scores_of_real_queries_and_keys(narrow):
    both = list(zip(*(texts(model, support.batch()) for model in narrow), strict=True))
    expected = sum(
        mean(
            (s.scores(a)[:, j] - t.scores(b)[:, j]).square().mean()
            for s, t in both
            for j in range(len(s.states[0]))
        )
        for a, b in [(0, 1), (1, 3)]
    )
    assert value("scores", *narrow) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("heads", [3, 12])
@pytest.mark.parametrize("qk", [0, 1])
def test_relations_of_the_last_block(pair, heads, qk):
    both = list(zip(*(texts(model, support.batch()) for model in pair), strict=True))
    pairs = [("query", "key"), ("value", "value")]
    if not qk:
        pairs = [(name, name) for name in ("query", "key", "value")]

    def rows(text: Text, block: int, names: tuple[str, str]) -> torch.Tensor:
        first, second = (text.project(block, name, heads) for name in names)
        return first @ second.mT / first.shape[-1] ** 0.5

    expected = sum(
        mean(
            kl(rows(t, 3, names)[head, j], rows(s, 1, names)[head, j])
            for s, t in both
            for j in range(len(s.states[0]))
            for head in range(heads)
        )
        for names in pairs
    )
    loss = f"relations:1:heads={heads}:qk={qk}"
    assert value(loss, *pair) == pytest.approx(expected / (1 if qk else 3), rel=1e-4)
    if heads == 3:  # those that both have
        assert value(f"relations:1:qk={qk}", *pair) == pytest.approx(value(loss, *pair), rel=1e-5)


def test_answers_for_tokens_and_their_targets():
    models = [support.bert(*size, "mlm", seed=i) for i, size in enumerate((STUDENT, WIDE))]
    whole = support.batch("mlm")
    both = list(zip(*(texts(model, whole) for model in models), strict=True))
    cut = [[x.logits[:, : support.VOCABULARY] for x in y] for y in both]
    real = [(s[j], t[j]) for s, t in cut for j in range(len(s))]
    chosen = [target for row, mask in zip(whole.token_targets, whole.inputs.mask, strict=True)
              for target in row[mask].tolist()]  # fmt: skip
    hidden = [(x, target) for x, target in zip(real, chosen, strict=True) if target != IGNORED]
    assert 0 < len(hidden) < len(real)

    found = support.objective("mlm:2,tokens:5,kd:1:temperature=1,ce", *models, task="mlm")(whole)
    cross_entropy = mean(-s.log_softmax(-1)[target] for (s, _), target in hidden)
    assert found["mlm"].item() == pytest.approx(2 * cross_entropy, rel=1e-4)
    assert found["ce"].item() == pytest.approx(cross_entropy, rel=1e-4)
    expected = 5 * 4 * mean(kl(t / 2, s / 2) for s, t in real)
    assert found["tokens"].item() == pytest.approx(expected, rel=1e-4)
    expected = mean(kl(t, s) for (s, t), _ in hidden)
    assert found["kd"].item() == pytest.approx(expected, rel=1e-4)
    only = value("tokens:1:temperature=1:targets=1", *models, task="mlm")
    assert only == pytest.approx(expected, rel=1e-4)


def test_losses_of_logits_count_the_tags_of_a_tagger():
    models = [support.bert(*size, "tag", seed=i) for i, size in enumerate((STUDENT, WIDE))]
    whole = support.batch("tag")
    both = list(zip(*(texts(model, whole) for model in models), strict=True))
    made = support.objective("ce,kd:1:temperature=1,logits,dist", *models, task="tag")
    found = made(whole)
    assert set(made.units.values()) == {"targets"}
    real = [(s.logits[j], t.logits[j]) for s, t in both for j in range(len(s.logits))]
    assert found["kd"].item() == pytest.approx(mean(kl(t, s) for s, t in real), rel=1e-4)
    expected = mean((s - t).square().mean() for s, t in real)
    assert found["logits"].item() == pytest.approx(expected, rel=1e-4)
    tags = whole.token_targets[whole.inputs.mask].tolist()
    expected = mean(-s.log_softmax(-1)[tag] for (s, _), tag in zip(real, tags, strict=True))
    assert found["ce"].item() == pytest.approx(expected, rel=1e-4)


def test_vectors_are_means_over_real_tokens(narrow):
    both = list(zip(*(texts(model, support.batch()) for model in narrow), strict=True))
    rows = [torch.stack([x[i].states[k].mean(0) for x in both]) for i, k in enumerate((1, 4))]
    distances = [torch.cdist(x, x) for x in rows]
    ours, theirs = (d / d[d > 0].mean() for d in distances)
    expected = F.smooth_l1_loss(ours, theirs).item()
    assert value("rkd-distance:1@0=-1", *narrow) == pytest.approx(expected, rel=1e-3)


def test_a_causal_model_is_compared_on_what_its_tokens_see():
    models = [support.gpt2(2, 12, 3, "causal", seed=i) for i in range(2)]
    whole = support.batch("causal")
    found = support.objective("scores@1,relations:1:qk=1", *models, task="causal")(whole)
    squares, attention, values = [], [], []
    for ids, mask in zip(whole.inputs.ids, whole.inputs.mask, strict=True):
        both = []
        for model in models:
            body = model.network.transformer
            with torch.no_grad():
                states = model.network(ids[mask][None], output_hidden_states=True).hidden_states
                block = body.h[1]
                parts = block.attn.c_attn(block.ln_1(states[1][0])).chunk(3, dim=-1)
            both.append([x.unflatten(-1, (3, 4)).transpose(0, 1) for x in parts])
        for j in range(int(mask.sum())):
            rows = [
                (q[:, j : j + 1] @ k[:, : j + 1].mT / 2, v[:, j : j + 1] @ v[:, : j + 1].mT / 2)
                for q, k, v in both
            ]
            (ours, our_values), (theirs, their_values) = rows
            squares.append((ours - theirs).square().mean())
            attention.append(kl(theirs, ours).mean())
            values.append(kl(their_values, our_values).mean())
    assert found["scores"].item() == pytest.approx(mean(squares), rel=1e-4)
    assert found["relations"].item() == pytest.approx(mean(attention) + mean(values), rel=1e-4)


def test_a_copy_of_the_teacher_with_all_its_blocks_has_nothing_to_learn():
    teacher = support.bert(3, 96, 12)
    student = teacher.with_network(blocks.keep(teacher.network, range(3)))
    loss = "scores,relations,cosine,patient,kd"
    for name, term in support.objective(loss, student, teacher)(support.batch()).items():
        assert term.item() == pytest.approx(0, abs=1e-5), name
    for heads in (0, 12, 48):
        made = support.objective(f"relations:1:heads={heads}", student, teacher)
        assert made(support.batch())["relations"].item() == pytest.approx(0, abs=1e-6)


EVERYTHING = "mlm,tokens:1:beta=0.5,kd,hidden,scores,cosine,relations:1:qk=1,patient@0=1,logits"


def engine(processes: int):
    return SimpleNamespace(
        num_processes=processes,
        process_index=0,
        device=support.CPU,
        scaler=None,
        no_sync=lambda module: contextlib.nullcontext(),
        backward=torch.Tensor.backward,
    )


def update(made, parts: list[Batch], processes: int = 1):
    """The terms and the gradient of a step that changes nothing."""
    still = SimpleNamespace(step_update=lambda step: None)
    optimizer = torch.optim.SGD(made.parameters(), lr=0)
    weights = tuple(made.parameters())
    trainer = Trainer(
        made,
        made,
        weights,
        optimizer,
        still,
        None,
        Recipe(),
        engine(processes),
        1,
        1,
        1,
        None,
        LeftOut(),
    )
    values = trainer.update(0, parts, 0)
    gradient = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
    return values | gradient


def padded(whole: Batch) -> Batch:
    ids, mask = whole.inputs.ids, whole.inputs.mask
    junk = TokenInputs(
        F.pad(ids, (0, 3), value=9), F.pad(mask, (0, 3)), F.pad(whole.inputs.types, (0, 3), value=1)
    )
    return replace(whole, inputs=junk, token_targets=F.pad(whole.token_targets, (0, 3), value=-100))


def turned(whole: Batch) -> Batch:
    inputs = whole.inputs
    other = TokenInputs(inputs.ids.flip(0), inputs.mask.flip(0), inputs.types.flip(0))
    return Batch(other, whole.labels.flip(0), token_targets=whole.token_targets.flip(0))


@pytest.fixture(scope="module")
def masked():
    models = [support.bert(*size, "mlm", seed=i) for i, size in enumerate((STUDENT, NARROW))]
    made = support.objective(EVERYTHING, *models, task="mlm")
    whole = next(support.source("mlm").epoch(0, 0))
    return made, whole, update(made, [whole])


def close(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        scale = wanted.abs().max().item()
        torch.testing.assert_close(
            found[name], wanted, rtol=1e-4, atol=2e-5 * scale + 1e-7, msg=name
        )


@pytest.mark.parametrize("change", [padded, turned])
def test_padding_and_order_change_nothing(masked, change):
    made, whole, expected = masked
    close(update(made, [change(whole)]), expected)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_accumulated_batches_are_one_batch(masked, size):
    made, _, expected = masked
    parts = list(support.source("mlm", size=size).epoch(0, 0))
    assert len(parts) > 1
    close(update(made, parts), expected)


@pytest.mark.parametrize("size", [8, 4])
def test_processes_with_shares_are_one_process(masked, size):
    made, _, expected = masked
    ranks = [
        update(
            made, list(support.source("mlm", size=size, world=2).epoch(0, 0, rank=r, world=2)), 2
        )
        for r in range(2)
    ]
    close({name: sum(x[name] for x in ranks) / 2 for name in ranks[0]}, expected)


def test_a_share_without_a_target_adds_nothing():
    models = [support.bert(*STUDENT, "mlm", seed=i) for i in range(2)]
    whole = support.batch("mlm")
    empty = replace(whole, token_targets=torch.full_like(whole.token_targets, IGNORED))
    made = support.objective("mlm,ce,kd,dist,tokens:1:targets=1", *models, task="mlm")
    found = made(empty)
    assert [term.item() for term in found.values()] == [0] * 5
    sum(found.values()).backward()
    assert all(p.grad.isfinite().all() for p in made.parameters() if p.grad is not None)


def test_units_are_what_each_term_is_the_mean_over():
    for name, unit in {
        "ce": "rows", "srd": "rows", "patient": "rows", "hidden": "tokens", "scores": "tokens",
        "cosine": "tokens", "relations": "tokens", "tokens": "tokens", "mlm": "targets",
        "clm": "targets", "tokens:1:targets=1": "targets",
    }.items():  # fmt: skip
        assert terms.parse(name)[0].unit == unit


def test_several_teachers_are_their_mean(narrow):
    student, first = narrow
    second = support.bert(*NARROW, seed=9)
    for loss in ("scores", "relations", "cosine", "patient", "rkd-distance"):
        each = [value(loss, student, *some) for some in ((first,), (second,), (first, second))]
        assert each[2] == pytest.approx((each[0] + each[1]) / 2, rel=1e-4), loss
    models = [support.bert(*STUDENT, "mlm", seed=i) for i in range(3)]
    twice = value("tokens", models[0], models[1], models[1], task="mlm")
    assert twice == pytest.approx(value("tokens", *models[:2], task="mlm"), rel=1e-4)
    mixed = value("tokens:1:temperature=1", *models, task="mlm")
    whole = support.batch("mlm")
    with torch.no_grad():
        logits = [model(whole.inputs)[whole.inputs.mask] for model in models]
    p = (logits[1].softmax(-1) + logits[2].softmax(-1)) / 2
    assert mixed == pytest.approx(kl(p.log(), logits[0]).mean().item(), rel=1e-4)


def test_a_copy_of_the_objective_has_taps_of_its_own(narrow):
    made = support.objective("hidden,scores,relations,patient", *narrow)
    whole = support.batch()
    made(whole)
    twin = copy.deepcopy(made)
    with torch.no_grad():
        twin.student.network.bert.embeddings.word_embeddings.weight.mul_(2)
    changed, expected = twin(whole), made(whole)
    again = twin(whole)
    for name in expected:
        assert changed[name].item() != pytest.approx(expected[name].item(), rel=1e-4)
        assert again[name].item() == pytest.approx(changed[name].item(), rel=1e-6)


@pytest.mark.parametrize(
    ("mapping", "student", "teacher", "expected"),
    [
        (token_terms.uniform, 4, 12, [(0, 2), (1, 5), (2, 8), (3, 11)]),
        (token_terms.skip, 6, 12, [(0, 1), (1, 3), (2, 5), (3, 7), (4, 9)]),
        (token_terms.skip, 3, 12, [(0, 3), (1, 7)]),
        (token_terms.last, 3, 12, [(-1, -1)]),
    ],
)
def test_mappings_are_those_of_the_papers(mapping, student, teacher, expected):
    assert [(int(a), int(b)) for a, b in mapping(student, teacher)] == expected


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "message"),
    [
        ("hidden", (3, 12, 3), (4, 12, 3), "no multiple of 3: name the layers, as in hidden@0=2"),
        ("scores", (3, 12, 3), (4, 12, 3), "no multiple of 3: name the layers, as in scores@0=2"),
        ("patient", (3, 12, 3), (4, 12, 3), "no multiple of 3: name the layers, as in patient@0"),
        ("patient", (1, 12, 3), (4, 12, 3), "leaves the last block out, and the student has no"),
        ("patient", (2, 12, 3), (4, 24, 3), "the student's have 12 values and the teacher's 24"),
        ("scores", (2, 12, 2), (2, 36, 3), "has 2 and the teacher's 3: use relations:1:heads=12"),
        ("relations", (2, 12, 2), (2, 12, 3), "has 2 and the teacher's 3: use relations:1:heads="),
        ("relations:1:heads=48", (2, 12, 2), (2, 24, 3), "must divide 12 values .* heads=12"),
        ("hidden@2=3", (2, 12, 3), (4, 12, 3), "no block 2: its blocks are 0 to 1"),
        ("scores@0=4", (2, 12, 3), (4, 12, 3), "no block 4: its blocks are 0 to 3"),
        ("scores@embeddings=0", (2, 12, 3), (4, 12, 3), "takes numbers of blocks"),
        ("hidden@embedding", (2, 12, 3), (4, 12, 3), "gives one vector for a text"),
        ("fitnet@0=1", (2, 12, 3), (4, 12, 3), "maps of images, which texts have not"),
        ("at@0=1", (2, 12, 3), (4, 12, 3), "maps of images, which texts have not"),
        ("kd@0", (2, 12, 3), (4, 12, 3), "takes logits, not features"),
    ],
)
def test_what_does_not_fit_is_one_line(loss, student, teacher, message):
    with pytest.raises(UserError, match=message) as error:
        support.objective(loss, support.bert(*student), support.bert(*teacher))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("loss", ["hidden", "scores", "relations", "patient", "cosine@0=-1"])
def test_a_bilstm_has_no_blocks(loss):
    with pytest.raises(UserError, match=r"BiLstm has none: use kd, logits, or a loss of vectors"):
        support.objective(loss, support.bilstm(), support.bert(*WIDE))


@pytest.mark.parametrize("name", ["hidden", "scores", "relations", "patient", "cosine", "tokens"])
def test_images_have_no_tokens(name):
    with pytest.raises(UserError, match=f"--loss {name} takes tokens of texts"):
        terms.build(terms.parse(name), support.bert(*STUDENT), (support.bert(*WIDE),))


@pytest.mark.parametrize("loss", ["hidden", "scores", "relations", "cosine"])
def test_another_tokenizer_of_the_teacher_is_an_error_of_aligned_terms(narrow, loss):
    whole = support.batch()
    longer = padded(replace(whole, token_targets=whole.inputs.ids)).inputs
    with pytest.raises(UserError, match=f"--loss {loss} compares token by token"):
        support.objective(loss, *narrow)(replace(whole, teacher_inputs=(longer,)))


def test_what_needs_no_alignment_works_with_two_tokenizers(narrow):
    whole = support.batch()
    twice = replace(whole, token_targets=whole.inputs.ids)
    made = support.objective("kd,patient,rkd-distance:1@0=1", *narrow)
    expected = made(whole)
    found = made(replace(whole, teacher_inputs=(padded(twice).inputs,)))
    for name, wanted in expected.items():  # the same texts, with more padding
        assert found[name].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_answers_for_texts_are_no_answers_for_tokens(narrow):
    with pytest.raises(UserError, match="takes logits of tokens, and these are of texts: use kd"):
        support.objective("tokens", *narrow)(support.batch())
    with pytest.raises(UserError, match="--loss mlm takes logits and targets of tokens"):
        support.objective("mlm", *narrow)(support.batch())
