"""Local structure preserving against a loop in float64, and what leaves it unchanged."""

import graph_support
import losses_support as losses
import numpy as np
import pytest
import torch

from kd.losses.graph import local_structure

NEIGHBOURS = graph_support.small(12).neighbours


def _rows(seed: int, width: int) -> torch.Tensor:
    return torch.randn(12, width, generator=torch.Generator().manual_seed(seed))


STUDENT, TEACHER = _rows(0, 4), _rows(1, 6)


def _loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return local_structure(student, teacher, NEIGHBOURS)


def _oracle(student: np.ndarray, teacher: np.ndarray) -> float:
    pairs = NEIGHBOURS.tolist()
    near = {i: [b for a, b in pairs if a == i] for i, _ in pairs}
    means = [np.mean([np.sum((x[a] - x[b]) ** 2) for a, b in pairs]) for x in (student, teacher)]
    total = 0.0
    for i, others in near.items():
        probabilities = []
        for x, mean in zip((student, teacher), means, strict=True):
            squares = np.array([np.sum((x[i] - x[j]) ** 2) for j in others])
            weights = np.exp(np.exp(-squares / (2 * mean)))
            probabilities.append(weights / weights.sum())
        q, p = probabilities
        total += float((p * np.log(p / q)).sum())
    return total / len(near)


def test_value_and_gradient_are_those_of_the_closed_form() -> None:
    exact = STUDENT.double().numpy(), TEACHER.double().numpy()
    assert _loss(STUDENT, TEACHER).item() == pytest.approx(_oracle(*exact), rel=1e-4)
    gradient = losses.gradient(_loss, STUDENT, TEACHER).double().numpy()
    numeric = losses.numeric_gradient(_oracle, *exact)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-3, atol=1e-3 * np.abs(numeric).max())


def test_no_gradient_into_the_teacher() -> None:
    losses.check_no_gradient_into_the_teacher(_loss, STUDENT.clone(), TEACHER.clone())


def test_equal_embeddings_have_no_loss_and_rotation_shift_and_scale_change_nothing() -> None:
    assert _loss(STUDENT, STUDENT).item() == pytest.approx(0, abs=1e-7)
    rotation = torch.linalg.qr(_rows(2, 4)[:4])[0]
    moved = _loss(50 * STUDENT @ rotation + 3, TEACHER)
    torch.testing.assert_close(moved, _loss(STUDENT, TEACHER), rtol=1e-4, atol=1e-7)


def test_equal_rows_and_no_edges_have_finite_gradients() -> None:
    same = STUDENT[:1].repeat(12, 1)
    assert torch.isfinite(losses.gradient(_loss, same, TEACHER)).all()
    leaf = STUDENT.clone().requires_grad_()
    none = local_structure(leaf, TEACHER, NEIGHBOURS[:0])
    none.backward()
    assert none == 0
    assert leaf.grad is not None


def test_other_nodes_and_a_width_of_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="of the same nodes"):
        _loss(STUDENT[1:], TEACHER)
    with pytest.raises(ValueError, match="sigma must be positive, got 0"):
        local_structure(STUDENT, TEACHER, NEIGHBOURS, sigma=0)
