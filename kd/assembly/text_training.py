"""A training on texts: its batches, the checks and the figures that need texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dsdistill.harness import shell
from dsdistill.harness.checksums import json_digest
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress
from kd.assembly import text_answers, text_parts
from kd.assembly.image_training import require_no_validation_options
from kd.assembly.text_parts import TextParts
from kd.assembly.training import AssembledTraining, Validate
from kd.data import batching, class_weights, teacher_cache
from kd.data.batching import BatchSource, ChangedBatches
from kd.data.text.token_batches import MaskedTokens, TokenBatches
from kd.evaluation import embedding_scoring, text_figures, text_teacher_check
from kd.evaluation.text_figures import JudgedTexts
from kd.models import networks
from kd.models.language import lora, saved_text_models, text_students
from kd.models.language.bilstm import BiLstm
from kd.models.language.task import ALIGNED, OF_TOKENS
from kd.models.language.text_teachers import TextTeacher
from kd.models.token_inputs import TokenInputs
from kd.objectives import terms
from kd.objectives.on_policy import OnPolicy
from kd.objectives.schemes import Distillation, MeanTeacher, Mutual, Objective
from kd.options import TrainOptions
from kd.recipe import COPYING_AUGMENTS, VALIDATION_FIELDS
from kd.training import dry_run
from kd.training.checkpoint import TrainingState

DRY_RUN_TEXTS = 4


def assemble(options: TrainOptions) -> "TextTraining":
    """Read texts and load models, and check that they fit together.

    Raises:
        UserError: If a name is unknown, a file is missing, or parts do not fit together.
    """
    return TextTraining(text_parts.assemble(options), options)


@dataclass(frozen=True, eq=False)
class TextTraining(AssembledTraining[TextParts]):
    """A training on texts; its members are described in `training.Training`."""

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
            class_weights=parts.class_weights and parts.class_weights.tensor(self.on.device),
        )
        if parts.peers:
            return Mutual(student, [peer.network for _, peer in parts.peers], loss_terms)
        if self.options.mean_teacher is not None:
            return MeanTeacher(student, loss_terms, decay=self.options.mean_teacher)
        by_label = self.options.teacher_weights == "by-label"
        return Distillation(student, loss_terms, parts.teachers, by_label=by_label)

    def check_options(self) -> None:
        options, recipe = self.options, self.recipe
        if options.validation_fraction is not None and self.parts.corpus.brings_validation:
            raise UserError(
                f"--validation-fraction has no effect on {options.data}, which has a "
                "validation part of its own: leave it out"
            )
        if not self.parts.teaches_outputs:
            given = [name for name in VALIDATION_FIELDS if name in options.given]
            given += ["min_teacher_accuracy"] * (options.min_teacher_accuracy is not None)
            if given:
                raise UserError(
                    f"{shell.flag(given[0])} has no effect on --loss {recipe.loss}, which teaches "
                    "layers alone, so that no outputs are judged: leave it out"
                )
        if options.compile:
            self._check_compiles()
        # What a teacher writes is not judged, and texts of the student's own are always new.
        unused = (
            ("--augment teacher", recipe.augment == "teacher", "min_teacher_accuracy", "cache_top"),
            ("--on-policy", recipe.on_policy > 0, "cache"),
        )
        for option, active, *names in unused:
            given = [name for name in names if getattr(options, name) is not None]
            if active and given:
                raise UserError(f"{shell.flag(given[0])} has no effect with {option}: leave it out")

    def load(self) -> BatchSource:
        parts, world = self.parts, self.on.num_processes
        least = max(1, *(term.min_images for term in parts.terms))
        batches = self._batches("train", parts.recipe.batch_size * world)
        batches = replace(batches, world=world, least=least, masked=self._hidden_in_training())
        if (count := len(parts.encoded["train"])) < least * world:
            raise UserError(
                f"{parts.corpus.name} has {count} training texts, and a batch needs {least} for "
                f"each process, {least * world} in all: train on more texts"
            )
        return batches

    def check_step(self, objective: Objective, source: BatchSource) -> None:
        assert isinstance(source, TokenBatches)
        assert self.recipe.loss is not None
        least = min(source.sizes) // self.on.num_processes
        # For a single text another graph would be compiled.
        texts = DRY_RUN_TEXTS if self.options.compile else min(least, DRY_RUN_TEXTS)
        batch = source.first(texts)
        trains_outputs = self.parts.teaches_outputs and self.options.lora is None
        dry_run.check_batch(
            objective, self.recipe.loss, batch, on=self.on, trains_outputs=trains_outputs
        )

    def compile(self, objective: Objective, source: BatchSource) -> None:
        self.parts.student.network.network.compile(dynamic=True)  # one graph for all lengths
        # It is made for the first batch that comes, which is the same one after a stop.
        self.check_step(objective, source)

    def _check_compiles(self) -> None:
        """Refuse what a compiled student does not do, or no quicker.

        Raises:
            UserError: If there is such a thing.
        """
        if isinstance(self.parts.student.network.network, BiLstm):
            raise UserError("--compile makes a step of bilstm slower: leave it out")
        if self.recipe.on_policy:
            raise UserError(
                "--compile is of the student in a step, and --on-policy lets it write token by "
                "token: leave one of them out"
            )

    def check_teachers(self) -> None:
        parts, corpus, say = self.parts, self.parts.corpus, self._say
        for note in corpus.notes:
            say(f"{corpus.name}: {note}")
        if parts.class_weights is not None:
            say(parts.class_weights.describe())
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
        for i, (name, teacher) in enumerate(self._judged_teachers()):
            for note in teacher.resolved.notes:
                say(f"teacher {name}: {note}")
            if parts.teaches_outputs:
                self._check_teacher(name, i, teacher)

    def input_hashes(self) -> dict[str, str]:
        parts = self.parts
        digests = {"texts": parts.corpus.sha256}
        if parts.class_weights is not None:
            digests["class weights"] = parts.class_weights.digest
        for number, teacher in enumerate(parts.teachers, 1):
            key = f"teacher {number}" if len(parts.teachers) > 1 else "the teacher"
            digests |= teacher_cache.input_hashes(key, teacher)
        for number, tokenizer in enumerate(parts.tokenizers):
            key = f"the tokenizer of a teacher ({number})" if number else "the tokenizer"
            # The vocabulary does not say how texts are divided.
            tokens = text_answers.digest(parts.encoded["train"].encodings[number])
            digests[key] = json_digest([tokenizer.get_vocab(), tokens])
        if not text_students.is_fresh(parts.student.name):
            network = parts.student.network.network
            digests["the student's first weights"] = teacher_cache.fingerprint(network)
            digests |= teacher_cache.layer_hash("the student", network)
        for number, (name, peer) in enumerate(parts.peers, 1):
            if not text_students.is_fresh(name):
                first = teacher_cache.fingerprint(peer.network)
                digests[f"the first weights of peer {number}"] = first
                digests |= teacher_cache.layer_hash(f"peer {number}", peer.network)
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
            return ChangedBatches(source, write)
        if not isinstance(objective, Distillation) or not objective.needs_answers:
            return source
        if self.options.cache is not None:
            return text_answers.with_cache(
                self.parts, self.options, objective, source, self._sample(), self._say
            )
        if objective.needs_features or self.parts.task in ALIGNED:
            return source
        return text_answers.with_logits(self.parts, source, self._sample())

    def validator(self) -> Validate | None:
        if "validation" not in self.parts.encoded or not self.parts.teaches_outputs:
            return None
        student, texts = self.parts.student.network, self._texts("validation")
        if self.parts.task == "embed":
            # One for all epochs, which asks the teachers once.
            scorer = text_figures.embedding_scorer(texts, self.parts.teachers, self.on)
            return lambda network: scorer.measure(student.with_network(network))

        def validate(network: nn.Module) -> Mapping[str, float]:
            judged = student.with_network(network)
            return text_figures.measure(judged, texts, self.on)[0]

        return validate

    def finished(self, state: TrainingState) -> "TextTraining":
        student = self.parts.student
        whole = not student.network.frozen_elsewhere
        student.network.network.load_state_dict(state.best, strict=whole)
        if self.options.lora is None:
            return self
        merged = replace(student, network=lora.merge(student.network))
        return replace(self, parts=replace(self.parts, student=merged))

    def figures(self, state: TrainingState) -> dict[str, Any]:
        parts, corpus = self.parts, self.parts.corpus
        judged = [part for part in ("test", "validation") if part in parts.encoded]
        if not parts.teaches_outputs:
            judged = []  # the head was not trained
        report: dict[str, Any] = {}
        figures: dict[str, Any] = {}
        for part in judged:
            # Of the other part too, embeddings are judged by their teacher's.
            with_teachers = part == judged[0] or parts.task == "embed"
            teachers = self._judged_teachers() if with_teachers else ()
            measured = text_figures.evaluate(parts.student.network, self._texts(part), teachers)
            named = [name for name in measured if name in _NAMED_BY_PART]
            report |= {f"{part}_{name}": measured[name] for name in named}
            if part == judged[0]:
                figures = {k: v for k, v in measured.items() if k not in (*named, "texts")}
        for note in figures.pop("notes", ()):
            progress.say(note)
        return {
            "test_accuracy": None,
            "validation_accuracy": None,
            **report,
            **figures,
            "test_texts": len(corpus.test),
            "judged_on": f"{judged[0]} texts" if judged else None,
            "task": parts.task,
            "metric": parts.recipe.metric,
            "parameters": networks.parameter_count(parts.student.network),
            "data": corpus.name,
            "train_images": len(parts.encoded["train"]),
            "output_temperature": 1.0,
            "note": "; ".join(corpus.notes[1:]) or None,
            **class_weights.figures(parts.class_weights),
        }

    def latency(self) -> dict[str, float | int]:
        encoded = self.parts.encoded
        part = next(part for part in ("test", "validation", "train") if part in encoded)
        return text_figures.latency(self.parts.student.network, self._texts(part), quick=True)

    def save(self, folder: Path) -> None:
        saved_text_models.save_run(folder, self.parts.student)

    def _texts(self, part: str) -> JudgedTexts:
        """The texts of a part, to judge the student and its teachers on."""
        parts, texts = self.parts, self.parts.encoded[part]
        return JudgedTexts(
            parts.task,
            parts.corpus.classes,
            texts.encodings,
            parts.tokenizers,
            parts.encoding_of_teacher,
            texts.labels,
            texts.languages,
            self.on.device,
            paired=parts.task == "embed" and len(parts.corpus.train.texts) == 2,
            parallel=parts.corpus.parallel,
            gives_logits=parts.gives_logits,
        )

    def _judged_teachers(self) -> Sequence[tuple[str, TextTeacher]]:
        """The teachers whose answers the student is taught, with their names."""
        parts = self.parts
        if parts.recipe.augment == "teacher":
            return ()  # its texts teach, in its own tokens
        return tuple(zip(parts.teacher_names, parts.teachers, strict=True))

    def _texts_for_check(self) -> JudgedTexts:
        """The validation texts, or else the training texts, without copies where labels judge."""
        parts = self.parts
        if "validation" in parts.encoded:
            return self._texts("validation")
        texts, train = self._texts("train"), parts.corpus.train
        if parts.recipe.augment not in COPYING_AUGMENTS or not isinstance(train.labels, np.ndarray):
            return texts
        encodings = tuple(part.first(len(train)) for part in texts.encodings)  # copies come last
        return replace(texts, encodings=encodings, labels=train.labels, languages=train.languages)

    def _check_teacher(self, name: str, number: int, teacher: TextTeacher) -> None:
        parts = self.parts
        if parts.task == "embed":
            scorer = text_figures.embedding_scorer(self._texts_for_check(), parts.teachers)
            minimum = self.options.min_teacher_accuracy
            scorer.check_teacher(name, number, minimum, self._say)
            return
        figures, given = text_figures.measure(teacher, self._texts_for_check(), teacher=number)
        text_teacher_check.check(
            name,
            parts.task,
            figures,
            given,
            parts.corpus.classes,
            vocabulary=len(parts.student.tokenizer),
            part="validation" if "validation" in parts.encoded else "training",
            minimum=self.options.min_teacher_accuracy,
            say=self._say,
        )

    def _batches(self, part: str, size: int) -> TokenBatches:
        parts, texts = self.parts, self.parts.encoded[part]
        labels, places = texts.labels, parts.encoding_of_teacher
        labels = None if parts.task == "embed" else labels  # of scores nothing is learned
        # A language model's teacher has its own tokens only where it writes texts beforehand.
        apart = any(places) and parts.task not in OF_TOKENS
        return TokenBatches(
            texts.encodings,
            tuple(tokenizer.pad_token_id for tokenizer in parts.tokenizers),
            None if labels is None else torch.from_numpy(labels),
            size,
            self.on.device,
            teachers=places if apart else (),
        )

    def _hidden_in_training(self) -> MaskedTokens | None:
        """How tokens are hidden; None where nothing is predicted, so that blocks see whole texts.

        Raises:
            UserError: If the student's tokenizer has no token for that.
        """
        if self.parts.task != "mlm" or not self.parts.teaches_outputs:
            return None
        who = f"student {self.student_name}"
        return text_figures.hidden_tokens(who, self.parts.student.tokenizer)

    def _sample(self) -> TokenInputs:
        """A few texts that student and teachers can take, whatever their tokenizers."""
        batch = self._batches("train", DRY_RUN_TEXTS).first(DRY_RUN_TEXTS)
        inputs = batching.move(batch, self.on.device).inputs
        assert isinstance(inputs, TokenInputs)
        least = min(len(tokenizer) for tokenizer in self.parts.tokenizers)
        return replace(inputs, ids=inputs.ids % least)

    def _say(self, line: str) -> None:
        if self.on.is_main_process:
            progress.say(line)


# Figures that a report has for validation and for test texts.
_NAMED_BY_PART = (
    *("accuracy", "macro_f1", "matthews", "pearson", "spearman", "mse", "entity_f1"),
    *("perplexity", "bits_per_byte", *embedding_scoring.NAMED_BY_PART),
)
