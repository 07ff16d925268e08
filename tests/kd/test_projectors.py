"""Projectors against NumPy in float64, and between real networks whose shapes do not match."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from dsdistill.harness.errors import UserError
from kd.losses import contrastive, feature
from kd.models import networks
from kd.objectives.projectors import (
    Embedder,
    EmbeddingMemory,
    Fusion,
    GaussianRegressor,
    MaskedGenerator,
    Projector,
    Regressor,
    match_sizes,
)
from kd.objectives.taps import FeatureLayout, Taps, as_map, probe

IMAGE = (32, 32, 3)
STUDENT = FeatureLayout("student", "nchw", 3, (4, 6))
TEACHER = FeatureLayout("teacher", "tokens", 5, (2, 3), 1)
ALONE = (
    Regressor,
    GaussianRegressor,
    MaskedGenerator,
    Projector,
    Embedder,
)  # of one pair of layers


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def _features(n: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return _normal(n, 3, 4, 6, dtype=dtype), _normal(n, 7, 5, seed=1, dtype=dtype)


def _seeded(make: Callable[..., Any], *arguments: object, **options: object) -> Any:
    torch.manual_seed(0)
    return make(*arguments, **options)


def _pooled(maps: np.ndarray) -> np.ndarray:
    """(n, c, 4, 6) to (n, c, 2, 3), by means of 2x2 blocks."""
    n, c, h, w = maps.shape
    return maps.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))


def _theirs(teacher: Tensor) -> np.ndarray:
    """The teacher's tokens without the class token, as maps."""
    return teacher.numpy()[:, 1:].reshape(-1, 2, 3, 5).transpose(0, 3, 1, 2)


def _array(value: Tensor | None) -> np.ndarray:
    assert value is not None
    return value.detach().double().numpy()


