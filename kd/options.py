"""What the commands take. Frozen values; the texts below are the help pages."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from dsdistill.harness import paths
from dsdistill.harness.errors import UserError
from kd import per_teacher, recipe, recipes

# The names that the help pages show for values.
NameArg = Annotated[str | None, tyro.conf.arg(metavar="NAME|RUN")]
NamesArg = Annotated[str | None, tyro.conf.arg(metavar="NAME,NAME,...")]
FolderArg = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]
CountArg = Annotated[int | None, tyro.conf.arg(metavar="N")]
# A text has commas in it, between teachers.
ValuesArg = Annotated[tuple[float | str, ...] | None, tyro.conf.arg(metavar="X X X")]
Sizes = Annotated[int | str | None, tyro.conf.arg(metavar="N")]
ChannelsArg = Annotated[Literal[1, 3] | None, tyro.conf.arg(metavar="1|3")]
NumberArg = Annotated[float | None, tyro.conf.arg(metavar="X")]

_HINTS = get_type_hints(recipe.Recipe)
# A field of the recipe each, None where it is not given.
Overrides: Any = make_dataclass(
    "Overrides",
    [
        (
            f.name,
            Annotated[_HINTS[f.name] | None, tyro.conf.arg(help=f.metadata["help"])],
            field(default=None),
        )
        for f in recipe.OPTIONS
    ],
    frozen=True,
)

DEFAULT_WORKERS = 2  # processes that read image files, where nothing else is asked for
TEACHER_INPUT_OPTIONS = (
    "teacher_image_size",
    "teacher_mean",
    "teacher_std",
)  # what a file of weights cannot say


@dataclass(frozen=True)
class TrainOptions:
    """Train a student on labels alone, or from teachers."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[DATA]")] = "digits"
    """Data set name or path; folder of a dsdistill run; distilled .safetensors file; with
    --augment imagenet also timm's wds/, hfds/ and tfds/ names."""
    student: NameArg = None
    """convnet (the default), mlp, with a width as convnet:32; any timm name; torchvision:NAME;
    hf:NAME; NAME@FILE for weights in a file; or an earlier run's folder."""
    teacher: NamesArg = None
    """Folder of an earlier run, any of the names above with published weights, or FILE.pt2; of
    several, comma-separated, the tempered probabilities are averaged, and terms of layers are."""
    recipe: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """supergradients, hinton, function_matching, cifar, distilled_set, deit; by default one for
    this kind of data and network. The options below change its fields."""
    teacher_weights: Literal["alike", "by-label"] | None = None
    """Of several teachers' logits; by-label: for each image by how well they know its label."""
    class_map: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON file, class of the data -> class of the teacher (name or number); of several teachers
    one for all, or one for each with commas between, and nothing for one that needs none."""
    teacher_image_size: Sizes = None
    """Height and width of the images given to a teacher from a file that does not say it; of
    several teachers one for all, or one for each with commas between, as of --class-map."""
    teacher_mean: ValuesArg = None
    """Its normalisation, one value a channel of images in [0, 1]; of several teachers as above, as
    in 0.5 0.5 0.5 , 0.3 0.3 0.3"""
    teacher_std: ValuesArg = None
    """The same."""
    min_teacher_accuracy: NumberArg = None
    """Refuse a teacher below this accuracy on the validation images, or without any on 2000 of
    the training images."""
    cache: FolderArg = None
    """Keep the teachers' answers here, view by view, for this and for later trainings."""
    cache_top: CountArg = None
    """Keep the largest so many probabilities in half precision; by default all logits, exactly."""
    peers: NamesArg = None
    """Deep mutual learning with these further students."""
    mean_teacher: NumberArg = None
    """Self-distillation from the moving average of the student, with this decay."""
    generations: CountArg = None
    """Born-again networks: so many trainings, each from the student of the one before."""
    assistants: NamesArg = None
    """Networks between teacher and student, trained one from another in this order."""
    pretrained: bool = False
    """Start the student from its published weights."""
    out: FolderArg = None
    """Folder of the run; by default the next free runs/kd-STUDENT-DATA-N."""
    resume: bool = False
    """Continue the unfinished run in --out."""
    seed: int = 0
    """Of the initial weights, the order of the images and their augmentation."""
    preprocess: Literal["standardise", "zca", "none"] | None = None
    """By default standardise, or what the pretrained or the earlier student was made for."""
    validation_fraction: NumberArg = None
    """Share of the training images held out for validation; by default 0.1."""
    channels: ChannelsArg = None
    """1 makes all images grayscale, 3 colour; by default as they are, and colour where a folder
    has both."""
    data_root: Path = field(default_factory=paths.data_root)
    """Where data sets lie or are downloaded to."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    workers: CountArg = None
    """Processes that read image files, for --augment imagenet; by default 2."""
    compile: bool = False
    """Compile the student with torch.compile."""
    channels_last: bool = False
    """Keep the student's weights in that memory format: faster convolutions on GPUs."""
    checkpoint_gradients: bool = False
    """Compute activations twice instead of keeping them: less memory, slower."""
    overrides: Annotated[Overrides, tyro.conf.OmitArgPrefixes] = Overrides()

    @property
    def given(self) -> dict[str, Any]:
        """The fields of the recipe that were given."""
        return {k: v for k, v in asdict(self.overrides).items() if v is not None}

    @property
    def readers(self) -> int:
        """Processes that read image files."""
        return DEFAULT_WORKERS if self.workers is None else self.workers

    def check(self) -> None:
        """Refuse values out of range and options that exclude each other.

        Raises:
            UserError: With the option, the rule and the value.
        """
        if self.recipe is not None:
            recipes.by_name(self.recipe)
        _require(self.seed >= 0, "--seed must be 0 or more", self.seed)
        _require(self.readers >= 0, "--workers must be 0 or more", self.workers)
        _require(not self.resume or self.out is not None, "--resume needs --out", self.out)
        for name in ("min_teacher_accuracy", "mean_teacher"):
            value = getattr(self, name)
            rule = f"{_option(name)} must be in [0, 1)"
            _require(value is None or 0 <= value < 1, rule, value)
        for name in ("cache_top", "generations"):
            value = getattr(self, name)
            rule = f"{_option(name)} must be at least 1"
            _require(value is None or value >= 1, rule, value)
        per_teacher.read_sizes("--teacher-image-size", self.teacher_image_size)
        for name in ("teacher_mean", "teacher_std"):
            per_teacher.read(_option(name), getattr(self, name))
        schemes = ("peers", "mean_teacher", "generations", "assistants")
        chosen = [_option(name) for name in schemes if getattr(self, name) is not None]
        _require(len(chosen) < 2, "only one scheme at a time", " and ".join(chosen))
        self._check_teacher()

    def _check_teacher(self) -> None:
        """Refuse options that need a teacher where there is none, and a teacher where none fits."""
        teacher = self.teacher or (self.recipe and recipes.by_name(self.recipe).teacher)
        if self.teacher and (self.peers or self.mean_teacher):
            raise UserError(
                f"{_option('peers' if self.peers else 'mean_teacher')} is a scheme without a "
                "teacher: leave --teacher out"
            )
        needing = ("cache", "class_map", "min_teacher_accuracy", "teacher_weights", "assistants")
        for name in (*needing, *TEACHER_INPUT_OPTIONS):
            if getattr(self, name) is not None and not teacher:
                raise UserError(f"{_option(name)} needs --teacher")
        if self.teacher_weights and "," not in (teacher or ""):
            raise UserError("--teacher-weights is for several teachers: --teacher ONE,OTHER")
        _require(self.cache_top is None or self.cache is not None, "--cache-top needs --cache", "")


