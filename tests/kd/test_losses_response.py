"""Losses on outputs against closed forms in float64 NumPy, and how their gradients behave."""

import losses_support as losses
import numpy as np
import pytest
import torch
from losses_support import Oracle, Pair

from kd.losses import response

N, K = 6, 5
LABELS = torch.arange(N) % K


def _logits(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(N, K, generator=generator)).to(dtype)


def _log_softmax(z: np.ndarray) -> np.ndarray:
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def _kl(student: np.ndarray, teacher: np.ndarray, t: float = 4.0) -> float:
    log_q, log_p = _log_softmax(student / t), _log_softmax(teacher / t)
    return t * t * float((np.exp(log_p) * (log_p - log_q)).sum(1).mean())


def _dkd(student: np.ndarray, teacher: np.ndarray, a=1.0, b=8.0, t=4.0) -> float:
    total = 0.0
    for i, label in enumerate(LABELS.tolist()):
        q, p = (np.exp(_log_softmax(z[i : i + 1] / t))[0] for z in (student, teacher))
        total += a * p[label] * np.log(p[label] / q[label])
        total += a * (1 - p[label]) * np.log((1 - p[label]) / (1 - q[label]))
        other_q, other_p = (np.delete(r, label) / np.delete(r, label).sum() for r in (q, p))
        total += b * (other_p * np.log(other_p / other_q)).sum()
    return t * t * total / len(student)


def _dist(student: np.ndarray, teacher: np.ndarray, inter=1.0, intra=1.0, t=1.0) -> float:
    q, p = (np.exp(_log_softmax(z / t)) for z in (student, teacher))
    rows = [np.corrcoef(q[i], p[i])[0, 1] for i in range(len(q))]
    columns = [np.corrcoef(q[:, j], p[:, j])[0, 1] for j in range(q.shape[1])]
    return t * t * float(inter * (1 - np.mean(rows)) + intra * (1 - np.mean(columns)))


def _standardised(student: np.ndarray, teacher: np.ndarray, t=2.0) -> float:
    z_s, z_t = (
        (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True) for z in (student, teacher)
    )
    return _kl(z_s, z_t, t)


def _hard(student: np.ndarray, teacher: np.ndarray) -> float:
    return float(-_log_softmax(student)[np.arange(len(student)), teacher.argmax(1)].mean())


def _dkd_of_labels(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    n, k = student.shape
    return response.dkd(student, teacher, torch.arange(n) % N % k)  # N rows have LABELS


CASES: dict[str, tuple[Pair, Oracle]] = {
    "logit_kl": (response.logit_kl, _kl),
    "dkd": (_dkd_of_labels, _dkd),
    "dist": (response.dist, _dist),
    "standardised_kl": (response.standardised_kl, _standardised),
    "logit_mse": (response.logit_mse, lambda s, t: float(((s - t) ** 2).mean())),
    "hard_distillation": (response.hard_distillation, _hard),
}
every_loss = pytest.mark.parametrize(("loss", "oracle"), CASES.values(), ids=CASES)


@every_loss
def test_values_and_gradients_are_those_of_the_closed_form(loss: Pair, oracle: Oracle) -> None:
    student, teacher = _logits(0), _logits(1)
    exact = student.double().numpy(), teacher.double().numpy()
    # Float32 carries 1e-7; the sums here lose a digit.
    assert loss(student, teacher).item() == pytest.approx(oracle(*exact), rel=1e-5)
    gradient = losses.gradient(loss, student, teacher).double().numpy()
    np.testing.assert_allclose(
        gradient, losses.numeric_gradient(oracle, *exact), rtol=1e-4, atol=1e-5
    )


@every_loss
def test_no_gradient_into_the_teacher(loss: Pair, oracle: Oracle) -> None:
    losses.check_no_gradient_into_the_teacher(loss, _logits(0), _logits(1))


@every_loss
def test_means_do_not_depend_on_the_batch_size(loss: Pair, oracle: Oracle) -> None:
    student, teacher = _logits(0), _logits(1)
    twice = loss(student.repeat(2, 1), teacher.repeat(2, 1))
    torch.testing.assert_close(twice, loss(student, teacher))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(
    loss: Pair, oracle: Oracle, dtype: torch.dtype
) -> None:
    # 300² overflows float16; every loss must still be what float32 makes of the same numbers.
    student, teacher = (_logits(i, dtype) * 100 for i in (0, 1))
    half = loss(student, teacher)
    assert half.dtype == torch.float32
    assert torch.isfinite(half)
    torch.testing.assert_close(half, loss(student.float(), teacher.float()))
    assert torch.isfinite(losses.gradient(loss, student, teacher)).all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_logits_have_finite_loss_and_gradient(
    loss: Pair, oracle: Oracle, dtype: torch.dtype
) -> None:
    logits = _logits(0, dtype)
    if loss is not response.hard_distillation:
        assert loss(logits, logits).item() == pytest.approx(0, abs=1e-5)
    assert torch.isfinite(losses.gradient(loss, logits, logits)).all()


@every_loss
def test_autocast_changes_nothing(loss: Pair, oracle: Oracle) -> None:
    student, teacher = _logits(0), _logits(1)
    outside = loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(student, teacher), outside, rtol=0, atol=0)


