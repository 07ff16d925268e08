"""Losses on features against loops in float64 NumPy, and how their gradients behave."""

import math

import losses_support as losses
import numpy as np
import pytest
import torch
from losses_support import Oracle, Pair

from kd.losses import feature

N, C, H, W = 4, 3, 6, 5
RAW_VARIANCE = torch.tensor([-1.0, 0.5, 3.0])


def _maps(seed: int, dtype: torch.dtype = torch.float32, channels: int = C) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, channels, H, W, generator=generator).to(dtype)


def _embeddings(seed: int) -> torch.Tensor:
    return torch.randn(N, 7, generator=torch.Generator().manual_seed(seed))


def _mse(student: np.ndarray, teacher: np.ndarray) -> float:
    return float(((student - teacher) ** 2).sum() / student.size)


def _attention_transfer(student: np.ndarray, teacher: np.ndarray) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        energy_s, energy_t = ((maps**2).sum(0).ravel() for maps in (s, t))
        gap = energy_s / np.linalg.norm(energy_s) - energy_t / np.linalg.norm(energy_t)
        total += (gap**2).mean()
    return total / len(student)


def _pooled(maps: np.ndarray, level: int) -> np.ndarray:
    """Means over the windows floor(i size / level) to ceil((i + 1) size / level)."""
    out = np.zeros((*maps.shape[:2], level, level))
    for i, j in np.ndindex(level, level):
        rows, columns = (
            slice(m * size // level, -(-(m + 1) * size // level)) for m, size in ((i, H), (j, W))
        )
        out[:, :, i, j] = maps[:, :, rows, columns].mean((2, 3))
    return out


def _hierarchical_context(student: np.ndarray, teacher: np.ndarray) -> float:
    parts = [_mse(student, teacher)]
    parts += [_mse(_pooled(student, level), _pooled(teacher, level)) for level in (4, 2, 1)]
    return float(np.average(parts, weights=[8, 4, 2, 1]))


def _vid(mean: np.ndarray, teacher: np.ndarray, raw: np.ndarray | None = None) -> float:
    raw = RAW_VARIANCE.double().numpy() if raw is None else raw
    variance = np.log(1 + np.exp(raw)) + 1e-5
    return float(
        np.mean(
            [
                0.5 * (teacher[:, c] - mean[:, c]) ** 2 / variance[c] + 0.5 * np.log(variance[c])
                for c in range(C)
            ]
        )
    )


def _log_sum(student: np.ndarray, teacher: np.ndarray) -> float:
    s, t = (x.reshape(len(x), -1) for x in (student, teacher))
    s, t = ((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-4) for x in (s, t))
    return float(np.log((np.abs(s - t) ** 4).sum() / len(s) + 1e-5))


def _vid_of_variance(mean: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return feature.vid(mean, RAW_VARIANCE, teacher)


def _log_sum_of_maps(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return feature.log_sum(student.flatten(1), teacher.flatten(1))


CASES: dict[str, tuple[Pair, Oracle]] = {
    "fitnet": (feature.fitnet, _mse),
    "attention_transfer": (feature.attention_transfer, _attention_transfer),
    "hierarchical_context": (feature.hierarchical_context, _hierarchical_context),
    "vid": (_vid_of_variance, _vid),
    "log_sum": (_log_sum_of_maps, _log_sum),
    "mgd": (feature.mgd, lambda s, t: float(((s - t) ** 2).sum() / len(s))),
}
every_loss = pytest.mark.parametrize(("loss", "oracle"), CASES.values(), ids=CASES)


@every_loss
def test_values_and_gradients_are_those_of_the_closed_form(loss: Pair, oracle: Oracle) -> None:
    student, teacher = _maps(0), _maps(1)
    exact = student.double().numpy(), teacher.double().numpy()
    # Float32 carries 1e-7; the sums here lose a digit.
    assert loss(student, teacher).item() == pytest.approx(oracle(*exact), rel=1e-5)
    gradient = losses.gradient(loss, student, teacher).double().numpy()
    scale = np.abs(gradient).max()
    numeric = losses.numeric_gradient(oracle, *exact)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-5 * scale)


@every_loss
def test_no_gradient_into_the_teacher(loss: Pair, oracle: Oracle) -> None:
    losses.check_no_gradient_into_the_teacher(loss, _maps(0), _maps(1))


@every_loss
def test_means_do_not_depend_on_the_batch_size(loss: Pair, oracle: Oracle) -> None:
    student, teacher = _maps(0), _maps(1)
    twice = loss(student.repeat(2, 1, 1, 1), teacher.repeat(2, 1, 1, 1))
    torch.testing.assert_close(twice, loss(student, teacher))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(
    loss: Pair, oracle: Oracle, dtype: torch.dtype
) -> None:
    # The square of 1000 overflows float16; the loss must be what float32 makes of these numbers.
    student, teacher = (1000 * _maps(i, dtype) for i in (0, 1))
    half = loss(student, teacher)
    assert half.dtype == torch.float32
    assert torch.isfinite(half)
    torch.testing.assert_close(half, loss(student.float(), teacher.float()))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0, 1e-6, 1])
