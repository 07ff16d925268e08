"""Learners of `evaluate` on the features of a backbone: the same map for every image, once."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import dsdistill
from dsdistill.commands import evaluate as evaluate_command
from dsdistill.commands import evaluation_parts
from dsdistill.harness.data import datasets, preprocess
from dsdistill.harness.data.labeled_images import Examples, LabeledImages, centred_one_hot
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import controls
from dsdistill.harness.evaluation.feature_learner import BATCH, FeatureLearner, FeatureSpace
from dsdistill.harness.evaluation.held_out import HeldOut
from dsdistill.harness.evaluation.protocol import Arm, evaluate
from dsdistill.harness.reports import report as reports
from dsdistill.harness.runs import progress
from dsdistill.kernels import networks
from dsdistill.methods.linear_probe import LinearProbe
from dsdistill.methods.ridge import RidgeLearner
from dsdistill.options import EvaluateOptions
from kd.commands import features as features_command
from kd.commands import train as train_command
from kd.options import FeaturesOptions, Overrides, TrainOptions

K, SIDE, D = 3, 4, 7


class Backbone:
    """A random map of pixels, which counts the images that it is given."""

    name = "random"
    width = D
    identity: Mapping[str, object] = {"weights_sha256": "0" * 64}
    accelerator = None

    def __init__(self, scale: float = 1.0) -> None:
        self.weights = scale * np.random.default_rng(1).normal(size=(SIDE * SIDE, D))
        self.images = 0

    def __call__(self, images: np.ndarray, /) -> np.ndarray:
        assert len(images) <= BATCH
        self.images += len(images)
        return np.tanh(images.reshape(len(images), -1) @ self.weights).astype(np.float32)


def labeled(n: int, seed: int) -> LabeledImages:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % K
    images = rng.integers(0, 120, (n, SIDE, SIDE, 1), dtype=np.uint8)
    images[np.arange(n), labels] += 120
    return LabeledImages(images, labels, ("a", "b", "c"))


@pytest.fixture
def data() -> tuple[Examples, HeldOut]:
    """Training images, and held-out ones of which some lie in the same array."""
    whole, test = labeled(180, 0), labeled(60, 1)
    train, validation = whole.select(np.arange(0, 150)), whole.select(np.arange(150, 180))
    fitted = preprocess.fit("standardise", train.chunks, train.shape)
    held_out = HeldOut(Examples(validation, fitted), Examples(test, fitted), identity={"data": 0})
    return Examples(train, fitted), held_out


def as_set(drawn: Examples) -> Examples:
    """Real images as a distilled set stores them: preprocessed, with real-valued labels."""
    plain = LabeledImages(drawn.images(), drawn.data.labels, drawn.data.classes)
    return Examples(plain, drawn.preprocess, centred_one_hot(plain.labels, K), True)


def test_each_image_passes_through_the_backbone_once(data: tuple[Examples, HeldOut]) -> None:
    train, held_out = data
    backbone = Backbone()
    space = FeatureSpace(backbone, train.data)
    ridge = RidgeLearner(networks.parse("linear"), 1e-3, limit=None)
    distilled = as_set(controls.random(train, 2, 0))
    arms = [Arm("distilled", lambda seed: distilled, fixed=True)]
    arms += [controls.arm(name, train, 2) for name in ("random", "k-means", "full")]
    for each in (LinearProbe(), ridge):
        learner = FeatureLearner(each, space)
        for arm in arms:
            results = evaluate(learner, arm, held_out, [0, 1, 2])
            assert all(result.failure is None for result in results)
            # The size of a row is that of its images, not of their features.
            assert results[0].bytes >= results[0].images * SIDE * SIDE
    assert backbone.images == 150 + 30 + 60 + len(distilled)


def test_a_set_is_read_as_its_pixels(data: tuple[Examples, HeldOut]) -> None:
    """Real images give the same features raw and as a set of another preprocessing."""
    train, held_out = data
    space = FeatureSpace(Backbone(), train.data)
    drawn = controls.random(train, 4, 0)
    raw, stored = (space.examples(each) for each in (drawn, as_set(drawn)))
    np.testing.assert_allclose(raw.images(), stored.images(), atol=2e-3)  # float16
    np.testing.assert_array_equal(raw.labels(), stored.labels())
    whole = space.examples(train).images().reshape(150, D)
    np.testing.assert_allclose(whole.mean(0), 0, atol=1e-3)
    assert np.linalg.norm(whole, axis=1).mean() == pytest.approx(D**0.5, rel=1e-3)
    # A predictor of images is the same whether it is given the examples or their pixels.
    predict = FeatureLearner(LinearProbe(), space)(train, held_out.validation, 0)
    rows = slice(10, 40)
    np.testing.assert_allclose(
        predict.predict_examples(held_out.test, rows),
        predict(held_out.test.images(rows)),
        atol=2e-2,
    )


def test_a_slow_backbone_shows_how_far_it_is(
    data: tuple[Examples, HeldOut],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 1e-9)
    train, _ = data
    FeatureSpace(Backbone(), train.data).examples(train)
    assert "150/150 images through" in capsys.readouterr().err


def test_a_feature_beyond_float16_is_a_failure_with_its_reason(
    data: tuple[Examples, HeldOut],
) -> None:
    train, held_out = data

    class Large(Backbone):
        def __call__(self, images: np.ndarray, /) -> np.ndarray:
            return 1e5 * super().__call__(images)

    learner = FeatureLearner(LinearProbe(), FeatureSpace(Large(), train.data))
    [result] = evaluate(learner, controls.arm("full", train, 1), held_out, [0])
    assert "beyond 65504" in str(result.failure)


@pytest.fixture(scope="module")
def backbone_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two small networks trained on digits."""
    folder = tmp_path_factory.mktemp("backbones")
    students = {"mlp:24": folder / "one", "mlp:16": folder / "two"}
    for student, out in students.items():
        epochs = Overrides(epochs=2)
        train_command.run(TrainOptions("digits", student=student, out=out, overrides=epochs))
    one, two = students.values()
    return one, two