@dataclass(frozen=True)
class EvaluateOptions:
    """Judge a trained student on test images."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a finished run."""
    data: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[DATA]")] = None
    """Data set to test on; by default the one it was trained for. Of other data than those, all
    images are judged, unless there is a test part (a folder with train/ and test/, say)."""
    teacher: NameArg = None
    """To measure the agreement with; by default the one it was trained with."""
    class_map: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON file, class of the data -> class of the student (name or number)."""
    teacher_class_map: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """The same of the teacher; of several teachers as for kd train. By default, of the run's own
    teachers, the one that it was trained with."""
    data_root: Path = field(default_factory=paths.data_root)
    """Where data sets lie or are downloaded to."""
    device: str = "auto"
    """Where accuracy is measured; latency is always the CPU's."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True)
class ExportOptions:
    """Write a finished student for other programs, and check that it answers the same."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a finished run."""
    format: Literal["onnx", "pt2", "safetensors", "timm"]
    """onnx: with preprocessing, for onnxruntime and others; pt2: the same for torch; safetensors:
    weights alone; timm: a folder for timm.create_model."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """File or folder to write; by default RUN/export/STUDENT with a suffix."""
    data_root: FolderArg = None
    """Where the run's data lie, of which some images are compared; by default where they lay."""


@dataclass(frozen=True)
class ReportOptions:
    """Compare finished runs on one page."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folders of finished runs; those that differ in their seed alone are put together."""
    out: Path = Path("report.html")
    """The page to write."""


def told(values: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """What is told of each teacher, as arguments of `teachers.load`.

    Args:
        values: Options, by name; those of `TEACHER_INPUT_OPTIONS` count, where they are there.
        count: Number of teachers.

    Raises:
        UserError: If there are as many values as neither one nor teachers.
    """
    size, mean, std = (values.get(name) for name in TEACHER_INPUT_OPTIONS)
    sizes = per_teacher.read_sizes("--teacher-image-size", size, count)
    means = per_teacher.read("--teacher-mean", mean, count)
    deviations = per_teacher.read("--teacher-std", std, count)
    return [
        {"image_size": size, "mean": mean, "std": std}
        for size, mean, std in zip(sizes, means, deviations, strict=True)
    ]


def _require(holds: bool, rule: str, got: object) -> None:
    if not holds:
        raise UserError(f"{rule}, got {got}")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
