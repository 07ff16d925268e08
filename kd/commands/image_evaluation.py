"""`kd evaluate` of a student of images: accuracy, calibration and agreement on test images."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsdistill.harness.data import layout, multi_label, paired_folder
from dsdistill.harness.data.labeled_images import LabeledImages
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress
from dsdistill.harness.runs.run_folder import INPUTS_KEY
from kd import attack
from kd.attack import Attack
from kd.commands.evaluation import TEACHER_CLASS_MAP, ChosenTeachers
from kd.data import transfer_images
from kd.data.batching import EvaluationBatches
from kd.data.data_source import DataSource
from kd.data.files.file_source import FileSource
from kd.data.files.image_files import ImageFiles
from kd.evaluation import multi_label_scoring, probes, robustness, scoring
from kd.models import network_names, networks, saved_models, teachers
from kd.models.saved_models import Model
from kd.models.teachers import TeacherUse
from kd.models.zoo import class_names
from kd.objectives import loss_checks, terms
from kd.options import EvaluateOptions
from kd.recipe import Recipe
from kd.runs import private_data, run_data


@dataclass(frozen=True, eq=False)
class TestImages:
    """The images that a student is scored on.

    Attributes:
        source: Data whose test images are these.
        which: Description of the images.
    """

    source: DataSource | FileSource
    which: str


@dataclass(frozen=True, eq=False)
class ImageEvaluation:
    """A student of images with its test images; its members are those of `evaluation.Evaluation`.

    Attributes:
        options: Options of the command.
        student: The student, on the device.
        outputs: Its output for each class of the data; None where the order is the same.
        classes_matched: As in `Evaluation`.
        chosen: The images.
        batches: Batches of them.
        device: Device of the networks.
        attacks: Attacks that the student is judged under.
        teacher_data: The teachers' own pictures of the images; None where they see the images.
        has_teachers: Whether there is anything that the teachers can be shown.
    """

    options: EvaluateOptions
    student: Model
    outputs: tuple[int, ...] | None
    classes_matched: str
    chosen: TestImages
    batches: EvaluationBatches
    device: torch.device
    attacks: tuple[Attack, ...] = ()
    teacher_data: DataSource | None = None
    has_teachers: bool = True

    @property
    def student_name(self) -> str:
        return self.student.name

    @property
    def data_name(self) -> str:
        return self.chosen.source.name

    @property
    def judged_on(self) -> str:
        return self.chosen.which

    def figures(self, teachers: ChosenTeachers | None) -> dict[str, Any]:
        source, temperature = self.chosen.source, self.student.output_temperature
        if not self.student.has_head:
            return self._probe_figures()
        known = dict(self._load_teachers(teachers)) if teachers and self.has_teachers else {}
        network = _OutputSelector(self.student.classifier, self.outputs)
        if self.student.has_several_labels:
            return self._multi_label_figures(network, known)
        figures = scoring.evaluate(
            network,
            self.batches,
            known,
            temperature=temperature,
            classes=source.classes,
            teacher_batches=self._teacher_batches(),
        )
        for note in figures["notes"]:
            progress.say(note)
        for line in source.missing_classes(judged=True):
            progress.say(f"note: {line}")
        return {**figures, "output_temperature": temperature, **self._robustness(network)}

    def _multi_label_figures(
        self, network: nn.Module, teachers: dict[str, nn.Module]
    ) -> dict[str, Any]:
        """Figures on images with any number of labels."""
        source = self.chosen.source
        figures = multi_label_scoring.evaluate(network, self.batches, source.classes, teachers)
        for note in figures["notes"]:
            progress.say(note)
        for line in source.missing_classes(judged=True):
            progress.say(f"note: {line}")
        return figures

    def _probe_figures(self) -> dict[str, Any]:
        """Figures of the embedding of a student without a head."""
        student, source = self.student, self.chosen.source
        known = run_data.read_recipe(self.options.run), student.preprocess, self.device
        train = source.sample(probes.TRAIN_IMAGES, *known)
        validation = source.validation(*known)
        figures = probes.figures(student.classifier, train, validation, self.batches)
        return {**figures, "head": "none"}

    def _robustness(self, network: nn.Module) -> dict[str, Any]:
        """The accuracy under attacks; empty without any."""
        student = self.student
        if not self.attacks:
            return {}
        measured = robustness.measure(
            network,
            self.batches,
            self.attacks,
            student.preprocess,
            temperature=student.output_temperature,
        )
        return {
            "attacked_images": measured.images,
            "attacked_images_accuracy": measured.clean,
            "robust_accuracy": measured.accuracy,
            "attacks": measured.attacks,
        }

    def size(self) -> dict[str, Any]:
        classifier = self.student.classifier
        parameters = {"parameters": networks.parameter_count(classifier)}
        if self.student.bits is not None:  # rounding in float32 is slow; its file has a latency
            return parameters
        return {**parameters, **scoring.latency(classifier, self.student.shape)}

    def _teacher_batches(self) -> EvaluationBatches | None:
        if self.teacher_data is None:
            return None
        data = self.teacher_data
        return data.test(run_data.read_recipe(self.options.run), data.fit(None), self.device)

    def _teacher_use(self) -> TeacherUse:
        """What the run's own loss took from its teachers."""
        loss = run_data.read_recipe(self.options.run).loss
        answers = loss is None or loss_checks.takes_answers(terms.parse(loss))
        return "answers" if answers else "layers"

    def _load_teachers(self, chosen: ChosenTeachers) -> Iterator[tuple[str, nn.Module]]:
        options, source = self.options, self.teacher_data or self.chosen.source
        typed = network_names.names_in(options.teacher, options.trust_module)
        fitted = self.student.preprocess
        if self.teacher_data is not None:
            fitted = self.teacher_data.fit(None)
        images = fitted, source.shape, source.classes
        each = zip(chosen.names, chosen.class_maps, chosen.inputs, strict=True)
        for label, mapping, inputs in each:
            networks.require_typed(str(options.run / "config.json"), label, typed)
            teacher = teachers.load(
                label,
                *images,
                class_map=mapping,
                class_map_option=TEACHER_CLASS_MAP,
                typed=typed,
                mel=source.mel,
                use="answers" if options.teacher else self._teacher_use(),
                groups=source.groups or self.chosen.source.groups,
                several_labels=source.has_several_labels,
                **inputs,
            )
            for remark in teachers.matching_notes(teacher):
                progress.say(f"teacher {label}: {remark}")
            if teacher.by_features:
                continue  # its answers are not of these classes
            yield label, teacher.to(self.device)