def options_of(run: Path, *learners: str, **changes: object) -> EvaluateOptions:
    chosen = EvaluateOptions(
        run, learners=",".join(learners), controls="random,full", seeds=2, cache=None
    )
    return replace(chosen, **changes)  # pyright: ignore[reportArgumentType]


def test_evaluate_measures_on_two_backbones(
    kip_run: Path, backbone_runs: tuple[Path, Path], tmp_path: Path
) -> None:
    one, two = backbone_runs
    names = [f"linear-probe@{one}", f"ridge:linear@{one}", f"linear-probe@{two}"]
    report = reports.load(evaluate_command.run(options_of(kip_run, *names, out=tmp_path / "a")))
    # A folder is named by the last part of its path.
    assert report.learners == ["linear-probe@one", "ridge:linear@one", "linear-probe@two"]
    for name in report.learners:
        rows = [report.row(name, arm) for arm in ("distilled", "random", "full")]
        distilled, random, full = (row.accuracy.mean for row in rows if row and row.accuracy)
        assert full > max(distilled, random)
        assert min(distilled, random) > 0.2  # of ten classes, two images each
    assert [note for note in report.notes if note.startswith("@two: 16 features of all images")]


def test_training_images_have_the_features_that_kd_features_writes(
    kip_run: Path, backbone_runs: tuple[Path, Path], tmp_path: Path
) -> None:
    one, _ = backbone_runs
    options = FeaturesOptions(
        "digits", student=str(one), out=tmp_path / "f.npz", device="cpu", batch_size=BATCH
    )
    features_command.run(options)
    written = datasets.load(str(tmp_path / "f.npz"), root=tmp_path, validation_fraction=0.1)
    parts = evaluation_parts.assemble(options_of(kip_run, f"linear-probe@{one}"))
    [learner] = parts.learners
    assert isinstance(learner, FeatureLearner)
    own, plain = learner.space.examples(parts.train), written.train
    expected = Examples(plain, preprocess.fit("centre", plain.chunks, plain.shape))
    np.testing.assert_array_equal(own.data.labels, plain.labels)
    np.testing.assert_allclose(own.images(), expected.images(), atol=2e-3)


def test_other_weights_are_another_learner(
    kip_run: Path, backbone_runs: tuple[Path, Path], tmp_path: Path
) -> None:
    """Results of a backbone that was trained anew in the same folder do not count."""
    identities = []
    for run in backbone_runs:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(run, tmp_path / "run")
        options = options_of(kip_run, f"linear-probe@{tmp_path / 'run'}")
        [learner] = evaluation_parts.assemble(options).learners
        assert learner.name == "linear-probe@run"
        identities.append(getattr(learner, "identity", None))
    assert None not in identities
    assert identities[0] != identities[1]


def test_folders_of_one_name_keep_their_paths(
    kip_run: Path, backbone_runs: tuple[Path, Path], tmp_path: Path
) -> None:
    one, _ = backbone_runs
    shutil.copytree(one, tmp_path / "one")
    names = [f"linear-probe@{one}", f"linear-probe@{tmp_path / 'one'}"]
    assert [
        each.name for each in evaluation_parts.assemble(options_of(kip_run, *names)).learners
    ] == names


@pytest.mark.parametrize(
    ("learner", "message"),
    [
        ("linear-probe@", "linear-probe@ names no backbone"),
        ("linear-probe@nowhere", "nowhere"),
        ("linear-probe@mlp:4", "no published weights"),
        ("ridge:convnet3@{run}", "features have no pixels to convolve"),
        ("ridge:fcc@{run}", "fcc"),
    ],
)
def test_wrong_names_are_one_line(
    kip_run: Path, backbone_runs: tuple[Path, Path], learner: str, message: str
) -> None:
    options = options_of(kip_run, learner.format(run=backbone_runs[0]))
    with pytest.raises(UserError, match=message) as caught:
        evaluation_parts.assemble(options)
    assert "\n" not in str(caught.value)


def test_the_library_takes_learners_on_features(backbone_runs: tuple[Path, Path]) -> None:
    images, labels = (array[:300] for array in dsdistill.load_data("digits", progress=False).train)
    small = dsdistill.kip(images, labels, images_per_class=1, steps=2, progress=False)
    test = dsdistill.load_data("digits", progress=False).test
    report = dsdistill.evaluate(
        small,
        train=(images, labels),
        test=test,
        learners=[f"ridge:linear@{backbone_runs[0]}", RidgeLearner(networks.parse("fc"))],
        controls=["full"],
        seeds=1,
        progress=False,
    )
    assert report.learners == ["ridge:linear@one", "ridge"]
    assert all(row.accuracy is not None for row in report.rows)


CODE = """
from torch import nn

class Small(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, num_classes))
"""


def test_code_that_a_run_names_is_imported_if_the_user_names_it(
    kip_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_backbone.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    train_command.run(
        TrainOptions(
            "digits",
            student="own_backbone:Small",
            out=tmp_path / "own",
            overrides=Overrides(epochs=1),
        )
    )
    options = options_of(kip_run, "linear-probe@own")
    with pytest.raises(UserError, match="names the code own_backbone:Small"):
        evaluation_parts.assemble(options)
    parts = evaluation_parts.assemble(replace(options, trust_module="own_backbone:Small"))
    [learner] = parts.learners
    assert isinstance(learner, FeatureLearner)
    assert learner.space.backbone.width == 9
