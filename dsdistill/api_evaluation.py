"""Evaluation from Python: what learners reach on a distilled set of a caller's arrays."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from dsdistill.api_data import Pair, as_splits, call
from dsdistill.commands import evaluate as evaluation
from dsdistill.commands import evaluation_parts
from dsdistill.distilled import Distilled
from dsdistill.harness.data import origin
from dsdistill.harness.data.datasets import Splits
from dsdistill.harness.data.distilled_set import DistilledSet
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import controls as control_sets
from dsdistill.harness.evaluation.protocol import Learner
from dsdistill.harness.evaluation.result_cache import ResultCache
from dsdistill.harness.reports import report as reports
from dsdistill.harness.reports.report import Report
from dsdistill.harness.reports.write import write_report
from dsdistill.harness.runs import progress as progress_display
from dsdistill.kernels import notation
from dsdistill.methods import stored_kernel
from dsdistill.options import EvaluateOptions


def evaluate(
    distilled: DistilledSet,
    *,
    train: Pair,
    test: Pair,
    validation: Pair | None = None,
    also: Mapping[str, DistilledSet] | None = None,
    learners: Sequence[str | Learner] = ("ridge", "convnet"),
    controls: Sequence[str] = tuple(EvaluateOptions.controls.split(",")),
    seeds: int = EvaluateOptions.seeds,
    steps: int | None = None,
    augment: Literal["none", "crop", "crop-flip"] = "none",
    teacher: Callable[[np.ndarray], np.ndarray] | None = None,
    trust_module: str | None = None,
    device: str = EvaluateOptions.device,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Report:
    """Measure what learners reach on a distilled set, and on controls of the same size.

    Each learner is trained the same way on the set, on random images, coresets and all training
    images. Validation images choose learning rates; the test images are read once per training.

    Args:
        distilled: The set.
        train: Images and labels that the set was distilled from.
        test: Images and labels that neither the set nor any learner has seen.
        validation: Images and labels held out of the training. By default the share of the training
            images that was held out when the set was made, or a tenth.
        also: Further sets of the same data by their names in the report, to be compared with the
            first one; their images are brought to its preprocessing.
        learners: `ridge` (with the set's own kernel), `ridge:KERNEL`, `linear-probe`, `convnet:32`,
            `mlp`, `resnet18`, `kip-fc`, `centred:NAME` and any student of `kd train`;
            `linear-probe@BACKBONE` and `ridge:KERNEL@BACKBONE`, on the features of a run of `kd
            train` or a network with published weights; or any `Learner`.
        controls: Of `random`, `k-means`, `herding`, `full`, `random-soft` (with `teacher`) and
            `random-solved`; empty for none.
        seeds: Trainings of each learner on each set of images.
        steps: Steps of every training of a network.
        augment: Train networks also with these random changes of the images.
        teacher: Function from preprocessed (m, h, w, c) images to (m, k) logits, whose labels of
            the distilled images are a further arm.
        trust_module: Code that the run of a backbone may name as its network, as
            `module:attribute`.
        device: `cpu`, `cuda` or `cuda:N`, for networks.
        out: Folder of the report page, its plots and figures; a stopped call goes on in it.
        progress: Whether to show progress on standard error.

    Returns:
        The report: `rows` with the accuracy of each learner on each kind of data, `scores`,
            `notes`, and all single `results`.

    Raises:
        UserError: If an argument breaks a rule, before anything is trained; a ValueError of one
            line.
    """
    folder = None if out is None else Path(out)
    with call(progress):
        options = EvaluateOptions(
            Path("the distilled set"),
            controls=",".join(controls),
            seeds=seeds,
            steps=steps,
            augment=augment,
            trust_module=trust_module,
            device=device,
        )
        names = evaluation_parts.parse_controls(options)
        if folder is not None and (folder / reports.FILE_NAME).exists():
            raise UserError(f"{folder} already holds a report: choose another out")
        fraction = origin.validation_fraction(distilled)
        splits = as_splits(*train, distilled.classes, validation, fraction, test)
        origin.check_same_data(Path("the set"), distilled, splits, "train")
        for name, other in (also or {}).items():
            if control_sets.is_reserved(name):
                raise UserError(f"also cannot name a set {name!r}, as other data of a report are")
            origin.check_same_data(Path(name), other, splits, "train")
        if validation is None:
            _note_seen_validation(distilled, len(train[1]))
        parsed = _learners(learners, distilled, splits, options)
        if not parsed:
            raise UserError("learners must name at least one")
        parts = evaluation_parts.combine(
            distilled,
            splits,
            parsed,
            names,
            teacher=teacher,
            augment=augment != "none",
            further=also or {},
        )
        began = time.monotonic()
        cache = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            cache = ResultCache(folder / "results", shared_arms=control_sets.CONTROLS)
        results = evaluation.run_trainings(parts, list(range(seeds)), cache)
        report = evaluation.build_report(parts, results, time.monotonic() - began)
        if folder is not None:
            evaluation.draw_images(folder, parts)
            write_report(folder, report)
        return report


def _learners(
    given: Sequence[str | Learner],
    distilled: DistilledSet,
    splits: Splits,
    options: EvaluateOptions,
) -> list[Learner]:
    """Learners by their names; `ridge` with the kernel that the set was just made with."""
    network = distilled.network if isinstance(distilled, Distilled) else None
    ready: dict[str, Learner] = {}
    if network is not None and notation.is_code(network.name):
        ready["ridge"] = stored_kernel.learner(distilled, network, remedy="")
    names = [each for each in given if isinstance(each, str) and each not in ready]
    made = evaluation_parts.make_learners(names, distilled, splits, options)
    ready |= zip(names, made, strict=True)
    return [ready[each] if isinstance(each, str) else each for each in given]


def _note_seen_validation(distilled: DistilledSet, count: int) -> None:
    """Say it where the validation images are among those that the set was made of.

    Args:
        distilled: The set.
        count: Number of training images, before any are held out.
    """
    data = distilled.provenance.get("data")
    if isinstance(data, Mapping) and data.get("train") == count:
        progress_display.say(
            "note: the set was made of all training images, including the validation images held "
            "out here: give others as validation"
        )
