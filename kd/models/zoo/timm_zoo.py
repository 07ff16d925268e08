"""timm's networks by name: `resnet18`, `resnet18.a1_in1k`, `hf-hub:ID`, `local-dir:DIR`.

A name may have arguments behind it, as `resnet18(drop_path_rate=0.1)` or `test_vit(img_size=96)`.
One of the zoos behind `kd.models.networks`, which all have the functions below.
"""

import ast
import difflib
import json
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dsdistill.harness.errors import UserError, first_line, unknown_name
from kd.models.zoo import builtin, class_names
from kd.models.zoo.protocol import PretrainedConfig, Shape, nearest_interpolation

# Arguments by which timm reads files; the description of a run must not name any.
_FILE_ARGUMENTS = frozenset(
    {"checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
)
SOURCE_PREFIXES = ("hf-hub", "local-dir")  # prefixes that timm understands itself
# Arguments of timm's that are said otherwise here, or make something else than a classifier.
_RESERVED_ARGUMENTS = (
    *("num_classes", "in_chans", "checkpoint_path", "cache_dir", "features_only", "out_indices"),
    *("scriptable", "exportable", "no_jit", "device", "dtype", "model_name"),
)


def check(name: str) -> None:
    """Refuse a name that timm does not know, with the nearest known ones."""
    name, arguments = split_arguments(name)
    if arguments and name in builtin.NETWORKS:
        raise UserError(f"{name} is built in and takes a width alone, as in {name}:32")
    if _source_prefix(name):
        return
    if Path(name).is_file():
        raise UserError(f"{name} is a file: name its architecture too, as in resnet18@{name}")
    if ":" in name:
        known = ("timm", *SOURCE_PREFIXES, "torchvision", "hf")
        raise unknown_name("source of networks", name.partition(":")[0], known)
    if "/" in name:
        raise UserError(f"there is no folder {name}")
    import timm  # slow to import, so only for a name that is not built in

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.6)
        raise UserError(
            f"{unknown_name('network', name, [*builtin.NETWORKS, *near])}, or any timm name"
        )


def pretrained_config(name: str) -> PretrainedConfig:
    """What the published weights want; of an architecture without any, what timm assumes."""
    check(name)
    from timm.data.config import resolve_data_config

    name, arguments = split_arguments(name)
    config = _pretrained_cfg(name)
    found = resolve_data_config(pretrained_cfg=config)
    h, w = _requested_size(arguments) or found["input_size"][1:]
    return PretrainedConfig(
        tuple(found["mean"]),
        tuple(found["std"]),
        (h, w),
        nearest_interpolation(found["interpolation"]),
        float(found["crop_pct"]),
        _class_names(config),
    )


def origin(name: str) -> str:
    """Where the published weights lie.

    Raises:
        UserError: If none were published.
    """
    check(name)
    name, _ = split_arguments(name)
    if _source_prefix(name):
        return name
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise UserError(f"timm has no published weights for {name}")
    if config.hf_hub_id:
        return f"https://huggingface.co/{config.hf_hub_id}"
    return config.url if isinstance(config.url, str) else str(config.file)