def _convolve(maps: np.ndarray, layer: nn.Module) -> np.ndarray:
    """A convolution with zeros outside, written as its sum over the places of the kernel."""
    assert isinstance(layer, nn.Conv2d)
    weight, pad = _array(layer.weight), layer.kernel_size[0] // 2
    (n, _, h, w), out = maps.shape, layer.out_channels
    padded = np.pad(maps, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    total = np.zeros((n, out, h, w))
    for y in range(2 * pad + 1):
        for x in range(2 * pad + 1):
            part = padded[:, :, y : y + h, x : x + w]
            total += np.einsum("oc,nchw->nohw", weight[:, :, y, x], part)
    return total if layer.bias is None else total + _array(layer.bias)[:, None, None]


def _batch_norm(maps: np.ndarray) -> np.ndarray:
    mean, var = maps.mean((0, 2, 3), keepdims=True), maps.var((0, 2, 3), keepdims=True)
    return (maps - mean) / np.sqrt(var + 1e-5)


def _nearest(maps: np.ndarray, h: int, w: int) -> np.ndarray:
    rows = np.arange(h) * maps.shape[2] // h
    columns = np.arange(w) * maps.shape[3] // w
    return maps[:, :, rows][:, :, :, columns]


def _same(found: Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(_array(found), expected, rtol=1e-10, atol=1e-10)


def test_regressor_closed_form() -> None:
    student, teacher = _features()
    layer = _seeded(Regressor, STUDENT, TEACHER).double()
    ours, theirs = layer(student, teacher)
    _same(ours, _convolve(_pooled(student.numpy()), layer.convolution))
    _same(theirs, _theirs(teacher))
    normed = _seeded(Regressor, STUDENT, TEACHER, norm=True).double()
    expected = _batch_norm(_convolve(_pooled(student.numpy()), normed.convolution))
    _same(normed(student, teacher)[0], expected)


def test_of_equal_shapes_the_regressor_is_no_identity() -> None:
    layout = FeatureLayout("both", "vector", 3)
    layer = _seeded(Regressor, layout, layout).double()
    x = _normal(4, 3)
    ours, theirs = layer(x, x)
    expected = x.numpy() @ _array(layer.convolution.weight)[:, :, 0, 0].T
    _same(ours, (expected + _array(layer.convolution.bias))[:, :, None, None])
    _same(theirs, x.numpy()[:, :, None, None])


def test_variational_closed_form_and_its_first_variance() -> None:
    student, teacher = _features()
    layer = _seeded(GaussianRegressor, STUDENT, TEACHER).double()
    mean, raw_variance, theirs = layer(student, teacher)
    expected = _pooled(student.numpy())
    for i, convolution in enumerate(layer.mean[::2]):
        expected = _convolve(np.maximum(expected, 0) if i else expected, convolution)
    _same(mean, expected)
    _same(theirs, _theirs(teacher))
    # float32 parameters
    np.testing.assert_allclose(np.log1p(np.exp(_array(raw_variance))) + 1e-5, [5] * 5, rtol=1e-6)
    loss = feature.vid(mean, raw_variance, theirs)
    nll = 0.5 * ((_theirs(teacher) - expected) ** 2 / 5 + math.log(5)).mean()
    assert loss.item() == pytest.approx(nll, rel=1e-5)


def test_generator_closed_form_without_dropped_positions() -> None:
    student, teacher = _features()
    layer = _seeded(MaskedGenerator, STUDENT, TEACHER, ratio=0).double()
    hidden = _convolve(_pooled(student.numpy()), layer.align)
    hidden = np.maximum(_convolve(hidden, layer.generate[0]), 0)
    ours, theirs = layer(student, teacher)
    _same(ours, _convolve(hidden, layer.generate[2]))
    _same(theirs, _theirs(teacher))


def test_generator_drops_whole_positions_at_its_ratio() -> None:
    wide = FeatureLayout("maps", "nchw", 4, (40, 50))
    layer = _seeded(MaskedGenerator, wide, wide)
    for convolution in (layer.align, layer.generate[0], layer.generate[2]):
        nn.init.dirac_(convolution.weight)  # each passes on what it gets
        nn.init.zeros_(convolution.bias)
    maps = torch.ones(2, 4, 40, 50)
    torch.manual_seed(1)
    first, again = layer(maps, maps)[0], layer(maps, maps)[0]
    dropped = (first == 0).float()
    torch.testing.assert_close(dropped, dropped[:, :1].expand_as(dropped))
    # 4000 draws: the standard deviation of the share is 0.0075
    assert dropped.mean().item() == pytest.approx(0.65, abs=0.03)
    assert not torch.equal(first, again)
    torch.manual_seed(1)
    torch.testing.assert_close(layer(maps, maps)[0], first, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), got 1"):
        MaskedGenerator(wide, wide, ratio=1)


def test_fusion_closed_form() -> None:
    students = [FeatureLayout("a", "nchw", 2, (8, 8)), FeatureLayout("b", "nchw", 3, (4, 4))]
    teachers = [FeatureLayout("a", "nchw", 5, (4, 4)), FeatureLayout("b", "nhwc", 6, (2, 2))]
    shallow, deep = _normal(4, 2, 8, 8), _normal(4, 3, 4, 4, seed=1)
    targets = [_normal(4, 5, 4, 4, seed=2), _normal(4, 2, 2, 6, seed=3)]
    layer = _seeded(Fusion, students, teachers).double()
    pairs = layer([shallow, deep], targets)

    def inner(maps: Tensor, stage: int) -> np.ndarray:
        return _batch_norm(_convolve(maps.numpy(), layer.inner[stage][0]))

    def outer(maps: np.ndarray, stage: int) -> np.ndarray:
        return _batch_norm(_convolve(maps, layer.outer[stage][0]))

    residual = _nearest(inner(deep, 1), 2, 2)
    _same(pairs[1][0], outer(residual, 1))
    own, behind = inner(shallow, 0), _nearest(residual, 8, 8)
    gates = _convolve(np.concatenate([own, behind], 1), layer.attention[0])
    gates = 1 / (1 + np.exp(-gates))
    fused = gates[:, :1] * own + gates[:, 1:] * behind
    _same(pairs[0][0], outer(_nearest(fused, 4, 4), 0))
    _same(pairs[0][1], targets[0].numpy())
    _same(pairs[1][1], targets[1].numpy().transpose(0, 3, 1, 2))


def test_projector_and_embed_closed_forms() -> None:
    student, teacher = _features()
    ours, theirs = student.numpy().mean((2, 3)), teacher.numpy()[:, 1:].mean(1)
    projector = _seeded(Projector, STUDENT, TEACHER).double()
    found = projector(student, teacher)
    _same(found[0], ours @ _array(projector.linear.weight).T + _array(projector.linear.bias))
    _same(found[1], theirs)
    embed = _seeded(Embedder, STUDENT, TEACHER, dim=8).double()
    for rows, layer, unit in zip(
        (ours, theirs), (embed.student, embed.teacher), embed(student, teacher), strict=True
    ):
        projected = rows @ _array(layer.weight).T + _array(layer.bias)
        expected = projected / np.linalg.norm(projected, axis=1, keepdims=True)
        np.testing.assert_allclose(_array(unit), expected, atol=1e-6)  # float32


def test_resized_takes_the_smaller_of_each_axis() -> None:
    a, b = _normal(2, 3, 4, 3), _normal(2, 5, 2, 6)
    left, right = match_sizes(a, b)
    _same(left, a.numpy().reshape(2, 3, 2, 2, 3).mean(3))
    _same(right, b.numpy().reshape(2, 5, 2, 3, 2).mean(4))
    assert match_sizes(left, right) == (left, right)  # nothing to do, nothing copied


@pytest.mark.parametrize("make", ALONE)
def test_initial_weights_follow_the_global_seed(make: Callable[..., nn.Module]) -> None:
    first, again = (_seeded(make, STUDENT, TEACHER).state_dict() for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    torch.manual_seed(1)
    other = make(STUDENT, TEACHER).state_dict()
    assert any(not torch.equal(other[name], value) for name, value in first.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", ALONE)
def test_half_precision_features_are_taken(
    make: Callable[..., nn.Module], dtype: torch.dtype
) -> None:
    layer = _seeded(make, STUDENT, TEACHER).eval()
    halves = _features(dtype=dtype)
    runs = []
    for features in (halves, tuple(x.float() for x in halves)):
        torch.manual_seed(0)
        runs.append(layer(*features)[0])
    assert runs[0].dtype == torch.float32
    # 10 bits of a float16, 7 of a bfloat16, in the averages over positions
    torch.testing.assert_close(runs[0], runs[1], atol=0.02, rtol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(0)
        inside = layer(*halves)[0]
    assert inside.dtype == (torch.float32 if make is Embedder else torch.bfloat16)
    torch.testing.assert_close(inside.float(), runs[1], atol=0.05, rtol=0.05)


def test_fusion_takes_half_precision_features() -> None:
    layer = _seeded(Fusion, [STUDENT, STUDENT], [TEACHER, TEACHER])
    student, teacher = _features(dtype=torch.bfloat16)
    outside = layer([student] * 2, [teacher] * 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer([student] * 2, [teacher] * 2)
    for (a, _), (b, _) in zip(outside, inside, strict=True):
        assert (a.dtype, b.dtype) == (torch.float32, torch.bfloat16)
        # Standardised values of about 1: seven bits, and batch norm over 24 positions.
        torch.testing.assert_close(b.float(), a, atol=0.1, rtol=0.1)


def _resnet() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=4)


def _beit() -> nn.Module:
    small: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
    }
    return timm.create_model("beit_base_patch16_224", num_classes=4, **small)


def _swin() -> nn.Module:
    small: dict[str, Any] = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12}
    name = "swin_tiny_patch4_window7_224"
    return timm.create_model(name, num_classes=4, depths=(1, 1), num_heads=(2, 2), **small)


def _resnet18() -> nn.Module:
    return torchvision.models.resnet18(num_classes=4)


def _vit() -> nn.Module:
    return timm.create_model("test_vit", num_classes=4, img_size=32, patch_size=8)


def _convnet() -> nn.Module:
    return networks.build("convnet:8", IMAGE, 4).network


# Student, its layers, teacher, its layers; from shallow to deep, the last a vector.
ACROSS = [
    (_resnet, ("layer1", "layer2", "embedding"), _vit, ("blocks.1", "blocks.4", "embedding")),
    (_convnet, ("3", "7", "embedding"), _beit, ("blocks.0", "blocks.1", "embedding")),
    (_beit, ("blocks.0", "blocks.1", "embedding"), _swin, ("layers.0", "layers.1", "embedding")),
    (_swin, ("layers.0", "layers.1", "embedding"), _resnet18, ("layer1", "layer3", "embedding")),
    (_resnet18, ("layer2", "layer3", "layer4"), _convnet, ("3", "7", "embedding")),
]


@pytest.mark.parametrize(("student", "ours", "teacher", "theirs"), ACROSS)
def test_any_network_learns_from_any_other_through_every_projector(
    student: Callable[[], nn.Module],
    ours: tuple[str, ...],
    teacher: Callable[[], nn.Module],
    theirs: tuple[str, ...],
) -> None:
    torch.manual_seed(0)
    small, large = student(), teacher()
    taps = Taps(small, ours), Taps(large, theirs)
    s, t = probe(small, taps[0], IMAGE), probe(large, taps[1], IMAGE)
    pairs = [(s[a], t[b]) for a, b in zip(ours, theirs, strict=True)]
    regressor, variational, generator = (
        nn.ModuleList(make(*pair) for pair in pairs)
        for make in (Regressor, GaussianRegressor, MaskedGenerator)
    )
    fusion, projector, embed = (
        Fusion(*zip(*pairs, strict=True)),
        Projector(*pairs[2]),
        Embedder(*pairs[2]),
    )
    memory = EmbeddingMemory(10, negatives=4)
    images = _normal(4, 3, 32, 32, dtype=torch.float32)
    small(images)
    large(images)
    read = taps[0].read(), taps[1].read()
    features = [(read[0][a], read[1][b]) for a, b in zip(ours, theirs, strict=True)]
    terms = []
    for i, (f, (a, b)) in enumerate(zip(features, pairs, strict=True)):
        terms.append(feature.fitnet(*regressor[i](*f)))
        terms.append(feature.vid(*variational[i](*f)))
        terms.append(feature.mgd(*generator[i](*f)))
        terms.append(feature.attention_transfer(*match_sizes(as_map(f[0], a), as_map(f[1], b))))
    columns = [list(column) for column in zip(*features, strict=True)]
    terms += [feature.hierarchical_context(*pair) for pair in fusion(*columns)]
    terms.append(feature.log_sum(*projector(*features[2])))
    scores = memory(*embed(*features[2]), torch.arange(4))
    log_z = {"student_log_z": memory.log_z[0], "teacher_log_z": memory.log_z[1]}
    terms.append(contrastive.crd(*scores, **log_z, n_data=memory.n_data))
    total = torch.stack(terms).sum()
    assert torch.isfinite(total)
    total.backward()
    assert all(p.grad is None for p in large.parameters())
    first = next(p for p in small.parameters() if p.ndim > 1)
    assert first.grad is not None
    assert first.grad.abs().sum() > 0
    for module in (regressor, variational, generator, fusion, projector, embed):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("make", [*ALONE, Fusion])
def test_gradients_reach_the_student_and_the_projector_but_not_the_teacher(
    make: Callable[..., nn.Module],
) -> None:
    student, teacher = (x.requires_grad_() for x in _features())
    if make is Fusion:
        layer = _seeded(make, [STUDENT], [TEACHER]).double()
        outputs = layer([student], [teacher])[0]
    else:
        layer = _seeded(make, STUDENT, TEACHER).double()
        outputs = layer(student, teacher)
    torch.stack([(x**3).sum() for x in outputs if x.requires_grad]).sum().backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def _unit(n: int, d: int, seed: int) -> Tensor:
    return nn.functional.normalize(_normal(n, d, seed=seed, dtype=torch.float32), dim=1)


def test_a_step_of_the_memory_is_that_of_the_paper() -> None:
    memory = EmbeddingMemory(9, dim=6, negatives=5, momentum=0.3, seed=3)
    before = {name: _array(value).copy() for name, value in memory.state_dict().items()}
    index = torch.tensor([4, 0, 7])
    ours, theirs = _unit(3, 6, 0), _unit(3, 6, 1)
    torch.manual_seed(0)
    rows = memory.draw(index).numpy()
    torch.manual_seed(0)
    found = memory(ours, theirs, index, temperature=0.1)
    for i, (scores, anchors, other, own) in enumerate(
        zip(found, (ours, theirs), ("teacher", "student"), ("student", "teacher"), strict=True)
    ):
        # float32 products, divided by 0.1
        expected = np.einsum("nd,nkd->nk", _array(anchors), before[other][rows]) / 0.1
        np.testing.assert_allclose(_array(scores), expected, atol=1e-5)
        log_z = math.log(9 * np.exp(expected).mean())
        assert memory.log_z[i].item() == pytest.approx(log_z, abs=1e-5)
        moved = before[own].copy()
        moved[index] = 0.3 * moved[index] + 0.7 * _array(anchors)
        moved /= np.linalg.norm(moved, axis=1, keepdims=True)
        np.testing.assert_allclose(_array(getattr(memory, own)), moved, atol=1e-6)


def test_normalisers_are_those_of_the_first_batch() -> None:
    memory, index = EmbeddingMemory(9, dim=6), torch.tensor([1, 2])
    memory(_unit(2, 6, 0), _unit(2, 6, 1), index)
    first = memory.log_z.clone()
    assert torch.isfinite(first).all()
    memory(_unit(2, 6, 2), _unit(2, 6, 3), index)
    torch.testing.assert_close(memory.log_z, first, rtol=0, atol=0)


def test_the_memory_is_in_checkpoints() -> None:
    memory, index = EmbeddingMemory(9, dim=6, seed=1), torch.tensor([1, 2])
    memory(_unit(2, 6, 0), _unit(2, 6, 1), index)
    resumed = EmbeddingMemory(9, dim=6, seed=2)
    resumed.load_state_dict(memory.state_dict())
    steps = []
    for each in (memory, resumed):
        torch.manual_seed(5)
        steps.append((*each(_unit(2, 6, 2), _unit(2, 6, 3), index), each.student, each.log_z))
    torch.testing.assert_close(steps[0], steps[1], rtol=0, atol=0)
    assert not list(memory.parameters())


def test_draws_are_the_image_itself_and_uniform_rows() -> None:
    memory = EmbeddingMemory(8, dim=2, negatives=16384)
    assert memory.negatives == 7  # no more than there are others
    index = torch.arange(8).repeat(500)
    torch.manual_seed(0)
    rows = memory.draw(index)
    assert rows.shape == (4000, 8)
    assert torch.equal(rows[:, 0], index)
    counts = np.bincount(rows[:, 1:].flatten().numpy(), minlength=8)
    assert len(counts) == 8
    # 28000 draws: 3500 of each, with a standard deviation of 55
    np.testing.assert_allclose(counts, 3500, atol=250)
    torch.manual_seed(0)
    assert torch.equal(memory.draw(index), rows)
    assert EmbeddingMemory(100, dim=2, negatives=3).draw(index).shape == (4000, 4)
    with pytest.raises(UserError, match="needs 2 to train on, got 1"):
        EmbeddingMemory(1)


def test_the_first_memory_is_its_seeds_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    memory = EmbeddingMemory(9, dim=6, seed=1)
    assert torch.equal(torch.rand(1), expected)
    torch.testing.assert_close(memory.student.norm(dim=1), torch.ones(9))
    assert torch.equal(memory.student, EmbeddingMemory(9, dim=6, seed=1).student)
    assert not torch.equal(memory.student, EmbeddingMemory(9, dim=6, seed=2).student)
    assert not torch.equal(memory.student, memory.teacher)


def test_two_views_of_an_image_count_by_their_mean() -> None:
    memory = EmbeddingMemory(9, dim=6)
    old, views = _array(memory.student[3]), _unit(2, 6, 0)
    memory(views, views, torch.tensor([3, 3]))
    expected = 0.5 * old + 0.5 * _array(views).mean(0)
    np.testing.assert_allclose(
        _array(memory.student[3]), expected / np.linalg.norm(expected), atol=1e-6
    )


def test_the_gradient_is_that_against_the_memory_before_the_step() -> None:
    memory, index = EmbeddingMemory(9, dim=6, negatives=4), torch.tensor([1, 2])
    before = memory.teacher.clone()
    ours = _unit(2, 6, 0).requires_grad_()
    torch.manual_seed(0)
    rows = memory.draw(index)
    torch.manual_seed(0)
    memory(ours, _unit(2, 6, 1), index)[0].sum().backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, before[rows].sum(1) / 0.07)


def test_autocast_does_not_round_the_memory() -> None:
    plain, mixed = EmbeddingMemory(9, dim=6), EmbeddingMemory(9, dim=6)
    ours, theirs, index = _unit(2, 6, 0), _unit(2, 6, 1), torch.tensor([1, 2])
    plain(ours, theirs, index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed(ours, theirs, index)
    torch.testing.assert_close(mixed.student, plain.student, rtol=0, atol=0)


def _rank(rank: int, folder: str) -> None:
    """One of two processes: a step of a memory with its share of the images, 3 and 1."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/store"
    dist.init_process_group("gloo", rendezvous, rank=rank, world_size=2)
    memory, mine = EmbeddingMemory(9, dim=6), slice(3) if rank == 0 else slice(3, 4)
    memory(_unit(4, 6, 0)[mine], _unit(4, 6, 1)[mine], torch.tensor([4, 0, 7, 0])[mine])
    arrays: dict[str, Any] = {name: value.numpy() for name, value in memory.state_dict().items()}
    np.savez(f"{folder}/{rank}.npz", **arrays)
    dist.destroy_process_group()


def test_all_processes_hold_the_memory_that_one_process_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    spawn(_rank, (str(tmp_path),), nprocs=2)
    memory = EmbeddingMemory(9, dim=6)
    memory(_unit(4, 6, 0), _unit(4, 6, 1), torch.tensor([4, 0, 7, 0]))
    with np.load(tmp_path / "0.npz") as zero, np.load(tmp_path / "1.npz") as one:
        for name in ("student", "teacher"):
            np.testing.assert_allclose(zero[name], getattr(memory, name).numpy(), atol=1e-6)
        for name in zero:
            np.testing.assert_array_equal(zero[name], one[name])
