"""Build networks by name: built in or from a zoo; freshly initialised, pretrained, or from a file.

convnet, convnet:32, mlp        built in
resnet18, timm:resnet18         timm's; also hf-hub:ID and local-dir:DIR, as timm knows them
resnet18(drop_path_rate=0.1)    timm's with arguments
torchvision:resnet18            torchvision's classifiers
hf:microsoft/resnet-50, hf:DIR  Hugging Face's image classifiers
module:attribute(width=32)      a network of the user's own code
NAME@FILE                       any of these, with the weights in a file
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError, first_line
from kd.models.zoo import (
    allocation,
    builtin,
    exported,
    huggingface,
    timm_zoo,
    torchvision_zoo,
    user_modules,
    weight_files,
    weights,
)
from kd.models.zoo.protocol import Interpolation, PretrainedConfig, Shape, Zoo


class Classifier(nn.Module):
    """A network that takes images of the data's shape, whatever shape it was built for.

    The resize and the repeated channel in front of the network have neither weights nor buffers.

    Attributes:
        network: The module that is trained and saved; returns logits, or an object or a mapping
            with `logits`.
        size: Height and width to which images are resized (antialiased); None for a network that
            takes images as they are.
        channels: Number of channels to which grayscale images are repeated; None for a network
            that takes the data's channels.
        interpolation: Interpolation of the resize.
        config: Values needed beside the name to build the network again.
        notes: Lines about decisions made when the network was built.
        code: SHA-256 of the module's file, for a network of the user's own code; a buffer, so
            that a hash of the state covers it. Else None.
    """

    code: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        size: tuple[int, int] | None = None,
        *,
        channels: int | None = None,
        interpolation: Interpolation = "bilinear",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.size = size
        self.channels = channels
        self.interpolation: Interpolation = interpolation
        self.config = config
        self.notes: tuple[str, ...] = ()
        self.register_buffer("code", None)

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        resized = resize(images, self.size, self.interpolation)
        answer = self.network(repeat_channels(resized, self.channels))
        if isinstance(answer, Tensor):
            return answer
        return answer["logits"] if isinstance(answer, Mapping) else answer.logits

    def with_network(self, network: nn.Module) -> "Classifier":
        """Return a copy around another network of this architecture, such as averaged weights."""
        return Classifier(
            network,
            self.size,
            channels=self.channels,
            interpolation=self.interpolation,
            config=self.config,
        )


def build(
    name: str,
    shape: Shape,
    classes: int,
    *,
    seed: int = 0,
    pretrained: bool = False,
    config: Mapping[str, Any] | None = None,
    adapt: bool = True,
) -> Classifier:
    """Build a classifier for images of a shape: fresh, pretrained, or with the weights of a file.

    timm's networks are built for the channels of the images. Those of torchvision and Hugging Face
    take three, to which grayscale images are repeated. For a network that takes only one size,
    images are resized to it.

    Args:
        name: Name as in the module's docstring.
        shape: Height, width and channels of the images.
        classes: Number of outputs.
        seed: Seed of the initial weights.
        pretrained: Whether to load the published weights; the last layer is new if `classes`
            differs.
        config: A `Classifier.config`; nothing is then looked up elsewhere.
        adapt: Whether weights in a file may be for another number of classes, without a last layer,
            or for other channels: the last layer is then new, and the first one adapted.

    Raises:
        UserError: For an unknown name, a bad width, a network that would not fit into memory,
            images of a shape that it cannot take, or weights that cannot be obtained or belong to
            another network.
    """
    parts = parse(name)
    if pretrained and parts.file:
        raise UserError(f"{parts.file} has the weights of {parts.text}: leave --pretrained out")
    with torch.random.fork_rng(), allocation.limited(parts.text):
        torch.manual_seed(seed)
        if parts.zoo is not None:
            classifier = _build_from_zoo(parts, shape, classes, pretrained, config)
        elif pretrained:
            raise UserError(f"{parts.base} has no published weights: leave --pretrained out")
        else:
            classifier = Classifier(builtin.network(parts.base, shape, classes))
    if parts.file:
        stored, convert = weight_files.read(parts.file), parts.convert
        notes = weights.load_into(
            classifier.network, stored, parts.text, classes, convert=convert, adapt=adapt
        )
        classifier.notes = tuple(notes)
    elif pretrained:
        classifier.notes = _adaptation_notes(parts, classes, shape[-1], classifier)
    return classifier


def build_as_it_is(name: str, shape: Shape, classes: int) -> tuple[Classifier, int]:
    """Build a network of the user's own code with its own number of classes.

    Args:
        name: A `module:attribute`, without a file of weights.
        shape: Height, width and channels of the images.
        classes: Number of classes, where the code takes one and has no default.

    Returns:
        The classifier, and its number of outputs.

    Raises:
        UserError: If it cannot be built, or cannot take images of the shape.
    """
    parts = parse(name)
    with torch.random.fork_rng(), allocation.limited(parts.text):
        torch.manual_seed(0)
        network = user_modules.network_as_it_is(parts.base, shape[-1], classes)
        return _user_classifier(parts, network, shape)


def is_user_module(name: str) -> bool:
    """Whether a name means a network of the user's own code."""
    return not name.endswith(exported.SUFFIX) and parse(name).zoo is user_modules


