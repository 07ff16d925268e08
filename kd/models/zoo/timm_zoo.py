"""timm's networks by name: `resnet18`, `resnet18.a1_in1k`, `hf-hub:ID`, `local-dir:DIR`.

A name may have arguments behind it, as `resnet18(drop_path_rate=0.1)` or `test_vit(img_size=96)`.
A zoo of `kd.models.networks`: it has the functions of `kd.models.zoo.protocol.Zoo`.
"""

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
from kd.models.zoo import builtin, class_names, name_arguments
from kd.models.zoo.protocol import SOURCES, PretrainedConfig, Shape, nearest_interpolation

# Arguments by which timm reads files; a run's stored description must not have any.
_FILE_ARGUMENTS = frozenset(
    {"checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
)
SOURCE_PREFIXES = ("hf-hub", "local-dir")  # prefixes that timm understands itself
# Arguments of timm that are set elsewhere, or build something other than a classifier.
_RESERVED_ARGUMENTS = (
    *("num_classes", "in_chans", "checkpoint_path", "cache_dir", "features_only", "out_indices"),
    *("scriptable", "exportable", "no_jit", "device", "dtype", "model_name"),
)


def check(name: str) -> None:
    """Refuse a name that timm does not know, and suggest the closest known ones."""
    name, arguments = split_arguments(name)
    if arguments and name in builtin.NETWORKS:
        raise UserError(f"{name} is built in and takes a width alone, as in {name}:32")
    if _source_prefix(name):
        return
    if Path(name).is_file():
        raise UserError(f"{name} is a file: name its architecture too, as in resnet18@{name}")
    if ":" in name:
        raise unknown_name("source of networks", name.partition(":")[0], SOURCES)
    if "/" in name:
        raise UserError(f"there is no folder {name}")
    import timm  # slow to import, so only for a name that is not built in

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.6)
        raise UserError(
            f"{unknown_name('network', name, [*builtin.NETWORKS, *near])}, or any timm name"
        )


def pretrained_config(name: str) -> PretrainedConfig:
    """The images that the published weights expect; without such weights, timm's assumptions."""
    check(name)
    from timm.data.config import resolve_data_config

    name, arguments = split_arguments(name)
    config = _pretrained_cfg(name)
    data_config = resolve_data_config(pretrained_cfg=config)
    h, w = _requested_size(arguments) or data_config["input_size"][1:]
    return PretrainedConfig(
        tuple(data_config["mean"]),
        tuple(data_config["std"]),
        (h, w),
        nearest_interpolation(data_config["interpolation"]),
        float(data_config["crop_pct"]),
        _class_names(config),
    )


def origin(name: str) -> str:
    """Address or folder of the published weights.

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
    """Build a network for images of `channels` channels, to which timm adapts the first layer.

    Args:
        config: Value that `config` returned for such a network; nothing is then looked up.
    """
    # The hub logs every retry of a download; the error that it raises is enough.
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
    """The shape to which images of `shape` must be resized: many networks take only one size."""
    config: Any = network.pretrained_cfg
    if not config.get("fixed_input_size"):
        return shape
    # A folder's configuration may have set another size than the architecture's.
    patches: Any = getattr(network, "patch_embed", None)
    h, w = getattr(patches, "img_size", None) or config["input_size"][1:]
    return h, w, shape[2]


def config(name: str, network: nn.Module) -> dict[str, Any] | None:
    """Values needed beside the name to build the network again without its source."""
    name, arguments = split_arguments(name)
    if not _source_prefix(name):
        return None
    hub_config = _read_hub_config(name)
    hub_config["arguments"] |= arguments
    items = hub_config["arguments"].items()
    kept = {k: v for k, v in items if k not in ("in_chans", "num_classes")}
    built: Any = network.pretrained_cfg
    overlay = {k: built[k] for k in ("input_size", "fixed_input_size") if k in built}
    return {"architecture": hub_config["architecture"], "arguments": kept, "overlay": overlay}


def split_arguments(name: str) -> tuple[str, dict[str, Any]]:
    """Split a name from the arguments behind it: Python's literals, by keyword.

    Raises:
        UserError: If the arguments are anything else, or one of them is set elsewhere.
    """
    source = _source_prefix(name)
    if not name.endswith(")") or (source and Path(name.partition(":")[2]).is_dir()):
        return name, {}
    starts = [i for i, character in enumerate(name) if character == "("]
    for start in starts[:1] if source is None else starts:
        parsed = name_arguments.parse(name[start:])
        if parsed is not None:
            break
    else:
        if source:
            return name, {}
        raise UserError(
            f"the arguments of a network are literals by keyword, as in "
            f"resnet18(drop_path_rate=0.1), got {name}"
        )
    for argument in parsed:
        if argument in _RESERVED_ARGUMENTS or argument.startswith("pretrained"):
            raise UserError(f"{argument} cannot be given in {name}: leave it out")
    return name[:start], parsed


def with_image_size(name: str, size: int) -> str:
    """The name of the network for images of another size."""
    plain, given = split_arguments(name)
    return plain + name_arguments.join(given | {"img_size": size})


def convert(network: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Apply timm's conversion of weights of another release, project or image size.

    Args:
        network: A network of timm.
        tensors: Weights by name, without the prefixes of wrappers.
    """
    import timm

    config: Any = network.pretrained_cfg
    module = sys.modules[timm.models.model_entrypoint(config["architecture"]).__module__]
    change = getattr(module, "checkpoint_filter_fn", None)
    if change is None:
        return tensors
    try:
        changed = change(dict(tensors), network)
    except Exception:  # another network's tensors, which the comparison of names will report
        return tensors
    return {k: v for k, v in changed.items() if isinstance(v, Tensor)}


