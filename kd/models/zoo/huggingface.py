"""Hugging Face's image classifiers by name: `hf:microsoft/resnet-50`, or `hf:` and a folder.

One of the zoos behind `kd.models.networks`, which all have the functions below. Needs
`transformers`, an optional extra. No code of a model's repository is ever run.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsdistill.harness.errors import UserError, first_line
from kd.models.zoo import class_names
from kd.models.zoo.protocol import PretrainedConfig, Shape, nearest_interpolation

# PIL's numbers of resampling filters.
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
LABELS = 1_000_000  # that a configuration may have; the library makes a name for each
_PROBE_PIXELS = 64  # pixels of the sides of the images of one colour that a processor is shown


def check(name: str) -> None:
    """Refuse a folder that is not there or holds no model, and a missing library."""
    import_transformers()
    if not name:
        raise UserError("hf: needs a name, as in hf:microsoft/resnet-50, or a folder")
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no Hugging Face model: it has no config.json")
    if not folder.is_dir() and (name[0] in "./~" or name.count("/") > 1):
        raise UserError(f"there is no folder {name}")


def pretrained_config(name: str) -> PretrainedConfig:
    """What the model's image processor does, found by showing it images."""
    check(name)
    config, processor = (
        _from_pretrained("AutoConfig", name),
        _from_pretrained("AutoImageProcessor", name),
    )
    names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    mean, std, size = _normalisation(name, processor)
    filter = getattr(processor, "resample", None)
    return PretrainedConfig(
        mean,
        std,
        size if _sets_size(processor) else _configured_size(config) or size,
        nearest_interpolation(_FILTERS.get(int(filter), "") if filter is not None else ""),
        _crop_share(processor, size),
        class_names.with_synonyms(names),
    )


def origin(name: str) -> str:
    """Where the published weights lie."""
    return name if Path(name).is_dir() else f"https://huggingface.co/{name}"


def network(
    name: str,
    channels: int,
    classes: int,
    *,
    pretrained: bool = False,
    config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A network for images of as many channels as its configuration says.

    Args:
        config: What `config` gave for such a network; nothing is then looked up.

    Raises:
        UserError: If there are no weights for some of its layers, other than for the last one of
            another number of classes.
    """
    auto = import_transformers().AutoModelForImageClassification
    if config is not None:
        # From a number of labels the library would make as many names.
        own = {k: v for k, v in config.items() if k not in ("auto_map", "num_labels")}
        found = import_transformers().AutoConfig.for_model(**own)
        _check_code(name, found)
        return auto.from_config(found, trust_remote_code=False)
    check(name)
    found = _from_pretrained("AutoConfig", name)
    _check_code(name, found)
    own = found.num_labels
    if classes != own:
        found.num_labels = classes
    if not pretrained:
        return auto.from_config(found, trust_remote_code=False)
    made, info = auto.from_pretrained(
        name,
        config=found,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        trust_remote_code=False,
    )
    fresh = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    head = {key for key, value in made.state_dict().items() if value.shape[:1] == (classes,)}
    if lacking := sorted(fresh - (head if classes != own else set())):
        raise UserError(
            f"{origin(name)} has no weights for {len(lacking)} tensors, such as {lacking[0]}: "
            "it is no trained classifier"
        )
    return made.float()  # some are stored in half precision


def input_shape(network: nn.Module, shape: Shape) -> Shape:
    """The shape to which images of `shape` must be brought.

    A configuration names a size, but not whether it is the only one: that is tried.
    """
    config: Any = network.config
    (h, w, _), channels = shape, getattr(config, "num_channels", None) or 3
    size = _configured_size(config)
    if size and size != (h, w) and not _accepts_shape(network, (h, w, channels)):
        h, w = size
    return h, w, channels


def config(name: str, network: nn.Module) -> dict[str, Any] | None:
    """What is needed beside the name to make the network again, where its source is away."""
    found: Any = network.config
    return json.loads(found.to_json_string(use_diff=False))


def import_transformers() -> Any:
    """transformers, without its reports and bars.

    Raises:
        UserError: If it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError("hf: models need transformers: pip install 'dsdistill[hf]'") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _from_pretrained(kind: str, name: str) -> Any:
    _check_labels(Path(name) / "config.json")
    try:
        # Otherwise the library asks at the terminal whether to run the code that lies beside it.
        return getattr(import_transformers(), kind).from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # hub, network, file and format errors share no base class
        what = "configuration" if kind == "AutoConfig" else "image processor"
        raise UserError(
            f"cannot get the {what} of hf:{name} (looked for {origin(name)}): {first_line(error)}"
        ) from error


def _check_labels(path: Path) -> None:
    """Refuse a folder's configuration with a number of labels for which no names have room.

    Raises:
        UserError: If it has one.
    """
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return  # the library says what is wrong
    count = found.get("num_labels") if isinstance(found, dict) else None
    if isinstance(count, int) and count > LABELS:
        raise UserError(f"{path} has num_labels {count}: at most {LABELS:,} are read")


def _check_code(name: str, config: Any) -> None:
    """Refuse a configuration that names code on the hub to compute attention with.

    Raises:
        UserError: If it does.
    """
    attention = getattr(config, "_attn_implementation", None)
    if attention is not None and not re.fullmatch(r"[a-z0-9_]+", str(attention)):
        raise UserError(
            f"the configuration of hf:{name} names {attention!r}, code that would be downloaded: "
            "remove attn_implementation from its config.json"
        )


def _normalisation(name: str, processor: Any) -> tuple[Any, Any, tuple[int, int]]:
    """Mean and deviation for images in [0, 1], and the size of what comes out.

    Processors rescale, shift and normalise in ways of their own, with attributes of their own. What
    they do to images of one colour says it all, whatever is resized and cropped.

    Raises:
        UserError: If they do something else, such as swap red and blue.
    """
    colours = np.array(
        [[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [51, 102, 153]],
        np.uint8,
    )
    images = [np.broadcast_to(c, (_PROBE_PIXELS, _PROBE_PIXELS, 3)).copy() for c in colours]
    seen: Tensor = processor(images, return_tensors="pt")["pixel_values"].double()
    values = seen.mean((2, 3))  # (colours, channels)
    black, white = values[0], values[1]
    expected = black + (white - black) * torch.from_numpy(colours / 255)
    if values.shape[1] != 3 or not torch.allclose(values, expected, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"the image processor of hf:{name} does more than resize, crop and normalise three "
            "channels, such as swapping red and blue: its model cannot be used here"
        )
    std = 1 / (white - black)
    return tuple((-black * std).tolist()), tuple(std.tolist()), (seen.shape[2], seen.shape[3])


def _sets_size(processor: Any) -> bool:
    """Whether it decides on the size of what comes out."""
    return any(getattr(processor, name, None) for name in ("do_resize", "do_center_crop"))


def _crop_share(processor: Any, size: tuple[int, int]) -> float:
    """Share of the resized image's shorter side that is cropped."""
    edge = getattr(getattr(processor, "size", None), "shortest_edge", None)
    if edge and getattr(processor, "do_center_crop", None):
        return min(1.0, size[0] / edge)
    if edge and edge < 384:  # ConvNeXt's processors crop below that size alone
        return float(getattr(processor, "crop_pct", None) or 1.0)
    return 1.0


def _configured_size(config: Any) -> tuple[int, int] | None:
    size = getattr(config, "image_size", None)
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else tuple(size)


def _accepts_shape(network: nn.Module, shape: Shape) -> bool:
    h, w, c = shape
    was = network.training
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, c, h, w))
    except Exception:  # they raise whatever they like
        return False
    finally:
        network.train(was)
    return True