def test_equal_features_have_finite_loss_and_gradient(
    loss: Pair, oracle: Oracle, dtype: torch.dtype, scale: float
) -> None:
    maps = scale * _maps(0, dtype)
    assert torch.isfinite(loss(maps, maps))
    # The gradient of the features, before it is rounded to their type.
    assert torch.isfinite(losses.gradient(loss, maps.float(), maps)).all()


@every_loss
def test_autocast_changes_nothing(loss: Pair, oracle: Oracle) -> None:
    student, teacher = _maps(0), _maps(1)
    outside = loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(student, teacher), outside, rtol=0, atol=0)


@every_loss
def test_maps_that_would_have_to_be_broadcast_are_refused(loss: Pair, oracle: Oracle) -> None:
    for teacher in (_maps(1)[:1], _maps(1)[..., :1]):
        with pytest.raises(ValueError, match=r"got \(.*\) and \(.*\); (put a projector|resize)"):
            loss(_maps(0), teacher)


def test_equal_features_have_no_error() -> None:
    for loss in (feature.fitnet, feature.attention_transfer, feature.hierarchical_context):
        assert loss(_maps(0), _maps(0)).item() == 0
    assert feature.mgd(_maps(0), _maps(0)).item() == 0
    expected = math.log(1e-5)
    assert _log_sum_of_maps(_maps(0), _maps(0)).item() == pytest.approx(expected, rel=1e-6)


