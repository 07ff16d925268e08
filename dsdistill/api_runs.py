"""A call from Python as a run: in memory, or in the folder of its checkpoint."""

import os
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from dsdistill.api_data import DATA_NAME
from dsdistill.commands import outcomes, through_backbone
from dsdistill.commands.outcomes import Outcome
from dsdistill.commands.prepare import Prepared
from dsdistill.distilled import Distilled, as_network, load
from dsdistill.harness.data import distilled_set
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import run_folder
from dsdistill.harness.runs.options import Storage
from dsdistill.harness.runs.run_folder import Run
from dsdistill.options import EARLIER, KipOptions, RunOptions, with_defaults
from dsdistill.parallel import hosts

# Options about files and hosts are the commands' alone.
_FILE_OPTIONS = ("data", "data_root", "image_size", "channels", "out", "resume", "hosts")
# What runs of earlier versions did, which had no such argument.
_EARLIER = EARLIER | {"features": None}


def complete_options(kind: type[Any], given: Mapping[str, Any]) -> Any:
    """The options of a command from the arguments of the same names."""
    names = {field.name for field in fields(kind)} - set(_FILE_OPTIONS)
    network = as_network(given["kernel"])
    if network is not None:
        for name in ("depth", "w_std", "b_std"):
            if given[name] != getattr(kind, name):
                raise UserError(f"{name} has no effect on a network of your own: leave it out")
    kernel = given["kernel"] if network is None else network.name
    values = {name: given[name] for name in names} | {"kernel": kernel, "data": DATA_NAME}
    return with_defaults(kind(**values))


def distil(
    method: str,
    options: RunOptions,
    prepared: Prepared,
    search: Callable[[Run], Outcome],
    checkpoint: str | os.PathLike[str] | None,
) -> Distilled:
    """Run a method, in the folder of a checkpoint if there is one, and assemble its set."""
    options = replace(options, images_per_class=prepared.images_per_class)
    config = {run_folder.COMMAND_KEY: method} | _storage(options).to_json(options)
    # The kernel of features sees no pixels.
    network = prepared.network if prepared.encoder is None else None
    folder = None if checkpoint is None else Path(checkpoint)
    result = None if folder is None else folder / distilled_set.FILE_NAME
    if result is not None and result.exists():
        return replace(_finished(result, config, prepared), network=network)
    with (
        _open_run(folder, config, prepared.chosen) as run,
        run.clean_up_on_error(),
        through_backbone.features_file(run),
    ):
        run.require_same(prepared.digests())
        outcome = search(run)
        record = outcomes.provenance(options, run, prepared, outcome, {})
        classes, fitted = prepared.splits.train.classes, prepared.train.preprocess
        distilled = Distilled(
            outcome.images, outcome.labels, fitted, classes, record, network=network
        )
        if result is not None and run.writes:
            distilled.save(result)
        return distilled


def stored_choices(checkpoint: str | os.PathLike[str] | None) -> Mapping[str, Any] | None:
    """What the run of a checkpoint's folder has chosen; None if a call begins a new run."""
    return None if checkpoint is None else run_folder.stored_choices(Path(checkpoint))


def _storage(options: RunOptions) -> Storage:
    """How a call's options are stored: without those of a backbone where there is none."""
    through = isinstance(options, KipOptions) and options.features is not None
    unused = ("trust_module",) if through else through_backbone.OPTIONS
    absolute = {"features": through_backbone.absolute_name}
    return Storage(unstored=(*_FILE_OPTIONS, *unused), free=(), absolute=absolute)


def _open_run(folder: Path | None, config: Mapping[str, Any], chosen: Mapping[str, Any]) -> Run:
    """The run of a folder, new or to be continued; one without a folder writes nothing."""
    new = run_folder.with_choices(config, chosen)
    if folder is None:
        return run_folder.in_memory(new)
    resume = (folder / "config.json").exists()
    config = config if resume else new
    return hosts.open_run(
        lambda: run_folder.start(
            folder, config, result=distilled_set.FILE_NAME, resume=resume, earlier=_EARLIER
        )
    )


def _finished(file: Path, config: Mapping[str, Any], prepared: Prepared) -> Distilled:
    """The set of a finished run, if it was made from the same data with the same arguments."""
    distilled = load(file)
    stored = distilled.provenance.get("config")
    stored = stored if isinstance(stored, Mapping) else {}
    stored = {k: v for k, v in stored.items() if k != run_folder.CHOSEN_KEY}
    stored = run_folder.complete(stored, config, _EARLIER)
    if stored != run_folder.in_memory(config).config or (
        distilled.provenance.get("inputs") != prepared.digests()
    ):
        raise UserError(
            f"{file} is the result of other data or arguments: choose another checkpoint"
        )
    return distilled