def network(
    name: str,
    channels: int,
    classes: int,
    *,
    pretrained: bool = False,
    config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A network for images of so many channels, whose first layer timm adapts.

    Args:
        config: What `config` gave for such a network; nothing is then looked up.
    """
    # The hub logs every retry of a download; what matters is in the error that is raised.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    import timm

    name, arguments = split_arguments(name)
    extra: dict[str, Any] = {}
    if config:
        name, extra = config["architecture"], dict(config["arguments"])
        if not isinstance(name, str) or not timm.is_model(name) or extra.keys() & _FILE_ARGUMENTS:
            raise UserError(f"the description of the network {name!r} is not one that kd writes")
        extra["pretrained_cfg_overlay"] = dict(config["overlay"])
    elif size := _requested_size(arguments):
        extra["pretrained_cfg_overlay"] = {
            "input_size": (_pretrained_cfg(name)["input_size"][0], *size)
        }
    extra |= arguments | {"in_chans": channels, "num_classes": classes}
    return timm.create_model(name, pretrained=pretrained, **extra)


def input_shape(network: nn.Module, shape: Shape) -> Shape:
    """The shape to which images of `shape` must be brought: many take one size only."""
    config: Any = network.pretrained_cfg
    if not config.get("fixed_input_size"):
        return shape
    # A folder's configuration may have given it another size than its architecture's.
    patches: Any = getattr(network, "patch_embed", None)
    h, w = getattr(patches, "img_size", None) or config["input_size"][1:]
    return h, w, shape[2]


def config(name: str, network: nn.Module) -> dict[str, Any] | None:
    """What is needed beside the name to make the network again, where its source is away."""
    name, arguments = split_arguments(name)
    if not _source_prefix(name):
        return None
    found = _read_hub_config(name)
    found["arguments"] |= arguments
    kept = {k: v for k, v in found["arguments"].items() if k not in ("in_chans", "num_classes")}
    made: Any = network.pretrained_cfg
    overlay = {k: made[k] for k in ("input_size", "fixed_input_size") if k in made}
    return {"architecture": found["architecture"], "arguments": kept, "overlay": overlay}


def split_arguments(name: str) -> tuple[str, dict[str, Any]]:
    """A name without the arguments behind it, and the arguments: Python's literals, by keyword.

    Raises:
        UserError: If they are something else, or of those that are decided elsewhere.
    """
    source = _source_prefix(name)
    if not name.endswith(")") or (source and Path(name.partition(":")[2]).is_dir()):
        return name, {}
    starts = [i for i, character in enumerate(name) if character == "("]
    for start in starts[:1] if source is None else starts:
        arguments = _parse_arguments(name[start:])
        if arguments is not None:
            break
    else:
        if source:
            return name, {}
        raise UserError(
            f"the arguments of a network are literals by keyword, as in "
            f"resnet18(drop_path_rate=0.1), got {name}"
        )
    for argument in arguments:
        if argument in _RESERVED_ARGUMENTS or argument.startswith("pretrained"):
            raise UserError(f"{argument} cannot be given in {name}: leave it out")
    return name[:start], arguments


def with_image_size(name: str, size: int) -> str:
    """The name of the network for images of another size."""
    plain, arguments = split_arguments(name)
    arguments |= {"img_size": size}
    return f"{plain}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"


def convert(network: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What timm does to published weights of another release, project or image size.

    Args:
        network: Of timm's.
        tensors: Without the names of wrappers.
    """
    import timm

    config: Any = network.pretrained_cfg
    module = sys.modules[timm.models.model_entrypoint(config["architecture"]).__module__]
    change = getattr(module, "checkpoint_filter_fn", None)
    if change is None:
        return tensors
    try:
        changed = change(dict(tensors), network)
    except Exception:  # of a foreign network's tensors, which the comparison of names will say
        return tensors
    return {k: v for k, v in changed.items() if isinstance(v, Tensor)}


def stored_size(network: nn.Module, tensors: Mapping[str, Tensor]) -> int | None:
    """The side of the images that position embeddings are for; None if that cannot be told.

    Args:
        network: Of the same architecture, for any size.
        tensors: By its names.
    """
    own, theirs = (
        getattr(x, "shape", None) for x in (_position_embedding(network), tensors.get("pos_embed"))
    )
    patches: Any = getattr(network, "patch_embed", None)
    weight = tensors.get("patch_embed.proj.weight")
    if own is None or theirs is None or weight is None or len(own) != 3 or len(theirs) != 3:
        return None
    side = weight.shape[-1]
    if own == theirs or tuple(patches.patch_size) != (side, side) or weight.ndim != 4:
        return None
    extra: int = getattr(network, "num_prefix_tokens", 0)  # pyright: ignore[reportAssignmentType]
    whole = theirs[1] - (0 if getattr(network, "no_embed_class", False) else extra)
    grid = math.isqrt(max(whole, 0))
    return grid * side if grid and grid * grid == whole else None


def _position_embedding(network: nn.Module) -> Any:
    return getattr(network, "pos_embed", None)


def _parse_arguments(text: str) -> dict[str, Any] | None:
    """The arguments in brackets; None if they are not all literals by keyword."""
    try:
        call: Any = ast.parse(f"f{text}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            return None
        found = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    # One without a name is `**mapping`, and Python takes none twice.
    return found if len(found) == len(call.keywords) else None


def _requested_size(arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of the images that the arguments ask for."""
    size = arguments.get("img_size")
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, tuple | list) or len(sides) != 2:
        raise UserError(f"img_size is a number of pixels, or (height, width), got {size!r}")
    if not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"img_size is a positive whole number of pixels, got {size!r}")
    return sides[0], sides[1]


def _source_prefix(name: str) -> str | None:
    source = name.partition(":")[0]
    return source if source in SOURCE_PREFIXES and ":" in name else None


def _pretrained_cfg(name: str) -> dict[str, Any]:
    """timm's description of the published weights."""
    import timm

    if _source_prefix(name):
        return _read_hub_config(name)["pretrained"]
    found = timm.get_pretrained_cfg(name)
    return {} if found is None else found.to_dict()


def _read_hub_config(name: str) -> dict[str, Any]:
    """Architecture, arguments and description of weights with a `config.json` beside them."""
    import timm.models

    source, _, where = name.partition(":")
    try:
        if source == "hf-hub":
            found, architecture, arguments = timm.models.load_model_config_from_hf(where)
        else:
            read = json.loads((Path(where) / "config.json").read_text())
            architecture, arguments = read["architecture"], read.get("model_args", {})
            found = read.get("pretrained_cfg", {}) | {
                k: read[k] for k in ("num_classes", "label_names") if k in read
            }
    except Exception as error:  # hub, network and file errors share no base class
        first = first_line(error)
        raise UserError(f"cannot read {name} (looked for its config.json): {first}") from error
    arguments, found = dict(arguments or {}), dict(found)
    if size := arguments.get("img_size"):  # timm leaves the architecture's in the description
        channels = found.get("input_size", (3,))[0]
        found["input_size"] = (channels, *((size, size) if isinstance(size, int) else size))
    return {"architecture": architecture, "arguments": arguments, "pretrained": found}


def _class_names(config: Mapping[str, Any]) -> tuple[str, ...] | int:
    names = config.get("label_names")
    count = int(config.get("num_classes") or 0)
    if names and len(names) == count:
        return class_names.with_synonyms(tuple(map(str, names)))
    return class_names.imagenet_names(count) or count
