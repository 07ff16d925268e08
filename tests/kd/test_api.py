"""`kd.distill`: plain modules and loaders in, the same student trained out."""

import copy
import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import kd
from dsdistill.harness import errors
from kd import api, api_arguments, recipe
from kd.objectives import terms
from kd.training import steps

TEACHER_LOSS = "ce:0.1,kd:0.9:temperature=4"


class Net(nn.Module):
    """A small convolutional network with batch norm, whose layers have names."""

    def __init__(self, width: int = 4, classes: int = 10, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(1, width, 3, padding=1)
            self.norm = nn.BatchNorm2d(width)
            self.pool = nn.AdaptiveAvgPool2d(4)
            self.head = nn.Linear(16 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(self.norm(self.conv(images)).relu()).flatten(1))


class Wrapped(nn.Module):
    """A network whose outputs are what the test says."""

    def __init__(self, wrap, width: int = 4) -> None:
        super().__init__()
        self.inner, self.wrap = Net(width), wrap

    def forward(self, images: Tensor):
        return self.wrap(self.inner(images))


class Noisy(Dataset):
    """Images with noise from all three generators, as augmentations draw it."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = torch.rand(1).item() + np.random.rand() + random.random()  # noqa: NPY002
        return self.images[i] + 0.1 * noise, self.labels[i]


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    return images[:320], torch.tensor(digits.target)[:320]


@pytest.fixture
def train(data) -> DataLoader:
    return DataLoader(TensorDataset(data[0][:240], data[1][:240]), 32, shuffle=True)


@pytest.fixture
def validation(data) -> DataLoader:
    return DataLoader(TensorDataset(data[0][240:], data[1][240:]), 64)


@pytest.fixture(scope="module")
def teacher(data) -> Net:
    net = Net(16, seed=1)
    batches = list(zip(data[0].split(32), data[1].split(32), strict=True))
    kd.distill(net, None, batches, epochs=4, progress=False)
    return net


def distill(student: nn.Module, teacher, train, **options) -> kd.DistillResult:
    return kd.distill(student, teacher, train, **{"progress": False, "device": "cpu"} | options)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def hooks(*modules: nn.Module) -> int:
    return sum(
        len(part._forward_hooks) + len(part._forward_pre_hooks)
        for module in modules
        for part in module.modules()
    )


def test_importing_kd_loads_no_framework() -> None:
    script = (
        "import sys, time; start = time.process_time(); import kd; "
        "seconds = time.process_time() - start; "
        "assert not {'torch', 'numpy', 'sklearn'} & sys.modules.keys(); "
        "assert 'distill' in dir(kd) and 'losses' in dir(kd); print(seconds)"
    )
    seconds = [
        float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                             check=True).stdout)
        for _ in range(3)
    ]  # fmt: skip
    assert min(seconds) < 0.05


def test_all_that_kd_names_is_there() -> None:
    assert all(getattr(kd, name) is not None for name in kd.__all__)
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        kd.distil  # noqa: B018  # pyright: ignore


def test_every_loss_has_its_short_name() -> None:
    names = {name.replace("-", "_"): row.function for name, row in terms.TERMS.items()}
    assert set(kd.losses.__all__) == set(names)
    for name, function in names.items():
        if name not in ("crd", "adv"):  # their terms have a memory, a discriminator around them
            assert getattr(kd.losses, name) is function
    logits = torch.randn(4, 3)
    assert kd.losses.kd(logits, logits, temperature=4).item() == pytest.approx(0, abs=1e-6)


def test_fields_of_the_recipe_are_arguments_unless_they_concern_images_or_texts() -> None:
    of_data = {
        *("batch_size", "augment", "crop_padding", "hflip", "interpolation", "min_scale"),
        *("auto_augment", "color_jitter", "random_erase", "repeats", "crop_share", "mixup"),
        *("cutmix", "mix_probability", "mix_switch", "image_size", "copies", "on_policy"),
        *recipe.SPECAUGMENT_FIELDS,
    }
    fields = {f.name for f in recipe.OPTIONS}
    assert set(api_arguments.RecipeFields.__annotations__) == fields - of_data - {
        "loss",
        "optimizer",
    }


def test_the_weights_are_those_of_a_bare_loop(data, teacher: Net) -> None:
    batches = list(zip(data[0].split(32), data[1].split(32), strict=True))
    student = Net()
    bare = copy.deepcopy(student).train()
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1, momentum=0.9)
    for images, labels in batches:
        with torch.no_grad():
            taught = teacher(images)
        logits, t = bare(images), 4.0
        soft = F.kl_div((logits / t).log_softmax(1), (taught / t).softmax(1), reduction="batchmean")
        loss = 0.1 * F.cross_entropy(logits, labels) + 0.9 * t**2 * soft
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    by_name = copy.deepcopy(student)
    own = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    distill(student, teacher, batches, loss=TEACHER_LOSS, epochs=1, optimizer=own)
    options = {"optimizer": "momentum", "lr": 0.1, "weight_decay": 0.0, "schedule": "constant"}
    distill(by_name, teacher, batches, loss=TEACHER_LOSS, epochs=1, warmup=0.0, **options)
    for network in (student, by_name):
        for name, value in network.state_dict().items():
            torch.testing.assert_close(value, bare.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_the_student_learns_and_is_given_back(train, validation, teacher: Net) -> None:
    student = Net(8)
    result = distill(student, teacher, train, validation=validation, epochs=4)
    assert result.student is student
    assert not student.training
    assert type(student.conv) is nn.Conv2d
    assert all(p.grad is None for p in student.parameters())
    assert result.accuracy is not None
    assert result.accuracy > 0.6
    with torch.inference_mode():
        right = [(student(x).argmax(1) == y).float() for x, y in validation]
    assert torch.cat(right).mean().item() == pytest.approx(result.accuracy)
    best = max(result.history, key=lambda each: (each.validation["accuracy"], each.epoch))
    assert best.epoch == result.best_epoch
    assert result.nll == best.validation["nll"]
    assert (result.epochs, result.steps) == (4, 32)
    assert set(best.losses) == {"ce", "kd"}


def test_teachers_come_back_as_they_were(train, teacher: Net) -> None:
    one, other = copy.deepcopy(teacher).train(), copy.deepcopy(teacher).eval()
    one.conv.requires_grad_(False)
    before = copy.deepcopy(one)
    student = Net()
    distill(student, [one, other], train, loss="kd:1,at:100@conv,sp", epochs=1)
    assert same(one, before)
    assert one.training
    assert not other.training
    assert [p.requires_grad for p in one.parameters()] == [
        p.requires_grad for p in before.parameters()
    ]
    assert hooks(student, one, other) == 0


def test_hooks_and_modes_are_restored_after_an_error(train, teacher: Net) -> None:
    def fail(round: kd.Round) -> None:
        raise RuntimeError("no connection")

    student, taught = Net(), copy.deepcopy(teacher).train()
    kept = student.conv.register_forward_hook(lambda *passed: None)
    with pytest.raises(RuntimeError, match="no connection"):
        distill(student, taught, train, loss="kd:1,at:100@conv", epochs=2, callbacks=fail)
    assert hooks(student, taught) == 1  # the user's own
    kept.remove()
    assert taught.training
    assert all(p.requires_grad for p in taught.parameters())


def test_no_global_setting_is_left_changed(data, teacher: Net) -> None:
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(Noisy(*data), 64, shuffle=True, generator=generator)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    before = (
        torch.get_rng_state(),
        np.random.get_state()[1],  # noqa: NPY002
        random.getstate(),
        generator.get_state(),
    )
    deterministic = torch.backends.cudnn.deterministic
    distill(Net(), teacher, loader, epochs=1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()
    assert torch.equal(before[3], generator.get_state())
    assert torch.backends.cudnn.deterministic == deterministic


def test_one_process_trains_in_several_precisions(train, teacher: Net) -> None:
    for precision in ("no", "bf16", "no"):
        assert distill(Net(), teacher, train, epochs=1, precision=precision).steps == 8


def test_a_caller_without_gradients_can_train(train, teacher: Net) -> None:
    student = Net()
    before = copy.deepcopy(student)
    with torch.inference_mode():
        distill(student, teacher, train, epochs=1)
        assert torch.is_inference_mode_enabled()
    assert not same(student, before)


def test_the_seed_decides_order_and_augmentation(data, teacher: Net) -> None:
    students = [Net(), Net(), Net()]
    for student, seed in zip(students, (0, 0, 1), strict=True):
        torch.rand(3)  # whatever the program did before
        loader = DataLoader(Noisy(*data), 64, shuffle=True)
        distill(student, teacher, loader, epochs=1, seed=seed)
    assert same(students[0], students[1])
    assert not same(students[0], students[2])


@pytest.mark.parametrize("weights", ["alike", "by-label"])
def test_several_teachers(train, validation, teacher: Net, weights) -> None:
    other = Net(8, seed=3)
    options = {"validation": validation, "epochs": 2, "teacher_weights": weights}
    result = distill(Net(), [teacher, other], train, **options)
    assert len(result.history) == 2


def test_layers_are_named_as_on_the_command_line(train, teacher: Net) -> None:
    other = Wrapped(lambda logits: logits, 8)
    loss = "ce:1,at:100@norm=inner.norm,fitnet:1@conv=inner.conv"
    result = distill(Net(), other, train, loss=loss, epochs=1)
    assert set(result.history[0].losses) == {"ce", "at", "fitnet"}


@pytest.mark.parametrize(
    "wrap", [lambda logits: {"logits": logits, "loss": None}, lambda logits: _Output(logits)]
)
def test_a_network_may_give_an_object_with_logits(train, teacher: Net, wrap) -> None:
    student = Wrapped(wrap)
    before = copy.deepcopy(student)
    distill(student, Wrapped(wrap), train, loss="ce:1,kd:1", epochs=1)
    assert not same(student, before)


class _Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def test_mixed_labels_are_probabilities(data, teacher: Net) -> None:
    images, labels = data
    shares = 0.7 * F.one_hot(labels, 10) + 0.3 * F.one_hot(labels.flip(0), 10)
    batches = list(zip(images.split(64), shares.split(64), strict=True))
    result = distill(Net(), teacher, batches, epochs=1)
    assert result.steps == 5
    with pytest.raises(kd.UserError, match="give the labels as class numbers"):
        distill(Net(), teacher, batches, loss="dkd", epochs=1)


def test_patience_ends_a_training(train, validation) -> None:
    student = Net()
    result = distill(student, None, train, validation=validation, epochs=50, patience=2, lr=1e-9)
    assert 3 <= result.epochs < 20


def test_callbacks_see_each_round_and_may_stop(train, validation, teacher: Net) -> None:
    figures: list[dict[str, float]] = []

    def stop(round: kd.Round) -> bool:
        return round.epoch == 2

    callbacks = [lambda round: figures.append(round.figures), stop]
    result = distill(Net(), teacher, train, validation=validation, epochs=9, callbacks=callbacks)
    assert result.epochs == 2
    assert [each["epoch"] for each in figures] == [1, 2]
    names = {"epoch", "lr", "loss", "loss_ce", "loss_kd", "images_per_second"}
    assert figures[0].keys() == names | {"validation_accuracy", "validation_nll"}
    assert figures[0]["loss"] == figures[0]["loss_ce"] + figures[0]["loss_kd"]


def test_progress_goes_to_standard_error(train, capsys) -> None:
    distill(Net(), None, train, epochs=1)
    assert capsys.readouterr() == ("", "")
    distill(Net(), None, train, epochs=1, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "8/8 steps" in err


def test_frozen_parameters_stay(train, teacher: Net) -> None:
    student = Net()
    student.conv.requires_grad_(False)
    before = copy.deepcopy(student)
    distill(student, teacher, train, epochs=1)
    assert torch.equal(student.conv.weight, before.conv.weight)
    assert not torch.equal(student.head.weight, before.head.weight)
    assert not student.conv.weight.requires_grad


def test_an_optimizer_of_ones_own(train, teacher: Net) -> None:
    """It trains what it has and projectors beside it, and is given back without these."""
    student = Net()
    before = copy.deepcopy(student)
    optimizer = torch.optim.AdamW(student.head.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    result = distill(student, teacher, train, loss="ce:1,kd:1,fitnet:1@conv", epochs=3,
                     optimizer=optimizer, scheduler=scheduler)  # fmt: skip
    assert [each.lr for each in result.history] == pytest.approx([0.01, 0.001, 0.0001])
    assert torch.equal(student.conv.weight, before.conv.weight)
    assert not torch.equal(student.head.weight, before.head.weight)
    assert len(optimizer.param_groups) == 1
    assert set(optimizer.state) == set(student.head.parameters())
    assert len(scheduler.base_lrs) == 1
    scheduler.step()  # both work on
    student(torch.zeros(2, 1, 8, 8)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "kind", ["OneCycleLR", "LambdaLR", "SequentialLR", "CosineAnnealingLR", "CyclicLR"]
)
def test_schedules_of_ones_own_by_steps(train, teacher: Net, kind: str) -> None:
    student = Net()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    schedules = torch.optim.lr_scheduler
    scheduler = {
        "OneCycleLR": lambda: schedules.OneCycleLR(optimizer, 0.1, total_steps=16),
        "LambdaLR": lambda: schedules.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        "SequentialLR": lambda: schedules.SequentialLR(
            optimizer,
            [
                schedules.LinearLR(optimizer, 0.1, total_iters=4),
                schedules.ExponentialLR(optimizer, 0.9),
            ],
            [4],
        ),
        "CosineAnnealingLR": lambda: schedules.CosineAnnealingLR(optimizer, 16),
        "CyclicLR": lambda: schedules.CyclicLR(optimizer, 0.01, 0.1, step_size_up=4),
    }[kind]()
    result = distill(student, teacher, train, loss="kd:1,fitnet:1@conv", epochs=2,
                     optimizer=optimizer, scheduler=scheduler, scheduler_every="step")  # fmt: skip
    assert scheduler.last_epoch == result.steps == 16
    scheduler.step() if kind != "OneCycleLR" else None  # it has its lists of one group again


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training is interrupted in the middle of an epoch, after it was saved."""
    update = steps.Trainer.update

    def interrupted(trainer, number, *rest):
        terms = update(trainer, number, *rest)
        if number + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return terms

    monkeypatch.setattr(steps.Trainer, "update", interrupted)


OWN = {
    "adamw": lambda net: {"optimizer": (o := torch.optim.AdamW(net.parameters(), lr=0.01)),
                          "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(o, 12),
                          "scheduler_every": "step"},
    "by name": lambda net: {"optimizer": "adamw", "lr": 0.01, "ema": 0.9, "accumulate": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("step", [3, 11])
def test_an_interrupted_training_goes_on_to_the_same_bits(
    data, validation, teacher: Net, tmp_path: Path, monkeypatch, kind: str, step: int
) -> None:
    def run(student: Net, path: Path | None) -> kd.DistillResult:
        loader = DataLoader(Noisy(*data), 32, shuffle=True)  # 10 batches
        options = {"validation": validation, "epochs": 3, "loss": "ce:1,kd:1,fitnet:1@conv"}
        return distill(student, teacher, loader, checkpoint=path, **options, **OWN[kind](student))

    whole = Net()
    expected = run(whole, None)
    path = tmp_path / "new" / "training.ckpt"
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        with pytest.raises(KeyboardInterrupt):
            run(Net(), path)
    resumed = Net(seed=9)  # its weights are those of the checkpoint
    result = run(resumed, path)
    assert same(whole, resumed)
    assert result.best_epoch == expected.best_epoch
    for one, other in zip(expected.history, result.history, strict=True):
        assert (one.losses, one.validation, one.lr) == (other.losses, other.validation, other.lr)
    again = Net(seed=8)
    assert run(again, path).steps == expected.steps  # finished: nothing is trained
    assert same(whole, again)


def test_a_finished_training_goes_on_with_more_epochs(
    train, validation, teacher: Net, tmp_path: Path
) -> None:
    path = tmp_path / "training.ckpt"
    options = {"validation": validation, "checkpoint": path, "patience": 20}
    short = distill(Net(), teacher, train, epochs=2, **options)
    longer = distill(Net(), teacher, train, epochs=5, **options)
    assert longer.epochs == 5
    assert [each.step for each in longer.history] == [8, 16, 24, 32, 40]
    assert longer.history[:2] == short.history
    plain = distill(Net(), teacher, train, validation=validation, epochs=5)
    rates = [each.lr for each in plain.history]
    assert [each.lr for each in longer.history][2:] == pytest.approx(rates[2:])
    with pytest.raises(kd.UserError, match=r"checkpoint is after step 40, and this training has 8"):
        distill(Net(), teacher, train, epochs=1, **options)


def test_a_checkpoint_is_of_one_training(train, teacher: Net, tmp_path: Path) -> None:
    path = tmp_path / "training.ckpt"
    options = {"epochs": 1, "checkpoint": path}
    distill(Net(), teacher, train, **options)
    for changed, message in (
        ({"seed": 1}, "made with seed 0, and this call has 1"),
        ({"lr": 0.5}, "made with lr 0.05, and this call has 0.5"),
        ({"loss": "kd:1"}, "made with loss ce:0.1,kd:0.9:temperature=4, and this call has kd:1"),
        ({"optimizer": "adamw"}, "made with optimizer sgd, and this call has adamw"),
    ):
        with pytest.raises(kd.UserError, match=message):
            distill(Net(), teacher, train, **options | changed)
    with pytest.raises(kd.UserError, match="made with teacher 1"):
        distill(Net(), Net(16), train, **options)
    with pytest.raises(kd.UserError, match="made with student Net of"):
        distill(Net(5), teacher, train, **options)
    # Other layers with the same weights.
    strided, padded = Net(), copy.deepcopy(teacher)
    strided.conv.stride, padded.conv.padding_mode = (2, 2), "circular"
    for networks, name in (((strided, teacher), "the student"), ((Net(), padded), "teacher 1")):
        with pytest.raises(kd.UserError, match=rf"made with layers of {name} \(torch "):
            distill(*networks, train, **options)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(kd.UserError, match="is damaged: its contents do not match its checksum"):
        distill(Net(), teacher, train, **options)
    with pytest.raises(kd.UserError, match="checkpoint must be a file"):
        distill(Net(), teacher, train, epochs=1, checkpoint=tmp_path)


def test_a_small_last_batch_takes_images_from_the_one_before(data) -> None:
    """A single image would be too few for the batch norm of 1x1 maps."""
    sizes: list[int] = []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(64), nn.Linear(64, 10)

        def forward(self, images: Tensor) -> Tensor:
            sizes.append(len(images))
            return self.head(self.norm(images.flatten(1)))

    images, labels = data[0][:33], data[1][:33]
    loader = DataLoader(TensorDataset(images, labels), 16, shuffle=True)
    assert distill(Counting(), None, loader, epochs=1).steps == 3
    assert sizes[-3:] == [16, 15, 2]


class Stream(IterableDataset):
    """Images that come one after the other; how many is not said."""

    def __init__(self, images: Tensor, labels: Tensor, endless: bool = False) -> None:
        self.images, self.labels, self.endless = images, labels, endless

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = range(len(self.labels))
        for i in itertools.cycle(rows) if self.endless else rows:
            yield self.images[i], self.labels[i]


def test_a_stream_of_unknown_length(
    data, validation, teacher: Net, tmp_path: Path, monkeypatch
) -> None:
    loader = DataLoader(Stream(*data), 64)
    assert distill(Net(), teacher, loader, epochs=2).steps == 10
    endless = DataLoader(Stream(*data, endless=True), 64)
    options = {"validation": validation, "checkpoint": tmp_path / "stream.ckpt"}
    whole, parts = Net(), Net()
    result = distill(whole, teacher, endless, validation=validation, steps=20)
    assert result.steps == 20
    assert len(result.history) == 10
    with monkeypatch.context() as patch:
        stop_after(8, patch)
        with pytest.raises(KeyboardInterrupt):
            distill(parts, teacher, endless, steps=20, **options)
    assert distill(parts, teacher, endless, steps=20, **options).steps == 20
    assert same(whole, parts)


class _Wrong:
    def __init__(self, batches: list, length: int) -> None:
        self.batches, self.length = batches, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator:
        return iter(self.batches)


IMAGES, LABELS = torch.rand(8, 1, 8, 8), torch.arange(8)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (iter([]), "train is an iterator, which can be read only once"),
        ([], "train has no batches"),
        (3, "train must be an iterable of .* got int"),
        ([{"image": IMAGES, "label": LABELS}], "got a dict of image, label"),
        ([(IMAGES, LABELS, LABELS)], "two tensors, .images, labels., got a tuple of 3"),
        ([(IMAGES.numpy(), LABELS)], "got ndarray and Tensor"),
        ((IMAGES, LABELS), "got a Tensor: .* give a single batch as .*images, labels"),
        (TensorDataset(IMAGES, LABELS), "wrap a data set in a DataLoader"),
        ([(IMAGES[:, 0], LABELS)], r"floating-point tensors \(n, c, h, w\), got \(8, 8, 8\)"),
        ([((IMAGES * 255).byte(), LABELS)], "of torch.uint8"),
        ([(IMAGES, LABELS[:3])], "8 images and 3 labels"),
        ([(IMAGES, LABELS + 5)], "the label 12, and the student has outputs for 0 to 9"),
        ([(IMAGES, LABELS - 1)], "the label -1"),
        ([(IMAGES, LABELS[:, None])], r"class numbers \(n,\), or probabilities"),
        ([(IMAGES, torch.rand(8, 10))], "the sum for each image 1"),
        ([(IMAGES, torch.ones(8, 4) / 4)], r"probabilities \(n, 10\), got labels \(8, 4\)"),
        ([(torch.rand(8, 3, 8, 8), LABELS)], "student cannot take images"),
        (_Wrong([(IMAGES, LABELS)], 2), "a length of 2 batches and gave 1"),
        (_Wrong([(IMAGES, LABELS)] * 3, 2), "a length of 2 batches and gave 3"),
    ],
)
def test_wrong_batches_are_one_line(loader, message: str) -> None:
    refused(message, Net(), None, loader, epochs=2)


def refused(message: str, *arguments, **options) -> None:
    with pytest.raises(kd.UserError, match=message) as error:
        distill(*arguments, **options)
    assert "\n" not in str(error.value)
    assert "--" not in str(error.value)


def test_the_label_that_a_teacher_cannot_know_is_refused(train) -> None:
    refused("teacher 1 has 7 outputs for an image, the student 10", Net(), Net(8, 7), train)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "kdd:1"}, "unknown loss 'kdd'; did you mean 'kd'"),
        ({"loss": 3}, "loss must be a text"),
        ({"loss": "ce:1"}, "no term that uses the teacher: add kd:0.9"),
        ({"loss": "kd:1,at:10"}, "a loss of maps needs layers"),
        ({"loss": "kd:1,at:10@nowhere"}, "unknown layer 'nowhere' of Net: the nearest"),
        ({"loss": "kd:1:temperature=-1"}, "temperature must be"),
        (
            {"loss": "at:1@conv", "teacher_weights": "by-label"},
            "teacher_weights has no effect on lo",
        ),
        ({"loss": "crd"}, "crd remembers each training image by its number"),
        ({"loss": "sp:1"}, "loss sp:1 sends no gradient to 2 of the 6 weights"),
        ({"epoch": 3}, "unknown argument of kd.distill 'epoch'; did you mean 'epochs'"),
        ({"epochs": 2.5}, "epochs must be of type int, got 2.5"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"epochs": 2, "steps": 3}, "epochs and steps both set the length"),
        ({"lr": -1}, "lr must be positive and finite, got -1"),
        ({"lr": 1e30, "epochs": 2}, r"loss term .* is nan at step .*: lower lr"),
        ({"weight_decay": -1}, "^weight_decay must be 0 or more"),
        ({"schedule": "step"}, "schedule must be one of cosine, linear, milestones, constant"),
        ({"schedule": "milestones"}, 'schedule="milestones" needs milestones'),
        ({"optimizer": "adan"}, "optimizer must be one of sgd"),
        ({"optimizer": "adamw", "momentum": 0.5}, 'momentum has no effect .* optimizer="sgd"'),
        ({"recipe": "hintom"}, "unknown recipe 'hintom'; did you mean 'hinton'"),
        ({"recipe": kd.Recipe()}, "recipe has no length: give epochs or steps"),
        ({"device": "tpu"}, 'device .tpu. is not available .* use device="cpu"'),
        ({"precision": "fp16"}, 'precision="fp16" needs a GPU'),
        ({"seed": -1}, "seed must be a whole number of 0 or more"),
        ({"teacher_weights": "equal"}, "teacher_weights must be"),
        ({"patience": 2}, "patience has no effect without validation"),
        ({"label_smoothing": 0.1, "loss": "kd:1"}, "label_smoothing has no effect on loss kd:1"),
        ({"scheduler_every": "batch"}, "scheduler_every must be"),
        ({"callbacks": [3]}, "callbacks must be functions of a kd.Round, got 3"),
        ({"recipe": 3}, "recipe must be a name or a kd.Recipe, got 3"),
        ({"checkpoint": "/dev/null/x"}, "checkpoint /dev/null/x cannot be written"),
    ],
)
def test_wrong_arguments_are_one_line(train, teacher: Net, options: dict, message: str) -> None:
    refused(message, Net(), teacher, train, **options)


