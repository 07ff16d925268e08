"""Resuming a run of `dsdistill`: changed inputs, damaged files, refused and stopped runs."""

import hashlib
import importlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from dsdistill.commands import distil, prepare
from dsdistill.harness import checksums, memory
from dsdistill.harness.data import datasets, distilled_set, preprocess
from dsdistill.harness.errors import UserError
from dsdistill.harness.reports import image_grid
from dsdistill.harness.runs import metrics_file, progress, run_folder
from dsdistill.harness.runs.run_folder import RunError
from dsdistill.harness.stopping import StopInterrupt
from dsdistill.kernels import networks
from dsdistill.options import KipOptions, LabelSolveOptions, with_defaults

CLASSES = ("ant", "bee", "cat")


def write_data(path: Path, per_class: int = 15, **changes: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(3 * per_class) % 3
    images = rng.integers(0, 99, (len(labels), 4, 4, 1)).astype(np.uint8) + (50 * labels)[
        :, None, None, None
    ].astype(np.uint8)
    arrays = {"images": images, "labels": labels, "classes": np.array(CLASSES)}
    np.savez(path, **(arrays | changes))


def start(folder: Path, method: str, *, resume: bool = False) -> Path:
    data, out = str(folder / "data.npz"), folder / "run"
    changes = {} if resume else {"images_per_class": 1}
    if method == "ls":
        return distil.run_label_solve(
            LabelSolveOptions(data=data, out=out, resume=resume, **changes)
        )
    changes = {} if resume else {**changes, "steps": 6, "target_batch": 12}
    return distil.run_kip(KipOptions(data=data, out=out, resume=resume, **changes))


@pytest.fixture(scope="module", params=["kip", "ls"])
def stopped(request, tmp_path_factory) -> tuple[str, Path]:
    """A run that Ctrl-C stopped while it wrote its second line."""
    folder = tmp_path_factory.mktemp("stopped")
    write_data(folder / "data.npz")
    with pytest.MonkeyPatch.context() as patch:
        write = metrics_file.Metrics.write

        def stopping(self, step: int, **figures: float) -> None:
            write(self, step, **figures)
            if request.param == "ls" or step == 2:
                raise KeyboardInterrupt

        patch.setattr(metrics_file.Metrics, "write", stopping)
        with pytest.raises(
            StopInterrupt, match=f"continue with `dsdistill {request.param} --resume"
        ):
            start(folder, request.param)
    assert (folder / "run" / "checkpoint.safetensors").exists()
    assert not (folder / "run" / ".lock").exists()
    return request.param, folder


@pytest.fixture
def copy(stopped, tmp_path) -> tuple[str, Path]:
    method, folder = stopped
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "run" / "config.json").read_text())
    config["data"] = str(tmp_path / "copy" / "data.npz")
    (tmp_path / "copy" / "run" / "config.json").write_text(json.dumps(config))
    return method, tmp_path / "copy"


def _data(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "data.npz") as file:
        return {name: file[name] for name in file.files}


def _parts(folder: Path) -> dict[str, np.ndarray]:
    """Indices of the images of each part."""
    splits = datasets.load(str(folder / "data.npz"), root=folder, validation_fraction=0.1)
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    return {name: part.rows for name, part in parts.items() if part.rows is not None}


CHANGES = {
    "a pixel of a training image": "training images",
    "a pixel of a test image": "test images",
    "the labels": "training images",
    "the number": "training images",
    "the class names": "training images",
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_data_are_refused_and_the_same_go_on(copy, change):
    method, folder = copy
    arrays = _data(folder)
    images, labels = arrays["images"].copy(), arrays["labels"]
    if "pixel" in change:
        images[_parts(folder)["test" if "test" in change else "train"][0], 1, 2] ^= 1
        arrays["images"] = images
    elif change == "the labels":
        arrays["labels"] = (labels + 1) % 3
    elif change == "the number":
        arrays |= {"images": images[:-3], "labels": labels[:-3]}
    else:
        arrays["classes"] = arrays["classes"][[1, 0, 2]]
    np.savez(folder / "data.npz", **arrays)
    before = {path: path.read_bytes() for path in (folder / "run").iterdir()}
    with pytest.raises(RunError, match=f"changed since the run .* {CHANGES[change]}") as caught:
        start(folder, method, resume=True)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in (folder / "run").iterdir()} == before


def test_the_same_data_go_on(copy):
    method, folder = copy
    start(folder, method, resume=True)
    whole = folder / "whole"
    whole.mkdir()
    shutil.copy(folder / "data.npz", whole)
    start(whole, method)
    one, two = (
        distilled_set.load(where / "run" / distilled_set.FILE_NAME) for where in (folder, whole)
    )
    np.testing.assert_array_equal(one.images, two.images)
    np.testing.assert_array_equal(one.labels, two.labels)
    assert one.provenance["inputs"] == two.provenance["inputs"]


