"""Files of weights as trainers write them, fitted to other classes, channels and image sizes."""

import argparse
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import timm.models
import torch
from torch import Tensor, nn

from dsdistill.harness.data import preprocess
from dsdistill.harness.errors import UserError
from kd.exports import export_formats
from kd.models import network_names, networks, saved_models, teachers
from kd.models.zoo import weight_files

NAMES = ("cat", "dog", "owl")
SHAPE = (32, 32, 3)


def _bare(name: str = "test_resnet", classes: int = 3, **arguments: Any) -> Any:
    torch.manual_seed(5)
    return timm.create_model(name, num_classes=classes, **arguments).eval()


def _saved(path: Path, network: nn.Module) -> Path:
    torch.save(network.state_dict(), path)
    return path


def _junk(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: torch.zeros_like(v) for k, v in state.items()}


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{k}": v for k, v in state.items()}


def _timm(folder: Path, network: nn.Module, name: str) -> None:
    from timm.utils.checkpoint_saver import CheckpointSaver

    optimizer, args = (
        torch.optim.SGD(network.parameters(), 0.1),
        argparse.Namespace(model="test_resnet"),
    )
    CheckpointSaver(
        network, optimizer, args=args, checkpoint_dir=str(folder), recovery_dir=str(folder)
    ).save_checkpoint(0, metric=1.0)
    (folder / "model_best.pth.tar").rename(folder / name)


def _averaged(network: nn.Module) -> dict[str, Any]:
    return torch.optim.swa_utils.AveragedModel(network).state_dict()


# What a trainer saves, with junk where another network's or the plain weights lie.
FORMS: dict[str, Callable[[nn.Module, dict[str, Tensor]], Any]] = {
    "references.pth": lambda net, state: {
        "model": state, "optimizer": {"lr": 1.0}, "args": argparse.Namespace(model="resnet18"),
    },
    "references-ema.pth": lambda net, state: {"model": _junk(state), "model_ema": _averaged(net)},
    "averaged.pth": lambda net, state: _averaged(net),
    "rt-detr.pth": lambda net, state: {"model": _junk(state), "ema": {"module": state, "n": 3}},
    "lightning.ckpt": lambda net, state: {
        "state_dict": {**_below("model.", state), "criterion.weight": torch.ones(4)},
        "hyper_parameters": {"out": Path("runs"), "lr": 0.1},
    },
    "lightning-ema.ckpt": lambda net, state: {
        "state_dict": {**_below("net.", _junk(state)), **_below("net_ema.module.", state)},
    },
    "supergradients.pth": lambda net, state: {
        "net": _junk(state), "ema_net": _below("module.", state), "acc": torch.tensor(0.5),
    },
    "parallel-compiled.weights": lambda net, state: _below("module._orig_mod.", state),
    "blocks-compiled": lambda net, state: {
        k.replace("conv1", "conv1._orig_mod"): v for k, v in state.items()
    },
    "backbone.pt": lambda net, state: _below("backbone.", state),
    "thop.pth": lambda net, state: {
        **state, "total_ops": torch.zeros(1), "conv1.total_params": torch.ones(1),
    },
    "scalars.pth": lambda net, state: {
        "state_dict": state, "best": np.float64(93.1), "n": np.int64(3), "half": np.float32(0.5),
    },
}  # fmt: skip


@pytest.mark.parametrize("form", [*FORMS, "timm.pth.tar", "safetensors.bin"])
def test_what_trainers_write_is_read(tmp_path: Path, form: str) -> None:
    network = _bare()
    path = tmp_path / form
    if form.startswith("timm"):
        _timm(tmp_path, network, form)
    elif form.startswith("safetensors"):
        safetensors.torch.save_file(network.state_dict(), path)
    else:
        torch.save(FORMS[form](network, network.state_dict()), path)
    student = networks.build(f"test_resnet@{path}", SHAPE, 3).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(student(x), network(x))
    averages = form in ("references-ema.pth", "rt-detr.pth", "lightning-ema.ckpt")
    averages |= form == "supergradients.pth"
    assert [note.startswith("averaged weights (") for note in student.notes] == [True] * averages


