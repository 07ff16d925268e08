"""Trained models of texts by name: `hf:ID`, `hf:DIR`, or the folder of an earlier run."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dsdistill.harness.errors import UserError
from kd.models.language import (
    bilstm,
    saved_text_models,
    sentence_files,
    text_model,
    tokenizer,
    transformer,
)
from kd.models.language.task import OF_TOKENS, Task
from kd.models.language.text_model import TextModel
from kd.models.seals import CARD
from kd.models.token_inputs import TokenInputs
from kd.models.zoo import huggingface, weights

HF = "hf:"
WITH_CLASSES = ("classify", "tag")


def is_name(name: str) -> bool:
    """Whether a name means a trained model, as far as can be told without loading it."""
    # Not Path.is_dir, which raises for a name that is too long for any file.
    return name.startswith(HF) or os.path.isdir(os.path.expanduser(name))


def load(
    name: str, task: Task, classes: tuple[str, ...], *, pairs: bool = False, seed: int = 0
) -> TextModel:
    """Load a model with its own classes; where it lacks a head for the task, with a new one.

    Args:
        name: `hf:` and a name on the hub or a folder, or the folder of a run.
        task: What it is to be used for.
        classes: Names of the classes of a new head; its tensors are then in `network.untrained`.
        pairs: Whether the data are pairs of texts; a run says it itself.
        seed: Seed of a new head.

    Raises:
        UserError: If there is no such model, or it can have no such head.
    """
    if name.startswith(HF):
        return _load_published(name, task, classes, pairs, seed)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(f"{name} is no folder of a run; a model of Hugging Face is named hf:ID")
    model = saved_text_models.load_run(folder)
    return model if model.task == task else new_head(name, model, task, classes, seed)


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of such a model, or of a folder.

    Raises:
        UserError: If there is none.
    """
    if name.startswith(HF):
        return tokenizer.load(name.removeprefix(HF))
    folder = Path(name).expanduser()
    if (folder / CARD).is_file():
        return saved_text_models.load_tokenizer(folder)
    return tokenizer.load(str(folder))


def usual_length(name: str) -> int:
    """Number of tokens of a text for which such a model is used where nothing else is said."""
    if name.startswith(HF):
        config = huggingface.read_config(name.removeprefix(HF))
        largest = getattr(config, "max_position_embeddings", None)
        return text_model.choose_length(name, None, largest)
    return saved_text_models.read_length(Path(name).expanduser())


def heads(name: str) -> int | None:
    """Number of attention heads of such a model; None if it has none."""
    if name.startswith(HF):
        return getattr(huggingface.read_config(name.removeprefix(HF)), "num_attention_heads", None)
    config = saved_text_models.read_config(Path(name).expanduser())
    return None if config["model_type"] == bilstm.MODEL_TYPE else transformer.heads(config)


def embedding_width(name: str) -> tuple[int, bool]:
    """Number of values of the embeddings of such a model, and whether they have length 1.

    Raises:
        UserError: If there is no such model.
    """
    if name.startswith(HF):
        source = name.removeprefix(HF)
        head = sentence_files.read_head(source).head
        return head.width(huggingface.read_config(source).hidden_size), head.normalise
    config = saved_text_models.read_config(Path(name).expanduser())
    if config["model_type"] == bilstm.MODEL_TYPE:
        return config["outputs"], bool(config.get("normalise"))
    return transformer.embedding_width(config)


def new_head(
    who: str, model: TextModel, task: Task, classes: tuple[str, ...], seed: int
) -> TextModel:
    """A copy for another task or other classes, with the embeddings and blocks of a model.

    Args:
        who: Name of the model in messages.
        model: The model.
        task: The other task.
        classes: The other classes.
        seed: Seed of the head.

    Raises:
        UserError: If it is a BiLSTM, which has one head.
    """
    if not hasattr(model.network.network, "base_model_prefix"):
        raise UserError(
            f"{who} is a {model.name} for {model.task}, which can have no new head: train another"
        )
    network = transformer.with_new_head(model.network, task, classes, model.tokenizer, seed=seed)
    return replace(model, network=network, task=task, classes=classes)


def reorder_classes(
    who: str, model: TextModel, outputs: tuple[int, ...] | None, classes: tuple[str, ...]
) -> TextModel:
    """Put the outputs of a model in the order of the data's classes, and call them as these.

    Args:
        who: Name of the model in messages.
        model: The model, whose last layer is changed in place.
        outputs: Its output for each class; None where the order is the same.
        classes: Names of the data's classes.

    Raises:
        UserError: If the outputs of its last layer cannot be reordered.
    """
    if outputs is not None:
        ids = torch.randint(0, 8, (2, 6), generator=torch.Generator().manual_seed(0))
        types = torch.tensor([0, 0, 0, 1, 1, 1]).expand(2, -1)
        inputs = TokenInputs(ids % len(model.tokenizer), torch.ones_like(ids).bool(), types)
        network = model.network
        weights.reorder_outputs(who, network, [network.network], inputs, outputs)
    if hasattr(model.network.network, "config"):
        transformer.rename_labels(model.network, classes)
    return replace(model, classes=classes)


def _load_published(
    name: str, task: Task, classes: tuple[str, ...], pairs: bool, seed: int
) -> TextModel:
    source = name.removeprefix(HF)
    config = huggingface.read_config(source)
    own = tokenizer.load(source)
    head = transformer.CLASSES[task].removeprefix("AutoModel")
    has_head = any(str(x).endswith(head) for x in config.architectures or ())
    # A configuration that names no class of the library may still name those of its head.
    may_have_head = has_head or not config.architectures
    names = transformer.labels(config) if may_have_head and task in WITH_CLASSES else classes
    network = transformer.load(source, task, names, own, seed=seed)
    # A head for tokens and one for texts have tensors of the same names.
    foreign = bool(config.architectures) and not has_head and task not in OF_TOKENS
    if foreign or (network.untrained and names != classes):
        network = transformer.with_new_head(network, task, classes, own, seed=seed)
    classes = classes if network.untrained else names
    length = text_model.choose_length(name, None, text_model.positions(network))
    return TextModel(network, name, task, classes, own, length, pairs)