BAD = {
    "steps": "many",
    "seed": 1.5,
    "ridge": None,
    "data": 3,
    "kernel": ["fc"],
    "preprocess": "whiter",
    "learn_labels": 1,
    "unknown": 1,
    "chosen": {"target_batch": "x"},
    "preprocess must": ("chosen", {"preprocess": "whiter"}),
}


@pytest.mark.parametrize("name", BAD)
def test_an_option_of_a_wrong_type_is_one_line(copy, name):
    method, folder = copy
    if method == "ls" and name in ("steps", "learn_labels"):
        name = "unknown"
    config = json.loads((folder / "run" / "config.json").read_text())
    key, value = BAD[name] if isinstance(BAD[name], tuple) else (name, BAD[name])
    (folder / "run" / "config.json").write_text(json.dumps(config | {key: value}))
    options = (KipOptions if method == "kip" else LabelSolveOptions)(
        out=folder / "run", resume=True
    )
    run = distil.run_kip if isinstance(options, KipOptions) else distil.run_label_solve
    with pytest.raises(RunError, match=f"config.json is damaged.*{name}") as caught:
        run(options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lost", ["done", "best", "seconds", "state.0", "gram_tt", "shape", "type"])
def test_a_checkpoint_of_another_run_is_one_line(copy, lost):
    """An intact checkpoint with a valid checksum, such as one of another version, is refused."""
    method, folder = copy
    path = folder / "run" / run_folder.CHECKPOINT
    meta, arrays, _ = checksums.load(path, "meta", kind="a checkpoint")
    if (lost in ("best", "state.0") and method == "ls") or (lost == "gram_tt" and method == "kip"):
        lost = "done"
    if lost == "shape":
        arrays = {name: np.stack([array, array]) for name, array in arrays.items()}
    if lost == "type":
        meta["done"] = "three"
    meta.pop(lost, None)
    arrays.pop(lost, None)
    path.write_bytes(checksums.pack("meta", json.dumps(meta), arrays))
    with pytest.raises(RunError, match="is not of this run or of another version") as caught:
        start(folder, method, resume=True)
    assert "\n" not in str(caught.value)


def test_a_set_is_saved_though_its_picture_cannot_be_drawn(tmp_path, monkeypatch, capsys):
    def fail(*_) -> None:
        raise ValueError("not\nmathematics")

    monkeypatch.setattr(image_grid, "write", fail)
    write_data(tmp_path / "data.npz")
    folder = start(tmp_path, "ls")
    assert len(distilled_set.load(folder / distilled_set.FILE_NAME)) == 3
    assert "could not be drawn (ValueError: not mathematics)" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["kip", "ls"])
@pytest.mark.parametrize("per_class", [1, 2])
def test_too_few_images_for_a_test_part_are_refused_before_any_work(
    tmp_path, monkeypatch, method, per_class
):
    monkeypatch.setattr(preprocess, "fit", lambda *_: pytest.fail("worked"))
    write_data(tmp_path / "data.npz", per_class)
    with pytest.raises(UserError, match=r"no test images.* at least 3 images of each class"):
        start(tmp_path, method)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("per_class", "missing"), [(4, "no class has"), (15, None)])
def test_missing_validation_images_are_said(tmp_path, capsys, per_class, missing):
    write_data(tmp_path / "data.npz", per_class)
    options = replace(KipOptions(data=str(tmp_path / "data.npz")), images_per_class=1, steps=1)
    prepare.prepare(with_defaults(options))
    error = capsys.readouterr().err
    assert f"note: {missing} any validation images" in error if missing else not error


