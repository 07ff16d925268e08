"""Networks without a head: what stands before the classifier is their output, the embedding.

A student without a head is taught by the features of its teachers alone. Its network keeps the
place of the classifier, an identity, so that a head can be added there later.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dsdistill.harness.errors import UserError
from kd.models import networks
from kd.models.networks import Classifier
from kd.models.saved_models import Model
from kd.models.zoo import embedding_layer
from kd.models.zoo.modes import evaluation_mode
from kd.models.zoo.protocol import Shape

BUILT_CLASSES = embedding_layer.BUILT_CLASSES


def remove_head(name: str, classifier: Classifier, shape: Shape) -> Classifier:
    """Let a network return the input of its classifier.

    Args:
        name: Name of the network in messages.
        classifier: The network, changed in place, before any hook is put on it.
        shape: Height, width and channels of its images.

    Returns:
        The network.

    Raises:
        UserError: If it has no classifier, or several, or does not return a vector without it.
    """
    embedding_layer.remove(name, classifier.network)
    embedding_width(name, classifier, shape)
    return classifier


def without_head(who: str, model: Model, say: Callable[[str], None]) -> Model:
    """Leave the head of a trained model out, where it has one.

    Args:
        who: Name of the model in messages.
        model: The model, whose network is changed in place.
        say: Called with a line that says it.

    Raises:
        UserError: If its network cannot lose its head.
    """
    if not model.has_head:
        return model
    if model.layer_channels:
        raise UserError(
            f"{who} is pruned, and --head none builds its network again: leave --head none out"
        )
    remove_head(who, model.classifier, model.shape)
    say(f"{who}: its head is left out")
    return replace(model, classes=(), outputs="embedding")


def embedding_width(name: str, classifier: Classifier, shape: Shape) -> int:
    """Number of values of an embedding.

    Raises:
        UserError: If the network does not return one vector for each image.
    """
    h, w, c = shape
    like = next(classifier.parameters())
    with evaluation_mode(classifier), torch.no_grad():
        output = classifier(like.new_zeros(1, c, h, w))
    if output.ndim != 2:
        raise UserError(
            f"{name} without its head gives {tuple(output.shape)} for one image, and not a vector: "
            "choose another student"
        )
    return output.shape[1]


def add_head(
    who: str, model: Model, classes: tuple[str, ...], seed: int, say: Callable[[str], None]
) -> Model:
    """Add a classifier with new weights to a network without one.

    Args:
        who: Name of the model in messages.
        model: A model without a head.
        classes: Names of the classes.
        seed: Seed of the weights.
        say: Called with a line that says it.

    Returns:
        A model with a network of its own, whose other weights are those of `model`.
    """
    old = model.classifier
    options: dict[str, Any] = {"seed": seed, "config": old.config, "view": old.view}
    classifier = networks.build(model.name, model.shape, len(classes), **options)
    classifier.interpolation = old.interpolation
    classifier.network.load_state_dict(
        classifier.network.state_dict() | old.network.state_dict(), strict=True
    )
    say(f"{who}: a new head for {len(classes)} classes on its embedding")
    return replace(model, classifier=classifier, classes=classes, outputs="logits")


def is_headless(network: nn.Module) -> bool:
    """Whether `remove_head` has taken the head of a network."""
    return embedding_layer.is_removed(network)
