"""Run one selection: real images, or crops of them, chosen in the feature space of a backbone.

load -> features of training and validation images -> choose -> read the test set once -> save

The backbone is a torch network of `kd`; only arrays cross.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int

from dsdistill.commands import distil, outcomes, prepare, through_backbone
from dsdistill.harness import shell, stopping
from dsdistill.harness.data import (
    datasets,
    distilled_set,
    feature_file,
    labeled_images,
    preprocess,
)
from dsdistill.harness.data.datasets import Splits
from dsdistill.harness.data.distilled_set import DistilledSet
from dsdistill.harness.data.labeled_images import Examples, LabeledImages
from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import controls, held_out, metrics
from dsdistill.harness.evaluation.held_out import Predict
from dsdistill.harness.reports.image_grid import GridSide
from dsdistill.harness.runs import progress, run_folder
from dsdistill.harness.runs.options import Storage
from dsdistill.harness.runs.run_folder import Run
from dsdistill.kernels import networks
from dsdistill.loops import select_loop
from dsdistill.methods import crop_selection, initial_support, ridge, ridge_selection
from dsdistill.methods.linear_probe import LinearProbe
from dsdistill.options import SelectOptions

METHOD = "select"
DEFAULTS = {"images_per_class": prepare.DEFAULT_IMAGES_PER_CLASS}
# Options of one way to choose, with their defaults.
OF_WAY: Mapping[str, Mapping[str, Any]] = {
    "ridge": {"sweeps": 5},
    "centre": {},
    "crops": {"crops": crop_selection.PUBLISHED_CROPS, "candidates": None},
}
BATCH = 64  # images in a forward pass
VERSIONS = (*outcomes.VERSIONS, "torch", "timm")


STORAGE = Storage(
    unstored=("out", "resume", "trust_module"),
    free=("data_root",),
    absolute={"data": datasets.absolute_name, "features": through_backbone.absolute_name},
)


class Network(Protocol):
    """A map from images to features."""

    def batches(self, images: LabeledImages) -> Iterator[Float[np.ndarray, "m d"]]:
        """Yield the features of all images, `BATCH` at a time."""
        ...

    def record(self) -> dict[str, Any]:
        """All that the features depend on besides the images, JSON-compatible."""
        ...


@dataclass(frozen=True, eq=False)
class TorchNetwork:
    """A frozen network of `kd`.

    Attributes:
        backbone: The network on its device, a `kd.evaluation.backbones.Backbone`.
        device: That device.
    """

    backbone: Any
    device: Any

    def batches(self, images: LabeledImages) -> Iterator[Float[np.ndarray, "m d"]]:
        """As `Network.batches`."""
        from kd.evaluation import features, image_sets

        ordered = image_sets.of_parts("", [images], "").ordered(
            self.backbone.views(), self.device, BATCH, 0
        )
        plan = features.plan(len(images), 0, 1, BATCH)
        return features.extract(self.backbone, ordered, plan, 0, self.device)

    def record(self) -> dict[str, Any]:
        """As `Network.record`."""
        return self.backbone.record()


@dataclass(frozen=True, eq=False)
class FunctionNetwork:
    """A caller's own function from (m, h, w, c) float32 images in [0, 1] to (m, d) features."""

    function: Callable[[np.ndarray], Any]

    def batches(self, images: LabeledImages) -> Iterator[Float[np.ndarray, "m d"]]:
        """As `Network.batches`.

        Raises:
            UserError: If the function returns no row of numbers for each image.
        """
        for chunk in images.chunks(BATCH):
            rows = np.asarray(self.function(preprocess.unit_range(chunk)))
            if rows.ndim < 2 or len(rows) != len(chunk) or rows.dtype.kind not in "fiu":
                raise UserError(
                    f"features of {len(chunk)} images must be numbers of the shape "
                    f"({len(chunk)}, d), got {rows.dtype} {rows.shape}"
                )
            yield rows.reshape(len(rows), -1)

    def record(self) -> dict[str, Any]:
        """As `Network.record`."""
        return {"backbone": "a function"}


@dataclass(frozen=True, eq=False)
class FeatureSpace:
    """The features of a network, centred and scaled as those of the training images.

    Attributes:
        network: The network.
        fitted: Map from its features to those that a linear kernel sees.
    """

    network: Network
    fitted: Preprocess

    def examples(self, images: LabeledImages, unit: str) -> Examples:
        """Features of images, in memory.

        Args:
            images: Images in [0, 1], or bytes.
            unit: Name of the images in the progress display.
        """
        return Examples(extract(self.network, images, unit), self.fitted)


