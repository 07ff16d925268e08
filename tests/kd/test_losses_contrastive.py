"""The contrastive loss against the paper's own form in float64 NumPy, and how it is driven."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kd.losses import contrastive

N, K, D, N_DATA, TAU = 4, 6, 8, 20, 0.07


def _unit(seed: int, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, D, generator=generator), dim=1)


STUDENT, TEACHER = _unit(0, N), _unit(1, N)
STUDENT_MEMORY, TEACHER_MEMORY = _unit(2, N_DATA), _unit(3, N_DATA)
INDICES = torch.randint(N_DATA, (N, 1 + K), generator=torch.Generator().manual_seed(4))


def _loss(student: torch.Tensor, teacher: torch.Tensor, tau: float = TAU) -> torch.Tensor:
    """One step as the module's docstring says it."""
    by_student = contrastive.scores(student, TEACHER_MEMORY, INDICES, temperature=tau)
    by_teacher = contrastive.scores(teacher, STUDENT_MEMORY, INDICES, temperature=tau)
    return contrastive.crd(
        by_student,
        by_teacher,
        student_log_z=contrastive.log_normaliser(by_student, n_data=N_DATA),
        teacher_log_z=contrastive.log_normaliser(by_teacher, n_data=N_DATA),
        n_data=N_DATA,
    )


def _exact(anchors: np.ndarray, memory: np.ndarray, z: float | None = None) -> tuple[float, float]:
    """Loss of one direction in the paper's probabilities, and its normaliser."""
    likeness = np.array(
        [
            [np.exp(a @ memory[i] / TAU) for i in row]
            for a, row in zip(anchors, INDICES, strict=True)
        ]
    )
    z = float(likeness.mean()) * N_DATA if z is None else z
    p, noise = likeness / z, K / N_DATA
    true = p[:, 0] / (p[:, 0] + noise)
    false = noise / (p[:, 1:] + noise)
    return float(-(np.log(true).sum() + np.log(false).sum()) / len(anchors)), z


def _float64(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [x.double().numpy() for x in tensors]


def test_crd_is_the_papers_sum_of_both_directions() -> None:
    s, t, s_memory, t_memory = _float64(STUDENT, TEACHER, STUDENT_MEMORY, TEACHER_MEMORY)
    expected = _exact(s, t_memory)[0] + _exact(t, s_memory)[0]
    assert _loss(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-5)


def test_gradients_into_both_embeddings_are_those_of_the_closed_form() -> None:
    s, t, s_memory, t_memory = _float64(STUDENT, TEACHER, STUDENT_MEMORY, TEACHER_MEMORY)
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    _loss(student, teacher).backward()
    for leaf, anchors, memory in ((student, s, t_memory), (teacher, t, s_memory)):
        z, step = _exact(anchors, memory)[1], 1e-6  # the normaliser is a constant
        numeric = np.zeros_like(anchors)
        for index in np.ndindex(*anchors.shape):
            above, below = anchors.copy(), anchors.copy()
            above[index] += step
            below[index] -= step
            numeric[index] = (_exact(above, memory, z)[0] - _exact(below, memory, z)[0]) / 2 / step
        assert leaf.grad is not None
        np.testing.assert_allclose(leaf.grad.numpy(), numeric, rtol=1e-3, atol=1e-4)


def test_no_gradient_into_memories_and_normalisers() -> None:
    memory = TEACHER_MEMORY.clone().requires_grad_()
    by_student = contrastive.scores(STUDENT.clone().requires_grad_(), memory, INDICES)
    log_z = contrastive.log_normaliser(by_student, n_data=N_DATA)
    assert not log_z.requires_grad
    outer = log_z.clone().requires_grad_()
    contrastive.crd(
        by_student, by_student, student_log_z=outer, teacher_log_z=outer, n_data=N_DATA
    ).backward()
    assert memory.grad is None
    assert outer.grad is None


def test_scores_are_the_products_with_the_chosen_rows() -> None:
    expected = np.zeros((N, 1 + K))
    anchors, memory = _float64(STUDENT, TEACHER_MEMORY)
    for i, j in np.ndindex(N, 1 + K):
        expected[i, j] = anchors[i] @ memory[INDICES[i, j]] / 0.5
    for indices in (INDICES, INDICES.int()):
        scores = contrastive.scores(STUDENT, TEACHER_MEMORY, indices, temperature=0.5)
        np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_normaliser_makes_the_mean_probability_one_of_all_images() -> None:
    scores = contrastive.scores(STUDENT, TEACHER_MEMORY, INDICES)
    log_z = contrastive.log_normaliser(scores, n_data=N_DATA)
    assert (scores - log_z).exp().mean().item() == pytest.approx(1 / N_DATA, rel=1e-5)


def test_a_normaliser_may_be_kept_as_a_number() -> None:
    scores = contrastive.scores(STUDENT, TEACHER_MEMORY, INDICES)
    log_z = contrastive.log_normaliser(scores, n_data=N_DATA)
    losses = [
        contrastive.crd(scores, scores, student_log_z=z, teacher_log_z=z, n_data=N_DATA)
        for z in (log_z, log_z.item())
    ]
    torch.testing.assert_close(*losses)


def test_the_loss_falls_with_a_likelier_positive_and_rises_with_a_likelier_negative() -> None:
    scores = contrastive.scores(STUDENT, TEACHER_MEMORY, INDICES)
    for column, sign in ((0, -1), (1, 1)):
        changed = scores.clone()
        changed[:, column] += 1
        before, after = (
            contrastive.crd(x, x, student_log_z=5.0, teacher_log_z=5.0, n_data=N_DATA)
            for x in (scores, changed)
        )
        assert sign * (after - before) > 0


def test_the_order_of_negatives_and_a_rotation_of_everything_change_nothing() -> None:
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(5)))[0]
    order = torch.cat([torch.zeros(1).long(), torch.arange(K, 0, -1)])
    plain = contrastive.scores(STUDENT, TEACHER_MEMORY, INDICES)
    moved = contrastive.scores(STUDENT @ turn, TEACHER_MEMORY @ turn, INDICES[:, order])
    losses = [
        contrastive.crd(x, x, student_log_z=9.0, teacher_log_z=9.0, n_data=N_DATA)
        for x in (plain, moved)
    ]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_the_batch_is_averaged_and_the_negatives_are_summed() -> None:
    scores = contrastive.scores(STUDENT, TEACHER_MEMORY, INDICES)
    twice = scores.repeat(2, 1)
    losses = [
        contrastive.crd(x, x, student_log_z=9.0, teacher_log_z=9.0, n_data=N_DATA)
        for x in (scores, twice)
    ]
    torch.testing.assert_close(*losses)
    # At score = log Z + log(k / N) every candidate is a coin toss: 2 (1 + k) log 2 in all.
    even = torch.full((N, 1 + K), 3.0)
    z = 3.0 - np.log(K / N_DATA)
    loss = contrastive.crd(even, even, student_log_z=z, teacher_log_z=z, n_data=N_DATA)
    assert loss.item() == pytest.approx(2 * (1 + K) * np.log(2), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    # exp(1 / 0.07) = 1.6e6 overflows float16.
    half = _loss(STUDENT.to(dtype), TEACHER.to(dtype))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, _loss(STUDENT.to(dtype).float(), TEACHER.to(dtype).float()))
    scores = contrastive.scores(STUDENT, TEACHER_MEMORY, INDICES).to(dtype)
    losses = [
        contrastive.crd(x, x, student_log_z=9.0, teacher_log_z=9.0, n_data=N_DATA)
        for x in (scores, scores.float())
    ]
    torch.testing.assert_close(*losses, rtol=0, atol=0)


