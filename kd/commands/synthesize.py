"""`kd synthesize`: images that a trained student's weights alone give, as a set to train on.

No file but those of the run is read. The folder that is written:

config.json              the options
checkpoint.safetensors   the last state, for --resume
distilled.safetensors    the set, in the format of a distilled set
images.png               images of each class
"""

import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsdistill.harness import memory, shell, stopping
from dsdistill.harness.data import distilled_set
from dsdistill.harness.data.distilled_set import FILE_NAME, DistilledSet
from dsdistill.harness.data.provenance import FROM_WEIGHTS
from dsdistill.harness.errors import UserError, one_line
from dsdistill.harness.reports import image_grid
from dsdistill.harness.reports.image_grid import GridSide
from dsdistill.harness.runs import progress, run_folder
from dsdistill.harness.runs.options import Storage
from dsdistill.harness.runs.run_folder import Run
from kd.data import teacher_cache
from kd.evaluation import answer_balance
from kd.models import network_names, saved_models
from kd.models.saved_models import Model
from kd.objectives import adversary
from kd.options import SynthesizeOptions
from kd.parallel import engine
from kd.synthesis import making, settings
from kd.synthesis.making import Judgement, Synthesis
from kd.synthesis.plausibility import KnownNetwork
from kd.synthesis.settings import SynthesisSettings

COMMAND = "synthesize"  # in config.json
PICTURE = "images.png"
SECONDS_BETWEEN_SAVES = 10.0
VERSIONED_PACKAGES = ("dsdistill", "torch", "numpy")
STORAGE = Storage(unstored=("out", "resume"), free=("device", "trust_module"))


def synthesize(options: SynthesizeOptions) -> dict[str, Any]:
    """Make images from a run, and write them as a set.

    Args:
        options: Options that passed `SynthesizeOptions.check`.

    Returns:
        Figures to print.

    Raises:
        UserError: If there is no such run, its network gives no images, or the folder is taken.
        KeyboardInterrupt: If stopped, after a checkpoint.
    """
    if options.resume:
        assert options.out is not None
        options = _restore(options.out, options)
    out = options.out or run_folder.next_free(f"kd-{options.source.resolve().name}-images")
    if not options.resume:
        run_folder.check_free(out, FILE_NAME)
    on = engine.make(options.device)
    model = _load(options)
    known = _known_network(model, on.device)
    who = f"{options.run} ({model.name})"
    chosen = settings.fit(
        options.settings, who=who, classes=known.classes, has_batch_norm=known.has_batch_norm
    )
    if not chosen.bn_weight:
        progress.say(
            f"note: {who} is asked without the statistics of batch norm layers: its images may be "
            "confident and mean nothing"
        )
    run = run_folder.start(
        out,
        _config(options),
        result=FILE_NAME,
        resume=options.resume,
        defaults=_config(SynthesizeOptions()) | {run_folder.COMMAND_KEY: None},
        free=STORAGE.free,
    )
    code = ",".join(network_names.names_in(options.trust_module)) or None
    line = shell.resume_line("kd synthesize", out, trust_module=code)
    with run, stopping.explain_stop(line, out / FILE_NAME), run.clean_up_on_error():
        run.require_same(teacher_cache.input_hashes("the network", model.classifier))
        synthesis = making.begin(known, chosen, options.seed, on.device)
        seconds = _run(synthesis, run)
        images = synthesis.images()
        judgement = making.judge(known, images, chosen, on.device)
        figures = _figures(judgement, model.classes)
        record = _provenance(options, run, model, chosen, figures, seconds)
        made = _as_set(images, judgement, model, record)
        distilled_set.save(out / FILE_NAME, made)
        _draw(out / PICTURE, made, chosen)
    return {"folder": str(out), "images": len(made), **figures, "seconds": seconds}


def _restore(folder: Path, options: SynthesizeOptions) -> SynthesizeOptions:
    """The options that a synthesis was started with.

    Raises:
        UserError: If there is none to resume, or the options of this call contradict them.
    """
    config = run_folder.stored_options(
        folder,
        _config(options),
        result=FILE_NAME,
        defaults=_config(SynthesizeOptions()) | {run_folder.COMMAND_KEY: None},
        free=STORAGE.free,
    )
    restored = STORAGE.from_json(options, folder, config)
    restored.check()
    return restored


def _config(options: SynthesizeOptions) -> dict[str, Any]:
    return {run_folder.COMMAND_KEY: COMMAND} | STORAGE.to_json(options)


