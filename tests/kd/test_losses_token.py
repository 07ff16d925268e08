"""Losses on tokens against loops in float64, and padding that never counts."""

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd.losses import token
from kd.models.token_inputs import IGNORED

N, LENGTH, WIDTH, VOCABULARY, HEADS = 3, 5, 8, 7, 4
LENGTHS = (5, 2, 3)
MASK = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
REAL = [(i, j) for i, length in enumerate(LENGTHS) for j in range(length)]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


STUDENT, TEACHER = draw(0, N, LENGTH, VOCABULARY), draw(1, N, LENGTH, VOCABULARY)
HIDDEN, TAUGHT = draw(2, N, LENGTH, WIDTH), draw(3, N, LENGTH, WIDTH)
SCORES, ATTENTION = draw(4, N, HEADS, LENGTH, LENGTH), draw(5, N, HEADS, LENGTH, LENGTH)
VECTORS, OTHERS = draw(6, 2, N, HEADS, LENGTH, 4), draw(7, 2, N, HEADS, LENGTH, 6)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(scipy.special.rel_entr(p, q).sum())


def softmax(logits: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
    return scipy.special.softmax(logits.double().numpy() / temperature, axis=-1)


def divergence(p: np.ndarray, q: np.ndarray, beta: float, skew: float) -> float:
    if skew:
        return kl(p, skew * p + (1 - skew) * q)
    if beta in (0, 1):
        return kl(q, p) if beta else kl(p, q)
    middle = beta * p + (1 - beta) * q
    return beta * kl(p, middle) + (1 - beta) * kl(q, middle)


@pytest.mark.parametrize(("beta", "skew"), [(0, 0), (1, 0), (0.5, 0), (0.1, 0), (0, 0.1), (0, 0.9)])
def test_the_divergence_of_tokens(beta, skew):
    values = [
        divergence(softmax(TEACHER[i, j], 2), softmax(STUDENT[i, j], 2), beta, skew)
        for i, j in REAL
    ]
    loss = token.token_divergence(STUDENT, TEACHER, MASK, temperature=2, beta=beta, skew=skew)
    assert loss.item() == pytest.approx(4 * np.mean(values), rel=1e-5)


def test_the_divergence_with_half_of_each_is_symmetric_and_bounded():
    far = 100 * STUDENT
    there = token.token_divergence(far, TEACHER, MASK, temperature=1, beta=0.5)
    back = token.token_divergence(TEACHER, far, MASK, temperature=1, beta=0.5)
    assert there.item() == pytest.approx(back.item(), rel=1e-5)
    assert there.item() < np.log(2)
    assert token.token_divergence(far, -far, MASK, temperature=1, skew=0.1) < -np.log(0.1) + 1e-6


def test_cross_entropy_is_of_the_tokens_with_a_target():
    labels = torch.full((N, LENGTH), IGNORED)
    targets = {(0, 1): 3, (2, 0): 6}
    for place, target in targets.items():
        labels[place] = target
    expected = np.mean([-np.log(softmax(STUDENT[place])[t]) for place, t in targets.items()])
    assert token.token_cross_entropy(STUDENT, labels).item() == pytest.approx(expected, rel=1e-6)


def test_hidden_states_and_their_angles():
    rows = [(HIDDEN[p].double().numpy(), TAUGHT[p].double().numpy()) for p in REAL]
    squares = np.mean([np.mean((a - b) ** 2) for a, b in rows])
    angles = np.mean([1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in rows])
    assert token.hidden_states(HIDDEN, TAUGHT, MASK).item() == pytest.approx(squares, rel=1e-6)
    assert token.hidden_cosine(HIDDEN, TAUGHT, MASK).item() == pytest.approx(angles, rel=1e-6)


def test_patient_vectors_are_compared_by_direction():
    ours, theirs = HIDDEN[:, 0].double().numpy(), TAUGHT[:, 0].double().numpy()
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (ours, theirs)]
    expected = np.mean(np.sum((unit[0] - unit[1]) ** 2, axis=1))
    loss = token.patient(HIDDEN[:, 0], 3 * TAUGHT[:, 0])
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_attention_scores_of_real_queries_and_keys():
    values = [
        np.mean(
            [
                (SCORES[i, h, j, key] - ATTENTION[i, h, j, key]).item() ** 2
                for h in range(HEADS)
                for key in range(LENGTHS[i])
            ]
        )
        for i, j in REAL
    ]
    loss = token.attention_scores(SCORES, ATTENTION, MASK)
    assert loss.item() == pytest.approx(np.mean(values), rel=1e-6)


def wave(*shape: int, step: float) -> torch.Tensor:
    values = 2 * torch.sin(step * torch.arange(1, np.prod(shape) + 1, dtype=torch.float64))
    return values.reshape(shape).float()


