"""Tokens a second of `kd train` on texts against a bare loop, and against transformers' Trainer.

    python benchmarks/language_step.py DATA --student bert:2x128 --teacher bert:4x256

DATA is a folder of texts with labels, such as SST-2. All loops train a student from a teacher with
Hinton's loss and the same AdamW step on the same batches, in turns in one process, every turn in
another order: `kd.training.loop` with everything that it does besides; a hand-written loop over
transformers' DataCollatorWithPadding; `transformers.Trainer`; and `kd.training.loop` on batches of
texts in random order, which shows what padding costs. Each line gives the ratio of `kd` to another
loop, the median over the turns; in brackets the quartiles. Above 1 it is faster.
"""

import argparse
import random
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.data import SequentialSampler

from kd.data.text import corpus, tokenization
from kd.data.text.token_batches import TokenBatches
from kd.models.language import text_students, tokenizer
from kd.models.language.language_model import LanguageModel
from kd.models.token_inputs import TokenInputs
from kd.objectives import terms
from kd.objectives.schemes import Distillation
from kd.parallel import engine
from kd.recipe import Recipe
from kd.training.loop import train

T, ALPHA, LR, DECAY = 2.0, 0.9, 5e-5, 0.01
WARM_UP = 3  # steps that are not timed


@dataclass(frozen=True, eq=False)
class Case:
    """Student, teacher and batches of texts."""

    student: LanguageModel
    teacher: LanguageModel
    tokenizer: Any
    batches: TokenBatches

    def steps(self, count: int) -> list[np.ndarray]:
        """The rows of the first batches of an epoch."""
        rows = []
        for batch in self.batches.epoch(0, 0):
            assert batch.index is not None
            rows.append(batch.index.numpy())
            if len(rows) == count:
                break
        return rows

    def features(self, row: int) -> dict[str, Any]:
        """A text as transformers' collator takes it."""
        part, labels = self.batches.parts[0], self.batches.labels
        assert labels is not None
        ids = part.ids[part.offsets[row] : part.offsets[row + 1]]
        return {"input_ids": ids.tolist(), "labels": int(labels[row])}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--student", default="bert:2x128")
    parser.add_argument("--teacher", default="bert:4x256")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30, help="a turn")
    options = parser.parse_args()
    case = made(options.data, options.student, options.teacher, options.batch_size)
    loops = {"kd": ours, "bare": bare, "Trainer": trainers, "unsorted": unsorted}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(options.turns):
        for name in random.Random(turn).sample(list(loops), len(loops)):
            seconds[name].append(loops[name](case, options.steps))
    print(
        f"{options.student} from {options.teacher}, batch {options.batch_size}: "
        f"{1 / median(seconds['kd']):.0f} real tokens/s, {ratio(seconds, 'bare')} of a bare loop, "
        f"{ratio(seconds, 'Trainer')} of transformers' Trainer, {ratio(seconds, 'unsorted')} of "
        "batches in random order"
    )


def ratio(seconds: dict[str, list[float]], rival: str) -> str:
    """Median and quartiles of how many times faster our loop was, turn by turn."""
    each = [a / b for a, b in zip(seconds[rival], seconds["kd"], strict=True)]
    low, middle, high = np.quantile(each, (0.25, 0.5, 0.75))
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def made(data: Path, student: str, teacher: str, size: int) -> Case:
    """Fresh networks, and texts encoded by their words."""
    texts = corpus.load(data)
    own = tokenizer.train_on_words(texts.train.texts[0])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(own, Path(folder))
        ours, theirs = (
            text_students.build(
                name, texts.task, texts.classes, tokenizer_source=folder, max_length=64
            ).network
            for name in (student, teacher)
        )
    part = tokenization.encode(texts.train, own, 64)
    labels = torch.from_numpy(texts.train.labels)
    device = torch.device("cpu")
    return Case(
        ours, theirs.eval(), own, TokenBatches((part,), (own.pad_token_id,), labels, size, device)
    )


