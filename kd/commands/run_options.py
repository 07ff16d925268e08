"""The options of a training as `config.json` holds them, and back."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from dsdistill.harness import checksums
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import run_folder
from kd.models import networks
from kd.models.seals import REPORT
from kd.models.zoo import class_names
from kd.options import Overrides, TrainOptions

HASH_KEY = "options"  # key, among the hashes of a run, of that of the options
MAY_DIFFER_ON_RESUME = (
    "data_root",
    "device",
    "workers",
    "cache",
    "min_teacher_accuracy",
)  # may differ on resume
_PER_CALL = ("out", "resume", "overrides")  # not options of the training
_PATHS = ("data", "student", "teacher", "data_root", "class_map", "cache")


def to_json(options: TrainOptions) -> dict[str, Any]:
    """The options of a training, with paths that stay right in another working directory."""
    config = {k: v for k, v in asdict(options).items() if k not in _PER_CALL}
    for name in _PATHS:
        value = config[name]
        if value is not None and value != "digits":
            parts = [str(value)]
            if name == "teacher":
                parts = networks.split_names(str(value))
            elif name == "class_map":
                parts = class_names.class_map_files(str(value))
            config[name] = ",".join(map(networks.absolute_name, parts))
    return config | asdict(options.overrides)


def restore(folder: Path, options: TrainOptions) -> TrainOptions:
    """The options that a run was started with.

    Args:
        folder: Of the run.
        options: Of this call: those that differ from the defaults must be the stored ones.

    Raises:
        UserError: If there is no run to resume, its options are damaged, or those of this call
            contradict them.
    """
    config = run_folder.stored_options(
        folder,
        to_json(options),
        result=REPORT,
        defaults=to_json(TrainOptions()),
        free=MAY_DIFFER_ON_RESUME,
    )
    hashes = config.get(run_folder.INPUTS_KEY, {})
    known = {k: v for k, v in config.items() if k in to_json(options)}
    try:
        for name in ("data_root", "cache"):
            known[name] = None if known.get(name) is None else Path(known[name])
        known = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
        # An earlier version lacks the options that are newer.
        overrides = {f.name: known.pop(f.name, None) for f in fields(options.overrides)}
        stored = replace(options, **known, overrides=Overrides(**overrides))
        if hashes.get(HASH_KEY, "") in ("", digest(stored)):
            return stored
    except TypeError:  # a path that is a number, say
        pass
    raise UserError(
        f"{folder / 'config.json'} is damaged: its options do not match their checksum; put back "
        "what they were, or start anew in another --out"
    )


def digest(options: TrainOptions) -> str:
    """SHA-256 of the options that a run must keep, as far as they are not the defaults.

    So that a later version with more options finds the same.
    """
    config, defaults = to_json(options), to_json(TrainOptions())
    kept = {k: v for k, v in config.items() if k not in MAY_DIFFER_ON_RESUME and v != defaults[k]}
    return checksums.json_digest(kept)


def require_same(link: TrainOptions, stored: dict[str, Any]) -> None:
    """Refuse a finished training that is not the link of this chain.

    Args:
        link: The options that it should have.
        stored: Those that it was trained with, as `to_json` gave them.

    Raises:
        UserError: If one differs.
    """
    for name, value in to_json(link).items():
        if name not in MAY_DIFFER_ON_RESUME and stored.get(name) != json.loads(json.dumps(value)):
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{link.out} holds a training with {option} {stored.get(name)}, and this one has "
                f"{value}: choose another --out"
            )