def test_batches_too_small_for_a_loss_are_one_line() -> None:
    small = [(torch.rand(2, 1, 8, 8), torch.arange(2))]
    message = "compares the images of a batch: batches must have at least 3, got 2"
    refused(message, Net(), Net(8), small, loss="ce:1,rkd-angle@conv")


def test_processes_with_other_checkpoints_are_one_line(monkeypatch) -> None:
    monkeypatch.setattr(api, "gather_object", lambda steps: [*steps, 40])
    on = SimpleNamespace(num_processes=2)
    with pytest.raises(kd.UserError, match="is after step 0 in process 0 and after step 40 in pro"):
        api._require_same_step(Path("a.ckpt"), None, on)  # pyright: ignore[reportArgumentType]


def test_wrong_modules_are_one_line(train, teacher: Net) -> None:
    student = Net()
    refused("student must be a torch.nn.Module, got str", "convnet", None, train)
    refused("teacher must be a torch.nn.Module, got str", student, "resnet50", train)
    refused("teacher is an empty list", student, [], train)
    refused("share parameters", student, student, train)
    refused("teacher must be in float32, got torch.bfloat16", student, Net().bfloat16(), train)
    refused("no parameters that require gradients", Net().requires_grad_(False), None, train)
    refused("loss kd needs a teacher: give one", student, None, train, loss="kd:1")
    refused("heads trains its classifiers on the student's logits", student, None, train,
            loss="mse:1,heads:1@conv")  # fmt: skip
    refused("student must give logits", Wrapped(lambda y: y.flatten()), None, train)
    refused("gives no logits", Wrapped(lambda y: (y, y)), None, train)