def _load(options: SynthesizeOptions) -> Model:
    """Load the student of the run.

    Raises:
        UserError: If there is none, or one from which no images are made.
    """
    folder = options.source
    if saved_models.is_text_run(folder):
        raise UserError(f"{folder} is a student of texts, and kd synthesize makes images")
    model = saved_models.load_run(folder, typed=network_names.names_in(options.trust_module))
    if model.mel is not None:
        raise UserError(f"{folder} is a student of recordings, and kd synthesize makes images")
    if not model.has_head:
        raise UserError(
            f"{folder} is a student without a head, and images are made for classes: give the run "
            "of a classifier"
        )
    if model.has_several_labels:
        raise UserError(
            f"{folder} learned any number of labels an image, and images are made for one class "
            "each: give the run of a classifier"
        )
    return model


def _known_network(model: Model, device: torch.device) -> KnownNetwork:
    """The run's network with what is known of its images."""
    network = model.classifier.to(device).eval().requires_grad_(False)
    bounds = None
    if model.preprocess.kind in adversary.PIXELWISE:
        bounds = adversary.bounds_after(model.preprocess, 1.0).to(device)
    return KnownNetwork(network, model.shape, len(model.classes), model.output_temperature, bounds)


def _run(synthesis: Synthesis, run: Run) -> float:
    """Take all steps, from the last checkpoint if there is one; return the seconds in all.

    Raises:
        UserError: If the loss is not finite.
        KeyboardInterrupt: If stopped, after a checkpoint.
    """
    start, spent = 0, 0.0
    if (saved := run.load_state()) is not None:
        arrays, meta = saved
        synthesis.restore(arrays)
        start, spent = meta["step"], meta["seconds"]
    began = time.monotonic()
    saved_at = began
    with stopping.watch() as flag, progress.bar(synthesis.total, start=start) as show:

        def after(done: int, loss: float) -> None:
            nonlocal saved_at
            show(done, loss=loss)
            now = time.monotonic()
            if flag.requested or now - saved_at > SECONDS_BETWEEN_SAVES:
                run.save_state(synthesis.pack(), {"step": done, "seconds": spent + now - began})
                saved_at = now
            flag.check()

        making.run(synthesis, after, start)
    return spent + time.monotonic() - began


def _figures(judgement: Judgement, classes: tuple[str, ...]) -> dict[str, Any]:
    """What the network makes of its images; says how evenly they cover the classes."""
    balance = answer_balance.measure(judgement.probabilities)
    for line in answer_balance.describe(balance, classes):
        progress.say(line)
    return {
        "mean_answer_entropy": balance.entropy,
        "mean_answer_entropy_share": balance.share,
        "confidence": judgement.confidence,
        "statistics_distance": judgement.statistics_distance,
    }


def _provenance(
    options: SynthesizeOptions,
    run: Run,
    model: Model,
    chosen: SynthesisSettings,
    figures: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Record how the set was made, JSON-compatible; it names no data, for none were read."""
    config = {k: v for k, v in run.config.items() if k != run_folder.INPUTS_KEY}
    return {
        "method": chosen.method,
        "made_from": FROM_WEIGHTS,
        "network": {"name": model.name, "sha256": run.config[run_folder.INPUTS_KEY]["the network"]},
        "config": config,
        "settings": asdict(chosen),
        "seed": options.seed,
        "metrics": {k: v for k, v in figures.items() if v is not None},
        "seconds": seconds,
        "peak_memory": memory.peak(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in VERSIONED_PACKAGES},
    }


def _as_set(
    images: torch.Tensor, judgement: Judgement, model: Model, record: Mapping[str, Any]
) -> DistilledSet:
    """The images as the network takes them, labelled with its probabilities."""
    k = len(model.classes)
    labels = judgement.probabilities - 1 / k  # in the encoding of a distilled set
    pixels = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
    return DistilledSet(pixels, labels.astype(np.float32), model.preprocess, model.classes, record)


def _draw(path: Path, made: DistilledSet, chosen: SynthesisSettings) -> None:
    """Draw images of each class; a failure is reported and does not end the command."""
    side = GridSide(chosen.method, made.images, made.hard_labels)
    try:
        image_grid.write(path, side, None, made.classes, made.preprocess)
    except Exception as error:  # a font, a name, a full disk
        reason = one_line(error, kind=True)
        progress.say(f"note: the set is saved, but {path} could not be drawn ({reason})")
