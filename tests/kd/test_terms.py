"""Terms of a loss on real small networks: what flows where, and what is refused."""

from dataclasses import replace

import pytest
import torch
from terms_support import (
    CLASSES,
    EMBEDDED,
    LAYERED,
    PLAIN,
    SHAPE,
    batches,
    layers,
    objective,
    student,
    teacher,
)
from torch import nn

from dsdistill.harness.errors import UserError
from kd.data import batching
from kd.losses import feature, relation
from kd.models import networks
from kd.objectives import loss_checks, terms
from kd.objectives.schemes import Distillation
from kd.objectives.step_outputs import StepOutputs
from kd.recipe import Recipe
from kd.training.loop import train


@pytest.mark.parametrize(
    ("name", "taught_by"),
    [(name, "test_resnet") for name in (*LAYERED, *EMBEDDED, *PLAIN)]
    + [(name, "test_vit") for name in (*LAYERED, *EMBEDDED)],
)
def test_every_term_moves_the_student_and_not_the_teacher(name: str, taught_by: str) -> None:
    theirs = teacher(taught_by)
    loss = f"{name}@{layers(theirs)}" if name in LAYERED else name
    wanted = objective(loss, theirs)
    batch = next(batches().in_order())
    value = wanted(batch)[name]
    assert torch.isfinite(value)
    value.backward()
    moved = [p.grad for p in wanted.student.parameters() if p.grad is not None]
    assert any(grad.abs().max() > 0 for grad in moved)
    assert all(torch.isfinite(grad).all() for grad in moved)
    assert all(p.grad is None for p in theirs.parameters())


def test_a_term_is_its_weight_times_its_function_of_the_layers() -> None:
    theirs = teacher()
    ours = objective(f"at:10@{layers(theirs)}", theirs)
    batch = next(batches().in_order())
    found = ours(batch)["at"]
    s = {}
    network = ours.student.network
    x = batch.images
    for i, layer in enumerate(network.children()):
        x = s[i] = layer(x)
    hooked = {}
    for name in ("layer1", "layer2", "stages.0", "stages.1"):
        module = dict(theirs.classifier.network.named_modules()).get(name)
        if module is not None:
            module.register_forward_hook(lambda m, a, o, name=name: hooked.update({name: o}))
    theirs(batch.images)
    names = list(hooked)
    expected = 0.0
    for i, name in zip((2, 6), names, strict=True):
        size = min(s[i].shape[-1], hooked[name].shape[-1])
        pool = nn.AdaptiveAvgPool2d(size)
        expected += feature.attention_transfer(pool(s[i]), pool(hooked[name])).item()
    assert found.item() == pytest.approx(10 * expected, rel=1e-4)


def test_relations_compare_the_inputs_of_the_classifiers() -> None:
    theirs = teacher()
    ours = objective("sp:2", theirs)
    batch = next(batches().in_order())
    found = ours(batch)["sp"]
    embedding = ours.student.network[:-1](batch.images)
    inside = theirs.classifier.network
    theirs_embedding = inside.forward_head(inside.forward_features(batch.images), pre_logits=True)
    expected = 2 * relation.similarity_preserving(embedding, theirs_embedding)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_irg_compares_pooled_layers_and_how_they_change() -> None:
    theirs = teacher()
    ours = objective(f"irg:2:transformation=3@{layers(theirs)}", theirs)
    batch = next(batches().in_order())
    found = ours(batch)["irg"]
    x, student = batch.images, []
    for i, layer in enumerate(ours.student.network):
        x = layer(x)
        if i in (2, 6):
            student.append(x.mean((2, 3)))
    network, taught = theirs.classifier.network, []
    for name in (pair.partition("=")[2] for pair in layers(theirs).split(",")):
        network.get_submodule(name).register_forward_hook(
            lambda m, a, out: taught.append(out.mean((2, 3)))
        )
    theirs(batch.images)
    expected = 2 * relation.instance_graph(student, taught, transformation=3)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_irg_of_one_layer_needs_to_be_without_changes() -> None:
    with pytest.raises(UserError, match="name two layers or more, as in irg@layer2,layer3"):
        objective("irg")
    batch = next(batches().in_order())
    assert objective("irg:transformation=0")(batch)["irg"] > 0


def test_projectors_are_trained_and_stored_and_not_part_of_the_student() -> None:
    theirs = teacher()
    ours = objective(f"fitnet:0.1@{layers(theirs)}", theirs)
    before = {name: value.clone() for name, value in ours.checkpoint_state().items()}
    train(ours, batches(), Recipe(steps=3, lr=0.01, batch_size=16), 0)
    projected = [name for name in before if "projectors" in name]
    assert projected
    assert not any(torch.equal(before[name], ours.checkpoint_state()[name]) for name in projected)
    assert not any("projectors" in name for name in ours.student.network.state_dict())


def test_self_distillation_through_shallow_heads() -> None:
    network = student()
    specs = terms.parse("ce:1,heads:1@2,6")
    made = terms.build(specs, network, sample=SHAPE, classes=CLASSES)
    ours = Distillation(network, made)
    assert not ours.needs_answers
    found = ours(next(batches().in_order()))
    assert set(found) == {"ce", "heads"}
    found["heads"].backward()
    last = list(network.parameters())[-1]
    assert last.grad is None  # the deepest classifier teaches, and does not learn from the heads
    assert next(network.parameters()).grad is not None


