"""Recipes: what they resolve to, against values worked out by hand, and options without effect."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from torch import nn

from dsdistill.harness.errors import UserError
from kd import recipe, recipes
from kd.data.batching import Batch
from kd.models import networks
from kd.models.networks import Classifier
from kd.objectives import terms
from kd.objectives.step_outputs import StepOutputs
from kd.recipe import Recipe
from kd.training import optimization


def rates(chosen: Recipe, per_epoch: int) -> list[float]:
    """The learning rate of every step."""
    optimizer = optimization.make_optimizer(nn.Linear(2, 2), chosen)
    schedule = optimization.make_schedule(optimizer, chosen, per_epoch)
    found = []
    for step in range(chosen.total_steps(per_epoch)):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_supergradients_learning_rates_step_by_step() -> None:
    """5 epochs up from a sixth, 295 along a cosine to a hundredth, 10 at that."""
    n = 7
    found = rates(recipes.SUPERGRADIENTS, n)
    top = 5e-3
    up = [top / 6 + (top - top / 6) * step / (5 * n) for step in range(5 * n)]
    low, fall = 0.01 * top, 295 * n
    down = [low + (top - low) * (1 + math.cos(math.pi * i / fall)) / 2 for i in range(fall)]
    assert len(found) == 310 * n
    assert found == pytest.approx([*up, *down, *[low] * (10 * n)], rel=1e-9)


WIDE = Recipe(epochs=4, warmup=1.3, cooldown=0.7, final=0.03, milestones=(2, 3), decay=0.3)


@pytest.mark.parametrize("schedule", ["cosine", "milestones", "constant"])
@pytest.mark.parametrize("warmup", [0, 1.3])
def test_learning_rates_are_those_of_timm_to_the_bit(schedule, warmup) -> None:
    chosen = replace(WIDE, schedule=schedule, warmup=warmup)
    optimizer = optimization.make_optimizer(nn.Linear(2, 2), chosen)
    up, total = (chosen.in_steps(x, 7) for x in (warmup, 4))
    options = {"warmup_t": up, "warmup_lr_init": chosen.warmup_from * chosen.lr}
    options |= {"warmup_prefix": True, "t_in_epochs": False}
    if schedule == "cosine":
        fall, low = total - up - chosen.in_steps(0.7, 7), 0.03 * chosen.lr
        theirs = CosineLRScheduler(optimizer, fall, low, **options)
    else:  # a milestone comes one step early there, and counts from the end of the warm-up
        drops = [7 * m + 1 - up for m in chosen.milestones if schedule == "milestones"]
        theirs = MultiStepLRScheduler(optimizer, drops, chosen.decay, **options)
    expected = []
    for step in range(total):
        theirs.step_update(step)
        expected.append(optimizer.param_groups[0]["lr"])
    assert rates(chosen, 7) == expected


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw"])
@pytest.mark.parametrize("changes", [{}, {"decay_all": True}, {"weight_decay": 0.0}])
def test_optimizers_of_torch_are_those_of_timm(name, changes) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    network[0].weight.requires_grad_(False)
    network.no_weight_decay = lambda: {"3.weight"}
    chosen = replace(WIDE, optimizer=name, momentum=0.8, weight_decay=0.02)
    chosen = replace(chosen, **changes)
    options = {"momentum": 0.8} if name in ("sgd", "momentum") else {}
    theirs = create_optimizer_v2(
        network,
        name,
        lr=chosen.lr,
        weight_decay=chosen.weight_decay,
        filter_bias_and_bn=not chosen.decay_all,
        **options,
    )
    ours = optimization.make_optimizer(network, chosen)
    assert type(ours) is type(theirs)
    if name == "adamw":
        for values in (ours.defaults, *ours.param_groups):
            assert values.pop("fused"), "AdamW updates in one pass"
        for values in (theirs.defaults, *theirs.param_groups):
            del values["fused"]
    assert ours.defaults == theirs.defaults
    assert ours.state_dict() == theirs.state_dict()
    for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert list(map(id, mine["params"])) == list(map(id, other["params"]))


def test_fused_adamw_takes_the_steps_of_the_plain_one() -> None:
    """And a checkpoint of the plain one, as earlier versions wrote it, goes on with plain steps."""
    torch.manual_seed(0)
    network = nn.Linear(5, 3)
    start = network.state_dict()
    start = {name: value.clone() for name, value in start.items()}
    chosen = replace(WIDE, optimizer="adamw", weight_decay=0.1)

    def steps(optimizer: torch.optim.Optimizer, count: int = 5) -> torch.Tensor:
        for step in range(count):
            optimizer.zero_grad()
            network(torch.full((2, 5), 1.0 + step)).square().sum().backward()
            optimizer.step()
        return network.weight.detach().clone()

    def plain() -> torch.optim.Optimizer:
        network.load_state_dict(start)
        groups = optimization.make_optimizer(network, chosen).param_groups
        return torch.optim.AdamW([{**group, "fused": None} for group in groups])

    earlier = plain()
    expected = steps(earlier)
    state, weights = copy.deepcopy(earlier.state_dict()), copy.deepcopy(network.state_dict())
    later = steps(earlier)
    network.load_state_dict(start)
    torch.testing.assert_close(
        steps(optimization.make_optimizer(network, chosen)), expected, rtol=1e-6, atol=1e-7
    )
    network.load_state_dict(weights)
    resumed = optimization.make_optimizer(network, chosen)
    resumed.load_state_dict(state)
    assert torch.equal(steps(resumed), later)


def test_supergradients_parameter_groups_and_lamb() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    optimizer = optimization.make_optimizer(network, recipes.SUPERGRADIENTS)
    assert type(optimizer).__name__ == "Lamb"
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    expected = {id(p): 0.02 if p.ndim > 1 else 0.0 for p in network.parameters()}
    assert decays == expected
    assert {group["lr"] for group in optimizer.param_groups} == {5e-3}


def test_supergradients_loss_is_a_weighted_sum_at_temperature_one() -> None:
    """0.2 of the task loss and 0.8 of KL(teacher || student), of numbers worked out by hand."""
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    labels = torch.tensor([0])
    q = math.e / (1 + math.e)
    p = 1 / (1 + math.exp(2))
    task = -math.log(q)
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    loss = recipes.SUPERGRADIENTS.loss
    assert loss is not None
    made = terms.build(terms.parse(loss), Classifier(nn.Identity()))
    seen = StepOutputs(Batch(torch.zeros(1, 1, 1, 1), labels), student, (teacher,))
    found = {term.name: term(seen).item() for term in made}
    assert found == pytest.approx({"ce": 0.2 * task, "kd": 0.8 * kl}, rel=1e-6)


def test_cifar_falls_at_its_milestones_and_decays_everything() -> None:
    n = 3
    found = rates(recipes.CIFAR, n)
    expected = [
        0.05 * 0.1 ** sum(step >= m * n for m in (150, 180, 210)) for step in range(240 * n)
    ]
    assert found == pytest.approx(expected)
    optimizer = optimization.make_optimizer(nn.Linear(2, 2), recipes.CIFAR)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {5e-4}
    assert not optimizer.param_groups[0]["nesterov"]


def test_warm_up_then_cosine_to_zero() -> None:
    found = rates(Recipe(steps=100, lr=1.0, warmup=10, warmup_from=0.0), 1)
    assert found[:11] == pytest.approx([i / 10 for i in range(11)])
    assert found[55] == pytest.approx(0.5)
    assert 0 < found[99] < 1e-3


def test_another_length_keeps_the_shape_of_the_schedule() -> None:
    short = recipe.override(recipes.SUPERGRADIENTS, {"epochs": 31})
    assert (short.warmup, short.cooldown) == pytest.approx((0.5, 1.0))
    cifar = recipe.override(recipes.CIFAR, {"epochs": 24})
    assert cifar.milestones == pytest.approx((15, 18, 21))
    given = recipe.override(recipes.SUPERGRADIENTS, {"epochs": 31, "warmup": 2})
    assert given.warmup == 2
    steps = recipe.override(recipes.REAL, {"steps": 200})
    assert (steps.epochs, steps.steps, steps.warmup) == (None, 200, pytest.approx(10))


def test_the_average_follows_the_ramp() -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    average = optimization.WeightAverage(
        network, replace(recipes.REAL, ema=0.9, ema_ramp=15), total=100
    )
    expected = 0.0
    for step in range(1, 101):
        nn.init.constant_(network.weight, float(step))
        average.update(network, step)
        keep = 0.9 * (1 - math.exp(-15 * step / 100))
        expected = keep * expected + (1 - keep) * step
    weight = average.network.get_parameter("weight")
    assert weight.item() == pytest.approx(expected, rel=1e-5)
    assert not average.network.training


def test_the_average_takes_in_buffers() -> None:
    network = nn.BatchNorm1d(1)
    average = optimization.WeightAverage(network, replace(recipes.REAL, ema=0.5), total=1)
    network(torch.tensor([[1.0], [3.0]]))
    average.update(network, 1)
    assert average.network.get_buffer("num_batches_tracked").item() == 1
    assert 0 < average.network.get_buffer("running_mean").item() <= 0.2


def test_the_mean_of_weights() -> None:
    parts = [{"w": torch.tensor([float(i)]), "count": torch.tensor(i)} for i in (1, 2, 6)]
    found = optimization.mean_weights(parts)
    assert found["w"].item() == 3
    assert found["count"].item() == 1


@pytest.mark.parametrize(
    ("base", "given", "message"),
    [
        ("cifar", {"final": 0.1}, "--final has no effect without --schedule cosine or linear"),
        ("cifar", {"auto_augment": "rand-m7"}, "--auto-augment has no effect without --augment"),
        ("distilled_set", {"momentum": 0.8}, "--momentum has no effect without --optimizer sgd"),
        ("distilled_set", {"ema_ramp": 3.0}, "--ema-ramp has no effect without --ema"),
        ("deit", {"crop_padding": 2}, "--crop-padding has no effect without --augment crop-flip"),
        ("cifar", {"epochs": 3, "steps": 4}, "give one of them"),
        ("cifar", {"lr": -1.0}, "--lr must be positive and finite, got -1.0"),
        ("cifar", {"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ("cifar", {"label_smoothing": 1.0}, "--label-smoothing must be in [0, 1), got 1.0"),
        ("deit", {"warmup": 300.0}, "leave nothing of a training of 300"),
        ("deit", {"schedule": "milestones"}, "needs --milestones"),
    ],
)
def test_values_that_break_a_rule_or_do_nothing(base, given, message) -> None:
    with pytest.raises(UserError) as error:
        recipe.override(recipes.by_name(base), given)
    assert message in str(error.value)


def test_unknown_recipe() -> None:
    with pytest.raises(UserError, match="did you mean 'hinton'"):
        recipes.by_name("hintn")


def test_every_recipe_has_a_loss_that_can_be_read() -> None:
    for name, chosen in recipes.NAMED.items():
        recipe.override(chosen, {})  # breaks no rule
        if chosen.loss is not None:
            assert terms.parse(chosen.loss), name


def test_the_deit_recipe_has_the_drop_path_of_its_paper() -> None:
    """Touvron et al. 2021, table 9: stochastic depth 0.1, rising with the depth."""
    assert recipes.DEIT.student is not None
    network = networks.build(recipes.DEIT.student, (224, 224, 3), 10).network
    drops = [getattr(block.drop_path1, "drop_prob", 0.0) for block in network.blocks]
    assert drops == pytest.approx([0.1 * i / 11 for i in range(12)], abs=1e-6)
