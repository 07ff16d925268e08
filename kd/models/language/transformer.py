"""Transformers of texts: those of Hugging Face with their weights, and small fresh ones.

hf:ID, hf:DIR      a model from the hub or a folder, with its weights
bert:4x312         BERT with four blocks of 312 values and random weights
"""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dsdistill.harness.errors import UserError, first_line
from kd.models.language import blocks, sentence_encoder, sentence_files
from kd.models.language.language_model import LanguageModel
from kd.models.language.sentence_encoder import EmbeddingHead, SentenceEncoder
from kd.models.language.task import OF_TOKENS
from kd.models.zoo import huggingface
from kd.models.zoo.huggingface import import_transformers

CLASSES = {  # task -> class of the library that has its head
    "classify": "AutoModelForSequenceClassification",
    "regress": "AutoModelForSequenceClassification",
    "tag": "AutoModelForTokenClassification",
    "mlm": "AutoModelForMaskedLM",
    "causal": "AutoModelForCausalLM",
    "embed": "AutoModel",
}
BERT_HEADS = 12
_FRESH = re.compile(r"bert:([1-9][0-9]*)x([1-9][0-9]*)")
_MAY_BE_NEW = ("pooler",)  # of a model that was trained to predict hidden tokens


def load(
    name: str, task: str, classes: Sequence[str], tokenizer: Any, *, seed: int = 0
) -> LanguageModel:
    """Load a model with its weights; a head for other classes is new.

    Args:
        name: Folder, or name on the hub.
        task: One of `CLASSES`.
        classes: Names of the classes or tags; empty for other tasks.
        tokenizer: Its tokenizer.
        seed: Seed of a new head.

    Raises:
        UserError: If it cannot be had, weights of its blocks are missing, or it sees the tokens
            that it is to predict.
    """
    config = huggingface.read_config(name)
    saved = sentence_files.read_head(name) if task == "embed" else None
    if saved is not None and config.is_encoder_decoder:
        raise UserError(f"hf:{name} writes texts from others: --task embed needs an encoder alone")
    auto = getattr(import_transformers(), CLASSES[task])
    options: dict[str, Any] = {}
    if task not in OF_TOKENS:
        options = _labels(task, classes) | {"ignore_mismatched_sizes": True}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network, info = auto.from_pretrained(
                name, output_loading_info=True, trust_remote_code=False, **options
            )
    except Exception as error:  # hub, network, file and format errors share no base class
        raise UserError(f"cannot load hf:{name} for {task}: {first_line(error)}") from error
    fresh = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    body = "" if saved is not None else f"{network.base_model_prefix}."
    lacking = sorted(
        key
        for key in fresh
        if key.startswith(body) and key.removeprefix(body).split(".")[0] not in _MAY_BE_NEW
    )
    if lacking:
        raise UserError(
            f"hf:{name} has no weights for {len(lacking)} tensors, such as {lacking[0]}: it is no "
            f"trained {type(network).__name__}"
        )
    network = network.float()
    network.config.dtype = torch.float32  # a copy with other weights is built of it
    if len(tokenizer) > (rows := network.get_input_embeddings().weight.shape[0]):
        raise UserError(f"the tokenizer of hf:{name} has {len(tokenizer)} tokens, it has {rows}")
    if saved is not None:
        encoder = SentenceEncoder(network, saved.head)
        sentence_files.load_layers(name, saved, encoder)
        return _wrap(encoder, task, tokenizer)
    model = _wrap(network, task, tokenizer)
    if task == "causal":
        _require_causal(f"hf:{name}", network)
    return model if not fresh else _note_new(model, sorted(fresh))


