"""Hashes of all that a training depends on besides its options: data, teachers, first weights.

A training that is resumed with other images, another teacher or other first weights would end as a
student that no single command can reproduce. So the hashes are stored at the start and compared
later (`run_folder.Run.require_same`).
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
from kd.assembly import teacher_chain
from kd.assembly.training_parts import TrainingParts
from kd.data import teacher_cache
from kd.data.files.file_source import FileSource
from kd.models import network_names, networks
from kd.models.quantised import quantised_network
from kd.models.teachers import Teacher
from kd.models.zoo import class_names
from kd.options import TrainOptions
from kd.parallel.engine import Engine

DATA_PARTS = ("training images", "validation images", "test images", "distilled set", "texts")
TRANSFER = "transfer images"
ABSENT = "absent"  # in place of a hash, so that appearing or vanishing is a change too


def hashes(parts: TrainingParts, options: TrainOptions) -> dict[str, str]:
    """SHA-256 of everything that a training depends on, by a name for messages.

    Args:
        parts: Parts of the training, before its first step.
        options: Options that the parts were assembled from.
    """
    groups = parts.source.groups
    digests = {} if groups is None else {"class groups": groups.digest}  # labels follow from them
    digests |= _code_hashes(parts) | data_hashes(parts, options)
    if parts.teacher_data is not None:
        splits = parts.teacher_data.source.splits
        assert splits is not None
        images = [images_hash(part) for part in (splits.train, splits.validation, splits.test)]
        digests["the teacher's images"] = hashlib.sha256("".join(images).encode()).hexdigest()
    # By number, since one path can be written in several ways.
    pairs = zip(parts.teacher_names, parts.teachers, strict=True)
    for number, (name, teacher) in enumerate(pairs, 1):
        key = f"teacher {number}" if len(parts.teachers) > 1 else "the teacher"
        digests[key] = teacher_hash(name, teacher)
        digests |= teacher_cache.layer_hash(key, teacher.classifier)
    if options.class_map is not None and not teacher_chain.is_taught_by_chain(options):
        maps = class_names.read_class_maps(options.class_map, parts.teacher_names)
        digests["class map"] = hashlib.sha256(json.dumps(maps).encode()).hexdigest()
    if parts.class_weights is not None:
        digests["class weights"] = parts.class_weights.digest
    # First weights that are drawn from the seed are a function of the options.
    if _has_stored_weights(options.student) or options.pretrained:
        # Not the steps of quantisers, which are computed again on each machine.
        network = quantised_network.float_copy(parts.student.classifier.network)
        digests["the student's first weights"] = teacher_cache.fingerprint(network)
        digests |= teacher_cache.layer_hash("the student", network)
    if _has_stored_weights(options.student) and parts.student.classifier.initial is not None:
        digests["the student's start"] = teacher_cache.fingerprint(parts.student.classifier.initial)
    peers = network_names.split_names(options.peers or "")
    for number, (name, peer) in enumerate(zip(peers, parts.peers, strict=True), 1):
        if _has_stored_weights(name):
            digests[f"the first weights of peer {number}"] = teacher_cache.fingerprint(peer.network)
            digests |= teacher_cache.layer_hash(f"peer {number}", peer.network)
    return digests


def _code_hashes(parts: TrainingParts) -> dict[str, str]:
    """SHA-256 of the modules of networks of the user's own code; not of what they import."""
    known = [("the student", parts.student.classifier)]
    known += [(f"teacher {n}", teacher.classifier) for n, teacher in enumerate(parts.teachers, 1)]
    known += [(f"peer {n}", peer) for n, peer in enumerate(parts.peers, 1)]
    return {
        f"module of {name}": bytes(classifier.code.tolist()).hex()
        for name, classifier in known
        if classifier.code is not None
    }


def data_hashes(parts: TrainingParts, options: TrainOptions) -> dict[str, str]:
    """SHA-256 of the data's parts and, for streamed archives, what the order depends on."""
    source = parts.source
    if isinstance(source, FileSource):
        digests = {
            name: ABSENT if part is None else part.digest
            for name, part in zip(DATA_PARTS, source.parts, strict=False)
        }
        if source.count == 0:
            # Shards are distributed among the processes that read them.
            digests["number of reading processes (--workers)"] = str(parts.readers)
        return digests
    digests = {}
    if source.distilled is not None:
        path = distilled_set.locate(Path(options.data).expanduser())
        digests["distilled set"] = file_digest(path)
    splits = source.splits
    # The digest includes the validation images that are held out of the training images.
    digests["training images"] = ABSENT if splits is None else splits.digest
    digests["validation images"] = ABSENT if splits is None else images_hash(splits.validation)
    digests["test images"] = ABSENT if splits is None else images_hash(splits.test)
    if source.transfer is not None:
        digests[TRANSFER] = images_hash(source.transfer)
    return digests


def images_hash(images: LabeledImages) -> str:
    """SHA-256 of images, labels, their number and the class names."""
    sha = hashlib.sha256(repr((images.shape, images.classes, len(images))).encode())
    sha.update(np.ascontiguousarray(images.labels, "<i8").data)
    for chunk in images.chunks(1024):
        sha.update(np.ascontiguousarray(chunk).data)
    return sha.hexdigest()


def teacher_hash(name: str, teacher: Teacher) -> str:
    """SHA-256 of what a teacher's logits depend on: weights, class order, preprocessing.

    Its adapter is left out, since it follows from the data and is computed again on each machine.
    """
    resolved, outputs = teacher.resolved, teacher.outputs
    numbers = [f"{value:.5g}" for value in (*resolved.mean, *resolved.std, teacher.temperature)]
    sha = hashlib.sha256(teacher_cache.fingerprint(teacher.classifier).encode())
    known = (resolved.kind, resolved.size, resolved.interpolation, numbers)
    sha.update(repr((known, None if outputs is None else outputs.tolist())).encode())
    if teacher.members is not None:
        sha.update(repr(teacher.members.tolist()).encode())
    if Path(name).is_file():  # an exported program is more than its weights
        sha.update(file_digest(Path(name)).encode())
    return sha.hexdigest()


def require_same_inputs(on: Engine, inputs: Mapping[str, str]) -> None:
    """Refuse processes of one training that have different inputs.

    Raises:
        UserError: In every process, if the inputs of any two differ.
    """
    if on.num_processes == 1:
        return
    gathered = gather_object([dict(inputs)])
    first = gathered[0]
    for rank, other in enumerate(gathered):
        different = sorted(name for name in first if other.get(name) != first[name])
        if different:
            raise UserError(
                f"process {rank} has other {different[0]} than process 0: give all processes the "
                "same files"
            )


def require_same_data(folder: Path, stored: Mapping[str, str], inputs: Mapping[str, str]) -> None:
    """Refuse a finished training of a chain that used other data than the next one does.

    Args:
        folder: Folder of the finished training.
        stored: Hashes of the finished training; empty for a run of an earlier version.
        inputs: Hashes of the training that continues from it.

    Raises:
        UserError: If the data differ.
    """
    for name in (*DATA_PARTS, TRANSFER):
        if stored.get(name, inputs.get(name)) != inputs.get(name):
            raise UserError(
                f"{folder} was trained on other {name} than there are now: restore the former "
                "data, or choose another --out"
            )


def _has_stored_weights(name: str | None) -> bool:
    """Whether a network's first weights may come from elsewhere than the seed."""
    if name is None or Path(name).is_dir():
        return name is not None
    return network_names.parse(name).file is not None or networks.is_user_module(name)