def test_wrong_optimizers_are_one_line(train, teacher: Net) -> None:
    student, kinds = Net(), torch.optim.lr_scheduler
    arguments = student, teacher, train
    own = torch.optim.SGD(student.parameters(), lr=0.1)
    other = torch.optim.SGD(Net().parameters(), lr=0.1)
    refused("none of the student's parameters", *arguments, optimizer=other)
    refused("lr has no effect on an optimizer of your own", *arguments, optimizer=own, lr=0.1)
    refused("scheduler needs optimizer", *arguments, scheduler=kinds.StepLR(own, 1))
    refused("of another optimizer", *arguments, optimizer=own, scheduler=kinds.StepLR(other, 1))
    plateau = kinds.ReduceLROnPlateau(own)
    refused("ReduceLROnPlateau is no function", *arguments, optimizer=own, scheduler=plateau)
    refused("needs a closure", *arguments, optimizer=torch.optim.LBFGS(student.parameters()))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("--weight-decay must be 0 or more", "weight_decay must be 0 or more"),
        ("use --device cpu", 'use device="cpu"'),
        ("it needs 3 in a batch, got 2: raise --batch-size, or train on more images",
         "it needs 3 in a batch, got 2: use larger batches"),
        ("leave --use_fsdp out", "leave --use_fsdp out"),
    ],
)  # fmt: skip
def test_messages_name_arguments(message: str, expected: str) -> None:
    named = errors.as_arguments(message, api_arguments.PHRASES, api_arguments.TEXTS)
    assert named == expected


