"""Load a program saved by `torch.export` as a teacher: `FILE.pt2`.

It returns logits and nothing else: it cannot be trained, and none of its layers can be tapped. The
file may come from anybody: `exported_archive` reads it and `exported_graph` runs it, neither of
which can do more than compute with tensors.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsdistill.harness.errors import UserError, first_line
from kd.models.zoo import exported_archive, exported_graph
from kd.models.zoo.exported_archive import NotAllowed, ProgramArchive
from kd.models.zoo.exported_graph import Graph
from kd.models.zoo.protocol import Shape

SUFFIX = ".pt2"
CARD = "model.json"  # extra file with the program's preprocessing, classes and outputs


class ExportedNetwork(nn.Module):
    """A program that maps images to logits; its mode is the one it was exported in."""

    digest: Tensor

    def __init__(self, archive: ProgramArchive, graph: Graph) -> None:
        """Register the program's tensors as parameters and buffers.

        Args:
            archive: Archive with all tensors that the graph names.
            graph: The program.
        """
        super().__init__()
        self.graph = graph
        # torch allows no dot in the name of a parameter: each is named by its position.
        self._keys = {name: f"tensor_{i}" for i, name in enumerate(sorted(archive.tensors))}
        for name, key in self._keys.items():
            tensor = archive.tensors[name]
            if name in archive.parameters and tensor.is_floating_point():
                self.register_parameter(key, nn.Parameter(tensor))
            else:
                self.register_buffer(key, tensor)
        # Programs with the same weights can differ: with the digest, their states differ too.
        digest = bytearray(hashlib.sha256(archive.text).digest())
        self.register_buffer("digest", torch.frombuffer(digest, dtype=torch.uint8))

    def train(self, mode: bool = True) -> "ExportedNetwork":
        # The mode is part of the program.
        self.training = mode
        return self

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        tensors = {name: getattr(self, key) for name, key in self._keys.items()}
        return exported_graph.run(self.graph, tensors, images)


@dataclass(frozen=True, eq=False)
class ExportedProgram:
    """The content of an exported file.

    Attributes:
        network: The program.
        shape: Height, width and channels of the images it takes; those of `like` in `load` where it
            takes any size.
        classes: Number of outputs.
        card: Description in the form of a run's `model.json`; empty if the exporter wrote none.
    """

    network: ExportedNetwork
    shape: Shape
    classes: int
    card: Mapping[str, Any]


def load(path: Path, like: Shape) -> ExportedProgram:
    """Read a program and run it once.

    Args:
        path: A file that `torch.export.save` wrote.
        like: Shape of the data's images.

    Raises:
        UserError: If the file is missing or damaged, or holds more than a program, or a program
            that does not map any number of images, each independently, to logits.
    """
    archive = exported_archive.read(path)
    try:
        graph = exported_graph.parse(archive.program)
        if lacking := set(graph.inputs.values()) - archive.tensors.keys():
            raise UserError(f"it lacks the tensor {exported_archive.printable(min(lacking))}")
    except NotAllowed as error:
        raise NotAllowed(f"{path} holds more than a program and tensors: {error}") from error
    # A file from elsewhere can be incomplete in many ways.
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a program that can be read: {first_line(error)}") from error
    shape = _input_shape(path, graph, like)
    _run_on_meta_device(path, archive, graph, shape)
    network = ExportedNetwork(archive, graph)
    classes = _check_outputs(path, network, shape)
    return ExportedProgram(network, shape, classes, _parse_card(path, archive.extra.get(CARD, b"")))


def _input_shape(path: Path, graph: Graph, like: Shape) -> Shape:
    """The shape of the images the program takes; the data's where an axis may have any length."""
    if len(graph.axes) != 4:
        raise UserError(f"{path} does not take one batch of images (n, c, h, w)")
    n, *axes = graph.axes
    if n.symbol is None:
        raise UserError(
            f"{path} takes exactly {n.factor} images at once: export it with a dynamic batch size"
        )
    h, w, c = like
    c, h, w = (
        axis.factor if axis.symbol is None else size
        for axis, size in zip(axes, (c, h, w), strict=True)
    )
    return h, w, c


def _run_on_meta_device(path: Path, archive: ProgramArchive, graph: Graph, shape: Shape) -> None:
    """Run the program on the meta device, which takes no memory, before it may allocate any."""
    h, w, c = shape
    tensors = {name: tensor.to("meta") for name, tensor in archive.tensors.items()}
    try:
        with torch.no_grad():
            exported_graph.run(graph, tensors, torch.empty(3, c, h, w, device="meta"))
    except Exception as error:  # an operator may raise anything
        raise UserError(f"{path} cannot take {h}x{w} images: {first_line(error)}") from error


def _check_outputs(path: Path, network: ExportedNetwork, shape: Shape) -> int:
    """Return the number of logits; refuse logits that depend on the other images of a batch."""
    h, w, c = shape
    images = torch.rand(3, c, h, w, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            first, second = network(images[:2]), network(images[[0, 2]])
    except Exception as error:  # a program may raise anything
        raise UserError(f"{path} cannot take {h}x{w} images: {first_line(error)}") from error
    if not isinstance(first, Tensor) or first.ndim != 2 or len(first) != 2:
        raise UserError(f"{path} does not return logits (n, k)")
    if not torch.isfinite(first).all():
        raise UserError(f"{path} returns numbers that are not finite: its weights are damaged")
    # Rounding may differ between batches by some ulp; batch norm in training mode, by far more.
    if not torch.allclose(first[0], second[0], rtol=1e-3, atol=1e-3 * float(first.abs().max())):
        raise UserError(
            f"{path} was exported in training mode: its output for an image depends on the other "
            "images; call eval() on the network before the export"
        )
    return first.shape[1]


def _parse_card(path: Path, text: bytes) -> Mapping[str, Any]:
    if not text:
        return {}
    try:
        card = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the {CARD} inside {path} is not JSON: {error}") from error
    if not isinstance(card, dict):
        raise UserError(f"the {CARD} inside {path} is not a JSON object")
    return card
