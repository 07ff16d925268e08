"""Transfer sets: what is trained on, what is refused, and how one-sided answers show."""

import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from kd_support import main, read_report, refused, stop_in
from PIL import Image

from dsdistill.harness.data import distilled_set, preprocess
from dsdistill.harness.data.distilled_set import DistilledSet
from dsdistill.harness.errors import UserError
from kd.data import transfer_images
from kd.data.data_source import DataSource
from kd.evaluation import answer_balance

CLASSES = ("0", "1", "2")
RUN = ("--student", "mlp:8", "--epochs", 2, "--batch-size", 16, "--augment", "crop-flip")


def _pixels(label: int, rng: np.random.Generator) -> np.ndarray:
    pixels = rng.integers(0, 120, (8, 8), dtype=np.uint8)
    pixels[2 * label : 2 * label + 3] += 120
    return pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data in three parts, their training images without classes, a teacher, two students."""
    root, rng = tmp_path_factory.mktemp("transfer"), np.random.default_rng(0)
    number = 0
    for label, name in enumerate(CLASSES):
        for part, count in (("train", 20), ("val", 6), ("test", 6)):
            (root / "data" / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(_pixels(label, rng))
                image.save(root / "data" / part / name / f"{i:02}.png")
                if part == "train":
                    where = root / "loose" / "inner"
                    where.mkdir(parents=True, exist_ok=True)
                    image.save(where / f"{number:03}.png")
                    number += 1
    dark = root / "dark"
    dark.mkdir()
    for i in range(20):
        Image.fromarray(rng.integers(0, 5, (9, 12), dtype=np.uint8)).save(dark / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("kd.runs.curves.draw", lambda folder: None)
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        main(patch, "train", "data", "--student", "mlp:16", "--epochs", 8, "--out", "teacher")
        line = ("train", "data", *RUN, "--teacher", "teacher")
        main(patch, *line, "--loss", "kd:1:temperature=4", "--out", "plain")
        main(patch, *line, "--transfer", "loose", "--out", "run")
    return root


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr("kd.runs.curves.draw", lambda folder: None)
    return monkeypatch


def _weights(run: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(run / "student.safetensors")


def test_the_same_images_without_labels_train_the_same_student(folder: Path) -> None:
    plain, run = _weights(folder / "plain"), _weights(folder / "run")
    assert all(np.array_equal(plain[name], run[name]) for name in plain)
    assert (
        read_report(folder / "plain")["test_accuracy"]
        == (read_report(folder / "run")["test_accuracy"])
    )


def test_the_report_counts_the_teachers_answers(folder: Path) -> None:
    report = read_report(folder / "run")
    answers = report["transfer"]
    assert answers["name"] == "loose"
    assert sum(answers["answered_classes"].values()) == report["train_images"] == 60
    assert answers["mean_answer_entropy_share"] == pytest.approx(
        answers["mean_answer_entropy"] / math.log(3)
    )
    assert "transfer" not in read_report(folder / "plain")


def test_a_stopped_training_ends_as_the_same_student(
    inside: pytest.MonkeyPatch, folder: Path
) -> None:
    line = ("train", "data", *RUN, "--teacher", "teacher", "--transfer", "loose")
    stop_in(inside, 5, *line, "--out", "stopped")
    main(inside, "train", "--out", "stopped", "--resume")
    whole, resumed = _weights(folder / "run"), _weights(folder / "stopped")
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


def test_other_images_are_refused_on_resume(inside: pytest.MonkeyPatch, folder: Path) -> None:
    line = ("train", "data", *RUN, "--teacher", "teacher", "--transfer", "changing")
    (folder / "changing").mkdir()
    for i in range(20):
        Image.fromarray(np.full((8, 8), 9 * i, np.uint8)).save(folder / f"changing/{i}.png")
    stop_in(inside, 2, *line, "--out", "changed")
    (folder / "changing" / "3.png").unlink()
    assert "transfer images" in refused(inside, "train", "--out", "changed", "--resume")


def test_one_sided_answers_are_warned_of(inside: pytest.MonkeyPatch, capsys) -> None:
    inside.setattr(answer_balance, "LEAST_SHARE", 1.01)  # no answers are that balanced
    line = ("train", "data", *RUN, "--teacher", "teacher", "--image-size", 8)
    main(inside, *line, "--transfer", "dark", "--out", "one-sided")
    assert "answers for the transfer set are one-sided" in "".join(capsys.readouterr())
    assert read_report(Path("one-sided"))["train_images"] == 20


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("--loss", "ce:1,kd:1"), "--loss ce takes labels, and the images of --transfer have"),
        (("--loss", "dkd:1"), "--loss dkd takes labels"),
        (("--loss", "crd:1,kd:1"), "--loss crd takes labels"),
        (("--transfer", "data"), "--transfer data is DATA itself"),
        (("--transfer", "nowhere"), "nowhere"),
        (("--transfer", "teacher"), "teacher holds no images"),
        (("--augment", "imagenet", "--image-size", 8), "--transfer is decoded before"),
    ],
)
def test_what_does_not_fit_is_refused(more, line: str, inside: pytest.MonkeyPatch) -> None:
    given = ("train", "data", *RUN, "--teacher", "teacher", "--transfer", "loose", *more)
    assert line in refused(inside, *given, "--out", "refused")
    assert not Path("refused").exists()


def test_a_transfer_set_needs_a_teacher(inside: pytest.MonkeyPatch) -> None:
    line = refused(inside, "train", "data", "--transfer", "loose")
    assert "--transfer needs --teacher" in line


def test_of_a_split_folder_the_training_part_alone_is_read(folder: Path, inside) -> None:
    images = transfer_images.load("data", root=folder, shape=(8, 8, 1), classes=CLASSES)
    loose = transfer_images.load("loose", root=folder, shape=(8, 8, 1), classes=CLASSES)
    assert np.array_equal(images.images(), loose.images())
    assert not images.labels.any()


def test_of_data_without_parts_all_images_are_read(tmp_path: Path) -> None:
    """There is nothing to hold out for: validation and test images are those of DATA."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "labelled.npz", images=pixels, labels=np.arange(30) % 3)
    np.savez(tmp_path / "bare.npz", images=pixels)
    for name in ("labelled.npz", "bare.npz"):
        images = transfer_images.load(
            str(tmp_path / name), root=tmp_path, shape=(8, 8, 1), classes=CLASSES
        )
        assert np.array_equal(images.images(), pixels)
        assert not images.labels.any()
    digits = transfer_images.load("digits", root=tmp_path, shape=(8, 8, 1), classes=CLASSES)
    assert len(digits) == 1797
    np.savez(tmp_path / "other.npz", pixels=pixels)
    with pytest.raises(UserError, match=r"must hold an array 'images', has \['pixels'\]"):
        transfer_images.load(
            str(tmp_path / "other.npz"), root=tmp_path, shape=(8, 8, 1), classes=CLASSES
        )


