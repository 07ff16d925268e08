"""The library: arrays in, a distilled set out, and nothing else."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dsdistill
from dsdistill.commands import distil
from dsdistill.harness.data import datasets, preprocess
from dsdistill.harness.errors import UserError
from dsdistill.options import KipOptions, LabelSolveOptions

SMALL: dict[str, Any] = {"images_per_class": 1, "steps": 4, "target_batch": 200, "progress": False}


@pytest.fixture(scope="module")
def digits() -> dsdistill.ImageData:
    return dsdistill.load_data("digits", progress=False)


@pytest.fixture(scope="module")
def distilled(digits: dsdistill.ImageData) -> dsdistill.Distilled:
    return dsdistill.kip(*digits.train, **SMALL)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import dsdistill, sys; dir(dsdistill)\n"
        "print([m for m in ('jax', 'numpy', 'torch', 'tyro', 'scipy') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout == "[]\n", answer.stderr


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="kipp"):
        dsdistill.kipp  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
    assert set(dsdistill.__all__) <= set(dir(dsdistill))


@pytest.mark.parametrize(
    ("function", "options"),
    [(dsdistill.kip, KipOptions()), (dsdistill.label_solve, LabelSolveOptions())],
)
def test_arguments_have_the_defaults_of_the_command(function: Any, options: Any) -> None:
    parameters = inspect.signature(function).parameters
    shared = parameters.keys() & vars(options).keys()
    assert {name: parameters[name].default for name in shared} == {
        name: getattr(options, name) for name in shared
    }
    # Every option of the method is an argument; files and hosts are the command's.
    assert vars(options).keys() - shared == {
        "data",
        "data_root",
        "image_size",
        "channels",
        "out",
        "resume",
        "hosts",
    }


def test_kip_returns_the_set_of_the_command(
    digits: dsdistill.ImageData, distilled: dsdistill.Distilled, tmp_path: Path
) -> None:
    options = KipOptions("digits", images_per_class=1, steps=4, target_batch=200, out=tmp_path)
    by_command = dsdistill.load(distil.run_kip(options))
    np.testing.assert_array_equal(distilled.images, by_command.images)
    assert distilled.classes == by_command.classes == digits.classes
    assert distilled.figures["validation_loss"] == by_command.figures["validation_loss"]


def test_label_solve_returns_the_set_of_the_command(
    digits: dsdistill.ImageData, tmp_path: Path
) -> None:
    solved = dsdistill.label_solve(*digits.train, images_per_class=1, progress=False)
    options = LabelSolveOptions("digits", images_per_class=1, out=tmp_path / "ls")
    by_command = dsdistill.load(distil.run_label_solve(options))
    np.testing.assert_array_equal(solved.images, by_command.images)
    np.testing.assert_array_equal(solved.labels, by_command.labels)


class Pixels(torch.nn.Module):
    """A network whose features are the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(images.flatten(1))


def pixels_of(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)


def test_select_chooses_by_a_function_or_a_network(digits: dsdistill.ImageData) -> None:
    chosen = dsdistill.select(
        *digits.train, features=pixels_of, images_per_class=1, by="centre", progress=False
    )
    rest = datasets.load("digits", root=Path("unused")).train
    for label in range(10):
        members = rest.images(np.flatnonzero(rest.labels == label))
        away = np.linalg.norm((members - members.mean(0)).reshape(len(members), -1), axis=1)
        np.testing.assert_array_equal(chosen.images[label], members[away.argmin()])
    assert chosen.preprocess.kind == "none"
    assert 0.5 < chosen.figures["validation_accuracy"] < chosen.figures["full_validation_accuracy"]
    assert "test_accuracy" not in chosen.figures
    own = f"{__name__}:Pixels"
    by_name = dsdistill.select(*digits.train, features=own, images_per_class=1, progress=False)
    by_function = dsdistill.select(
        *digits.train, features=pixels_of, images_per_class=1, progress=False
    )
    np.testing.assert_array_equal(by_name.images, by_function.images)
    assert by_name.figures["validation_accuracy"] > chosen.figures["validation_accuracy"]


def test_wrong_features_are_one_line(digits: dsdistill.ImageData) -> None:
    given: dict[str, Any] = {"images_per_class": 1, "progress": False}
    with pytest.raises(UserError, match=r'by="crops" needs the name of a network'):
        dsdistill.select(*digits.train, features=pixels_of, by="crops", **given)
    with pytest.raises(UserError, match=r"numbers of the shape \(64, d\), got float32 \(8, 8, 1\)"):
        dsdistill.select(*digits.train, features=lambda images: images[0], **given)
    with pytest.raises(UserError, match='crops needs by="crops", got by="ridge"'):
        dsdistill.select(*digits.train, features=pixels_of, crops=3, **given)
    with pytest.raises(UserError, match="unknown network"):
        dsdistill.select(*digits.train, features="nothing", **given)


