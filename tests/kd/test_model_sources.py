"""Where networks come from: zoos, folders, files and programs, each checked by other means."""

import json
import os
import socket
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import timm.models
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from dsdistill.harness.data import preprocess
from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError
from kd.models import networks, saved_models, teachers
from kd.models.zoo import exported, huggingface, torchvision_zoo, weight_files
from kd.models.zoo.protocol import PretrainedConfig

NAMES = ("cat", "dog", "owl")
COLOUR, GRAY = (20, 20, 3), (12, 12, 1)
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def _raw(shape: networks.Shape, n: int = 4) -> np.ndarray:
    """Photographs are smooth, but a resize must be right for noise too."""
    return np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)


def _fitted(kind: str, shape: networks.Shape) -> Preprocess:
    images = np.random.default_rng(1).integers(0, 256, (300, *shape), dtype=np.uint8)
    return preprocess.fit(kind, lambda size: iter([images]), shape)


def _nchw(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32))


def _prepared(raw: np.ndarray, own: PretrainedConfig) -> Tensor:
    """Raw images as a network wants them, by Pillow and NumPy in float64."""
    h, w = own.size
    images = []
    for image in raw / 255:
        planes = [Image.fromarray(np.float32(image[..., c])) for c in range(image.shape[-1])]
        # Mode F neither rounds nor clips.
        resized = [np.asarray(p.resize((w, h), FILTERS[own.interpolation])) for p in planes]
        images.append(np.stack(resized * (3 // len(resized)), -1))
    return _nchw((np.stack(images) - np.array(own.mean)) / np.array(own.std))


def _check_path(
    teacher: teachers.Teacher, data: Preprocess, raw: np.ndarray, own: PretrainedConfig
) -> None:
    """What a network gets through the adapter is what its own preparation gives it."""
    images = _prepared(raw, own)
    adapted = teacher.adapter(_nchw(data.apply(raw)))
    # float32 rounding of up to six operations on values of about 3, and Pillow's fixed weights
    torch.testing.assert_close(adapted, images, rtol=1e-4, atol=2e-4)
    answers, expected = teacher(_nchw(data.apply(raw))), teacher.classifier(images)
    if teacher.outputs is not None:
        expected = expected[:, teacher.outputs]
    torch.testing.assert_close(answers, expected, rtol=1e-3, atol=1e-3)
    assert not list(teacher.adapter.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())


# --- published networks, whose weights are random here: there is no network to load them from


TINY: dict[str, Any] = {"depth": 1, "embed_dim": 16, "num_heads": 2}
MAP = {"cat": "tench", "dog": "n01443537", "owl": 999}  # by synonym, by synset, by number


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    make = timm.create_model

    def random(name: str, *, pretrained: bool = False, **kw: Any) -> nn.Module:
        return make(name, **kw, **(TINY if "beit" in name else {}))

    monkeypatch.setattr(timm, "create_model", random)

    def state(self: Any, *_: object, **__: object) -> Mapping[str, Tensor]:
        name = type(self).__name__.lower().removesuffix("_weights")
        return torchvision.models.get_model(name, weights=None).state_dict()

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", state)


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("shape", [COLOUR, GRAY])
@pytest.mark.parametrize(
    ("name", "interpolation", "size"),
    [
        ("test_resnet", "bilinear", 160),
        ("timm:test_vit", "bicubic", 160),
        ("beit_base_patch16_224", "bicubic", 224),
        ("torchvision:shufflenet_v2_x0_5", "bilinear", 224),
    ],
)
def test_a_published_teacher_sees_what_it_was_made_for(
    name: str, interpolation: str, size: int, shape: networks.Shape
) -> None:
    own, data = networks.pretrained_config(name), _fitted("standardise", shape)
    assert (own.size, own.interpolation, own.count) == ((size, size), interpolation, 1000)
    teacher = teachers.load(name, data, shape, NAMES, class_map=MAP)
    assert teacher.resolved.matched == "by the class map"
    assert teacher.resolved.mean == pytest.approx(own.mean)
    _check_path(teacher, data, _raw(shape, n=2), own)
    assert teacher(torch.zeros(1, shape[2], *shape[:2])).shape == (1, 3)
    assert teacher.outputs is not None
    assert teacher.outputs.tolist() == [0, 1, 999]


@pytest.mark.usefixtures("untrained")
def test_imagenet_is_known_by_any_of_its_names() -> None:
    data = _fitted("none", COLOUR)
    synsets = tuple(n.split(",")[0] for n in networks.pretrained_config("test_resnet").classes)  # type: ignore
    categories = torchvision.models.get_model_weights("resnet18").DEFAULT.meta["categories"]  # pyright: ignore
    for name in ("test_resnet", "torchvision:shufflenet_v2_x0_5"):
        for classes in (synsets, tuple(categories)):
            if (name, classes) != ("test_resnet", tuple(categories)):  # two were renamed
                teacher = teachers.load(name, data, COLOUR, classes)
                assert teacher.resolved.matched == "by name"
        teacher = teachers.load(name, data, COLOUR, synsets[::-1])
        assert teacher.resolved.matched == "by name, in another order"
        assert teacher.outputs is not None
        assert teacher.outputs.tolist() == [*range(1000)][::-1]


def test_torchvisions_crop_and_classes_are_its_own() -> None:
    own = networks.pretrained_config("torchvision:resnet50")
    assert (own.size, own.crop, own.interpolation) == ((224, 224), 224 / 232, "bilinear")
    assert isinstance(own.classes, tuple)
    assert own.classes[0].split(", ")[:2] == ["n01440764", "tench"]
    assert networks.pretrained_config("torchvision:efficientnet_b0").interpolation == "bicubic"


@pytest.mark.usefixtures("untrained")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of what googlenet's weights will be one day
@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5", "googlenet"])
@pytest.mark.parametrize("pretrained", [False, True])
def test_torchvision_students_are_trainable_saved_and_loaded(
    tmp_path: Path, name: str, pretrained: bool
) -> None:
    shape = (64, 64, 1)
    student = networks.build(f"torchvision:{name}", shape, 3, pretrained=pretrained)
    images = torch.rand(2, 1, 64, 64)
    student.train()(images).sum().backward()
    assert all(p.grad is not None for p in student.parameters())
    fitted = _fitted("none", shape)
    if pretrained:
        fitted = networks.pretrained_preprocess(f"torchvision:{name}", 1)
        assert networks.pretrained_config(f"torchvision:{name}").count == 1000
    assert len(fitted.mean) == 1
    model = saved_models.Model(student.eval(), f"torchvision:{name}", NAMES, shape, fitted)
    saved_models.save_run(tmp_path, model)
    again = saved_models.load_run(tmp_path)
    assert again.interpolation == student.interpolation
    assert torch.equal(again.classifier.eval()(images), student(images))


def test_torchvisions_transformers_take_one_size() -> None:
    sizes: dict[str, Any] = {"image_size": 48, "patch_size": 16, "hidden_dim": 16}
    vit = torchvision.models.VisionTransformer(
        **sizes, num_layers=1, num_heads=2, mlp_dim=32, num_classes=5
    )
    assert torchvision_zoo.input_shape(vit, (8, 9, 1)) == (48, 48, 3)
    assert torchvision_zoo.config("vit_b_16", vit) == {"image_size": 48}
    cnn = torchvision.models.squeezenet1_1()
    assert torchvision_zoo.input_shape(cnn, (8, 9, 1)) == (8, 9, 3)


def test_a_pretrained_last_layer_stays_where_the_classes_are_as_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = torchvision.models.get_model("squeezenet1_1", weights=None).state_dict()

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda *_, **__: state)
    kept = networks.build("torchvision:squeezenet1_1", (64, 64, 3), 1000, pretrained=True)
    assert torch.equal(
        kept.network.state_dict()["classifier.1.weight"], state["classifier.1.weight"]
    )


# --- Hugging Face


def _vit(folder: Path, names: tuple[str, ...] = NAMES, **processor: Any) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        id2label=dict(enumerate(names)),
    )
    torch.manual_seed(0)
    made = transformers.AutoModelForImageClassification.from_config(config)
    nn.init.normal_(made.classifier.weight)  # tiny by default: any input would do
    made.save_pretrained(folder)
    _processor(folder, "ViTImageProcessor", size={"height": 16, "width": 16}, **processor)
    return folder


def _resnet(folder: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        id2label=dict(enumerate(NAMES)),
    )
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    _processor(folder, "ConvNextImageProcessor", size={"shortest_edge": 28}, resample=3)
    return folder


def _processor(folder: Path, kind: str, **given: Any) -> None:
    content = {"image_processor_type": kind, "do_resize": True, "do_normalize": True} | given
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


ODD: dict[str, Any] = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}