def prepare(options: EvaluateOptions, device: torch.device) -> ImageEvaluation:
    """Load a student of images and its test images, and match their classes.

    Args:
        options: Options of the command.
        device: Device of the networks.

    Raises:
        UserError: If run or data are missing or do not fit together.
    """
    for name in ("text", "label"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} is for texts, and {options.run} is a student of images")
    student = saved_models.load_run(options.run, typed=network_names.names_in(options.trust_module))
    if not student.has_head:
        _check_headless(options)
    config = run_data.read_config(options.run)
    recipe = run_data.read_recipe(options.run)
    # A class map says what each class of the data is for the student, groups or not.
    expected = student if options.class_map is None else replace(student, class_groups={})
    chosen = _test_images(options, config, expected, recipe)
    source = chosen.source
    who = f"student {options.run}"
    saved_models.check_recordings(who, student.mel, source.mel)
    saved_models.check_shape(who, student, source.shape)
    saved_models.check_label_kind(who, student, source.has_several_labels)
    if student.has_several_labels and options.robust is not None:
        raise UserError(
            f"--robust attacks the answer of one class an image, and {options.run} learned any "
            "number of labels: leave it out"
        )
    test = source.test(recipe, student.preprocess, device)
    if test is None:
        raise UserError(f"nothing to test on: {source.note or source.name + ' has no test images'}")
    how, outputs = "by name", None
    if not student.has_head:
        how = "none: the student has no head, and probes judge its embedding"
    elif options.class_map is None:
        student = saved_models.match_classes(
            who, student, source.shape, source.classes, option="--class-map"
        )
    else:
        mapping = class_names.read_class_map(options.class_map)
        matched = class_names.match(who, student.classes, source.classes, mapping)
        how, outputs = matched.how, matched.outputs
    attacks: tuple[Attack, ...] = ()
    if options.robust is not None:
        trained = recipe.adversary and attack.parse_adversary(recipe.adversary)
        attacks = attack.parse_robust(options.robust, eps=trained.eps if trained else None)
        robustness.check(attacks, student.preprocess, len(source.classes))
    student.classifier.to(device)
    pictures, has_teachers = _teacher_data(options, config, source)
    return ImageEvaluation(
        options,
        student,
        outputs,
        how,
        chosen,
        test,
        device,
        attacks,
        pictures,
        has_teachers,
    )