def test_nothing_is_printed_or_written(
    digits: dsdistill.ImageData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    dsdistill.kip(*digits.train, **SMALL | {"validation_fraction": 0})
    assert capfd.readouterr() == ("", "")
    assert not os.listdir(tmp_path)


def test_progress_is_printed_if_asked(
    digits: dsdistill.ImageData, capfd: pytest.CaptureFixture
) -> None:
    dsdistill.label_solve(*digits.train, images_per_class=1)
    assert "targets" in capfd.readouterr().err


def test_steps_are_reported(digits: dsdistill.ImageData) -> None:
    steps: list[tuple[int, set[str]]] = []
    dsdistill.kip(*digits.train, **SMALL, on_step=lambda step, f: steps.append((step, set(f))))
    assert [step for step, _ in steps] == [1, 2, 3, 4]
    assert all("loss" in names for _, names in steps)


def test_a_predictor_takes_what_kip_takes(
    digits: dsdistill.ImageData, distilled: dsdistill.Distilled
) -> None:
    x, y = digits.test
    scores = distilled.predictor()(x)
    assert scores.shape == (len(x), 10)
    assert (scores.argmax(1) == y).mean() > 0.6
    np.testing.assert_array_equal(distilled.predictor()(x[..., 0]), scores)
    with pytest.raises(UserError, match=r"images must be \(8, 8, 1\), as in the set"):
        distilled.predictor()(x[:, :4])


def test_pixels_are_what_a_picture_shows(distilled: dsdistill.Distilled) -> None:
    pixels = distilled.as_pixels()
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    inside = (pixels > 0) & (pixels < 1)
    again = distilled.preprocess.apply(pixels)
    np.testing.assert_allclose(again[inside], distilled.images[inside], atol=1e-5)


def test_a_saved_set_is_the_same_when_loaded(
    digits: dsdistill.ImageData, distilled: dsdistill.Distilled, tmp_path: Path
) -> None:
    distilled.save(tmp_path / "set.safetensors")
    loaded = dsdistill.load(str(tmp_path / "set.safetensors"))
    x = digits.test[0][:20]
    np.testing.assert_array_equal(loaded.predictor()(x), distilled.predictor()(x))
    assert repr(loaded) == "<Distilled: 10 images of 8x8x1, 10 classes, by kip with fc(1)>"


def test_labels_are_names_or_any_integers(digits: dsdistill.ImageData) -> None:
    images, labels = digits.train
    by_index = dsdistill.label_solve(images, labels, images_per_class=1, progress=False)
    for given in ([f"class {label}" for label in labels], labels * 7 - 3):
        other = dsdistill.label_solve(images, given, images_per_class=1, progress=False)
        np.testing.assert_array_equal(other.labels, by_index.labels)
    assert other.classes[:3] == ("-3", "4", "11")


def test_given_validation_images_choose(digits: dsdistill.ImageData) -> None:
    small = dsdistill.kip(*digits.train, **SMALL, validation=digits.test)
    assert small.provenance["data"]["train"] == len(digits.train[0])
    assert small.provenance["data"]["validation"] == len(digits.test[0])
    with pytest.raises(UserError, match="validation_fraction has no effect with validation"):
        dsdistill.kip(*digits.train, **SMALL, validation=digits.test, validation_fraction=0.2)


def test_validation_images_that_the_set_has_seen_are_said(
    digits: dsdistill.ImageData, capfd: pytest.CaptureFixture
) -> None:
    solved = dsdistill.label_solve(*digits.train, images_per_class=1, progress=False)
    options: dict[str, Any] = {"learners": ["ridge"], "controls": [], "seeds": 1}
    dsdistill.evaluate(solved, train=digits.train, test=digits.test, **options)
    assert "made of all training images, including the validation" in capfd.readouterr().err
    rest = digits.test[0][:180], digits.test[1][:180]
    held_out = digits.test[0][180:], digits.test[1][180:]
    dsdistill.evaluate(solved, train=digits.train, test=rest, validation=held_out, **options)
    assert "made of all training images" not in capfd.readouterr().err


def test_a_search_starts_from_another_set(
    digits: dsdistill.ImageData, distilled: dsdistill.Distilled
) -> None:
    further = dsdistill.kip(*digits.train, **SMALL | {"images_per_class": None}, init=distilled)
    assert further.figures["validation_loss"] < distilled.figures["validation_loss"]  # type: ignore[operator]


def test_a_stopped_search_goes_on_to_the_same_bits(
    digits: dsdistill.ImageData, distilled: dsdistill.Distilled, tmp_path: Path
) -> None:
    def stop(step: int, figures: object) -> None:
        if step == 2:
            raise KeyboardInterrupt

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        dsdistill.kip(*digits.train, **SMALL, checkpoint=folder, on_step=stop)
    steps: list[int] = []
    same = {**SMALL, "checkpoint": folder, "on_step": lambda step, figures: steps.append(step)}
    np.testing.assert_array_equal(dsdistill.kip(*digits.train, **same).images, distilled.images)
    assert steps[-1] == 4
    assert 1 not in steps
    # Finished: the same call reads it, another one is refused.
    steps.clear()
    np.testing.assert_array_equal(dsdistill.kip(*digits.train, **same).images, distilled.images)
    assert not steps
    with pytest.raises(UserError, match="other data or arguments: choose another checkpoint"):
        dsdistill.kip(*digits.train, **same | {"seed": 1})
    images, labels = digits.train
    with pytest.raises(UserError, match="other data or arguments: choose another checkpoint"):
        dsdistill.kip(images[::-1], labels[::-1], **same)


def test_evaluate_measures_a_set_and_its_controls(
    digits: dsdistill.ImageData, distilled: dsdistill.Distilled, tmp_path: Path
) -> None:
    x, y = digits.test
    report = dsdistill.evaluate(
        distilled,
        train=digits.train,
        test=(x, y),
        also={"other": distilled},
        learners=["ridge"],
        controls=["random"],
        seeds=2,
        out=tmp_path / "report",
        progress=False,
    )
    row = report.row("ridge", "distilled")
    assert row is not None
    assert row.accuracy is not None
    assert row.accuracy.mean == pytest.approx((distilled.predictor()(x).argmax(1) == y).mean())
    assert {row.arm for row in report.rows} == {"distilled", "distilled-hard", "other", "random"}
    also = report.row("ridge", "other")
    assert also is not None
    assert also.accuracy == row.accuracy
    # The images that chose the step of the set choose here too.
    assert report.data["validation"] == distilled.provenance["data"]["validation"]
    assert (tmp_path / "report" / "report.html").exists()
    with pytest.raises(UserError, match="already holds a report: choose another out"):
        dsdistill.evaluate(distilled, train=digits.train, test=(x, y), out=tmp_path / "report")
    with pytest.raises(UserError, match="also cannot name a set 'random'"):
        dsdistill.evaluate(
            distilled, train=digits.train, test=(x, y), also={"random": distilled}, progress=False
        )


def test_a_network_of_neural_tangents_is_a_kernel(
    digits: dsdistill.ImageData, tmp_path: Path
) -> None:
    stax = dsdistill.load_neural_tangents().stax
    std = {"W_std": 2**0.5, "b_std": 0.1}
    layers = stax.Flatten(), stax.Dense(9, **std), stax.Relu(), stax.Dense(1, **std)
    network = stax.serial(*layers)
    small: dict[str, Any] = {"images_per_class": 1, "progress": False}
    own = dsdistill.label_solve(*digits.train, kernel=network, **small)
    fc = dsdistill.label_solve(*digits.train, **small)
    np.testing.assert_allclose(
        own.labels, fc.labels, atol=2e-4
    )  # float32 kernels beside exact ones
    x = digits.test[0][:9]
    np.testing.assert_allclose(own.predictor()(x), fc.predictor()(x), atol=2e-3)
    own.save(tmp_path / "set.safetensors")
    loaded = dsdistill.load(tmp_path / "set.safetensors")
    with pytest.raises(UserError, match=r"is code, .* give predictor\(kernel=...\)"):
        loaded.predictor()
    np.testing.assert_array_equal(loaded.predictor(network)(x), own.predictor()(x))


def test_an_argument_that_is_left_out_is_another_argument(
    digits: dsdistill.ImageData, tmp_path: Path
) -> None:
    """Also one whose default is None, as `augment`: the search would go on without it."""

    def stop(step: int, figures: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dsdistill.kip(*digits.train, **SMALL, augment="flip", checkpoint=tmp_path, on_step=stop)
    with pytest.raises(UserError, match="started with augment flip, got None"):
        dsdistill.kip(*digits.train, **SMALL, checkpoint=tmp_path)


def test_a_checkpoint_is_of_one_kernel(digits: dsdistill.ImageData, tmp_path: Path) -> None:
    def linear(scale: float) -> Any:
        def kernel(x1: Any, x2: Any, get: str) -> Any:
            x2 = x1 if x2 is None else x2
            return scale + x1.reshape(len(x1), -1) @ x2.reshape(len(x2), -1).T

        return kernel

    same: dict[str, Any] = {"images_per_class": 1, "checkpoint": tmp_path, "progress": False}
    first = dsdistill.label_solve(*digits.train, kernel=linear(1), **same)
    again = dsdistill.label_solve(*digits.train, kernel=linear(1), **same)
    np.testing.assert_array_equal(again.labels, first.labels)
    with pytest.raises(UserError, match="other data or arguments: choose another checkpoint"):
        dsdistill.label_solve(*digits.train, kernel=linear(2), **same)
    with pytest.raises(UserError, match="depth has no effect on a network of your own"):
        dsdistill.label_solve(*digits.train, kernel=linear(1), depth=2)


def test_results_with_a_teacher_that_is_a_function_are_not_reused(
    digits: dsdistill.ImageData, distilled: dsdistill.Distilled, tmp_path: Path
) -> None:
    def teacher(shift: int) -> Any:
        return lambda images: np.eye(10)[np.arange(len(images)) % 10] * 5 + shift * np.arange(10)

    agreements = []
    for shift in (0, 1):
        (tmp_path / "report.json").unlink(missing_ok=True)
        report = dsdistill.evaluate(
            distilled,
            train=digits.train,
            test=digits.test,
            learners=["ridge"],
            controls=[],
            seeds=1,
            teacher=teacher(shift),
            out=tmp_path,
            progress=False,
        )
        row = report.row("ridge", "distilled")
        assert row is not None
        agreements.append(row.mean("teacher_agreement"))
    assert agreements[0] != agreements[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"images_per_class": 1000}, "lower images_per_class"),
        ({"kernel": "fd"}, "unknown kernel 'fd'; did you mean 'fc'"),
        ({"validation_fraction": 1.0}, r"validation_fraction must be in \[0, 1\), got 1.0"),
        ({"label_learning_rate": 0.1}, "label_learning_rate needs learn_labels"),
        ({"init": "nowhere"}, "unknown init 'nowhere'"),
        ({"classes": ["a", "a"]}, "classes must be distinct names"),
        ({"classes": ["a", "b"]}, "labels must be from 0 to 1 for 2 classes, got 0 to 9"),
        ({"images": "bytes"}, "rescale them so that 0 is black and 1 is white"),
        ({"images": "channels"}, r"put the channels last with images.transpose\(0, 2, 3, 1\)"),
        ({"labels": "short"}, "one per image"),
        ({"labels": "one-hot"}, "one per image"),
        ({"validation": "other"}, r"validation images must be \(8, 8, 1\), as in train"),
    ],
)
def test_wrong_arguments_are_one_line_of_their_names(
    digits: dsdistill.ImageData, arguments: dict[str, Any], message: str
) -> None:
    images, labels = digits.train
    variants = {
        "bytes": images * 16,
        "channels": images.transpose(0, 3, 1, 2),
        "short": labels[:-1],
        "one-hot": np.eye(10)[labels],
        "other": (images[:, :4], labels),
    }
    given = {"images": images, "labels": labels} | {
        name: variants.get(value, value) if isinstance(value, str) else value
        for name, value in arguments.items()
    }
    with pytest.raises(UserError, match=message) as caught:
        dsdistill.kip(**SMALL | given)
    assert "\n" not in str(caught.value)
    assert "--" not in str(caught.value)


