"""Losses that cannot work are refused before a training, and no others."""

import itertools
from collections.abc import Sequence
from types import SimpleNamespace

import kd_support as support
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from terms_support import LAYERED, SHAPE, layers, teacher
from torch import nn

from dsdistill.harness.errors import UserError
from kd.data import batching
from kd.data.batching import Batch
from kd.models import networks
from kd.objectives import loss_checks, loss_spec, terms
from kd.objectives.schemes import Distillation, MeanTeacher, Mutual, Objective
from kd.parallel import engine
from kd.training import dry_run

ON = engine.make()
OUT_OF_RANGE = [
    ("ce:1:smoothing=1", "smoothing must be in [0, 1), got 1"),
    ("kd:1:temperature=0", "temperature must be in [0.01, 1000], got 0"),
    ("kd:1:temperature=1e30", "temperature must be in [0.01, 1000], got 1e+30"),
    ("kd:1:temperature=nan", "temperature must be in [0.01, 1000], got nan"),
    ("kd:1:temperature=-1", "temperature must be in [0.01, 1000], got -1"),
    ("kd:inf", "a weight must be in [1e-09, 1e+09], got inf"),
    ("kd:1e30", "a weight must be in [1e-09, 1e+09], got 1e+30"),
    ("ce:0,kd:0", "a term of weight 0 has no effect"),
    ("kd:1:temperature=1:temperature=2", "temperature occurs twice"),
    ("cc:1:order=0", "order must be in [1, 20], got 0"),
    ("cc:1:order=1.5", "order must be a whole number, got 1.5"),
    ("cc:1:gamma=0", "gamma must be in [0.001, 10], got 0"),
    ("srd:1:alpha=0", "alpha must be in [1, 16], got 0"),
    ("srd:1:norm_eps=0", "norm_eps must be in [1e-12, 1], got 0"),
    ("vid:1:minimum=0", "minimum must be in [1e-12, 1], got 0"),
    ("pkt:1:floor=0", "floor must be in [1e-12, 1], got 0"),
    ("crd:1:negatives=0", "negatives must be in [1, 1e+06], got 0"),
    ("crd:1:dim=0", "dim must be in [1, 8192], got 0"),
    ("crd:1:momentum=2", "momentum must be in [0, 1), got 2"),
    ("crd:1:temperature=0", "temperature must be in [0.01, 1000], got 0"),
    ("heads:1:alpha=2", "alpha must be in [0, 1], got 2"),
]


def student(name: str = "convnet:8", classes: int = 4, seed: int = 0) -> networks.Classifier:
    return networks.build(name, SHAPE, classes, seed=seed)


def objective(loss: str, *, name: str = "convnet:8", classes: int = 4) -> Distillation:
    network, taught_by = student(name, classes), teacher("test_resnet", classes)
    specs = terms.parse(loss)
    options = {"sample": SHAPE, "classes": classes, "images": 32}
    return Distillation(network, terms.build(specs, network, (taught_by,), **options), (taught_by,))


def check(loss: str, of: Objective, sizes: Sequence[int] = (16,), classes: int = 4, **more) -> None:
    options = {"shape": SHAPE, "classes": classes, "images": 32, "on": ON}
    dry_run.check(of, loss, sizes, **options, **more)


@pytest.mark.parametrize(("loss", "message"), OUT_OF_RANGE)
def test_a_parameter_out_of_its_range_is_one_line(loss: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        terms.parse(loss)
    assert message in str(error.value)


def test_every_parameter_of_every_term_has_a_range_that_holds_its_default() -> None:
    for name, row in terms.TERMS.items():
        for key, default in loss_spec.parameters(row.function).items():
            allowed = loss_spec.parameter_range(row.function, key)
            assert allowed is not None, (name, key)
            assert default in allowed, (name, key)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ("ce,dkd", {"classes": 2}, "dkd needs 3 classes or more, and the data have 2"),
        ("ce,ls", {"classes": 2}, "ls needs 3 classes or more, and the data have 2"),
        ("ce,rkd-angle", {"batch_size": 2}, "--batch-size must be at least 3, got 2"),
        ("ce,crd", {"mixed": True}, "crd needs whole labels"),
        ("ce,dkd", {"mixed": True}, "dkd needs whole labels"),
        *(
            (f"ce,{name}", {"batch_size": 1}, "--batch-size must be at least 2, got 1")
            for name in ("dist", "sp", "pkt", "rkd-distance", "cc", "srd")
        ),
    ],
)
def test_a_term_says_what_it_needs_of_the_data(loss: str, options: dict, message: str) -> None:
    specs = terms.parse(loss)
    with pytest.raises(UserError) as error:
        loss_checks.check(specs, **{"classes": 4, "batch_size": 16, "mixed": False} | options)
    assert message in str(error.value)


