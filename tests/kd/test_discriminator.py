"""A discriminator behind a reversed gradient: what trains whom, and in which direction."""

import math

import numpy as np
import pytest
import torch
from terms_support import CLASSES, batches, objective, teacher
from torch import Tensor

from dsdistill.harness.errors import UserError
from kd.losses import adversarial
from kd.objectives.projectors import Discriminator
from kd.recipe import Recipe
from kd.training.loop import train


def _rows(seed: int, n: int = 6) -> Tensor:
    return torch.randn(n, CLASSES, generator=torch.Generator().manual_seed(seed))


def _discriminator(reversal: float = 1.0) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(CLASSES, width=16, reversal=reversal)


def _loss(discriminator: Discriminator, student: Tensor, theirs: Tensor) -> Tensor:
    return adversarial.discrimination(*discriminator(student, theirs))


def test_the_loss_is_a_cross_entropy_of_two_classes() -> None:
    scores = np.array([[0.5], [-2.0], [3.0]]), np.array([[1.0], [0.0], [-1.0]])
    sigmoids = [1 / (1 + np.exp(-x)) for x in scores]
    expected = -np.log(sigmoids[0]).mean() - np.log(1 - sigmoids[1]).mean()
    value = adversarial.discrimination(*(torch.tensor(x) for x in scores))
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_of_equal_vectors_the_loss_tends_to_2_log_2() -> None:
    discriminator, rows = _discriminator(), _rows(1, 64)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=0.01)
    with torch.no_grad():
        discriminator.layers[2].bias += 3.0  # pyright: ignore[reportOperatorIssue]
    assert _loss(discriminator, rows, rows).item() > 2.5
    for _ in range(200):
        optimizer.zero_grad()
        loss = _loss(discriminator, rows, rows)
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(2 * math.log(2), rel=0.01)


@pytest.mark.parametrize("reversal", [1.0, 0.3])
def test_the_student_gets_minus_the_gradient_and_the_discriminator_the_plain_one(
    reversal: float,
) -> None:
    """Against finite differences in float64."""
    discriminator = _discriminator(reversal).double()
    student, theirs = _rows(1).double(), _rows(2).double()
    leaf = student.clone().requires_grad_()
    _loss(discriminator, leaf, theirs).backward()

    def slope(of: Tensor) -> Tensor:
        slopes = torch.zeros_like(of)
        with torch.no_grad():
            for index in np.ndindex(*of.shape):
                values = []
                for step in (1e-5, -1e-5):
                    of[index] += step
                    values.append(scores_loss(of))
                    of[index] -= step
                slopes[index] = (values[0] - values[1]) / 2e-5
        return slopes

    def scores_loss(_: Tensor) -> Tensor:
        # float32 would round the differences: the formula again, in float64.
        ours, real = discriminator.layers(student), discriminator.layers(theirs)
        softplus = torch.nn.functional.softplus
        return softplus(-real).mean() + softplus(ours).mean()

    assert leaf.grad is not None
    assert torch.allclose(leaf.grad, -reversal * slope(student), atol=1e-6)
    weight = discriminator.layers[0].weight
    assert isinstance(weight, Tensor)
    assert weight.grad is not None
    assert torch.allclose(weight.grad, slope(weight.data), atol=1e-6)
    assert weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("logits", [0, 1])
def test_without_a_reversed_gradient_the_student_is_that_without_the_term(logits: int) -> None:
    recipe = Recipe(steps=4, lr=0.05, batch_size=16, weight_decay=0)
    plain, judged, fooling = (
        objective(loss, teacher())
        for loss in (
            "ce:1",
            f"ce:1,adv:1:reversal=0:logits={logits}",
            f"ce:1,adv:1:logits={logits}",
        )
    )
    before = {k: v.clone() for k, v in judged.terms.state_dict().items()}
    for each in (plain, judged, fooling):
        train(each, batches(), recipe, 0)
    states = [each.student.network.state_dict() for each in (plain, judged, fooling)]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert not all(torch.equal(states[0][name], value) for name, value in states[2].items())
    after = judged.terms.state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("discriminators" in name for name in moved)
    assert not any("projectors" in name for name in moved)  # it would fool, too


def test_it_is_stored_with_projectors_and_not_with_the_student() -> None:
    ours = objective("ce:1,adv", teacher())
    stored = [name for name in ours.checkpoint_state() if "discriminators" in name]
    assert len(stored) == 4
    assert not any("discriminators" in name for name in ours.student.state_dict())


def test_layers_and_logits_exclude_each_other() -> None:
    with pytest.raises(UserError, match="adv with logits=1 reads no layers"):
        objective("adv:0.1:logits=1@2=layer1", teacher())
