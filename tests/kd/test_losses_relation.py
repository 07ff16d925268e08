"""Losses on relations against loops in float64 NumPy, and how their gradients behave."""

import itertools
from collections.abc import Callable

import losses_support as losses
import numpy as np
import pytest
import torch
from losses_support import Oracle, Pair

from kd.losses import relation

N, D, M = 5, 4, 7


def _rows(seed: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(N, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _student(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return _rows(0, D, dtype)


def _teacher(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return _rows(1, M, dtype)


def _exact() -> tuple[np.ndarray, np.ndarray]:
    return _student().double().numpy(), _teacher().double().numpy()


def _rotation(width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.linalg.qr(torch.randn(width, width, generator=generator))[0]


def _smooth_l1(gap: float) -> float:
    return 0.5 * gap**2 if abs(gap) < 1 else abs(gap) - 0.5


def _rkd_distance(student: np.ndarray, teacher: np.ndarray) -> float:
    pairs = list(itertools.combinations(range(len(student)), 2))
    s, t = ([float(np.linalg.norm(x[i] - x[j])) for i, j in pairs] for x in (student, teacher))
    gaps = [float(a / np.mean(s) - b / np.mean(t)) for a, b in zip(s, t, strict=True)]
    # Each pair counts twice among the n², and the n pairs of a row with itself add nothing.
    return 2 * sum(map(_smooth_l1, gaps)) / len(student) ** 2


def _cosine(x: np.ndarray, i: int, j: int, k: int) -> float:
    a, b = x[j] - x[i], x[k] - x[i]
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def _rkd_angle(student: np.ndarray, teacher: np.ndarray) -> float:
    total = 0.0
    for i, j, k in itertools.product(range(len(student)), repeat=3):
        if i not in (j, k):
            total += _smooth_l1(_cosine(student, i, j, k) - _cosine(teacher, i, j, k))
    return total / len(student) ** 3


def _similarity_preserving(student: np.ndarray, teacher: np.ndarray) -> float:
    grams = [x @ x.T for x in (student, teacher)]
    s, t = (np.array([row / np.sqrt((row**2).sum()) for row in g]) for g in grams)
    return float(((s - t) ** 2).sum() / len(s) ** 2)


def _cosines(x: np.ndarray) -> np.ndarray:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit @ unit.T


def _probabilistic_transfer(student: np.ndarray, teacher: np.ndarray) -> float:
    q, p = (0.5 * _cosines(x) + 0.5 for x in (student, teacher))
    q, p = (m / m.sum(1, keepdims=True) for m in (q, p))
    return float((p * np.log((p + 1e-7) / (q + 1e-7))).sum() / len(p) ** 2)


def _correlation_congruence(student: np.ndarray, teacher: np.ndarray) -> float:
    s, t = (_cosines(x) for x in (student, teacher))
    s, t = (np.exp(-0.8) * (1 + 0.8 * c + 0.32 * c**2) for c in (s, t))
    return float(((s - t) ** 2).mean())


def _irg_of_one_layer(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return relation.instance_graph([student], [teacher])


def _edges(x: np.ndarray) -> np.ndarray:
    n = len(x)
    squares = [[float(sum((x[i] - x[j]) ** 2)) for j in range(n)] for i in range(n)]
    return np.array(squares) / np.max(squares)


def _edge_loss(student: np.ndarray, teacher: np.ndarray) -> float:
    return float(((_edges(student) - _edges(teacher)) ** 2).mean())


CASES: dict[str, tuple[Pair, Oracle]] = {
    "rkd_distance": (relation.rkd_distance, _rkd_distance),
    "rkd_angle": (relation.rkd_angle, _rkd_angle),
    "similarity_preserving": (relation.similarity_preserving, _similarity_preserving),
    "probabilistic_transfer": (relation.probabilistic_transfer, _probabilistic_transfer),
    "correlation_congruence": (relation.correlation_congruence, _correlation_congruence),
    "instance_graph": (_irg_of_one_layer, _edge_loss),
}
every_loss = pytest.mark.parametrize(("loss", "oracle"), CASES.values(), ids=CASES)
both_rkd = pytest.mark.parametrize("loss", [relation.rkd_distance, relation.rkd_angle])


@every_loss
def test_values_and_gradients_are_those_of_the_closed_form(loss: Pair, oracle: Oracle) -> None:
    student, teacher, exact = _student(), _teacher(), _exact()
    # Float32 carries 1e-7; differences of cosines and of logarithms lose up to two digits.
    assert loss(student, teacher).item() == pytest.approx(oracle(*exact), rel=3e-5)
    gradient = losses.gradient(loss, student, teacher).double().numpy()
    scale = np.abs(gradient).max()
    numeric = losses.numeric_gradient(oracle, *exact)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-3, atol=1e-4 * scale)


@every_loss
def test_no_gradient_into_the_teacher(loss: Pair, oracle: Oracle) -> None:
    losses.check_no_gradient_into_the_teacher(loss, _student(), _teacher())


@every_loss
def test_rotation_and_scale_of_either_side_change_nothing(loss: Pair, oracle: Oracle) -> None:
    student, teacher = _student(), _teacher()
    moved = loss(100 * student @ _rotation(D), 0.01 * teacher @ _rotation(M))
    torch.testing.assert_close(moved, loss(student, teacher), rtol=1e-4, atol=1e-8)


@both_rkd
def test_rkd_ignores_a_shift_of_all_rows(loss: Pair) -> None:
    moved = loss(_student() + 3, _teacher() - 2)
    torch.testing.assert_close(moved, loss(_student(), _teacher()), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("loss", [relation.probabilistic_transfer, relation.correlation_congruence])
def test_losses_on_cosines_ignore_the_scale_of_each_row(loss: Pair) -> None:
    scale = torch.linspace(0.01, 5, N)[:, None]
    moved = loss(scale * _student(), _teacher() / scale)
    torch.testing.assert_close(moved, loss(_student(), _teacher()), rtol=1e-4, atol=1e-8)


@every_loss
def test_the_order_of_the_images_does_not_matter(loss: Pair, oracle: Oracle) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(
        loss(_student()[order], _teacher()[order]), loss(_student(), _teacher())
    )
    # With one side alone reordered, the relations are no longer the same.
    assert not torch.isclose(loss(_student()[order], _teacher()), loss(_student(), _teacher()))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_embeddings_have_no_loss_and_a_finite_gradient(
    loss: Pair, oracle: Oracle, dtype: torch.dtype
) -> None:
    rows = _student(dtype)
    assert loss(rows, rows).item() == pytest.approx(0, abs=1e-9)
    assert torch.isfinite(losses.gradient(loss, rows, rows)).all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1, 1e4])
def test_half_precision_is_computed_in_float32(
    loss: Pair, oracle: Oracle, dtype: torch.dtype, scale: float
) -> None:
    # Squares of 1e4 overflow float16, and those of 1e-4 vanish in it.
    student, teacher = scale * _student(dtype), scale * _teacher(dtype)
    half = loss(student, teacher)
    assert half.dtype == torch.float32
    assert torch.isfinite(half)
    torch.testing.assert_close(half, loss(student.float(), teacher.float()))


@every_loss
def test_the_largest_numbers_of_bfloat16_do_not_overflow(loss: Pair, oracle: Oracle) -> None:
    student, teacher = (x.to(torch.bfloat16) for x in (_student(), _teacher()))
    huge = loss(student * 2.0**100, teacher * 2.0**100)
    torch.testing.assert_close(huge, loss(student, teacher))


@every_loss
def test_autocast_changes_nothing(loss: Pair, oracle: Oracle) -> None:
    # Autocast takes matrix products in half precision, which would be seen here.
    student, teacher = _student(), _teacher()
    outside = loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(student, teacher), outside, rtol=0, atol=0)


def _all_zero(rows: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(rows)


def _all_equal(rows: torch.Tensor) -> torch.Tensor:
    return rows[:1].repeat(len(rows), 1)


def _one_zero(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(rows[:1]), rows[1:]])


def _two_equal(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows[1:2], rows[1:]])


def _opposite(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([-rows[1:2], rows[1:]])


degenerate = pytest.mark.parametrize(
    "spoil", [_all_zero, _all_equal, _one_zero, _two_equal, _opposite]
)


@every_loss
@degenerate
def test_rows_that_are_equal_or_zero_have_bounded_gradients(
    loss: Pair, oracle: Oracle, spoil: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    student, teacher = _student(), _teacher()
    for one, other in (
        (spoil(student), teacher),
        (student, spoil(teacher)),
        (spoil(student), spoil(teacher)),
    ):
        assert torch.isfinite(loss(one, other))
        # Of the size of an ordinary gradient, not of the inverse of a small number.
        assert losses.gradient(loss, one, other).abs().max() < 10


@every_loss
def test_rows_that_agree_up_to_rounding_have_bounded_gradients(loss: Pair, oracle: Oracle) -> None:
    rows = _two_equal(_student()) + 100
    rows[0] *= 1 + 2.0**-23
    assert not torch.equal(rows[0], rows[1])
    assert losses.gradient(loss, rows, _teacher()).abs().max() < 10


def test_opposite_rows_have_no_negative_probability() -> None:
    # Rounding brings some of these cosines below -1, and a small floor cannot make up for it.
    for seed in range(20):
        row = torch.randn(1, 50, generator=torch.Generator().manual_seed(seed))
        loss = relation.probabilistic_transfer(
            torch.cat([row, -row]), torch.cat([row, 2 * row]), floor=1e-9
        )
        assert torch.isfinite(loss)


def test_rkd_distance_leaves_the_zero_distance_of_equal_rows_out_of_the_mean() -> None:
    rows = _two_equal(_student())
    exact = rows.double().numpy(), _teacher().double().numpy()
    s, t = (np.linalg.norm(x[:, None] - x[None], axis=2) for x in exact)
    assert (s == 0).sum() == N + 2  # the diagonal, and one pair both ways
    gaps = s / s[s > 0].mean() - t / t[t > 0].mean()
    expected = np.mean([_smooth_l1(gap) for gap in gaps.ravel()])
    loss = relation.rkd_distance(rows, _teacher())
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@every_loss
@pytest.mark.parametrize("n", [0, 1])
def test_a_batch_without_pairs_is_refused(loss: Pair, oracle: Oracle, n: int) -> None:
    needed = 3 if loss is relation.rkd_angle else 2
    with pytest.raises(ValueError, match=f"needs {needed} images or more in a batch, got {n}"):
        loss(_student()[:n], _teacher()[:n])


def test_angles_need_three_images() -> None:
    with pytest.raises(ValueError, match="needs 3 images or more in a batch, got 2"):
        relation.rkd_angle(_student()[:2], _teacher()[:2])


@every_loss
def test_embeddings_of_other_images_or_maps_are_refused(loss: Pair, oracle: Oracle) -> None:
    for teacher in (_teacher()[:-1], _teacher()[..., None]):
        with pytest.raises(ValueError, match=r"embeddings .* of the same images, got"):
            loss(_student(), teacher)


def test_the_floor_of_the_probabilities_must_be_positive() -> None:
    with pytest.raises(ValueError, match="floor must be positive, got 0"):
        relation.probabilistic_transfer(_student(), _teacher(), floor=0)


def test_a_long_series_is_the_gaussian_kernel() -> None:
    unit = [(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in _exact()]
    s, t = (np.exp(-1.5 * ((x[:, None] - x[None]) ** 2).sum(-1)) for x in unit)
    loss = relation.correlation_congruence(_student(), _teacher(), gamma=1.5, order=20)
    assert loss.item() == pytest.approx(((s - t) ** 2).mean(), rel=1e-4)


def test_a_kernel_without_width_or_order_is_refused() -> None:
    for gamma, order in ((0.0, 2), (0.4, 0)):
        with pytest.raises(ValueError, match="gamma must be positive and order ≥ 1"):
            relation.correlation_congruence(_student(), _teacher(), gamma=gamma, order=order)


def _layers(seed: int, *widths: int) -> list[torch.Tensor]:
    return [_rows(seed + i, width) for i, width in enumerate(widths)]


def test_irg_compares_each_layer_and_the_changes_between_neighbours() -> None:
    ours, theirs = _layers(0, 4, 6, 3), _layers(10, 7, 5, 8)
    s, t = ([_edges(layer.double().numpy()) for layer in side] for side in (ours, theirs))
    edges = np.mean([((a - b) ** 2).mean() for a, b in zip(s, t, strict=True)])
    changes = np.mean([(((s[i + 1] - s[i]) - (t[i + 1] - t[i])) ** 2).mean() for i in (0, 1)])
    loss = relation.instance_graph(ours, theirs, transformation=2.5)
    assert loss.item() == pytest.approx(edges + 2.5 * changes, rel=1e-4)
    alone = relation.instance_graph(ours, theirs, transformation=0)
    assert alone.item() == pytest.approx(edges, rel=1e-4)


def test_irg_of_one_layer_has_no_changes() -> None:
    one = relation.instance_graph([_student()], [_teacher()], transformation=100)
    torch.testing.assert_close(one, relation.instance_graph([_student()], [_teacher()]))


def test_irg_of_other_layers_than_the_teachers_is_refused() -> None:
    for ours, theirs in (([], []), (_layers(0, 4), _layers(1, 4, 4))):
        with pytest.raises(ValueError, match="must have as many layers, one or more"):
            relation.instance_graph(ours, theirs)
