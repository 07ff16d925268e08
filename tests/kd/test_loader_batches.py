"""Batches of a user's loader for several processes."""

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from dsdistill.harness.errors import UserError
from kd.data import batching, loader_batches
from kd.data.loader_batches import LoaderBatches

CPU = torch.device("cpu")


def dataset(n: int) -> TensorDataset:
    return TensorDataset(torch.arange(n).float().reshape(n, 1, 1, 1), torch.arange(n) % 2)


def numbers(batches: list[tuple[Tensor, Tensor]]) -> list[int]:
    return [int(x) for images, _ in batches for x in images.flatten()]


@pytest.mark.parametrize("seedable", [False, True])
def test_a_prepared_loader_gives_each_process_a_share_of_one_order(seedable: bool) -> None:
    loaders = [
        prepare_data_loader(
            DataLoader(dataset(32), 4, shuffle=True),
            num_processes=2,
            process_index=rank,
            use_seedable_sampler=seedable,
        )
        for rank in range(2)
    ]
    assert all(map(loader_batches.has_own_share, loaders))
    shares = []
    for rank, loader in enumerate(loaders):
        batches = LoaderBatches(loader, [8] * 4, CPU, 2)
        shares.append(numbers(list(batches.read(0, 3, rank))))
        assert [len(batch) for batch in batches.epoch(0, 3, rank=rank, world=2)] == [4] * 4
    assert sorted(shares[0] + shares[1]) == list(range(32))


def test_a_prepared_stream_has_its_own_share() -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(dataset(16))

    loader = prepare_data_loader(DataLoader(Stream(), 4), num_processes=2, process_index=1)
    assert loader_batches.has_own_share(loader)
    assert not loader_batches.has_own_share(DataLoader(Stream(), 4))


def test_a_last_batch_that_is_too_small_to_fill_joins_the_one_before() -> None:
    for loader in (
        DataLoader(dataset(19), 8),
        list(DataLoader(dataset(19), 8)),
    ):
        least = batching.min_shared_size(4)
        sizes = loader_batches.batch_sizes(loader, 8, least)
        batches = LoaderBatches(loader, sizes, CPU, 2, least=least)
        assert sizes == [8, 11]
        shares = [[len(b) for b in batches.epoch(0, 0, rank=r, world=4)] for r in range(4)]
        assert [sum(each) for each in zip(*shares, strict=True)] == sizes
        assert min(map(min, shares)) >= 2
    singles = DataLoader(dataset(3), 1)
    assert loader_batches.batch_sizes(singles, 1, 2) == [1, 1, 1]


def test_a_batch_with_nothing_for_a_process_is_refused() -> None:
    batches = LoaderBatches([], [3], CPU, 2)
    with pytest.raises(UserError, match="train gave a batch of 3 images to 4 processes"):
        batches.share(next(iter(DataLoader(dataset(3), 3))), 0, 4)


def test_a_stream_that_has_a_length_has_no_known_last_batch() -> None:
    class Sized(IterableDataset):
        def __len__(self) -> int:
            return 10

        def __iter__(self):
            return iter(dataset(10))

    assert loader_batches.batch_sizes(DataLoader(Sized(), 4), 4, 2) == [4, 4, 4]


def test_sampled_batches_are_counted_over_all_processes() -> None:
    sampler = DistributedSampler(dataset(20), 2, 0, shuffle=False)
    loader = DataLoader(dataset(20), 4, sampler=sampler)
    assert loader_batches.batch_sizes(loader, 4, 2) == [4, 4, 2]