@every_loss
def test_extreme_logits_have_finite_loss_and_gradient(loss: Pair, oracle: Oracle) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]])
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, 0.0, 0.0]])
    assert torch.isfinite(loss(student, teacher))
    assert torch.isfinite(losses.gradient(loss, student, teacher)).all()


@every_loss
def test_a_teacher_with_other_classes_is_refused(loss: Pair, oracle: Oracle) -> None:
    # One column would broadcast to all of the student's.
    with pytest.raises(ValueError, match=r"one shape, got \(6, 5\) and \(6, 1\)"):
        loss(_logits(0), _logits(1)[:, :1])


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("name", ["logit_kl", "dkd", "dist", "standardised_kl"])
def test_temperature_must_be_positive(name: str, temperature: float) -> None:
    labels = (LABELS,) if name == "dkd" else ()
    with pytest.raises(ValueError, match="temperature must be positive"):
        getattr(response, name)(_logits(0), _logits(1), *labels, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_temperatures_enter_as_in_the_closed_form(temperature: float) -> None:
    student, teacher = _logits(0), _logits(1)
    exact = student.double().numpy(), teacher.double().numpy()
    at = {"temperature": temperature}
    for value, expected in (
        (response.logit_kl(student, teacher, **at), _kl(*exact, temperature)),
        (
            response.dkd(student, teacher, LABELS, alpha=0.3, beta=2.0, **at),
            _dkd(*exact, 0.3, 2.0, temperature),
        ),
        (
            response.dist(student, teacher, inter=0.3, intra=2.0, **at),
            _dist(*exact, 0.3, 2.0, temperature),
        ),
        (response.standardised_kl(student, teacher, **at), _standardised(*exact, temperature)),
    ):
        assert value.item() == pytest.approx(expected, rel=1e-5)


def test_temperature_squared_keeps_the_gradient() -> None:
    # For T → ∞ the gradient tends to (centred student - centred teacher) / (n k): independent of T.
    gap = _logits(0) - _logits(1)
    limit = (gap - gap.mean(1, keepdim=True)) / (N * K)
    for temperature in (100.0, 1000.0):

        def loss(student: torch.Tensor, teacher: torch.Tensor, t: float = temperature):
            return response.logit_kl(student, teacher, temperature=t)

        torch.testing.assert_close(
            losses.gradient(loss, _logits(0), _logits(1)), limit, rtol=0.2, atol=2e-3
        )


def test_a_shift_of_a_row_changes_no_loss_of_probabilities() -> None:
    student, teacher = _logits(0), _logits(1)
    shift = torch.arange(N)[:, None] - 2.0
    for name in ("logit_kl", "dkd", "dist", "standardised_kl"):
        loss = CASES[name][0]
        torch.testing.assert_close(loss(student + shift, teacher - shift), loss(student, teacher))


def test_cross_entropy_of_hard_and_soft_labels() -> None:
    logits, log_q = _logits(0), _log_softmax(_logits(0).double().numpy())
    expected = -log_q[np.arange(N), LABELS.numpy()].mean()
    assert response.cross_entropy(logits, LABELS).item() == pytest.approx(expected, rel=1e-6)
    one_hot = torch.nn.functional.one_hot(LABELS, K).float()
    assert response.cross_entropy(logits, one_hot).item() == pytest.approx(expected, rel=1e-6)
    soft = torch.softmax(_logits(1), 1)
    expected = -(soft.double().numpy() * log_q).sum(1).mean()
    assert response.cross_entropy(logits, soft).item() == pytest.approx(expected, rel=1e-6)


def test_smoothing_spreads_its_share_over_all_classes() -> None:
    logits, log_q = _logits(0), _log_softmax(_logits(0).double().numpy())
    for labels, rows in (
        (LABELS, np.eye(K)[LABELS.numpy()]),
        (torch.softmax(_logits(1), 1), torch.softmax(_logits(1), 1).double().numpy()),
    ):
        expected = -((0.9 * rows + 0.1 / K) * log_q).sum(1).mean()
        loss = response.cross_entropy(logits, labels, smoothing=0.1)
        assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_smoothing_outside_its_range_is_refused(smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"smoothing must be in \[0, 1\)"):
        response.cross_entropy(_logits(0), LABELS, smoothing=smoothing)


def test_centred_mse_of_indices_and_rows() -> None:
    outputs = _logits(0)
    rows = np.eye(K)[LABELS.numpy()] - 1 / K
    expected = 0.5 * ((outputs.double().numpy() - rows) ** 2).sum(1).mean()
    assert response.centred_mse(outputs, LABELS).item() == pytest.approx(expected, rel=1e-6)
    stored = torch.tensor(rows, dtype=torch.float32)
    assert response.centred_mse(outputs, stored).item() == pytest.approx(expected, rel=1e-6)
    assert response.centred_mse(stored, LABELS).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_on_labels_compute_half_precision_in_float32(dtype: torch.dtype) -> None:
    outputs = _logits(0, dtype) * 100
    for loss, rows in (
        (response.cross_entropy, torch.softmax(_logits(1, dtype), 1)),
        (response.centred_mse, _logits(2, dtype) * 100),
    ):
        half = loss(outputs, rows)
        assert half.dtype == torch.float32
        assert torch.isfinite(half)
        torch.testing.assert_close(half, loss(outputs.float(), rows.float()))


def test_losses_on_labels_do_not_depend_on_the_batch_size() -> None:
    for loss in (response.cross_entropy, response.centred_mse):
        twice = loss(_logits(0).repeat(2, 1), LABELS.repeat(2))
        torch.testing.assert_close(twice, loss(_logits(0), LABELS))


def test_dkd_with_the_teachers_doubt_as_beta_is_logit_kl() -> None:
    student, teacher = _logits(0)[:1], _logits(1)[:1]
    for label in range(K):
        doubt = 1 - torch.softmax(teacher / 4, 1)[0, label].item()
        split = response.dkd(student, teacher, torch.tensor([label]), alpha=1, beta=doubt)
        torch.testing.assert_close(split, response.logit_kl(student, teacher))


def test_dkd_takes_any_type_of_index() -> None:
    student, teacher = _logits(0), _logits(1)
    expected = response.dkd(student, teacher, LABELS)
    assert torch.equal(response.dkd(student, teacher, LABELS.int()), expected)


@pytest.mark.parametrize("labels", [torch.ones(N), torch.ones(N, K) / K, torch.ones(N, K).long()])
def test_dkd_refuses_labels_without_one_target(labels: torch.Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"needs class indices \(n,\), got .* mixup and CutMix off"
    ):
        response.dkd(_logits(0), _logits(1), labels)


def test_dkd_refuses_two_classes() -> None:
    with pytest.raises(ValueError, match="more than 2 classes, got 2"):
        response.dkd(_logits(0)[:, :2], _logits(1)[:, :2], torch.zeros(N).long())


def test_dist_ignores_a_positive_affine_map_of_the_probabilities() -> None:
    p = torch.softmax(_logits(1), 1)
    # Rows that still sum to 1: a p + (1 - a) / k. Columns see one map only if all rows share it.
    own = torch.linspace(0.2, 0.9, N)[:, None]
    by_row, by_all = ((a * p + (1 - a) / K).log() for a in (own, 0.5))
    assert response.dist(by_row, p.log(), intra=0).item() == pytest.approx(0, abs=1e-6)
    assert response.dist(by_all, p.log(), inter=0).item() == pytest.approx(0, abs=1e-6)
    assert response.dist(by_row, p.log(), inter=0).item() > 1e-3


def test_dist_counts_rows_without_spread_as_uncorrelated() -> None:
    # A new head of zeros gives such rows. A huge step from there would ruin the student.
    for constant in (0.0, 0.1, 7.0):
        flat = torch.full((N, K), constant)
        assert response.dist(flat, _logits(1)).item() == pytest.approx(2, abs=1e-5)
        assert response.dist(_logits(0), flat).item() == pytest.approx(2, abs=1e-5)
        gradient = losses.gradient(response.dist, flat, _logits(1))
        assert 0 < gradient.abs().max() < 1


def test_dist_of_one_image_has_no_columns_to_compare() -> None:
    student, teacher = _logits(0)[:1], _logits(1)[:1]
    with pytest.raises(ValueError, match="batch of 2 or more, got 1; set intra=0"):
        response.dist(student, teacher)
    q, p = (np.exp(_log_softmax(z.double().numpy()))[0] for z in (student, teacher))
    loss = response.dist(student, teacher, intra=0)
    assert loss.item() == pytest.approx(1 - np.corrcoef(q, p)[0, 1], rel=1e-5)


def test_standardised_kl_ignores_shift_and_scale_of_each_row() -> None:
    student, teacher = _logits(0), _logits(1)
    scale = torch.linspace(0.1, 20, N)[:, None]
    changed = response.standardised_kl(scale * student + 3, teacher / scale - 2)
    torch.testing.assert_close(changed, response.standardised_kl(student, teacher))


def test_standardised_kl_takes_rows_without_spread_as_zeros() -> None:
    uniform = response.logit_kl(
        torch.zeros(N, K), torch.tensor(_z_scores(_logits(1))), temperature=2.0
    )
    for constant in (0.0, 0.1, 7.0):
        flat = torch.full((N, K), constant)
        torch.testing.assert_close(response.standardised_kl(flat, _logits(1)), uniform)
        gradient = losses.gradient(response.standardised_kl, flat, _logits(1))
        assert 0 < gradient.abs().max() < 1


def _z_scores(logits: torch.Tensor) -> np.ndarray:
    z = logits.double().numpy()
    return (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)


def test_logit_mse_is_twice_the_warm_limit_of_logit_kl() -> None:
    student, teacher = (z - z.mean(1, keepdim=True) for z in (_logits(0), _logits(1)))
    warm = response.logit_kl(student, teacher, temperature=100.0)
    # The next term of the expansion is about |z| / T = 5 % of the first.
    torch.testing.assert_close(2 * warm, response.logit_mse(student, teacher), rtol=0.1, atol=0)


def test_hard_distillation_sees_the_teachers_order_alone() -> None:
    student, teacher = _logits(0), _logits(1)
    torch.testing.assert_close(
        response.hard_distillation(student, 10 * teacher.exp() - 5),
        response.hard_distillation(student, teacher),
    )
    torch.testing.assert_close(
        response.hard_distillation(student, teacher),
        response.cross_entropy(student, teacher.argmax(1)),
    )