def stored_size(network: nn.Module, tensors: Mapping[str, Tensor]) -> int | None:
    """Side, in pixels, of the images that stored position embeddings are for; None if unknown.

    Args:
        network: A network of the same architecture, for any size.
        tensors: Stored weights by the network's names.
    """
    ours, theirs = (
        getattr(x, "shape", None) for x in (_position_embedding(network), tensors.get("pos_embed"))
    )
    patches: Any = getattr(network, "patch_embed", None)
    weight = tensors.get("patch_embed.proj.weight")
    if ours is None or theirs is None or weight is None or len(ours) != 3 or len(theirs) != 3:
        return None
    side = weight.shape[-1]
    if ours == theirs or tuple(patches.patch_size) != (side, side) or weight.ndim != 4:
        return None
    extra: int = getattr(network, "num_prefix_tokens", 0)  # pyright: ignore[reportAssignmentType]
    positions = theirs[1] - (0 if getattr(network, "no_embed_class", False) else extra)
    grid = math.isqrt(max(positions, 0))
    return grid * side if grid and grid * grid == positions else None


def _position_embedding(network: nn.Module) -> Any:
    return getattr(network, "pos_embed", None)


def _requested_size(arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width in the argument `img_size`; None without it."""
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
    config = timm.get_pretrained_cfg(name)
    return {} if config is None else config.to_dict()


def _read_hub_config(name: str) -> dict[str, Any]:
    """Read architecture, arguments and description of weights from their `config.json`."""
    import timm.models

    source, _, where = name.partition(":")
    try:
        if source == "hf-hub":
            pretrained, architecture, arguments = timm.models.load_model_config_from_hf(where)
        else:
            content = json.loads((Path(where) / "config.json").read_text())
            architecture, arguments = content["architecture"], content.get("model_args", {})
            pretrained = content.get("pretrained_cfg", {}) | {
                k: content[k] for k in ("num_classes", "label_names") if k in content
            }
    except Exception as error:  # hub, network and file errors share no base class
        first = first_line(error)
        raise UserError(f"cannot read {name} (looked for its config.json): {first}") from error
    arguments, pretrained = dict(arguments or {}), dict(pretrained)
    if size := arguments.get("img_size"):  # timm leaves the architecture's in the description
        channels = pretrained.get("input_size", (3,))[0]
        pretrained["input_size"] = (channels, *((size, size) if isinstance(size, int) else size))
    return {"architecture": architecture, "arguments": arguments, "pretrained": pretrained}


def _class_names(config: Mapping[str, Any]) -> tuple[str, ...] | int:
    names = config.get("label_names")
    count = int(config.get("num_classes") or 0)
    if names and len(names) == count:
        return class_names.with_synonyms(tuple(map(str, names)))
    return class_names.imagenet_names(count) or count
