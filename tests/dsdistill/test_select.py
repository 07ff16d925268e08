"""`dsdistill select`: images that are chosen in the feature space of a network."""

import itertools
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import kd_support as support
import numpy as np
import photos
import pytest
import torch

from dsdistill.commands import evaluation_parts, select, through_backbone
from dsdistill.harness.data import datasets, distilled_set, feature_file, preprocess
from dsdistill.harness.data.distilled_set import DistilledSet
from dsdistill.harness.data.labeled_images import Examples, LabeledImages, centred_one_hot
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import run_folder
from dsdistill.loops import checkpoints
from dsdistill.methods import crop_selection, ridge_selection
from dsdistill.methods.ridge_selection import Choice
from dsdistill.options import EvaluateOptions, SelectOptions
from kd.evaluation import backbones, crops, extraction, features

SIDE, TRAIN = photos.SIDE, 20
Command = Callable[..., subprocess.CompletedProcess[str]]


def examples(n: int = 30, d: int = 4, k: int = 3) -> Examples:
    """Features of overlapping classes."""
    rng = np.random.default_rng(1)
    labels = np.arange(n) % k
    values = rng.normal(size=(k, d))[labels] + rng.normal(size=(n, d))
    images = LabeledImages(values.astype(np.float32).reshape(n, 1, 1, d), labels, ("a", "b", "c"))
    return Examples(images, preprocess.identity(d))


def refitted_loss(train: Examples, rows: list[int], ridge: float) -> float:
    """The loss by its definition: fit, predict all images, scale the scores, compare."""
    x = train.images().reshape(len(train), -1).astype(np.float64)
    phi = np.concatenate([x / np.sqrt(x.shape[1]), np.ones((len(x), 1))], 1)
    y = centred_one_hot(train.data.labels, 3).astype(np.float64)
    absolute = ridge * np.mean(np.sum(phi**2, 1))
    k_ss = phi[rows] @ phi[rows].T + absolute * np.eye(len(rows))
    scores = phi @ phi[rows].T @ np.linalg.solve(k_ss, y[rows])
    scale = np.sum(scores * y) / np.sum(scores**2)
    return float(np.sum((max(scale, 0) * scores - y) ** 2) / np.sum(y**2))


def chosen(rows: np.ndarray) -> list[int]:
    return [int(row) for row in rows.ravel() if row != ridge_selection.EMPTY]


def test_every_image_is_the_best_of_its_class_when_it_is_taken() -> None:
    train, ridge = examples(), 0.1
    passes = list(ridge_selection.select(ridge_selection.pose(train, ridge), 2, sweeps=1))
    taken: list[int] = []
    for number in range(2):  # the passes that fill the set
        for label in range(3):
            free = [i for i in range(30) if i % 3 == label and i not in taken]
            taken.append(min(free, key=lambda i: refitted_loss(train, [*taken, i], ridge)))
        assert chosen(passes[number].rows) == taken
        assert passes[number].loss == pytest.approx(refitted_loss(train, taken, ridge), rel=1e-9)
    for turn, exchanged in enumerate(passes[2:]):
        for label in range(3):
            place = 3 * turn + label
            rest = taken[:place] + taken[place + 1 :]
            free = [i for i in range(30) if i % 3 == label and i not in rest]
            taken[place] = min(free, key=lambda i: refitted_loss(train, [*rest, i], ridge))
        assert chosen(exchanged.rows) == taken


def test_exchanges_never_raise_the_loss_and_end_where_none_helps() -> None:
    problem = ridge_selection.pose(examples(), 0.1)
    passes = list(ridge_selection.select(problem, 2, sweeps=50))
    losses = [choice.loss for choice in passes]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(losses))
    assert ridge_selection.is_settled(passes[-1])
    assert len(passes) < ridge_selection.passes(2, 50)
    assert losses[-1] < losses[1]  # an exchange has helped


def test_a_choice_continues_with_the_same_bits() -> None:
    problem = ridge_selection.pose(examples(), 0.1)
    whole = list(ridge_selection.select(problem, 2, sweeps=2))
    for stop in range(len(whole) - 1):
        rest = list(ridge_selection.select(problem, 2, sweeps=2, start=whole[stop]))
        assert [(c.rows.tolist(), *c[1:]) for c in rest] == [
            (c.rows.tolist(), *c[1:]) for c in whole[stop + 1 :]
        ]