def fresh(
    name: str,
    task: str,
    classes: Sequence[str],
    tokenizer: Any,
    *,
    seed: int,
    positions: int,
    heads: int | None = None,
) -> LanguageModel:
    """Build a BERT with random weights, for the vocabulary of a tokenizer.

    Blocks are as BERT's: four times as wide in between, and with as many heads as the teacher, or
    twelve as in BERT-base, all-MiniLM and TinyBERT, where these divide the width; otherwise with
    the largest number below that does. TinyBERT's 4x312 is 1200 wide in between, here 1248. For the
    task `causal` no token sees those after it.

    Args:
        name: `bert:LxD`.
        task, classes, tokenizer: As for `load`.
        seed: Seed of the weights.
        positions: Largest number of tokens of a text.
        heads: Number of heads of the teacher; None without.

    Raises:
        UserError: If the name is no such name.
    """
    match = _FRESH.fullmatch(name)
    if match is None:
        raise UserError(f"a fresh BERT is named by blocks and width, as bert:4x312, got {name}")
    depth, width = map(int, match.groups())
    most = min(heads or BERT_HEADS, width)
    count = next(h for h in range(most, 0, -1) if width % h == 0)
    library = import_transformers()
    config = library.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=count,
        intermediate_size=4 * width,
        max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id,
        is_decoder=task == "causal",
        **(_labels(task, classes) if task not in OF_TOKENS else {}),
    )
    return _from_config(config, task, tokenizer, seed)


def rebuild(config: Mapping[str, Any], task: str, tokenizer: Any) -> LanguageModel:
    """Build a model from a `LanguageModel.config`, to load weights into.

    Raises:
        UserError: If the library does not know such a model.
    """
    library = import_transformers()
    try:
        config, head = _parse(config)
        known = library.AutoConfig.for_model(**{k: v for k, v in config.items() if k != "auto_map"})
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"no model can be built from its configuration: {first_line(error)}"
        ) from error
    huggingface.check_code("a run", known)
    return _from_config(known, task, tokenizer, 0, head)


def embedding_width(config: Mapping[str, Any]) -> tuple[int, bool]:
    """Number of values of the embeddings of a model, and whether they have length 1.

    Args:
        config: A `LanguageModel.config`; of a model for another task its tokens are averaged.
    """
    inner, head = _parse(config)
    known = import_transformers().AutoConfig.for_model(**inner)
    return head.width(known.hidden_size), head.normalise


def heads(config: Mapping[str, Any]) -> int | None:
    """Number of attention heads of a model; None if it does not say.

    Args:
        config: A `LanguageModel.config`, in which each architecture has a name of its own for it.
    """
    inner, _ = _parse(config)
    known = import_transformers().AutoConfig.for_model(**inner)
    return getattr(known, "num_attention_heads", None)


def keep_blocks(
    model: LanguageModel, numbers: Sequence[int], task: str, tokenizer: Any
) -> LanguageModel:
    """A copy with some of the blocks, as `blocks.keep`.

    Raises:
        UserError: If there are no such blocks, or no such model can be built again to load them.
    """
    smaller = _wrap(blocks.keep(model.network, numbers), task, tokenizer)
    with torch.device("meta"):
        rebuilt = rebuild(smaller.config or {}, task, tokenizer)
    if different := rebuilt.network.state_dict().keys() ^ smaller.network.state_dict().keys():
        raise UserError(
            f"--keep-layers {','.join(map(str, numbers))}: the blocks of "
            f"{type(model.network).__name__} differ ({min(different)} is not in each), and a model "
            "of these would not load again: keep block 0 as the first"
        )
    smaller.untrained, smaller.notes = model.untrained, model.notes
    return smaller


def with_new_head(
    model: LanguageModel, task: str, classes: Sequence[str], tokenizer: Any, *, seed: int
) -> LanguageModel:
    """A model for another task or other classes, with the embeddings and blocks of this one.

    Args:
        model: The model.
        task, classes, tokenizer: As for `load`.
        seed: Seed of the new head.

    Raises:
        UserError: If the library has no such head for the model, or a model for the task `causal`
            would see later tokens.
    """
    config = copy.deepcopy(_config(model.network))
    labels = {"problem_type": None} | (_labels(task, classes) if task not in OF_TOKENS else {})
    for key, value in labels.items():
        setattr(config, key, value)
    if hasattr(config, "is_decoder"):  # of BERT and its kind
        config.is_decoder = task == "causal"
    other = _from_config(config, task, tokenizer, seed)
    if task == "causal":
        _require_causal(type(other.network).__name__, other.network)
    body, old = (f"{x.base_model_prefix}." for x in (other.network, model.network))
    weights = {
        body + key.removeprefix(old): value
        for key, value in model.network.state_dict().items()
        if key.startswith(old)
    }
    # Tied ones once, under the body's name; a pooler beside an embedding is not trained.
    new = {key for key, value in other.network.named_parameters() if value.requires_grad}
    carried = {
        key: weights[key]
        for key, value in other.network.state_dict().items()
        if key in weights and weights[key].shape == value.shape
    }
    other.network.load_state_dict(carried, strict=False)
    fresh = sorted(new - carried.keys())
    return _note_new(other, fresh) if fresh else other


