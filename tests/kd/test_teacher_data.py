"""Teachers that see another picture of every image: matched, changed alike, judged on it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from kd_support import main, read_report, refused, stop_in
from PIL import Image
from timm.data.mixup import Mixup

from dsdistill.harness.data import datasets, paired_folder
from dsdistill.harness.errors import UserError
from kd.data import augment
from kd.data.batching import Batch

CLASSES = ("cat", "dog", "owl")
LINE = ("train", "noise", "--student", "mlp:8", "--epochs", 4, "--batch-size", 16)
TAUGHT = (*LINE, "--teacher", "teacher", "--teacher-data", "clear")


def _write_pair(root: Path, part: str, count: int) -> None:
    """Noise at 8x8 pixels that says little of its class, and its colour picture of 16x16."""
    rng = np.random.default_rng(len(part))
    for level, name in enumerate(CLASSES):
        for i in range(count):
            for kind, suffix in (("noise", "png"), ("clear", "bmp")):
                (root / kind / part / name).mkdir(parents=True, exist_ok=True)
                low = 90 * level * (kind == "clear")
                shape = (16, 16, 3) if kind == "clear" else (8, 8)
                pixels = rng.integers(low, low + 75, shape, dtype=np.uint8)
                file = root / kind / part / name / f"{i:02}.{suffix}"
                Image.fromarray(pixels).save(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both folders, a teacher of the clear pictures, and its student of the noise."""
    root = tmp_path_factory.mktemp("pairs")
    _write_pair(root, "train", 20)
    _write_pair(root, "test", 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("kd.runs.curves.draw", lambda folder: None)
        line = ("--student", "mlp:16", "--epochs", 20, "--batch-size", 16)
        main(patch, "train", "clear", *line, "--out", "teacher")
        main(patch, *TAUGHT, "--augment", "crop-flip", "--crop-padding", 1, "--out", "run")
    return root


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("kd.runs.curves.draw", lambda folder: None)
    return monkeypatch


def test_the_teacher_is_judged_on_its_own_pictures(
    inside: pytest.MonkeyPatch, folder: Path, capsys
) -> None:
    assert read_report(folder / "teacher")["test_accuracy"] == 1.0
    figures = read_report(folder / "run")
    assert figures["teacher_accuracy"] == 1.0
    assert figures["test_accuracy"] < 0.8  # noise
    main(inside, "evaluate", "run", "--json")
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["teacher_accuracy"] == 1.0
    assert evaluated["teacher_agreement"] == figures["teacher_agreement"]
    main(inside, "evaluate", "run", "noise/test", "--json")
    said = capsys.readouterr()
    assert "teacher_accuracy" not in json.loads(said.out)
    assert "it is left out; --teacher-data DIR names them" in said.err
    main(inside, "evaluate", "run", "noise/test", "--teacher-data", "clear/test", "--json")
    assert json.loads(capsys.readouterr().out)["teacher_accuracy"] == 1.0


def test_a_killed_training_ends_as_the_same_student(
    inside: pytest.MonkeyPatch, folder: Path
) -> None:
    line = (*TAUGHT, "--augment", "crop-flip", "--crop-padding", 1, "--out", "stopped")
    stop_in(inside, 6, *line)
    main(inside, "train", "--out", "stopped", "--resume")
    whole, resumed = (
        safetensors.numpy.load_file(folder / name / "student.safetensors")
        for name in ("run", "stopped")
    )
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


def test_other_pictures_are_refused_on_resume(inside: pytest.MonkeyPatch, folder: Path) -> None:
    shutil.copytree(folder / "clear", folder / "copy")
    stop_in(inside, 2, *LINE, "--teacher", "teacher", "--teacher-data", "copy", "--out", "changed")
    Image.new("RGB", (16, 16)).save(folder / "copy" / "train" / "cat" / "00.bmp")
    assert "the teacher's images" in refused(inside, "train", "--resume", "--out", "changed")


def test_answers_are_the_same_computed_once_or_batch_by_batch(
    inside: pytest.MonkeyPatch, folder: Path
) -> None:
    main(inside, *TAUGHT, "--loss", "ce:1,kd:1", "--out", "once")
    # A loss on layers needs the teacher in every step; this weight changes nothing to speak of.
    main(inside, *TAUGHT, "--loss", "ce:1,kd:1,sp:1e-9", "--out", "each")
    once, each = (
        safetensors.numpy.load_file(folder / name / "student.safetensors")
        for name in ("once", "each")
    )
    for name in once:
        np.testing.assert_allclose(once[name], each[name], atol=1e-5)


def test_rows_stay_together_whatever_is_held_out(folder: Path, tmp_path: Path) -> None:
    splits = datasets.load(str(folder / "noise"), root=tmp_path)
    assert splits.layout is not None
    theirs = paired_folder.load(folder / "clear", splits, splits.layout)
    for own, other in ((splits.train, theirs.train), (splits.validation, theirs.validation)):
        assert own.rows is not None
        for i in (0, len(own) - 1):
            file = splits.layout.files[own.rows[i]].relative_to(splits.layout.root)
            with Image.open((folder / "clear" / file).with_suffix(".bmp")) as image:
                np.testing.assert_array_equal(other.images()[i], np.asarray(image))
        np.testing.assert_array_equal(own.labels, other.labels)


def test_the_test_part_may_be_missing_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    splits = datasets.load(str(folder / "noise"), root=tmp_path)
    assert splits.layout is not None
    shutil.copytree(folder / "clear" / "train", tmp_path / "part" / "train")
    theirs = paired_folder.load(tmp_path / "part", splits, splits.layout)
    assert (len(theirs.train), len(theirs.test)) == (54, 0)
    (tmp_path / "part" / "train" / "owl" / "03.bmp").unlink()
    with pytest.raises(UserError, match=r"no counterpart of 1 of 60 files .*\(train/owl/03\)"):
        paired_folder.load(tmp_path / "part", splits, splits.layout)
    Image.new("L", (4, 4)).save(tmp_path / "part" / "train" / "owl" / "04.png")
    with pytest.raises(UserError, match=r"has 04.bmp and 04.png in .*owl: keep one of them"):
        paired_folder.load(tmp_path / "part", splits, splits.layout)


def test_damaged_pictures_are_named(folder: Path, tmp_path: Path) -> None:
    splits = datasets.load(str(folder / "noise"), root=tmp_path)
    assert splits.layout is not None
    shutil.copytree(folder / "clear", tmp_path / "bad")
    (tmp_path / "bad" / "train" / "cat" / "01.bmp").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 files of .* unreadable .*cat/01.bmp: an empty file"):
        paired_folder.load(tmp_path / "bad", splits, splits.layout)


def _pair(size: int) -> Batch:
    """Images of 6x6 pixels; the teachers' are the same, each pixel as a square of pixels."""
    images = torch.rand(7, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    theirs = images.repeat_interleave(size, 2).repeat_interleave(size, 3)
    labels = torch.arange(7) % 3
    return Batch(images, labels, index=torch.arange(7), teacher_inputs=(theirs, theirs))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_both_pictures_are_shifted_flipped_and_mixed_alike(size: int) -> None:
    changed = augment.crop_flip(_pair(size), 3, padding=2, hflip=0.5)
    changed = augment.mix_images(changed, 4, mixer=Mixup(mixup_alpha=0.4, num_classes=3))
    assert changed.teacher_images is not None
    expected = changed.images.repeat_interleave(size, 2).repeat_interleave(size, 3)
    torch.testing.assert_close(changed.teacher_images, expected)
    assert changed.inputs_of(1) is changed.teacher_images
    alone = augment.crop_flip(replace(_pair(size), teacher_inputs=None), 3, padding=2, hflip=0.5)
    torch.testing.assert_close(
        augment.mix_images(alone, 4, mixer=Mixup(mixup_alpha=0.4, num_classes=3)).images,
        changed.images,
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ((*LINE, "--teacher-data", "clear"), "--teacher-data needs --teacher"),
        ((*TAUGHT, "--cache", "answers"), "with --teacher-data the teachers see other ones"),
        ((*TAUGHT, "--cutmix", 1), "those of --teacher-data are 16x16, not 8x8: use --mixup"),
        ((*TAUGHT, "--augment", "imagenet", "--image-size", 8), "give such a folder as DATA"),
        (("train", "digits", *TAUGHT[2:]), "give such a folder as DATA"),
        ((*LINE, "--teacher", "teacher", "--teacher-data", "none"), "no such folder: none"),
    ],
)
def test_what_has_no_pairs_is_refused(line, said: str, inside: pytest.MonkeyPatch) -> None:
    assert said in refused(inside, *line, "--out", "refused")
