"""A teacher of `kd` for the harness: NumPy images in, NumPy logits out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from dsdistill.harness.checksums import json_digest
from dsdistill.harness.data.mel_images import MelFormat
from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress
from kd.data import batching, teacher_cache
from kd.models import network_names, teachers
from kd.models.teachers import Teacher
from kd.models.zoo import class_names
from kd.models.zoo.protocol import Shape
from kd.parallel import engine

BATCH_SIZE = 500  # images per forward pass


@dataclass(frozen=True, eq=False)
class NumpyTeacher:
    """A frozen teacher as a function from preprocessed images to logits.

    Attributes:
        teacher: The teacher, on its device and in evaluation mode.
        device: Device of the teacher.
        digest: SHA-256 of the teacher's weights and layers.
    """

    teacher: Teacher
    device: torch.device
    digest: str

    def __call__(self, images: Float[np.ndarray, "n h w c"], /) -> Float[np.ndarray, "n k"]:
        with torch.inference_mode(), engine.deterministic():
            parts = [
                self.teacher(batching.to_nchw(images[i : i + BATCH_SIZE]).to(self.device))
                .float()
                .cpu()
                for i in range(0, len(images), BATCH_SIZE)
            ]
        return torch.cat(parts).numpy()


def load(
    name: str,
    preprocess: Preprocess,
    shape: Shape,
    classes: tuple[str, ...],
    device: str = "cpu",
    class_map: Path | None = None,
    typed: Sequence[str] = (),
    mel: MelFormat | None = None,
) -> NumpyTeacher:
    """Load a teacher for images in a given preprocessing.

    Args:
        name: Name or path, as in `kd.models.teachers.load`.
        preprocess: Preprocessing that was applied to the images.
        shape: Height, width and channels of the images.
        classes: Classes of the data, in order.
        device: `cpu`, `auto`, `cuda` or `cuda:N`.
        class_map: File of `--teacher-class-map`, for a teacher with other classes than the data.
        typed: Names that the user has typed, as for `saved_models.load_run`.
        mel: Format of the recordings that the images are of; None for other images.

    Raises:
        UserError: If there is no such teacher, or it does not fit the data.
    """
    if len(network_names.split_names(name)) > 1:
        raise UserError(f"an evaluation compares with one teacher, got {name}: name one of them")
    with engine.temporary(device) as on:
        target = on.device
    mapping = None if class_map is None else class_names.read_class_map(class_map)
    option = "--teacher-class-map"
    teacher = teachers.load(
        name,
        preprocess,
        shape,
        classes,
        class_map=mapping,
        class_map_option=option,
        typed=typed,
        mel=mel,
    )
    for remark in teachers.matching_notes(teacher):
        progress.say(f"teacher {name}: {remark}")
    digest = json_digest([teacher_cache.fingerprint(teacher), teacher_cache.architecture(teacher)])
    return NumpyTeacher(teacher.to(target), target, digest)
