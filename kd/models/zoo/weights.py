"""Load the weights of a file into a network of a named architecture: `resnet18@FILE`.

A network's tensors are selected by their names, under whatever prefix a trainer put before them;
its last and its first layer are adapted to other classes and channels.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsdistill.harness.errors import UserError
from dsdistill.harness.text import abbreviate_names
from kd.models.quantised import quantised_network
from kd.models.zoo.weight_files import StoredWeights, Tensors

# A library's conversion of tensors of another release, size or project to one of its networks.
Converter = Callable[[nn.Module, Tensors], Tensors]

# What trainers call the classifier that they put behind a network, which may lie outside of it:
# mmpretrain, mmaction, timm, torchvision, Hugging Face, DINO, Cadene's, open_clip and others.
_HEAD_NAMES = (
    *("head", "head.fc", "head.layers.head", "cls_head", "cls_head.fc", "classification_head"),
    *("fc", "classifier", "classifier.fc", "linear", "last_layer", "last_linear", "logits", "cls"),
    *("output", "output_layer", "head.classifier", "head.last_layer", "linear_head", "heads.head"),
)
# Tables and counters that some releases of a library store and others compute, or that tools
# which count operations leave behind.
_COMPUTED_SUFFIXES = (
    *("num_batches_tracked", "relative_position_index", "attn_mask"),
    *("total_ops", "total_params", "n_averaged"),
)


def prepare(
    stored: StoredWeights,
    network: nn.Module,
    convert: Converter | None = None,
    classes: int | None = None,
) -> tuple[Tensors, list[str]]:
    """Rename tensors as a network names them, and convert them to its size.

    Args:
        stored: Tensors of a file.
        network: Network of the same architecture, for any number of classes and channels.
        convert: The library's conversion of tensors in another form.
        classes: Number of outputs of the network; given, a last layer that lies beside the network
            in the file is taken for the network's.

    Returns:
        The tensors, and notes: one line for each conversion or choice.

    Raises:
        UserError: If the file holds several such networks.
    """
    own, notes = network.state_dict(), []
    wrapper = _wrapper_prefix(stored, own)
    tensors = _strip_wrapper(stored.tensors, wrapper)
    if stored.averaged or _names_average(wrapper):
        notes.append(
            f"averaged weights ({stored.averaged or wrapper.rstrip('.')}) of {stored.path}"
        )
    last = [] if classes is None else head_keys(network, classes)
    if last and not any(k in tensors for k in last):
        notes += _take_outer_head(tensors, stored, wrapper, own, last)
    if convert is not None and _names_or_shapes_differ(tensors, own):
        converted = convert(network, tensors)
        notes += _resampling_notes(tensors, converted)
        tensors = converted
    return tensors, notes


def load_into(
    network: nn.Module,
    stored: StoredWeights,
    name: str,
    classes: int,
    *,
    convert: Converter | None = None,
    adapt: bool = True,
) -> list[str]:
    """Load the weights of a file into a network.

    Args:
        network: Network for the data's number of classes and channels.
        stored: Tensors of the file.
        name: Name of the architecture, for messages.
        classes: Number of outputs of the network.
        convert: As in `prepare`.
        adapt: Whether the last layer may stay new, where the file's is missing or for another
            number of classes, and the first be adapted to another number of channels.

    Returns:
        Notes: one line for each conversion, choice or adaptation.

    Raises:
        UserError: If the file holds the weights of another architecture, or, without `adapt`, for
            another number of classes or channels.
    """
    own = network.state_dict()
    tensors, notes = prepare(stored, network, convert, classes)
    given = dict(tensors)
    if adapt:
        notes += _replace_head(given, own, head_keys(network, classes), stored)
        notes += _adapt_channels(given, own, stored.path)
    path = stored.path
    ours = {k for k in own if k in given or not k.endswith(_COMPUTED_SUFFIXES)}
    theirs = {k for k in given if k in own or not k.endswith(_COMPUTED_SUFFIXES)}
    missing, foreign = sorted(ours - theirs), sorted(theirs - ours)
    if missing or foreign:
        found = [_summarise("without", missing), _summarise("with unknown", foreign)]
        raise UserError(
            f"{path} does not hold the weights of {name}: it is {', '.join(filter(None, found))}"
        )
    differ = [(k, tuple(given[k].shape), tuple(own[k].shape)) for k in sorted(ours)]
    if differ := [(k, a, b) for k, a, b in differ if a != b]:
        k, a, b = differ[-1]  # heads come last in most networks
        if a and b and all((x[:1], y[:1], x[1:]) == (a[:1], b[:1], y[1:]) for _, x, y in differ):
            raise UserError(f"{path} holds weights of {name} for {a[0]} classes, not for {b[0]}")
        raise UserError(f"{path} does not fit {name}: {k} has shape {a}, not {b}")
    network.load_state_dict({k: given[k] for k in ours}, strict=False)
    return notes


def infer_classes_and_channels(
    tensors: Tensors, network: nn.Module, classes: int, channels: int
) -> tuple[int | None, int]:
    """Infer the numbers of classes and channels from where shapes differ from a network's.

    Args:
        tensors: Tensors that `prepare` returned for the network.
        network: Network of the same architecture, for `classes` and `channels`.

    Returns:
        Classes, None for weights without a last layer; and channels.
    """
    own, heads, stems = network.state_dict(), set(), set()
    last = head_keys(network, classes)
    if last and not any(k in tensors for k in last) and any(k in tensors for k in own):
        return None, channels
    shapes = [(tuple(tensors[k].shape), tuple(own[k].shape)) for k in own if k in tensors]
    for theirs, ours in shapes:
        if theirs[1:] == ours[1:] and ours[:1] == (classes,):
            heads.add(theirs[0])
        if (theirs[:1], theirs[2:]) == (ours[:1], ours[2:]) and ours[1:2] == (channels,):
            stems.add(theirs[1])
    # Where more than one number differs it is another architecture, which `load_into` reports.
    return _single_or(heads - {classes}, classes), _single_or(stems - {channels}, channels)


def layers_with_outputs(network: nn.Module, outputs: int) -> list[tuple[str, nn.Module]]:
    """The linear and convolutional layers with `outputs` outputs, in the network's order."""
    return [
        (name, layer)
        for name, layer in network.named_modules()
        if getattr(layer, "out_features", getattr(layer, "out_channels", None)) == outputs
    ]


