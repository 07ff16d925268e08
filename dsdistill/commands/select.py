"""Run one selection: real images, or crops of them, chosen in the feature space of a backbone.

load -> features of training and validation images -> choose -> read the test set once -> save

The backbone is a torch network of `kd`; only arrays cross.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from dsdistill.commands import distil, feature_space, outcomes, select_images, through_backbone
from dsdistill.commands.feature_space import Network
from dsdistill.commands.select_images import Prepared, Selection
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
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import held_out
from dsdistill.harness.evaluation.held_out import Predict
from dsdistill.harness.reports.image_grid import GridSide
from dsdistill.harness.runs import run_folder
from dsdistill.harness.runs.options import Storage
from dsdistill.harness.runs.run_folder import Run
from dsdistill.kernels import networks
from dsdistill.methods import initial_support, ridge
from dsdistill.methods.linear_probe import LinearProbe
from dsdistill.options import SelectOptions

METHOD = "select"
VERSIONS = (*outcomes.VERSIONS, "torch", "timm")


STORAGE = Storage(
    unstored=("out", "resume", "trust_module"),
    free=("data_root",),
    absolute={"data": datasets.absolute_name, "features": through_backbone.absolute_name},
)


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
            return _select_and_finish(options, opened, select_images.load(options))
    options = select_images.with_defaults(options)
    folder = options.out or run_folder.next_free(f"{METHOD}-{Path(options.data).stem}")
    run_folder.check_free(folder, distilled_set.FILE_NAME)
    with stopping.explain_stop():
        # Before the folder exists: a wrong option leaves none behind.
        prepared = select_images.load(options)
    with (
        run_folder.start(folder, _config(options), result=distilled_set.FILE_NAME) as opened,
        _explain_stop(options, folder),
    ):
        return _select_and_finish(options, opened, prepared)


def select_arrays(
    options: SelectOptions, splits: Splits, own: Callable[..., Any] | None
) -> DistilledSet:
    """Choose among images that are at hand; nothing is written.

    Args:
        options: Options without open defaults.
        splits: The data; the test part may be empty.
        own: A caller's own module, held by `through_backbone.frozen`, or function of arrays, in
            place of the network that the options name.

    Raises:
        UserError: If a rule is broken.
    """
    if own is None:
        prepared = select_images.prepare_arrays(options, splits)
    else:
        assert options.images_per_class is not None
        labeled_images.check_images_per_class(splits.train, options.images_per_class)
        network = Network(own)
        if through_backbone.is_module(own):
            encoder = through_backbone.load_own(own, splits.train.shape, differentiable=False)
            network = Network(encoder, encoder)
        prepared = Prepared(splits, network)
    train = feature_space.extract(prepared.network, splits.train, "training images")
    judged = splits.validation
    validation = (
        feature_space.extract(prepared.network, judged, "validation images")
        if len(judged)
        else None
    )
    elsewhere = ("data", *STORAGE.free, "image_size", "channels")  # no part of a call from Python
    config = {name: value for name, value in _config(options).items() if name not in elsewhere}
    opened = run_folder.in_memory(config)
    opened.require_same(prepared.digests())
    selection, _ = select(options, opened, prepared, *feature_space.normalise(train, validation))
    return assemble(options, opened, prepared, selection)


def _select_and_finish(options: SelectOptions, opened: Run, prepared: Prepared) -> Path:
    with opened.clean_up_on_error():
        opened.require_same(prepared.digests())
        with through_backbone.features_file(opened) as file:
            assert file is not None, "a command writes"
            train, validation = _features(prepared, opened.config, file)
            _finish(options, opened, prepared, train, validation)
        return opened.folder


def _features(
    prepared: Prepared, config: Mapping[str, Any], file: Path
) -> tuple[Examples, Examples]:
    """Features of the training and of the validation images, mapped from the run's folder."""
    from kd.evaluation import extraction, image_sets

    splits, encoder = prepared.splits, prepared.network.encoder
    assert encoder is not None, "a caller's own function writes no files"
    digest = hashlib.sha256(json.dumps(config[run_folder.INPUTS_KEY]).encode()).hexdigest()
    parts = [splits.train, splits.validation]
    what = extraction.Extraction(
        image_sets.of_parts(splits.name, parts, digest),
        encoder.backbone,
        encoder.device,
        str(config["data"]),
        batch_size=feature_file.BATCH,
    )
    written = extraction.write_in_run(file, what)
    train = written.part("train")
    assert train is not None, "no class is without training images"
    return feature_space.normalise(train, written.part("validation"))


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
    selection = select_images.choose(options, opened, prepared, train, validation, full)
    pixels = Examples(splits.train, preprocess.identity(splits.train.shape[2]))
    random = initial_support.draw_support(
        pixels, count, noise=False, corruption=0, seed=options.seed
    ).images

    def seen(images: LabeledImages, unit: str) -> Examples:
        return Examples(feature_space.extract(prepared.network, images, unit), train.preprocess)

    hard = np.repeat(np.arange(len(classes)), count)
    chosen, drawn = (
        seen(LabeledImages(images, hard, classes), "images of the set")
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
        test = seen(splits.test, "test images")
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
        "kernel": f"linear on the features of {through_backbone.short_name(options.features)}",
        "backbone": prepared.network.record(),
        "evaluation_ridge": options.ridge,
        "stopped": None,
    }
    hard = np.repeat(np.arange(len(classes)), len(images) // len(classes))
    labels = labeled_images.centred_one_hot(hard, len(classes))
    return DistilledSet(images, labels, preprocess.identity(images.shape[3]), classes, record)


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
