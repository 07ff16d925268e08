"""Students that see less than their teacher: the views by hand, and what a run keeps of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import torch.nn.functional as F
from kd_support import main, read_report, refused, stop_in

from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError
from kd.models import networks, saved_models, student_view

MEAN, STD = np.array([0.4, 0.5, 0.6], np.float32), np.array([0.1, 0.2, 0.4], np.float32)
COLOUR = Preprocess("standardise", MEAN, STD)
GRAY = Preprocess("standardise", MEAN[:1], STD[:1])
PIXELS = torch.rand(5, 3, 8, 12, generator=torch.Generator().manual_seed(0))
IMAGES = (PIXELS - torch.from_numpy(MEAN).view(3, 1, 1)) / torch.from_numpy(STD).view(3, 1, 1)


def _view(text: str) -> student_view.StudentView:
    return student_view.parse(text, (8, 12, 3), COLOUR)


def _luma(pixels: torch.Tensor) -> torch.Tensor:
    return torch.einsum("nchw,c->nhw", pixels, torch.tensor(student_view.LUMA))[:, None]


def test_gray_is_the_brightness_of_pixels_up_to_a_scale_and_a_constant() -> None:
    gray, brightness = _view("gray")(IMAGES), _luma(PIXELS)
    scale = float(np.array(student_view.LUMA) @ STD)
    torch.testing.assert_close((gray - gray.mean()) * scale, brightness - brightness.mean())


def test_size_shrinks_the_shorter_side_with_antialiasing() -> None:
    shrunk = _view("size:4")(IMAGES)
    # Antialiased bilinear weights at half the size: triangles of two pixels to either side.
    expected = F.interpolate(IMAGES, (4, 6), mode="bilinear", antialias=True)
    torch.testing.assert_close(shrunk, expected)
    rows = np.array([1, 3, 3, 1]) / 8
    by_hand = np.einsum("i,j,ij->", rows, rows, IMAGES[0, 0, 1:5, 1:5].numpy())
    assert float(shrunk[0, 0, 1, 1]) == pytest.approx(by_hand, abs=1e-5)


def test_channels_are_chosen_in_their_order() -> None:
    assert torch.equal(_view("channels:2,0")(IMAGES), IMAGES[:, [2, 0]])


def test_edges_are_the_length_of_sobels_gradient() -> None:
    ramp = torch.arange(12.0).expand(1, 1, 8, 12) + 2 * torch.arange(8.0)[:, None]
    view = student_view.parse("edges", (8, 12, 1), GRAY)
    inside = view(ramp)[0, 0, 1:-1, 1:-1]
    torch.testing.assert_close(inside, torch.full_like(inside, 5**0.5))
    flat = torch.ones(1, 1, 8, 12, requires_grad=True)
    view(flat).sum().backward()
    assert flat.grad is not None
    assert torch.isfinite(flat.grad).all()
    torch.testing.assert_close(_view("edges")(IMAGES), view(_view("gray")(IMAGES)))


def test_steps_follow_each_other() -> None:
    both = _view("gray,size:4")
    assert both.output_shape == (4, 6, 1)
    torch.testing.assert_close(both(IMAGES), _view("size:4,gray")(IMAGES))
    assert _view("channels:0,1,size:2").output_shape == (2, 3, 2)


@pytest.mark.parametrize("text", ["size:8", "channels:0,1,2"])
def test_a_view_of_the_whole_image_changes_no_bit(text: str) -> None:
    view = _view(text)
    plain = networks.build("mlp:8", (8, 12, 3), 4)
    assert torch.equal(view(IMAGES), IMAGES)
    seen = networks.build("mlp:8", (8, 12, 3), 4, view=view)
    assert torch.equal(seen(IMAGES), plain(IMAGES))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "grey",
            "unknown student view 'grey'; did you mean 'gray'",
        ),
        ("size:9", "size:9 must have a shorter side from 1 to 8"),
        ("size:x", "size:x must have a shorter side from 1 to 8"),
        ("size:4,size:5", "size:5 must have a shorter side from 1 to 4"),
        ("channels:3", "channels:3 must name different channels from 0 to 2"),
        ("channels:1,1", "must name different channels"),
        ("channels:", "must name different channels"),
        ("gray,gray", "gray needs images of 3 channels, got 1"),
        ("channels:0,1,edges", "edges needs images of 3 channels, got 2"),
    ],
)
def test_what_is_no_view_is_refused_in_one_line(text: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        _view(text)


def test_a_student_is_hashed_with_its_view() -> None:
    names = [set(_view(text).state_dict()["code"].tolist()) for text in ("gray", "edges")]
    assert names[0] != names[1]


LINE = ("train", "digits", "--epochs", 4, "--student-view", "size:4", "--student", "mlp:16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of whole digits, and its student of 4x4 pixels."""
    root = tmp_path_factory.mktemp("views")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("kd.runs.curves.draw", lambda folder: None)
        main(patch, "train", "digits", "--epochs", 4, "--student", "mlp:32", "--out", "teacher")
        main(patch, *LINE, "--teacher", "teacher", "--out", "run")
    return root


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("kd.runs.curves.draw", lambda folder: None)
    return monkeypatch


def test_a_run_keeps_its_view_and_takes_whole_images(folder: Path) -> None:
    model = saved_models.load_run(folder / "run")
    assert model.shape == (8, 8, 1)
    assert model.classifier.view is not None
    whole = torch.rand(3, 1, 8, 8)
    small = F.interpolate(whole, (4, 4), mode="bilinear", antialias=True)
    torch.testing.assert_close(model.classifier(whole), model.classifier.network(small))
    weights = safetensors.numpy.load_file(folder / "run" / "student.safetensors")
    assert weights["1.weight"].shape == (16, 16)
    # The teacher is judged, and compared, on its own images.
    figures, teacher = read_report(folder / "run"), read_report(folder / "teacher")
    assert figures["teacher_accuracy"] == pytest.approx(teacher["test_accuracy"])


def test_a_killed_training_ends_as_the_same_student(
    inside: pytest.MonkeyPatch, folder: Path
) -> None:
    stop_in(inside, 30, *LINE, "--teacher", "teacher", "--out", "stopped")
    main(inside, "train", "--out", "stopped", "--resume")
    whole, resumed = (
        safetensors.numpy.load_file(folder / name / "student.safetensors")
        for name in ("run", "stopped")
    )
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("form", ["onnx", "pt2", "safetensors"])
def test_the_view_is_in_what_is_exported(form: str, inside: pytest.MonkeyPatch, capsys) -> None:
    main(inside, "export", "run", "--format", form, "--out", f"out.{form}")
    assert "random images" in capsys.readouterr().out  # compared on whole images
    if form == "onnx":
        return
    main(inside, "evaluate", "run", "--json")
    accuracy = json.loads(capsys.readouterr().out)["accuracy"]
    line = ("train", "digits", "--epochs", 1, "--student", "mlp:4", "--teacher", f"out.{form}")
    main(inside, *line, "--out", f"below-{form}")
    assert read_report(Path(f"below-{form}"))["teacher_accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("--student", "run"), "run brings its view of the images: leave --student-view out"),
        (("--preprocess", "zca"), "--student-view size:4 is of pixels, which --preprocess zca"),
        (("--student-view", "gray"), "gray needs images of 3 channels, got 1"),
    ],
)
def test_what_has_no_view_is_refused(more, line: str, inside: pytest.MonkeyPatch) -> None:
    assert line in refused(inside, *LINE, *more, "--out", "refused")
