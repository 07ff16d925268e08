"""Files of features: what is written is what is read, mapped, after any stop, or refused."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dsdistill.harness.data import datasets, feature_file
from dsdistill.harness.data.feature_file import PartialFeatures
from dsdistill.harness.errors import UserError

RECORD = {"layer": "embedding", "draw_order": None}
CLASSES = ("cat", "dog")
ROWS = np.arange(44, dtype=np.float32).reshape(22, 2) * 3 - 20
PARTS = np.array([0] * 12 + [2] * 4 + [0] * 6)
# The last six rows are second views of the first six images.
SOURCES = np.array([*range(16), *range(6)])
LABELS = (SOURCES % 2).astype(np.int64)


def write(path: Path, rows: np.ndarray = ROWS) -> None:
    partial = PartialFeatures(path, RECORD, rows.shape, resume=False)
    partial.append(rows)
    partial.finish(LABELS, CLASSES, PARTS, SOURCES)


def test_reads_back_what_was_written_without_loading_it(tmp_path: Path) -> None:
    write(tmp_path / "f.npz")
    features = feature_file.read(tmp_path / "f.npz")
    assert isinstance(features.images.store, np.memmap)
    assert features.images.store.dtype == np.float16
    np.testing.assert_array_equal(features.images.store[:, 0, 0], ROWS)
    assert features.images.classes == CLASSES
    assert not list(tmp_path.glob("*.partial"))
    # Any program reads it with NumPy alone.
    with np.load(tmp_path / "f.npz") as members:
        np.testing.assert_array_equal(members["images"][:, 0, 0], ROWS)


def test_parts_are_plain_images_and_views_stay_with_theirs(tmp_path: Path) -> None:
    write(tmp_path / "f.npz")
    splits = datasets.load(str(tmp_path / "f.npz"), root=tmp_path, validation_fraction=0.25)
    np.testing.assert_array_equal(splits.test.images()[:, 0, 0], ROWS[12:16])
    held = splits.validation.images()[:, 0, 0]
    assert len(held) == 4  # a quarter of each class of six, rounded
    rows = splits.train.rows
    assert rows is not None
    sources = SOURCES[rows]
    hidden = {int((ROWS[:, 0] == value).argmax()) for value in held[:, 0]}
    assert not hidden & set(sources.tolist())
    further = [row for row in range(16, 22) if SOURCES[row] not in hidden]
    assert sorted(rows.tolist()) == sorted([*(set(range(12)) - hidden), *further])


def test_continues_where_it_was_safe_and_ends_as_if_never_stopped(tmp_path: Path) -> None:
    write(tmp_path / "whole.npz")
    path = tmp_path / "f.npz"
    partial = PartialFeatures(path, RECORD, ROWS.shape, resume=False)
    partial.append(ROWS[:8])
    partial.save()
    partial.append(ROWS[8:10] + 1)  # lost with the process, which never came to save them
    partial.close()
    with pytest.raises(UserError, match="add --resume"):
        PartialFeatures(path, RECORD, ROWS.shape, resume=False)
    again = PartialFeatures(path, RECORD, ROWS.shape, resume=True)
    assert again.done == 8
    again.append(ROWS[8:])
    again.finish(LABELS, CLASSES, PARTS, SOURCES)
    assert path.read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_refuses_to_continue_something_else(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    PartialFeatures(path, RECORD, ROWS.shape, resume=False).close()
    other = RECORD | {"layer": "layer3"}
    with pytest.raises(UserError, match=r"another layer \(embedding, now layer3\)"):
        PartialFeatures(path, other, ROWS.shape, resume=True)
    with pytest.raises(UserError, match="nothing to resume"):
        PartialFeatures(tmp_path / "g.npz", RECORD, ROWS.shape, resume=True)


LAYERS = {feature_file.LAYERS: "a" * 64, feature_file.PACKAGES: "torch 2.14.0"}


def test_layers_that_nobody_has_recorded_are_said_and_stay_unrecorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "f.npz"
    PartialFeatures(path, RECORD, ROWS.shape, resume=False).close()
    partial = PartialFeatures(path, RECORD | LAYERS, ROWS.shape, resume=True)
    assert "the same layers, not only the same weights, cannot be" in capsys.readouterr().err
    partial.append(ROWS)
    partial.finish(LABELS, CLASSES, PARTS, SOURCES)
    assert feature_file.LAYERS not in feature_file.read(path).record
    other = tmp_path / "g.npz"
    PartialFeatures(other, RECORD | LAYERS, ROWS.shape, resume=False).close()
    changed = RECORD | LAYERS | {feature_file.LAYERS: "b" * 64}
    with pytest.raises(UserError, match="begun with another layers_sha256"):
        PartialFeatures(other, changed, ROWS.shape, resume=True)
    PartialFeatures(other, RECORD | LAYERS, ROWS.shape, resume=True).close()
    assert not capsys.readouterr().err


def test_skipped_rows_and_their_views_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    partial = PartialFeatures(path, RECORD, ROWS.shape, resume=False)
    partial.skip(2, "b.png: cut")
    partial.append(ROWS[:8])
    partial.save()
    partial.close()
    partial = PartialFeatures(path, RECORD, ROWS.shape, resume=True)
    partial.append(ROWS[8:])
    partial.skip(13, "a.png: cut")
    partial.finish(LABELS, CLASSES, PARTS, SOURCES)
    features = feature_file.read(path)
    kept = np.setdiff1d(np.arange(22), [2, 13, 18])  # row 18 is a view of row 2
    np.testing.assert_array_equal(features.images.store[:, 0, 0], ROWS[kept])
    np.testing.assert_array_equal(features.images.labels, LABELS[kept])
    np.testing.assert_array_equal(kept[features.sources], SOURCES[kept])
    assert features.record["unreadable"] == ["b.png: cut", "a.png: cut"]


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    first = PartialFeatures(path, RECORD, ROWS.shape, resume=False)
    with pytest.raises(UserError, match="in use by"):
        PartialFeatures(path, RECORD, ROWS.shape, resume=True)
    first.close()


@pytest.mark.parametrize("value", [np.nan, np.inf, 7e4])
def test_refuses_what_float16_cannot_hold(tmp_path: Path, value: float) -> None:
    partial = PartialFeatures(tmp_path / "f.npz", RECORD, (1, 2), resume=False)
    with pytest.raises(UserError, match="float16"):
        partial.append(np.array([[1, value]]))
    partial.close()


def test_damage_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    write(path)
    content = bytearray(path.read_bytes())
    content[200] ^= 1  # in the features
    path.write_bytes(bytes(content))
    assert feature_file.is_feature_file(path)
    with pytest.raises(UserError, match="damaged: images"):
        feature_file.read(path)


def test_a_compressed_copy_is_read_too(tmp_path: Path) -> None:
    write(tmp_path / "f.npz")
    with np.load(tmp_path / "f.npz") as members:
        np.savez_compressed(tmp_path / "small.npz", **dict(members))
    with zipfile.ZipFile(tmp_path / "small.npz") as archive:
        assert archive.getinfo("images.npy").compress_type == zipfile.ZIP_DEFLATED
    features = feature_file.read(tmp_path / "small.npz")
    np.testing.assert_array_equal(features.images.store[:, 0, 0], ROWS)


def test_the_disk_is_asked_before_the_first_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="100 B is free"):
        PartialFeatures(tmp_path / "f.npz", RECORD, ROWS.shape, resume=False)
    assert not list(tmp_path.iterdir())


def test_sizes_and_colours_of_features_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "f.npz")
    with pytest.raises(UserError, match="leave --image-size and --channels out"):
        datasets.load(str(tmp_path / "f.npz"), root=tmp_path, image_size=8)
