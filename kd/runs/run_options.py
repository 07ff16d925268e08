"""The options of a training in `config.json`: restored for `--resume`, compared along a chain."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from dsdistill.harness import checksums, files, shell
from dsdistill.harness.data import datasets
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import run_folder
from dsdistill.harness.runs.options import Storage
from kd.data import class_weights
from kd.data.public_images import OF_TEST_PART
from kd.models import network_names, networks
from kd.models.language import text_students
from kd.models.seals import REPORT
from kd.models.zoo import class_names
from kd.options import TrainOptions
from kd.runs import continuation

HASH_KEY = "options"  # key of the options' hash among the hashes of a run


def _absolute_data(data: str) -> str:
    return data if data in datasets.NAMES else network_names.absolute_name(data)


def _absolute_public(public: str) -> str:
    return public if public.startswith(OF_TEST_PART) else _absolute_data(public)


def _absolute_teachers(teachers: str) -> str:
    return ",".join(map(network_names.absolute_name, network_names.split_names(teachers)))


def _absolute_class_maps(files: str) -> str:
    return ",".join(map(network_names.absolute_name, class_names.class_map_files(files)))


def _absolute_class_weights(text: str) -> str:
    is_balanced = text == class_weights.BALANCED and not Path(text).exists()
    return text if is_balanced else network_names.absolute_name(text)


def _absolute_tokenizer(tokenizer: str) -> str:
    made = tokenizer in (text_students.WORDS, text_students.CHARACTERS)
    return tokenizer if made else network_names.absolute_name(tokenizer)


STORAGE = Storage(
    unstored=("out", "resume"),
    free=("data_root", "device", "workers", "cache", "min_teacher_accuracy", "trust_module"),
    absolute={
        "data": _absolute_data,
        "public": _absolute_public,
        "transfer": _absolute_data,
        "student": network_names.absolute_name,
        "teacher": _absolute_teachers,
        "data_root": network_names.absolute_name,
        "class_map": _absolute_class_maps,
        "class_weights": _absolute_class_weights,
        "cache": network_names.absolute_name,
        "tokenizer": _absolute_tokenizer,
        "mlm": network_names.absolute_name,
    },
)


def restore(folder: Path, options: TrainOptions) -> TrainOptions:
    """Restore the options that a run was started with.

    Args:
        folder: Folder of the run.
        options: Options of this call; those that differ from the defaults must equal the stored
            ones, except for `continuation.LENGTHS`, which replace them.

    Raises:
        UserError: If there is no run to resume, its options are damaged, those of this call
            contradict them, or they name code that this call does not name.
    """
    lengths = {k: v for k, v in options.given.items() if k in continuation.LENGTHS}
    plain = replace(
        options, overrides=replace(options.overrides, **dict.fromkeys(continuation.LENGTHS))
    )
    begun = continuation.is_begun(folder)
    stored = _restore(continuation.work_folder(folder) if begun else folder, plain, begun)
    typed = [*_network_names(options), *network_names.names_in(options.trust_module)]
    for name in _network_names(stored):
        networks.require_typed(str(folder / "config.json"), name, typed)
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
        STORAGE.to_json(options),
        result=REPORT if unfinished else None,
        defaults=STORAGE.to_json(TrainOptions()),
        free=STORAGE.free,
    )
    known = STORAGE.to_json(options).keys()  # an earlier version had others
    stored = STORAGE.from_json(options, folder, {k: v for k, v in config.items() if k in known})
    cache = files.read_json(folder / "config.json", UserError).get("cache")
    if options.cache is None and isinstance(cache, str):
        # Elsewhere if the user says so; without it the answers would be others in their last bits,
        # and with --cache-top other answers.
        stored = replace(stored, cache=Path(cache))
    if config.get(run_folder.INPUTS_KEY, {}).get(HASH_KEY, "") in ("", digest(stored)):
        return stored
    raise UserError(
        f"{folder / 'config.json'} is damaged: its options do not match their checksum; "
        "restore the file, or start anew in another --out"
    )


def resume_line(folder: Path, options: TrainOptions) -> str:
    """The command that continues a training, which names the code that it imports once more."""
    names = [name for name in _network_names(options) if networks.is_user_module(name)]
    code = [network_names.parse(name).text for name in names]
    code += network_names.names_in(options.trust_module)
    return shell.resume_line("kd train", folder, trust_module=",".join(dict.fromkeys(code)) or None)


def _network_names(options: TrainOptions) -> list[str]:
    lists = options.student, options.teacher, options.peers, options.assistants
    return [name for name in network_names.names_in(*lists) if not Path(name).is_dir()]


def digest(options: TrainOptions) -> str:
    """SHA-256 of the options that a run must keep and that differ from the defaults.

    Defaults are left out so that a later version with more options computes the same hash.
    """
    config, defaults = STORAGE.to_json(options), STORAGE.to_json(TrainOptions())
    kept = {k: v for k, v in config.items() if k not in STORAGE.free and v != defaults[k]}
    return checksums.json_digest(kept)


def require_same(link: TrainOptions, stored: dict[str, Any]) -> None:
    """Refuse a finished training that does not belong to this chain.

    Args:
        link: Options that the training should have.
        stored: Options that it was trained with, as in `config.json`.

    Raises:
        UserError: If an option differs.
    """
    for name, value in STORAGE.to_json(link).items():
        if name not in STORAGE.free and stored.get(name) != value:
            raise UserError(
                f"{link.out} holds a training with {shell.flag(name)} {stored.get(name)}, and this "
                f"one has {value}: choose another --out"
            )