def test_load_data_reads_what_the_commands_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "own.npz",
        images=rng.integers(0, 256, (20, 6, 6, 3), np.uint8),
        labels=np.arange(20) % 2,
        classes=["cat", "dog"],
    )
    data = dsdistill.load_data(tmp_path / "own.npz", image_size=4, channels=1, progress=False)
    assert data.train[0].shape == (16, 4, 4, 1)
    assert data.test[0].shape == (4, 4, 4, 1)
    assert data.validation is None
    assert data.classes == ("cat", "dog")
    splits = datasets.load(str(tmp_path / "own.npz"), root=tmp_path, image_size=4, channels=1)
    np.testing.assert_array_equal(data.test[0], splits.test.images())


def test_a_call_goes_on_with_the_preprocessing_that_it_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with what fits today; and a checkpoint of an earlier version with its own."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), np.arange(40) % 2
    arguments: dict[str, Any] = {"images_per_class": 1, "target_batch": 8, "progress": False}
    arguments |= {"steps": 4, "validation_fraction": 0}

    def stop(step: int, figures: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dsdistill.kip(images, labels, **arguments, checkpoint=tmp_path, on_step=stop)
    monkeypatch.setattr(preprocess, "default_kind", lambda *_, **__: pytest.fail("chose again"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("chosen") == {"preprocess": "standardise"}
    shutil.copytree(tmp_path, tmp_path / "old")
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    for folder, kind in ((tmp_path, "standardise"), (tmp_path / "old", "zca")):
        for _ in range(2):  # the second call finds the finished set
            distilled = dsdistill.kip(images, labels, **arguments, checkpoint=folder)
            assert distilled.preprocess.kind == kind