def require_typed(where: str, name: str, typed: Iterable[str]) -> None:
    """Refuse a `module:attribute` that a file names and the user has not typed.

    Args:
        where: The file, for the message.
        name: A name that was read from the file.
        typed: Names that the user has typed, of any kind.

    Raises:
        UserError: If the name would be imported, and is not among those typed.
    """
    if is_user_module(name):
        bases = [parse(other).base for other in typed if is_user_module(other)]
        user_modules.require_typed(where, parse(name).base, bases)


def check_name(name: str) -> None:
    """Refuse a name that `build` does not know, and suggest the closest known ones."""
    parts = parse(name)
    if parts.file:
        weight_files.require_file(parts.file)
    if parts.zoo is None:
        builtin.width(parts.base)
    else:
        parts.zoo.check(parts.base)


def pretrained_preprocess(name: str, channels: int) -> Preprocess:
    """The normalisation that a network's published weights expect.

    For another number of channels every channel gets the mean of the published values, since the
    first layer's weights are then summed or repeated, or the channel is.

    Raises:
        UserError: If the name is unknown, or no weights were published.
    """
    return pretrained_config(name).preprocess(channels)


def pretrained_config(name: str) -> PretrainedConfig:
    """The images that published weights expect, and their classes.

    Raises:
        UserError: If the name is unknown, or no weights were published.
    """
    parts = parse(name)
    if parts.zoo is None:
        raise UserError(f"{name} has no published weights: train it with `kd train` first")
    parts.zoo.origin(parts.base)
    return parts.zoo.pretrained_config(parts.base)


def parameter_count(network: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in network.parameters())


def resize(
    images: Float[Tensor, "n c h w"],
    size: tuple[int, int] | None,
    interpolation: Interpolation = "bilinear",
) -> Float[Tensor, "n c H W"]:
    """Resize images with antialiasing; return them as they are if `size` is None or theirs."""
    if size is None or images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode=interpolation, antialias=True, align_corners=False)


def repeat_channels(
    images: Float[Tensor, "n c h w"], channels: int | None
) -> Float[Tensor, "n C h w"]:
    """Repeat the channel of grayscale images; return them as they are if `channels` is None."""
    return images if channels is None else images.expand(-1, channels, -1, -1)


FOLDER_PREFIXES = ("hf", "local-dir")  # prefixes of a folder's path
# Prefix of a name -> the zoo that knows the rest. Names without a prefix are timm's.
ZOOS: Mapping[str, Zoo] = {
    "timm": timm_zoo,
    "torchvision": torchvision_zoo,
    "hf": huggingface,
}


@dataclass(frozen=True)
class NetworkName:
    """The parts of a network's name.

    Attributes:
        zoo: The zoo that has the network; None for a built-in one.
        base: Name of the network in the zoo.
        file: File of its weights, where the name has one.
        text: The whole name without the file.
    """

    zoo: Zoo | None
    base: str
    file: Path | None
    text: str

    @property
    def convert(self) -> weights.Converter | None:
        """The library's own conversion of weights in another form; None where it has none."""
        return timm_zoo.convert if self.zoo is timm_zoo else None