@pytest.mark.heavy
def test_a_term_needs_no_more_than_it_says() -> None:
    for name, row in terms.TERMS.items():
        if row.of_texts or row.against is not None:  # an attack stands beside these
            continue
        at = f"@{layers(teacher())}" if name in LAYERED else "@2,6" if name == "heads" else ""
        classes, images = row.classes, row.images
        several = row.label_kind == "several"
        plain = "bce" if several else "ce"
        loss = f"{plain},{name}{at}" if name != plain else name
        check(name, objective(loss, classes=classes), [images], classes, several=several)
    check("dist:1:intra=0", objective("dist:1:intra=0"), [1])


@pytest.mark.parametrize(
    ("loss", "left"),
    [
        ("srd:1", "2 of the 14 weights"),
        ("sp", "2 of the 14 weights"),
        ("fitnet@2=layer1", "10 of the 14 weights"),
        ("heads@2,6", "6 of the 14 weights"),
    ],
)
def test_a_loss_that_leaves_weights_as_they_are_is_refused(loss: str, left: str) -> None:
    with pytest.raises(UserError) as error:
        check(loss, objective(loss))
    assert f"--loss {loss} sends no gradient to {left}" in str(error.value)
    assert "add a term on the outputs" in str(error.value)
    check(f"kd,{loss}", objective(f"kd,{loss}"))


def test_frozen_weights_and_those_that_no_output_needs_are_no_fault() -> None:
    frozen = objective("srd:1")
    frozen.student.network[-1].requires_grad_(False)
    check("srd:1", frozen)
    spare = objective("ce")
    spare.student.network.register_parameter("mask_token", nn.Parameter(torch.zeros(3)))
    check("ce", spare)


def test_peers_and_a_mean_teacher_are_checked_as_students_of_teachers_are() -> None:
    specs = terms.parse("ce,kd:1:temperature=1")
    network = student()
    made = terms.build(specs, network, sample=SHAPE, classes=4)
    check("ce,kd", MeanTeacher(network, made, decay=0.9))
    check("ce,kd", Mutual(network, [student(seed=1), student("mlp:8", seed=2)], made))
    only = terms.build(terms.parse("heads@2,6"), network,
                       sample=SHAPE, classes=4)  # fmt: skip
    with pytest.raises(UserError, match="sends no gradient"):
        check("heads@2,6", MeanTeacher(network, only, decay=0.9))