@pytest.mark.parametrize("shape", [COLOUR, GRAY])
def test_hugging_face_teachers_see_what_their_processor_says(
    tmp_path: Path, shape: networks.Shape
) -> None:
    name, data = f"hf:{_vit(tmp_path, resample=3, **ODD)}", _fitted("standardise", shape)
    own = networks.pretrained_config(name)
    assert (own.size, own.interpolation, own.classes) == ((16, 16), "bicubic", NAMES)
    assert own.mean == pytest.approx(ODD["image_mean"], abs=1e-6)
    assert own.std == pytest.approx(ODD["image_std"], abs=1e-6)
    teacher = teachers.load(name, data, shape, NAMES)
    assert teacher.resolved.matched == "by name"
    _check_path(teacher, data, _raw(shape), own)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("ViTImageProcessor", ODD),
        ("ViTImageProcessor", {"do_normalize": False}),
        (
            "ViTImageProcessor",
            {"do_rescale": False, "image_mean": [128] * 3, "image_std": [64] * 3},
        ),
        ("EfficientNetImageProcessor", ODD | {"include_top": True}),
        ("ViTImageProcessor", ODD | {"do_center_crop": True, "crop_size": 16}),
    ],
)
def test_a_processors_arithmetic_is_found_whatever_it_is(
    tmp_path: Path, kind: str, given: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    _vit(tmp_path)
    _processor(tmp_path, kind, size={"height": 16, "width": 16}, **given)
    raw = _raw((16, 16, 3))  # of its size: what is left is arithmetic
    seen = transformers.AutoImageProcessor.from_pretrained(tmp_path)(list(raw), return_tensors="pt")
    network = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    data = _fitted("none", (16, 16, 3))
    teacher = teachers.load(f"hf:{tmp_path}", data, (16, 16, 3), NAMES)
    images = seen["pixel_values"]
    scale = float(images.abs().max())  # the rounding of a division by a small deviation
    adapted = teacher.adapter(_nchw(data.apply(raw)))
    torch.testing.assert_close(adapted, images, rtol=1e-4, atol=1e-5 * scale)
    with torch.no_grad():
        expected = network(images).logits
    torch.testing.assert_close(teacher(_nchw(data.apply(raw))), expected, rtol=1e-3, atol=1e-3)


def test_a_processor_that_swaps_colours_is_refused(tmp_path: Path) -> None:
    _vit(tmp_path)
    given = {"do_center_crop": True, "crop_size": 16, "do_flip_channel_order": True}
    _processor(tmp_path, "MobileViTImageProcessor", size={"shortest_edge": 18}, **given)
    with pytest.raises(UserError, match="swapping red and blue"):
        teachers.load(f"hf:{tmp_path}", _fitted("none", COLOUR), COLOUR, NAMES)


def test_the_crop_of_a_processor_is_found(tmp_path: Path) -> None:
    own = networks.pretrained_config(f"hf:{_resnet(tmp_path)}")
    assert own.size == (28, 28)
    assert own.crop == pytest.approx(224 / 256)  # ConvNeXt's default below 384 pixels
    given = {"do_center_crop": True, "crop_size": {"height": 16, "width": 16}}
    _processor(tmp_path, "BitImageProcessor", size={"shortest_edge": 20}, **given)
    assert networks.pretrained_config(f"hf:{tmp_path}").crop == pytest.approx(16 / 20)


@pytest.mark.parametrize("make", [_vit, _resnet])
@pytest.mark.parametrize("pretrained", [False, True])
def test_hugging_face_students_outlive_the_folder_they_came_from(
    tmp_path: Path, make: Callable[[Path], Path], pretrained: bool
) -> None:
    source, run = make(tmp_path / "source"), tmp_path / "run"
    if make is _vit:
        _vit(source, resample=3)  # bicubic, where the size is changed at all
    run.mkdir()
    student = networks.build(f"hf:{source}", GRAY, 5, pretrained=pretrained)
    assert student.size == ((16, 16) if make is _vit else None)
    images = torch.rand(2, 1, 12, 12)
    student.train()(images).sum().backward()
    model = saved_models.Model(
        student.eval(), f"hf:{source}", tuple("abcde"), GRAY, _fitted("none", GRAY)
    )
    saved_models.save_run(run, model)
    for file in source.iterdir():
        file.unlink()
    again = saved_models.load_run(run).classifier.eval()
    assert again.interpolation == ("bicubic" if make is _vit else "bilinear")
    assert torch.equal(again(images), student(images))
    bare = type(student.network)(student.network.config)  # pyright: ignore[reportCallIssue]
    bare.load_state_dict(safetensors.torch.load_file(run / saved_models.WEIGHTS))


def test_pretrained_weights_are_those_of_the_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoModelForImageClassification
    stored = auto.from_pretrained(_vit(tmp_path)).state_dict()
    whole = networks.build(f"hf:{tmp_path}", COLOUR, 3, pretrained=True).network.state_dict()
    assert all(torch.equal(stored[k], whole[k]) for k in stored)
    fewer = networks.build(f"hf:{tmp_path}", COLOUR, 2, pretrained=True).network.state_dict()
    new = {k for k in stored if not torch.equal(stored[k], fewer[k][: len(stored[k])])}
    assert new == {"classifier.weight", "classifier.bias"}


def test_a_model_without_a_head_is_no_teacher(tmp_path: Path) -> None:
    path = _vit(tmp_path) / "model.safetensors"
    kept = {k: v for k, v in safetensors.torch.load_file(path).items() if "classifier" not in k}
    safetensors.torch.save_file(kept, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"no weights for 2 tensors, such as classifier\.bias"):
        teachers.load(f"hf:{tmp_path}", _fitted("none", COLOUR), COLOUR, NAMES)


def test_without_transformers_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'dsdistill\[hf\]'$"):
        networks.check_name("hf:microsoft/resnet-50")


# --- names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet19", "did you mean 'resnet"),
        ("torchvision:fasterrcnn_resnet50_fpn", "unknown torchvision classifier"),
        ("torchvisoin:resnet18", "did you mean 'torchvision'"),
        ("timm:resnt18", "did you mean 'resnet18'"),
        ("hf:./nowhere", r"there is no folder \./nowhere"),
        ("hf:", "hf: needs a name"),
        ("resnet18@gone.pth", "there is no file gone.pth"),
        ("program.pt2", "an exported program, which cannot be trained"),
    ],
)
def test_names_that_nobody_knows(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        networks.check_name(name)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):
        networks.build(name, COLOUR, 3)


