"""A training on images: the checks and the figures that need images."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dsdistill.harness import shell
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import metrics
from dsdistill.harness.runs import progress
from kd.assembly import (
    pruned_training,
    run_inputs,
    training_batches,
    training_checks,
    training_networks,
    training_parts,
)
from kd.assembly.training import AssembledTraining, Validate
from kd.assembly.training_parts import TrainingParts
from kd.data import class_weights, data_source
from kd.data.batching import BatchSource, EvaluationBatches
from kd.data.data_source import DataSource
from kd.data.files.file_source import FileSource
from kd.evaluation import (
    answer_balance,
    multi_label_scoring,
    probes,
    robustness,
    scoring,
    teacher_check,
)
from kd.evaluation.answer_balance import AnswerBalance
from kd.exports import quantised_file
from kd.models import networks, saved_models
from kd.models.quantised import quantised_network
from kd.models.teachers import Teacher
from kd.objectives import loss_checks
from kd.objectives.schemes import Objective
from kd.options import TrainOptions
from kd.recipe import VALIDATION_FIELDS
from kd.training.checkpoint import TrainingState


def assemble(options: TrainOptions) -> "ImageTraining":
    """Load data and networks of images, and check that they fit together.

    Raises:
        UserError: If a name is unknown, a file is missing, or parts do not fit together.
    """
    parts = training_parts.assemble(options)
    training_checks.check(parts, options)
    if parts.on.is_main_process:
        for remark in loss_checks.remarks(parts.terms, images=parts.source.count):
            progress.say(remark)
    return ImageTraining(parts, options)


@dataclass(frozen=True, eq=False)
class ImageTraining(AssembledTraining[TrainingParts]):
    """A training on images; its members are described in `training.Training`."""

    @property
    def validation_count(self) -> int | None:
        return self.parts.source.validation_count

    def build_objective(self) -> Objective:
        return training_parts.build_objective(self.parts, self.options)

    def check_options(self) -> None:
        options, source = self.options, self.parts.source
        if options.workers is not None and not isinstance(source, FileSource):
            raise UserError("--workers has no effect without --augment imagenet: leave it out")
        if options.validation_fraction is not None and source.brings_validation:
            line = (
                f"--validation-fraction has no effect on {options.data}, which has a validation "
                "part of its own"
            )
            if not options.resume:
                raise UserError(f"{line}: leave it out")
            progress.say(f"note: {line}")  # of a run that an earlier version has started

    def load(self) -> BatchSource:
        return training_batches.load(self.parts)

    def check_step(self, objective: Objective, source: BatchSource) -> None:
        training_parts.check_step(self.parts, objective, source.sizes)

    def compile(self, objective: Objective, source: BatchSource) -> None:
        self.parts.student.classifier.network.compile()

    def check_teachers(self) -> None:
        parts, source = self.parts, self.parts.source
        say = progress.say if parts.on.is_main_process else lambda line: None
        for line in source.missing_classes():
            say(f"note: {line}")
        fitted, device, readers = parts.teacher_preprocess, parts.on.device, parts.readers
        batches: EvaluationBatches | None = parts.teacher_source.validation(
            parts.recipe, fitted, device, readers
        )
        part = "validation"
        if batches is None:
            say(self._describe_no_validation())
        if batches is None and self._answering_teachers():
            shuffled = parts.teacher_source.shuffled(parts.recipe, fitted, device, readers)
            batches = None if shuffled is None else teacher_check.FirstImages(shuffled)
            part = "training"
        minimum = self.options.min_teacher_accuracy
        for name, teacher in zip(parts.teacher_names, parts.teachers, strict=True):
            if teacher.by_features:
                if minimum is not None:
                    raise UserError(
                        f"--min-teacher-accuracy {minimum:g} needs the data's classes, which "
                        f"teacher {name} does not have: leave it out"
                    )
                say(f"teacher {name}: {teacher_check.describe(teacher.resolved)}")
        if parts.class_weights is not None:
            say(parts.class_weights.describe())
        if not parts.student.has_head:
            say("the student has no head: probes judge its embedding")
        if self._answering_teachers() and batches is None:
            say("the teachers are not checked: there are no real images to check them on")
            if minimum is not None:
                raise UserError(
                    f"--min-teacher-accuracy {minimum:g} needs real images to check the teacher "
                    f"on, and there are none ({source.note}): leave it out"
                )
        elif batches is not None:
            more = self._training_images if part == "validation" else _none
            check = partial(teacher_check.check, minimum=minimum, part=part, more=more, say=say)
            if source.has_several_labels:
                check = partial(
                    multi_label_scoring.check_teacher, minimum=minimum, part=part, say=say
                )
            for name, teacher in self._answering_teachers():
                check(name, teacher, batches)
        balance = self._answer_balance()
        if balance is not None:
            for line in answer_balance.describe(balance, source.classes):
                say(line)

    def input_hashes(self) -> dict[str, str]:
        return run_inputs.hashes(self.parts, self.options)

    def prepare(self, objective: Objective, source: BatchSource) -> BatchSource:
        return training_batches.prepare(self.parts, self.options, objective, source)

    def validator(self) -> Validate | None:
        student, batches = self.parts.student, self._validation_batches()
        if batches is None:
            return None

        recipe = self.parts.recipe
        attack = training_parts.training_attack(recipe)
        by_attack = attack if recipe.metric == "robust_accuracy" else None

        def validate(network: nn.Module) -> dict[str, float]:
            classifier = student.classifier.with_network(network)
            if not student.has_head:
                known = probes.embed(classifier, batches)
                return {"accuracy": probes.leave_one_out_accuracy(known)}
            if student.has_several_labels:
                return multi_label_scoring.validate(classifier, batches, self.on)
            figures = scoring.validate(
                classifier,
                batches,
                self.on,
                logits=student.gives_logits,
                classes=len(student.classes) if recipe.metric in scoring.BY_CLASS else None,
            )
            if by_attack is None:
                return figures
            robust = robustness.validation_accuracy(
                classifier, batches, by_attack, student.preprocess, self.on
            )
            return {**figures, "robust_accuracy": robust}

        return validate

    def finished(self, state: TrainingState) -> "ImageTraining":
        student, batches = self.parts.student, self._validation_batches()
        student.classifier.network.load_state_dict(state.best)
        if batches and student.has_head and not student.gives_logits:
            outputs, labels = scoring.outputs_and_labels(student.classifier, batches)
            temperature = metrics.fit_temperature(outputs, labels)
            student = replace(student, output_temperature=temperature)
        return replace(self, parts=replace(self.parts, student=student))

    def figures(self, state: TrainingState) -> dict[str, Any]:
        student, source = self.parts.student, self.parts.source
        return {
            **self._test_metrics(),
            **self._validation_figures(state),
            "parameters": networks.parameter_count(student.classifier),
            "data": source.name,
            "train_images": source.count,
            "output_temperature": student.output_temperature,
            "note": source.note,
            "head": "trained" if student.has_head else "none",
            **self._quantised_figures(),
            **self._pruned_figures(),
            **class_weights.figures(self.parts.class_weights),
            **({} if source.groups is None else {"class_groups": source.groups.by_name}),
            **((isinstance(source, DataSource) and source.privacy) or {}),
            **self._transfer_figures(),
        }

    def latency(self) -> dict[str, float | int]:
        student = self.parts.student
        if student.bits is not None:  # rounding in float32 is slow; its file has a latency
            return {}
        return {**scoring.latency(student.classifier, student.shape, quick=True)}

    def save(self, folder: Path) -> None:
        saved_models.save_run(folder, self.parts.student)

    def _quantised_figures(self) -> dict[str, Any]:
        """How the student is quantised, and the figures of its file; empty in float32."""
        parts, student = self.parts, self.parts.student
        if student.bits is None:
            return {}
        original = None
        if self.options.student is not None and Path(self.options.student).is_dir():
            typed = training_networks.typed_names(self.options)
            original = saved_models.load_run(Path(self.options.student), typed=typed)
            images = student.shape, student.classes
            original = saved_models.match_classes("the student", original, *images, _say_nothing)
            network = quantised_network.float_copy(original.classifier.network)
            classifier = original.classifier.with_network(network)
            original = replace(original, classifier=classifier, bits=None)
        return {
            "quantized": quantised_file.describe(student, "training"),
            **quantised_file.figures(student, original, parts.source, parts.recipe),
        }

    def _pruned_figures(self) -> dict[str, Any]:
        """The student before and after pruning; empty where nothing was pruned."""
        parts, student, share = self.parts, self.parts.student, self.options.prune
        if parts.unpruned is None or share is None:
            return {}
        batches = None
        if Path(self.options.student or "").is_dir():  # else it does not know the classes
            batches = parts.source.test(
                parts.recipe, student.preprocess, parts.on.device, parts.readers
            )
        return {"pruning": pruned_training.figures(parts.unpruned, student, share, batches)}

    def _validation_batches(self) -> EvaluationBatches | None:
        parts = self.parts
        fitted, device = parts.student.preprocess, parts.on.device
        return parts.source.validation(parts.recipe, fitted, device, parts.readers)

    def _training_images(self, count: int) -> EvaluationBatches | None:
        """At most `count` training images, spread over the classes, in evaluation views."""
        parts = self.parts
        fitted, device = parts.teacher_preprocess, parts.on.device
        return parts.teacher_source.sample(count, parts.recipe, fitted, device, parts.readers)

    def _describe_no_validation(self) -> str:
        """Say in one line what a training without validation images lacks.

        Raises:
            UserError: If an option is given that needs validation images.
        """
        options, parts = self.options, self.parts
        require_no_validation_options(options, "images")
        fraction = data_source.fraction_or_default(options.validation_fraction)
        lost = ["the weights of the last epoch are saved, not of the best"]
        if parts.recipe.average_best > 1:
            lost.append(f"and not the mean of {parts.recipe.average_best} epochs")
        if parts.student.has_head and not parts.student.gives_logits:
            lost.append("and its outputs are not calibrated")
        if parts.source.distilled is not None and parts.source.note:
            reason = "there are no real images"
        elif parts.source.distilled is not None or fraction == 0:
            reason = "none are held out"
        else:
            reason = f"a share of {fraction:g} of so few images of each class is none"
        return f"no validation images ({reason}): {', '.join(lost)}"

    def _answer_balance(self) -> AnswerBalance | None:
        """Measure how evenly the teachers answer for a transfer set; None without one.

        Of several teachers the mean of the probabilities counts.
        """
        parts, source = self.parts, self.parts.source
        teachers = [teacher for _, teacher in self._answering_teachers()]
        if not teachers or isinstance(source, FileSource):
            return None
        batches = source.transfer_sample(
            answer_balance.IMAGES, parts.student.preprocess, parts.on.device
        )
        if batches is None:
            return None
        answers = [metrics.softmax(scoring.outputs(t, batches), 1.0) for t in teachers]
        return answer_balance.measure(np.mean(answers, axis=0))

    def _transfer_figures(self) -> dict[str, Any]:
        """Figures of the teachers' answers for a transfer set; empty without one."""
        balance = self._answer_balance()
        if balance is None:
            return {}
        counts = dict(zip(self.parts.source.classes, balance.counts.tolist(), strict=True))
        figures = {
            "mean_answer_entropy": balance.entropy,
            "mean_answer_entropy_share": balance.share,
            "answered_classes": counts,
        }
        return {"transfer": {"name": self.options.transfer or self.options.data, **figures}}

    def _test_metrics(self) -> dict[str, Any]:
        """Measure the student on the test set."""
        parts, student = self.parts, self.parts.student
        fitted, device = student.preprocess, parts.on.device
        batches = parts.source.test(parts.recipe, fitted, device, parts.readers)
        if batches is None:
            return {"test_accuracy": None, "test_images": 0}
        if not student.has_head:
            return self._probe_figures(batches)
        theirs: EvaluationBatches | None = batches
        if parts.teacher_data is not None:
            data = parts.teacher_data
            theirs = data.source.test(parts.recipe, data.preprocess, device)
        known = dict(self._answering_teachers())
        if student.has_several_labels:
            return self._multi_label_figures(batches, known)
        figures = scoring.evaluate(
            student.classifier,
            batches,
            {} if theirs is None else known,
            teacher_batches=theirs,
            temperature=student.output_temperature,
            classes=parts.source.classes,
        )
        for note in figures.pop("notes"):
            progress.say(note)
        named = {name: figures.pop(name) for name in ("accuracy", "images", *scoring.BY_CLASS)}
        attacked = self._robustness(batches)
        return {**{f"test_{name}": value for name, value in named.items()}, **figures, **attacked}

    def _multi_label_figures(
        self, batches: EvaluationBatches, teachers: dict[str, Teacher]
    ) -> dict[str, Any]:
        """Figures on test images with any number of labels."""
        student, classes = self.parts.student, self.parts.source.classes
        figures = multi_label_scoring.evaluate(student.classifier, batches, classes, teachers)
        for note in figures.pop("notes"):
            progress.say(note)
        named = ("images", "average_precision", *multi_label_scoring.METRICS)
        return {
            "test_accuracy": None,
            "metric": self.recipe.metric,
            **{f"test_{name}": figures.pop(name) for name in named},
            **figures,
        }

    def _answering_teachers(self) -> list[tuple[str, Teacher]]:
        """The teachers with answers for the data's classes, with their names."""
        pairs = zip(self.parts.teacher_names, self.parts.teachers, strict=True)
        return [(name, teacher) for name, teacher in pairs if not teacher.by_features]

    def _probe_figures(self, batches: EvaluationBatches) -> dict[str, Any]:
        """Measure the embedding of a student without a head on the test set."""
        parts, student = self.parts, self.parts.student
        known = parts.recipe, student.preprocess, parts.on.device, parts.readers
        train = parts.source.sample(probes.TRAIN_IMAGES, *known)
        validation = self._validation_batches()
        figures = probes.figures(student.classifier, train, validation, batches)
        return {
            "test_accuracy": None,
            "test_images": figures.pop("images"),
            **{f"test_{name}": value for name, value in figures.items()},
        }

    def _robustness(self, batches: EvaluationBatches) -> dict[str, Any]:
        """Measure the student on the test set under attacks; empty without any."""
        student = self.parts.student
        attacks = training_parts.judging_attacks(self.parts, self.options)
        if not attacks:
            return {}
        measured = robustness.measure(
            student.classifier,
            batches,
            attacks,
            student.preprocess,
            temperature=student.output_temperature,
        )
        return {
            "test_robust_accuracy": measured.accuracy,
            "attacked_images": measured.images,
            "attacks": measured.attacks,
        }

    def _validation_figures(self, state: TrainingState) -> dict[str, float | None]:
        """Validation figures of the saved weights; a mean of several epochs is measured again."""
        student, batches = self.parts.student, self._validation_batches()
        if not student.has_several_labels:
            return {"validation_accuracy": self._validation_accuracy(state, batches)}
        figures = state.kept[0].figures if state.kept else {}
        if len(state.kept) > 1 and batches is not None:
            figures = multi_label_scoring.validate(student.classifier, batches, self.on)
        return {f"validation_{name}": figures.get(name) for name in multi_label_scoring.METRICS}

    def _validation_accuracy(
        self, state: TrainingState, batches: EvaluationBatches | None
    ) -> float | None:
        """Validation accuracy of the saved weights of a student of one class an image."""
        student = self.parts.student
        if len(state.kept) == 1 or batches is None:
            return state.best_accuracy
        if not student.has_head:
            known = probes.embed(student.classifier, batches)
            return probes.leave_one_out_accuracy(known)
        return scoring.evaluate(student.classifier, batches)["accuracy"]


def require_no_validation_options(options: TrainOptions, kind: str) -> None:
    """Refuse options that compare validations, where there are none.

    Args:
        options: Options of the training.
        kind: What is missing, `images` or `texts`.

    Raises:
        UserError: If one is given.
    """
    for name in VALIDATION_FIELDS:
        if name in options.given:
            raise UserError(
                f"{shell.flag(name)} has no effect without validation {kind}: "
                "leave it out, or hold some out with --validation-fraction"
            )


def _say_nothing(line: str) -> None:
    """Do nothing with a line that was said before the training."""


def _none(count: int) -> None:
    """Add no images: the teacher is checked on training images already."""