def test_fitnet_takes_features_of_any_shape() -> None:
    student, teacher = _embeddings(0), _embeddings(1)
    expected = _mse(student.double().numpy(), teacher.double().numpy())
    assert feature.fitnet(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_attention_ignores_the_scale_of_features_and_the_number_of_channels() -> None:
    student, teacher = _maps(0), _maps(1)
    loss = feature.attention_transfer(student, teacher)
    scale = torch.tensor([0.01, 0.5, 3.0, 100.0])[:, None, None, None]
    changed = feature.attention_transfer(scale * student, (teacher / scale).repeat(1, 2, 1, 1))
    torch.testing.assert_close(changed, loss)


def test_attention_between_other_channels_is_that_of_the_closed_form() -> None:
    student, teacher = _maps(0), _maps(1, channels=8)
    expected = _attention_transfer(student.double().numpy(), teacher.double().numpy())
    loss = feature.attention_transfer(student, teacher)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_pooled_copies_as_large_as_the_map_are_left_out() -> None:
    # A constant difference survives every pooling, so the weighted mean must be its square.
    for size in (1, 2, 3, 4, 8):
        student = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        loss = feature.hierarchical_context(student, student - 3)
        assert loss.item() == pytest.approx(9, rel=1e-5)
    student, teacher = _maps(0)[..., :2, :2], _maps(1)[..., :2, :2]
    plain = feature.fitnet(student, teacher)
    pooled = feature.fitnet(student.mean((2, 3)), teacher.mean((2, 3)))
    expected = (plain + pooled / 2) / 1.5  # level 1 alone, with the first halving
    torch.testing.assert_close(feature.hierarchical_context(student, teacher), expected)


def test_the_variance_of_vid_is_trained_too() -> None:
    raw = RAW_VARIANCE.clone().requires_grad_()
    feature.vid(_maps(0), raw, _maps(1)).backward()
    exact = _maps(0).double().numpy(), _maps(1).double().numpy()
    step = 1e-5
    for c in range(C):
        up, down = (RAW_VARIANCE.double().numpy() + sign * step * np.eye(C)[c] for sign in (1, -1))
        slope = (_vid(*exact, up) - _vid(*exact, down)) / (2 * step)
        assert raw.grad is not None
        assert raw.grad[c].item() == pytest.approx(slope, rel=1e-4)


def test_vid_is_least_where_the_variance_is_that_of_the_error() -> None:
    mean, teacher = _maps(0), _maps(1)
    variance = (mean - teacher).square().mean((0, 2, 3))
    best = torch.log(torch.expm1(variance - 1e-5))
    least = feature.vid(mean, best, teacher)
    expected = 0.5 * (1 + variance.log().mean())
    torch.testing.assert_close(least, expected)
    for shift in (-0.1, 0.1):
        assert feature.vid(mean, best + shift, teacher) > least


def test_the_variance_of_vid_has_a_floor() -> None:
    loss = feature.vid(_maps(0), torch.full((C,), -200.0), _maps(0), minimum=1e-3)
    assert loss.item() == pytest.approx(0.5 * math.log(1e-3), rel=1e-6)
    with pytest.raises(ValueError, match="minimum must be positive, got 0"):
        feature.vid(_maps(0), RAW_VARIANCE, _maps(1), minimum=0)


def test_vid_refuses_another_number_of_variances() -> None:
    for raw in (RAW_VARIANCE[:1], RAW_VARIANCE[None]):
        with pytest.raises(ValueError, match="one value for each of 3 channels, got shape"):
            feature.vid(_maps(0), raw, _maps(1))


def test_log_sum_ignores_shift_and_scale_of_each_column() -> None:
    student, teacher = _embeddings(0), _embeddings(1)
    scale = torch.linspace(0.5, 20, 7)
    changed = feature.log_sum(scale * student + 3, teacher * scale - 1, norm_eps=0)
    torch.testing.assert_close(changed, feature.log_sum(student, teacher, norm_eps=0))


def test_log_sum_keeps_its_gradient_as_the_difference_shrinks() -> None:
    # d log Σ|g|^α is α / |g|: ten times the gradient at a tenth of the difference.
    teacher, gap = _embeddings(0), _embeddings(1)

    def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return feature.log_sum(student, teacher, floor=1e-30)

    near, far = (
        losses.gradient(loss, teacher + size * gap, teacher).norm() for size in (1e-3, 1e-2)
    )
    assert (near / far).item() == pytest.approx(10, rel=0.05)


def test_log_sum_of_other_powers_is_that_of_the_closed_form() -> None:
    s, t = (_embeddings(i).double().numpy() for i in (0, 1))
    s, t = ((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-4) for x in (s, t))
    for alpha in (1.0, 2.5):
        expected = np.log((np.abs(s - t) ** alpha).sum(1).mean() + 1e-5)
        loss = feature.log_sum(_embeddings(0), _embeddings(1), alpha=alpha)
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_log_sum_refuses_what_it_cannot_normalise_or_differentiate() -> None:
    student, teacher = _embeddings(0), _embeddings(1)
    with pytest.raises(ValueError, match="needs 2 rows, got 1"):
        feature.log_sum(student[:1], teacher[:1])
    for wrong in ({"alpha": 0.5}, {"floor": 0.0}):
        with pytest.raises(ValueError, match="alpha must be ≥ 1 and floor positive"):
            feature.log_sum(student, teacher, **wrong)