def test_classes_without_validation_or_test_images_are_named(tmp_path, capsys):
    labels = np.repeat(np.arange(4), [20, 20, 2, 2])
    images = np.random.default_rng(0).integers(0, 256, (44, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    options = replace(KipOptions(data=str(tmp_path / "data.npz")), images_per_class=1, steps=1)
    prepare.prepare(with_defaults(options))
    said = capsys.readouterr().err
    for part in ("validation", "test"):
        assert f"note: 2 of 4 classes have no {part} images (2, 3): the {part} accuracy" in said


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_a_share_for_validation_beside_a_validation_part_is_said(tmp_path, capsys, fraction):
    for part in ("train", "val", "test"):
        for label in range(2):
            folder = tmp_path / "data" / part / f"class {label}"
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("L", (8, 8), 100 * label + i).save(folder / f"{i}.png")
    options = replace(KipOptions(data=str(tmp_path / "data")), images_per_class=1, steps=1)
    prepare.prepare(with_defaults(replace(options, validation_fraction=fraction)))
    said = capsys.readouterr().err
    assert said.count("--validation-fraction 0.3 has no effect on") == (fraction == 0.3)


def test_a_stop_before_the_run_began_promises_no_resume(tmp_path, monkeypatch):
    def stop(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preprocess, "fit", stop)
    write_data(tmp_path / "data.npz")
    with pytest.raises(StopInterrupt, match=r"stopped before the run began: nothing was written"):
        start(tmp_path, "kip")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [10**4, 10**6, 10**18])
@pytest.mark.parametrize("data", ["digits", "folder"])
def test_an_image_size_that_fits_no_memory_is_one_line(tmp_path, monkeypatch, size, data):
    from PIL import Image

    for name in CLASSES:
        (tmp_path / "folder" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("L", (8, 8)).save(tmp_path / "folder" / name / f"{i}.png")
    monkeypatch.setattr(memory, "available", lambda: 2**30)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="free: use a smaller --image-size"):
        datasets.load(data, root=tmp_path, image_size=size)


def test_long_zca_is_announced_and_its_result_the_same(monkeypatch, capsys):
    images = np.random.default_rng(0).random((40, 4, 4, 3)).astype(np.float32)

    def chunks(size):
        return (images[i : i + size] for i in range(0, len(images), size))

    short = preprocess.fit("zca", chunks, (4, 4, 3))
    assert not capsys.readouterr().err
    monkeypatch.setattr(preprocess, "PROBE_ROWS", 4)
    monkeypatch.setattr(preprocess, "MAX_CHUNK_VALUES", 7 * 48)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    long = preprocess.fit("zca", chunks, (4, 4, 3))
    np.testing.assert_allclose(long.whiten, short.whiten, rtol=1e-4, atol=1e-4)
    announced, *lines = capsys.readouterr().err.splitlines()
    assert "ZCA of 40 images of 4x4x3: a matrix of 40x40 values" in announced
    assert " of memory (--preprocess standardise avoids it)" in announced
    assert lines[-1].startswith("40/40 images for ZCA")


USERS = """
from neural_tangents import stax
bare = stax.serial(stax.Conv(8, (3, 3), padding="SAME"), stax.Relu())
refused = stax.serial(stax.Dense(8), stax.Relu(), stax.Relu(), stax.Flatten(), stax.Dense(1))
good = stax.serial(stax.Flatten(), stax.Dense(8), stax.Relu(), stax.Dense(1))
def two(x1, x2): return x1 @ x2
"""


@pytest.mark.parametrize("name", ["bare", "refused", "two", "good"])
def test_a_users_kernel_that_is_none_is_one_line(tmp_path, monkeypatch, name):
    (tmp_path / "users_kernels.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_kernels", raising=False)
    network = networks.parse(f"users_kernels:{name}")
    if name == "good":
        networks.check(network, (8, 8, 1))
        return
    with pytest.raises(UserError, match=f"users_kernels:{name} .* stax.Dense") as caught:
        networks.check(network, (8, 8, 1))
    assert "\n" not in str(caught.value)
    assert jax.config.jax_enable_x64 is False


@pytest.mark.parametrize("change", ["module", "nothing", "no hash"])
def test_a_users_kernel_that_changed_is_refused(tmp_path, monkeypatch, capsys, change):
    module, out = tmp_path / "users_kernels.py", tmp_path / "run"
    module.write_text(USERS)
    write_data(tmp_path / "data.npz")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_kernels", raising=False)
    options = KipOptions(
        data=str(tmp_path / "data.npz"),
        out=out,
        images_per_class=1,
        steps=6,
        target_batch=12,
        kernel="fc",
        warm_up="users_kernels:good:2",
    )
    write = metrics_file.Metrics.write

    def stopping(self, step: int, **figures: float) -> None:
        write(self, step, **figures)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metrics_file.Metrics, "write", stopping)
        with pytest.raises(StopInterrupt, match=r"--warm-up users_kernels:good:2`$"):
            distil.run_kip(options)
    # A file may not choose the code that runs: it is typed again.
    sys.modules.pop("users_kernels")
    with pytest.raises(RunError, match=r"names the code users_kernels:good:2, .* add --warm-up"):
        distil.run_kip(KipOptions(out=out, resume=True))
    assert "users_kernels" not in sys.modules
    again = KipOptions(out=out, resume=True, warm_up=options.warm_up)
    config = json.loads((out / "config.json").read_text())
    name = "module of the kernel users_kernels:good"
    assert config["inputs"][name] == hashlib.sha256(USERS.encode()).hexdigest()
    if change == "module":
        module.write_text(USERS.replace("Dense(8)", "Dense(8, W_std=2)"))
        importlib.invalidate_caches()
        sys.modules.pop("users_kernels", None)
        with pytest.raises(RunError, match=f"changed since the run .*{name}") as caught:
            distil.run_kip(again)
        assert "\n" not in str(caught.value)
        return
    if change == "no hash":
        del config["inputs"][name]
        (out / "config.json").write_text(json.dumps(config))
    distil.run_kip(again)
    assert (f"has no hash of: {name}" in capsys.readouterr().err) == (change == "no hash")
    assert distilled_set.load(out / distilled_set.FILE_NAME).provenance["inputs"][name]


