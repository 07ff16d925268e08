"""Batches from any iterable of (images, labels): a DataLoader, a list, a generator's class.

What a loader draws at random is a function of (seed, epoch, batch), as everywhere in `kd.data`: the
generators of torch, NumPy and Python are seeded before each batch is fetched. A training that goes
on in the middle of an epoch reads the batches before it again and drops them.
"""

import contextlib
import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import (
    BatchSamplerShard,
    DataLoaderDispatcher,
    DataLoaderShard,
    IterableDatasetShard,
)
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from dsdistill.harness.errors import UserError
from kd.data import batching
from kd.data.batching import Batch

Images = Float[Tensor, "n c h w"]
Labels = Int[Tensor, " n"] | Float[Tensor, "n k"]
Pair = tuple[Images, Labels]

# What `accelerator.prepare` makes of a loader for several processes.
_SHARDS = (BatchSamplerShard, DataLoaderDispatcher, DataLoaderShard, IterableDatasetShard)
_LOADER = 0x10AD  # tells the seeds of a loader from those of a training step
_MAX_SUM_ERROR = 1e-3  # of the probabilities of an image, which half precision may have rounded


@dataclass(frozen=True, eq=False)
class LoaderBatches:
    """The batches of an iterable, as a `BatchSource`.

    A batch of fewer than `least` images takes some from the batch before it, or joins it where
    these are too few for two. Several processes each train on their share of every batch, unless
    the loader gives them images of their own.

    Attributes:
        loader: Iterable of (images, labels); each pass is an epoch.
        sizes: Number of images of each batch of an epoch, over all processes.
        device: Device of the batches.
        classes: Number of classes k.
        mixed: Whether all labels are probabilities, of images that were mixed.
        least: Smallest number of images in a batch.
    """

    loader: Iterable[Any]
    sizes: list[int]
    device: torch.device
    classes: int
    mixed: bool = False
    least: int = batching.MIN_IMAGES_PER_PROCESS

    def __len__(self) -> int:
        return len(self.sizes)

    def epoch(
        self, seed: int, epoch: int, *, first: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Yield an epoch from its batch `first` on; of each batch, the share of process `rank`.

        Raises:
            UserError: If the loader has another number of batches than it said, or one that is not
                (images, labels).
        """
        count = 0
        for count, pair in enumerate(self.read(seed, epoch, rank), 1):
            if count > first:
                yield self.share(pair, rank, world)
        if count != len(self):
            if length(self.loader) is None:
                raise UserError(
                    f"train gave {len(self)} batches when it was counted, and {count} in epoch "
                    f"{epoch + 1}: it must give as many each time"
                )
            raise UserError(
                f"train has a length of {len(self)} batches and gave {count}: correct its __len__"
            )

    def read(self, seed: int, number: int, rank: int) -> Iterator[Pair]:
        """Read the loader once, in a random order that depends on `seed` and `number`."""
        rank = rank if has_own_share(self.loader) else 0
        items = _fetch(self.loader, (seed, number, rank), self.device)
        pairs = map(self._read_pair, items)
        return _fill_small(pairs, self.least, has_known_sizes(self.loader))

    def _read_pair(self, item: Any) -> Pair:
        images, labels = read_pair(item, "train", self.classes)
        if labels.is_floating_point() != self.mixed:
            kinds = ("class numbers", "probabilities")
            raise UserError(
                f"train gave {kinds[not self.mixed]} as labels after {kinds[self.mixed]} in its "
                "first batch: give one kind"
            )
        return images, labels

    def share(self, pair: Pair, rank: int, world: int) -> Batch:
        """Build the batch of a process's share of images and labels."""
        images, labels = pair
        is_sharded = has_own_share(self.loader)
        total = len(labels) * (world if is_sharded else 1)
        if world > 1 and not is_sharded:
            if total < world:
                raise UserError(
                    f"train gave a batch of {total} images to {world} processes: give each one, or "
                    "leave small batches out, as drop_last=True does"
                )
            rows = torch.from_numpy(batching.share_positions(total, rank, world))
            images, labels = images[rows.to(images.device)], labels[rows.to(labels.device)]
        shares = labels if labels.is_floating_point() else None
        batch = Batch(
            images,
            labels if shares is None else labels.argmax(1),
            class_shares=shares,
            total_images=total,
        )
        return batching.move(batch, self.device)


class EndlessBatches:
    """An endless repetition of an iterable without a known length, as a `BatchSource`.

    An epoch is a fixed number of batches, and is read on where the epoch before ended.
    """

    def __init__(self, batches: LoaderBatches) -> None:
        """Repeat the loader of `batches`, of whose `sizes` there are as many as in an epoch."""
        self.batches = batches
        self._stream: Iterator[Pair] = iter(())
        self._position = -1  # number of batches that the stream has given

    @property
    def device(self) -> torch.device:
        return self.batches.device

    @property
    def sizes(self) -> list[int]:
        return self.batches.sizes

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(
        self, seed: int, epoch: int, *, first: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Yield an epoch from its batch `first` on; of each batch, the share of process `rank`."""
        start, end = epoch * len(self) + first, (epoch + 1) * len(self)
        if self._position != start:
            self._stream, self._position = self._repeat(seed, rank), 0
            while self._position < start:
                self._read_one()
        while self._position < end:
            yield self.batches.share(self._read_one(), rank, world)

    def _read_one(self) -> Pair:
        self._position += 1
        return next(self._stream)

    def _repeat(self, seed: int, rank: int) -> Iterator[Pair]:
        for number in itertools.count():
            count = 0
            for count, pair in enumerate(self.batches.read(seed, number, rank), 1):  # noqa: B007
                yield pair
            if not count:
                raise UserError("train gave no batches when it was read again: give it images")


@dataclass(frozen=True, eq=False)
class LoaderEvaluation:
    """The batches of an iterable, to evaluate on; the same random draws each time.

    Attributes:
        loader: Iterable of (images, labels).
        device: Device of the batches.
        classes: Number of classes.
    """

    loader: Iterable[Any]
    device: torch.device
    classes: int

    def in_order(self, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Yield every `world`-th batch from batch `rank` on; all, if the loader has only those."""
        if has_own_share(self.loader):
            rank, world = 0, 1
        items = _fetch(self.loader, (0, 0, 0), self.device)
        for item in itertools.islice(items, rank, None, world):
            images, labels = read_pair(item, "validation", self.classes)
            labels = labels.argmax(1) if labels.is_floating_point() else labels
            yield batching.move(Batch(images, labels), self.device)


def read_pair(item: Any, name: str, classes: int | None = None) -> Pair:
    """Check one batch of a user's loader.

    Args:
        item: What the loader gave.
        name: Name of the loader, for messages.
        classes: Number of classes; None if it is not known yet.

    Returns:
        Images (n, c, h, w) in float32, and labels: int64 (n,), or probabilities (n, k).

    Raises:
        UserError: If it is not a batch of images and labels.
    """
    if isinstance(item, Mapping):
        fields = ", ".join(map(str, item))
        raise _not_a_pair(name, f"a dict of {fields}")
    if not isinstance(item, list | tuple) or len(item) != 2:
        count = f" of {len(item)}" if isinstance(item, list | tuple) else ""
        raise _not_a_pair(name, f"a {type(item).__name__}{count}")
    images, labels = item
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise _not_a_pair(name, f"{type(images).__name__} and {type(labels).__name__}")
    if images.ndim != 4 or not images.is_floating_point():
        raise UserError(
            f"{name} must give images as floating-point tensors (n, c, h, w), got "
            f"{tuple(images.shape)} of {images.dtype}{_dataset_remedy(images, labels)}"
        )
    if len(images) != len(labels):
        raise UserError(f"{name} gave {len(images)} images and {len(labels)} labels in one batch")
    return images.float(), _read_labels(labels, name, classes)


def _dataset_remedy(images: Tensor, labels: Tensor) -> str:
    single = images.ndim == 3 and labels.ndim == 0
    return ": wrap a data set in a DataLoader" if single else ""


def _not_a_pair(name: str, got: str) -> UserError:
    return UserError(
        f"{name} must give batches of two tensors, (images, labels), got {got}: wrap a data set in "
        "a DataLoader, map other batches in its collate_fn, and give a single batch as "
        "[(images, labels)]"
    )


def _read_labels(labels: Tensor, name: str, classes: int | None) -> Labels:
    if labels.is_floating_point():
        if labels.ndim != 2 or (classes is not None and labels.shape[1] != classes):
            k = "k" if classes is None else classes
            raise UserError(
                f"{name} must give class numbers (n,), or probabilities (n, {k}), got labels "
                f"{tuple(labels.shape)} of {labels.dtype}"
            )
        if not bool((labels.sum(1) - 1).abs().max() < _MAX_SUM_ERROR) or bool(labels.min() < 0):
            raise UserError(
                f"{name} must give labels that are probabilities: 0 or more, and the sum for each "
                "image 1"
            )
        return labels.float()
    if labels.ndim != 1 or labels.dtype == torch.bool:
        raise UserError(
            f"{name} must give class numbers (n,), or probabilities (n, k), got labels "
            f"{tuple(labels.shape)} of {labels.dtype}"
        )
    # On a GPU this would wait for the device at every step.
    if classes is not None and labels.device.type == "cpu" and len(labels):
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise UserError(
                f"{name} gave the label {wrong}, and the student has outputs for 0 to {classes - 1}"
            )
    return labels.long()


def first_pair(loader: Iterable[Any], name: str) -> Pair:
    """Read the first batch of an iterable, which must give the same batches when it is read again.

    Raises:
        UserError: If it can be read only once, or has no batch of images and labels.
    """
    try:
        iterator = iter(loader)
    except TypeError as error:
        raise UserError(
            f"{name} must be an iterable of (images, labels), such as a DataLoader or a list, got "
            f"{type(loader).__name__}"
        ) from error
    if iterator is loader:
        raise UserError(
            f"{name} is an iterator, which can be read only once: give a DataLoader, a list, or an "
            "object whose __iter__ starts anew"
        )
    for item in iterator:
        return read_pair(item, name)
    raise UserError(f"{name} has no batches")


def length(loader: Iterable[Any]) -> int | None:
    """Number of batches of an iterable; None if only reading it tells."""
    try:
        return len(loader)  # pyright: ignore[reportArgumentType]
    except (TypeError, NotImplementedError):  # a DataLoader of a dataset without a length
        return None


def batch_sizes(loader: Iterable[Any], first: int, least: int) -> list[int]:
    """Number of images of each batch of an epoch, as far as it can be known.

    The batches of a list and of an ordinary DataLoader are known. Others count as large as the
    first, and one without a length is read once from front to back.

    Args:
        loader: The iterable.
        first: Number of images of its first batch.
        least: Smallest number of images in a batch.
    """
    count = length(loader)
    if count is None:
        items = _fetch(loader, (0, 0, 0), torch.device("cpu"))
        sizes = [len(read_pair(item, "train")[1]) for item in items]
    elif isinstance(loader, Sequence):
        sizes = [len(read_pair(item, "train")[1]) for item in loader]
    else:
        sizes = [first] * count
        if images := _count_images(loader):
            sizes[-1] = images - first * (count - 1)
    filled = sizes[:1]
    for size in sizes[1:]:
        moved = _count_moved(filled[-1], size, least, has_known_sizes(loader))
        filled[-1] -= moved
        if size + moved:
            filled.append(size + moved)
    return filled


def has_known_sizes(loader: Iterable[Any]) -> bool:
    """Whether the size of each batch of a loader is known before a training."""
    return length(loader) is None or isinstance(loader, Sequence) or bool(_count_images(loader))


def _count_images(loader: Iterable[Any]) -> int:
    """Number of images in an epoch of an ordinary DataLoader; 0 if unknown."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return 0
    sampler = loader.batch_sampler
    if type(sampler) is not BatchSampler:
        return 0
    count = len(sampler.sampler)  # pyright: ignore[reportArgumentType]
    return count - count % sampler.batch_size if sampler.drop_last else count


def has_own_share(loader: Iterable[Any]) -> bool:
    """Whether a loader gives each of several processes images of its own."""
    return any(isinstance(part, (DistributedSampler, *_SHARDS)) for part in _parts(loader))


@contextlib.contextmanager
def preserve_random_state(*loaders: Iterable[Any] | None) -> Iterator[None]:
    """Restore all that reading a loader changes: torch's, NumPy's, Python's and its generators."""
    generators = [g for loader in loaders if loader is not None for g in _generators(loader)]
    states = [generator.get_state() for generator in generators]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def _fetch(loader: Iterable[Any], key: tuple[int, int, int], device: torch.device) -> Iterator[Any]:
    """Yield a loader's items; what it draws for each is a function of the key and the number.

    Args:
        loader: The iterable.
        key: Seed, number of the pass, and process.
        device: Device whose generator is seeded too.
    """
    seed, number, rank = key
    for part in _parts(loader):
        if hasattr(part, "set_epoch"):
            part.set_epoch(number)
    # Accelerate's shards are parts of one order.
    order = 0 if any(isinstance(part, _SHARDS) for part in _parts(loader)) else rank
    start = batching.derive_seed(seed, number, order, _LOADER)
    for generator in _generators(loader):
        generator.manual_seed(start)
    _seed_all(start, device)
    iterator = iter(loader)
    for count in itertools.count(1):
        _seed_all(batching.derive_seed(seed, number, rank, _LOADER, count), device)
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield item


def _fill_small(pairs: Iterable[Pair], least: int, join: bool) -> Iterator[Pair]:
    """Move images between a batch of too few and the batch before it, see `_count_moved`."""
    held: Pair | None = None
    for pair in pairs:
        if held is not None:
            moved = _count_moved(len(held[1]), len(pair[1]), least, join)
            if moved:
                both = [torch.cat(parts) for parts in zip(held, pair, strict=True)]
                at = len(held[1]) - moved
                held, pair = (both[0][:at], both[1][:at]), (both[0][at:], both[1][at:])
            if not len(pair[1]):
                continue
            yield held
        held = pair
    if held is not None:
        yield held


def _count_moved(before: int, size: int, least: int, join: bool) -> int:
    """Number of images that a batch takes from the one before it.

    It is negative, `-size`, where they become one batch.

    Args:
        before: Number of images in the batch before it.
        size: Number of images in the batch.
        least: Smallest number of images in a batch.
        join: Whether two batches with too few images for two may become one.
    """
    if size >= least or before < least:
        return 0
    return least - size if before + size >= 2 * least else -size if join else 0


def _seed_all(seed: int, device: torch.device) -> None:
    batching.seed_torch(seed, device)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def _parts(loader: Iterable[Any]) -> list[Any]:
    """The loader, its dataset and its samplers."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    inner = getattr(batch_sampler, "batch_sampler", None)  # of Accelerate's shard
    parts = [
        loader,
        getattr(loader, "dataset", None),
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
        inner,
        getattr(inner, "sampler", None),
    ]
    return list({id(part): part for part in parts if part is not None}.values())


def _generators(loader: Iterable[Any]) -> list[torch.Generator]:
    candidates = (getattr(part, "generator", None) for part in _parts(loader))
    return [generator for generator in candidates if isinstance(generator, torch.Generator)]