def ours(case: Case, steps: int) -> float:
    """Seconds for each real token of `kd.training.loop`."""
    specs = terms.parse(f"ce:{1 - ALPHA},kd:{ALPHA}:temperature={T}")
    inputs = case.batches.first(2).inputs
    assert isinstance(inputs, TokenInputs)
    objective = Distillation(
        case.student, terms.build(specs, case.student, sample=inputs, classes=2), [case.teacher]
    )
    recipe = Recipe(
        steps=WARM_UP + steps,
        optimizer="adamw",
        lr=LR,
        weight_decay=DECAY,
        clip=1.0,
        batch_size=case.batches.size,
    )
    marks: list[float] = []

    def show(done: int, **_: float) -> None:
        if done in (WARM_UP, WARM_UP + steps):
            marks.append(time.perf_counter())

    train(objective, case.batches, recipe, 0, on=engine.make("cpu"), show=show)
    return (marks[1] - marks[0]) / real_tokens(case, steps)


def unsorted(case: Case, steps: int) -> float:
    """The same on batches of texts in random order."""
    return ours(replace(case, batches=replace(case.batches, sorts=False)), steps)


def bare(case: Case, steps: int) -> float:
    """Seconds for each real token of the shortest loop that does the same."""
    network, teacher = case.student.network.train(), case.teacher.network.eval()
    collate = transformers.DataCollatorWithPadding(case.tokenizer)
    optimizer = torch.optim.AdamW(network.parameters(), LR, weight_decay=DECAY, fused=True)
    began = 0.0
    for step, rows in enumerate(case.steps(WARM_UP + steps)):
        if step == WARM_UP:
            began = time.perf_counter()
        inputs = dict(collate([case.features(int(row)) for row in rows]))
        labels = inputs.pop("labels")
        with torch.no_grad():
            answers = teacher(**inputs).logits
        optimizer.zero_grad()
        distillation(network(**inputs).logits, answers, labels).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return (time.perf_counter() - began) / real_tokens(case, steps)


class DistillationTrainer(transformers.Trainer):
    """transformers' Trainer with a teacher and the rows in the order that they are given in."""

    teacher: nn.Module

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Any:
        labels = inputs.pop("labels")
        with torch.no_grad():
            answers = self.teacher(**inputs).logits
        return distillation(model(**inputs).logits, answers, labels)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        assert self.train_dataset is not None
        return SequentialSampler(self.train_dataset)  # pyright: ignore[reportArgumentType]


class Clock(transformers.TrainerCallback):
    """Notes the time after the steps of the warm-up and after the last one."""

    def __init__(self, steps: int) -> None:
        self.ends, self.marks = (WARM_UP, WARM_UP + steps), []

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.global_step in self.ends:
            self.marks.append(time.perf_counter())


def trainers(case: Case, steps: int) -> float:
    """Seconds for each real token of transformers' Trainer."""
    rows = np.concatenate(case.steps(WARM_UP + steps))
    clock = Clock(steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=case.batches.size,
            max_steps=WARM_UP + steps,
            learning_rate=LR,
            weight_decay=DECAY,
            max_grad_norm=1.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = DistillationTrainer(
            case.student.network,
            arguments,
            data_collator=transformers.DataCollatorWithPadding(case.tokenizer),
            train_dataset=[case.features(int(row)) for row in rows],  # pyright: ignore
            callbacks=[clock],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.teacher = case.teacher.network.eval()
        trainer.train()
    return (clock.marks[1] - clock.marks[0]) / real_tokens(case, steps)


def distillation(outputs: torch.Tensor, answers: torch.Tensor, labels: torch.Tensor) -> Any:
    """Hinton's loss."""
    soft = F.kl_div(
        F.log_softmax(outputs / T, -1), F.softmax(answers / T, -1), reduction="batchmean"
    )
    return (1 - ALPHA) * F.cross_entropy(outputs, labels) + ALPHA * T**2 * soft


def real_tokens(case: Case, steps: int) -> int:
    """Number of real tokens of the timed steps."""
    lengths = case.batches.parts[0].lengths
    return sum(int(lengths[rows].sum()) for rows in case.steps(WARM_UP + steps)[WARM_UP:])


if __name__ == "__main__":
    main()
