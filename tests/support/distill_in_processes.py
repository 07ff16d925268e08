"""A script around `kd.distill`, to be run by one process or several: writes the student."""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import kd


def network(width: int) -> nn.Module:
    torch.manual_seed(width)
    layers = [nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * width, 10))


def main(out: Path, how: str) -> None:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:200, None] / 16
    data = TensorDataset(images, torch.tensor(digits.target)[:200])
    rank, world = (int(os.environ.get(name, i)) for i, name in enumerate(("RANK", "WORLD_SIZE")))
    if how == "sampled" and world > 1:
        sampler = DistributedSampler(data, world, rank, shuffle=False)
        loader = DataLoader(data, 40 // world, sampler=sampler)
    elif how == "prepared":
        loader = Accelerator(cpu=True).prepare(DataLoader(data, 40 // world))
    else:
        loader = DataLoader(data, 40, shuffle=how == "shared")
    student = network(4)
    rounds = []
    result = kd.distill(
        student,
        network(8),
        loader,
        validation=DataLoader(data, 50),
        loss="ce:1,kd:1,fitnet:1@2",
        epochs=9,
        device="cpu",
        callbacks=lambda each: (rounds.append(each), each.epoch == 2)[1],
        progress=False,
    )
    assert [each.epoch for each in result.history] == [1, 2]
    torch.save((student.state_dict(), len(rounds)), out / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
