"""Networks of the user's own code: `module:attribute`, `module:attribute(width=32)`.

The attribute is a class of networks or a function that returns one, called with the arguments
behind its name, or a network that is made already, of which a copy is used. Where the signature
has such names, the data's number of classes is passed as `num_classes`, `n_classes`, `classes` or
`num_labels`, and the channels as `in_channels`, `in_chans`, `input_channels` or `num_channels`.

A name that the user types is imported. A name that stands in a file, as in the description of a
run, is imported only if the user has typed the same name too, see `require_typed`.

A zoo of `kd.models.networks`: it has the functions of `kd.models.zoo.protocol.Zoo`.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dsdistill.harness import imports
from dsdistill.harness.errors import UserError, unknown_name
from dsdistill.harness.imports import ImportedObject
from kd.models.zoo import name_arguments
from kd.models.zoo.modes import evaluation_mode
from kd.models.zoo.protocol import SOURCES, PretrainedConfig, Shape

CLASSES_ARGUMENTS = ("num_classes", "n_classes", "classes", "num_labels")
CHANNELS_ARGUMENTS = ("in_channels", "in_chans", "input_channels", "num_channels")
OPTION = "--trust-module"


def matches(name: str) -> bool:
    """Whether a name has the form `module:attribute`, perhaps with arguments."""
    return imports.is_reference(name.partition("(")[0])


def check(name: str) -> None:
    """Import the object that a name means, and refuse what cannot be a network."""
    _load(name)


def pretrained_config(name: str) -> PretrainedConfig:
    """Refuse: nothing was published."""
    _refuse_published(name)


def origin(name: str) -> str:
    """Refuse: nothing was published."""
    _refuse_published(name)


def network(
    name: str,
    channels: int,
    classes: int,
    *,
    pretrained: bool = False,
    config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a network for images of `channels` channels, where its signature has them."""
    return _build(name, channels, classes, only_required=False)


def network_as_it_is(name: str, channels: int, classes: int) -> nn.Module:
    """Build a network with its own classes and channels where it has any by default."""
    return _build(name, channels, classes, only_required=True)


def input_shape(network: nn.Module, shape: Shape) -> Shape:
    """The shape that a network takes: grayscale images are repeated to three channels if needed."""
    h, w, c = shape
    if c == 1 and not _accepts(network, shape) and _accepts(network, (h, w, 3)):
        return h, w, 3
    return shape


def config(name: str, network: nn.Module) -> dict[str, Any] | None:
    """Values needed beside the name to build the network again: none."""
    return None


def code_digest(name: str) -> str | None:
    """SHA-256 of the file of the module; None where it has none."""
    return _load(name).sha256


def count_outputs(name: str, network: nn.Module, shape: Shape) -> int:
    """The number of scores that a network gives for each image.

    Args:
        name: Its name, for messages.
        network: A module that maps (n, c, h, w) images to logits, or to an object with `logits`.
        shape: Height, width and channels of the images.

    Raises:
        UserError: If it raises, or does not return one row of scores for each image.
    """
    h, w, c = shape
    with _report_errors(name, f"cannot take {h}x{w} images of {c} channels"):
        answer = _run(network, shape)
    scores = getattr(answer, "logits", answer)
    if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != 2:
        got = type(answer).__name__
        if isinstance(scores, Tensor):
            got = f"shape {tuple(scores.shape)}"
        raise UserError(
            f"the network {name} must return scores of shape (2, classes) for 2 images, got {got}"
        )
    return scores.shape[1]


def require_classes(name: str, outputs: int, classes: int) -> None:
    """Refuse a network with another number of scores than classes."""
    if outputs != classes:
        parameters = " or ".join(CLASSES_ARGUMENTS[:2])
        raise UserError(
            f"the network {name} gives {outputs} scores for each image, and there are {classes} "
            f"classes: give it a parameter {parameters}, which is set to {classes}"
        )


