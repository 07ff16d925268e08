"""A teacher in another order of classes is named, however few images are held out."""

import json
from pathlib import Path

import kd_support as support
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from kd_support import main
from PIL import Image

from dsdistill.harness.data import preprocess
from dsdistill.harness.data.labeled_images import spread
from kd.data import batching
from kd.evaluation import class_order
from kd.models import networks

TWELVE = tuple(map(str, range(12)))
AS_TEXT = sorted(TWELVE)  # 0, 1, 10, 11, 2, ...: as torchvision numbers the folders
FAST = ("--student", "mlp:8", "--epochs", 1, "--device", "cpu")


def _draw(folder: Path, counts: dict[str, int]) -> None:
    """Folders of images of which class `i` has the row `i` bright."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 60, (12, 12), dtype=np.uint8)
            pixels[int(name)] = 255
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of few images a class, and three files of weights: good, permuted, untrained."""
    folder = tmp_path_factory.mktemp("few")
    _draw(folder / "many", dict.fromkeys(TWELVE, 20))
    # A tenth of ten images is one, a tenth of four is none: three images are held out.
    _draw(folder / "few", {name: 12 if int(name) in (2, 5, 11) else 5 for name in TWELVE})
    _draw(folder / "two", dict.fromkeys(TWELVE[:2], 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("kd.runs.curves.draw", lambda folder: None)
        options = ("--student", "mlp:32", "--epochs", 60, "--device", "cpu", "--lr", 0.003)
        main(patch, "train", "many", *options, "--out", "of-many")
        main(patch, "train", "two", *options, "--out", "of-two")
    for run, order in (("of-many", [int(n) for n in AS_TEXT]), ("of-two", [1, 0])):
        weights = safetensors.numpy.load_file(folder / run / "student.safetensors")
        safetensors.numpy.save_file(weights, folder / f"good-{run}.safetensors")
        *_, head = sorted(name for name in weights if name.endswith("weight"))
        for name in (head, head.replace("weight", "bias")):
            weights[name] = np.ascontiguousarray(weights[name][order])
        safetensors.numpy.save_file(weights, folder / f"permuted-{run}.safetensors")
    fresh = networks.build("mlp:32", (12, 12, 1), 12, seed=3).network
    safetensors.torch.save_file(fresh.state_dict(), folder / "untrained.safetensors")
    return folder


@pytest.fixture
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(work)
    monkeypatch.setattr("kd.runs.curves.draw", lambda folder: None)
    return monkeypatch


def _said(
    inside: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    data: str,
    teacher: str,
    out: str,
    *options: object,
) -> str:
    capsys.readouterr()
    file = f"mlp:32@{teacher}.safetensors"
    main(inside, "train", data, *FAST, "--teacher", file, *options, "--out", out)
    return " ".join(capsys.readouterr().err.split())


def test_three_validation_images_are_enough_with_training_images(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = _said(inside, capsys, "few", "permuted-of-many", "warned")
    assert "on 3 validation images" in said
    line = said[said.index("warning: teacher") :]
    assert (
        "seems to have its classes in another order: on 66 validation and training images" in line
    )
    assert "in the order of code points, as torchvision sorts folders" in line
    mapping, _ = json.JSONDecoder().raw_decode(line[line.index("{") :])
    assert mapping == {name: AS_TEXT.index(name) for name in TWELVE}
    # What the line advises makes the teacher good.
    Path("advised.json").write_text(json.dumps(mapping))
    options = ("--class-map", "advised.json", "--min-teacher-accuracy", 0.9)
    said = _said(inside, capsys, "few", "permuted-of-many", "advised", *options)
    assert "accuracy 100.0% on 3 validation images" in said
    assert "warning" not in said


def test_training_images_alone_name_it_too(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--validation-fraction", 0)
    said = _said(inside, capsys, "few", "permuted-of-many", "unheld", *options)
    assert "seems to have its classes in another order: on 66 training images" in said


@pytest.mark.parametrize("augment", ["none", "imagenet"])
def test_a_good_teacher_is_not_warned_of(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], augment: str
) -> None:
    streamed = ("--augment", "imagenet", "--image-size", 12, "--workers", 0, "--channels", 1)
    options = streamed if augment == "imagenet" else ()
    for teacher, warned in (("good-of-many", False), ("permuted-of-many", True)):
        # ImageNet's crop shows less of the border than the teacher knows: whole images here.
        share = ("--crop-share", 1) if options else ()
        out = f"{teacher}-{augment}"
        said = _said(inside, capsys, "few", teacher, out, *options, *share)
        assert ("in another order" in said.partition("accuracy")[2]) == warned, said


def test_an_untrained_teacher_is_no_order(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = _said(inside, capsys, "few", "untrained", "untrained")
    assert "seems to have its classes in another order" not in said
    assert "too few to tell" not in said


@pytest.mark.parametrize("name", ["mlp:64", "convnet:8"])
def test_untrained_networks_on_real_images_are_no_order(name: str) -> None:
    """They answer alike to images that are alike, so some order fits them better."""
    digits = support.digits()
    fitted = preprocess.fit("standardise", digits.train.chunks, digits.train.shape)
    images = batching.to_nchw(fitted.apply(digits.train.images(slice(600))))
    labels, fits = digits.train.labels[:600], []
    for seed in range(20):
        network = networks.build(name, digits.train.shape, 10, seed=seed).eval()
        with torch.no_grad():
            predicted = network(images).argmax(1).numpy()
        assert class_order.find_better(predicted, labels, 10) is None
        order = class_order._assignment(predicted, labels, 10)
        fits.append((order[predicted] == labels).mean() - (predicted == labels).mean())
    assert max(fits) > 0.1


def test_a_handful_of_images_is_said_to_be_too_few(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = _said(inside, capsys, "two", "permuted-of-two", "handful")
    assert "8 training images are too few to tell whether its classes are in another order" in said
    assert "(0.0% are right in the present one, 100.0% in the order that fits them best" in said
    assert "too few to tell" not in _said(inside, capsys, "two", "good-of-two", "handful-good")


def test_few_images_are_decided_by_exactly_where_a_flawless_teacher_would_be() -> None:
    labels = np.arange(200) % 4
    decided = [class_order.is_decidable(labels[:n], 4) for n in range(4, 60)]
    assert not any(decided[:6])  # of ten images six at most have the order found before them
    assert all(decided[30:])


def test_a_sample_is_spread_over_the_classes() -> None:
    labels = np.repeat([0, 1, 2], [100, 3, 50])
    for count, expected in (
        (2, 2),
        (3, [1, 1, 1]),
        (9, [3, 3, 3]),
        (20, None),
        (500, [100, 3, 50]),
    ):
        rows = spread(labels, count)
        assert len(np.unique(rows)) == len(rows) == min(count, 153)
        shares = np.bincount(labels[rows], minlength=3)
        if isinstance(expected, list):
            assert shares.tolist() == expected
        elif expected is None:
            assert shares[1] == 3
            assert abs(shares[0] - shares[2]) <= 1
        else:
            assert shares.max() == 1