def test_values_of_other_libraries_on_the_same_tensors():
    """Recorded from TRL 1.16.0 and TextBrewer 0.2.1.post1, in float64."""
    student, teacher = wave(2, 4, 5, step=1.7), wave(2, 4, 5, step=2.3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    even, whole = torch.tensor([[1, 1, 1, 0]] * 2).bool(), torch.ones(2, 4).bool()
    close = {"rel": 1e-6}

    # generalized_jsd_loss, without the factor T².
    for beta, expected in ((0, 0.47920076), (0.3, 0.0906878), (0.5, 0.10502801), (1, 0.43661289)):
        found = token.token_divergence(student, teacher, mask, temperature=2, beta=beta)
        assert found.item() / 4 == pytest.approx(expected, **close)
    # kd_ce_loss, less the entropy of the teacher.
    found = token.token_divergence(student, teacher, whole, temperature=2)
    assert found.item() / 4 == pytest.approx(0.47633643982, **close)
    # hid_mse_loss, cos_loss and pkd_loss.
    assert token.hidden_states(student, teacher, mask).item() == pytest.approx(
        4.182734037479735, **close
    )
    assert token.hidden_cosine(student, teacher, mask).item() == pytest.approx(
        1.0492029724090184, **close
    )
    assert token.patient(student[:, 0], teacher[:, 0]).item() == pytest.approx(
        1.9174155355225362, **close
    )
    # att_mse_loss and att_ce_loss less the entropy of the teacher: texts of one length, since that
    # library weighs each pair of tokens alike and not each query.
    ours, theirs = wave(2, 3, 4, 4, step=0.9), wave(2, 3, 4, 4, step=1.3)
    found = token.attention_scores(ours, theirs, even)
    assert found.item() == pytest.approx(5.0791879988763915, **close)
    keys = torch.eye(4).expand(2, 3, 4, 4)
    found = token.relations((2 * ours, keys), (2 * theirs, keys), whole)
    assert found.item() == pytest.approx(1.150969381698184, **close)


def test_relations_are_computed_in_float32_under_autocast():
    pairs = [tuple(x) for x in (VECTORS, OTHERS)]
    plain = token.relations(*pairs, MASK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert token.relations(*pairs, MASK).item() == plain.item()


def test_what_a_causal_model_does_not_see_is_left_out():
    """Later keys change nothing for a causal model, and something for another one."""
    seen = torch.ones(LENGTH, LENGTH).tril().bool()
    changed = torch.where(seen, SCORES, 100.0)
    left = [token.attention_scores(x, ATTENTION, MASK, True) for x in (SCORES, changed)]
    assert left[0].item() == left[1].item()
    assert token.attention_scores(changed, ATTENTION, MASK) > 100
    values = []
    for i, j in REAL:
        pair = [x[i, :, j, : j + 1].double().numpy() for x in (SCORES, ATTENTION)]
        values.append(np.mean((pair[0] - pair[1]) ** 2))
    assert left[0].item() == pytest.approx(np.mean(values), rel=1e-6)


@pytest.mark.parametrize(
    ("qk", "weight", "pairs"), [(1, 1, [(0, 1), (2, 2)]), (0, 1 / 3, [(0, 0), (1, 1), (2, 2)])]
)
@pytest.mark.parametrize("causal", [False, True])
def test_minilm_sums_relations_of_queries_keys_and_values(qk, weight, pairs, causal):
    ours, theirs = (draw(seed, 3, N, HEADS, LENGTH, 4) for seed in (8, 9))
    expected = sum(
        weight * token.relations((ours[a], ours[b]), (theirs[a], theirs[b]), MASK, causal, heads=8)
        for a, b in pairs
    )
    loss = token.attention_relations(tuple(ours), tuple(theirs), MASK, causal, heads=8, qk=qk)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_divergence_of_tokens_with_a_target():
    labels = torch.full((N, LENGTH), IGNORED)
    labels[0, 1] = labels[2, 2] = 4
    both = token.token_divergence(STUDENT, TEACHER, MASK, labels, targets=1)
    assert both.item() == token.token_divergence(STUDENT, TEACHER, labels == 4).item()
    with pytest.raises(ValueError, match="targets 1 needs labels"):
        token.token_divergence(STUDENT, TEACHER, MASK, targets=1)


def divide(x: torch.Tensor, heads: int) -> np.ndarray:
    """(n, l, heads, d) from (n, h, l, e), the values of a token in the order of the heads."""
    n, own, length, d = x.shape
    rows = [[torch.cat([x[i, h, j] for h in range(own)]) for j in range(length)] for i in range(n)]
    flat = torch.stack([torch.stack(row) for row in rows]).double().numpy()
    return flat.reshape(n, length, heads, own * d // heads)


@pytest.mark.parametrize("heads", [0, 2, 8])
@pytest.mark.parametrize("pair", [(0, 1), (1, 1)])
def test_relations_of_tokens(heads, pair):
    ours, theirs = ([x[k] for k in pair] for x in (VECTORS, OTHERS))
    values = []
    for i, j in REAL:
        for head in range(heads or HEADS):
            rows = []
            for a, b in (theirs, ours):
                first, second = divide(a, heads or HEADS), divide(b, heads or HEADS)
                keys = second[i, : LENGTHS[i], head]
                rows.append(
                    softmax(torch.from_numpy(keys @ first[i, j, head]) / np.sqrt(keys.shape[1]))
                )
            values.append(kl(*rows))
    loss = token.relations(tuple(ours), tuple(theirs), MASK, heads=heads)
    assert loss.item() == pytest.approx(np.mean(values), rel=1e-5)


def losses(student, teacher, mask) -> dict[str, torch.Tensor]:
    """Every loss on the hidden states or logits (n, l, d) of two networks."""
    labels = torch.where(mask, student.shape[-1] - 1, IGNORED)
    halves = [x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (student, teacher)]
    scores = [x @ x.transpose(-1, -2) for x in halves]
    ours, theirs = ((x, x) for x in halves)
    return {
        "divergence": token.token_divergence(student, teacher, mask),
        "skewed": token.token_divergence(student, teacher, mask, skew=0.1),
        "cross-entropy": token.token_cross_entropy(student, labels),
        "hidden": token.hidden_states(student, teacher, mask),
        "cosine": token.hidden_cosine(student, teacher, mask),
        "scores": token.attention_scores(*scores, mask),
        "relations": token.relations(ours, theirs, mask),
        "relation heads": token.relations(ours, theirs, mask, heads=4),
    }


@given(
    lengths=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    padding=st.integers(0, 3),
    junk=st.sampled_from([0.0, -7.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_padding_order_and_batches_change_nothing(lengths, padding, junk, seed):
    """The mean over all tokens is that of batches weighed by their numbers of real tokens."""
    longest = max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    pair = [draw(seed + i, len(lengths), longest, WIDTH) for i in range(2)]
    whole = losses(*pair, mask)
    padded = [
        torch.nn.functional.pad(x, (0, 0, 0, padding)).masked_fill(
            ~torch.nn.functional.pad(mask, (0, padding))[..., None], junk
        )
        for x in pair
    ]
    order = torch.arange(len(lengths)).flip(0)
    more = losses(*(x[order] for x in padded), torch.nn.functional.pad(mask, (0, padding))[order])
    parts = [
        (losses(*(x[i : i + 1, :length] for x in pair), mask[i : i + 1, :length]), length)
        for i, length in enumerate(lengths)
    ]
    for name, value in whole.items():
        split = sum(part[name] * length for part, length in parts) / sum(lengths)
        assert value.item() == pytest.approx(split.item(), rel=1e-4, abs=1e-6), name
        assert value.item() == pytest.approx(more[name].item(), rel=1e-4, abs=1e-6), name


def test_the_teacher_gets_no_gradient_and_padding_none():
    student, teacher = (x.clone().requires_grad_() for x in (HIDDEN, TAUGHT))
    for name, loss in losses(student, teacher, MASK).items():
        student.grad = None
        loss.backward(retain_graph=True)
        assert teacher.grad is None, name
        assert student.grad is not None
        assert student.grad.isfinite().all(), name
        assert (student.grad[~MASK] == 0).all(), name
        assert (student.grad[MASK] != 0).any(), name


def test_losses_of_equal_networks_are_zero():
    for name, loss in losses(HIDDEN, HIDDEN, MASK).items():
        if name != "cross-entropy":
            assert loss.item() == pytest.approx(0, abs=1e-6), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: token.token_divergence(STUDENT, TEACHER[..., 1:], MASK), "same shape"),
        (lambda: token.token_divergence(STUDENT, TEACHER, MASK, temperature=0), "temperature"),
        (lambda: token.token_divergence(STUDENT, TEACHER, MASK, beta=2), "beta"),
        (lambda: token.token_divergence(STUDENT, TEACHER, MASK, beta=0.5, skew=0.1), "skew"),
        (lambda: token.attention_scores(SCORES, ATTENTION[:, :2], MASK), "as many heads"),
        (lambda: token.relations((VECTORS[0],) * 2, (OTHERS[0, :, :2],) * 2, MASK), "heads"),
        (lambda: token.relations((VECTORS[0],) * 2, (OTHERS[0],) * 2, MASK, heads=5), "divide"),
        (lambda: token.token_cross_entropy(STUDENT, torch.zeros(N, 2).long()), "positions"),
        (lambda: token.patient(HIDDEN[:, 0], TAUGHT[:, 0, 1:]), "same shape"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