def test_the_check_leaves_weights_averages_memories_and_random_numbers_alone() -> None:
    of = objective("ce,crd:0.8:negatives=8,mgd@layer1=layer1", name="test_resnet")
    before = {name: value.clone() for name, value in of.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check("ce,crd,mgd", of)
    assert torch.equal(torch.rand(2), expected)
    for name, value in of.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name
    assert all(weight.grad is None for weight in of.parameters())


def test_batch_norm_of_one_image_is_one_line() -> None:
    of = Distillation(student("test_resnet"), terms.build(terms.parse("ce"), student()))
    narrow = networks.Classifier(
        nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    )
    of.student = narrow
    with pytest.raises(UserError, match=r"batch of 1 image \(Expected more than 1 value.*raise"):
        check("ce", of, [16, 1])
    check("ce", of, [16, 2])


@pytest.mark.parametrize("least", [2, 3, 4, 7])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_no_process_gets_less_of_a_batch_than_the_loss_needs(world: int, least: int) -> None:
    floor = batching.min_shared_size(world, least)
    for size in (floor, floor + 1, 2 * floor + 3):
        for n in range(floor, 4 * size):
            parts = batching.split_rows(np.arange(n), size, world, least)
            assert np.array_equal(np.concatenate(parts), np.arange(n))
            assert all(len(part) == size for part in parts[:-1])
            shares = [
                len(batching.share_positions(len(p), r, world)) for p in parts for r in range(world)
            ]
            assert min(shares) >= least


def test_too_few_images_for_the_loss_are_one_line() -> None:
    examples = support.easy(n=8)
    with pytest.raises(UserError, match="needs 3 in a batch, got 2"):
        batching.prepare_resident(examples, 2, torch.device("cpu"), least=3)
    with pytest.raises(UserError, match="2 processes need 3 images each of every batch, so 8 in"):
        batching.prepare_resident(examples, 6, torch.device("cpu"), 2, least=3)
    assert batching.prepare_resident(examples, 3, torch.device("cpu"), least=3).sizes == [3, 5]


ODD = st.sampled_from(["0", "1", "0.5", "-1", "nan", "inf", "1e-30", "1e30", "x", "", "21"])


def _values(name: str, key: str) -> st.SearchStrategy[str]:
    """Mostly values of a parameter that are in its range."""
    allowed = loss_spec.parameter_range(terms.TERMS[name].function, key)
    whole = isinstance(loss_spec.parameters(terms.TERMS[name].function)[key], int)
    assert allowed is not None
    low, high = allowed.low, min(allowed.high, 100)
    inside = st.integers(int(low), int(high)) if whole else st.floats(low, high)
    return st.one_of(inside.map(str), inside.map(str), inside.map(str), ODD)


@st.composite
def written(draw: st.DrawFn) -> str:
    """One to three terms with any parameters, at layers that are there."""
    pieces, names = [], st.sampled_from(sorted(terms.TERMS))
    for name in draw(st.lists(names, min_size=1, max_size=3, unique=True)):
        known = sorted(loss_spec.parameters(terms.TERMS[name].function))
        chosen = draw(st.lists(st.sampled_from(known), max_size=2, unique=True)) if known else []
        weights = st.one_of(st.just(""), st.just(":0.5"), st.just(":1e9"), ODD.map(":{}".format))
        weight = draw(weights)
        given = "".join(f":{key}={draw(_values(name, key))}" for key in chosen)
        at = "@2=layer1,6=layer2" if name in LAYERED else "@2,6" if name == "heads" else ""
        pieces.append(f"{name}{weight}{given}{at}")
    return ",".join(pieces)


@pytest.mark.heavy
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    loss=written(),
    n=st.integers(1, 5),
    classes=st.integers(2, 4),
    mixed=st.booleans(),
)
def test_any_loss_either_takes_a_step_or_is_refused(
    loss: str, n: int, classes: int, mixed: bool
) -> None:
    try:
        specs = terms.parse(loss)
        loss_checks.check(specs, classes=classes, batch_size=n, mixed=mixed)
        of = objective(loss, classes=classes)
        check(loss, of, [n], classes, mixed=mixed)
    except UserError:
        return
    found = of(_batch(n, classes, mixed))
    torch.stack(list(found.values())).sum().backward()
    for value in itertools.chain(found.values(), (w.grad for w in of.parameters())):
        assert value is None or torch.isfinite(value).all()


def _batch(n: int, classes: int, mixed: bool) -> Batch:
    """Other images than the check's own."""
    made = dry_run.noise_batch(n, SHAPE, classes, images=32, mixed=mixed)
    images = torch.rand(made.images.shape, generator=torch.Generator().manual_seed(7))
    return Batch(images, made.labels.flip(0), class_shares=made.class_shares, index=made.index)


class _Skipping(nn.Module):
    """Leaves its inner layer out in training, at random, and has a weight that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(256, 256), nn.Linear(256, 4)
        self.mask_token = nn.Parameter(torch.zeros(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        flat = images.flatten(1)
        if not self.training or torch.rand(()) < 0.5:
            flat = self.inner(flat)
        return self.head(flat)


@pytest.mark.parametrize("seed", range(4))
def test_layers_that_are_left_out_at_random_are_no_fault(monkeypatch, seed: int) -> None:
    network = networks.Classifier(_Skipping())
    of = Distillation(network, terms.build(terms.parse("ce"), network))
    monkeypatch.setattr(dry_run, "SEED", seed)
    check("ce", of)
    assert all(weight.requires_grad for weight in of.parameters())
    two = SimpleNamespace(device=ON.device, num_processes=2, autocast=ON.autocast)
    dry_run.check(of, "ce", (16,), shape=SHAPE, classes=4, images=32, on=two)
    # What never has a gradient would be waited for; what only now has none must stay trained.
    fixed = [name for name, weight in of.named_parameters() if not weight.requires_grad]
    assert fixed == ["student.network.mask_token"]


def test_a_memory_needs_images_that_have_numbers() -> None:
    specs = terms.parse("ce,crd")
    with pytest.raises(UserError, match="remembers each training image by its number, and images"):
        terms.build(specs, student(), (teacher(),), sample=SHAPE, classes=4, images=0)