def test_which_of_several_networks_is_not_guessed(tmp_path: Path) -> None:
    state = _bare().state_dict()
    path = tmp_path / "both.pth"
    torch.save({"state_dict": {**_below("student.", state), **_below("teacher.", state)}}, path)
    with pytest.raises(UserError, match="several such networks, as student and as teacher"):
        networks.build(f"test_resnet@{path}", SHAPE, 3)


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def _cyclic(path: Path) -> None:
    state: dict[str, Any] = {"epoch": 1}
    state["model"] = state
    torch.save(state, path)


def _scripted(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting has a successor
        torch.jit.script(_bare()).save(path)


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 97781\n"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: torch.save(_bare(), path), r"holds more than tensors \(timm\.\S+, .*not|run"),
        (_scripted, "is a TorchScript program, of which"),
        (_cyclic, "holds no weights by name"),
        (lambda path: path.write_bytes(b""), "is an empty file"),
        (lambda path: path.write_bytes(b"\x05" + bytes(7) + b"{}}}}"), "not a whole .safetensors"),
        (lambda path: path.mkdir(), "file.ckpt is a folder: give a file of weights after @"),
        (lambda path: path.write_text(LFS_POINTER), "Git LFS pointer .* run git lfs pull"),
        (
            lambda path: path.write_text("<!DOCTYPE html>\n<p>é"),
            "a text file and no weights .it be",
        ),
    ],
)
def test_files_that_are_no_weights_are_one_line(
    tmp_path: Path, write: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "file.ckpt"
    write(path)
    with pytest.raises(UserError, match=message) as caught:
        networks.build(f"test_resnet@{path}", SHAPE, 3)
    assert "\n" not in str(caught.value)


def test_a_folder_of_weights_names_what_is_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    _saved(folder / "a.pth", _bare())
    message = "model is a folder, which holds a.pth: give a file of weights after @"
    with pytest.raises(UserError, match=message):
        networks.build(f"test_resnet@{folder}", SHAPE, 3)
    with pytest.raises(UserError, match=message):
        networks.check_name(f"test_resnet@{folder}")


def test_harmless_values_beside_the_weights_open_no_door(tmp_path: Path) -> None:
    path, mark = tmp_path / "a.ckpt", tmp_path / "ran"
    args = argparse.Namespace(bomb=_Bomb(mark))
    torch.save({"state_dict": _bare().state_dict(), "args": args}, path)
    with pytest.raises(
        UserError, match=r"more than tensors \(posix.mkdir\).*nothing in it was run"
    ):
        weight_files.read(path)
    assert not mark.exists()


@pytest.mark.parametrize(("size", "fitting"), [(50, "64x64"), (8, "16x16"), (150, "160x160")])
def test_a_size_of_no_whole_patches_names_one_that_is(size: int, fitting: str) -> None:
    with pytest.raises(UserError, match=f"patches are 16x16, so use a size .* such as {fitting}"):
        networks.build(f"test_vit(img_size={size})", (size, size, 3), 3)


# --- students of other classes and channels


@pytest.mark.parametrize("classes", [0, 7])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_student_gets_a_new_last_layer(tmp_path: Path, name: str, classes: int) -> None:
    given = _bare(name, classes).state_dict()
    path = tmp_path / "w.pth"
    torch.save(given, path)
    student = networks.build(f"{name}@{path}", SHAPE, 3, seed=4)
    fresh = networks.build(name, SHAPE, 3, seed=4)
    head = ("fc.", "head.weight", "head.bias")
    for k, value in student.network.state_dict().items():
        expected = fresh.network.state_dict()[k] if k.startswith(head) else given[k]
        assert torch.equal(value, expected), k
    since = f"{path} has none" if classes == 0 else f"that of {path} is for 7"
    assert student.notes == (f"a new last layer for 3 classes, since {since}",)


def _split(network: nn.Module, body: str, head: str) -> dict[str, Tensor]:
    """A network's weights with its last layer under another name, beside the body."""
    state = network.state_dict()
    return {
        **{f"{body}{k}": v for k, v in state.items() if not k.startswith(("fc.", "head."))},
        **{
            f"{head}.{k.rpartition('.')[2]}": v
            for k, v in state.items()
            if k in ("fc.weight", "fc.bias", "head.weight", "head.bias")
        },
    }


@pytest.mark.parametrize(
    ("name", "body", "head"),
    [
        ("test_resnet", "backbone.", "head.fc"),  # mmpretrain
        ("test_vit", "backbone.", "head.layers.head"),
        ("test_resnet", "backbone.", "cls_head.fc"),
        ("test_resnet", "model.backbone.", "model.classifier"),
        ("test_resnet", "encoder.", "last_layer"),
        ("test_resnet", "", "last_linear"),
    ],
)
def test_a_last_layer_beside_the_network_is_used(
    tmp_path: Path, name: str, body: str, head: str
) -> None:
    network, path = _bare(name), tmp_path / "w.pth"
    torch.save({"state_dict": _split(network, body, head)}, path)
    x, plain = torch.rand(2, 3, 32, 32), _saved(tmp_path / "plain.pth", network)
    expected = networks.build(f"{name}@{plain}", SHAPE, 3).eval()(x)
    student = networks.build(f"{name}@{path}", SHAPE, 3).eval()
    assert torch.equal(student(x), expected)
    assert student.notes == (f"last layer from {head} of {path}",)
    teacher = _load(f"{name}@{path}")
    assert torch.equal(teacher(x), _load(f"{name}@{plain}")(x))
    other = networks.build(f"{name}@{path}", SHAPE, 5)
    assert other.notes[-1] == f"a new last layer for 5 classes, since that of {path} is for 3"


def test_the_last_layer_is_that_of_the_network_that_is_taken(tmp_path: Path) -> None:
    network, path = _bare(), tmp_path / "w.pth"
    plain = _split(network, "net.backbone.", "net.head.fc")
    averaged = _split(network, "net_ema.backbone.", "net_ema.head.fc")
    torch.save({"state_dict": {**_junk(plain), **averaged}}, path)
    student = networks.build(f"test_resnet@{path}", SHAPE, 3).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(student(x), network(x))


def test_last_layers_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state, path = _split(_bare(), "backbone.", "head.fc"), tmp_path / "w.pth"
    state["head.fc.weight"] = state["head.fc.weight"][:, 1:]
    width = state["head.fc.weight"].shape[1]
    torch.save(state, path)
    found = rf"{path} has none that fits, but head\.fc\.weight \(3, {width}\)"
    (note,) = networks.build(f"test_resnet@{path}", SHAPE, 3).notes
    assert re.fullmatch(f"a new last layer for 3 classes, since {found}", note)
    with pytest.raises(UserError, match=f"has no last layer: {found}; a network without"):
        _load(f"test_resnet@{path}")
    # Which of two is the classifier is not guessed.
    two = _split(_bare(), "backbone.", "head.fc") | _split(_bare(), "backbone.", "fc")
    torch.save(two, path)
    (note,) = networks.build(f"test_resnet@{path}", SHAPE, 3).notes
    assert "head.fc.weight" in note
    assert ", fc.weight" in note


@pytest.mark.parametrize(("stored", "channels"), [(3, 1), (3, 4), (3, 13), (1, 3), (4, 3)])
def test_a_student_gets_a_first_layer_for_its_channels(
    tmp_path: Path, stored: int, channels: int
) -> None:
    network = _bare(in_chans=stored)
    path = _saved(tmp_path / "w.pth", network)
    student = networks.build(f"test_resnet@{path}", (32, 32, channels), 3)
    given, own = network.state_dict()["conv1.0.weight"], student.network.state_dict()
    # Channels are summed for one, and repeated for many, with the sum of all weights kept alike.
    expected = given.sum(1, keepdim=True)
    if channels > 1:
        expected = given[:, np.arange(channels) % stored] * stored / channels
    torch.testing.assert_close(own["conv1.0.weight"], expected)
    for k, value in network.state_dict().items():
        assert k == "conv1.0.weight" or torch.equal(own[k], value)
    assert student.notes == (
        f"first layer adapted from {stored} to {channels} channels, as timm does",
    )


def test_another_architecture_is_no_new_head(tmp_path: Path) -> None:
    path = _saved(tmp_path / "w.pth", nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(UserError, match="does not hold the weights of test_resnet"):
        networks.build(f"test_resnet@{path}", SHAPE, 3)
    path = _saved(tmp_path / "w.pth", networks.build("mlp:8", SHAPE, 3).network)
    with pytest.raises(UserError, match="does not fit mlp:9"):
        networks.build(f"mlp:9@{path}", SHAPE, 4)
    assert networks.build(f"mlp:8@{path}", SHAPE, 4).notes  # a built-in one has a head too


def _load(name: str, shape: networks.Shape = SHAPE, **arguments: Any) -> teachers.Teacher:
    return teachers.load(name, preprocess.identity(shape[2]), shape, NAMES, **arguments)


def test_the_last_layer_of_a_teacher_is_its_own(tmp_path: Path) -> None:
    for name in ("test_resnet", "test_vit"):
        path = _saved(tmp_path / "w.pth", _bare(name, 0))
        with pytest.raises(UserError, match=r"has no last layer: .* by a loss of layers alone"):
            _load(f"{name}@{path}")
        path = _saved(tmp_path / "w.pth", _bare(name, 7))
        with pytest.raises(UserError, match="has 7 classes, the data have 3"):
            _load(f"{name}@{path}")


# --- other image sizes


def _from_timm(path: Path, size: int, classes: int = 3) -> Any:
    """timm's own way to another resolution: published weights, given as tensors."""
    overlay = {"state_dict": torch.load(path), "num_classes": classes, "hf_hub_id": None}
    return timm.create_model(
        "test_vit", pretrained=True, num_classes=classes, img_size=size,
        pretrained_cfg_overlay=overlay,
    ).eval()  # fmt: skip


def test_position_embeddings_are_resampled_as_timm_does(tmp_path: Path) -> None:
    path = _saved(tmp_path / "w.pth", _bare("test_vit", img_size=96))
    note = "position embeddings resampled to the size of its images, as timm does"
    for name, size in (("test_vit", 160), ("test_vit(img_size=64)", 64)):
        student = networks.build(f"{name}@{path}", (size, size, 3), 3).eval()
        x = torch.rand(2, 3, size, size)
        torch.testing.assert_close(student(x), _from_timm(path, size)(x))
        assert student.notes == (note,)
    teacher = _load(f"test_vit@{path}", image_size=64)
    assert (teacher.resolved.size, teacher.resolved.notes[0]) == ((64, 64), note)


def test_a_teacher_is_given_images_of_the_size_of_its_position_embeddings(tmp_path: Path) -> None:
    network = _bare("test_vit", img_size=96)
    path = _saved(tmp_path / "w.pth", network)
    own = networks.pretrained_config("test_vit").preprocess()
    teacher = teachers.load(f"test_vit@{path}", own, (96, 96, 3), NAMES)
    x = torch.randn(2, 3, 96, 96)
    assert torch.equal(teacher(x), network(x))
    assert len(teacher.resolved.notes) == 0
    assert _load(f"test_vit@{path}", image_size=96).resolved.size == (96, 96)


# --- arguments of timm's networks


def test_arguments_reach_timm_and_outlive_a_run(tmp_path: Path) -> None:
    name = "test_vit(img_size=32, depth=2, drop_path_rate=0.1)"
    student = networks.build(name, (16, 16, 3), 3).eval()
    network: Any = student.network
    assert (len(network.blocks), student.size) == (2, (32, 32))
    assert network.blocks[1].drop_path1.drop_prob == pytest.approx(0.1)
    model = saved_models.Model(student, name, NAMES, (16, 16, 3), preprocess.identity(3))
    saved_models.save_run(tmp_path, model)
    again = saved_models.load_run(tmp_path)
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(again.classifier.eval()(x), student(x))
    assert export_formats._timm_arguments(again) == {
        "img_size": 32,
        "depth": 2,
        "drop_path_rate": 0.1,
    }
    assert networks.pretrained_config(name).size == (32, 32)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18(open('x'))", "literals by keyword, as in resnet18"),
        ("resnet18(0.1)", "literals by keyword"),
        ("resnet18(**{'a': 1})", "literals by keyword"),
        ("resnet18(a=1, a=2)", "literals by keyword"),
        ("resnet18(nonsense=1)", "unexpected keyword argument 'nonsense'"),
        ("resnet18(num_classes=3)", "num_classes cannot be given"),
        ("resnet18(checkpoint_path='x')", "checkpoint_path cannot be given"),
        ("resnet18(pretrained_cfg_overlay={})", "pretrained_cfg_overlay cannot be given"),
        ("test_vit(img_size=0)", "img_size is a positive whole number"),
        ("test_vit(img_size='a')", "img_size is a number of pixels"),
        ("resnt18(drop_rate=0.1)", "did you mean 'resnet18'"),
        ("convnet(width=3)", "takes a width alone, as in convnet:32"),
    ],
)
def test_arguments_that_cannot_be_are_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        networks.build(name, SHAPE, 3)
    assert "\n" not in str(caught.value)