def reorder_outputs(
    who: str,
    model: nn.Module,
    networks: Sequence[nn.Module],
    inputs: Any,
    outputs: Sequence[int],
) -> None:
    """Permute the outputs of a model, in the weights of the last layer of its networks.

    Args:
        who: Name of the model in messages.
        model: The model, whose mode is restored.
        networks: Networks of one architecture inside the model, changed in place.
        inputs: Inputs of the model on which the effect is checked.
        outputs: The present output that becomes the first, the second, ...

    Raises:
        UserError: If no single layer's weights can be permuted to this effect.
    """
    was, order = model.training, torch.tensor(outputs)
    model.eval()
    with torch.no_grad():
        expected = model(inputs)[..., order]
        # The last layer is the classifier in most networks, but not in those with further heads.
        for name, _ in reversed(layers_with_outputs(networks[0], len(outputs))):
            layers = [network.get_submodule(name) for network in networks]
            _permute(layers, order)
            if torch.allclose(model(inputs), expected, rtol=1e-4, atol=1e-5):
                model.train(was)
                return
            _permute(layers, order.argsort())
    raise UserError(
        f"{who} has the data's classes in another order, and the outputs of its last "
        "layer cannot be reordered: name the classes of the data as it does"
    )


def _permute(layers: Sequence[nn.Module], order: Tensor) -> None:
    for layer in layers:
        for tensor in quantised_network.tensors_of_outputs(layer):
            tensor.copy_(tensor[order])


def head_keys(network: nn.Module, classes: int) -> list[str]:
    """Names of the tensors of a network's last layer, or layers.

    Args:
        network: The network.
        classes: Number of its outputs.
    """
    config = getattr(network, "pretrained_cfg", None)
    names = config.get("classifier") if isinstance(config, Mapping) else None
    known = dict(network.named_modules())
    names = (names,) if isinstance(names, str) else names or ()
    if not any(name in known for name in names):
        names = [name for name, _ in layers_with_outputs(network, classes)[-1:]]
    starts = tuple(f"{name}." for name in names)
    return [k for k in network.state_dict() if k.startswith(starts)] if starts else []


def describe_missing_head(stored: StoredWeights, own: Tensors) -> str:
    """Why a file has no last layer for a network, naming what else in it looks like one."""
    wrapper = _wrapper_prefix(stored, own)
    others = [
        f"{k} {tuple(tensor.shape)}"
        for k, tensor in stored.tensors.items()
        if k.endswith(".weight") and tensor.ndim == 2 and not _belongs_to(k, wrapper, own)
    ]
    if not others:
        return f"{stored.path} has none"
    return f"{stored.path} has none that fits, but {abbreviate_names(others)}"


def _belongs_to(key: str, wrapper: str, own: Tensors) -> bool:
    return key.startswith(wrapper) and key[len(wrapper) :] in own


