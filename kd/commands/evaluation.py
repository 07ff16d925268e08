"""What `kd evaluate` asks of an evaluation: one of images, or one of texts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dsdistill.harness.errors import UserError
from kd.models import network_names
from kd.models.zoo import class_names
from kd.models.zoo.class_names import ClassMap
from kd.options import EvaluateOptions, teacher_inputs

TEACHER_CLASS_MAP = "--teacher-class-map"  # option of the teachers' class maps, for messages


@dataclass(frozen=True)
class ChosenTeachers:
    """Teachers that a student is compared with.

    Attributes:
        names: Their names.
        class_maps: For each, class of the data -> class of the teacher; None where names decide.
        inputs: For each, what the training was told of its images.
    """

    names: tuple[str, ...]
    class_maps: tuple[ClassMap | None, ...]
    inputs: tuple[Mapping[str, Any], ...]


class Evaluation(Protocol):
    """A finished student with the data that it is judged on, which fit each other."""

    @property
    def student_name(self) -> str:
        """Name that the student was built from."""
        ...

    @property
    def data_name(self) -> str:
        """Name of the data."""
        ...

    @property
    def judged_on(self) -> str:
        """Description of what is judged."""
        ...

    @property
    def classes_matched(self) -> str | None:
        """How the student's outputs were matched to the data's classes; None without classes."""
        ...

    def figures(self, teachers: ChosenTeachers | None) -> dict[str, Any]:
        """Load the teachers, and measure the figures of the student beside theirs.

        Returns:
            The figures, with `notes`, sentences for the user.

        Raises:
            UserError: If a teacher is missing or does not fit.
        """
        ...

    def size(self) -> dict[str, Any]:
        """Number of parameters, and latency."""
        ...


def choose_teachers(
    options: EvaluateOptions, config: Mapping[str, Any]
) -> tuple[str | None, ChosenTeachers | None]:
    """The named teachers; those of the run itself with the options that they had there.

    Args:
        options: Options of the command.
        config: Options of the run.

    Returns:
        Their names as one text, and the choice; None of both without teachers.

    Raises:
        UserError: If a name or a class map does not fit.
    """
    name = options.teacher or config.get("teacher")
    if name is None and options.teacher_class_map is not None:
        raise UserError(f"{TEACHER_CLASS_MAP} needs --teacher: the run was trained without one")
    if name is None:
        return None, None
    names = network_names.parse_names("--teacher", name)
    is_of_run = options.teacher is None or (
        ",".join(map(network_names.absolute_name, names)) == config.get("teacher")
    )
    stored = config if is_of_run else {}
    text = options.teacher_class_map or stored.get("class_map")
    maps = class_names.read_class_maps(text, names, TEACHER_CLASS_MAP)
    return name, ChosenTeachers(
        tuple(names), tuple(maps), tuple(teacher_inputs(stored, len(names)))
    )