# --- paths


def test_paths_may_hold_commas_and_at_signs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a,b", "x@y", "run"):
        (tmp_path / folder).mkdir()
    for file in ("a,b/w.pth", "x@y/w@1.pth.tar", "plain"):
        (tmp_path / file).touch()
    both = (
        "resnet18@a,b/w.pth, resnet18(drop_rate=0.1,zero_init_last=False)@x@y/w@1.pth.tar,a,b,run"
    )
    assert network_names.split_names(both) == [
        "resnet18@a,b/w.pth",
        "resnet18(drop_rate=0.1,zero_init_last=False)@x@y/w@1.pth.tar",
        "a,b",
        "run",
    ]
    assert network_names.split_names("resnet18@plain,resnet34@plain") == [
        "resnet18@plain",
        "resnet34@plain",
    ]
    assert network_names.split_names("one,,two(x=(1,2)) ,") == ["one", "two(x=(1,2))"]
    found = network_names.parse("resnet18@x@y/w@1.pth.tar")
    assert (found.text, found.file) == ("resnet18", Path("x@y/w@1.pth.tar"))
    found = network_names.parse("local-dir:x@y@plain")
    assert (found.text, found.file) == ("local-dir:x@y", Path("plain"))
    assert network_names.parse("hf-hub:timm/resnet18@main").file is None
    assert network_names.absolute_name("resnet18@plain") == f"resnet18@{tmp_path}/plain"
    assert network_names.absolute_name("local-dir:x@y") == f"local-dir:{tmp_path}/x@y"
    assert network_names.absolute_name("convnet:32") == "convnet:32"
    with pytest.raises(UserError, match=r"there is no file none\.pth\.tar"):
        networks.check_name("resnet18@none.pth.tar")
    with pytest.raises(UserError, match="plain is a file: name its architecture too"):
        networks.check_name("plain")


