"""Conversion of the options of a training to `config.json` and back."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from dsdistill.harness import checksums
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import run_folder
from kd.commands import continuation
from kd.models import networks
from kd.models.seals import REPORT
from kd.models.zoo import class_names
from kd.options import Overrides, TrainOptions

HASH_KEY = "options"  # key of the options' hash among the hashes of a run
MAY_DIFFER_ON_RESUME = ("data_root", "device", "workers", "cache", "min_teacher_accuracy")
_PER_CALL = ("out", "resume", "overrides")  # fields that are not stored
_PATHS = ("data", "student", "teacher", "data_root", "class_map", "cache")


def to_json(options: TrainOptions) -> dict[str, Any]:
    """Convert options to JSON, with absolute paths, which hold in any working directory."""
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
    """Restore the options that a run was started with.

    Args:
        folder: Folder of the run.
        options: Options of this call; those that differ from the defaults must equal the stored
            ones, except for `continuation.LENGTHS`, which replace them.

    Raises:
        UserError: If there is no run to resume, its options are damaged, or those of this call
            contradict them.
    """
    lengths = {k: v for k, v in options.given.items() if k in continuation.LENGTHS}
    plain = replace(
        options, overrides=replace(options.overrides, **dict.fromkeys(continuation.LENGTHS))
    )
    begun = continuation.is_begun(folder)
    stored = _restore(continuation.work_folder(folder) if begun else folder, plain, begun)
    changed = {k: v for k, v in lengths.items() if getattr(stored.overrides, k) != v}
    if not begun and not changed:
        raise UserError(
            f"{folder} holds a finished run: there is nothing to resume; a larger --epochs or "
            "--steps trains it further"
        )
    if changed and (stored.generations or stored.assistants):
        raise UserError(
            f"{folder} is the last of a chain of trainings, whose length cannot be changed: leave "
            f"--{min(changed)} out"
        )
    for name, other in (("epochs", "steps"), ("steps", "epochs")):
        if name in changed:
            changed.setdefault(other, None)
    return replace(stored, overrides=replace(stored.overrides, **changed))


def _restore(folder: Path, options: TrainOptions, unfinished: bool) -> TrainOptions:
    config = run_folder.stored_options(
        folder,
        to_json(options),
        result=REPORT if unfinished else None,
        defaults=to_json(TrainOptions()),
        free=MAY_DIFFER_ON_RESUME,
    )
    hashes = config.get(run_folder.INPUTS_KEY, {})
    known = {k: v for k, v in config.items() if k in to_json(options)}
    try:
        for name in ("data_root", "cache"):
            known[name] = None if known.get(name) is None else Path(known[name])
        known = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
        # A run of an earlier version lacks newer options.
        overrides = {f.name: known.pop(f.name, None) for f in fields(options.overrides)}
        stored = replace(options, **known, overrides=Overrides(**overrides))
        if hashes.get(HASH_KEY, "") in ("", digest(stored)):
            return stored
    except TypeError:  # a value of the wrong type, such as a number for a path
        pass
    raise UserError(
        f"{folder / 'config.json'} is damaged: its options do not match their checksum; "
        "restore the file, or start anew in another --out"
    )


def digest(options: TrainOptions) -> str:
    """SHA-256 of the options that a run must keep and that differ from the defaults.

    Defaults are left out so that a later version with more options computes the same hash.
    """
    config, defaults = to_json(options), to_json(TrainOptions())
    kept = {k: v for k, v in config.items() if k not in MAY_DIFFER_ON_RESUME and v != defaults[k]}
    return checksums.json_digest(kept)


def require_same(link: TrainOptions, stored: dict[str, Any]) -> None:
    """Refuse a finished training that does not belong to this chain.

    Args:
        link: Options that the training should have.
        stored: Options that it was trained with, as from `to_json`.

    Raises:
        UserError: If an option differs.
    """
    for name, value in to_json(link).items():
        if name not in MAY_DIFFER_ON_RESUME and stored.get(name) != json.loads(json.dumps(value)):
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{link.out} holds a training with {option} {stored.get(name)}, and this one has "
                f"{value}: choose another --out"
            )
