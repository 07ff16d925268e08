"""Networks by name: built in, or from a zoo; freshly initialised, pretrained, or from a file.

convnet, convnet:32, mlp        built in
resnet18, timm:resnet18         timm's; also hf-hub:ID and local-dir:DIR, as timm knows them
resnet18(drop_path_rate=0.1)    timm's with arguments
torchvision:resnet18            torchvision's classifiers
hf:microsoft/resnet-50, hf:DIR  Hugging Face's image classifiers
NAME@FILE                       any of these, with the weights in a file
"""

import math
from collections.abc import Mapping
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
    weights,
)
from kd.models.zoo.protocol import Interpolation, PretrainedConfig, Shape, Zoo


class Classifier(nn.Module):
    """A network that takes images of the data's shape, whatever shape it was made for.

    What is done to the images first has neither weights nor buffers.

    Attributes:
        network: What is trained and saved; answers with logits, or with an object that has them.
        size: Height and width to which images are resized (antialiased); None for a network that
            takes them as they are.
        channels: Number to which grayscale images are repeated; None for a network that takes
            those that it is given.
        interpolation: Of the resize.
        config: What is needed beside its name to make the network again.
        notes: Lines about what was decided when it was made.
    """

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

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        resized = resize(images, self.size, self.interpolation)
        answer = self.network(repeat_channels(resized, self.channels))
        return answer if isinstance(answer, Tensor) else answer.logits

    def around(self, network: nn.Module) -> "Classifier":
        """The same about another network of this architecture, such as averaged weights."""
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
    """A classifier for images of a shape: fresh, pretrained, or with the weights of a file.

    timm's networks are made for the channels of the images. Those of torchvision and Hugging Face
    take three, to which grayscale images are repeated. A network that takes one size alone has
    images resized to it.

    Args:
        name: As above.
        shape: Of the images it will be given.
        classes: Number of outputs.
        seed: Of the initial weights.
        pretrained: Load the published weights; the last layer is new if `classes` differs.
        config: A `Classifier.config`: then nothing is looked up elsewhere.
        adapt: Whether weights in a file may be of another number of classes, or of none, and of
            other channels: the last layer is then new, and the first one adapted.

    Raises:
        UserError: For an unknown name, a bad width, a network that would not fit into memory,
            images of a shape it cannot take, or weights that cannot be had or are another
            network's.
    """
    found = parse(name)
    if pretrained and found.file:
        raise UserError(f"{found.file} has the weights of {found.text}: leave --pretrained out")
    with torch.random.fork_rng(), allocation.limited(found.text):
        torch.manual_seed(seed)
        if found.zoo is not None:
            classifier = _build_from_zoo(found, shape, classes, pretrained, config)
        elif pretrained:
            raise UserError(f"{found.base} has no published weights: leave --pretrained out")
        else:
            classifier = Classifier(builtin.network(found.base, shape, classes))
    if found.file:
        stored, convert = weights.read(found.file), found.convert
        notes = weights.load_into(
            classifier.network, stored, found.text, classes, convert=convert, adapt=adapt
        )
        classifier.notes = tuple(notes)
    elif pretrained:
        classifier.notes = _adaptation_notes(found, classes, shape[-1], classifier)
    return classifier


def check_name(name: str) -> None:
    """Refuse a name that `build` does not know, with the nearest known ones."""
    found = parse(name)
    if found.file:
        weights.require_file(found.file)
    if found.zoo is None:
        builtin.width(found.base)
    else:
        found.zoo.check(found.base)


def pretrained_preprocess(name: str, channels: int) -> tuple[Preprocess, int]:
    """The normalisation of a network's published weights, and their number of classes.

    For another number of channels than theirs every channel gets the mean of theirs, since the
    first layer's weights are then summed or repeated, or the channel is.

    Raises:
        UserError: If the name is unknown, or no weights were published.
    """
    own = pretrained_config(name)
    return own.preprocess(channels), own.count


def pretrained_config(name: str) -> PretrainedConfig:
    """What a network's published weights want: normalisation, size, interpolation, classes.

    Raises:
        UserError: If the name is unknown, or no weights were published.
    """
    found = parse(name)
    if found.zoo is None:
        raise UserError(f"{name} has no published weights: train it with `kd train` first")
    found.zoo.origin(found.base)
    return found.zoo.pretrained_config(found.base)


def parameter_count(network: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in network.parameters())


def resize(
    images: Float[Tensor, "n c h w"],
    size: tuple[int, int] | None,
    interpolation: Interpolation = "bilinear",
) -> Float[Tensor, "n c H W"]:
    """Antialiased; the images themselves if `size` is None or theirs."""
    if size is None or images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode=interpolation, antialias=True, align_corners=False)


def repeat_channels(
    images: Float[Tensor, "n c h w"], channels: int | None
) -> Float[Tensor, "n C h w"]:
    """Grayscale images with their channel repeated; the images themselves if `channels` is None."""
    return images if channels is None else images.expand(-1, channels, -1, -1)


FOLDER_PREFIXES = ("hf", "local-dir")  # prefixes of a folder's path
# A prefix of names -> who knows what follows it. Names without one are timm's.
ZOOS: Mapping[str, Zoo] = {
    "timm": timm_zoo,
    "torchvision": torchvision_zoo,
    "hf": huggingface,
}


