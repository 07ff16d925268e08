"""A distilled set for programs that do not read `.safetensors`."""

from pathlib import Path
from typing import Any

import numpy as np

from dsdistill.harness import artifact
from dsdistill.harness.artifact import Distilled
from dsdistill.harness.errors import UserError

SUFFIX = {"folder": "", "npz": ".npz", "torch": ".pt"}


def write(path: Path, kind: str, out: Path | None) -> Path:
    """Export a set.

    `folder` writes 8-bit PNGs for the eye: the preprocessing is undone, values beyond black and
    white are clipped, and real-valued labels are reduced to their largest class. `npz` and
    `torch` keep every number: `images` as the kernel saw them, `labels`, and `pixels`, the images
    with the preprocessing undone.

    Args:
        path: The set's file, or its run's folder.
        kind: `folder`, `npz` or `torch`.
        out: Where; by default beside the file.

    Returns:
        What was written.

    Raises:
        UserError: If the set cannot be read, or `out` exists.
    """
    file = artifact.locate(path)
    distilled = artifact.load(file)
    out = out or file.with_name(f"{file.stem}-{kind}{SUFFIX[kind]}")
    if out.exists():
        raise UserError(f"{out} exists already: choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        _write_folder(out, distilled)
    elif kind == "npz":
        with out.open("wb") as opened:  # savez would append its own suffix to a path
            np.savez_compressed(opened, **_named(distilled))
    else:
        import torch

        torch.save({name: torch.from_numpy(a) for name, a in _arrays(distilled).items()}, out)
    return out


def _named(distilled: Distilled) -> dict[str, Any]:
    return {"classes": np.array(distilled.classes), **_arrays(distilled)}


def _arrays(distilled: Distilled) -> dict[str, np.ndarray]:
    return {
        "images": distilled.images,
        "labels": distilled.labels,
        "pixels": distilled.preprocess.invert(distilled.images),
        "mean": distilled.preprocess.mean,
        "std": distilled.preprocess.std,
    }


def _write_folder(out: Path, distilled: Distilled) -> None:
    from PIL import Image

    pixels = distilled.preprocess.invert(distilled.images)
    bytes_ = np.round(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    for index, (image, label) in enumerate(zip(bytes_, distilled.hard_labels, strict=True)):
        # A class name is a folder's name: "T-shirt/top" must not make two folders.
        folder = out / distilled.classes[label].replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
            folder / f"{index:05}.png"
        )
