"""`dsdistill export`: complete, nothing outside `--out`, and no remains of a failed export."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dsdistill.commands import evaluation_parts, export
from dsdistill.harness.data import datasets, distilled_set, folder_names, preprocess
from dsdistill.harness.data.distilled_set import DistilledSet, DistilledSetError
from dsdistill.harness.errors import UserError
from dsdistill.options import EvaluateOptions

DIGITS = datasets.load("digits", root=Path("unused"))
HOSTILE = (
    *("..", ".", "", " ", "/", "/etc/passwd", "../../outside", "a/b", "a-b", "a\\b", "C:\\x"),
    *("nul\0here", "half \ud800", "Cat", "cat", "CAT", "con", "LPT1.txt", "dot.", "dot", ".hidden"),
    *("x" * 300, "y" * 299 + "é", "é", "e\u0301", "\u202egpj.exe", "line\nbreak", "classes.json"),
    *("-rf", "a:b", "a*b", "cat-2", "~", "名前"),
)


def _set(classes: tuple[str, ...], kind: str = "standardise") -> DistilledSet:
    """An image of each class, of digits that go round."""
    train = DIGITS.train
    fitted = preprocess.fit(kind, train.chunks, train.shape)
    images = fitted.apply(train.images(np.arange(len(classes))))
    labels = np.eye(len(classes), dtype=np.float32) * 3 - np.float32(0.1)
    provenance = {"method": "kip", "note": "half \ud800 and $x$"}
    return DistilledSet(images, labels, fitted, classes, provenance)


def _saved(folder: Path, distilled: DistilledSet) -> Path:
    distilled_set.save(folder / "set.safetensors", distilled)
    return folder / "set.safetensors"


def test_hostile_class_names_stay_inside_and_apart(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    file = _saved(tmp_path / "work", _set(HOSTILE))
    out = export.write(file, "folder", tmp_path / "work" / "out" / "png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["work"]
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == ["out", "set.safetensors"]
    assert sorted(p.name for p in (tmp_path / "work" / "out").iterdir()) == ["png"]
    folders = sorted(p.name for p in out.iterdir() if p.is_dir())
    assert len(folders) == len(HOSTILE)
    by_folder = json.loads((out / "classes.json").read_text())
    assert sorted(by_folder) == folders
    assert sorted(by_folder.values()) == sorted(HOSTILE)
    for folder, name in by_folder.items():
        (picture,) = (out / folder).iterdir()
        assert int(picture.stem) == HOSTILE.index(name)


def test_names_that_are_safe_are_kept() -> None:
    names = ("a/b", "a-b", "T-shirt/top", "Cat", "cat", "one two", "名前")
    assert folder_names.from_classes(names) == (
        *("a-b-2", "a-b", "T-shirt-top", "Cat", "cat-2", "one two", "名前"),
    )
    assert folder_names.from_classes(("a-2", "a", "A")) == ("a-2", "a", "A-3")


@settings(deadline=None, derandomize=True)
@given(st.lists(st.text(st.characters(), max_size=12) | st.sampled_from(HOSTILE), unique=True))
def test_any_names_become_folders(names: list[str]) -> None:
    folders = folder_names.from_classes(names)
    assert len({folder.casefold() for folder in folders}) == len(names)
    for folder in folders:
        assert 0 < len(folder.encode()) < 120
        assert folder.isprintable()
        assert folder[0] not in ".-"
        assert not re.search(r'[<>:"/\\|?*]|[. ]$', folder)
        assert folder.split(".")[0].casefold() not in {"con", "prn", "aux", "nul", "com1", "lpt9"}


@pytest.mark.parametrize("form", ["npz", "torch"])
@pytest.mark.parametrize("kind", ["standardise", "zca", "none"])
def test_an_export_is_the_whole_set(tmp_path: Path, form: str, kind: str) -> None:
    distilled = _set(HOSTILE, kind)
    path = export.write(_saved(tmp_path, distilled), form, None)
    loaded = export.read(path)
    assert loaded is not None
    np.testing.assert_array_equal(loaded.images, distilled.images)
    np.testing.assert_array_equal(loaded.labels, distilled.labels)
    assert loaded.preprocess.same_as(distilled.preprocess)
    if kind == "zca":
        assert loaded.preprocess.unwhiten is not None
        np.testing.assert_array_equal(loaded.preprocess.unwhiten, distilled.preprocess.unwhiten)
    assert (loaded.classes, loaded.encoding) == (HOSTILE, distilled.encoding)
    assert loaded.provenance == distilled.provenance


@pytest.mark.parametrize("form", ["npz", "torch"])
def test_others_can_use_a_whitened_export(tmp_path: Path, form: str) -> None:
    """NumPy alone can whiten test images with the arrays of the file."""
    distilled = _set(DIGITS.train.classes, "zca")
    path = export.write(_saved(tmp_path, distilled), form, None)
    if form == "npz":
        with np.load(path) as file:
            arrays = dict(file)
    else:
        loaded = torch.load(path, weights_only=True)
        arrays = {k: v.numpy() for k, v in loaded.items() if isinstance(v, torch.Tensor)}
    images = DIGITS.test.images(slice(20))
    x = ((images - arrays["mean"]) / arrays["std"]).reshape(20, -1)
    x = x - x.mean(1, keepdims=True)
    white = x / np.linalg.norm(x, axis=1, keepdims=True) @ arrays["whiten"]
    expected = distilled.preprocess.apply(images).reshape(20, -1)
    np.testing.assert_allclose(white, expected, rtol=1e-4, atol=1e-5)


def test_evaluate_scores_an_export_as_the_set(tmp_path: Path) -> None:
    distilled = _set(DIGITS.train.classes, "zca")
    provenance = {
        "data": {"source": "digits", "sha256": DIGITS.digest},
        "config": {"kernel": "fc", "depth": 2, "image_size": None, "validation_fraction": 0.1},
        "evaluation_ridge": 1e-4,
    }
    file = _saved(tmp_path, replace(distilled, provenance=provenance))
    path = export.write(file, "npz", None)
    scores = []
    for run in (file, path):
        options = EvaluateOptions(run, learners="ridge", controls="", cache=None, seeds=1)
        parts = evaluation_parts.assemble(options)
        (learner,) = parts.learners
        examples, judged = parts.distilled.examples(), parts.held_out.validation
        predict = learner(examples, judged, 0)
        test = parts.distilled.preprocess.apply(DIGITS.test.images(slice(100)))
        scores.append(np.asarray(predict(test)))
    np.testing.assert_array_equal(*scores)


def test_a_changed_export_is_refused(tmp_path: Path) -> None:
    path = export.write(_saved(tmp_path, _set(DIGITS.train.classes)), "npz", None)
    with np.load(path) as file:
        arrays: dict[str, Any] = dict(file)
    arrays["images"][0, 0, 0, 0] += 1
    np.savez(path, **arrays)
    with pytest.raises(DistilledSetError, match="is damaged"):
        export.read(path)
    changed: dict[str, Any] = arrays | {"images": np.array("no array")}
    np.savez(path, **changed)
    with pytest.raises(UserError):
        export.read(path)
    arrays.pop("sha256")
    np.savez(path, **arrays)
    assert export.read(path) is None


@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_clipped_pixels_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture, factor: float
) -> None:
    distilled = _set(DIGITS.train.classes)
    wild = replace(distilled, images=(distilled.images * factor).astype(np.float32))
    pixels = wild.images * wild.preprocess.std + wild.preprocess.mean
    share = float(np.mean((pixels < 0) | (pixels > 1)))
    out = export.write(_saved(tmp_path, wild), "folder", None)
    said = capsys.readouterr().err
    if factor == 4.0:
        assert share > 0.1
        assert f"{share:.1%} of the pixel values" in said
        assert "--format npz or torch" in said
    else:
        assert said == ""
    shown = np.asarray(Image.open(next((out / "0").iterdir())), np.float32) / 255
    np.testing.assert_allclose(shown, np.clip(pixels[0, ..., 0], 0, 1), atol=0.5 / 255 + 1e-6)


def _fails(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    calls: list[object] = []

    def save(self: Image.Image, *_: object, **__: object) -> None:
        calls.append(self)
        if len(calls) == 3:
            raise error

    patch.setattr(Image.Image, "save", save)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    file = _saved(tmp_path, _set(DIGITS.train.classes))
    _fails(monkeypatch, error)
    with pytest.raises(type(error)):
        export.write(file, "folder", tmp_path / "new" / "png")
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda p: p.symlink_to("gone")])
def test_what_is_there_stays(tmp_path: Path, make: Callable[[Path], None]) -> None:
    file = _saved(tmp_path, _set(DIGITS.train.classes))
    for form, suffix in export.SUFFIX.items():
        out = tmp_path / f"taken{suffix}"
        make(out)
        with pytest.raises(UserError, match="exists already: choose another --out"):
            export.write(file, form, out)
    names = {"set.safetensors", *(f"taken{suffix}" for suffix in export.SUFFIX.values())}
    assert {p.name for p in tmp_path.iterdir()} == names


def test_a_suffix_that_the_reader_would_not_know_is_refused(tmp_path: Path) -> None:
    file = _saved(tmp_path, _set(DIGITS.train.classes))
    with pytest.raises(UserError, match=r"--out must end in \.npz for --format npz, got .*set$"):
        export.write(file, "npz", tmp_path / "set")