@pytest.mark.parametrize(
    ("name", "looked_for"),
    [
        ("hf:microsoft/resnet-50", "https://huggingface.co/microsoft/resnet-50"),
        ("hf-hub:nobody/nothing", "hf-hub:nobody/nothing"),
        ("local-dir:nowhere", "local-dir:nowhere"),
        ("test_vit", "https://huggingface.co/timm/test_vit.r160_in1k"),
    ],
)
def test_what_cannot_be_downloaded_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, looked_for: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror("name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between tries
    with pytest.raises(UserError, match=looked_for) as caught:
        teachers.load(name, _fitted("none", COLOUR), COLOUR, NAMES, class_map=MAP)
    assert "\n" not in str(caught.value)


def test_torchvisions_missing_weights_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", fail)
    with pytest.raises(UserError, match=r"looked for https://\S+/squeezenet1_1-\w+\.pth\): no rou"):
        networks.build("torchvision:squeezenet1_1", COLOUR, 1000, pretrained=True)


def test_a_folder_of_another_library_says_how_it_is_named(tmp_path: Path) -> None:
    _vit(tmp_path)
    with pytest.raises(UserError, match=f"is named hf:{tmp_path}$"):
        teachers.load(str(tmp_path), _fitted("none", COLOUR), COLOUR, NAMES)


# --- timm's own folders


def test_timm_folders_bring_their_classes_and_outlive_their_source(tmp_path: Path) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    run.mkdir()
    made = timm.create_model("test_vit", num_classes=3, img_size=32).eval()
    args, names = {"img_size": 32}, {"label_names": list(NAMES), "num_classes": 3}
    timm.models.save_for_hf(made, str(source), model_config=names, model_args=args)
    name, data = f"local-dir:{source}", _fitted("standardise", COLOUR)
    teacher = teachers.load(name, data, COLOUR, NAMES)
    own = networks.pretrained_config(name)
    assert (own.size, own.classes, own.interpolation) == ((32, 32), NAMES, "bicubic")
    assert teacher.resolved.matched == "by name"
    _check_path(teacher, data, _raw(COLOUR), own)
    images = _prepared(_raw(COLOUR), own)
    torch.testing.assert_close(teacher.classifier(images), made(images))
    other = teachers.load(name, data, COLOUR, NAMES[::-1])
    assert other.resolved.matched == "by name, in another order"
    x = torch.rand(2, 3, 20, 20)
    torch.testing.assert_close(other(x), teacher(x).flip(1))
    shape = (16, 16, 1)
    student = networks.build(name, shape, 2, pretrained=True).eval()
    saved_models.save_run(
        run, saved_models.Model(student, name, NAMES[:2], shape, _fitted("none", shape))
    )
    for file in source.iterdir():
        file.unlink()
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(saved_models.load_run(run).classifier.eval()(x), student(x))


# --- files of weights


def _bare(classes: int = 3, channels: int = 3, name: str = "test_resnet") -> nn.Module:
    torch.manual_seed(5)
    return timm.create_model(name, num_classes=classes, in_chans=channels).eval()


def _wrapped(state: dict[str, Tensor], how: str) -> Any:
    def junk() -> dict[str, Tensor]:
        return {k: torch.zeros_like(v) for k, v in state.items()}

    return {
        "bare": state,
        "lightning": {"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 3},
        "parallel": {"model": {f"module.{k}": v for k, v in state.items()}, "optimizer": {"lr": 1}},
        "compiled": {f"_orig_mod.module.{k}": v for k, v in state.items()},
        "averaged": {"state_dict": junk(), "state_dict_ema": state, "arch": "test_resnet"},
        "counters": {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
        "half": {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
    }[how]


@pytest.mark.parametrize(
    "how", ["bare", "lightning", "parallel", "compiled", "averaged", "counters", "half"]
)
def test_weights_are_found_in_what_trainers_save(tmp_path: Path, how: str) -> None:
    made, path = _bare(), tmp_path / "weights.pth"
    torch.save(_wrapped(made.state_dict(), how), path)
    student = networks.build(f"test_resnet@{path}", (32, 32, 3), 3).eval()
    x, tolerance = torch.rand(2, 3, 32, 32), 2e-2 if how == "half" else 0  # 11 bits a weight
    torch.testing.assert_close(student(x), made(x), rtol=tolerance, atol=tolerance)
    saved_models.save_run(
        tmp_path,
        saved_models.Model(
            student, f"test_resnet@{path}", NAMES, (32, 32, 3), _fitted("none", COLOUR)
        ),
    )
    path.unlink()
    assert saved_models.load_run(tmp_path).name == "test_resnet"


@pytest.mark.parametrize("channels", [1, 3])
def test_a_file_says_itself_for_how_many_classes_and_channels_it_is(
    tmp_path: Path, channels: int
) -> None:
    made, path = _bare(7, channels), tmp_path / "weights.safetensors"
    safetensors.torch.save_file(made.state_dict(), path)
    shape, data = (32, 32, channels), _fitted("standardise", (32, 32, channels))
    name = f"test_resnet@{path}"
    teacher = teachers.load(name, data, shape, tuple("abcdefg"))
    assert teacher.resolved.matched.startswith("by position alone: outputs 0..6 taken as classes a")
    assert teacher.resolved.size == (32, 32)  # it takes any size: the data's
    raw = _raw(shape)
    expected = made(_nchw((raw / np.float32(255) - 0.5) / 0.5))
    torch.testing.assert_close(teacher(_nchw(data.apply(raw))), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="has 7 classes, the data have 3"):
        teachers.load(name, data, shape, NAMES)
    picked = teachers.load(name, data, shape, NAMES, class_map={"cat": 6, "dog": 0, "owl": 3})
    torch.testing.assert_close(
        picked(_nchw(data.apply(raw))), expected[:, [6, 0, 3]], rtol=1e-3, atol=1e-4
    )
    with pytest.raises(UserError, match="for 7 classes, not for 3"):
        networks.build(name, shape, 3, adapt=False)


def test_what_a_file_cannot_say_is_told(tmp_path: Path) -> None:
    path, shape = tmp_path / "weights.pt", (16, 16, 3)
    made = _bare()
    torch.save(made.state_dict(), path)
    mean, std, data = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), _fitted("zca", shape)
    name = f"test_resnet@{path}"
    teacher = teachers.load(name, data, shape, NAMES, image_size=40, mean=mean, std=std)
    assert teacher.resolved.size == (40, 40)
    assert teacher.resolved.mean == pytest.approx(mean)
    plain = _fitted("none", shape)
    teacher = teachers.load(name, plain, shape, NAMES, image_size=40, mean=mean, std=std)
    own = PretrainedConfig(mean, std, (40, 40), "bilinear", 1.0, 3)
    _check_path(teacher, plain, _raw(shape), own)
    with pytest.raises(UserError, match="must be 3 values each, and std positive"):
        teachers.load(name, plain, shape, NAMES, std=(1, 0, 1))


def test_built_in_and_torchvision_networks_take_files_too(tmp_path: Path) -> None:
    data = _fitted("standardise", GRAY)
    for name, size in (("mlp:8", (12, 12)), ("torchvision:squeezenet1_1", (64, 64))):
        shape = (*size, 1)
        made = networks.build(name, shape, 3, seed=9).eval()
        path = tmp_path / f"{name[:3]}.safetensors"
        safetensors.torch.save_file(made.network.state_dict(), path)
        student = networks.build(f"{name}@{path}", shape, 3, seed=1).eval()
        x = torch.rand(2, 1, *size)
        assert torch.equal(student(x), made(x))
        teacher = teachers.load(f"{name}@{path}", data, shape, NAMES)
        if name == "mlp:8":
            assert torch.equal(teacher(x), made(x))
        assert teacher(x).shape == (2, 3)
        with pytest.raises(UserError, match="leave --pretrained out"):
            networks.build(f"{name}@{path}", shape, 3, pretrained=True)


class _Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_no_code_in_a_file_is_run(tmp_path: Path) -> None:
    path, mark = tmp_path / "weights.pth", tmp_path / "ran"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "bomb": _Bomb(mark)}, path)
    with pytest.raises(UserError, match=r"holds more than tensors.*nothing in it was run"):
        weight_files.read(path)
    assert not mark.exists()


def _foreign(path: Path) -> None:
    torch.save(_bare(name="test_vit").state_dict(), path)


def _list(path: Path) -> None:
    torch.save([torch.zeros(2)], path)


def _cut(path: Path) -> None:
    torch.save(_bare().state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".pth", _foreign, "does not hold the weights of test_resnet: it is without"),
        (".pth", _list, "holds no weights by name"),
        (".bin", _cut, "is not readable|holds more than tensors"),
        (".safetensors", _cut, "is not a whole .safetensors file"),
    ],
)
def test_files_that_are_something_else_are_one_line(
    tmp_path: Path, suffix: str, damage: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / f"weights{suffix}"
    damage(path)
    for load in (
        lambda: networks.build(f"test_resnet@{path}", COLOUR, 3),
        lambda: teachers.load(f"test_resnet@{path}", _fitted("none", COLOUR), COLOUR, NAMES),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load()
        assert "\n" not in str(caught.value)


# --- exported programs


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.last = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.layers(images).mean((2, 3)))


def _export(
    path: Path, *, training: bool = False, batch: str = "dynamic", card: str = ""
) -> nn.Module:
    torch.manual_seed(2)
    network = _Small().train(training)
    network.layers[1].running_mean = torch.full((4,), 0.3)  # pyright: ignore[reportAttributeAccessIssue]
    shapes = ({0: torch.export.Dim("n", min=1, max=4096)},) if batch == "dynamic" else None
    program = torch.export.export(network, (torch.rand(2, 3, 20, 20),), dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files={exported.CARD: card} if card else {})
    return network.eval()


def test_a_program_teaches_in_the_space_of_the_data(tmp_path: Path) -> None:
    path = tmp_path / "program.pt2"
    network, data = _export(path), _fitted("standardise", COLOUR)
    teacher = teachers.load(str(path), data, COLOUR, NAMES)
    x = torch.rand(5, 3, 20, 20)
    torch.testing.assert_close(teacher(x), network(x))
    teacher.train()  # as an objective's `train` would; a program's own raises
    torch.testing.assert_close(teacher.eval()(x), network(x))
    assert not any(p.requires_grad for p in teacher.parameters())
    with pytest.raises(UserError, match="has 3 classes, the data have 2"):
        teachers.load(str(path), data, COLOUR, NAMES[:2])
    larger = (40, 30, 3)  # brought to the program's size
    raw, fitted = _raw(larger), _fitted("standardise", larger)
    own = PretrainedConfig(tuple(fitted.mean), tuple(fitted.std), (20, 20), "bilinear", 1.0, 3)
    _check_path(teachers.load(str(path), fitted, larger, NAMES), fitted, raw, own)


def test_the_card_of_a_program_says_what_it_wants(tmp_path: Path) -> None:
    own = PretrainedConfig((0.2, 0.3, 0.4), (0.5, 0.6, 0.7), (20, 20), "bicubic", 1.0, NAMES)
    path, fitted = tmp_path / "program.pt2", own.preprocess()
    classifier = networks.Classifier(_Small(), interpolation="bicubic")
    model = saved_models.Model(
        classifier, "mlp", NAMES, (20, 20, 3), fitted, output_temperature=0.5
    )
    network = _export(path, card=json.dumps(saved_models.card(model), default=list))
    shape = (33, 28, 1)
    data, raw = _fitted("standardise", shape), _raw(shape)
    teacher = teachers.load(str(path), data, shape, NAMES)
    assert teacher.resolved.matched == "by name"
    expected = network(_prepared(raw, own)) / 0.5
    torch.testing.assert_close(teacher(_nchw(data.apply(raw))), expected, rtol=1e-3, atol=1e-3)


def _card(mean: Any = (0.5,) * 3, std: Any = (0.5,) * 3, **changed: Any) -> str:
    prepared = {"kind": "standardise", "mean": mean, "std": std, "contrast": 1.0}
    card = {"classes": ["a", "b", "c"], "preprocess": prepared, "outputs": "logits"}
    return json.dumps(card | {"output_temperature": 1.0} | changed)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: _export(path, training=True), "was exported in training mode"),
        (lambda path: _export(path, batch="fixed"), "takes exactly 2 images at once"),
        (lambda path: path.write_bytes(b"nothing"), "is not a whole .pt2 file"),
        (lambda path: zipfile.ZipFile(path, "w").close(), "is not a program that can be read"),
        (lambda path: _export(path, card="{}}"), "is not JSON"),
        (lambda path: _export(path, card='{"classes": []}'), "is not whole"),
        (lambda path: _export(path, card="[1]"), "is not a JSON object"),
        (lambda path: _export(path, card=_card(classes=[1, 2, 3])), "is not whole"),
        (lambda path: _export(path, card=_card(classes="abc")), "is not whole"),
        (lambda path: _export(path, card=_card(output_temperature="hot")), "is not whole"),
        (lambda path: _export(path, card=_card(output_temperature=0)), "is not whole"),
        (lambda path: _export(path, card=_card(outputs={})), "is not whole"),
        (lambda path: _export(path, card=_card(interpolation="lanczos")), "is not whole"),
        (lambda path: _export(path, card=_card(preprocess=[])), "is not whole"),
        (lambda path: _export(path, card=_card(mean=["a", "b", "c"])), "is not whole"),
        (lambda path: _export(path, card=_card(mean=[0.5])), "is not whole"),
        (lambda path: _export(path, card=_card(std=[0, 1, 1])), "is not whole"),
        (lambda path: None, "there is no file"),
    ],
)
def test_programs_that_cannot_teach_are_one_line(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "a.pt2"
    make(path)
    with pytest.raises(UserError, match=message) as caught:
        teachers.load(str(path), _fitted("none", COLOUR), COLOUR, NAMES)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


# --- folders that bring code


def _coded(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """A folder whose configurations name a module that lies beside; who is asked says yes."""
    _vit(folder)
    marker = folder / "ran"
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
    (folder / "code.py").write_text(code)
    for name, kinds in {
        "config.json": ("AutoConfig", "AutoModelForImageClassification"),
        "preprocessor_config.json": ("AutoImageProcessor",),
    }.items():
        config = json.loads((folder / name).read_text())
        config["auto_map"] = dict.fromkeys(kinds, "code.Anything")
        config["model_type" if name == "config.json" else "image_processor_type"] = "unknown-type"
        (folder / name).write_text(json.dumps(config))
    patch.setattr("builtins.input", lambda *_: "y")
    return marker


def test_code_in_a_hugging_face_folder_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = _coded(tmp_path, monkeypatch)
    with pytest.raises(UserError) as caught:
        teachers.load(f"hf:{tmp_path}", _fitted("none", COLOUR), COLOUR, NAMES)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        networks.build(f"hf:{tmp_path}", COLOUR, 2)
    assert not marker.exists()


def test_a_hugging_face_folder_of_pickles_is_not_unpickled(tmp_path: Path) -> None:
    _vit(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"classifier.bias": _Bomb(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        teachers.load(f"hf:{tmp_path}", _fitted("none", COLOUR), COLOUR, NAMES)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_attention_from_the_hub_is_refused(tmp_path: Path) -> None:
    _vit(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["attn_implementation"] = "somebody/kernel"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"somebody/kernel.*code that would be downloaded"):
        teachers.load(f"hf:{tmp_path}", _fitted("none", COLOUR), COLOUR, NAMES)


def test_a_timm_folder_of_pickles_is_not_unpickled(tmp_path: Path) -> None:
    config = {"architecture": "test_resnet", "num_classes": 2, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"state_dict": _Bomb(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        teachers.load(f"local-dir:{tmp_path}", _fitted("none", COLOUR), COLOUR, NAMES)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"architecture": "local-dir:elsewhere"},
        {"architecture": "hf-hub:some/body"},
        {"arguments": {"checkpoint_path": "elsewhere.pth"}},
        {"arguments": {"pretrained_cfg": {"url": "https://example.com/x.pth"}}},
    ],
)
def test_the_description_of_a_run_names_no_other_file(changed: dict[str, Any]) -> None:
    config = {"architecture": "test_resnet", "arguments": {}, "overlay": {}} | changed
    with pytest.raises(UserError, match="is not one that kd writes"):
        networks.build("local-dir:gone", COLOUR, 2, config=config)


# --- what no adapter can reconcile


def test_images_of_other_channels_are_one_line(tmp_path: Path) -> None:
    path, four = tmp_path / "program.pt2", (20, 20, 4)
    _export(path)
    safetensors.torch.save_file(_bare().state_dict(), tmp_path / "w.safetensors")
    for name in (str(path), f"test_resnet@{tmp_path / 'w.safetensors'}", f"hf:{_vit(tmp_path)}"):
        with pytest.raises(UserError, match="takes images of 3 channels, the data have 4"):
            teachers.load(name, _fitted("none", four), four, NAMES)
    with pytest.raises(UserError, match="takes images of 3 channels, the data have 4"):
        networks.build(f"hf:{tmp_path}", four, 3)


def test_a_size_that_a_network_cannot_take_is_one_line(tmp_path: Path) -> None:
    name = f"hf:{_vit(tmp_path)}"
    with pytest.raises(UserError, match="cannot take 20x20 images resized to 40x40"):
        teachers.load(name, _fitted("none", COLOUR), COLOUR, NAMES, image_size=40)


def test_answers_that_differ_have_different_states(tmp_path: Path) -> None:
    """What hashes a teacher sees all that its answers depend on."""
    name, data = f"hf:{_vit(tmp_path)}", _fitted("none", COLOUR)
    plain = teachers.load(name, data, COLOUR, NAMES).state_dict()
    _vit(tmp_path, resample=3)
    other = teachers.load(name, data, COLOUR, NAMES).state_dict()
    assert [k for k in plain if not torch.equal(plain[k], other[k])] == ["settings"]


def test_the_same_images_around_another_network() -> None:
    student = networks.build("torchvision:squeezenet1_1", (64, 64, 1), 3).eval()
    again = student.with_network(
        networks.build("torchvision:squeezenet1_1", (64, 64, 3), 3).network
    )
    again.network.load_state_dict(student.network.state_dict())
    x = torch.rand(1, 1, 64, 64)
    assert torch.equal(again.eval()(x), student(x))
    assert huggingface.origin("a/b") == "https://huggingface.co/a/b"
