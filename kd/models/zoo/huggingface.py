"""Hugging Face's image classifiers by name: `hf:microsoft/resnet-50`, or `hf:` and a folder.

A zoo of `kd.models.networks`: it has the functions of `kd.models.zoo.protocol.Zoo`. Needs
`transformers`, an optional extra. Code in a model's repository is never run.
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
MAX_LABELS = 1_000_000  # of a configuration; the library makes a name for each
_PROBE_PIXELS = 64  # pixels per side of the one-colour images that probe a processor


def check(name: str) -> None:
    """Refuse a folder that is missing or holds no model, and a missing library."""
    import_transformers()
    if not name:
        raise UserError("hf: needs a name, as in hf:microsoft/resnet-50, or a folder")
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no Hugging Face model: it has no config.json")
    if not folder.is_dir() and (name[0] in "./~" or name.count("/") > 1):
        raise UserError(f"there is no folder {name}")


def pretrained_config(name: str) -> PretrainedConfig:
    """The images that the model expects, found by probing its image processor with images."""
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
    """Address or folder of the published weights."""
    return name if Path(name).is_dir() else f"https://huggingface.co/{name}"


def network(
    name: str,
    channels: int,
    classes: int,
    *,
    pretrained: bool = False,
    config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a network, for images of the channels in its configuration, whatever `channels` is.

    Args:
        config: Value that `config` returned for such a network; nothing is then looked up.

    Raises:
        UserError: If there are no weights for some of its layers, other than for a last layer for
            another number of classes.
    """
    auto = import_transformers().AutoModelForImageClassification
    if config is not None:
        # The library would make a name for each of `num_labels`.
        values = {k: v for k, v in config.items() if k not in ("auto_map", "num_labels")}
        hub_config = import_transformers().AutoConfig.for_model(**values)
        check_code(name, hub_config)
        return auto.from_config(hub_config, trust_remote_code=False)
    hub_config = read_config(name)
    published_classes = hub_config.num_labels
    if classes != published_classes:
        hub_config.num_labels = classes
    if not pretrained:
        return auto.from_config(hub_config, trust_remote_code=False)
    model, info = auto.from_pretrained(
        name,
        config=hub_config,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        trust_remote_code=False,
    )
    fresh = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    head = {key for key, value in model.state_dict().items() if value.shape[:1] == (classes,)}
    if lacking := sorted(fresh - (head if classes != published_classes else set())):
        raise UserError(
            f"{origin(name)} has no weights for {len(lacking)} tensors, such as {lacking[0]}: "
            "it is not a trained classifier"
        )
    return model.float()  # some are stored in half precision


def read_config(name: str) -> Any:
    """The configuration of a model, which names no code from the hub.

    Raises:
        UserError: If it cannot be had, or names such code.
    """
    check(name)
    config = _from_pretrained("AutoConfig", name)
    check_code(name, config)
    return config


def check_code(name: str, config: Any) -> None:
    """Refuse a configuration whose attention is computed by code from the hub.

    Raises:
        UserError: If it names such code.
    """
    attention = getattr(config, "_attn_implementation", None)
    if attention is not None and not re.fullmatch(r"[a-z0-9_]+", str(attention)):
        raise UserError(
            f"the configuration of hf:{name} names {attention!r}, code that would be downloaded: "
            "remove attn_implementation from its config.json"
        )


def input_shape(network: nn.Module, shape: Shape) -> Shape:
    """The shape to which images of `shape` must be resized.

    A configuration names a size, but not whether it is the only one: the network is run to see.
    """
    config: Any = network.config
    (h, w, _), channels = shape, getattr(config, "num_channels", None) or 3
    size = _configured_size(config)
    if size and size != (h, w) and not _accepts_shape(network, (h, w, channels)):
        h, w = size
    return h, w, channels


def config(name: str, network: nn.Module) -> dict[str, Any] | None:
    """Values needed beside the name to build the network again without its source."""
    hub_config: Any = network.config
    return json.loads(hub_config.to_json_string(use_diff=False))


def import_transformers() -> Any:
    """Import transformers, and silence its log lines and progress bars.

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
        # Without this the library asks at the terminal whether to run the repository's code.
        return getattr(import_transformers(), kind).from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # hub, network, file and format errors share no base class
        part = "configuration" if kind == "AutoConfig" else "image processor"
        raise UserError(
            f"cannot get the {part} of hf:{name} (looked for {origin(name)}): {first_line(error)}"
        ) from error


def _check_labels(path: Path) -> None:
    """Refuse a folder's configuration with more than `MAX_LABELS` labels.

    Raises:
        UserError: If it has more.
    """
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return  # the library reports the error
    count = content.get("num_labels") if isinstance(content, dict) else None
    if isinstance(count, int) and count > MAX_LABELS:
        raise UserError(f"{path} has num_labels {count}: at most {MAX_LABELS:,} are read")


def _normalisation(name: str, processor: Any) -> tuple[Any, Any, tuple[int, int]]:
    """Mean and deviation for images in [0, 1], and height and width of the processor's output.

    Processors rescale, shift and normalise in different ways, with different attributes. Their
    output for images of one colour shows the normalisation, whatever is resized and cropped.

    Raises:
        UserError: If the processor does anything else, such as swap red and blue.
    """
    colours = np.array(
        [[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [51, 102, 153]],
        np.uint8,
    )
    images = [np.broadcast_to(c, (_PROBE_PIXELS, _PROBE_PIXELS, 3)).copy() for c in colours]
    pixels: Tensor = processor(images, return_tensors="pt")["pixel_values"].double()
    values = pixels.mean((2, 3))  # (colours, channels)
    black, white = values[0], values[1]
    expected = black + (white - black) * torch.from_numpy(colours / 255)
    if values.shape[1] != 3 or not torch.allclose(values, expected, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"the image processor of hf:{name} does more than resize, crop and normalise three "
            "channels, such as swapping red and blue: its model cannot be used here"
        )
    std = 1 / (white - black)
    return tuple((-black * std).tolist()), tuple(std.tolist()), (pixels.shape[2], pixels.shape[3])


def _sets_size(processor: Any) -> bool:
    """Whether the processor resizes or crops to a size of its own."""
    return any(getattr(processor, name, None) for name in ("do_resize", "do_center_crop"))


def _crop_share(processor: Any, size: tuple[int, int]) -> float:
    """Side of the crop as a share of the resized image's shorter side."""
    edge = getattr(getattr(processor, "size", None), "shortest_edge", None)
    if edge and getattr(processor, "do_center_crop", None):
        return min(1.0, size[0] / edge)
    if edge and edge < 384:  # ConvNeXt's processors crop only below this size
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
    except Exception:  # a network may raise anything
        return False
    finally:
        network.train(was)
    return True