def _take_outer_head(
    tensors: dict[str, Tensor], stored: StoredWeights, wrapper: str, own: Tensors, last: list[str]
) -> list[str]:
    """Give the one last layer that a file has beside the network the network's names.

    Where several fit, the nearest to the network is taken, and none if they are as near.

    Args:
        tensors: The network's in the file; changed.
        wrapper: Before their names in the file.
        own: The network's.
        last: Names of its last layer there.
    """
    endings = sorted(k.rpartition(".")[2] for k in last)
    if len({k.rpartition(".")[0] for k in last}) != 1 or "weight" not in endings:
        return []  # two last layers, or one of another kind
    inputs = own[next(k for k in last if k.endswith(".weight"))].shape[1]
    near: dict[str, int] = {}
    for key, tensor in stored.tensors.items():
        name, _, ending = key.rpartition(".")
        known = any(name == each or name.endswith(f".{each}") for each in _HEAD_NAMES)
        if not known or ending != "weight" or _belongs_to(key, wrapper, own):
            continue
        beside = sorted(
            k.rpartition(".")[2] for k in stored.tensors if k.rpartition(".")[0] == name
        )
        flat = tensor.ndim >= 2 and tensor.shape[1] == inputs and tensor[0].numel() == inputs
        if flat and beside == endings:
            pairs = zip(name.split("."), wrapper.split("."), strict=False)
            near[name] = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    nearest = [name for name in near if near[name] == max(near.values())]
    if len(nearest) != 1:
        return []
    for k in last:
        ending = k.rpartition(".")[2]
        tensor = stored.tensors[f"{nearest[0]}.{ending}"]
        tensors.pop(f"{nearest[0]}.{ending}"[len(wrapper) :], None)
        shape = own[k].shape
        tensors[k] = tensor.reshape(len(tensor), *shape[1:])
    return [f"last layer from {nearest[0]} of {stored.path}"]


def _replace_head(
    given: dict[str, Tensor], own: Tensors, last: list[str], stored: StoredWeights
) -> list[str]:
    """Replace a last layer for another number of classes in `given` by the network's own."""
    theirs = [k for k in last if k in given]
    if not last or (theirs and all(given[k].shape == own[k].shape for k in theirs)):
        return []
    if any(given[k].shape[1:] != own[k].shape[1:] for k in theirs):
        return []  # another architecture, which `load_into` reports
    if not any(k in given for k in own if k not in last):
        return []
    were = [len(given[k]) for k in theirs]
    given |= {k: own[k] for k in last}
    if were:
        since = f"that of {stored.path} is for {were[-1]}"
    else:
        since = describe_missing_head(stored, own)
    return [f"a new last layer for {len(own[last[-1]])} classes, since {since}"]


def _adapt_channels(given: dict[str, Tensor], own: Tensors, path: Path) -> list[str]:
    """Adapt first layers to other channels as timm does: they are summed or repeated."""
    from timm.models import adapt_input_conv

    notes = []
    for k, tensor in own.items():
        if k not in given or tensor.ndim != 4 or given[k].ndim != 4:
            continue
        ours, theirs = tensor.shape, given[k].shape
        if ours != theirs and (ours[0], ours[2:]) == (theirs[0], theirs[2:]):
            try:
                given[k] = adapt_input_conv(ours[1], given[k], theirs[1])
            except NotImplementedError:
                continue
            notes.append(
                f"first layer adapted from {theirs[1]} to {ours[1]} channels, as timm does"
            )
    return notes


def _single_or(found: set[int], otherwise: int) -> int:
    return found.pop() if len(found) == 1 else otherwise


def _wrapper_prefix(stored: StoredWeights, own: Tensors) -> str:
    """The prefix of the network's names in a file: empty, `module.`, `model.`, ...

    It is the prefix with most of the network's tensors. Other modules under other prefixes, such as
    a loss or a metric, are ignored.

    Raises:
        UserError: If several prefixes have equally many.
    """
    under: Counter[str] = Counter()
    for k in stored.tensors:
        parts = k.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in own:
                under[".".join(parts[:i])] += 1
    most = max(under.values(), default=0)
    best = sorted(k for k, n in under.items() if n == most)
    if not best or under.get("", 0) == most:
        return ""
    averaged = [k for k in best if _names_average(k)]
    if len(averaged) == 1 and len(best) == 2:
        best = averaged
    # Small parts of a network occur often, the whole one does not.
    if len(best) > 1 and 2 * most > len(own):
        raise UserError(
            f"{stored.path} holds several such networks, as {' and as '.join(best[:3])}: save the "
            "state_dict() of the one that is meant"
        )
    return f"{best[0]}."


def _names_average(wrapper: str) -> bool:
    return bool(re.search(r"(^|[._])(ema|averaged?)([._]|$)", wrapper))


def _strip_wrapper(tensors: Tensors, wrapper: str) -> dict[str, Tensor]:
    n = len(wrapper)
    return {k[n:]: v for k, v in tensors.items() if k.startswith(wrapper)}


def _names_or_shapes_differ(tensors: Tensors, own: Tensors) -> bool:
    names = {k for k in tensors if not k.endswith(_COMPUTED_SUFFIXES)}
    if names != {k for k in own if not k.endswith(_COMPUTED_SUFFIXES)}:
        return True
    return any(tensors[k].shape != own[k].shape for k in names)


def _resampling_notes(before: Tensors, after: Tensors) -> list[str]:
    """Notes on tensors that were resampled to another size."""
    names = [k for k in after if k in before and before[k].shape != after[k].shape]
    notes = []
    if any("pos" in k for k in names):
        notes.append("position embeddings resampled to the size of its images, as timm does")
    if any("patch_embed" in k for k in names):
        notes.append("patch embedding resampled to the size of its patches, as timm does")
    return notes


def _summarise(word: str, names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{word} {names[0]}{more}" if names else ""