# --- students whose classes stand in another order


@pytest.mark.parametrize(
    "name", ["convnet:8", "test_resnet", "test_vit", "torchvision:squeezenet1_1"]
)
def test_a_student_is_brought_to_the_order_of_the_data(tmp_path: Path, name: str) -> None:
    classifier = networks.build(name, SHAPE, 3, seed=1).eval()
    for parameter in classifier.parameters():  # some last layers start at 0
        nn.init.normal_(parameter, std=0.1)
    x = torch.rand(2, 3, 32, 32)
    before = classifier(x)
    model = saved_models.Model(classifier, name, NAMES, SHAPE, preprocess.identity(3))
    said: list[str] = []
    found = saved_models.match_classes(
        "student s", model, SHAPE, ("Owl", "cat", "dog"), said.append
    )
    assert found.classes == ("Owl", "cat", "dog")
    torch.testing.assert_close(found.classifier(x), before[:, [2, 0, 1]])
    assert said == ["student s: classes matched by name, in another order"]
    saved_models.save_run(tmp_path, found)
    torch.testing.assert_close(
        saved_models.load_run(tmp_path).classifier.eval()(x), found.classifier(x)
    )


def test_a_student_of_other_classes_is_refused() -> None:
    model = saved_models.Model(
        networks.build("mlp:8", SHAPE, 3), "mlp:8", NAMES, SHAPE, preprocess.identity(3)
    )
    assert saved_models.match_classes("s", model, SHAPE, NAMES) is model
    for classes, message in (
        (("0", "1", "2"), "calls its classes 'cat', 'dog', 'owl', the data '0', '1', '2'"),
        (("cat", "dog", "emu"), "has no class 'emu' of the data"),
        (NAMES[:2], "has 3 classes, the data have 2"),
    ):
        with pytest.raises(UserError, match=message):
            saved_models.match_classes("s", model, SHAPE, classes)
    with pytest.raises(UserError, match="takes images of shape"):
        saved_models.match_classes("s", model, (8, 8, 3), NAMES)
