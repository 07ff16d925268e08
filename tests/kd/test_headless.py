"""Students without a head, and teachers that teach by their features alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from kd_support import main, read_report, refused, stop_in
from PIL import Image

from kd.models import headless, networks, saved_models

CLASSES = ("cat", "dog", "eel")
RUN = ("--student", "mlp:8", "--epochs", 2, "--batch-size", 16, "--augment", "none")
HEADLESS = (*RUN, "--head", "none", "--loss", "rkd-distance:1")


def _pixels(label: int, rng: np.random.Generator) -> np.ndarray:
    pixels = rng.integers(0, 120, (8, 8), dtype=np.uint8)
    pixels[2 * label : 2 * label + 3] += 120
    return pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, their training images without classes, a teacher of two other classes, two students."""
    root, rng = tmp_path_factory.mktemp("headless"), np.random.default_rng(0)
    (root / "loose").mkdir()
    for label, name in enumerate(CLASSES):
        for part, count in (("train", 20), ("val", 6), ("test", 6)):
            (root / "data" / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(_pixels(label, rng))
                image.save(root / "data" / part / name / f"{i:02}.png")
                if part == "train":
                    image.save(root / "loose" / f"{20 * label + i:03}.png")
    for label, name in enumerate(("up", "down")):
        for i in range(20):
            where = root / "foreign" / name
            where.mkdir(parents=True, exist_ok=True)
            Image.fromarray(_pixels(2 * label, rng)).save(where / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        _enter(patch, root)
        foreign = ("--student", "mlp:16", "--epochs", 3, "--out", "teacher")
        main(patch, "train", "foreign", *foreign)
        main(patch, "train", "data", *HEADLESS, "--teacher", "teacher", "--out", "run")
        main(patch, "train", "loose", *HEADLESS, "--teacher", "teacher", "--out", "flat")
    return root


def _enter(patch: pytest.MonkeyPatch, root: Path) -> None:
    patch.chdir(root)
    patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    patch.setattr("kd.runs.curves.draw", lambda folder: None)


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    _enter(monkeypatch, folder)
    return monkeypatch


def _weights(run: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(run / "student.safetensors")


def test_the_network_without_its_head_returns_what_its_head_took() -> None:
    shape, images = (8, 8, 1), torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = networks.build("mlp:8", shape, 3).eval()
    cut = headless.remove_head("mlp:8", networks.build("mlp:8", shape, 3), shape).eval()
    weight, bias = list(whole.network.parameters())[-2:]
    assert cut(images).shape == (3, 8)
    assert torch.equal(cut(images) @ weight.T + bias, whole(images))


def test_a_teacher_of_other_classes_needs_no_labels(folder: Path) -> None:
    report = read_report(folder / "run")
    assert report["head"] == "none"
    assert report["test_accuracy"] is None
    assert report["test_images"] == 18
    assert report["test_probe_images"] == 60
    for probe in ("linear_probe", "nearest_neighbours"):
        assert 0 <= report[f"test_{probe}_accuracy"] <= 1
    model = saved_models.load_run(folder / "run")
    assert model.classes == ()
    assert not model.has_head
    assert not any(value.shape[0] == 3 for value in _weights(folder / "run").values())


def test_a_flat_folder_needs_neither_classes_nor_validation(folder: Path) -> None:
    report = read_report(folder / "flat")
    assert report["train_images"] == 60
    assert report["test_images"] == 0
    assert "no labels" in report["note"]


def test_training_is_resumed_to_the_bit(folder: Path, inside: pytest.MonkeyPatch) -> None:
    line = ("train", "loose", *HEADLESS, "--teacher", "teacher", "--out", "stopped")
    stop_in(inside, 3, *line)
    main(inside, "train", "--resume", "--out", "stopped")
    expected, resumed = _weights(folder / "flat"), _weights(folder / "stopped")
    assert expected.keys() == resumed.keys()
    assert all(np.array_equal(expected[name], resumed[name]) for name in expected)


def test_evaluate_repeats_the_probes_and_takes_other_data(
    inside: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    main(inside, "evaluate", "run", "--json")
    figures, report = json.loads(capsys.readouterr().out), read_report(folder / "run")
    for name in ("linear_probe_accuracy", "nearest_neighbours_accuracy", "probe_images"):
        assert figures[name] == report[f"test_{name}"]
    main(inside, "evaluate", "flat", "data", "--json")
    figures = json.loads(capsys.readouterr().out)
    assert figures["images"] == 18
    assert figures["probe_images"] == 60
    assert "no labels" in refused(inside, "evaluate", "flat")


def test_a_head_is_added_later(inside: pytest.MonkeyPatch, folder: Path) -> None:
    slow = ("--steps", 1, "--lr", 1e-12, "--batch-size", 16, "--weight-decay", 0)
    main(inside, "train", "data", "--student", "run", *slow, "--out", "full")
    before, after = _weights(folder / "run"), _weights(folder / "full")
    assert len(after) == len(before) + 2  # weight and bias of the head
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, atol=1e-6)
    assert saved_models.load_run(folder / "full").classes == CLASSES
    assert read_report(folder / "full")["head"] == "trained"


def test_features_and_an_exported_program_are_the_embedding(
    inside: pytest.MonkeyPatch, folder: Path
) -> None:
    main(inside, "features", "data", "--student", "run", "--workers", 0, "--out", "run.npz")
    main(inside, "export", "run", "--format", "pt2", "--out", "run.pt2")
    with np.load(folder / "run.npz") as stored:
        assert stored["images"].shape[1:] == (1, 1, 8)
    program = torch.export.load(folder / "run.pt2").module()
    assert program(torch.rand(2, 1, 8, 8)).shape == (2, 8)
    line = ("train", "data", *RUN, "--teacher", "run.pt2", "--out", "no")
    assert "gives embeddings" in refused(inside, *line, "--loss", "ce:1,srd:1")


def test_labels_and_foreign_features_go_together(
    inside: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ("train", "data", *RUN, "--teacher", "teacher", "--loss", "ce:1,rkd-distance:1")
    main(inside, *line, "--out", "both")
    assert "by its features alone" in capsys.readouterr().err
    report = read_report(folder / "both")
    assert report["head"] == "trained"
    assert report["test_accuracy"] is not None
    assert "teacher_agreement" not in report
    # A run without a head teaches alike.
    main(inside, *line[:-4], "--teacher", "run", "--loss", line[-1], "--out", "of-run")
    main(inside, "evaluate", "both")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--loss", "kd:1"), "--loss kd takes labels or answers"),
        (("--loss", "ce:1,srd:2"), "--loss ce takes labels or answers"),
        (("--loss", "adv:1:logits=1"), "--loss adv takes labels or answers"),
        (("--mixup", 0.5), "--mixup needs classes"),
        (("--metric", "nll"), "--metric nll needs classes"),
        (("--min-teacher-accuracy", 0.5), "--min-teacher-accuracy needs classes"),
        (("--quantize", "w8a8"), "--quantize needs classes"),
        (("--validation-fraction", 0.2), "--validation-fraction needs classes"),
    ],
)
def test_what_needs_classes_is_refused(
    inside: pytest.MonkeyPatch, arguments: tuple[object, ...], expected: str
) -> None:
    line = ("train", "loose", *RUN, "--head", "none", "--teacher", "teacher")
    assert expected in refused(inside, *line, *arguments, "--out", "no")


def test_answers_of_other_classes_are_still_refused(inside: pytest.MonkeyPatch) -> None:
    line = ("train", "data", *RUN, "--out", "no")
    assert "has 2 classes, the data have 3" in refused(inside, *line, "--teacher", "teacher")
    assert "run has no head" in refused(inside, *line, "--teacher", "run")
    assert "add --teacher" in refused(inside, *line, "--head", "none")
    assert "no head" in refused(inside, "evaluate", "run", "--teacher", "teacher")
    assert "no head" in refused(inside, "quantize", "run")