def parse(name: str) -> NetworkName:
    """Split a name into its parts, without checking that such a network exists.

    Raises:
        UserError: For the file of an exported program, from which no network can be built.
    """
    if name.endswith(exported.SUFFIX):
        raise UserError(
            f"{name} is an exported program, which cannot be trained: use it as teacher"
        )
    text, file = _split_file(name)
    prefix, colon, rest = text.partition(":")
    base = text
    if prefix in builtin.NETWORKS:
        zoo: Zoo | None = None
    elif colon and prefix in ZOOS:
        zoo, base = ZOOS[prefix], rest
    elif user_modules.matches(text):
        zoo = user_modules
    else:
        zoo = timm_zoo
    return NetworkName(zoo, base, file, text)


def split_names(text: str) -> list[str]:
    """The names in a comma-separated list.

    A comma in brackets belongs to the arguments of a network, and a comma in a path that exists
    belongs to the path.
    """
    parts, names = text.split(","), []
    while parts:
        joined = [",".join(parts[: n + 1]) for n in range(len(parts))]
        there = [n for n, name in enumerate(joined) if n and _has_existing_path(name.strip())]
        whole = [n for n, name in enumerate(joined) if _brackets_are_closed(name)]
        n = max(there) if there else whole[0] if whole else 0
        names.append(joined[n].strip())
        parts = parts[n + 1 :]
    return [name for name in names if name]


def names_in(*lists: str | None) -> list[str]:
    """The names in comma-separated lists, of which None has none."""
    return [name for text in lists for name in split_names(text or "")]


def parse_names(option: str, text: str) -> list[str]:
    """The names in a list, which must be distinct.

    Args:
        option: The option, for the message.
        text: Value of the option.

    Raises:
        UserError: If the list is empty, or has a name twice.
    """
    names = split_names(text)
    if not names:
        raise UserError(f"{option} must name at least one")
    if len(set(names)) < len(names):
        raise UserError(f"{option} names one twice: {text}")
    return names


def absolute_name(name: str) -> str:
    """Make a path in the name absolute, if it exists, so that the name holds in every folder."""
    if not name:  # Path("") would be the working directory
        return name
    if (path := Path(name).expanduser()).exists():
        return str(path.resolve())
    before, file = _split_file(name)
    after = f"@{file.resolve()}" if file and file.exists() else name[len(before) :]
    prefix, _, rest = before.partition(":")
    if prefix in FOLDER_PREFIXES and (path := Path(rest).expanduser()).exists():
        before = f"{prefix}:{path.resolve()}"
    return before + after


def _has_existing_path(name: str) -> bool:
    """Whether the name is, or contains, a path that exists."""
    if any(_path_exists(Path(path).expanduser()) for path in (name, _strip_folder_prefix(name))):
        return True
    before, file = _split_file(name)
    # A file behind the last of several names does not make them one name.
    return file is not None and _path_exists(file) and len(split_names(before)) == 1


def _brackets_are_closed(name: str) -> bool:
    return all(name.count(a) <= name.count(b) for a, b in ("()", "[]", "{}"))


def _split_file(name: str) -> tuple[str, Path | None]:
    """Split `NAME@FILE`; of several `@`, the one before an existing file counts."""
    at = [i for i, character in enumerate(name[:-1]) if character == "@" and i]
    at = [i for i in at if _brackets_are_closed(name[:i])]  # not one inside an argument
    if not at or _path_exists(Path(name)) or _path_exists(Path(_strip_folder_prefix(name))):
        return name, None
    for i in at:
        if _path_exists(file := Path(name[i + 1 :]).expanduser()) and file.is_file():
            return name[:i], file
    # hf-hub:timm/resnet18@main names a revision; any other name, a file that does not exist.
    if "/" in name[: at[0]] and Path(name).suffix not in weight_files.SUFFIXES:
        return name, None
    return name[: at[0]], Path(name[at[0] + 1 :]).expanduser()