def extract(network: Network, images: LabeledImages, unit: str) -> LabeledImages:
    """Features of images in memory, in float16, as in a file of features.

    Args:
        network: The network.
        images: Images in [0, 1], or bytes.
        unit: Name of the images in the progress display.

    Raises:
        UserError: If a feature does not fit into float16.
    """
    stream = network.batches(images)
    parts = [slice(i, min(i + BATCH, len(images))) for i in range(0, len(images), BATCH)]
    rows = [feature_file.as_half(next(stream)) for _ in progress.track_if_slow(parts, unit)]
    store = np.concatenate(rows).reshape(len(images), 1, 1, -1)
    return LabeledImages(store, images.labels, images.classes)


@dataclass(frozen=True, eq=False)
class Prepared:
    """Checked input of a selection.

    Attributes:
        splits: The data.
        network: The network that sees the images.
        candidates: Positions of the training images whose crops are scored, for `--by crops`.
    """

    splits: Splits
    network: Network
    candidates: Int[np.ndarray, " n"] | None = None

    def digests(self) -> dict[str, str]:
        """SHA-256 of all that the run depends on, for `Run.require_same`."""
        record = json.dumps(self.network.record(), sort_keys=True)
        network = hashlib.sha256(record.encode()).hexdigest()
        return self.splits.digests() | {"network of --features": network}


@dataclass(frozen=True, eq=False)
class Selection:
    """What a way to choose has chosen.

    Attributes:
        images: The images, in [0, 1] and in class order.
        figures: Figures by name.
        seconds: Duration of the search, summed over resumes.
    """

    images: Float[np.ndarray, "n h w c"]
    figures: Mapping[str, float]
    seconds: float


def run(options: SelectOptions) -> Path:
    """Run `dsdistill select` and return the run's folder.

    Raises:
        UserError: If an option or the data break a rule.
        KeyboardInterrupt: If stopped by hand; what is done is kept.
    """
    if options.resume and options.out is None:
        raise UserError("--resume needs --out, the folder of the run to continue")
    if options.resume:
        opened, options = _reopen(options)
        with opened, _explain_stop(options, opened.folder):
            return _select_and_finish(options, opened, _prepare(options))
    options = with_defaults(options)
    folder = options.out or run_folder.next_free(f"{METHOD}-{Path(options.data).stem}")
    run_folder.check_free(folder, distilled_set.FILE_NAME)
    with stopping.explain_stop():
        prepared = _prepare(options)  # before the folder exists: a wrong option leaves none behind
    with (
        run_folder.start(folder, _config(options), result=distilled_set.FILE_NAME) as opened,
        _explain_stop(options, folder),
    ):
        return _select_and_finish(options, opened, prepared)


def with_defaults(options: SelectOptions) -> SelectOptions:
    """The options with the defaults that depend on others.

    Raises:
        UserError: If an option of another way to choose is set.
    """
    for way, defaults in OF_WAY.items():
        for name in defaults:
            if getattr(options, name) is not None and way != options.by:
                raise UserError(f"{shell.flag(name)} needs --by {way}, got --by {options.by}")
    defaults = DEFAULTS | dict(OF_WAY[options.by])
    missing = {name: value for name, value in defaults.items() if getattr(options, name) is None}
    return replace(options, **missing)


def check(options: SelectOptions) -> None:
    """Refuse values out of range.

    Raises:
        UserError: With the option, the rule and the value.
    """
    least = {"images_per_class": 1, "crops": 1, "candidates": 1, "sweeps": 0, "seed": 0}
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise UserError(f"{shell.flag(name)} must be at least {smallest}, got {value}")
    if not 0 < options.ridge < float("inf"):
        raise UserError(f"--ridge must be positive, got {options.ridge}")


def _prepare(options: SelectOptions) -> Prepared:
    """Check the options, load the data and the network.

    Raises:
        UserError: If a rule is broken; the message is about the first.
    """
    from kd.evaluation import backbones

    check(options)
    if options.features is None:
        raise UserError(
            "--features must name the network that sees the images: the folder of a run of kd "
            "train, or a network with published weights, such as timm:resnet18"
        )
    backbones.check_name(options.features)
    path = Path(options.data).expanduser()
    if path.suffix == ".npz" and feature_file.is_feature_file(path):
        raise UserError(f"{options.data} holds features: give the images that they are of")
    splits = datasets.load(
        options.data,
        root=options.data_root,
        image_size=options.image_size,
        validation_fraction=options.validation_fraction,
        channels=options.channels,
    )
    prepare.require_test_images(options.data, splits)
    prepare.note_held_out(options.data, options.validation_fraction, SelectOptions, splits)
    return prepare_arrays(options, splits)