def test_equal_embeddings_at_a_low_temperature_stay_finite() -> None:
    # exp(1 / 0.005) overflows float32.
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        student = TEACHER_MEMORY[INDICES[:, 0]].to(dtype).requires_grad_()
        loss = _loss(student, student.detach(), tau=0.005)
        loss.backward()
        assert torch.isfinite(loss)
        assert student.grad is not None
        assert torch.isfinite(student.grad).all()


def test_autocast_changes_nothing() -> None:
    outside = _loss(STUDENT, TEACHER)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(_loss(STUDENT, TEACHER), outside, rtol=0, atol=0)


def test_arrays_that_do_not_fit_are_refused() -> None:
    scores = contrastive.scores(STUDENT, TEACHER_MEMORY, INDICES)
    for other in (scores[:, :-1], scores[:-1]):
        with pytest.raises(ValueError, match=r"two \(n, 1 \+ k\) arrays of scores"):
            contrastive.crd(scores, other, student_log_z=0, teacher_log_z=0, n_data=N_DATA)
    one = scores[:, :1]
    with pytest.raises(ValueError, match=r"with k ≥ 1, got \(4, 1\) and \(4, 1\)"):
        contrastive.crd(one, one, student_log_z=0, teacher_log_z=0, n_data=N_DATA)
    for anchors, memory in ((STUDENT[:-1], TEACHER_MEMORY), (STUDENT, TEACHER_MEMORY[:, :-1])):
        with pytest.raises(ValueError, match="do not fit, got"):
            contrastive.scores(anchors, memory, INDICES)


def test_temperature_and_number_of_images_must_be_positive() -> None:
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        contrastive.scores(STUDENT, TEACHER_MEMORY, INDICES, temperature=0)
    scores = contrastive.scores(STUDENT, TEACHER_MEMORY, INDICES)
    with pytest.raises(ValueError, match="n_data must be the number of training images, got 0"):
        contrastive.log_normaliser(scores, n_data=0)
    with pytest.raises(ValueError, match="n_data must be the number of training images, got 0"):
        contrastive.crd(scores, scores, student_log_z=0, teacher_log_z=0, n_data=0)
