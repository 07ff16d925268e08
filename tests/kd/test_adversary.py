"""Attacks on a network: exact where a linear one can be attacked exactly, and without a trace."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError
from kd import attack
from kd.attack import AutoAttack, Pgd
from kd.data.batching import Batch
from kd.losses import adversarial
from kd.models.networks import Classifier
from kd.objectives import loss_checks, terms
from kd.objectives.adversary import Adversary, Bounds, bounds_after, label_loss, perturb
from kd.objectives.schemes import Distillation


def linear(classes: int = 2, seed: int = 0) -> nn.Sequential:
    """A linear classifier of 4x4 images."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, classes))


def deep() -> nn.Sequential:
    """A network whose buffers, mode and random numbers an attack could leave traces in."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(16, 3))
    network(torch.rand(32, 1, 4, 4))  # averages of batch norm that are not those of the start
    return network


def pixels(n: int = 8, seed: int = 2) -> Tensor:
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("eps", [0.05, 0.4])
def test_a_linear_classifier_is_attacked_exactly(eps: float) -> None:
    """Of two classes the worst image in the ball is x + eps sign(w_other - w_y), cut at [0, 1]."""
    network, images, labels = linear(), pixels(), torch.arange(8) % 2
    changed = perturb(network, images, label_loss(labels), Bounds(eps), steps=12)
    weight = network[1].weight.detach().numpy()
    direction = np.sign(weight[1 - labels.numpy()] - weight[labels.numpy()]).reshape(8, 1, 4, 4)
    expected = np.clip(images.numpy() + eps * direction, 0, 1)
    assert np.abs(changed.numpy() - expected).max() <= 1e-6


def test_an_attack_keeps_to_its_ball_and_to_pixels_after_the_preprocessing() -> None:
    mean, std = np.array([0.3], np.float32), np.array([0.2], np.float32)
    fitted = Preprocess("standardise", mean, std)
    images = fitted.apply(pixels().permute(0, 2, 3, 1).numpy())
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2)
    labels = torch.arange(8) % 3
    changed = perturb(deep(), inputs, label_loss(labels), bounds_after(fitted, 0.1), steps=5)
    back = fitted.invert(changed.permute(0, 2, 3, 1).numpy())
    assert np.abs(back - fitted.invert(images)).max() == pytest.approx(0.1, abs=1e-6)
    assert back.min() >= -1e-6
    assert back.max() <= 1 + 1e-6


def test_values_outside_of_pixels_move_inwards_alone() -> None:
    images = torch.full((2, 1, 4, 4), 1.5)
    changed = perturb(linear(), images, label_loss(torch.tensor([0, 1])), Bounds(0.1), steps=4)
    assert changed.max() <= 1.5
    assert changed.min() >= 1.4 - 1e-6


@pytest.mark.parametrize("kind", ["zca", "zca-mtt"])
def test_pixels_that_are_mixed_are_refused(kind) -> None:
    ones, eye = np.ones(1, np.float32), np.eye(16, dtype=np.float32)
    with pytest.raises(UserError, match="an attack changes pixels, and the preprocessing zca"):
        bounds_after(Preprocess(kind, 0 * ones, ones, eye, eye), 0.1)


def test_an_attack_leaves_no_trace() -> None:
    network, labels = deep(), torch.arange(8) % 3
    network.train()
    network[3].eval()  # a part with a mode of its own
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [part.training for part in network.modules()]
    state = torch.get_rng_state()
    batch = Batch(pixels(), labels)
    Adversary(Pgd(steps=3), Bounds(0.1), "labels").change(batch, network)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert [part.training for part in network.modules()] == modes
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_an_attack_sees_the_network_in_evaluation_mode_and_in_float32() -> None:
    """In training mode batch norm would mix the images, and autocast round the gradient's signs."""
    network, images, labels = deep().train(), pixels(), torch.arange(8) % 3
    seen = []
    network[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    options = {"steps": 3, "start": "normal"}

    def attacked(chosen: slice) -> Tensor:
        torch.manual_seed(0)
        bounds, loss = Bounds(0.1), label_loss(labels[chosen])
        return perturb(network, images[chosen], loss, bounds, **options)

    with torch.autocast("cpu", torch.bfloat16):
        together = attacked(slice(None))
    assert set(seen) == {torch.float32}
    # The noise of the first image is the same alone, so only the other images could change it.
    assert torch.allclose(attacked(slice(1)), together[:1], atol=1e-6)


def test_the_same_seed_gives_the_same_adversaries() -> None:
    adversary = Adversary(Pgd(steps=1), Bounds(0.1), "labels")
    batch, network, found = Batch(pixels(), torch.arange(8) % 3), deep(), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        torch.rand(seed)  # what others have drawn since does not count
        found.append(adversary.change(batch, network))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def _kl(p: Tensor, q: Tensor) -> np.ndarray:
    """KL(p ‖ q) of softmaxed rows, in float64 and by NumPy."""
    log_p, log_q = (
        x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (a.double().numpy() for a in (p, q))
    )
    return (np.exp(log_p) * (log_p - log_q)).sum(1)


@pytest.mark.parametrize("name", ["rslad", "ard", "adaad", "trades"])
def test_losses_of_adversaries_are_divergences_summed_over_classes(name: str) -> None:
    student, other = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    value = getattr(adversarial, name)(student, other).item()
    temperature = 30 if name == "ard" else 1
    expected = temperature**2 * _kl(other / temperature, student / temperature).mean()
    assert value == pytest.approx(expected, rel=2e-3 if name == "ard" else 1e-5)
    assert getattr(adversarial, name)(student, student).item() == pytest.approx(0, abs=1e-4)


def test_trades_sends_a_gradient_into_both_views_and_rslad_into_the_students_alone() -> None:
    one, two = torch.randn(2, 6, 5, requires_grad=True).unbind()
    gradients = torch.autograd.grad(adversarial.trades(one, two), (one, two))
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    one, two = (x.detach().requires_grad_() for x in (one, two))
    adversarial.rslad(one, two).backward()
    assert one.grad is not None
    assert two.grad is None


class _Counted(nn.Module):
    """Counts the passes of a network, and keeps what it was given."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.inputs: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.inputs.append(images.detach())
        return self.network(images)


def _distillation(loss: str, steps: int = 2) -> tuple[Distillation, _Counted, _Counted]:
    student, teacher = Classifier(_Counted(linear(3, 0))), Classifier(_Counted(linear(3, 7)))
    chosen = terms.parse(loss)
    against = loss_checks.check_adversary(chosen, "pgd")
    assert against is not None
    built = terms.build(chosen, student, (teacher,), sample=(4, 4, 1), classes=3)
    adversary = Adversary(Pgd(eps=0.2, steps=steps), Bounds(0.2), against)
    objective = Distillation(student, built, [teacher], adversary=adversary)
    for network in (student.network, teacher.network):
        assert isinstance(network, _Counted)
        network.inputs.clear()
    return objective, student.network, teacher.network  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(
    ("loss", "of_student", "of_teacher"),
    [
        ("adv-ce", 3, 0),  # two steps of the attack, and the changed images
        ("ce:1,trades:6", 5, 0),  # what it is driven away from, and the clean images too
        ("ard", 3, 1),
        ("rslad", 3, 1),
        ("rslad:5/6,kd:1/6", 4, 1),
        ("adaad", 3, 3),
        ("ce:1,adaad:1", 4, 3),
    ],
)
def test_passes_of_a_step(loss: str, of_student: int, of_teacher: int) -> None:
    objective, student, teacher = _distillation(loss)
    batch = Batch(pixels(), torch.arange(8) % 3)
    values = objective(batch)
    assert (len(student.inputs), len(teacher.inputs)) == (of_student, of_teacher)
    torch.stack(list(values.values())).sum().backward()
    assert all(p.grad is not None for p in objective.student.parameters())
    assert all(p.grad is None for p in objective.teachers.parameters())


@pytest.mark.parametrize("name", ["adv-ce", "trades", "ard", "rslad", "adaad"])
def test_a_term_is_of_the_changed_images_which_raise_what_it_is_against(name: str) -> None:
    """Each term against its formula by hand, at images where the inner loss is near its largest."""
    objective, student, _ = _distillation(f"ce:1,{name}:1", steps=20)
    ours, theirs = linear(3, 0), linear(3, 7)
    images, labels = pixels(), torch.arange(8) % 3
    torch.manual_seed(0)
    value = objective(Batch(images, labels))[name].item()
    changed = student.inputs[-2]  # before the clean images
    assert (changed - images).abs().max() == pytest.approx(0.2, abs=1e-6)
    with torch.no_grad():
        s, s_changed, t, t_changed = ours(images), ours(changed), theirs(images), theirs(changed)
    outer = {
        "adv-ce": F.cross_entropy(s_changed, labels).item(),
        "trades": _kl(s, s_changed).mean(),
        "ard": 900 * _kl(t / 30, s_changed / 30).mean(),
        "rslad": _kl(t, s_changed).mean(),
        "adaad": _kl(t_changed, s_changed).mean(),
    }[name]
    assert value == pytest.approx(outer, rel=2e-3)
    inner = {
        "trades": lambda x: _kl(s, ours(x)),
        "rslad": lambda x: _kl(t, ours(x)),
        "adaad": lambda x: _kl(theirs(x), ours(x)),
    }.get(name, lambda x: F.cross_entropy(ours(x), labels, reduction="none").numpy())
    with torch.no_grad():
        random = pixels(8, seed=9)
        corners = (images + 0.2 * torch.where(random < 0.5, -1.0, 1.0)).clamp(0, 1)
        assert (inner(changed) >= inner(corners) - 1e-6).all()
        assert inner(changed).mean() > inner(images).mean() + 0.01


@pytest.mark.parametrize("scale", [400.0, 1.0])
def test_teachers_of_changed_images_have_the_weights_that_they_have_in_the_loss(
    scale: float,
) -> None:
    """Of two teachers one that is wrong without a doubt has no weight, nor drives the attack."""
    student, knowing, wrong = linear(3, 0), linear(3, 7), linear(3, 8)
    images = pixels()
    labels = wrong(images).argmin(1)
    with torch.no_grad():
        wrong[1].weight *= scale
        wrong[1].bias *= scale
    adversary = Adversary(Pgd(eps=0.02, steps=6), Bounds(0.02), "moving teacher")

    def changed(*teachers: nn.Module, by_label: bool = False) -> Tensor:
        torch.manual_seed(0)
        return adversary.change(Batch(images, labels), student, teachers, by_label=by_label)

    alone, together = changed(knowing), changed(knowing, wrong, by_label=True)
    assert not torch.equal(changed(knowing, wrong), together)
    assert torch.equal(alone, together) == (scale == 400)


def test_an_attack_as_it_is_written() -> None:
    assert attack.parse_adversary("pgd") == Pgd(8 / 255, 10)
    written = attack.parse_adversary("pgd:eps=8/255:steps=7:step=2/255")
    assert written == Pgd(8 / 255, 7, 2 / 255)
    assert attack.parse_adversary("pgd:eps=0.1").step_size == pytest.approx(0.025)
    judged = attack.parse_robust("pgd:steps=50,autoattack:eps=0.3:images=10", eps=0.1)
    assert judged == (Pgd(0.1, 50), AutoAttack(0.3, 10))
    assert str(judged[0]) == "pgd:eps=0.1:steps=50:step=0.025"
    assert math.isclose(attack.parse_robust("pgd")[0].eps, 8 / 255)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fgsm", "unknown attack of --adversary 'fgsm'"),
        ("autoattack", "unknown attack of --adversary 'autoattack'"),
        ("pgd:8/255", "a parameter is NAME=VALUE, such as eps=8/255, got '8/255'"),
        ("pgd:eps=8/0", "eps must be a number such as 0.03 or 8/255, got '8/0'"),
        ("pgd:eps=8", "eps is of pixels in \\[0, 1\\]: above 0 and at most 1"),
        ("pgd:eps=0", "eps is of pixels in"),
        ("pgd:eps=nan", "eps is of pixels in"),
        ("pgd:steps=2.5", "steps must be a whole number of at least 1, got 2.5"),
        ("pgd:steps=0", "steps must be a whole number of at least 1, got 0"),
        ("pgd:epss=1", "unknown parameter of --adversary pgd 'epss'; did you mean"),
        ("pgd:eps=0.1:eps=0.2", "eps occurs twice"),
        ("pgd:images=10", "unknown parameter of --adversary pgd 'images'"),
    ],
)
def test_an_attack_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        attack.parse_adversary(text)


@pytest.mark.parametrize(
    ("loss", "adversary", "message"),
    [
        ("rslad", None, "--loss rslad is of images that an attack has changed: add --adversary"),
        ("ce,kd", "pgd", "--adversary pgd has no effect on --loss ce,kd: add adv-ce"),
        ("rslad,adv-ce", "pgd", "--loss rslad and adv-ce are of different attacks"),
        ("trades", "pgd", "--loss trades alone is smallest where all images have one answer"),
        ("mse:1,rslad", "pgd", "--loss rslad takes logits, and mse fits"),
    ],
)
def test_a_loss_and_an_attack_that_do_not_fit(loss, adversary, message) -> None:
    with pytest.raises(UserError, match=message):
        loss_checks.check_adversary(terms.parse(loss), adversary)