def prepare_arrays(options: SelectOptions, splits: Splits) -> Prepared:
    """Check the options against data that are at hand, and load the network.

    Args:
        options: Options without open defaults; those that say where the data are have no effect.
        splits: The data; the test part may be empty.

    Raises:
        UserError: If a rule is broken; the message is about the first.
    """
    from kd.evaluation import backbones

    assert options.features is not None
    assert options.images_per_class is not None
    device = backbones.device(options.device)
    labeled_images.check_images_per_class(splits.train, options.images_per_class)
    candidates = _candidates(options, splits) if options.by == "crops" else None
    backbone = backbones.load(
        options.features,
        options.layer,
        splits.train.shape,
        typed=backbones.names_in(options.features, options.trust_module),
    ).to(device)
    return Prepared(splits, TorchNetwork(backbone, device), candidates)


def select_arrays(
    options: SelectOptions, splits: Splits, function: Callable[[np.ndarray], Any] | None
) -> DistilledSet:
    """Choose among images that are at hand; nothing is written.

    Args:
        options: Options without open defaults.
        splits: The data; the test part may be empty.
        function: A caller's own network, in place of the one that the options name.

    Raises:
        UserError: If a rule is broken.
    """
    if function is None:
        prepared = prepare_arrays(options, splits)
    else:
        assert options.images_per_class is not None
        labeled_images.check_images_per_class(splits.train, options.images_per_class)
        prepared = Prepared(splits, FunctionNetwork(function))
    train = extract(prepared.network, splits.train, "training images")
    judged = splits.validation
    validation = extract(prepared.network, judged, "validation images") if len(judged) else None
    elsewhere = ("data", *STORAGE.free, "image_size", "channels")  # no part of a call from Python
    config = {name: value for name, value in _config(options).items() if name not in elsewhere}
    opened = run_folder.in_memory(config)
    opened.require_same(prepared.digests())
    selection, _ = select(options, opened, prepared, *normalise(train, validation))
    return assemble(options, opened, prepared, selection)


def _candidates(options: SelectOptions, splits: Splits) -> Int[np.ndarray, " n"]:
    assert options.images_per_class is not None
    height, width, _ = splits.train.shape
    if height % 2 or width % 2:
        raise UserError(
            f"--by crops joins four crops to an image of an even height and width, got {height}x"
            f"{width}: give an even --image-size"
        )
    return crop_selection.draw_candidates(
        splits.train, options.images_per_class, options.candidates, options.seed
    )


def _select_and_finish(options: SelectOptions, opened: Run, prepared: Prepared) -> Path:
    with opened.clean_up_on_error():
        opened.require_same(prepared.digests())
        with through_backbone.features_file(opened) as file:
            train, validation = _features(prepared, opened.config, file)
            _finish(options, opened, prepared, train, validation)
        return opened.folder


def _features(
    prepared: Prepared, config: Mapping[str, Any], file: Path
) -> tuple[Examples, Examples]:
    """Features of the training and of the validation images, mapped from the run's folder."""
    from kd.evaluation import extraction, image_sets

    splits, network = prepared.splits, prepared.network
    assert isinstance(network, TorchNetwork)
    digest = hashlib.sha256(json.dumps(config[run_folder.INPUTS_KEY]).encode()).hexdigest()
    parts = [splits.train, splits.validation]
    what = extraction.Extraction(
        image_sets.of_parts(splits.name, parts, digest),
        network.backbone,
        network.device,
        str(config["data"]),
        batch_size=BATCH,
    )
    written = extraction.write_in_run(file, what)
    train = written.part("train")
    assert train is not None, "no class is without training images"
    return normalise(train, written.part("validation"))


def normalise(train: LabeledImages, validation: LabeledImages | None) -> tuple[Examples, Examples]:
    """Centre and scale features by those of the training images.

    Args:
        train: Features of the training images.
        validation: Features of the validation images; None where there are none.
    """
    fitted = preprocess.fit("centre", train.chunks, train.shape)
    none = train.select(np.zeros(0, np.int64))
    return Examples(train, fitted), Examples(validation or none, fitted)