def _strip_folder_prefix(name: str) -> str:
    """The path in `hf:DIR` and `local-dir:DIR`; other names as they are."""
    prefix, _, rest = name.partition(":")
    return rest if prefix in FOLDER_PREFIXES and rest else name


def _path_exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long for any file
        return False


def _build_from_zoo(
    parts: NetworkName,
    shape: Shape,
    classes: int,
    pretrained: bool,
    config: Mapping[str, Any] | None,
) -> Classifier:
    zoo, name = parts.zoo, parts.base
    assert zoo is not None
    if config is None:
        zoo.check(name)
    where = zoo.origin(name) if pretrained else ""
    try:
        network = zoo.network(name, shape[-1], classes, pretrained=pretrained, config=config)
    except UserError:
        raise
    except Exception as error:  # hub, network, file and the zoos' own errors share no base class
        download = f"get the weights of {parts.text} (looked for {where})" if pretrained else ""
        raise UserError(
            f"cannot {download or f'make {parts.text}'}: {first_line(error)}"
        ) from error
    if zoo is user_modules:
        classifier, outputs = _user_classifier(parts, network, shape)
        user_modules.require_classes(parts.text, outputs, classes)
        return classifier
    h, w, c = zoo.input_shape(network, shape)
    size = None if (h, w) == shape[:2] else (h, w)
    classifier = Classifier(
        network,
        size,
        channels=None if c == shape[2] else c,
        # Only where images are resized: finding it may need a download.
        interpolation=zoo.pretrained_config(name).interpolation
        if size and config is None
        else "bilinear",
        config=config or zoo.config(name, network),
    )
    if shape[2] not in (1, c):
        raise UserError(f"{parts.text} takes images of {c} channels, the data have {shape[2]}")
    _check_image_size(classifier, parts.text, shape)
    return classifier


def _user_classifier(
    parts: NetworkName, network: nn.Module, shape: Shape
) -> tuple[Classifier, int]:
    """Wrap a network of the user's own code, and count its outputs."""
    taken = user_modules.input_shape(network, shape)
    outputs = user_modules.count_outputs(parts.text, network, taken)
    classifier = Classifier(network, channels=None if taken == shape else taken[-1])
    digest = user_modules.code_digest(parts.base)
    if digest is not None:
        classifier.code = torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)
    return classifier, outputs


def _adaptation_notes(
    parts: NetworkName, classes: int, channels: int, classifier: Classifier
) -> tuple[str, ...]:
    """Lines about where a network differs from the published one."""
    assert parts.zoo is not None
    try:
        published = parts.zoo.pretrained_config(parts.base)
    except UserError:  # a Hugging Face folder may lack the files that only a teacher needs
        return ()
    notes, theirs = [], len(published.mean)
    if published.count != classes:
        notes.append(
            f"a new last layer for {classes} classes, "
            f"since the published one is for {published.count}"
        )
    if classifier.channels is None and channels != theirs:
        notes.append(f"first layer adapted from {theirs} to {channels} channels, as timm does")
    return tuple(notes)


def _check_image_size(classifier: Classifier, name: str, shape: Shape) -> None:
    """Refuse a network that cannot take images of this size, before any training."""
    h, w, c = shape
    was = classifier.training
    try:
        with torch.no_grad():
            classifier.eval()(torch.zeros(1, c, h, w))
    except UserError:  # the allocation limit
        raise
    except Exception as error:  # a network may raise anything
        raise UserError(
            f"{name} cannot take {h}x{w} images ({first_line(error)}): "
            f"{_image_size_remedy(classifier.network, h, w)}"
        ) from error
    classifier.train(was)


def _image_size_remedy(network: nn.Module, h: int, w: int) -> str:
    """Which images a network could take: whole patches of a ViT, or larger ones."""
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if not isinstance(patch, tuple) or len(patch) != 2 or not (h % patch[0] or w % patch[1]):
        return "use larger images"
    up, across = (math.ceil(size / step) * step for size, step in zip((h, w), patch, strict=True))
    return (
        f"its patches are {patch[0]}x{patch[1]}, so use a size that is a multiple of that, such as "
        f"{up}x{across}"
    )
