"""Gradients of losses, from torch and by differences, for the tests against oracles in float64."""

from collections.abc import Callable

import numpy as np
import torch

Pair = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Oracle = Callable[[np.ndarray, np.ndarray], float]


def numeric_gradient(oracle: Oracle, student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Central differences in float64: error about step² = 1e-10."""
    gradient, step = np.zeros_like(student), 1e-5
    for index in np.ndindex(*student.shape):
        above, below = student.copy(), student.copy()
        above[index] += step
        below[index] -= step
        gradient[index] = (oracle(above, teacher) - oracle(below, teacher)) / (2 * step)
    return gradient


def gradient(loss: Pair, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """That of the student's side."""
    leaf = student.clone().requires_grad_()
    loss(leaf, teacher).backward()
    assert leaf.grad is not None
    return leaf.grad


def check_no_gradient_into_the_teacher(
    loss: Pair, student: torch.Tensor, teacher: torch.Tensor
) -> None:
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
