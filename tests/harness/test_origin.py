"""Which images are held out for a distilled set: the same ones in both packages."""

import numpy as np
import pytest

from dsdistill.commands import distil, evaluation_parts
from dsdistill.harness.data import datasets, distilled_set, origin, preprocess
from dsdistill.harness.data.distilled_set import DistilledSet
from dsdistill.harness.data.labeled_images import centred_one_hot, draw_per_class
from dsdistill.harness.errors import UserError
from dsdistill.options import EvaluateOptions, KipOptions, LabelSolveOptions
from kd.data import data_source


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """All 1438 training images."""
    root = tmp_path_factory.mktemp("root")
    return datasets.load("digits", root=root, validation_fraction=0.0)


def _saved(path, digits, **changes):
    """A distilled set of twenty digits whose provenance has these entries of its configuration."""
    rows = draw_per_class(digits.train, 2, np.random.default_rng(0))
    fitted = preprocess.fit("standardise", digits.train.chunks, digits.train.shape)
    made = {
        "method": "label solve",
        "kernel": "fc",
        "seconds": 1.0,
        "data": {"source": "digits", "sha256": digits.digest},
        "config": {"kernel": "fc", "image_size": None, "validation_fraction": 0.0},
        "metrics": {},
    }
    made["config"] |= changes.pop("config", {})
    made |= changes
    labels = centred_one_hot(digits.train.labels[rows], 10)
    images = fitted.apply(digits.train.images(rows))
    distilled_set.save(path, DistilledSet(images, labels, fitted, digits.train.classes, made))
    return path


@pytest.mark.parametrize(
    ("stored", "held"),
    [
        (0.0, 143),  # Label Solve: made of all, so a tenth of each class is held out afterwards
        (0.25, 359),  # of each class, rounded
        (None, 143),
    ],
)
def test_both_packages_hold_out_the_same_images(tmp_path, digits, stored, held):
    path = _saved(tmp_path / "set.safetensors", digits, config={"validation_fraction": stored})
    _require_same_split(path, tmp_path / "root", (1438 - held, held, 359))


@pytest.mark.heavy
@pytest.mark.parametrize("method", ["ls", "kip"])
def test_both_hold_out_the_same_images_for_a_run_of_a_command(tmp_path, method):
    """Label Solve takes all training images, KIP holds a tenth out: both are evaluated alike."""
    options = {"images_per_class": 1, "out": tmp_path / "run", "data_root": tmp_path / "root"}
    if method == "ls":
        distil.run_label_solve(LabelSolveOptions(**options))
    else:
        distil.run_kip(KipOptions(**options, steps=1, target_batch=20, validation_images=10))
    _require_same_split(tmp_path / "run", tmp_path / "root", (1295, 143, 359))


def _require_same_split(path, root, counts):
    """Require the same training, validation and test images in both packages."""
    ours = evaluation_parts.assemble(
        EvaluateOptions(path, learners="ridge", controls="full", data_root=root)
    )
    theirs = data_source.resolve(str(path), root=root).splits
    assert theirs is not None
    for part, count in zip(("train", "validation", "test"), counts, strict=True):
        a, b = getattr(ours.splits, part), getattr(theirs, part)
        assert (len(a), len(b)) == (count, count)
        assert datasets.digest(a) == datasets.digest(b)


def test_a_set_of_other_images_is_refused_by_both(tmp_path, digits):
    path = _saved(
        tmp_path / "set.safetensors", digits, data={"source": "digits", "sha256": "0" * 64}
    )
    for read in (
        lambda: evaluation_parts.assemble(EvaluateOptions(path, learners="ridge", controls="full")),
        lambda: data_source.resolve(str(path), root=tmp_path),
    ):
        with pytest.raises(UserError, match="was distilled from other images than digits holds"):
            read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {}}, "does not say what it was distilled from: add --data"),
        ({"data": None}, "does not say what it was distilled from: add --data"),
        ({"data": {"source": 7}}, "a data.source that cannot be"),
        ({"config": {"image_size": 1_000_000}}, "a config.image_size that cannot be"),
        ({"config": {"validation_fraction": "a lot"}}, "a config.validation_fraction that cannot"),
        ({"config": {"validation_fraction": 7.0}}, "a config.validation_fraction that cannot"),
    ],
)
def test_odd_provenance_is_one_line(tmp_path, digits, changes, message):
    path = _saved(tmp_path / "set.safetensors", digits, **changes)
    with pytest.raises(UserError, match=message) as caught:
        evaluation_parts.assemble(EvaluateOptions(path, learners="ridge", controls="full"))
    assert "\n" not in str(caught.value)


def test_the_fraction_of_a_set_that_says_nothing_is_the_default(digits, tmp_path):
    path = _saved(tmp_path / "set.safetensors", digits)
    distilled = distilled_set.load(path)
    assert origin.validation_fraction(distilled) == 0.1
    assert origin.source(path, distilled) == "digits"


def test_a_folder_that_cannot_be_the_data_is_not_read(tmp_path, digits, monkeypatch):
    """A file may name any folder, `/` too."""
    folder = tmp_path / "elsewhere"
    for name in [*digits.train.classes[1:], "ten"]:
        (folder / "train" / name).mkdir(parents=True)
    path = _saved(tmp_path / "set.safetensors", digits, data={"source": str(folder)})
    monkeypatch.setattr(datasets, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(UserError, match="has no folder of its class '0'"):
        origin.load(path, distilled_set.load(path), str(folder), root=tmp_path)
    assert "has no folder of its class '0'" in (
        data_source.resolve(str(path), root=tmp_path).note or ""
    )


def test_a_folder_whose_numbers_are_written_otherwise_is_read(tmp_path, digits, monkeypatch):
    folder = tmp_path / "photos"
    for name in digits.train.classes:
        (folder / "train" / f"000{name}").mkdir(parents=True)
    path = _saved(tmp_path / "set.safetensors", digits, data={"source": str(folder)})
    monkeypatch.setattr(datasets, "load", lambda data, **_: data)
    assert origin.load(path, distilled_set.load(path), str(folder), root=tmp_path) == str(folder)


@pytest.mark.parametrize(
    ("stored", "line"),
    [(0.0, "was made of all training images"), (None, "does not say which images it held out")],
)
def test_validation_images_that_the_set_may_have_seen_are_said(
    tmp_path, digits, capsys, stored, line
):
    path = _saved(tmp_path / "solved.safetensors", digits, config={"validation_fraction": stored})
    data_source.resolve(str(path), root=tmp_path)
    assert f"solved.safetensors {line}" in capsys.readouterr().err