def fit_embedding(
    model: LanguageModel, tokenizer: Any, *, width: int, normalise: bool, seed: int
) -> LanguageModel:
    """A model of embeddings that can be compared with a teacher's, as `sentence_encoder.fit`."""
    assert isinstance(model.network, SentenceEncoder)
    network, note = sentence_encoder.fit(model.network, width=width, normalise=normalise, seed=seed)
    fitted = _wrap(network, "embed", tokenizer)
    fitted.notes = (*model.notes, note) if note else model.notes
    return fitted


def labels(config: Any) -> tuple[str, ...]:
    """Names of the classes or tags that a configuration has, in the order of the outputs."""
    return tuple(str(config.id2label[i]) for i in range(config.num_labels))


def rename_labels(model: LanguageModel, classes: Sequence[str]) -> None:
    """Give the outputs of a model other names."""
    for key, value in _labels("classify", classes).items():
        setattr(model.network.config, key, value)
    model.config = _as_json(model.network)


def positions(network: nn.Module) -> int | None:
    """Largest number of tokens that a transformer takes; None where nothing says one."""
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kind begin to count after the id of padding.
            return module.num_embeddings - (-1 if (p := module.padding_idx) is None else p) - 1
    largest = getattr(_config(network), "max_position_embeddings", None)
    return largest if largest and largest > 0 else None


def _labels(task: str, classes: Sequence[str]) -> dict[str, Any]:
    if task == "regress":
        return {"num_labels": 1, "problem_type": "regression"}
    if task == "embed":
        return {}
    names = dict(enumerate(classes))
    return {"id2label": names, "label2id": {name: i for i, name in names.items()}}


def _parse(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], EmbeddingHead]:
    """The configuration of the transformer in a `LanguageModel.config`, and what stands after."""
    if config.get("model_type") == sentence_encoder.MODEL_TYPE:
        return sentence_encoder.parse(config)
    return config, EmbeddingHead()


def _from_config(
    config: Any, task: str, tokenizer: Any, seed: int, head: EmbeddingHead | None = None
) -> LanguageModel:
    auto = getattr(import_transformers(), CLASSES[task])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            network = auto.from_config(config, trust_remote_code=False, dtype=torch.float32)
        except ValueError as error:
            raise UserError(
                f"no {config.model_type} can be built for --task {task}: {first_line(error)}"
            ) from error
        if task == "embed":
            network = SentenceEncoder(network, head or EmbeddingHead())
    return _wrap(network, task, tokenizer)


def _wrap(network: nn.Module, task: str, tokenizer: Any) -> LanguageModel:
    config = _config(network)
    if config.pad_token_id is None:  # GPT-2 classifies by the last token before the padding
        config.pad_token_id = tokenizer.pad_token_id
    vocabulary = len(tokenizer) if task in OF_TOKENS else None
    return LanguageModel(network, vocabulary=vocabulary, config=_as_json(network))


def _note_new(model: LanguageModel, names: Sequence[str]) -> LanguageModel:
    model.untrained = tuple(names)
    more = ", ..." if len(names) > 4 else ""
    model.notes = (f"{len(names)} new tensors: {', '.join(names[:4])}{more}",)
    return model


def _require_causal(who: str, network: nn.Module) -> None:
    """Refuse a network that sees the tokens after one: it would only copy what it is to predict."""
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 0]]) % network.get_input_embeddings().num_embeddings  # pyright: ignore
    was = network.training
    with torch.no_grad():
        one, other = network.eval()(ids, attention_mask=torch.ones_like(ids)).logits[:, :3]
    network.train(was)
    if not torch.allclose(one, other, rtol=1e-4, atol=1e-4):
        raise UserError(
            f"{who} sees the tokens after the one that it predicts: it is no causal model, use "
            "--task mlm"
        )


def _config(network: nn.Module) -> Any:
    return network.config


def _as_json(network: nn.Module) -> dict[str, Any]:
    config = json.loads(_config(network).to_json_string(use_diff=False))
    if isinstance(network, SentenceEncoder):
        return sentence_encoder.describe(network, config)
    return config
