"""What a training depends on beside its options, as hashes: data, teachers, the student's start.

A training that is resumed onto other images, another teacher or another start would end as a
student that no single command can make, so the hashes are stored at the start and compared later
(`runs.Run.require_same`).
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object

from dsdistill.harness.checksums import file_digest
from dsdistill.harness.data import distilled_set
from dsdistill.harness.data.labeled_images import LabeledImages
from dsdistill.harness.errors import UserError
from kd.commands import teacher_chain
from kd.commands.training_parts import TrainingParts
from kd.data import teacher_cache
from kd.data.files.file_source import FileSource
from kd.models import networks
from kd.models.teachers import Teacher
from kd.models.zoo import class_names
from kd.options import TrainOptions
from kd.parallel.engine import Engine

DATA_PARTS = ("training images", "validation images", "test images", "distilled set")
ABSENT = "absent"  # a hash of what is not there: that it comes or goes is a change too


def hashes(parts: TrainingParts, options: TrainOptions) -> dict[str, str]:
    """SHA-256 of everything that a training depends on, by a name for people.

    Args:
        parts: Before the first step.
        options: That they were made from.
    """
    found = data_hashes(parts, options)
    # By number: a name may be another way to write the same path.
    for number, (name, teacher) in enumerate(zip(parts.taught_by, parts.teachers, strict=True), 1):
        which = f"teacher {number}" if len(parts.teachers) > 1 else "the teacher"
        found[which] = teacher_hash(name, teacher)
    if options.class_map is not None and not teacher_chain.is_taught_by_chain(options):
        maps = class_names.read_class_maps(options.class_map, parts.taught_by)
        found["class map"] = hashlib.sha256(json.dumps(maps).encode()).hexdigest()
    # A start from a seed is a function of the options.
    if _has_stored_weights(options.student) or options.pretrained:
        found["the student's first weights"] = teacher_cache.fingerprint(
            parts.student.classifier.network
        )
    peers = networks.split_names(options.peers or "")
    for number, (name, peer) in enumerate(zip(peers, parts.peers, strict=True), 1):
        if _has_stored_weights(name):
            found[f"the first weights of peer {number}"] = teacher_cache.fingerprint(peer.network)
    return found


def data_hashes(parts: TrainingParts, options: TrainOptions) -> dict[str, str]:
    """SHA-256 of the data's parts and, of streamed archives, what their order depends on."""
    source = parts.source
    if isinstance(source, FileSource):
        found = {
            name: ABSENT if part is None else part.digest
            for name, part in zip(DATA_PARTS, source.parts, strict=False)
        }
        if source.count == 0:
            # Shards are shared out among the processes that read.
            found["number of reading processes (--workers)"] = str(options.readers)
        return found
    found = {}
    if source.distilled is not None:
        path = distilled_set.locate(Path(options.data).expanduser())
        found["distilled set"] = file_digest(path)
    splits = source.splits
    # Of the training images with those that are held out of them.
    found["training images"] = ABSENT if splits is None else splits.digest
    found["validation images"] = ABSENT if splits is None else images_hash(splits.validation)
    found["test images"] = ABSENT if splits is None else images_hash(splits.test)
    return found


def images_hash(images: LabeledImages) -> str:
    """SHA-256 of images, labels, their number and the class names."""
    sha = hashlib.sha256(repr((images.shape, images.classes, len(images))).encode())
    sha.update(np.ascontiguousarray(images.labels, "<i8").data)
    for chunk in images.chunks(1024):
        sha.update(np.ascontiguousarray(chunk).data)
    return sha.hexdigest()


def teacher_hash(name: str, teacher: Teacher) -> str:
    """SHA-256 of what a teacher answers with: weights, order of classes, its own preprocessing.

    Not of its adapter, which follows from the data and is computed anew on each machine.
    """
    resolved, outputs = teacher.resolved, teacher.outputs
    numbers = [f"{value:.5g}" for value in (*resolved.mean, *resolved.std, teacher.temperature)]
    sha = hashlib.sha256(teacher_cache.fingerprint(teacher.classifier).encode())
    known = (resolved.kind, resolved.size, resolved.interpolation, numbers)
    sha.update(repr((known, None if outputs is None else outputs.tolist())).encode())
    if Path(name).is_file():  # an exported program is more than its weights
        sha.update(file_digest(Path(name)).encode())
    return sha.hexdigest()


def require_same_inputs(on: Engine, inputs: Mapping[str, str]) -> None:
    """Refuse processes of one training that have different inputs; in all of them alike.

    Raises:
        UserError: If they have.
    """
    if on.num_processes == 1:
        return
    each = gather_object([dict(inputs)])
    for rank, other in enumerate(each):
        different = sorted(name for name in each[0] if other.get(name) != each[0][name])
        if different:
            raise UserError(
                f"process {rank} has other {different[0]} than process 0: give all of them the "
                "same files"
            )


def require_same_data(folder: Path, stored: Mapping[str, str], inputs: Mapping[str, str]) -> None:
    """Refuse a finished training of a chain that was trained on other data than the next one.

    Args:
        folder: Of the finished training.
        stored: Its hashes; none of a run of an earlier version.
        inputs: Hashes of the training that goes on from it.

    Raises:
        UserError: If it was.
    """
    for name in DATA_PARTS:
        if stored.get(name, inputs.get(name)) != inputs.get(name):
            raise UserError(
                f"{folder} was trained on other {name} than there are now: put back what they "
                "were, or choose another --out"
            )


def _has_stored_weights(name: str | None) -> bool:
    """Whether a network's first weights are those of a run or a file."""
    return name is not None and (Path(name).is_dir() or networks.parse(name).file is not None)