def test_no_image_is_taken_twice() -> None:
    problem = ridge_selection.pose(examples(9), 0.1)
    *_, choice = ridge_selection.select(problem, 3, sweeps=1)
    assert sorted(chosen(choice.rows)) == list(range(9))
    assert (choice.rows % 3 == [0, 1, 2]).all()


def test_the_best_crop_of_an_image_and_the_best_four_of_a_class() -> None:
    labels = np.array([0] * 5 + [1] * 4)
    losses = np.array([[9, 1, 9, 3, 9, 1, 2, 3, 4], [5, 9, 2, 9, 4, 9, 9, 9, 9.0]])
    images, numbers = crop_selection.choose(losses, labels, 1)
    assert images.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]  # image 0, at 5, is the worst of its class
    assert numbers.tolist() == [0, 1, 0, 1, 0, 0, 0, 0]


def test_four_tiles_are_joined_in_rows() -> None:
    tiles = np.arange(8, dtype=np.float32).reshape(8, 1, 1, 1) * np.ones((1, 2, 2, 1), np.float32)
    first, second = crop_selection.compose(tiles)[..., 0]
    assert first[::2, ::2].tolist() == [[0, 1], [2, 3]]
    assert second[::2, ::2].tolist() == [[4, 5], [6, 7]]


def test_cross_entropy_of_logits() -> None:
    shares, shift = np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]), np.array([[7.0], [-900.0]])
    logits = np.log(shares) + shift
    found = crop_selection.cross_entropy(logits, np.array([1, 2]))
    np.testing.assert_allclose(found, -np.log([0.25, 0.8]), rtol=1e-9)


