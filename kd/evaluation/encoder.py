"""A backbone as a differentiable function of arrays: images to features, gradients back."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dsdistill.harness.data import feature_file
from dsdistill.harness.data.datasets import Splits
from kd.data import batching
from kd.evaluation import backbones, extraction, image_sets
from kd.evaluation.backbones import FeatureNetwork
from kd.evaluation.extraction import Extraction
from kd.evaluation.features import resize_plain
from kd.models import network_names
from kd.models.zoo.protocol import Shape
from kd.parallel import engine

Pullback = Callable[[Float[np.ndarray, "n d"]], Float[np.ndarray, "n h w c"]]
# Images at a time. The pixels that are learned depend on it to the last bit: with another number a
# run that was stopped would go on otherwise.
CHUNK = 128
VERSIONED_PACKAGES = ("torch", "timm", "torchvision")


@dataclass(frozen=True, eq=False)
class Encoder:
    """Images in [0, 1] to the features of a frozen backbone, in chunks of bounded memory.

    Images are resized as `kd features` does with those of an array.

    Attributes:
        name: Name in messages and reports.
        backbone: The network, on its device.
        device: Device of the network.
    """

    name: str
    backbone: FeatureNetwork
    device: torch.device

    @property
    def width(self) -> int:
        """Number of values d of a feature."""
        return self.backbone.width

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the images that the network sees."""
        return self.backbone.inputs.size

    @property
    def channels(self) -> int:
        """Channels of these images."""
        return self.backbone.channels

    @property
    def accelerator(self) -> str | None:
        """Name of the GPU; None on the CPU."""
        on_cpu = self.device.type == "cpu"
        return None if on_cpu else torch.cuda.get_device_name(self.device)

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that the features depend on besides the images, with device and versions."""
        versions = {package: version(package) for package in VERSIONED_PACKAGES}
        return self.record() | {"device": self.device.type, "versions": versions}

    def record(self) -> dict[str, Any]:
        """All that the features depend on besides the images, JSON-compatible."""
        return dict(self._record)

    @functools.cached_property
    def _record(self) -> dict[str, Any]:
        return self.backbone.record()  # hashes the weights

    def __call__(self, images: Float[np.ndarray, "n h w c"], /) -> Float[np.ndarray, "n d"]:
        """Features of images of any size, which are resized to that of the backbone."""
        with torch.inference_mode(), engine.deterministic():
            rows = [self._forward(chunk)[1].cpu().numpy() for chunk in _chunks(images)]
        return np.concatenate(rows)

    def with_pullback(
        self, images: Float[np.ndarray, "n h w c"]
    ) -> tuple[Float[np.ndarray, "n d"], Pullback]:
        """Features, and the function from their gradient to that of the images.

        Of more than one chunk, the activations are not kept: each is evaluated again.
        """
        chunks = _chunks(images)
        if len(chunks) == 1:
            with engine.deterministic():
                inputs, rows = self._forward(chunks[0], differentiable=True)
            return rows.detach().cpu().numpy(), lambda slope: self._backward(inputs, rows, slope)

        def pullback(slope: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n h w c"]:
            slopes, start = [], 0
            for chunk in chunks:
                with engine.deterministic():
                    inputs, rows = self._forward(chunk, differentiable=True)
                slopes.append(self._backward(inputs, rows, slope[start : start + len(chunk)]))
                start += len(chunk)
            return np.concatenate(slopes)

        return self(images), pullback

    def extract(
        self, path: Path | None, splits: Splits, *, views: int, min_scale: float, seed: int
    ) -> feature_file.Features:
        """Features of all images, written to a file in the folder of a run, or read there.

        Args:
            path: The file, in a folder that this process has locked; None to keep them in memory.
            splits: The images.
            views: Views of each training image: the plain one, and random ones.
            min_scale: Smallest share of an image's area in a random view.
            seed: Seed of the random views.

        Raises:
            UserError: If the file was made of something else, or does not fit on the disk.
            KeyboardInterrupt: If stopped, after the features so far are safe.
        """
        parts = [splits.train, splits.validation, splits.test]
        images = image_sets.of_parts(splits.name, parts, splits.digest)
        what = Extraction(
            images,
            self.backbone,
            self.device,
            splits.name,
            views,
            min_scale,
            seed=seed,
        )
        return extraction.compute(what) if path is None else extraction.write_in_run(path, what)

    def _forward(
        self, images: Float[np.ndarray, "n h w c"], *, differentiable: bool = False
    ) -> tuple[Tensor, Tensor]:
        # Whatever the caller's own program has set.
        with torch.set_grad_enabled(differentiable):
            inputs = batching.to_nchw(images).to(self.device).requires_grad_(differentiable)
            seen = resize_plain(inputs, self.backbone.inputs)
            return inputs, self.backbone(seen).float()

    def _backward(
        self, inputs: Tensor, rows: Tensor, slope: Float[np.ndarray, "n d"]
    ) -> Float[np.ndarray, "n h w c"]:
        with engine.deterministic():
            given = torch.from_numpy(np.array(slope, np.float32)).to(rows)
            [images] = torch.autograd.grad(rows, inputs, given)
        return images.permute(0, 2, 3, 1).cpu().numpy()


def _chunks(images: Float[np.ndarray, "n h w c"]) -> list[Float[np.ndarray, "m h w c"]]:
    return [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]


def load(
    name: str,
    layer: str,
    shape: Shape,
    *,
    label: str | None = None,
    device: str = "cpu",
    convertible: bool = False,
    typed: Iterable[str] = (),
    trust_module: str | None = None,
) -> Encoder:
    """Load a trained network as an encoder.

    Args:
        name, layer, shape, convertible, typed: As for `backbones.load`.
        label: Name in messages and reports; by default `name`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        trust_module: Further names that the user has typed, separated by commas.

    Raises:
        UserError: As `backbones.load`, or if there is no such device.
    """
    backbones.check_name(name)
    target = backbones.device(device)
    typed = [*typed, *network_names.names_in(trust_module)]
    backbone = backbones.load(name, layer, shape, convertible=convertible, typed=typed)
    return Encoder(label or name, backbone.to(target), target)
