"""An optimizer and a schedule of the user's in `kd.distill`: rates, resumption, what is stored."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import kd
from kd.training import steps

ROUNDS = 4


@pytest.fixture
def train() -> list[tuple[Tensor, Tensor]]:
    numbers = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 1, 4, 4, generator=numbers), torch.arange(8) % 2) for _ in range(5)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))


def distill(student: nn.Module, train, **options) -> kd.DistillResult:
    return kd.distill(student, None, train, progress=False, device="cpu", **options)


def own(student: nn.Module, steps: int = 20, **options) -> dict:
    optimizer = torch.optim.SGD(student.parameters(), **{"lr": 0.1, **options})
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return {"optimizer": optimizer, "scheduler": scheduler, "scheduler_every": "step"}


def test_a_longer_schedule_has_its_own_rates_from_the_checkpoint_on(train, tmp_path: Path) -> None:
    path, short, longer = tmp_path / "a.ckpt", network(), network()
    distill(short, train, epochs=4, checkpoint=path, **own(short))
    rounds = distill(longer, train, epochs=8, checkpoint=path, **own(longer, 40)).history
    plain = network()
    expected = distill(plain, train, epochs=8, **own(plain, 40)).history
    assert [each.lr for each in rounds[4:]] == [each.lr for each in expected[4:]]


def test_another_optimizer_or_schedule_is_refused_on_resume(train, tmp_path: Path) -> None:
    path, student = tmp_path / "a.ckpt", network()
    distill(student, train, epochs=1, checkpoint=path, **own(student))

    def refused(message: str, **arguments) -> None:
        with pytest.raises(kd.UserError, match=message):
            distill(student, train, epochs=2, checkpoint=path, **arguments)

    refused("made with initial_lr of group 1 0.1, and this call has 0.2", **own(student, lr=0.2))
    refused("weight_decay of group 1 0, and this call has 0.1", **own(student, weight_decay=0.1))
    arguments = own(student)
    refused("scheduler CosineAnnealingLR, and this call has None",
            optimizer=torch.optim.SGD(student.parameters(), lr=0.1))  # fmt: skip
    refused("scheduler_every step, and this call has epoch",
            **arguments | {"scheduler_every": "epoch"})  # fmt: skip
    scheduler = lr_scheduler.StepLR(arguments["optimizer"], 1)
    refused("and this call has StepLR", **arguments | {"scheduler": scheduler})
    arguments = own(student)
    for _ in range(9):
        arguments["optimizer"].step()
        arguments["scheduler"].step()
    refused("scheduler has taken 9 steps, and 5 at the checkpoint's step 5", **arguments)
    distill(student, train, epochs=2, checkpoint=path, **own(student))


def test_what_cannot_be_stored_is_refused_before_the_first_step(train, tmp_path: Path) -> None:
    student, taken = network(), []

    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                self.state[group["params"][0]]["odd"] = [torch.zeros(1)]

    functional = torch.optim.SGD(student.parameters(), lr=0.1)
    functional.param_groups[0]["measure"] = len
    for optimizer, message in (
        (functional, "optimizer has a builtin_function_or_method as measure of group 1"),
        (Odd(student.parameters(), lr=0.1), "optimizer Odd has a list as the state odd"),
    ):
        with pytest.raises(kd.UserError, match=message):
            distill(student, train, epochs=1, optimizer=optimizer, callbacks=taken.append,
                    checkpoint=tmp_path / "a.ckpt")  # fmt: skip
        distill(student, train, epochs=1, optimizer=optimizer)
    assert not taken


def test_gradients_do_not_add_up_in_what_an_optimizer_leaves_out(train, monkeypatch) -> None:
    student, norms = network(), []
    update = steps.Trainer.update

    def measured(trainer, *rest):
        terms = update(trainer, *rest)
        norms.append(next(student.parameters()).grad.norm().item())
        return terms

    monkeypatch.setattr(steps.Trainer, "update", measured)
    optimizer = torch.optim.SGD(student[3].parameters(), lr=0.0)
    distill(student, train[:1], epochs=3, optimizer=optimizer, clip=1e3)
    assert norms == [norms[0]] * 3


def test_a_schedule_takes_a_step_after_the_last_epoch_too(train) -> None:
    student = network()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    options = {"epochs": 1, "optimizer": optimizer, "scheduler": scheduler}
    rates = [distill(student, train, **options).history[0].lr for _ in range(3)]
    assert rates == [0.1, 0.05, 0.025]
    assert scheduler.last_epoch == 3


@pytest.mark.parametrize("answer", [True, np.True_])
def test_a_training_that_a_callback_ended_stays_ended(train, tmp_path: Path, answer) -> None:
    options = {"checkpoint": tmp_path / "a.ckpt", "callbacks": lambda each: answer}
    for _ in range(2):
        assert distill(network(), train, epochs=4, **options).epochs == 1
    assert distill(network(), train, epochs=5, **options).epochs == 2


def test_an_endless_training_goes_on_with_more_steps(tmp_path: Path) -> None:
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield torch.randn(1, 4, 4), torch.randint(2, ()).item()

    loader = DataLoader(Endless(), 4)
    options = {"checkpoint": tmp_path / "a.ckpt"}
    distill(network(), loader, steps=10, **options)
    assert distill(network(), loader, steps=25, **options).steps == 25


def test_a_program_keeps_its_own_accumulation(train) -> None:
    from accelerate import Accelerator

    plain, student = network(), network()
    distill(plain, train, epochs=1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    distill(student, train, epochs=1)
    assert torch.equal(plain.state_dict()["3.weight"], student.state_dict()["3.weight"])
    assert accelerator.gradient_accumulation_steps == 4
    assert accelerator.gradient_state.num_steps == 4


def test_labels_stay_of_one_kind(train) -> None:
    images, labels = train[0]
    mixed = images, nn.functional.one_hot(labels).float()
    for batches, message in (
        ([train[0], mixed], "train gave probabilities as labels after class numbers in its first"),
        ([mixed, train[0]], "train gave class numbers as labels after probabilities in its first"),
    ):
        with pytest.raises(kd.UserError, match=message):
            distill(network(), batches, epochs=1)


def test_a_loader_that_gives_another_number_of_batches_is_refused() -> None:
    class Shrinking(torch.utils.data.IterableDataset):
        count = 5

        def __iter__(self):
            self.count -= 1
            return iter(TensorDataset(torch.randn(4 * self.count, 1, 4, 4),
                                      torch.arange(4 * self.count) % 2))  # fmt: skip

    with pytest.raises(kd.UserError, match="3 batches when it was counted, and 2 in epoch 1: it"):
        distill(network(), DataLoader(Shrinking(), 4), epochs=1)