def _write_colour(path: Path, per_class: int = 15) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3 * per_class, 8, 8, 3), dtype=np.uint8)
    write_data(path, per_class, images=images)


def _colour(folder: Path, kernel: str, **changes) -> KipOptions:
    options = {"images_per_class": 1, "steps": 6, "target_batch": 12, "kernel": kernel}
    return KipOptions(data=str(folder / "data.npz"), out=folder / "run", **(options | changes))


@pytest.mark.parametrize(
    ("kernel", "kind"), [("fc", "standardise"), ("conv", "zca"), ("fc,conv", "standardise")]
)
def test_the_preprocessing_follows_the_kernel_and_is_recorded(tmp_path, kernel, kind):
    _write_colour(tmp_path / "data.npz")
    prepared = prepare.prepare(with_defaults(_colour(tmp_path, kernel, augment="flip")))
    assert prepared.train.preprocess.kind == kind
    unspanned = {"unspanned": "kept"} if kind == "zca" else {}  # 36 images of 192 values
    assert prepared.chosen == {"preprocess": kind, "augmented": "raw"} | unspanned


def _stop_at(patch: pytest.MonkeyPatch, stop: int) -> None:
    write = metrics_file.Metrics.write

    def stopping(self, step: int, **figures: float) -> None:
        write(self, step, **figures)
        if step == stop:
            raise KeyboardInterrupt

    patch.setattr(metrics_file.Metrics, "write", stopping)


@pytest.mark.parametrize("old", [False, True])
def test_a_run_of_an_earlier_version_goes_on_as_it_was_made(tmp_path, monkeypatch, old):
    """Whitened for every kernel, every direction amplified, and augmented when preprocessed."""
    _write_colour(tmp_path / "data.npz")
    with monkeypatch.context() as patch:
        _stop_at(patch, 2)
        with pytest.raises(StopInterrupt):
            distil.run_kip(_colour(tmp_path, "fc", augment="shift"))
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    if old:
        del config["chosen"]
        path.write_text(json.dumps(config))
    with monkeypatch.context() as patch:
        # What memory allows today does not count.
        patch.setattr(preprocess, "default_kind", lambda *_, **__: pytest.fail("chose again"))
        options = with_defaults(_colour(tmp_path, "fc", augment="shift"))
        parsed = prepare.prepare(options, {} if old else config["chosen"])
        folder = distil.run_kip(KipOptions(out=tmp_path / "run", resume=True))
    distilled = distilled_set.load(folder / distilled_set.FILE_NAME)
    assert distilled.preprocess.same_as(parsed.train.preprocess)
    assert distilled.preprocess.kind == ("zca" if old else "standardise")
    assert parsed.phases[0].objective.augment_raw is not old
    if old:
        chunks = parsed.splits.train.chunks
        amplified = preprocess.fit("zca", chunks, parsed.splits.train.shape, True)
        assert distilled.preprocess.same_as(amplified)


def test_a_run_with_augmentation_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    for name in ("stopped", "whole"):
        (tmp_path / name).mkdir()
        _write_colour(tmp_path / name / "data.npz")
    options = {"kernel": "fc", "preprocess": "zca", "augment": "all"}
    with monkeypatch.context() as patch:
        _stop_at(patch, 2)
        with pytest.raises(StopInterrupt):
            distil.run_kip(_colour(tmp_path / "stopped", **options))
    folder = distil.run_kip(KipOptions(out=tmp_path / "stopped" / "run", resume=True))
    whole = distil.run_kip(_colour(tmp_path / "whole", **options))
    one, two = (distilled_set.load(f / distilled_set.FILE_NAME) for f in (folder, whole))
    np.testing.assert_array_equal(one.images, two.images)
    for distilled in (one, two):
        chosen = distilled.provenance["config"]["chosen"]
        assert chosen == {"unspanned": "kept", "augmented": "raw"}
