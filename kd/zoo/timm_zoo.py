"""timm's networks by name: `resnet18`, `resnet18.a1_in1k`, `hf-hub:ID`, `local-dir:DIR`.

One of the zoos behind `kd.networks`, which all have the functions below.
"""

import difflib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dsdistill.harness.errors import UserError, unknown
from kd.zoo import builtin, labels
from kd.zoo.wants import Shape, Wants, interpolation

# Arguments by which timm reads files; the description of a run must not name any.
_RESERVED = frozenset(
    {"checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
)
SOURCES = ("hf-hub", "local-dir")  # prefixes that timm understands itself


def check(name: str) -> None:
    """Refuse a name that timm does not know, with the nearest known ones."""
    if _source(name):
        return
    if ":" in name:
        known = ("timm", *SOURCES, "torchvision", "hf")
        raise unknown("source of networks", name.partition(":")[0], known)
    if "/" in name:
        raise UserError(f"there is no folder {name}")
    import timm  # slow to import, so only for a name that is not built in

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.6)
        raise UserError(f"{unknown('network', name, [*builtin.NETWORKS, *near])}, or any timm name")


def wants(name: str) -> Wants:
    """What the published weights want; of an architecture without any, what timm assumes."""
    check(name)
    from timm.data.config import resolve_data_config

    config = _config(name)
    found = resolve_data_config(pretrained_cfg=config)
    _, h, w = found["input_size"]
    return Wants(
        tuple(found["mean"]),
        tuple(found["std"]),
        (h, w),
        interpolation(found["interpolation"]),
        float(found["crop_pct"]),
        _classes(config),
    )


def origin(name: str) -> str:
    """Where the published weights lie.

    Raises:
        UserError: If none were published.
    """
    check(name)
    if _source(name):
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

    extra: dict[str, Any] = {}
    if config:
        name, extra = config["architecture"], dict(config["arguments"])
        if not isinstance(name, str) or not timm.is_model(name) or extra.keys() & _RESERVED:
            raise UserError(f"the description of the network {name!r} is not one that kd writes")
        extra["pretrained_cfg_overlay"] = dict(config["overlay"])
    extra |= {"in_chans": channels, "num_classes": classes}
    return timm.create_model(name, pretrained=pretrained, **extra)


def takes(network: nn.Module, shape: Shape) -> Shape:
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
    if not _source(name):
        return None
    found = _hub_config(name)
    kept = {k: v for k, v in found["arguments"].items() if k not in ("in_chans", "num_classes")}
    made: Any = network.pretrained_cfg
    overlay = {k: made[k] for k in ("input_size", "fixed_input_size") if k in made}
    return {"architecture": found["architecture"], "arguments": kept, "overlay": overlay}


def _source(name: str) -> str | None:
    source = name.partition(":")[0]
    return source if source in SOURCES and ":" in name else None


def _config(name: str) -> dict[str, Any]:
    """timm's description of the published weights."""
    import timm

    if _source(name):
        return _hub_config(name)["pretrained"]
    found = timm.get_pretrained_cfg(name)
    return {} if found is None else found.to_dict()


def _hub_config(name: str) -> dict[str, Any]:
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
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"cannot read {name} (looked for its config.json): {first}") from error
    arguments, found = dict(arguments or {}), dict(found)
    if size := arguments.get("img_size"):  # timm leaves the architecture's in the description
        channels = found.get("input_size", (3,))[0]
        found["input_size"] = (channels, *((size, size) if isinstance(size, int) else size))
    return {"architecture": architecture, "arguments": arguments, "pretrained": found}


def _classes(config: Mapping[str, Any]) -> tuple[str, ...] | int:
    names = config.get("label_names")
    count = int(config.get("num_classes") or 0)
    if names and len(names) == count:
        return labels.with_synonyms(tuple(map(str, names)))
    return labels.imagenet(count) or count