def require_typed(where: str, name: str, typed: Iterable[str]) -> None:
    """Refuse to import a name that only a file has.

    Args:
        where: The file, for the message.
        name: The name in the file, without a file of weights.
        typed: Names that the user has typed.

    Raises:
        UserError: If the user has not typed this very name, arguments included.
    """
    if matches(name) and _canonical(name) not in map(_canonical, filter(matches, typed)):
        raise UserError(
            f"{where} names the code {name}, and a file may not choose the code that runs here: "
            f'if that code is yours or you trust it, add {OPTION} "{name}"'
        )


def _load(name: str) -> ImportedObject:
    reference, arguments = _split(name)
    imported = _import(reference)
    if isinstance(imported.value, nn.Module):
        if arguments:
            raise UserError(
                f"{reference} is a network that is made already, and takes no arguments: leave "
                f"{name_arguments.join(arguments)} out"
            )
    elif not callable(imported.value):
        raise UserError(
            f"{reference} is of type {type(imported.value).__name__}: it must be a class of "
            "torch.nn.Module, a function that returns one, or such a module"
        )
    return imported


def _import(reference: str) -> ImportedObject:
    try:
        # Weights that a module draws as it is imported depend on nothing that happened before.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return imports.load("network", reference)
    except UserError as error:
        source = reference.partition(":")[0]
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and missing.name == source.partition(".")[0]:
            raise UserError(
                f"{unknown_name('source of networks', source, SOURCES)}, and there is no module "
                f"{source!r} in the current folder or among the installed packages"
            ) from error
        raise


def _split(name: str) -> tuple[str, dict[str, Any]]:
    """Split a name into `module:attribute` and arguments."""
    start = name.find("(")
    if start < 0:
        return name, {}
    arguments = name_arguments.parse(name[start:])
    if arguments is None:
        raise UserError(
            "the arguments of a network are literals by keyword, as in "
            f"{name[:start]}(width=32), got {name}"
        )
    return name[:start], arguments


def _canonical(name: str) -> tuple[str, str]:
    """The same value for names that differ in the spaces or the order of their arguments."""
    reference, arguments = _split(name)
    return reference, repr(sorted(arguments.items()))


def _build(name: str, channels: int, classes: int, *, only_required: bool) -> nn.Module:
    value = _load(name).value
    if isinstance(value, nn.Module):
        return copy.deepcopy(value)
    reference, arguments = _split(name)
    arguments |= _arguments_of_data(value, arguments, channels, classes, only_required)
    with _report_errors(name, "cannot be made"):
        network = value(**arguments)
    if not isinstance(network, nn.Module):
        raise UserError(
            f"{reference} returns {type(network).__name__}: it must return a torch.nn.Module"
        )
    return network


def _arguments_of_data(
    make: Callable[..., Any],
    given: Mapping[str, Any],
    channels: int,
    classes: int,
    only_required: bool,
) -> dict[str, int]:
    """Numbers of classes and channels for parameters that have such names and are not given."""
    try:
        parameters = inspect.signature(make).parameters
    except (ValueError, TypeError):  # a class of an extension may not say what it takes
        return {}
    values = {}
    for names, value in ((CLASSES_ARGUMENTS, classes), (CHANNELS_ARGUMENTS, channels)):
        present = [name for name in names if name in parameters]
        if not present or any(name in given for name in present):
            continue
        if not only_required or parameters[present[0]].default is inspect.Parameter.empty:
            values[present[0]] = value
    return values


def _accepts(network: nn.Module, shape: Shape) -> bool:
    try:
        _run(network, shape)
    except UserError:  # too large for the memory
        raise
    except Exception:  # which `count_outputs` reports
        return False
    return True


def _run(network: nn.Module, shape: Shape) -> Any:
    """Outputs for two black images, in evaluation mode; the mode is kept."""
    h, w, c = shape
    with evaluation_mode(network), torch.no_grad():
        return network(torch.zeros(2, c, h, w))


@contextmanager
def _report_errors(name: str, what: str) -> Iterator[None]:
    """Turn an error of the user's code into one line."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UserError(f"the network {name} {what}: {imports.describe(error)}") from error


def _refuse_published(name: str) -> NoReturn:
    raise UserError(
        f"{name} is code of yours, for which no weights are published: leave --pretrained out, or "
        f"give weights in a file as {name}@FILE"
    )
