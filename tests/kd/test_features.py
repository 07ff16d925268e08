"""`kd features`: the features of files and arrays through a run, of any number of views."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kd_support as support
import numpy as np
import photos
import pytest
import torch
from kd_support import main, refused

from dsdistill.harness.data import datasets, feature_file, preprocess
from kd.data import batching
from kd.evaluation import answers, backbones, features
from kd.models import saved_models, teachers

SIDE = photos.SIDE


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of PNGs of two classes, a few of them grayscale, and a run trained on it."""
    folder = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    classes = {"dark": photos.shaded(rng, 60, 40), "light": photos.shaded(rng, 190, 40)}
    photos.write(folder / "photos", classes, train=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        main(patch, "train", "photos", "--student", "convnet:4", "--epochs", 1, "--out", "run")
    return folder


@pytest.fixture
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(work)
    monkeypatch.setenv("XDG_CACHE_HOME", str(work / "cache"))
    return monkeypatch


def extract(inside: pytest.MonkeyPatch, out: Path, *options: object) -> feature_file.Features:
    given = ("--student", "run", "--out", out, "--device", "cpu", "--batch-size", 16)
    main(inside, "features", "photos", *given, "--workers", 0, *options)
    return feature_file.read(out)


def test_features_are_what_the_run_computes(inside: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = extract(inside, tmp_path / "f.npz")
    splits = datasets.load("photos", root=tmp_path, validation_fraction=0)
    run = saved_models.load_run(Path("run"))
    for part, plain in (("train", splits.train), ("test", splits.test)):
        mine = found.part(part)
        assert mine is not None
        assert mine.classes == plain.classes
        np.testing.assert_array_equal(mine.labels, plain.labels)
        images = batching.to_nchw(run.preprocess.apply(plain.images()))
        network = run.classifier.network
        assert isinstance(network, torch.nn.Sequential)
        with torch.no_grad():
            expected = network[:-1](images)  # all but the classifier
        features_ = mine.images().reshape(len(mine), -1).astype(np.float32)
        np.testing.assert_allclose(features_, expected, rtol=2e-3, atol=2e-3)


def test_a_feature_does_not_depend_on_the_images_in_its_batch(
    inside: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Batch normalisation uses its running statistics, which an extraction leaves alone."""
    out = tmp_path / "normalised"
    given = ("--steps", 2, "--batch-size", 8, "--out", out)
    main(inside, "train", "photos", "--student", "resnet18(channels=(8,8,8,8))", *given)
    backbone = backbones.load(str(out), "embedding", (SIDE, SIDE, 3))
    assert not any(part.training for part in backbone.modules())
    images = torch.rand(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        np.testing.assert_allclose(backbone(images)[:2], backbone(images[:2]), atol=1e-5)


def test_the_same_images_are_held_out_as_of_the_pixels(
    inside: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = extract(inside, tmp_path / "f.npz")
    pixels = datasets.load("photos", root=tmp_path, validation_fraction=0.2)
    splits = datasets.load(str(tmp_path / "f.npz"), root=tmp_path, validation_fraction=0.2)
    assert pixels.validation.rows is not None
    rows = splits.validation.rows
    np.testing.assert_array_equal(rows, pixels.validation.rows)
    assert len(found.images) == 52


def test_views_are_of_the_training_images_and_follow_the_seed(
    inside: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = extract(inside, tmp_path / "one.npz")
    first, again, other = (
        extract(inside, tmp_path / f"{i}.npz", "--views", 3, "--seed", seed)
        for i, seed in enumerate((0, 0, 1))
    )
    assert len(first.images) == 52 + 2 * 40
    np.testing.assert_array_equal(first.images.store[:52], plain.images.store)
    np.testing.assert_array_equal(first.images.store, again.images.store)
    assert (first.images.store[52:] != other.images.store[52:]).any()
    one, two = first.images.store[52:92], first.images.store[92:]
    assert (one != two).any()
    assert (one != first.images.store[:40]).any()
    np.testing.assert_array_equal(first.images.labels[52:92], first.images.labels[:40])


def test_arrays_give_the_features_of_their_values(
    inside: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An array in [0, 1] is not rounded to bytes on its way."""
    support.write_npz(tmp_path / "three.npz")
    main(
        inside,
        "train",
        tmp_path / "three.npz",
        "--student",
        "mlp:8",
        "--epochs",
        1,
        "--out",
        tmp_path / "run",
    )
    out = tmp_path / "f.npz"
    main(
        inside,
        "features",
        tmp_path / "three.npz",
        "--student",
        tmp_path / "run",
        "--out",
        out,
        "--views",
        2,
    )
    splits = datasets.load(str(tmp_path / "three.npz"), root=tmp_path)
    run = saved_models.load_run(tmp_path / "run")
    found = datasets.load(str(out), root=tmp_path)
    images = batching.to_nchw(run.preprocess.apply(splits.test.images()))
    network = run.classifier.network
    assert isinstance(network, torch.nn.Sequential)
    with torch.no_grad():
        expected = network[:-1](images)
    own = found.test.images().reshape(len(images), -1).astype(np.float32)
    np.testing.assert_allclose(own, expected, rtol=2e-3, atol=2e-3)
    assert len(found.train) == 2 * len(splits.train)
    np.testing.assert_array_equal(found.validation.labels, splits.validation.labels)


def test_a_layer_of_maps_is_averaged(inside: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = extract(inside, tmp_path / "f.npz", "--layer", "3")
    assert found.images.shape == (1, 1, 4)
    assert found.record["layer"] == "3"


def test_a_kill_costs_nothing_that_was_saved(
    inside: pytest.MonkeyPatch, tmp_path: Path, work: Path
) -> None:
    whole, out = tmp_path / "whole.npz", tmp_path / "f.npz"
    extract(inside, whole, "--views", 4)
    code = (
        "import os, signal, sys, time\n"
        "from kd.evaluation import extraction\n"
        "from dsdistill.harness.data.feature_file import PartialFeatures\n"
        "extraction.SECONDS_BETWEEN_SAVES = 0\n"
        "append = PartialFeatures.append\n"
        "def killed(self, rows):\n"
        "    append(self, rows)\n"
        "    if self._rows > 90: self._file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "PartialFeatures.append = killed\n"
        "from kd.cli import main\n"
        "main()\n"
    )
    given = ["features", "photos", "--student", "run", "--out", str(out), "--batch-size", "16"]
    given += ["--workers", "0", "--views", "4", "--device", "cpu"]
    ended = subprocess.run(
        [sys.executable, "-c", code, *given], cwd=work, env=support.environment(), check=False
    )
    assert ended.returncode == -signal.SIGKILL
    assert not out.exists()
    assert "add --resume" in refused(inside, *given)
    main(inside, *given, "--resume")
    assert out.read_bytes() == whole.read_bytes()


def test_a_stop_says_how_to_continue(inside: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "f.npz"
    original = features.extract

    def stopped(*arguments):
        for number, rows in enumerate(original(*arguments)):
            if number == 1:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            yield rows

    with inside.context() as patch:
        patch.setattr(features, "extract", stopped)
        line = refused(
            patch,
            "features",
            "photos",
            "--student",
            "run",
            "--out",
            out,
            "--batch-size",
            16,
            "--workers",
            0,
        )
    command = f"kd features photos --student run --out {out} --resume --batch-size 16 --workers 0"
    assert f"`{command}`" in line
    extract(inside, out, "--resume")


def test_decoding_processes_change_nothing(inside: pytest.MonkeyPatch, tmp_path: Path) -> None:
    extract(inside, tmp_path / "none.npz", "--views", 2)
    given = ("--student", "run", "--out", tmp_path / "two.npz", "--batch-size", 16, "--views", 2)
    main(inside, "features", "photos", *given, "--workers", 2, "--device", "cpu")
    assert (tmp_path / "none.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


@pytest.fixture
def damaged(inside: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The photos, of which the first to train on and one to test on end too early."""
    folder = tmp_path / "damaged"
    shutil.copytree("photos", folder)
    for file in (_files(folder)[0], _files(folder)[-1]):
        file.write_bytes(file.read_bytes()[:60])
    return folder


def _files(folder: Path) -> list[Path]:
    """Those to train on first, in the order of their rows."""
    return [p for part in ("train", "test") for p in sorted((folder / part).rglob("*.png"))]


def test_unreadable_images_are_left_out_and_named(
    inside: pytest.MonkeyPatch,
    tmp_path: Path,
    damaged: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = extract(inside, tmp_path / "whole.npz", "--views", 2)
    given = ("--student", "run", "--device", "cpu", "--batch-size", 16, "--views", 2)
    for workers in (0, 2):
        out = ("--out", tmp_path / f"{workers}.npz")
        main(inside, "features", damaged, *given, "--workers", workers, *out)
    said = capsys.readouterr()
    assert (tmp_path / "0.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()
    rest = feature_file.read(tmp_path / "0.npz")
    # 40 to train on, 12 to test on, then a further view of the 40.
    kept = np.setdiff1d(np.arange(52 + 40), [0, 51, 52])
    np.testing.assert_array_equal(rest.images.store, whole.images.store[kept])
    np.testing.assert_array_equal(rest.images.labels, whole.images.labels[kept])
    np.testing.assert_array_equal(rest.parts, whole.parts[kept])
    np.testing.assert_array_equal(kept[rest.sources], whole.sources[kept])
    first, last = (str(_files(damaged)[i].relative_to(damaged)) for i in (0, -1))
    assert [line.partition(":")[0] for line in rest.record["unreadable"]] == [first, last]
    assert f"note: {first}: " in said.err
    assert "2 images are unreadable" in said.err
    assert re.search(r"^features +89$", said.out, re.MULTILINE)
    assert re.search(r"^unreadable images +2$", said.out, re.MULTILINE)


def test_a_stopped_extraction_knows_what_was_unreadable(
    inside: pytest.MonkeyPatch, tmp_path: Path, damaged: Path
) -> None:
    inside.setattr("kd.evaluation.extraction.SECONDS_BETWEEN_SAVES", 0)
    given = ("features", damaged, "--student", "run", "--device", "cpu", "--batch-size", 16)
    given = (*given, "--workers", 0, "--out")
    main(inside, *given, tmp_path / "whole.npz")
    original = features.extract

    def killed(*arguments):
        for number, rows in enumerate(original(*arguments)):
            if number == 2:
                raise KeyboardInterrupt
            yield rows

    with inside.context() as patch:
        patch.setattr(features, "extract", killed)
        refused(patch, *given, tmp_path / "f.npz")
    main(inside, *given, tmp_path / "f.npz", "--resume")
    assert (tmp_path / "f.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_too_many_unreadable_images_are_one_line(
    inside: pytest.MonkeyPatch, tmp_path: Path, damaged: Path
) -> None:
    for file in _files(damaged)[20:22]:
        file.write_bytes(b"")
    line = refused(inside, "features", damaged, "--student", "run", "--out", tmp_path / "f.npz")
    assert "4 images are unreadable (train/" in line
    assert "at most 3 of 52 images may be: repair or remove them" in line


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--layer", "nowhere"), "unknown layer 'nowhere'"),
        (("--student", "convnet:4"), "has no published weights"),
        (("--student", "net.pt2"), "exported program"),
        (("--out", "f.npy"), "--out must end in .npz"),
        (("--views", "0"), "--views must be at least 1"),
        (("--image-size", "9"), "leave --image-size out"),
        (("--resume",), "nothing to resume"),
    ],
)
def test_refuses_in_one_line(
    inside: pytest.MonkeyPatch, tmp_path: Path, given: tuple[str, ...], said: str
) -> None:
    options = {"--student": "run", "--out": str(tmp_path / "f.npz")}
    rest = dict(zip(given[::2], given[1::2], strict=False))
    flat = [word for pair in (options | rest).items() for word in pair]
    flags = [word for word in given if len(given) == 1]
    assert said in refused(inside, "features", "photos", *flat, *flags)
    assert not list(tmp_path.iterdir())


def test_features_are_no_images(inside: pytest.MonkeyPatch, tmp_path: Path) -> None:
    extract(inside, tmp_path / "f.npz")
    line = refused(inside, "features", tmp_path / "f.npz", "--student", "run")
    assert "holds features: give the images that they are of" in line


def test_a_network_trains_on_features(inside: pytest.MonkeyPatch, tmp_path: Path) -> None:
    extract(inside, tmp_path / "f.npz")
    main(
        inside,
        "train",
        tmp_path / "f.npz",
        "--student",
        "mlp:8",
        "--epochs",
        3,
        "--out",
        tmp_path / "head",
    )
    assert saved_models.load_run(tmp_path / "head").shape == (1, 1, 4)


def test_the_weights_and_the_preprocessing_are_on_record(inside: pytest.MonkeyPatch) -> None:
    backbone = backbones.load("run", backbones.EMBEDDING, (SIDE, SIDE, 3))
    record = backbone.record()
    assert record["packages"] == f"torch {torch.__version__.partition('+')[0]}"
    convolution = next(m for m in backbone.modules() if isinstance(m, torch.nn.Conv2d))
    convolution.padding_mode = "reflect"  # the weights are those of any padding
    other = backbone.record()
    assert other["layers_sha256"] != record["layers_sha256"]
    assert other | {"layers_sha256": record["layers_sha256"]} == record
    with torch.no_grad():
        next(backbone.classifier.parameters()).add_(1)
    assert backbone.record()["weights_sha256"] != record["weights_sha256"]
    assert record["preprocess"]["size"] == [SIDE, SIDE]
    assert record["preprocess"]["crop"] == 1.0


def test_a_teacher_of_equal_weights_and_other_layers_has_results_of_its_own(
    inside: pytest.MonkeyPatch,
) -> None:
    fitted, classes = preprocess.identity(3), ("dark", "light")
    digests = [answers.load("run", fitted, (SIDE, SIDE, 3), classes).digest]
    original = teachers.load

    def strided(*given, **named):
        teacher = original(*given, **named)
        next(m for m in teacher.modules() if isinstance(m, torch.nn.Conv2d)).stride = (2, 2)
        return teacher

    for load in (original, strided):
        inside.setattr(teachers, "load", load)
        digests.append(answers.load("run", fitted, (SIDE, SIDE, 3), classes).digest)
    assert digests[0] == digests[1] != digests[2]


def test_batches_are_whole_parts_of_one_view() -> None:
    batches = features.plan(10, 7, 3, 4)
    assert [(b.view, b.rows.tolist()) for b in batches] == [
        (0, [0, 1, 2, 3]),
        (0, [4, 5, 6, 7]),
        (0, [8, 9]),
        (1, [0, 1, 2, 3]),
        (1, [4, 5, 6]),
        (2, [0, 1, 2, 3]),
        (2, [4, 5, 6]),
    ]


def test_files_are_read_in_the_channels_of_the_run(
    inside: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gray = ("--channels", 1, "--student", "convnet:4", "--epochs", 1, "--out", tmp_path / "run")
    main(inside, "train", "photos", *gray)
    found = extract(inside, tmp_path / "f.npz", "--student", tmp_path / "run")
    splits = datasets.load("photos", root=tmp_path, validation_fraction=0, channels=1)
    run = saved_models.load_run(tmp_path / "run")
    network = run.classifier.network
    assert isinstance(network, torch.nn.Sequential)
    images = batching.to_nchw(run.preprocess.apply(splits.test.images()))
    with torch.no_grad():
        expected = network[:-1](images)
    mine = found.part("test")
    assert mine is not None
    own = mine.images().reshape(len(mine), -1).astype(np.float32)
    np.testing.assert_allclose(own, expected, rtol=2e-3, atol=2e-3)
