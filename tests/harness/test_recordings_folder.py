"""Folders of recordings are read as those of images: parts, classes, cache, what is refused."""

import logging
from pathlib import Path

import numpy as np
import pytest
import recordings
from PIL import Image

from dsdistill.harness.data import datasets, mel_images
from dsdistill.harness.data.layout import list_folder
from dsdistill.harness.data.mel_images import MelFormat, MelOptions
from dsdistill.harness.errors import UserError


def _load(path: Path, **options) -> datasets.Splits:
    return datasets.load(str(path), root=path, cache=path.parent / "cache", **options)


def test_parts_classes_and_pixels_are_those_of_the_files(tmp_path: Path, capsys) -> None:
    recordings.folder(tmp_path / "data" / "train", 10)
    recordings.folder(tmp_path / "data" / "test", 2)
    splits = _load(tmp_path / "data")
    assert splits.train.classes == ("300", "900", "2500")  # by value
    assert list(map(len, (splits.train, splits.validation, splits.test))) == [27, 3, 6]
    assert splits.mel == MelFormat(8000, 0.2, 40)
    assert splits.train.shape == (40, 20, 1)
    first = mel_images.read(tmp_path / "data" / "test" / "300" / "0.wav", MelFormat(8000, 0.2, 40))
    np.testing.assert_array_equal(splits.test.images()[0, :, :, 0], first)
    said = capsys.readouterr().err
    assert "27 training recordings of 3 classes from train/; 3 for validation" in said
    assert "recordings become images of 40 mel bands x 20 frames, 0.2 s at 8,000 Hz" in said
    assert _load(tmp_path / "data").digest == splits.digest  # from the cache
    other = _load(tmp_path / "data", sound=MelOptions(bands=32, seconds=0.1))
    assert other.train.shape == (32, 10, 1)
    assert _load(tmp_path / "data", channels=3).train.shape == (40, 20, 3)


def test_a_folder_without_parts_holds_out_a_fifth_of_each_class(tmp_path: Path) -> None:
    splits = _load(recordings.folder(tmp_path / "data", 10))
    assert list(map(len, (splits.train, splits.validation, splits.test))) == [21, 3, 6]


def test_whichever_are_fewer_of_images_and_recordings_are_left_out(tmp_path: Path) -> None:
    data = recordings.folder(tmp_path / "data", 4)
    Image.new("L", (8, 8)).save(data / "300" / "cover.png")
    layout = list_folder(data)
    assert layout.holds_recordings
    assert len(layout.files) == 12
    assert "1 images among recordings" in layout.skipped
    for name in ("300", "900", "2500"):
        for i in range(5):
            Image.new("L", (8, 8)).save(data / name / f"{i}.png")
    layout = list_folder(data)
    assert not layout.holds_recordings
    assert {file.suffix for file in layout.files} == {".png"}
    assert "12 recordings among images" in layout.skipped


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"image_size": 16}, "holds recordings, whose images are as large as --seconds and --mel"),
        ({"sound": MelOptions(bands=2)}, "--mel-bands must be from 8 to 256, got 2"),
    ],
)
def test_what_does_not_fit_recordings_is_refused(options, line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=line):
        _load(recordings.folder(tmp_path / "data", 2), **options)


def test_what_is_for_recordings_is_refused_elsewhere(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for i in range(3):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8)).save(tmp_path / "data" / name / f"{i}.png")
    with pytest.raises(UserError, match="holds images, and --seconds, --mel-bands and --sample-r"):
        _load(tmp_path / "data", sound=MelOptions(seconds=1))
    with pytest.raises(UserError, match="are for a folder of recordings, and digits is none"):
        datasets.load("digits", root=tmp_path, sound=MelOptions(seconds=1))


def test_damaged_recordings_are_skipped_and_named_or_too_many(tmp_path: Path, caplog) -> None:
    data = recordings.folder(tmp_path / "data", 10)
    (data / "300" / "3.wav").write_bytes(b"RIFF")
    with caplog.at_level(logging.WARNING):
        splits = _load(data)
    assert sum(map(len, (splits.train, splits.validation, splits.test))) == 29
    (record,) = caplog.records
    assert "1 of 30 recordings of" in record.getMessage()
    assert "300/3.wav: not a WAV file" in record.getMessage()
    for i in range(4, 9):
        (data / "900" / f"{i}.wav").write_bytes(b"")
    with pytest.raises(UserError, match=r"6 of 30 recordings .*an empty file.*repair or remove"):
        _load(data)


def test_other_formats_of_recordings_are_named(tmp_path: Path) -> None:
    data = recordings.folder(tmp_path / "data", 2)
    (data / "song").mkdir()
    (data / "song" / "a.flac").write_bytes(b"fLaC")
    with pytest.raises(UserError, match=r"song has no images \(1 \.flac\): convert them to WAV"):
        _load(data)