def _check_headless(options: EvaluateOptions) -> None:
    """Refuse options that compare answers, of a student without a head.

    Raises:
        UserError: If one is given.
    """
    for name in ("teacher", "teacher_data", "class_map", "teacher_class_map", "robust"):
        if getattr(options, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} compares answers for classes, and {options.run} has "
                "no head: leave it out"
            )


def _teacher_data(
    options: EvaluateOptions, config: Mapping[str, Any], source: DataSource | FileSource
) -> tuple[DataSource | None, bool]:
    """The teachers' own pictures, if they have some, and whether they can be shown anything.

    Raises:
        UserError: If there are no teachers to show them to, or no files that they could belong to.
    """
    folder, stored = options.teacher_data, config.get("teacher_data")
    if folder is not None and not (options.teacher or config.get("teacher")):
        raise UserError("--teacher-data needs --teacher: the run was trained without one")
    if folder is None and stored is not None and options.teacher is None:
        if options.data is not None:
            progress.say(
                "note: the run's teacher saw pictures of its own, and there are none of these "
                "data: it is left out; --teacher-data DIR names them"
            )
            return None, False
        folder = Path(stored)
    if folder is None:
        return None, True
    splits = source.splits if isinstance(source, DataSource) else None
    if splits is None or splits.layout is None:
        raise UserError(f"--teacher-data needs a folder of files, and {source.name} is none")
    h, w, _ = source.shape
    size = config.get("image_size") if h == w else None
    pictures = DataSource(folder.stem, paired_folder.load(folder, splits, splits.layout, size))
    assert pictures.splits is not None
    if not len(pictures.splits.test):
        return None, False
    return pictures, True


class _OutputSelector(nn.Module):
    """A network's outputs in the order of the data's classes."""

    def __init__(self, network: nn.Module, outputs: tuple[int, ...] | None) -> None:
        super().__init__()
        self.network, self.outputs = network, outputs

    def forward(self, images: Tensor) -> Tensor:
        scores = self.network(images)
        return scores if self.outputs is None else scores[:, list(self.outputs)]


