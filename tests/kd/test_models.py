"""Networks by name, their form on disk, adapters and teachers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from dsdistill.harness.data import preprocess
from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError
from kd.models import networks, saved_models, seals, teachers
from kd.models.adapters import Adapter, build_adapter

SHAPE = (8, 8, 1)
NAMES = ("a", "b", "c")


def _images(n: int = 5, shape: networks.Shape = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).random((n, *shape), dtype=np.float32)


def _nchw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def _fitted(kind: str, shape: networks.Shape = SHAPE) -> Preprocess:
    images = np.random.default_rng(1).random((200, *shape), dtype=np.float32)
    if kind == "zca-mtt":
        return preprocess.fit_mtt(lambda size: iter([images]), shape)
    return preprocess.fit(kind, lambda size: iter([images]), shape)


def _model(name: str = "mlp:8", kind: str = "standardise", shape: networks.Shape = SHAPE):
    classifier = networks.build(name, shape, len(NAMES), seed=3).eval()
    return saved_models.Model(classifier, name, NAMES, shape, _fitted(kind, shape))


def test_convnet_is_the_default_of_the_field() -> None:
    classifier = networks.build("convnet", (28, 28, 1), 10)
    w = 128
    convolutions = (9 * 1 * w + w) + 2 * (9 * w * w + w)
    assert networks.parameter_count(classifier) == convolutions + 3 * 2 * w + (w * 9 * 10 + 10)
    assert classifier(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(("name", "width"), [("convnet:32", 32), ("mlp:16", 16)])
def test_width(name: str, width: int) -> None:
    first = next(networks.build(name, SHAPE, 3).parameters())
    assert len(first) == width


def test_seed_decides_the_weights_and_global_state_stays() -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    a, b, c = (networks.build("mlp:8", SHAPE, 3, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("name", ["resnet18", "test_vit"])
def test_timm_models_take_gray_images_of_any_size(name: str) -> None:
    classifier = networks.build(name, SHAPE, 3).eval()
    assert classifier(torch.zeros(2, 1, *SHAPE[:2])).shape == (2, 3)
    assert classifier.size == ((160, 160) if name == "test_vit" else None)
    assert not list(classifier.buffers()) or name == "resnet18"  # the resize adds none


def test_beit_is_resized_to_its_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    # The published sizes of BEiT are too large for a test: the same code with a tiny one.
    make = timm.create_model
    small: dict[str, Any] = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    monkeypatch.setattr(timm, "create_model", lambda name, **kw: make(name, **kw, **small))
    classifier = networks.build("beit_base_patch16_224", SHAPE, 3).eval()
    assert classifier.size == (224, 224)
    assert classifier(torch.zeros(1, 1, 8, 8)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convnt", "did you mean 'convnet'"),
        ("resnt18", "did you mean 'resnet18'"),
        ("convnet:0", "positive whole number"),
        ("mlp:wide", "positive whole number"),
        ("mlp:", "positive whole number"),
        ("runs/nowhere", "no folder"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        networks.check_name(name)
    with pytest.raises(UserError, match=message):
        networks.build(name, SHAPE, 3)


def test_too_small_images_are_refused() -> None:
    with pytest.raises(UserError, match="at least 8x8 pixels, got 7x9"):
        networks.build("convnet", (7, 9, 1), 3)
    with pytest.raises(UserError, match="inception_v3 cannot take 8x8"):
        networks.build("inception_v3", (8, 8, 3), 3)


def test_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **_: object) -> None:
        raise ConnectionError("no route to huggingface.co\nand more")

    monkeypatch.setattr(timm, "create_model", fail)
    looked = (
        r"weights of resnet18 \(looked for https://\S+/timm/resnet18.a1_in1k\): no route [^\n]*$"
    )
    with pytest.raises(UserError, match=looked):
        networks.build("resnet18", SHAPE, 3, pretrained=True)


@pytest.mark.parametrize("kind", preprocess.KINDS)
def test_save_and_load_bit_for_bit(tmp_path: Path, kind: str) -> None:
    model = _model(kind=kind)
    saved_models.save_run(tmp_path, model)
    loaded = saved_models.load_run(tmp_path)
    assert loaded.preprocess.same_as(model.preprocess)
    assert (loaded.name, loaded.classes, loaded.shape) == (model.name, NAMES, SHAPE)
    x = _nchw(_images())
    assert torch.equal(loaded.classifier.eval()(x), model.classifier(x))


def test_the_weights_load_into_the_bare_network(tmp_path: Path) -> None:
    model = _model("test_resnet", shape=(32, 32, 3))
    saved_models.save_run(tmp_path, model)
    bare = timm.create_model("test_resnet", in_chans=3, num_classes=3).eval()
    bare.load_state_dict(safetensors.torch.load_file(tmp_path / "student.safetensors"))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(bare(x), model.classifier(x))


def test_a_run_from_before_interpolations_resizes_as_it_did(tmp_path: Path) -> None:
    model = _model("test_vit", kind="none")
    model.classifier.interpolation = "bilinear"
    saved_models.save_run(tmp_path, model)
    card = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(
        json.dumps(
            {
                k: v
                for k, v in card.items()
                if k not in ("interpolation", "config", seals.CHECKSUMS_KEY)
            }
        )
    )
    x = _nchw(_images())
    assert torch.equal(saved_models.load_run(tmp_path).classifier.eval()(x), model.classifier(x))


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing", "card", "keys"])
def test_a_damaged_run_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    saved_models.save_run(tmp_path, _model())
    weights, card = tmp_path / "student.safetensors", tmp_path / "model.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif damage == "foreign":
        saved_models.save_run(tmp_path, _model("mlp:9"))
        card.write_text(card.read_text().replace("mlp:9", "mlp:8"))
    elif damage == "missing":
        weights.unlink()
    elif damage == "card":
        card.write_text("{")
    else:
        card.write_text(json.dumps({"name": "mlp:8"}))
    with pytest.raises(UserError) as caught:
        saved_models.load_run(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [*preprocess.KINDS, "zca-mtt"])
@pytest.mark.parametrize("data_kind", ["none", "standardise", "zca-mtt"])
def test_adapter_equals_the_numpy_preprocessing(data_kind: str, kind: str) -> None:
    shape = (8, 6, 3)
    images, data, model = _images(shape=shape), _fitted(data_kind, shape), _fitted(kind, shape)
    adapted = Adapter(data, model, shape[:2])(_nchw(data.apply(images)))
    expected = _nchw(model.apply(images))
    # float32 rounding of one division, one multiplication and, for ZCA, a product of 144 terms
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=2e-5)


def test_adapter_of_whitened_data_equals_invert() -> None:
    data, model = _fitted("zca"), _fitted("none")
    white = data.apply(_images())
    expected = _nchw(data.invert(white))
    torch.testing.assert_close(Adapter(data, model, (8, 8))(_nchw(white)), expected)


def test_adapter_is_the_identity_where_nothing_differs_and_trains_nothing() -> None:
    a, b = _fitted("standardise"), _fitted("standardise")
    assert isinstance(build_adapter(a, b, (8, 8), (8, 8)), torch.nn.Identity)
    other = build_adapter(a, _fitted("none"), (8, 8), (16, 16))
    assert not list(other.parameters())
    assert other(torch.zeros(2, 1, 8, 8)).shape == (2, 1, 16, 16)


def test_a_teacher_sees_the_images_as_in_its_own_training(tmp_path: Path) -> None:
    model = _model(kind="zca")
    saved_models.save_run(tmp_path, model)
    data = _fitted("none")
    teacher = teachers.load(str(tmp_path), data, SHAPE, NAMES)
    images = _images()
    expected = model.classifier(_nchw(model.preprocess.apply(images)))
    torch.testing.assert_close(teacher(_nchw(data.apply(images))), expected, rtol=1e-4, atol=1e-5)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_teacher_of_centred_labels_answers_with_calibrated_logits(tmp_path: Path) -> None:
    from dataclasses import replace

    model = replace(_model(), outputs="centred labels", output_temperature=0.25)
    saved_models.save_run(tmp_path, model)
    teacher = teachers.load(str(tmp_path), model.preprocess, SHAPE, NAMES)
    x = _nchw(_images())
    torch.testing.assert_close(teacher(x), 4 * model.classifier(x))


@pytest.mark.parametrize(
    ("shape", "classes", "message"),
    [
        (SHAPE, ("a", "b"), "has 3 classes, the data have 2"),
        (SHAPE, ("a", "c", "d"), "has no class 'd' of the data, which have none such as its 'b'"),
        ((8, 8, 3), NAMES, "1 channels, the data have 3"),
    ],
)
def test_teachers_that_do_not_fit(tmp_path: Path, shape, classes, message: str) -> None:
    saved_models.save_run(tmp_path, _model())
    with pytest.raises(UserError, match=message):
        teachers.load(str(tmp_path), _fitted("none", shape), shape, classes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convnet", "no published weights"),
        ("resnet18", "has 1000 classes, the data have 3"),
        ("runs/none", "there is no folder"),
    ],
)
def test_names_that_are_no_teachers(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        teachers.load(name, _fitted("none"), SHAPE, NAMES)
