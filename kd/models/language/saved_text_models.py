"""A student of texts on disk: weights, tokenizer, and what else is needed to use it.

A run's folder holds the network's weights (`student.safetensors`), the files of the tokenizer
(`tokenizer/`) and `model.json`, which holds the checksums of all of them.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsdistill.harness import files
from dsdistill.harness.errors import UserError, one_line
from dsdistill.harness.reports import schema
from kd.models import networks, saved_models, seals
from kd.models.language import bilstm, tokenizer, transformer
from kd.models.language.language_model import LanguageModel
from kd.models.language.text_model import TextModel
from kd.models.saved_models import TEXT
from kd.models.seals import CARD, CHECKSUMS_KEY, WEIGHTS
from kd.models.zoo import allocation

TOKENIZER = "tokenizer"  # folder of its files
CARD_TYPES = {  # all entries of `model.json`; any other one means that the file is damaged
    "kind": str,
    "name": str,
    "task": str,
    "classes": Sequence[str],
    "max_length": int,
    "pairs": bool,
    "config": Mapping[str, Any],
    "parameters": int,
}


def save_run(folder: Path, model: TextModel, metadata: Mapping[str, str] | None = None) -> None:
    """Write weights, tokenizer and `model.json` of a trained student, each file atomically.

    Args:
        folder: The run's folder.
        model: The trained student.
        metadata: Entries for the header of the weights file.
    """
    header = None if metadata is None else dict(metadata)
    network = model.network.network
    files.write_bytes(folder / WEIGHTS, saved_models.pack_weights(network, header))
    names = _write_tokenizer(folder / TOKENIZER, model.tokenizer)
    seals.write(folder, CARD, card(model), (WEIGHTS, *(f"{TOKENIZER}/{name}" for name in names)))


def card(model: TextModel) -> dict[str, Any]:
    """The description of a model without its arrays, as `model.json` holds it."""
    return {
        "kind": TEXT,
        "name": model.name,
        "task": model.task,
        "classes": model.classes,
        "max_length": model.max_length,
        "pairs": model.pairs,
        "config": model.network.config,
        "parameters": networks.parameter_count(model.network.network),
    }


def load_run(folder: Path) -> TextModel:
    """Load a student that `save_run` wrote.

    Args:
        folder: The run's folder.

    Raises:
        UserError: If the folder holds no finished student of texts, a damaged one, or files of two
            runs.
    """
    description = _read_card(folder)
    try:
        return _build_model(folder, description)
    except UserError:
        raise  # already one line
    except Exception as error:  # a file without a checksum may hold anything
        why = one_line(error, kind=True)
        raise UserError(f"{folder / CARD} is not a whole model description ({why})") from error


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a student that `save_run` wrote.

    Raises:
        UserError: As for `load_run`.
    """
    _read_card(folder)
    return tokenizer.load(str(folder / TOKENIZER))


def read_length(folder: Path) -> int:
    """The largest number of tokens of a text of a student that `save_run` wrote.

    Raises:
        UserError: As for `load_run`.
    """
    return int(_read_card(folder)["max_length"])


def read_config(folder: Path) -> Mapping[str, Any]:
    """The configuration of the network of a student that `save_run` wrote.

    Raises:
        UserError: As for `load_run`.
    """
    return _read_card(folder)["config"]


def _read_card(folder: Path) -> dict[str, Any]:
    """The description of a student, after all files that it seals were verified."""
    description = saved_models.read_card(folder, {*CARD_TYPES, CHECKSUMS_KEY}, TEXT)
    names = [name for name in description.get(CHECKSUMS_KEY, ()) if name != CARD]
    seals.verify(folder, *names)
    there = {f"{TOKENIZER}/{name}" for name in _visible_files(folder / TOKENIZER)}
    if foreign := sorted(there - set(names)):
        raise UserError(f"{folder / foreign[0]} is no file of this run: remove it")
    return description


def _build_model(folder: Path, description: Mapping[str, Any]) -> TextModel:
    schema.check(CARD, description, CARD_TYPES)
    task, config = description["task"], description["config"]
    if task not in transformer.CLASSES:
        raise ValueError(f"task {task!r}")
    own = tokenizer.load(str(folder / TOKENIZER))
    with allocation.limited(description["name"]):
        model = _rebuild(config, task, own)
    saved_models.load_weights(model.network, folder / WEIGHTS)
    return TextModel(
        model,
        description["name"],
        task,
        tuple(description["classes"]),
        own,
        description["max_length"],
        description["pairs"],
    )


def _rebuild(config: Mapping[str, Any], task: str, own: Any) -> LanguageModel:
    if config["model_type"] == bilstm.MODEL_TYPE:
        return bilstm.rebuild(config)
    return transformer.rebuild(config, task, own)


def _write_tokenizer(folder: Path, own: Any) -> list[str]:
    """Write the files of a tokenizer; their names."""
    with tempfile.TemporaryDirectory() as staged:
        tokenizer.save(own, Path(staged))
        names = _visible_files(Path(staged))
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(folder / name, (Path(staged) / name).read_bytes())
    for name in _visible_files(folder):
        if name not in names:  # of a tokenizer that was here before
            (folder / name).unlink()
    return names


def _visible_files(folder: Path) -> list[str]:
    """Names of the files in a folder, and in folders inside, as of chat templates."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(x.relative_to(folder).as_posix() for x in paths if not x.name.startswith("."))