def test_a_contrastive_memory_follows_the_images_and_is_stored() -> None:
    ours = objective("crd:0.8:negatives=8")
    batch = next(batches().in_order())
    memory = {k: v.clone() for k, v in ours.checkpoint_state().items() if "memory" in k}
    assert memory
    assert torch.isfinite(ours(batch)["crd"])
    after = ours.checkpoint_state()
    name = next(k for k in memory if k.endswith("memory.student"))
    changed = (after[name] != memory[name]).any(1)
    assert batch.index is not None
    assert changed[batch.index].all()
    assert changed.sum() == len(batch)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("at", "a loss of maps needs layers"),
        ("fitnet@layer9=layer1", "unknown layer 'layer9'"),
        ("kd@2=layer1", "--loss kd takes logits, not features: leave its layers out"),
        ("crd@2=layer1,6=layer2", "crd compares one pair of layers"),
        ("at@2=embedding", "layer 'embedding' has a single position"),
    ],
)
def test_layers_that_do_not_fit(loss: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        objective(loss)
    assert message in str(error.value)


@pytest.mark.parametrize("loss", ["ce:1,sp@0=layer1", "fitnet@0=layer1", "ce:1,heads@0"])
def test_a_layer_before_all_weights_would_teach_nothing(loss: str) -> None:
    flat = networks.build("mlp:8", SHAPE, CLASSES, seed=0)  # its layer 0 flattens the image
    with pytest.raises(UserError, match="no trained weight comes before layer '0'"):
        terms.build(
            terms.parse(loss), flat, (teacher(),),
            sample=SHAPE, classes=CLASSES, images=32,
        )  # fmt: skip


def test_mixed_labels_are_refused_where_whole_ones_are_needed() -> None:
    ours = objective("dkd")
    batch = next(batches().in_order())
    with pytest.raises(ValueError, match="label"):
        ours(replace(batch, labels=torch.rand(16, 4)))


def test_a_term_of_features_is_the_mean_over_teachers() -> None:
    network = student()
    both = teacher(), teacher(seed=2)
    batch = next(batches().in_order())
    specs = terms.parse("sp:2,rkd-distance")
    options = {"sample": SHAPE, "classes": CLASSES, "images": 32}
    values = [
        Distillation(network, terms.build(specs, network, several, **options), several)(batch)
        for several in (both[:1], both[1:], both)
    ]
    for name in ("sp", "rkd-distance"):
        first, second, mean = (value[name].item() for value in values)
        assert first != pytest.approx(second, rel=1e-3)
        assert mean == pytest.approx((first + second) / 2, rel=1e-5)


@pytest.mark.parametrize("by_label", [False, True])
def test_terms_of_logits_take_several_teachers_each_in_its_own_way(by_label: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, first, second = 3 * torch.randn(3, 6, 4, generator=generator)
    batch = batching.Batch(torch.zeros(6, 1, 1, 1), torch.arange(6) % 4)
    seen = StepOutputs(batch, outputs, (first, 20 * second), by_label)
    plain = [-x.log_softmax(1)[torch.arange(6), batch.labels] for x in seen.teacher_logits]
    # Two teachers' weights are 1 - softmax of their cross-entropies; alike, a half each.
    weights = 1 - torch.stack(plain).softmax(0) if by_label else torch.full((2, 6), 0.5)

    def measured(name: str) -> float:
        (term,) = terms.build(terms.parse(f"{name}:1"), student())
        return term(seen).item()

    mean = sum(w[:, None] * x for w, x in zip(weights, seen.teacher_logits, strict=True))
    assert measured("logits") == pytest.approx((outputs - mean).square().mean().item(), rel=1e-5)

    def standard(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)

    p = sum(
        w[:, None] * (standard(x) / 2).softmax(1)
        for w, x in zip(weights, seen.teacher_logits, strict=True)
    )
    log_q = (standard(outputs) / 2).log_softmax(1)
    expected = 4 * (p * (p.log() - log_q)).sum(1).mean()
    assert measured("ls") == pytest.approx(expected.item(), rel=1e-4)
    p = sum(
        w[:, None] * (x / 4).softmax(1) for w, x in zip(weights, seen.teacher_logits, strict=True)
    )
    expected = 16 * (p * (p.log() - (outputs / 4).log_softmax(1))).sum(1).mean()
    assert measured("kd") == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["kd", "fm", "dkd", "dist", "ls", "logits", "hard"])
def test_the_same_teacher_twice_is_that_teacher(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    outputs, answers = 3 * torch.randn(2, 6, 4, generator=generator)
    batch = batching.Batch(torch.zeros(6, 1, 1, 1), torch.arange(6) % 4)
    (term,) = terms.build(terms.parse(name), student())
    once, twice = (term(StepOutputs(batch, outputs, (answers,) * n)).item() for n in (1, 2))
    assert twice == pytest.approx(once, rel=1e-4)


def test_a_new_term_needs_no_more_than_a_row_of_the_table(monkeypatch) -> None:
    row = replace(terms.TERMS["kd"], weight=3, images=5, whole=True)
    monkeypatch.setitem(terms.TERMS, "own", row)
    (term,) = terms.parse("own:temperature=2")
    assert (term.weight, term.min_images, term.parameters) == (3, 5, {"temperature": 2.0})
    with pytest.raises(UserError, match="own needs whole labels"):
        loss_checks.check((term,), classes=4, batch_size=16, mixed=True)
    with pytest.raises(UserError, match=r"own compares the images .* at least 5, got 4"):
        loss_checks.check((term,), classes=4, batch_size=4, mixed=False)
    batch = next(batches().in_order())
    losses = objective("kd:1:temperature=2,own:2:temperature=2")(batch)
    assert losses["own"].item() == pytest.approx(2 * losses["kd"].item(), rel=1e-6)


def test_stages_from_deep_to_shallow_are_refused() -> None:
    with pytest.raises(UserError, match="takes layers from shallow to deep, and '2' has a larger"):
        objective("review@6=layer2,2=layer1")