@dataclass(frozen=True)
class NetworkName:
    """The parts of a name.

    Attributes:
        zoo: Who knows it; None for a built-in network.
        base: Its name there.
        file: Of its weights, where one is given.
        text: The whole name without the file.
    """

    zoo: Zoo | None
    base: str
    file: Path | None
    text: str

    @property
    def convert(self) -> weights.Converter | None:
        """What its library does to weights of another form."""
        return timm_zoo.convert if self.zoo is timm_zoo else None


def parse(name: str) -> NetworkName:
    """Take a name apart. Whether there is such a network is not looked at.

    Raises:
        UserError: For the file of an exported program, which is no network to build.
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
    else:
        zoo = timm_zoo
    return NetworkName(zoo, base, file, text)


def split_names(text: str) -> list[str]:
    """The names of a comma-separated list.

    A comma in brackets is part of the arguments of a network, and one in the path of something that
    exists is part of the path.
    """
    parts, found = text.split(","), []
    while parts:
        joined = [",".join(parts[: n + 1]) for n in range(len(parts))]
        there = [n for n, name in enumerate(joined) if n and _has_existing_path(name.strip())]
        whole = [n for n, name in enumerate(joined) if _brackets_are_closed(name)]
        n = max(there) if there else whole[0] if whole else 0
        found.append(joined[n].strip())
        parts = parts[n + 1 :]
    return [name for name in found if name]


def parse_names(option: str, text: str) -> list[str]:
    """The names of a list, each once.

    Args:
        option: As the user wrote it, for the message.
        text: What stands after it.

    Raises:
        UserError: If there is none, or one comes twice.
    """
    found = split_names(text)
    if not found:
        raise UserError(f"{option} must name at least one")
    if len(set(found)) < len(found):
        raise UserError(f"{option} names one twice: {text}")
    return found


def absolute_name(name: str) -> str:
    """The name with the path in it, if it has one that exists, as it is from every folder."""
    if not name:  # not the working directory, which is what a path of nothing is
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
    """Whether it is, or has in it, the path of something that is there."""
    if any(_path_exists(Path(path).expanduser()) for path in (name, _strip_folder_prefix(name))):
        return True
    before, file = _split_file(name)
    # The file of the last of several names does not make them one.
    return file is not None and _path_exists(file) and len(split_names(before)) == 1


def _brackets_are_closed(name: str) -> bool:
    return all(name.count(a) <= name.count(b) for a, b in ("()", "[]", "{}"))


def _split_file(name: str) -> tuple[str, Path | None]:
    """What stands before `@FILE`, and the file; what exists decides where an `@` parts them."""
    at = [i for i, character in enumerate(name[:-1]) if character == "@" and i]
    if not at or _path_exists(Path(name)) or _path_exists(Path(_strip_folder_prefix(name))):
        return name, None
    for i in at:
        if _path_exists(file := Path(name[i + 1 :]).expanduser()) and file.is_file():
            return name[:i], file
    # hf-hub:timm/resnet18@main is a revision; elsewhere, a file that is not there.
    if "/" in name[: at[0]] and Path(name).suffix not in weights.SUFFIXES:
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
    found: NetworkName,
    shape: Shape,
    classes: int,
    pretrained: bool,
    config: Mapping[str, Any] | None,
) -> Classifier:
    zoo, name = found.zoo, found.base
    assert zoo is not None
    if config is None:
        zoo.check(name)
    where = zoo.origin(name) if pretrained else ""
    try:
        network = zoo.network(name, shape[-1], classes, pretrained=pretrained, config=config)
    except UserError:
        raise
    except Exception as error:  # hub, network, file and the zoos' own errors share no base class
        what = f"get the weights of {found.text} (looked for {where})" if pretrained else ""
        raise UserError(f"cannot {what or f'make {found.text}'}: {first_line(error)}") from error
    h, w, c = zoo.input_shape(network, shape)
    size = None if (h, w) == shape[:2] else (h, w)
    classifier = Classifier(
        network,
        size,
        channels=None if c == shape[2] else c,
        # Only where it is needed: to know it, a configuration may have to be downloaded.
        interpolation=zoo.pretrained_config(name).interpolation
        if size and config is None
        else "bilinear",
        config=config or zoo.config(name, network),
    )
    if shape[2] not in (1, c):
        raise UserError(f"{found.text} takes images of {c} channels, the data have {shape[2]}")
    _check_image_size(classifier, found.text, shape)
    return classifier


def _adaptation_notes(
    found: NetworkName, classes: int, channels: int, classifier: Classifier
) -> tuple[str, ...]:
    """Lines about where a network differs from the published one."""
    assert found.zoo is not None
    try:
        own = found.zoo.pretrained_config(found.base)
    except UserError:  # Hugging Face's folders may lack what only a teacher needs
        return ()
    notes, theirs = [], len(own.mean)
    if own.count != classes:
        notes.append(
            f"a new last layer for {classes} classes, since the published one is for {own.count}"
        )
    if classifier.channels is None and channels != theirs:
        notes.append(f"first layer adapted from {theirs} to {channels} channels, as timm does")
    return tuple(notes)


def _check_image_size(classifier: Classifier, name: str, shape: Shape) -> None:
    """Refuse a network that cannot take images of this size, now and not after an hour."""
    h, w, c = shape
    was = classifier.training
    try:
        with torch.no_grad():
            classifier.eval()(torch.zeros(1, c, h, w))
    except UserError:  # of the memory
        raise
    except Exception as error:  # they raise whatever they like
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