def test_candidates_are_as_many_as_crops_are_needed() -> None:
    data = examples(30).data
    assert len(crop_selection.draw_candidates(data, 2, None, 0)) == 30  # a class has ten
    assert len(crop_selection.draw_candidates(data, 2, 9, 0)) == 27
    with pytest.raises(UserError, match="crops of 12 images, and class 'a' has 10"):
        crop_selection.draw_candidates(data, 3, None, 0)
    with pytest.raises(UserError, match="crops of 8 images: raise --candidates, got 7"):
        crop_selection.draw_candidates(data, 2, 7, 0)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of PNGs of two classes, a few of them grayscale, and a run on other classes."""
    folder = tmp_path_factory.mktemp("select")
    rng = np.random.default_rng(0)

    def striped(distance: int) -> np.ndarray:
        pixels = rng.normal(110, 40, (SIDE, SIDE, 3))
        pixels[::distance] += 60  # every second, third or fourth row is bright
        return pixels

    for data, names in (("photos", ("dark", "light")), ("others", ("black", "gray", "white"))):
        classes = {name: partial(striped, 2 + i) for i, name in enumerate(names)}
        photos.write(folder / data, classes, train=TRAIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        given = ("--student", "mlp:16", "--epochs", 1, "--out", "run")
        support.main(patch, "train", "others", *given)
    return folder


def options(work: Path, out: Path, **changes: object) -> SelectOptions:
    given = {"images_per_class": 2, "crops": None, "device": "cpu", **changes}
    return SelectOptions(str(work / "photos"), features=str(work / "run"), out=out, **given)  # pyright: ignore[reportArgumentType]


def read(run: Path) -> DistilledSet:
    return distilled_set.load(run / distilled_set.FILE_NAME)


@pytest.fixture(scope="module")
def runs(work: Path) -> dict[str, Path]:
    """A finished run of each way to choose."""
    ways = ("ridge", "centre", "crops")
    return {by: select.run(options(work, work / f"by-{by}", by=by)) for by in ways}


@pytest.mark.parametrize("by", ["ridge", "centre", "crops"])
def test_the_result_is_an_ordinary_run(by: str, runs: dict[str, Path]) -> None:
    distilled = read(runs[by])
    assert distilled.images.shape == (4, SIDE, SIDE, 3)
    assert 0 <= distilled.images.min() < distilled.images.max() <= 1
    assert distilled.preprocess.kind == "none"
    np.testing.assert_array_equal(distilled.labels, centred_one_hot(np.array([0, 0, 1, 1]), 2))
    assert (runs[by] / "distilled.png").exists()
    assert not (runs[by] / through_backbone.FEATURES_FILE).exists()
    metrics = distilled.provenance["metrics"]
    for name in ("", "initial_", "full_", "linear_probe_"):
        assert 0 <= metrics[f"{name}test_accuracy"] <= 1
        assert 0 <= metrics[f"{name}validation_accuracy"] <= 1
    assert metrics["full_test_accuracy"] > 0.8


def of_photos(work: Path) -> tuple[datasets.Splits, np.ndarray]:
    """The photos as a run splits them, and the features of the training images."""
    splits = datasets.load(str(work / "photos"), root=work)
    backbone = backbones.load(str(work / "run"), backbones.EMBEDDING, (SIDE, SIDE, 3))
    images = torch.from_numpy(splits.train.images()).movedim(3, 1) / 255
    return splits, backbone(images).numpy().astype(np.float16).astype(np.float64)


def test_of_one_image_the_centre_is_that_nearest_to_the_mean(work: Path, tmp_path: Path) -> None:
    run = select.run(options(work, tmp_path / "run", by="centre", images_per_class=1))
    splits, z = of_photos(work)
    expected = []
    for label in range(2):
        members = np.flatnonzero(splits.train.labels == label)
        away = np.linalg.norm(z[members] - z[members].mean(0), axis=1)
        expected.append(members[away.argmin()])
    np.testing.assert_array_equal(read(run).images * 255, splits.train.images(np.array(expected)))


def test_ridge_chooses_by_the_features_of_the_network(work: Path, runs: dict[str, Path]) -> None:
    splits, z = of_photos(work)
    train = LabeledImages(z.reshape(len(z), 1, 1, -1), splits.train.labels, splits.train.classes)
    fitted = preprocess.fit("centre", train.chunks, train.shape)
    problem = ridge_selection.pose(Examples(train, fitted), 0.1)
    *_, last = ridge_selection.select(problem, 2, sweeps=5)
    images = splits.train.images(last.rows.T.ravel())
    np.testing.assert_array_equal(read(runs["ridge"]).images * 255, images)


def test_crops_are_what_the_network_has_seen(work: Path) -> None:
    splits, _ = of_photos(work)
    backbone = backbones.load(str(work / "run"), backbones.EMBEDDING, (SIDE, SIDE, 3))
    shown = crops.PaddedCrops(splits.train, backbone, torch.device("cpu"))
    rows = np.array([3, 20])
    [batch] = shown.of_rows([rows], (7, 2))
    images = batch.images.movedim(1, 3).numpy()
    tiles = crops.cut(splits.train, rows, np.array([2, 2]), (SIDE // 2, SIDE // 2), 7)
    np.testing.assert_allclose(images[:, 2:6, 2:6], tiles, atol=1e-6)
    mean = backbone.model.preprocess.mean
    np.testing.assert_allclose(images[:, 0, 0], np.stack([mean, mean]), atol=1e-6)
    larger = crops.cut(splits.train, rows, np.array([2, 2]), (SIDE, SIDE), 7)
    halved = larger.reshape(2, 4, 2, 4, 2, 3).mean((2, 4))
    assert np.abs(halved - tiles).mean() < 0.1  # the same part of the image


def test_the_own_classifier_judges_crops_where_its_classes_are_those_of_the_data(
    work: Path,
) -> None:
    backbone = backbones.load(str(work / "run"), backbones.EMBEDDING, (SIDE, SIDE, 3))
    assert backbone.model.classes == ("black", "gray", "white")
    head = crops.own_head(backbone, ("white", "black"))
    assert head is not None
    images = torch.rand(2, 3, SIDE, SIDE)
    torch.testing.assert_close(head(images), backbone.logits(images)[:, [2, 0]])
    assert crops.own_head(backbone, ("dark", "light")) is None
    assert crops.own_head(backbone, ("0", "1")) is None


@pytest.mark.parametrize("by", ["ridge", "crops"])
def test_other_commands_read_it(
    by: str, runs: dict[str, Path], dsdistill: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs[by]
    parts = evaluation_parts.assemble(
        EvaluateOptions(run, learners="ridge,linear-probe", controls="random")
    )
    predict = parts.learners[1](parts.arms[0].draw(0), parts.held_out.validation, 0)
    assert 0 <= parts.held_out.measure(predict)["accuracy"] <= 1
    shown = dsdistill("inspect", run)
    assert "linear on the features of run" in shown.stdout
    assert dsdistill("export", run, "--format", "npz", "--out", "set.npz").returncode == 0
    monkeypatch.chdir(run.parent)
    given = ("--student", "mlp:4", "--epochs", 1, "--out", run / "student")
    support.main(monkeypatch, "train", run, *given)


class Killed(Exception):
    """Nothing that the command handles: it leaves the folder as a kill does."""


def killed_at(monkeypatch: pytest.MonkeyPatch, where: object, name: str, call: int) -> None:
    """Let the work end at that call of a function, with all before it saved."""
    original, calls = getattr(where, name), [0]

    def counted(*arguments: object, **named: object) -> object:
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return original(*arguments, **named)

    monkeypatch.setattr(where, name, counted)
    monkeypatch.setattr(checkpoints, "SECONDS_BETWEEN_CHECKPOINTS", -1)
    monkeypatch.setattr(extraction, "SECONDS_BETWEEN_SAVES", -1)
    monkeypatch.setattr(feature_file, "BATCH", 8)


KILLS = [
    pytest.param("ridge", run_folder.Run, "require_same", 1, id="before the features"),
    pytest.param("ridge", feature_file.PartialFeatures, "save", 1, id="before the first feature"),
    pytest.param("ridge", feature_file.PartialFeatures, "append", 3, id="in the features"),
    pytest.param("ridge", feature_file.PartialFeatures, "finish", 1, id="after the last feature"),
    pytest.param("ridge", ridge_selection, "_pass", 4, id="in the passes"),
    pytest.param("ridge", distilled_set, "save", 1, id="before the set is saved"),
    pytest.param("crops", crop_selection, "cross_entropy", 5, id="in the crops"),
]


@pytest.mark.parametrize(("by", "where", "name", "call"), KILLS)
def test_a_killed_run_ends_in_the_same_set(
    by: str,
    where: object,
    name: str,
    call: int,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feature_file, "BATCH", 8)
    whole = read(select.run(options(work, tmp_path / "whole", by=by)))
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        killed_at(patch, where, name, call)
        with pytest.raises(Killed):
            select.run(options(work, out, by=by))
    resumed = select.run(SelectOptions(out=out, resume=True))
    assert resumed == out
    again = read(out)
    np.testing.assert_array_equal(again.images, whole.images)
    mine, theirs = again.provenance["metrics"], whole.provenance["metrics"]
    assert mine == theirs
    assert not (out / through_backbone.FEATURES_FILE).exists()


@pytest.mark.parametrize(("where", "name"), [(features, "extract"), (ridge_selection, "_pass")])
def test_a_stop_says_how_to_continue(
    where: object, name: str, work: Path, dsdistill: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: object) -> Choice:
        raise KeyboardInterrupt

    given = (work / "photos", "--features", work / "run", "--device", "cpu", "--out", "run")
    with monkeypatch.context() as patch:
        patch.setattr(where, name, stopped)
        ended = dsdistill("select", *given, "--images-per-class", 1)
    assert ended.returncode == 1
    assert "stopped; continue with `dsdistill select --resume --out run`" in ended.stderr
    ended = dsdistill("select", "--resume", "--out", "run")
    assert ended.returncode == 0, ended.stderr
    assert "of random images), kernel linear on the features of run" in ended.stdout
    assert "there is nothing to resume" in dsdistill("select", "--resume", "--out", "run").stderr


def _other_weights(backbone: torch.nn.Module) -> None:
    next(backbone.parameters()).data.add_(1)


def _other_activation(backbone: torch.nn.Module) -> None:
    network = next(m for m in backbone.modules() if isinstance(m, torch.nn.Sequential))
    network[2] = torch.nn.Tanh()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (_other_weights, "network of --features"),
        (_other_activation, r"layers of the network of --features \(torch "),
    ],
)
def test_another_network_does_not_continue_a_run(
    work: Path, tmp_path: Path, change: Callable[[torch.nn.Module], None], name: str
) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, ridge_selection, "_pass", 1)
        with pytest.raises(Killed):
            select.run(options(work, out))
    original = backbones.load
    with pytest.MonkeyPatch.context() as patch:

        def changed(*arguments, **named):
            backbone = original(*arguments, **named)
            change(backbone)
            return backbone

        patch.setattr(backbones, "load", changed)
        with pytest.raises(UserError, match=f"changed since .*: {name}"):
            select.run(SelectOptions(out=out, resume=True))


def test_an_error_of_the_input_leaves_no_folder(work: Path, tmp_path: Path) -> None:
    """Also after features have been written: the same line can be given again."""

    def refuse(*arguments: object) -> None:
        raise UserError("too large")

    out, original = tmp_path / "run", features.extract
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ridge_selection, "pose", refuse)
        with pytest.raises(UserError, match="too large"):
            select.run(options(work, out))
    assert not out.exists()

    def infinite(*arguments):
        for rows in original(*arguments):
            yield np.full_like(rows, np.inf)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "extract", infinite)
        with pytest.raises(UserError, match="do not fit into float16"):
            select.run(options(work, out))
    assert not out.exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--features", None), "--features must name the network"),
        (("--features", "convnet:4"), "has no published weights"),
        (("--features", "nowhere"), "nowhere"),
        (("--layer", "nowhere"), "unknown layer 'nowhere'"),
        (("--images-per-class", 0), "--images-per-class must be at least 1, got 0"),
        (("--images-per-class", 19), "has 18 training images, fewer than the 19 asked for"),
        (("--by", "crops", "--images-per-class", 5), "made of the crops of 20 images"),
        (("--by", "crops", "--image-size", 7), "even height and width, got 7x7"),
        (("--crops", 2), "--crops needs --by crops, got --by ridge"),
        (("--by", "centre", "--sweeps", 2), "--sweeps needs --by ridge, got --by centre"),
        (("--sweeps", -1), "--sweeps must be at least 0, got -1"),
        (("--ridge", 0), "--ridge must be positive, got 0"),
        (("--seed", -1), "--seed must be at least 0"),
        (("--device", "cuda:99"), "cuda"),
        (("--resume",), "--resume needs --out"),
        (("--validation-fraction", 1), "validation fraction must be in [0, 1), got 1"),
    ],
)
def test_refuses_in_one_line(
    given: tuple[object, ...], said: str, work: Path, tmp_path: Path, dsdistill: Command
) -> None:
    words: dict[object, object] = {"--features": work / "run", "--device": "cpu"}
    flags = given if len(given) == 1 else ()
    words |= dict(zip(given[::2], given[1::2], strict=False))
    line = [word for pair in words.items() if pair[1] is not None for word in pair]
    ended = dsdistill("select", work / "photos", *line, *flags)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("dsdistill: ")
    assert said in last
    assert not list(tmp_path.iterdir())


def test_features_are_no_images(work: Path, tmp_path: Path, dsdistill: Command) -> None:
    support.write_npz(tmp_path / "three.npz")
    partial = feature_file.PartialFeatures(tmp_path / "f.npz", {}, (4, 2), resume=False)
    partial.append(np.zeros((4, 2)))
    partial.finish(np.array([0, 1, 0, 1]), ("a", "b"), np.array([0, 0, 2, 2]), np.arange(4))
    for command in ("select", "kip"):
        ended = dsdistill(command, "f.npz", "--features", work / "run")
        assert "f.npz holds features: give the images that they are of" in ended.stderr


def test_a_gray_data_set_is_seen_by_a_network_of_colour(work: Path, tmp_path: Path) -> None:
    support.write_npz(tmp_path / "three.npz")
    given = SelectOptions(str(tmp_path / "three.npz"), features=str(work / "run"), device="cpu")
    for by in ("ridge", "crops"):
        chosen_by = {"by": by, "images_per_class": 1, "out": tmp_path / by}
        run = select.run(replace(given, **chosen_by))
        assert read(run).images.shape == (3, 8, 8, 1)


def test_without_validation_images_the_probe_that_needs_them_is_left_out(
    work: Path, tmp_path: Path
) -> None:
    run = select.run(options(work, tmp_path / "run", validation_fraction=0.0))
    metrics = read(run).provenance["metrics"]
    assert "linear_probe_test_accuracy" not in metrics
    assert "validation_accuracy" not in metrics
    assert 0 <= metrics["test_accuracy"] <= 1
