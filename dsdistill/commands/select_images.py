"""Choose images for `select`: the options checked, the data and the network loaded, the ways.

All rules on the input are checked here, so that a wrong command line leaves no folder behind.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dsdistill.commands import feature_space, option_ranges, prepare, through_backbone
from dsdistill.harness import shell
from dsdistill.harness.data import datasets, feature_file, labeled_images, preprocess
from dsdistill.harness.data.datasets import Splits
from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import controls, held_out, metrics
from dsdistill.harness.evaluation.held_out import Predict
from dsdistill.harness.runs import progress
from dsdistill.harness.runs.run_folder import Run
from dsdistill.loops import select_loop
from dsdistill.methods import crop_selection, ridge_selection
from dsdistill.options import SelectOptions

DEFAULTS = {"images_per_class": prepare.DEFAULT_IMAGES_PER_CLASS}
# Options of one way to choose, with their defaults.
OF_WAY: Mapping[str, Mapping[str, Any]] = {
    "ridge": {"sweeps": 5},
    "centre": {},
    "crops": {"crops": crop_selection.PUBLISHED_CROPS, "candidates": None},
}


@dataclass(frozen=True, eq=False)
class Prepared:
    """Checked input of a selection.

    Attributes:
        splits: The data.
        network: The network that sees the images.
        candidates: Positions of the training images whose crops are scored, for `--by crops`.
    """

    splits: Splits
    network: feature_space.Network
    candidates: Int[np.ndarray, " n"] | None = None

    def digests(self) -> dict[str, str]:
        """SHA-256 of all that the run depends on, for `Run.require_same`."""
        record = self.network.record()
        layers = feature_file.layer_hash("the network of --features", record)
        apart = (feature_file.LAYERS, feature_file.PACKAGES)  # earlier versions hashed all others
        known = {name: value for name, value in record.items() if name not in apart}
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
        return self.splits.digests() | {"network of --features": digest} | layers


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
    option_ranges.require_at_least(options, least)
    option_ranges.require_positive(options, "ridge")


def load(options: SelectOptions) -> Prepared:
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
    feature_file.refuse(options.data)
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
    from kd.evaluation import encoder

    assert options.features is not None
    assert options.images_per_class is not None
    labeled_images.check_images_per_class(splits.train, options.images_per_class)
    candidates = _candidates(options, splits) if options.by == "crops" else None
    loaded = encoder.load(
        options.features,
        options.layer,
        splits.train.shape,
        device=options.device,
        typed=[options.features],
        trust_module=options.trust_module,
    )
    return Prepared(splits, feature_space.Network(loaded, loaded), candidates)


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


def choose(
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

    Raises:
        UserError: If something does not fit into memory.
        KeyboardInterrupt: If stopped by hand, after a checkpoint.
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
    encoder = prepared.network.encoder
    assert encoder is not None, "crops are scored by a network of kd"
    head = crops.own_head(encoder.backbone, splits.train.classes)
    judge = "its own classifier" if head else "a probe on the features of the training images"
    progress.say(
        f"crops are scored by {through_backbone.short_name(options.features)}, with {judge}"
    )
    calibration = validation if len(validation) else train
    temperature = 1.0
    if head is None:
        scores = held_out.predict_scores(full, calibration)
        temperature = metrics.fit_temperature(scores, calibration.data.labels)
    batches = crops.plan(rows, options.crops, feature_file.BATCH)
    source = crops.PaddedCrops(splits.train, encoder.backbone, encoder.device)

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
