"""Losses against closed forms in float64 NumPy, and how their gradients behave."""

import numpy as np
import pytest
import torch

from kd.losses import response

N, K = 6, 5


def _logits(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(N, K, generator=generator)).to(dtype)


def _log_softmax(z: np.ndarray) -> np.ndarray:
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def _kl(student: torch.Tensor, teacher: torch.Tensor, t: float) -> float:
    log_q = _log_softmax(student.double().numpy() / t)
    log_p = _log_softmax(teacher.double().numpy() / t)
    return t * t * float((np.exp(log_p) * (log_p - log_q)).sum(1).mean())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_logit_kl_closed_form(temperature: float) -> None:
    student, teacher = _logits(0), _logits(1)
    loss = response.logit_kl(student, teacher, temperature=temperature)
    assert loss.item() == pytest.approx(_kl(student, teacher, temperature), rel=1e-5)


def test_logit_kl_ignores_a_shift_and_is_zero_for_equal_logits() -> None:
    student = _logits(0)
    assert response.logit_kl(student, student + 7).item() == pytest.approx(0, abs=1e-5)


def test_temperature_squared_keeps_the_gradient() -> None:
    # For T → ∞ the gradient tends to (centred student - centred teacher) / (n k): independent of T.
    gradients = []
    for temperature in (100.0, 1000.0):
        student = _logits(0).double().requires_grad_()
        response.logit_kl(student, _logits(1), temperature=temperature).backward()
        gradients.append(student.grad)
    gap = _logits(0) - _logits(1)
    limit = (gap - gap.mean(1, keepdim=True)) / (N * K)
    for gradient in gradients:
        torch.testing.assert_close(gradient.float(), limit, rtol=0.2, atol=2e-3)


def test_no_gradient_into_the_teacher() -> None:
    student, teacher = _logits(0).requires_grad_(), _logits(1).requires_grad_()
    response.logit_kl(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    # 300² overflows float16; every loss must still be what float32 makes of the same numbers.
    student, teacher = (_logits(i, dtype) * 20 for i in (0, 1))
    targets = _logits(2, dtype) * 100
    for loss, other in (
        (response.logit_kl, teacher),
        (response.cross_entropy, torch.softmax(teacher, 1)),
        (response.centred_mse, targets),
    ):
        half = loss(student, other)
        assert half.dtype == torch.float32
        assert torch.isfinite(half)
        torch.testing.assert_close(half, loss(student.float(), other.float()))


def test_extreme_logits_stay_finite() -> None:
    student = torch.tensor([[1e4, -1e4], [0.0, 0.0]]).requires_grad_()
    teacher = torch.tensor([[-1e4, 1e4], [1e4, 0.0]])
    loss = response.logit_kl(student, teacher, temperature=1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        response.logit_kl(_logits(0), _logits(1), temperature=temperature)


def test_cross_entropy_of_hard_and_soft_labels() -> None:
    logits, labels = _logits(0), torch.arange(N) % K
    expected = -_log_softmax(logits.double().numpy())[np.arange(N), labels.numpy()].mean()
    assert response.cross_entropy(logits, labels).item() == pytest.approx(expected, rel=1e-6)
    one_hot = torch.nn.functional.one_hot(labels, K).float()
    assert response.cross_entropy(logits, one_hot).item() == pytest.approx(expected, rel=1e-6)
    soft = torch.softmax(_logits(1), 1)
    expected = -(soft.double().numpy() * _log_softmax(logits.double().numpy())).sum(1).mean()
    assert response.cross_entropy(logits, soft).item() == pytest.approx(expected, rel=1e-6)


def test_centred_mse_of_indices_and_rows() -> None:
    outputs, labels = _logits(0), torch.arange(N) % K
    rows = np.eye(K)[labels.numpy()] - 1 / K
    expected = 0.5 * ((outputs.double().numpy() - rows) ** 2).sum(1).mean()
    assert response.centred_mse(outputs, labels).item() == pytest.approx(expected, rel=1e-6)
    stored = torch.tensor(rows, dtype=torch.float32)
    assert response.centred_mse(outputs, stored).item() == pytest.approx(expected, rel=1e-6)
    assert response.centred_mse(stored, labels).item() == pytest.approx(0, abs=1e-12)


def test_means_do_not_depend_on_the_batch_size() -> None:
    student, teacher, labels = _logits(0), _logits(1), torch.arange(N) % K
    for loss, other in (
        (response.logit_kl, teacher),
        (response.cross_entropy, labels),
        (response.centred_mse, labels),
    ):
        twice = loss(student.repeat(2, 1), other.repeat(2, *[1] * (other.ndim - 1)))
        torch.testing.assert_close(twice, loss(student, other))