def _finish(
    options: SelectOptions,
    opened: Run,
    prepared: Prepared,
    train: Examples,
    validation: Examples,
) -> None:
    """Choose, judge the choice on the test images, which are read here, and save the set."""
    selection, random = select(options, opened, prepared, train, validation)
    distilled = assemble(options, opened, prepared, selection)
    distilled_set.save(opened.folder / distilled_set.FILE_NAME, distilled)
    hard = distilled.hard_labels
    sides = GridSide("random", random, hard), GridSide("selected", selection.images, hard)
    picture = opened.folder / "distilled.png"
    distil.draw(picture, sides, distilled.classes, distilled.preprocess)


def select(
    options: SelectOptions,
    opened: Run,
    prepared: Prepared,
    train: Examples,
    validation: Examples,
) -> tuple[Selection, Float[np.ndarray, "n h w c"]]:
    """Choose images and judge them, last on the test images, which are read here.

    Args:
        options: Options without open defaults.
        opened: The run.
        prepared: Its checked input.
        train, validation: Features of these images.

    Returns:
        The selection, and as many random images, in [0, 1].

    Raises:
        UserError: If something does not fit into memory.
        KeyboardInterrupt: If stopped by hand, after a checkpoint.
    """
    splits, count = prepared.splits, options.images_per_class
    classes = splits.train.classes
    assert count is not None
    probe = ridge.RidgeLearner(networks.parse("linear"), options.ridge)
    full = probe(train, validation, 0)
    selection = _choose(options, opened, prepared, train, validation, full)
    pixels = Examples(splits.train, preprocess.identity(splits.train.shape[2]))
    random = initial_support.draw_support(
        pixels, count, noise=False, corruption=0, seed=options.seed
    ).images
    space = FeatureSpace(prepared.network, train.preprocess)
    hard = np.repeat(np.arange(len(classes)), count)
    chosen, drawn = (
        space.examples(LabeledImages(images, hard, classes), "images of the set")
        for images in (selection.images, random)
    )
    predictors = {
        "": probe(chosen, validation, 0),
        "initial_": probe(drawn, validation, 0),
        "full_": full,
    }
    if len(validation):
        predictors["linear_probe_"] = LinearProbe()(chosen, validation, 0)
    figures = dict(selection.figures) | _accuracies(predictors, "validation", validation)
    if len(splits.test):
        test = space.examples(splits.test, "test images")
        figures |= _accuracies(predictors, "test", test)
    return replace(selection, figures=figures), random