def cosine(logits: Tensor, taught: Tensor | None, labels: Tensor) -> Tensor:
    assert taught is not None
    return 1 - torch.nn.functional.cosine_similarity(logits, taught).mean()


def test_a_loss_of_the_users_own_is_added(train, teacher: Net) -> None:
    """At weight 1, as the term of the same function is; alone with an empty loss."""

    def squared(logits: Tensor, taught: Tensor | None, labels: Tensor) -> Tensor:
        assert taught is not None
        return kd.losses.logits(logits, taught)

    by_name, by_function = Net(), Net()
    by_function.load_state_dict(by_name.state_dict())
    one = kd.distill(by_name, teacher, train, loss="ce:1,logits:1", epochs=1, progress=False)
    own = {"squared": squared}
    two = kd.distill(
        by_function, teacher, train, loss="ce:1", extra_losses=own, epochs=1, progress=False
    )
    assert one.history[0].losses["logits"] == pytest.approx(two.history[0].losses["squared"])
    for a, b in zip(by_name.parameters(), by_function.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    alone = kd.distill(
        Net(), [teacher, Net()], train, loss="", extra_losses={"direction": cosine}, epochs=1
    )
    assert [*alone.history[0].losses] == ["direction"]


def test_a_loss_that_is_a_module_is_trained_and_given_back(train, teacher: Net) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, logits: Tensor, taught: Tensor | None, labels: Tensor) -> Tensor:
            assert self.training
            return self.scale**2 * cosine(logits, taught, labels)

    loss = Scaled().eval()
    distill(Net(), teacher, train, extra_losses={"scaled": loss}, epochs=1)
    assert not loss.training
    assert loss.scale != 1
    assert loss.scale.grad is None


def test_wrong_losses_of_ones_own_are_one_line(train, teacher: Net) -> None:
    refused("kd is the name of a term", Net(), teacher, train, extra_losses={"kd": cosine})
    for name in ("lr", "epoch", "steps", "images", "validation_loss", "best_accuracy"):
        refused(f"{name} is the name of another figure", Net(), teacher, train,
                extra_losses={name: cosine})  # fmt: skip
    for name in (3, "a b", "a.b"):
        refused("a name must be letters, digits and _", Net(), teacher, train,
                extra_losses={name: cosine})  # fmt: skip
    refused("direction must be a function", Net(), teacher, train, extra_losses={"direction": 1})
    refused("must be functions by name", Net(), teacher, train, extra_losses=cosine)
    broken = {"broken": lambda logits, taught, labels: logits @ labels}
    refused("broken", Net(), teacher, train, extra_losses=broken)
    refused("sends no gradient", Net(), teacher, train, loss="",
            extra_losses={"constant": lambda logits, taught, labels: torch.zeros(())})  # fmt: skip
