"""A training on texts: its batches, the checks and the figures that need texts."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsdistill.harness.checksums import json_digest
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import metrics
from dsdistill.harness.runs import progress
from kd.commands import text_parts, training_batches
from kd.commands.image_training import require_no_validation_options
from kd.commands.text_parts import TextParts
from kd.commands.training import Validate
from kd.data import batching, teacher_cache
from kd.data.batching import BatchSource, ChangedBatches
from kd.data.teacher_cache import TeacherCache
from kd.data.text.token_batches import MaskedTokens, TokenBatches
from kd.data.text.tokenization import EncodedPart
from kd.evaluation import text_scoring, text_teacher_check, token_scoring
from kd.evaluation.text_scoring import Answers
from kd.models import networks
from kd.models.language import lora, saved_text_models, text_students
from kd.models.language.language_model import LanguageModel
from kd.models.language.task import OF_TOKENS
from kd.models.language.text_teachers import TextTeacher
from kd.models.token_inputs import TokenInputs
from kd.objectives import terms
from kd.objectives.on_policy import OnPolicy
from kd.objectives.schemes import Distillation, MeanTeacher, Objective
from kd.options import TrainOptions
from kd.parallel.engine import Engine
from kd.recipe import Recipe
from kd.training import dry_run
from kd.training.checkpoint import TrainingState

EVALUATION_BATCH = 64  # texts in a batch without training
HIDDEN_SHARE = 0.15  # of the tokens of a masked language model's texts, as BERT's
DRY_RUN_TEXTS = 4


def assemble(options: TrainOptions) -> "TextTraining":
    """Read texts and load models, and check that they fit together.

    Raises:
        UserError: If a name is unknown, a file is missing, or parts do not fit together.
    """
    return TextTraining(text_parts.assemble(options), options)


@dataclass(frozen=True, eq=False)
class TextTraining:
    """A training on texts; its members are described in `training.Training`.

    Attributes:
        parts: Texts, models and loss.
        options: Options that they were assembled from.
    """

    parts: TextParts
    options: TrainOptions

    @property
    def recipe(self) -> Recipe:
        return self.parts.recipe

    @property
    def on(self) -> Engine:
        return self.parts.on

    @property
    def seed(self) -> int:
        return self.options.seed

    @property
    def student_name(self) -> str:
        return self.parts.student.name

    @property
    def teacher_names(self) -> tuple[str, ...]:
        return self.parts.teacher_names

    @property
    def validation_count(self) -> int | None:
        return len(self.parts.corpus.validation)

    def build_objective(self) -> Objective:
        parts = self.parts
        student = parts.student.network
        loss_terms = terms.build(
            parts.terms,
            student,
            parts.teachers,
            sample=self._sample(),
            classes=len(parts.corpus.classes),
            images=len(parts.encoded["train"]),
            smoothing=parts.recipe.label_smoothing,
            seed=self.seed,
        )
        if self.options.mean_teacher is not None:
            return MeanTeacher(student, loss_terms, decay=self.options.mean_teacher)
        by_label = self.options.teacher_weights == "by-label"
        return Distillation(student, loss_terms, parts.teachers, by_label=by_label)

    def check_options(self) -> None:
        if self.options.validation_fraction is not None and self.parts.corpus.brings_validation:
            raise UserError(
                f"--validation-fraction has no effect on {self.options.data}, which has a "
                "validation part of its own: leave it out"
            )

    def load(self) -> BatchSource:
        parts, world = self.parts, self.on.num_processes
        least = max(1, *(term.min_images for term in parts.terms))
        batches = self._batches("train", parts.recipe.batch_size * world)
        batches = replace(batches, world=world, least=least, masked=self._hidden_in_training())
        if not batches.sizes:
            raise UserError(
                f"{parts.corpus.name} has fewer training texts than one batch of "
                f"{parts.recipe.batch_size} texts per process: lower --batch-size"
            )
        return batches

    def check_step(self, objective: Objective, source: BatchSource) -> None:
        assert isinstance(source, TokenBatches)
        assert self.recipe.loss is not None
        least = dry_run.smallest_share(source.sizes, self.on.num_processes)
        batch = source.first(min(least, DRY_RUN_TEXTS))
        trains_outputs = self.parts.teaches_outputs and self.options.lora is None
        dry_run.check_batch(
            objective, self.recipe.loss, batch, on=self.on, trains_outputs=trains_outputs
        )

    def compile(self) -> None:
        self.parts.student.network.network.compile()

    def check_teachers(self) -> None:
        parts, corpus, say = self.parts, self.parts.corpus, self._say
        for note in corpus.notes:
            say(f"{corpus.name}: {note}")
        for name, part in parts.encoded.items():
            encoding = part.encodings[0]
            if encoding.truncated:
                count = len(part) + encoding.left_out
                say(
                    f"{encoding.truncated:,} of {count:,} {name} texts "
                    f"({encoding.truncated / count:.1%}) are longer than "
                    f"--max-length {parts.student.max_length} and are cut"
                )
            if encoding.left_out:
                say(f"{encoding.left_out} {name} texts are left out: nothing of them is learned")
        if "validation" not in parts.encoded:
            require_no_validation_options(self.options, "texts")
            say("no validation texts: the weights of the last epoch are saved, not of the best")
        elif not parts.teaches_outputs:
            say("the loss teaches layers and not outputs: the weights of the last epoch are saved")
        part = "validation" if "validation" in parts.encoded else "train"
        for i, (name, teacher) in enumerate(zip(parts.teacher_names, parts.teachers, strict=True)):
            for note in teacher.resolved.notes:
                say(f"teacher {name}: {note}")
            if parts.teaches_outputs:
                self._check_teacher(name, i, teacher, part)

    def input_hashes(self) -> dict[str, str]:
        parts = self.parts
        digests = {"texts": parts.corpus.sha256}
        for number, teacher in enumerate(parts.teachers, 1):
            key = f"teacher {number}" if len(parts.teachers) > 1 else "the teacher"
            digests[key] = teacher_cache.fingerprint(teacher)
        for number, tokenizer in enumerate(parts.tokenizers):
            key = f"the tokenizer of a teacher ({number})" if number else "the tokenizer"
            # The vocabulary does not say how texts are divided.
            tokens = _digest(parts.encoded["train"].encodings[number])
            digests[key] = json_digest([tokenizer.get_vocab(), tokens])
        if not text_students.is_fresh(parts.student.name):
            network = parts.student.network.network
            digests["the student's first weights"] = teacher_cache.fingerprint(network)
        return digests

    def prepare(self, objective: Objective, source: BatchSource) -> BatchSource:
        assert isinstance(source, TokenBatches)
        if self.recipe.on_policy:
            tokenizer = self.parts.student.tokenizer
            write = OnPolicy(
                self.parts.student.network,
                tokenizer.pad_token_id,
                tokenizer.eos_token_id,
                share=self.recipe.on_policy,
                on=self.on,
            )
            source_of_texts: BatchSource = ChangedBatches(source, write)
            return source_of_texts
        if not isinstance(objective, Distillation) or not objective.needs_teacher:
            return source
        if objective.needs_features or self.parts.task not in ("classify", "regress"):
            if self.options.cache is not None:
                raise UserError(
                    "--cache keeps the teachers' answers to whole texts, and this loss needs more: "
                    "leave --cache out"
                )
            return source
        return replace(source, teacher_logits=self._teacher_logits(source))

    def validator(self) -> Validate | None:
        if "validation" not in self.parts.encoded or not self.parts.teaches_outputs:
            return None
        student = self.parts.student.network

        def validate(network: nn.Module) -> Mapping[str, float]:
            return self._measure(student.with_network(network), "validation", self.on)[0]

        return validate

    def finished(self, state: TrainingState) -> "TextTraining":
        student = self.parts.student
        student.network.network.load_state_dict(state.best)
        if self.options.lora is None:
            return self
        merged = replace(student, network=lora.merge(student.network))
        return replace(self, parts=replace(self.parts, student=merged))

    def figures(self, state: TrainingState) -> dict[str, Any]:
        parts, corpus = self.parts, self.parts.corpus
        judged = "test" if "test" in parts.encoded else "validation"
        validation = self._figures_of("validation") if self.validator() else {}
        tested = "test" in parts.encoded and parts.teaches_outputs
        test = self._figures_of("test") if tested else {}
        figures = test or validation
        report = {f"test_{name}": value for name, value in test.items() if name in _NAMED_BY_PART}
        report |= {
            f"validation_{name}": value
            for name, value in validation.items()
            if name in _NAMED_BY_PART
        }
        report |= {name: value for name, value in figures.items() if name not in _NAMED_BY_PART}
        return {
            **report,
            "test_accuracy": test.get("accuracy"),
            "test_texts": len(corpus.test),
            "validation_accuracy": validation.get("accuracy"),
            "judged_on": f"{judged} texts" if figures else None,
            "task": parts.task,
            "metric": parts.recipe.metric,
            "parameters": networks.parameter_count(parts.student.network),
            "data": corpus.name,
            "train_images": len(parts.encoded["train"]),
            "output_temperature": 1.0,
            "note": "; ".join(corpus.notes[1:]) or None,
        }

    def save(self, folder: Path) -> None:
        saved_text_models.save_run(folder, self.parts.student)

    def _figures_of(self, part: str) -> dict[str, Any]:
        """All figures of the student on a part, beside those of its teachers."""
        parts, corpus = self.parts, self.parts.corpus
        figures, given = self._measure(parts.student.network, part)
        report: dict[str, Any] = dict(figures)
        if given is None:
            return report
        languages = parts.encoded[part].languages
        if languages:
            report["languages"] = text_scoring.by_language(
                parts.task, given, corpus.classes, languages
            )
        if corpus.classes and part == "test":
            what = "token" if parts.task == "tag" else "text"
            for note in text_scoring.notes("the student", given, corpus.classes, what):
                progress.say(note)
        each = {}
        for i, (name, teacher) in enumerate(zip(parts.teacher_names, parts.teachers, strict=True)):
            if parts.teaches_outputs and parts.recipe.augment != "teacher":
                each[name], answers = self._measure(teacher, part, teacher=i)
                if corpus.classes and answers is not None and i == 0:
                    agreement = metrics.agreement(given.outputs, answers.outputs)
                    report["teacher_agreement"] = agreement
                    report["teacher_accuracy"] = each[name]["accuracy"]
        if each:
            report["teachers"] = each
        return report

    def _measure(
        self,
        network: LanguageModel | TextTeacher,
        part: str,
        on: Engine | None = None,
        *,
        teacher: int | None = None,
    ) -> tuple[dict[str, float], Answers | None]:
        """Figures of a network on a part, and its answers where these are classes or scores."""
        parts = self.parts
        batches = self._batches(part, EVALUATION_BATCH)
        if parts.task in OF_TOKENS:
            hidden = self._hidden() if parts.task == "mlm" else None
            text_bytes = parts.encoded[part].encodings[0].text_bytes
            batches = replace(batches, masked=hidden)
            return token_scoring.validate(network, batches, on, text_bytes=text_bytes), None
        given = text_scoring.answers(network, batches, on, teacher=teacher)
        return text_scoring.FIGURES[parts.task](given, parts.corpus.classes), given

    def _check_teacher(self, name: str, number: int, teacher: TextTeacher, part: str) -> None:
        parts = self.parts
        if parts.recipe.augment == "teacher":
            return  # its texts teach, in its own tokens
        figures, given = self._measure(teacher, part, teacher=number)
        text_teacher_check.check(
            name,
            parts.task,
            figures,
            given,
            parts.corpus.classes,
            vocabulary=len(parts.student.tokenizer),
            part="validation" if part == "validation" else "training",
            minimum=self.options.min_teacher_accuracy,
            say=self._say,
        )

    def _batches(self, part: str, size: int) -> TokenBatches:
        parts, texts = self.parts, self.parts.encoded[part]
        labels = texts.labels
        return TokenBatches(
            texts.encodings,
            tuple(tokenizer.pad_token_id for tokenizer in parts.tokenizers),
            None if labels is None else torch.from_numpy(labels),
            size,
            self.on.device,
            teachers=parts.encoding_of_teacher if any(parts.encoding_of_teacher) else (),
        )

    def _hidden(self) -> MaskedTokens:
        """How tokens are hidden from a masked language model.

        Raises:
            UserError: If its tokenizer has no token for that.
        """
        tokenizer = self.parts.student.tokenizer
        if tokenizer.mask_token_id is None:
            raise UserError(
                f"student {self.student_name} has no mask among its tokens, which --task mlm needs"
            )
        special, size = tuple(tokenizer.all_special_ids), len(tokenizer)
        return MaskedTokens(HIDDEN_SHARE, tokenizer.mask_token_id, special, size)

    def _hidden_in_training(self) -> MaskedTokens | None:
        """The same; None where nothing is to be predicted, so that blocks see whole texts."""
        return self._hidden() if self.parts.task == "mlm" and self.parts.teaches_outputs else None

    def _sample(self) -> TokenInputs:
        """A few texts that student and teachers can take, whatever their tokenizers."""
        batch = self._batches("train", DRY_RUN_TEXTS).first(DRY_RUN_TEXTS)
        inputs = batching.move(batch, self.on.device).inputs
        assert isinstance(inputs, TokenInputs)
        least = min(len(tokenizer) for tokenizer in self.parts.tokenizers)
        return replace(inputs, ids=inputs.ids % least)

    def _teacher_logits(self, source: TokenBatches) -> tuple[Tensor, ...] | None:
        """Every teacher's logits of every text; None where they would take too much memory."""
        parts = self.parts
        n, k = len(parts.encoded["train"]), max(len(parts.corpus.classes), 1)
        if 4 * n * k * len(parts.teachers) > batching.MAX_RESIDENT_BYTES:
            return None
        caches: Sequence[TeacherCache] = ()
        if self.options.cache is not None:
            keys = [
                {"tokens": _digest(parts.encoded["train"].encodings[place])}
                for place in parts.encoding_of_teacher
            ]
            caches = training_batches.open_caches(self.options, parts.terms, parts.teachers, keys)
        tables = []
        for i, teacher in enumerate(parts.teachers):
            logits = caches[i].load("static", n, k) if caches else None
            if logits is None:
                logits = _answer_all(teacher, i, source, n, k)
                if caches and self.on.is_main_process:
                    caches[i].save("static", logits)
            tables.append(logits)
        return tuple(tables)

    def _say(self, line: str) -> None:
        if self.on.is_main_process:
            progress.say(line)


# Figures that a report has for validation and for test texts.
_NAMED_BY_PART = (
    *("accuracy", "macro_f1", "matthews", "pearson", "spearman", "mse", "entity_f1"),
    *("perplexity", "bits_per_byte"),
)


def _digest(encoding: EncodedPart) -> str:
    """SHA-256 of the tokens of texts."""
    sha = hashlib.sha256()
    for array in (encoding.ids, encoding.offsets, encoding.types):
        sha.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def _answer_all(teacher: TextTeacher, number: int, source: TokenBatches, n: int, k: int) -> Tensor:
    """A teacher's logits (n, k) of all texts, in batches of like length."""
    logits = torch.empty(n, k)
    with progress.bar(len(source), "teacher batches") as show, torch.inference_mode():
        for done, batch in enumerate(source.epoch(0, 0), start=1):
            assert batch.index is not None
            answers = teacher(batch.inputs_of(number)).float().cpu()
            logits[batch.index.cpu()] = answers
            show(done)
    return logits