def _test_images(
    options: EvaluateOptions, config: Mapping[str, Any], student: Model, recipe: Recipe
) -> TestImages:
    """Choose the images to score on, in the size and with the channels of the student.

    For the data that the run was trained on, these are its test images. For other data, they are
    its test images where it has a test part, and otherwise all of its images.
    """
    if options.data is None and config.get("pate"):
        source = private_data.test_images(config, student, root=options.data_root)
        return TestImages(source, f"public test images beside {source.name}")
    name = options.data or config.get("data")
    if not isinstance(name, str):
        raise UserError(f"{options.run} does not say what it was trained on: give DATA")
    path = Path(name).expanduser()
    held_out = 0.0
    if not student.has_head:
        # The probes are fitted on training images, and chosen on those that were held out.
        held_out = config.get("validation_fraction")
        if transfer_images.is_flat(name):
            raise UserError(
                f"{name} has no labels, and probes judge the embedding of {options.run} with "
                "some: name labelled data, as in kd evaluate RUN DATA"
            )
    elif path.is_dir() and (part := layout.find_lone_test_part(path)):
        path, name = part, str(part)
    where: dict[str, Any] = {"root": options.data_root, "announce": False, "held_out": held_out}
    source = run_data.load(name, student, recipe, config, **where)
    is_array = path.suffix == ".npz" and path.is_file()
    if (
        isinstance(source, DataSource)
        and source.distilled is not None
        and source.splits is not None
    ):
        return TestImages(source, f"test images of {source.splits.name}")
    if source.distilled is not None or not (path.is_dir() or is_array):
        return TestImages(source, f"test images of {source.name}")
    if source.has_several_labels:
        return _multi_label_images(options, config, path, name, source)
    folder = None if is_array else layout.list_folder(path, student.classes or None)
    is_of_run = options.data is None or _is_training_data(config, name, source)
    every = student.has_head and not is_of_run and (folder is None or folder.test is None)
    chosen = _test_on_all_images(source) if every else source
    if folder is not None:
        folder.announce_evaluation(_test_count(chosen), every=every)
    if folder is not None and folder.test:
        return TestImages(chosen, f"test images, {folder.test.folder}")
    if is_of_run or not student.has_head:
        by = "the training has" if is_of_run else "probes have"
        part = f"the share of the images that {by} held out for testing"
        return TestImages(chosen, part)
    return TestImages(chosen, f"all images of {name}")


def _multi_label_images(
    options: EvaluateOptions,
    config: Mapping[str, Any],
    path: Path,
    name: str,
    source: DataSource | FileSource,
) -> TestImages:
    """Choose among the images of a folder with any number of labels, as `_test_images`."""
    folder = multi_label.list_folder(path)
    assert folder is not None
    if folder.test is not None:
        return TestImages(source, f"test images of {name}")
    if options.data is None or _is_training_data(config, name, source):
        return TestImages(
            source, "the share of the images that the training has held out for testing"
        )
    return TestImages(_test_on_all_images(source), f"all images of {name}")


def _test_count(source: DataSource | FileSource) -> int:
    """Number of test images of a folder."""
    if isinstance(source, FileSource):
        test = source.parts[2]
        return len(test) if isinstance(test, ImageFiles) else 0
    assert source.splits is not None
    return len(source.splits.test)


def _is_training_data(
    config: Mapping[str, Any], name: str, source: DataSource | FileSource
) -> bool:
    """Whether these are the data that the run was trained on, by path or by hash."""
    stored = config.get(INPUTS_KEY, {}).get("training images")
    if isinstance(source, FileSource):
        train = source.parts[0]
        digest = train.digest if isinstance(train, ImageFiles) else None
    else:
        digest = source.splits.digest if source.splits else None
    data = config.get("data")
    same_path = isinstance(data, str) and Path(data).resolve() == Path(name).expanduser().resolve()
    return same_path or (stored is not None and stored == digest)


def _test_on_all_images(source: DataSource | FileSource) -> DataSource | FileSource:
    """Make all images of the data test images."""
    if isinstance(source, FileSource):
        parts = [part for part in source.parts if isinstance(part, ImageFiles)]
        rows = np.concatenate([part.rows for part in parts])
        order = np.argsort(rows)
        labels = [part.labels for part in parts if part.labels is not None]
        every = replace(parts[0], rows=rows[order], labels=np.concatenate(labels)[order])
        return replace(source, parts=(source.parts[0], None, every))
    splits = source.splits
    assert splits is not None
    return replace(
        source,
        splits=replace(splits, test=_merge_views(splits.train, splits.validation, splits.test)),
    )


def _merge_views(*parts: LabeledImages) -> LabeledImages:
    """Merge views of one store into one view, in the order of the store."""
    rows = np.concatenate(
        [np.arange(len(part)) if part.rows is None else part.rows for part in parts]
    )
    labels = np.concatenate([part.labels for part in parts])
    order = np.argsort(rows)
    return replace(parts[0], rows=rows[order], labels=labels[order])
