"""The classifier of any network, whose input is the embedding; and networks without one."""

from collections.abc import Callable
from typing import Any

from torch import nn

from dsdistill.harness.errors import UserError

EMBEDDING = "embedding"  # the input of the classifier, even if a layer has this name
BUILT_CLASSES = 2  # classes with which a network is built that then loses its head
_MARK = "returns_embedding"  # attribute of a network without a head


def find_classifier(network: nn.Module) -> nn.Module:
    """The last linear layer of a network, unless it names another.

    Raises:
        UserError: If there is none.
    """
    classifier = _own_classifier(network)
    if isinstance(classifier, tuple):  # DeiT: the heads of the class and of the distillation token
        classifier = classifier[0]
    if isinstance(classifier, nn.Module):
        return classifier
    body = getattr(network, "base_model", None)  # of Hugging Face; some define it after the head
    within = set(body.modules()) if isinstance(body, nn.Module) and body is not network else set()
    for modules in ([m for m in network.modules() if m not in within], list(network.modules())):
        for kind in (nn.Linear, nn.Conv2d):
            last = [module for module in modules if isinstance(module, kind)]
            if last:
                return last[-1]
    raise UserError(
        f"{type(network).__name__} has no linear layer, so no {EMBEDDING!r}: name a layer instead, "
        "such as output"
    )


def remove(name: str, network: nn.Module) -> None:
    """Put an identity in the place of a network's classifier, and mark the network.

    Args:
        name: Name of the network in messages.
        network: The network, changed in place.

    Raises:
        UserError: If it has no classifier, or several.
    """
    if isinstance(_own_classifier(network), tuple):
        raise UserError(f"{name} has several heads, which cannot be left out: choose another one")
    classifier = find_classifier(network)
    for path, module in list(network.named_modules()):
        if module is classifier:
            if not path:
                raise UserError(f"{name} is a single layer: nothing is left without its head")
            network.set_submodule(path, nn.Identity())
            setattr(network, _MARK, True)
            return
    raise UserError(f"{name} hides its classifier: choose another student")


def is_removed(network: nn.Module) -> bool:
    """Whether `remove` has taken a network's classifier, so that it returns its embedding."""
    return getattr(network, _MARK, False) is True


def _own_classifier(network: nn.Module) -> Any:
    """What the network itself calls its classifier; None where it does not say."""
    methods = (getattr(module, "get_classifier", None) for module in network.modules())
    get_classifier = next((method for method in methods if isinstance(method, Callable)), None)
    return get_classifier() if get_classifier else None