def assemble(
    options: SelectOptions, opened: Run, prepared: Prepared, selection: Selection
) -> DistilledSet:
    """The set of a selection, with the record of how it was made.

    Args:
        options, opened, prepared: As for `select`.
        selection: What was chosen.
    """
    splits, images = prepared.splits, selection.images
    classes = splits.train.classes
    record = outcomes.describe_run(
        opened, splits, options.seed, selection.figures, selection.seconds, VERSIONS
    ) | {
        "kernel": f"linear on the features of {_short_name(options.features)}",
        "features": prepared.network.record(),
        "stopped": None,
    }
    hard = np.repeat(np.arange(len(classes)), len(images) // len(classes))
    labels = labeled_images.centred_one_hot(hard, len(classes))
    return DistilledSet(images, labels, preprocess.identity(images.shape[3]), classes, record)


def _short_name(features: str | None) -> str:
    """The name of a network, or of the folder of its run, whose path may differ on resume."""
    if features is None:
        return "a function"
    return Path(features).name if Path(features).is_dir() else features


def _accuracies(
    predictors: Mapping[str, Predict], part: str, examples: Examples
) -> dict[str, float]:
    """Accuracy of each predictor on held-out images, by its name; none where there are none."""
    if not len(examples):
        return {}
    return {
        f"{name}{part}_accuracy": held_out.accuracy(predict, examples, f"{part} images")
        for name, predict in predictors.items()
    }


def _choose(
    options: SelectOptions,
    opened: Run,
    prepared: Prepared,
    train: Examples,
    validation: Examples,
    full: Predict,
) -> Selection:
    """Choose images in the way that the options ask for.

    Args:
        options, opened, prepared: The run.
        train, validation: Features of these images.
        full: Ridge regression on all training features.
    """
    count = options.images_per_class
    assert count is not None
    if options.by == "crops":
        return _choose_crops(options, opened, prepared, train, validation, full)
    if options.by == "centre":
        herded = controls.herding(train, count)
        assert herded.data.rows is not None, "herding selects"
        return Selection(_pixels(prepared, herded.data.rows), {}, 0.0)
    assert options.sweeps is not None
    problem = ridge_selection.pose(train, options.ridge)
    choice, seconds = select_loop.choose_by_ridge(opened, problem, count, options.sweeps)
    figures = {"passes": choice.passes, "training_loss": choice.loss}
    return Selection(_pixels(prepared, choice.rows.T.ravel()), figures, seconds)


def _pixels(prepared: Prepared, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n h w c"]:
    return preprocess.unit_range(prepared.splits.train.images(rows))


def _choose_crops(
    options: SelectOptions,
    opened: Run,
    prepared: Prepared,
    train: Examples,
    validation: Examples,
    full: Predict,
) -> Selection:
    """Choose crops by their cross-entropy, and join each four."""
    from kd.evaluation import crops

    splits, rows, count = prepared.splits, prepared.candidates, options.images_per_class
    assert rows is not None
    assert count is not None
    assert options.crops is not None
    network = prepared.network
    assert isinstance(network, TorchNetwork)
    head = crops.own_head(network.backbone, splits.train.classes)
    judge = "its own classifier" if head else "a probe on the features of the training images"
    progress.say(f"crops are scored by {_short_name(options.features)}, with {judge}")
    calibration = validation if len(validation) else train
    temperature = 1.0
    if head is None:
        scores = held_out.predict_scores(full, calibration)
        temperature = metrics.fit_temperature(scores, calibration.data.labels)
    batches = crops.plan(rows, options.crops, BATCH)
    source = crops.PaddedCrops(splits.train, network.backbone, network.device)

    def score(first: int) -> Iterator[Float[np.ndarray, " n"]]:
        left = batches[first:]
        outputs = crops.outputs(source, head, left, options.seed)
        for batch, answer in zip(left, outputs, strict=True):
            logits = np.asarray(answer, np.float64)
            if head is None:
                features = train.preprocess.apply(answer.reshape(len(answer), 1, 1, -1))
                logits = full(features) / temperature
            yield crop_selection.cross_entropy(logits, splits.train.labels[batch.rows])

    sizes = [len(batch.rows) for batch in batches]
    losses, seconds = select_loop.score_crops(opened, sizes, score)
    by_crop = losses.reshape(options.crops, len(rows))
    images, numbers = crop_selection.choose(by_crop, splits.train.labels[rows], count)
    height, width, _ = splits.train.shape
    tiles = crops.cut(
        splits.train, rows[images], numbers + 1, (height // 2, width // 2), options.seed
    )
    figures = {
        "mean_loss": float(losses.mean()),
        "chosen_loss": float(by_crop[numbers, images].mean()),
    }
    return Selection(crop_selection.compose(tiles), figures, seconds)


def _config(options: SelectOptions) -> dict[str, Any]:
    """Options as `config.json` stores them, with absolute paths."""
    return {run_folder.COMMAND_KEY: METHOD} | STORAGE.to_json(options)


def _reopen(options: SelectOptions) -> tuple[Run, SelectOptions]:
    """Open the run to resume, with the options that it was started with."""
    assert options.out is not None
    opened = run_folder.start(
        options.out,
        _config(options),
        result=distilled_set.FILE_NAME,
        resume=True,
        defaults=_config(SelectOptions()) | {run_folder.COMMAND_KEY: None},
        free=STORAGE.free,
    )
    try:
        restored = STORAGE.from_json(options, opened.folder, opened.config)
        distil.require_typed_code(opened.folder, options, restored, _code_options(restored))
        return opened, restored
    except BaseException:
        opened.close()
        raise


def _code_options(options: SelectOptions) -> list[str]:
    """Names of the options that name code which is imported."""
    return ["features"] if through_backbone.is_code(options.features) else []


def _explain_stop(options: SelectOptions, folder: Path) -> contextlib.AbstractContextManager[None]:
    typed = {name: getattr(options, name) for name in _code_options(options)}
    typed["trust_module"] = options.trust_module
    command = shell.resume_line(f"dsdistill {METHOD}", folder, **typed)
    return stopping.explain_stop(command, folder / distilled_set.FILE_NAME)
