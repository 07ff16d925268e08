"""The distilled-set file: equal to the bit, atomic, and an `ArtifactError` whatever its bytes."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dsdistill.harness import checksums
from dsdistill.harness.data import distilled_set, preprocess
from dsdistill.harness.data.distilled_set import DistilledSet, DistilledSetError

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def _distilled(n=4, shape=(3, 2, 1), k=2, kind="zca", seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (50, *shape), dtype=np.uint8)
    fitted = preprocess.fit(kind, lambda size: iter([pixels]), shape)
    return DistilledSet(
        fitted.apply(pixels[:n]),
        rng.normal(size=(n, k)).astype(np.float32),
        fitted,
        tuple(f"class {i}" for i in range(k)),
        {"method": "kip", "metrics": {"test_accuracy": 0.1 + 0.2}, "seed": 3, "name": "é"},
    )


@pytest.fixture
def content(tmp_path):
    distilled_set.save(tmp_path / "good.safetensors", _distilled())
    return (tmp_path / "good.safetensors").read_bytes()


def _assert_equal(got, expected):
    np.testing.assert_array_equal(got.images.view(np.uint32), expected.images.view(np.uint32))
    np.testing.assert_array_equal(got.labels.view(np.uint32), expected.labels.view(np.uint32))
    assert got.preprocess.same_as(expected.preprocess)
    assert got.classes == expected.classes
    assert got.provenance == expected.provenance
    assert got.encoding == expected.encoding


@given(
    data=st.data(),
    n=st.integers(1, 4),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3])),
    k=st.integers(2, 5),
    kind=st.sampled_from(preprocess.KINDS),
)
@settings(max_examples=60, deadline=None)
def test_round_trip_is_equal_to_the_bit(tmp_path_factory, data, n, shape, k, kind):
    distilled = replace(
        _distilled(n, shape, k, kind),
        images=data.draw(arrays.arrays(np.float32, (n, *shape), elements=FLOATS)),
        labels=data.draw(arrays.arrays(np.float32, (n, k), elements=FLOATS)),
    )
    path = tmp_path_factory.mktemp("set") / "distilled.safetensors"
    distilled_set.save(path, distilled)
    _assert_equal(distilled_set.load(path), distilled)


def test_views_in_any_memory_order_are_written_as_they_look(tmp_path):
    plain = _distilled()
    turned = replace(plain, images=np.asfortranarray(plain.images), labels=plain.labels[:, ::-1])
    distilled_set.save(tmp_path / "a", turned)
    _assert_equal(
        distilled_set.load(tmp_path / "a"),
        replace(turned, images=plain.images, labels=np.ascontiguousarray(turned.labels)),
    )


def test_a_set_is_a_learners_training_set():
    distilled = _distilled(k=3)
    examples = distilled.examples()
    np.testing.assert_array_equal(examples.images(), distilled.images)
    np.testing.assert_array_equal(examples.labels(np.array([2])), distilled.labels[[2]])
    np.testing.assert_array_equal(examples.data.labels, distilled.labels.argmax(1))
    assert len(distilled) == len(examples) == 4
    assert distilled.nbytes == 4 * (4 * 6 + 4 * 3)


def _equal_or_refused(path, content, damaged):
    """The property of the file format, for any bytes."""
    path.write_bytes(damaged)
    try:
        got = distilled_set.load(path)
    except DistilledSetError:
        return
    path.write_bytes(content)
    _assert_equal(got, distilled_set.load(path))


@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
@settings(max_examples=200, deadline=None)
def test_any_byte_flip_is_an_equal_set_or_an_error(tmp_path_factory, where, flip):
    path = tmp_path_factory.mktemp("flip") / "a.safetensors"
    distilled_set.save(path, _distilled())
    content = path.read_bytes()
    at = int(where * len(content))
    _equal_or_refused(path, content, content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :])


def test_every_byte_of_the_header_may_flip(tmp_path, content):
    end = 8 + int.from_bytes(content[:8], "little")
    for at in range(end):
        damaged = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        _equal_or_refused(tmp_path / "a", content, damaged)


def test_truncations_are_refused(tmp_path, content):
    for end in [*range(0, len(content), 7), len(content) - 1]:
        (tmp_path / "a").write_bytes(content[:end])
        with pytest.raises(DistilledSetError):
            distilled_set.load(tmp_path / "a")


def test_bytes_added_at_the_end_are_an_equal_set_or_an_error(tmp_path, content):
    for extra in (b"\0", b"x" * 1000, content):
        _equal_or_refused(tmp_path / "a", content, content + extra)


def _zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("images", "x")


FOREIGN = {
    "empty": lambda p: p.write_bytes(b""),
    "huge header": lambda p: p.write_bytes((2**63).to_bytes(8, "little") + b"{}"),
    "header longer than the file": lambda p: p.write_bytes((90).to_bytes(8, "little") + b"{}"),
    "empty header": lambda p: p.write_bytes((2).to_bytes(8, "little") + b"{}"),
    "pickle": lambda p: p.write_bytes(pickle.dumps({"images": np.zeros(3)})),
    "zip": _zip,
    "text": lambda p: p.write_text("images, labels\n" * 20),
    "folder": lambda p: p.mkdir(),
    "missing": lambda p: None,
    "no metadata": lambda p: safetensors.numpy.save_file({"images": np.zeros(3)}, p),
    "someone else's": lambda p: safetensors.numpy.save_file(
        {"w": np.zeros(3)}, p, {"format": "pt"}
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_are_refused(kind, tmp_path):
    path = tmp_path / "foreign.safetensors"
    FOREIGN[kind](path)
    with pytest.raises(DistilledSetError, match=r"foreign\.safetensors") as caught:
        distilled_set.load(path)
    assert "\n" not in str(caught.value)


def _header(**changes):
    header = {
        "format": distilled_set.FORMAT_VERSION,
        "encoding": distilled_set.ENCODING,
        "classes": ["a", "b"],
        "preprocess": {"kind": "standardise", "contrast": 1.0},
        "provenance": {},
    }
    return header | changes


def _tensors(**changes):
    tensors = {
        "images": np.zeros((2, 3, 3, 1), np.float32),
        "labels": np.zeros((2, 2), np.float32),
        "preprocess.mean": np.zeros(1, np.float32),
        "preprocess.std": np.ones(1, np.float32),
    }
    return {name: value for name, value in (tensors | changes).items() if value is not None}


def _forge(path, header, tensors):
    """A file whose checksum is right: what anyone can write who reads this module."""
    text = header if isinstance(header, str) else json.dumps(header)
    metadata = {"dsdistill": text, "sha256": checksums.digest(text, tensors)}
    safetensors.numpy.save_file(tensors, path, metadata)


def test_the_forged_file_would_load_unchanged(tmp_path):
    _forge(tmp_path / "a", _header(), _tensors())
    assert len(distilled_set.load(tmp_path / "a")) == 2


HEADERS = {
    "not JSON": "{",
    "deep": "[" * 100_000,
    "list": [1],
    "number": 7,
    "other version": _header(format=2),
    "no version": {},
    "classes as text": _header(classes="ab"),
    "numbers as classes": _header(classes=[0, 1]),
    "same class twice": _header(classes=["a", "a"]),
    "list in classes": _header(classes=[["a"], ["b"]]),
    "one class": _header(classes=["a"]),
    "no classes": _header(classes=[]),
    "a class too many": _header(classes=["a", "b", "c"]),
    "provenance as list": _header(provenance=[]),
    "encoding as number": _header(encoding=1),
    "preprocess as text": _header(preprocess="zca"),
    "preprocess without kind": _header(preprocess={"contrast": 1.0}),
    "preprocess without contrast": _header(preprocess={"kind": "none"}),
    "unknown preprocess": _header(preprocess={"kind": "pca", "contrast": 1.0}),
    "list as kind": _header(preprocess={"kind": ["zca"], "contrast": 1.0}),
    "zca without matrices": _header(preprocess={"kind": "zca", "contrast": 1.0}),
    "text as contrast": _header(preprocess={"kind": "none", "contrast": "1"}),
    "infinity in the provenance": _header(provenance={"a": [{"b": float("inf")}]}),
    "NaN as contrast": _header(preprocess={"kind": "none", "contrast": float("nan")}),
}
TENSORS = {
    "no images": {"images": None},
    "no labels": {"labels": None},
    "no mean": {"preprocess.mean": None},
    "a tensor too many": {"other": np.zeros(1, np.float32)},
    "float64 images": {"images": np.zeros((2, 3, 3, 1))},
    "integer labels": {"labels": np.zeros((2, 2), np.int32)},
    "flat images": {"images": np.zeros((2, 9), np.float32)},
    "scalar images": {"images": np.zeros((), np.float32)},
    "zero images": {"images": np.zeros((0, 3, 3, 1), np.float32)},
    "NaN in images": {"images": np.full((2, 3, 3, 1), np.nan, np.float32)},
    "infinite label": {"labels": np.full((2, 2), np.inf, np.float32)},
    "zero deviation": {"preprocess.std": np.zeros(1, np.float32)},
    "negative deviation": {"preprocess.std": -np.ones(1, np.float32)},
    "three means": {"preprocess.mean": np.zeros(3, np.float32)},
    "needless whiten": {"preprocess.whiten": np.eye(9, dtype=np.float32)},
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_hostile_header_is_refused(case, tmp_path):
    _forge(tmp_path / "forged", HEADERS[case], _tensors())
    with pytest.raises(DistilledSetError, match="forged") as caught:
        distilled_set.load(tmp_path / "forged")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", TENSORS)
def test_hostile_tensors_are_refused(case, tmp_path):
    _forge(tmp_path / "forged", _header(), _tensors(**TENSORS[case]))
    with pytest.raises(DistilledSetError, match="forged"):
        distilled_set.load(tmp_path / "forged")


def test_a_wrong_set_is_not_written(tmp_path):
    bad = replace(_distilled(), labels=np.full((4, 2), np.nan, np.float32))
    with pytest.raises(DistilledSetError, match="labels has NaN"):
        distilled_set.save(tmp_path / "a", bad)
    assert not list(tmp_path.iterdir())


def test_a_failed_rename_leaves_the_old_file_and_nothing_else(tmp_path, content, monkeypatch):
    path = tmp_path / "good.safetensors"

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        distilled_set.save(path, _distilled(seed=1))
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, content):
    """A limit on the file's size stops the write half way, as a full disk does."""
    pytest.importorskip("resource")
    path = tmp_path / "good.safetensors"
    script = """
import pathlib, resource, sys
path, tests, limit = sys.argv[1:]
sys.path.insert(0, tests)
import test_distilled_set
from dsdistill.harness.data import distilled_set as artifact
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    artifact.save(pathlib.Path(path), test_distilled_set._distilled(seed=1))
except OSError as error:
    sys.exit(f"OSError {error.errno}")
"""
    tests, limit = os.path.dirname(__file__), str(len(content) // 2)
    done = subprocess.run(
        [sys.executable, "-B", "-c", script, str(path), tests, limit],
        capture_output=True,
        text=True,
    )
    assert "OSError 27" in done.stderr  # EFBIG
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_readable_by_others(tmp_path, content):
    assert (tmp_path / "good.safetensors").stat().st_mode & 0o777 == 0o644


def test_locate(tmp_path):
    assert distilled_set.locate(tmp_path) == tmp_path / "distilled.safetensors"
    assert distilled_set.locate(tmp_path / "a.safetensors") == tmp_path / "a.safetensors"