def test_pixels_of_a_distilled_set_are_what_it_was_made_of(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).random((12, 8, 8, 1), np.float32)
    fitted = preprocess.fit("standardise", lambda size: iter([pixels]), (8, 8, 1), True)
    labels = np.eye(3, dtype=np.float32)[np.arange(12) % 3] - np.float32(1 / 3)
    made = DistilledSet(fitted.apply(pixels), labels, fitted, CLASSES, {"method": "kip"})
    distilled_set.save(tmp_path / "set.safetensors", made)
    name = str(tmp_path / "set.safetensors")
    images = transfer_images.load(name, root=tmp_path, shape=(8, 8, 1), classes=CLASSES)
    np.testing.assert_allclose(images.images(), pixels, atol=1e-6)
    with pytest.raises(UserError, match="8x8 pixels and 1 channels, and the data have 16x16"):
        transfer_images.load(name, root=tmp_path, shape=(16, 16, 1), classes=CLASSES)


def test_the_balance_of_answers_by_hand() -> None:
    even = answer_balance.measure(np.eye(4)[[0, 1, 2, 3]])
    assert even.entropy == pytest.approx(math.log(4))
    assert even.share == pytest.approx(1)
    assert not even.is_one_sided
    constant = answer_balance.measure(np.eye(4)[[2, 2, 2]])
    assert constant.entropy == 0
    assert constant.counts.tolist() == [0, 0, 3, 0]
    # The mean answer is (0.75, 0.25): 0.75 ln(4/3) + 0.25 ln 4.
    mixed = answer_balance.measure(np.array([[0.9, 0.1], [0.6, 0.4]]))
    assert mixed.entropy == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert mixed.counts.tolist() == [2, 0]
    first, *warning = answer_balance.describe(constant, ("a", "b", "c", "d"))
    assert "entropy of the teacher's mean answer 0.00 of 1.39 nats (0%)" in first
    assert "c 3, a 0" in first
    assert "one-sided" in warning[0]
    assert len(answer_balance.describe(even, ("a", "b", "c", "d"))) == 1


def test_codes_are_fitted_to_the_images_trained_on(inside: pytest.MonkeyPatch) -> None:
    drawn = []
    sample = DataSource.transfer_sample
    inside.setattr(DataSource, "transfer_sample", lambda *args: drawn.append(1) or sample(*args))
    line = ("train", "data", *RUN, "--teacher", "teacher", "--transfer", "loose")
    main(inside, *line, "--quantize", "w8a8", "--out", "codes")
    assert len(drawn) == 3  # for the codes, and for the answers before and after
