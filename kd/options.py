"""The options of the commands, as frozen values; the strings below the fields are help texts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_type_hints

import tyro

from dsdistill.harness import paths, shell
from dsdistill.harness.errors import UserError
from dsdistill.harness.help_page import Layout, Shown, format_default
from kd import attack, per_teacher, recipe, recipes
from kd.models.quantised import bit_widths
from kd.privacy import settings as pate_settings
from kd.synthesis import settings as synthesis_settings

if TYPE_CHECKING:
    from dsdistill.harness.data.mel_images import MelOptions

NamesArg = Annotated[str | None, Shown("NAME,...")]
FolderArg = Annotated[Path | None, Shown("DIR")]
# Texts stand among the numbers where commas part the teachers.
ValuesArg = Annotated[
    tuple[float | str, ...] | None, Shown("X ...", "what is known of its weights")
]
Sizes = Annotated[int | str | None, Shown("N", "what is known of its weights")]
Channels = Annotated[
    Literal[1, 3] | None, Shown(default="as they are; colour where a folder has both")
]

TEACHER = "teacher"  # name of a student that starts as a copy of its teacher
DEFAULT_WORKERS = 2  # processes that read image files, where nothing else is asked for
# Defaults that follow from more than the kind of data and of network.
DEFAULTS_BY_DATA = {
    "loss": "ce:1, mse:1 on a distilled set; ce:0.1,kd:0.9:temperature=4 with a teacher; "
    "kd:1:temperature=4 with --transfer or a set of kd synthesize; ce:1,kd:1:temperature=1 with "
    "--peers; with --adversary adv-ce:1, and with a teacher rslad:5/6,kd:1/6:temperature=1; of "
    "images with several labels bce:1, with a teacher bce:0.1,mld:0.9:temperature=1; of texts what "
    "their --task needs",
    "validate_every": "1, or more so that short epochs make at most 40 validations",
    "image_size": "as they are",
    "patience": "never",
    "copies": "20; 10 of pairs",
    "metric": "accuracy; of several labels mean_average_precision; of scores spearman, of tags "
    "macro_f1 or entity_f1, of tokens nll, of embeddings cosine",
}


def _by_recipe(name: str) -> Shown:
    """The default of a field of the recipe, for each kind of data and of network."""
    kinds = (recipes.REAL, recipes.REAL_ADAMW, recipes.SMALL, recipes.SMALL_LAYER_NORM)
    real, layer_norm, small, _ = (format_default(getattr(kind, name)) for kind in kinds)
    if name == "epochs":
        return Shown(default=f"{real}; on a distilled set --steps {recipes.SMALL.steps}")
    if name == "steps":
        return Shown(default=f"--epochs {recipes.REAL.epochs}; {small} on a distilled set")
    if name == "metric":
        return Shown("NAME", DEFAULTS_BY_DATA[name])  # more names than a line holds
    if name == "warmup":
        return Shown(default=f"{real}; {small} steps on a distilled set")
    if name in DEFAULTS_BY_DATA:
        return Shown(default=DEFAULTS_BY_DATA[name])
    if real == layer_norm == small:
        return Shown(default=real)
    if real == small:
        return Shown(default=f"{real}; {layer_norm} with layer norm")
    if layer_norm == small:
        return Shown(default=f"{real}; {small} with layer norm or on a distilled set")
    return Shown(default=f"{layer_norm} with layer norm; else {real}, on a distilled set {small}")


def _by_method(name: str, more: str = "") -> Shown:
    """The default of a number of `kd synthesize`, for each method that has one."""
    pairs = [
        f"{format_default(value)} with --method {method}"
        for method, numbers in synthesis_settings.DEFAULTS.items()
        if (value := _synthesis_default(numbers, name)) is not None
    ]
    return Shown(default="; ".join(pairs) + more)


def _synthesis_default(numbers: Mapping[str, Any], name: str) -> float | None:
    if name == "bn_weight" and numbers[name] is None:
        return synthesis_settings.GENERATOR_BN_WEIGHT
    return numbers.get(name)


def _list_defaults(kind: recipe.Recipe, common: recipe.Recipe = recipes.REAL) -> str:
    """The options in which the recipe of a kind of data differs from another one's."""
    return " ".join(
        f"{shell.flag(f.name)} {format_default(getattr(kind, f.name))}"
        for f in recipe.OPTIONS
        if getattr(kind, f.name) != getattr(common, f.name)
    )


_HINTS = get_type_hints(recipe.Recipe)
# One field for each field of the recipe; None where it is not given.
Overrides: Any = make_dataclass(
    "Overrides",
    [
        (
            f.name,
            Annotated[
                _HINTS[f.name] | None,
                tyro.conf.arg(help=f.metadata["help"]),
                _by_recipe(f.name),
            ],
            field(default=None, metadata=f.metadata),
        )
        for f in recipe.OPTIONS
    ],
    frozen=True,
)

TEACHER_INPUT_OPTIONS = (
    "teacher_image_size",
    "teacher_mean",
    "teacher_std",
)  # what a file of weights cannot say
TEXT_OPTIONS = ("task", "text", "label", "max_length", "tokenizer", "keep_layers", "lora", "mlm")
TEXT_FIELDS = ("copies", "on_policy")  # of the recipe
SOUND_OPTIONS = ("seconds", "mel_bands", "sample_rate")
PRIVATE_OPTIONS = ("pate", "public", "max_epsilon")
IMAGE_OPTIONS = (
    *PRIVATE_OPTIONS,
    *("channels", "preprocess", "pretrained", "centred", "workers", "channels_last", "prune"),
    *("quantize", "full_range", "robust", "student_view", "transfer", "teacher_data", "head"),
    "class_groups",
    *(*TEACHER_INPUT_OPTIONS, *SOUND_OPTIONS),
)
IMAGE_FIELDS = (
    *("image_size", "crop_padding", "hflip", "interpolation", "min_scale", "auto_augment"),
    *("color_jitter", "random_erase", "repeats", "crop_share", "mixup", "cutmix"),
    *("mix_probability", "mix_switch", "adversary", *recipe.SPECAUGMENT_FIELDS),
)


@dataclass(frozen=True)
class TrainOptions:
    """Train a student on labels alone or from teachers."""

    LAYOUT: ClassVar = Layout(
        groups={
            "Student": "student head student_view pretrained centred prune quantize full_range "
            "keep_layers lora recipe trust_module",
            "Output and resuming": "out resume seed",
            "Teacher": "teacher teacher_data teacher_weights class_map teacher_image_size "
            "teacher_mean teacher_std min_teacher_accuracy cache cache_top",
            "Private images": "pate public max_epsilon",
            "Loss": "loss label_smoothing class_weights",
            "Attacks": "adversary robust",
            "Training": "epochs steps batch_size accumulate optimizer lr momentum weight_decay "
            "decay_all clip",
            "Schedule of the learning rate": "schedule warmup warmup_from cooldown final "
            "milestones decay",
            "Validation and averaging": "metric validate_every patience average_best ema ema_ramp",
            "Data": "transfer class_groups image_size channels preprocess validation_fraction "
            "data_root",
            "Recordings": "seconds mel_bands sample_rate time_shift hide_bands hide_time",
            "Texts": "task text label max_length tokenizer copies mlm on_policy",
            "Augmentation": "augment hflip crop_padding mixup cutmix mix_probability mix_switch",
            "Image files": "workers min_scale interpolation auto_augment color_jitter "
            "random_erase repeats crop_share",
            "Schemes beside plain distillation": "peers mean_teacher generations assistants",
            "Hardware": "device precision compile channels_last checkpoint_gradients",
        },
        notes={
            "Teacher": "With several teachers, separated by commas, --class-map and the options of "
            "their images are given once for all, or once for each with commas between, such as "
            "--teacher-mean 0.5 0.5 0.5 , 0.3 0.3 0.3, and nothing for a teacher that needs none.",
            "Training": "Some defaults depend on the data and on the student: transformers and "
            "ConvNeXt have layer norm. --recipe sets others. Those shown are for images; of texts "
            f"they are {_list_defaults(recipes.FINETUNE)}, and of a fresh student "
            f"{_list_defaults(recipes.FRESH, recipes.FINETUNE)}.",
            "Image files": "These need --augment imagenet.",
            "Recordings": "A folder of class folders of .wav files: each becomes an image of its "
            "mel bands over time. The last three need --augment specaugment.",
            "Student": "With --prune, and with --quantize, a trained student learns from what it "
            "was before, unless --teacher names another one or --loss needs none, at a tenth of "
            "the learning rate, without warm-up, for ten epochs.",
            "Texts": "A file or folder of texts is recognised by its name: a .tsv, .csv, .jsonl, "
            ".parquet or .txt, or a folder with a train file and, where it has them, dev and test "
            "files of these kinds.",
        },
        examples=(
            "kd train digits --student convnet --epochs 5 --out runs/teacher",
            "kd train digits --student mlp:64 --teacher runs/teacher --out runs/student",
        ),
    )

    data: Annotated[tyro.conf.Positional[str], Shown("DATA")] = "digits"
    """Data set name, folder of images or of .wav files, or .npz file; folder of a dsdistill run or
    its .safetensors file; with --augment imagenet also timm's names wds/DIR, hfds/NAME and
    tfds/NAME; a file or folder of texts"""

    student: Annotated[str | None, Shown("NAME|RUN", "convnet, or the student of --recipe")] = None
    """convnet or mlp, with a width as in convnet:32; any name of timm; torchvision:NAME; hf:NAME;
    module:attribute for a network of your own code, which is imported, from the current folder
    too, with arguments as in "module:attribute(width=32)"; NAME@FILE with the weights in a file; or
    the folder of an earlier run. For texts hf:NAME, bilstm:150, a fresh bert:4x312, or teacher, a
    copy of the teacher"""

    head: Annotated[Literal["trained", "none"], Shown("trained|none")] = "trained"
    """none: leave the classifier out, so that the student returns its embedding, learns from the
    features of its teachers alone, and needs no labels: DATA may be a folder of images without
    classes. --student RUN adds a head later"""

    student_view: Annotated[str | None, Shown("VIEW,...", "whole images")] = None
    """Let the student see less of each image than its teacher: gray, size:N (shorter side in
    pixels), channels:0,1 (numbers from 0) or edges, or several in turn, such as gray,size:8. The
    view is a part of the student, which still takes whole images"""

    teacher: NamesArg = None
    """Folder of an earlier run, any of the names of --student with published weights, FILE.pt2, or
    module:attribute for code that returns a trained network. Of several, the tempered probabilities
    and the losses on layers are averaged"""

    transfer: Annotated[str | None, Shown("FOLDER|SET", "the training images of DATA")] = None
    """Train on the teacher's answers for these images in place of those of DATA, which then gives
    validation and test images alone: a folder of images of any kind, an .npz file of images, the
    training images of a named data set, or a distilled set or its run. Labels are not used, and no
    loss may need them"""

    teacher_data: Annotated[Path | None, Shown("DIR", "the student's images")] = None
    """Folder with another picture of every image for the teacher, such as its depth or a higher
    resolution, below the same path up to the extension; shifts, flips and mixing are the same"""

    recipe: Annotated[str | None, Shown("NAME", "one for this kind of data and student")] = None
    """supergradients, hinton, function_matching, cifar, distilled_set or deit; against attacks pgd,
    trades, ard, rslad or adaad; for texts finetune, bilstm, pkd, tinybert, tinybert-intermediate,
    distilbert, minilm, sequence or gkd: sets the options of loss, training and augmentation that
    are not given here"""

    teacher_weights: Annotated[
        Literal["alike", "by-label"] | None, Shown("alike|by-label", "alike")
    ] = None
    """Weights of several teachers' logits; by-label: for each image by how well each teacher knows
    its label"""

    class_map: Annotated[str | None, Shown("FILE")] = None
    """JSON file, class of the data -> class of the teacher (name or number)"""

    class_weights: Annotated[
        str | None, Shown("balanced|FILE", "every image and text counts alike")
    ] = None
    """Weights of the classes in the cross-entropy of labels. balanced: each class counts as much as
    any other, by how often it occurs among the training labels; FILE: a JSON object of class names
    and weights, or a table with the columns class and weight. They are scaled to a mean of 1 over
    the training labels"""

    class_groups: Annotated[Path | None, Shown("FILE", "the classes of the data")] = None
    """Learn groups of classes: a JSON object of class names and groups, or a table with the columns
    class and group. A teacher may know the groups, or the classes, whose probabilities are summed;
    kd evaluate takes data with either"""

    teacher_image_size: Sizes = None
    """Height and width of a teacher's images, where its file does not say it"""

    teacher_mean: ValuesArg = None
    """Mean by which its images are normalised, one value per channel, of images in [0, 1]"""

    teacher_std: ValuesArg = None
    """Standard deviation by which its images are normalised, one value per channel"""

    min_teacher_accuracy: float | None = None
    """Refuse a teacher below this accuracy, of several labels mean average precision, on the
    validation images, or on 2000 training images where none are held out"""

    cache: FolderArg = None
    """Keep the teachers' answers in this folder, view by view, for this and for later trainings:
    logits, of texts those of tokens too, and the vectors of layers that losses compare"""

    cache_top: Annotated[
        int | None, Shown(default="all logits, exactly; of a vocabulary the 64 largest")
    ] = None
    """Keep only the N largest probabilities of each answer, in half precision, at the temperature
    of the loss"""

    peers: NamesArg = None
    """Deep mutual learning with these further students"""

    mean_teacher: float | None = None
    """Self-distillation from the moving average of the student, with decay X"""

    generations: int | None = None
    """Born-again networks: N trainings, each from the student of the one before"""

    assistants: NamesArg = None
    """Networks between teacher and student, each trained from the one before, in this order"""

    pate: Annotated[str | None, Shown("SETTING=VALUE,...")] = None
    """Keep the images of DATA private: the student learns the noisy votes of teachers on public
    images. teachers and sigma, the deviation of the noise in votes, must be given; threshold and
    sigma1 (answer only where the teachers agree), answers and queries (at most), delta (1e-5),
    network (mlp:64) and steps (300) of the teachers may be"""

    public: Annotated[str | None, Shown("DATA|test:N")] = None
    """Public images that the teachers are asked about, whose labels are not used; test:N: N test
    images of DATA, of which the others test the student"""

    max_epsilon: float | None = None
    """Refuse to spend a larger epsilon of differential privacy"""

    robust: Annotated[
        str | None, Shown("ATTACK,...", "pgd:steps=20 with --adversary, else none")
    ] = None
    """Measure the finished student under these attacks too, on 1000 of the test images: pgd or
    autoattack (see kd evaluate)"""

    pretrained: bool = False
    """Start the student from its published weights"""

    centred: bool = False
    """Predict f(x) - f0(x), the student minus the function that it starts as, and save, evaluate
    and export the two as one network: helps wide networks without batch norm on few images"""

    prune: Annotated[float | None, Shown("SHARE", "keep all channels")] = None
    """Remove channels of a trained student, those with the smallest weights, until this share of
    its multiply-accumulates is gone, and train what is left"""

    quantize: Annotated[str | None, Shown("w8a8|w4a8|w4a4|w2a2", "train in float32")] = None
    """Train with weights (w) and activations (a) rounded to codes of these bits, from 2 to 8, with
    learned steps; the first and the last layer have 8. kd export writes the codes"""

    full_range: bool = False
    """With --quantize: 8-bit weights take all codes from -127 to 127, and not those from -63 to 63,
    which CPUs without VNNI need; for GPUs and CPUs that have it"""

    keep_layers: Annotated[str | None, Shown("N,...", "all of them")] = None
    """Start the student with these blocks of a transformer alone, numbered from 0, and all that is
    no block"""

    lora: Annotated[int | None, Shown("RANK", "train all weights")] = None
    """Train low-rank matrices of this rank beside the weights of a transformer, and add them to the
    weights at the end"""

    task: Annotated[
        Literal["classify", "regress", "tag", "mlm", "causal", "embed"] | None,
        Shown(default="classify, regress or tag, as the labels are"),
    ] = None
    """What is learned from texts: classes, scores, tags of tokens, hidden tokens (mlm), next tokens
    (causal), or the teacher's embeddings"""

    text: Annotated[str | None, Shown("COLUMN[,COLUMN]", "recognised by their names")] = None
    """Column of the texts, or two columns of pairs; with --task embed two that are named are a text
    and its translation, unless --label is given"""

    label: Annotated[str | None, Shown("COLUMN", "recognised by its name")] = None
    """Column of the labels; with --task embed of the scores of pairs, which judge the student"""

    max_length: Annotated[int | None, Shown(default="128, or the model's positions if fewer")] = (
        None
    )
    """Tokens of a text, or of a pair, that are kept"""

    tokenizer: Annotated[
        str | None,
        Shown("NAME|words|characters", "the student's own; of a fresh student the teacher's"),
    ] = None
    """Tokenizer of a fresh student: that of a model or run, or the words or the characters of the
    training texts"""

    mlm: Annotated[str | None, Shown("NAME|RUN")] = None
    """Masked language model that names the words of --augment masked"""

    trust_module: NamesArg = None
    """Code that the folder of an earlier run may name as its network, as module:attribute with its
    arguments; what only a file names is never imported"""

    out: Annotated[Path | None, Shown("DIR", "the next free runs/kd-<student>-<data>-<n>")] = None
    """Folder of the run"""

    resume: bool = False
    """Continue the run in --out. A larger --epochs, --steps or --patience trains an unfinished or a
    finished run further; from there on the learning rate is that of a run of the new length"""

    seed: int = 0
    """Seed of the initial weights, the order of the images and their augmentation"""

    preprocess: Annotated[
        Literal["standardise", "zca", "none", "centre"] | None,
        Shown(default="standardise, or as a pretrained or earlier student needs"),
    ] = None
    """Normalisation: mean 0 and deviation 1 of each channel, ZCA whitening, none, or centre: mean 0
    and one scale for all channels"""

    validation_fraction: Annotated[float | None, Shown(default="0.1")] = None
    """Share of the training images held out for validation"""

    channels: Channels = None
    """1 makes all images grayscale, 3 makes them colour"""

    data_root: Path = field(default_factory=paths.data_root)
    """Folder of the named data sets, downloaded when missing; the environment variable
    DSDISTILL_DATA sets it too"""

    device: Annotated[str, Shown("DEVICE")] = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N"""

    workers: Annotated[int | None, Shown(default=str(DEFAULT_WORKERS))] = None
    """Processes that read image files"""

    seconds: Annotated[float | None, Shown(default="what holds 95 % of them whole")] = None
    """Length to which recordings are cut, or filled with silence, on both sides"""

    mel_bands: Annotated[int | None, Shown(default="40")] = None
    """Number of mel bands, the height of a recording's image"""

    sample_rate: Annotated[int | None, Shown("HZ", "the most frequent one")] = None
    """Samples per second to which recordings are resampled"""

    compile: bool = False
    """Compile the student with torch.compile"""

    channels_last: bool = False
    """Keep the student's weights in the channels-last memory format: faster convolutions on GPUs"""

    checkpoint_gradients: bool = False
    """Compute activations twice instead of keeping them: less memory, slower"""

    overrides: Annotated[Overrides, tyro.conf.OmitArgPrefixes] = Overrides()

    @property
    def given(self) -> dict[str, Any]:
        """The fields of the recipe that were given."""
        return {k: v for k, v in asdict(self.overrides).items() if v is not None}

    @property
    def sound(self) -> "MelOptions | None":
        """What is asked of the images of recordings; None where nothing is."""
        from dsdistill.harness.data.mel_images import MelOptions  # not for --help

        asked = MelOptions(self.sample_rate, self.seconds, self.mel_bands)
        return None if asked == MelOptions() else asked

    @property
    def readers(self) -> int:
        """Processes that read image files."""
        return DEFAULT_WORKERS if self.workers is None else self.workers

    @property
    def copies_teacher(self) -> bool:
        """Whether the student starts as a copy of the teacher; a run of that name is a run."""
        return self.student == TEACHER and not Path(TEACHER).is_dir()

    def check(self) -> None:
        """Refuse values out of range and options that exclude each other.

        Raises:
            UserError: With the option, the rule and the value.
        """
        if self.recipe is not None:
            recipes.by_name(self.recipe)
        if self.robust is not None:
            attack.parse_robust(self.robust)
        _require(self.seed >= 0, "--seed must be 0 or more", self.seed)
        _require(self.readers >= 0, "--workers must be 0 or more", self.workers)
        _require(not self.resume or self.out is not None, "--resume needs --out", self.out)
        for name in ("min_teacher_accuracy", "mean_teacher"):
            value = getattr(self, name)
            rule = f"{_option(name)} must be in [0, 1)"
            _require(value is None or 0 <= value < 1, rule, value)
        for name in ("cache_top", "generations", "lora", "max_length"):
            value = getattr(self, name)
            rule = f"{_option(name)} must be at least 1"
            _require(value is None or value >= 1, rule, value)
        if self.sound is not None:
            self.sound.check()
        per_teacher.read_sizes("--teacher-image-size", self.teacher_image_size)
        for name in ("teacher_mean", "teacher_std"):
            per_teacher.read(_option(name), getattr(self, name))
        schemes = ("peers", "mean_teacher", "generations", "assistants")
        chosen = [_option(name) for name in schemes if getattr(self, name) is not None]
        if self.recipe in recipes.STAGES:
            chosen.append(f"--recipe {self.recipe}, which has stages,")
        _require(len(chosen) < 2, "only one scheme at a time", " and ".join(chosen))
        self._check_quantize(chosen)
        self._check_prune(chosen)
        self._check_private()
        self._check_teacher()
        self._check_head(chosen)

    def _check_head(self, schemes: list[str]) -> None:
        """Refuse what needs classes, where the student has no head."""
        if self.head == "trained":
            return
        teacher = self.teacher or (self.recipe and recipes.by_name(self.recipe).teacher)
        if not teacher:
            raise UserError("--head none leaves labels out: add --teacher, whose features teach")
        others = ("pate", "prune", "quantize", "robust", "class_map", "min_teacher_accuracy")
        others += ("class_weights", "class_groups")
        given = [_option(name) for name in others if getattr(self, name) is not None]
        given += ["--teacher-weights"] if self.teacher_weights else []
        given += ["--centred"] if self.centred else []
        given += [*schemes]
        fields = ("adversary", "label_smoothing", "mixup", "cutmix")
        given += [_option(name) for name in fields if self.given.get(name)]
        if given:
            raise UserError(f"{given[0]} needs classes, and --head none has none: leave it out")
        if self.given.get("metric", "accuracy") != "accuracy":
            raise UserError(
                f"--metric {self.given['metric']} needs classes, and --head none has none: leave "
                "it out for the accuracy of the nearest neighbours"
            )

    def _check_quantize(self, schemes: list[str]) -> None:
        """Refuse bits out of range and options that do not go with them."""
        if self.quantize is None:
            _require(not self.full_range, "--full-range needs --quantize", "none")
            return
        bit_widths.parse("--quantize", self.quantize)
        if schemes:
            raise UserError(
                f"--quantize trains one student, from labels or teachers: leave {schemes[0]} out, "
                "and quantize its student afterwards"
            )
        if self.centred:
            raise UserError(
                "--quantize does not go with --centred, whose difference of two networks no codes "
                "describe: leave one of them out"
            )

    def _check_prune(self, schemes: list[str]) -> None:
        """Refuse a share out of range, a student without channels to choose, and other schemes."""
        if self.prune is None:
            return
        _require(0 < self.prune < 1, "--prune must be in (0, 1)", self.prune)
        student = self.student or ""
        if not (self.pretrained or "@" in student or (student and Path(student).is_dir())):
            raise UserError(
                "--prune chooses channels by the weights of a trained student: add --student RUN, "
                f"or --pretrained, got {student or 'none'}"
            )
        if schemes or self.pate:
            raise UserError(
                f"--prune trains one student, from labels or teachers: leave "
                f"{[*schemes, '--pate'][0]} out, and prune its student afterwards"
            )
        if self.quantize is not None:
            raise UserError(
                "--prune does not go with --quantize: leave --quantize out, and quantize the "
                "pruned student afterwards"
            )
        if self.centred:
            raise UserError(
                "--prune does not go with --centred, whose second network keeps all channels: "
                "leave one of them out"
            )

    def _check_private(self) -> None:
        """Refuse what does not go with private images, and their options without them."""
        if self.pate is None:
            for name in PRIVATE_OPTIONS:
                if getattr(self, name) is not None:
                    raise UserError(f"{_option(name)} needs --pate")
            return
        settings = pate_settings.parse(self.pate)
        if self.class_groups is not None:
            raise UserError(
                "--pate lets teachers vote on the classes of the data, and --class-groups joins "
                "them: leave one of them out"
            )
        if self.transfer is not None:
            raise UserError(
                "--pate trains on public images with noisy votes, and --transfer on others with a "
                "teacher's answers: leave one of them out"
            )
        if self.public is None:
            raise UserError(
                "--pate needs --public, the images that the teachers are asked about: a data set, "
                "or test:N for N test images of DATA"
            )
        positive = self.max_epsilon is None or self.max_epsilon > 0
        _require(positive, "--max-epsilon must be positive", self.max_epsilon)
        if ":" in settings.network and not settings.network.startswith(("mlp:", "convnet:")):
            raise UserError(
                f"{pate_settings.OPTION} network must be convnet, mlp, with a width, or a name of "
                f"timm, got {settings.network}"
            )
        stages = self.recipe if self.recipe in recipes.STAGES else None
        teacher = self.recipe and recipes.by_name(self.recipe).teacher
        schemes = {"generations": self.generations, "assistants": self.assistants}
        others = {"teacher": self.teacher, **schemes, "recipe": stages or teacher}
        for name, value in others.items():
            if value is not None:
                raise UserError(
                    f"--pate makes its teachers from the private images, and {_option(name)} names "
                    "others, of which nothing is known: leave one of them out"
                )

    def _check_teacher(self) -> None:
        """Refuse options that need a teacher where there is none, and a teacher where none fits."""
        teacher = self.teacher or (self.recipe and recipes.by_name(self.recipe).teacher)
        if self.copies_teacher and not teacher:
            raise UserError(f"--student {TEACHER} is a copy of the teacher: add --teacher")
        if self.copies_teacher and self.keep_layers and (self.generations or self.assistants):
            raise UserError(
                f"--student {TEACHER} with --keep-layers would keep blocks of a student that has "
                f"these alone: leave {'--generations' if self.generations else '--assistants'} out"
            )
        if self.teacher and (self.peers or self.mean_teacher):
            raise UserError(
                f"{_option('peers' if self.peers else 'mean_teacher')} is a scheme without a "
                "teacher: leave --teacher out"
            )
        needing = ("cache", "class_map", "min_teacher_accuracy", "teacher_weights", "assistants")
        needing += ("transfer", "teacher_data")
        for name in (*needing, *TEACHER_INPUT_OPTIONS):
            if getattr(self, name) is not None and not teacher:
                raise UserError(f"{_option(name)} needs --teacher")
        if self.teacher_weights and "," not in (teacher or ""):
            raise UserError("--teacher-weights is for several teachers: --teacher ONE,OTHER")
        _require(self.cache_top is None or self.cache is not None, "--cache-top needs --cache", "")


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a trained student on test images or texts."""

    LAYOUT: ClassVar = Layout(
        groups={
            "Comparison": "teacher teacher_data class_map teacher_class_map data_root device",
            "Attacks": "robust",
            "Texts": "text label",
            "Code of your own": "trust_module",
            "Output": "json",
        },
        examples=(
            "kd evaluate runs/student --json",
            "kd evaluate runs/student --robust pgd:eps=8/255:steps=50,autoattack:images=200",
        ),
    )

    run: Annotated[tyro.conf.Positional[Path], Shown("RUN")]
    """Folder of a finished run"""

    data: Annotated[
        tyro.conf.Positional[str | None], Shown("DATA", "what the student was trained for")
    ] = None
    """Data set to test on. Of other data than the student's own, all images are judged, unless they
    have a test part, such as a folder with train/ and test/; of texts the test part, or else the
    validation part, or else all"""

    teacher: Annotated[str | None, Shown("NAME|RUN", "the one of the training")] = None
    """Measure the agreement with this teacher"""

    teacher_data: Annotated[Path | None, Shown("DIR", "of the run's own data, the training's")] = (
        None
    )
    """Folder with another picture of every image for the teacher"""

    class_map: Annotated[Path | None, Shown("FILE")] = None
    """JSON file, class of the data -> class of the student (name or number)"""

    teacher_class_map: Annotated[
        str | None, Shown("FILE", "for the run's own teachers, the one of the training")
    ] = None
    """JSON file, class of the data -> class of the teacher; of several teachers as for kd train"""

    robust: Annotated[str | None, Shown("ATTACK,...")] = None
    """Measure the accuracy under attacks that know the network: pgd:eps=8/255:steps=20:step=2/255,
    projected gradient ascent, or autoattack:eps=8/255, the standard version of AutoAttack; eps, the
    largest change of a pixel in [0, 1], is by default that of the training, else 8/255. Each takes
    images=N, how many test images are attacked, by default 1000 spread evenly over all; of several
    attacks the smallest number counts, for they attack the same images"""

    text: Annotated[str | None, Shown("COLUMN[,COLUMN]", "as in the training")] = None
    """Column of the texts, or two columns of pairs"""

    label: Annotated[str | None, Shown("COLUMN", "as in the training")] = None
    """Column of the classes, scores or tags"""

    trust_module: NamesArg = None
    """Code that the run, or the run of a teacher, may name as its network, as module:attribute with
    its arguments; what only a file names is never imported"""

    data_root: Path = field(default_factory=paths.data_root)
    """Folder of the named data sets, downloaded when missing; the environment variable
    DSDISTILL_DATA sets it too"""

    device: Annotated[str, Shown("DEVICE")] = "auto"
    """Where accuracy is measured: auto (a GPU where there is one), cpu, cuda or cuda:N; latency is
    always measured on the CPU"""

    json: bool = False
    """Print one JSON object instead of a table"""

    def check(self) -> None:
        """Refuse attacks that are unknown or out of range.

        Raises:
            UserError: With the attack, the rule and the value.
        """
        if self.robust is not None:
            attack.parse_robust(self.robust)


@dataclass(frozen=True)
class ExportOptions:
    """Write a trained student for other programs, and check that its answers agree."""

    LAYOUT: ClassVar = Layout(
        groups={
            "Output": "format out",
            "Data": "data_root",
            "Code of your own": "trust_module",
        },
        examples=("kd export runs/student --format pt2",),
    )

    run: Annotated[tyro.conf.Positional[Path], Shown("RUN")]
    """Folder of a finished run"""

    format: Literal["onnx", "pt2", "safetensors", "timm", "huggingface"]
    """onnx: a program with its preprocessing, for onnxruntime and others; pt2: such a program for
    torch; safetensors: the weights alone; timm: a folder for timm.create_model; huggingface: one of
    a student of texts for transformers, of embeddings for sentence-transformers too. Those of texts
    are folders with the tokenizer"""

    out: Annotated[
        Path | None, Shown("PATH", "<run>/export/<student> with the suffix of the format")
    ] = None
    """File or folder to write"""

    trust_module: Annotated[str | None, Shown("NAME")] = None
    """Code that the run may name as its network, as module:attribute with its arguments; what only
    a file names is never imported"""

    data_root: Annotated[Path | None, Shown("DIR", "where they were in training")] = None
    """Folder of the run's data, some images of which the check uses"""


@dataclass(frozen=True)
class QuantizeOptions:
    """Round the weights and activations of a trained student to codes of a few bits.

    The training itself is not repeated: kd train --quantize trains with the rounding.
    """

    LAYOUT: ClassVar = Layout(
        groups={
            "Codes": "bits full_range",
            "Calibration": "range images",
            "Output": "out",
            "Code of your own": "trust_module",
            "Data and hardware": "data_root device",
        },
        examples=("kd quantize runs/student --bits w8a8 --out runs/int8",),
    )

    run: Annotated[tyro.conf.Positional[Path], Shown("RUN")]
    """Folder of a finished run of images"""

    bits: Annotated[str, Shown("w8a8|w4a8|w4a4|w2a2")] = "w8a8"
    """Bits of the weights (w) and of the activations (a), from 2 to 8; 8 in the first and the last
    layer"""

    full_range: bool = False
    """Let 8-bit weights take all codes from -127 to 127, and not those from -63 to 63, which CPUs
    without VNNI need; for GPUs and CPUs that have it"""

    range: Literal["mse", "percentile", "max"] = "mse"
    """Range of each layer's inputs: that with the smallest squared error, that without a ten
    thousandth of the values at either end, or from the smallest to the largest value"""

    images: int = 512
    """Training images that the inputs are seen on, spread over the classes"""

    out: Annotated[Path | None, Shown("DIR", "the next free runs/kd-<run>-<bits>-<n>")] = None
    """Folder of the quantised student, a run like that of a training"""

    trust_module: Annotated[str | None, Shown("NAME")] = None
    """Code that the run may name as its network, as module:attribute with its arguments; what only
    a file names is never imported"""

    data_root: Annotated[Path | None, Shown("DIR", "where they were in training")] = None
    """Folder of the named data sets"""

    device: Annotated[str, Shown("DEVICE")] = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N; latency is always measured on the
    CPU"""

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            UserError: With the option, the rule and the value.
        """
        bit_widths.parse("--bits", self.bits)
        _require(self.images >= 1, "--images must be at least 1", self.images)


@dataclass(frozen=True)
class SynthesizeOptions:
    """Make images from a trained student's weights alone, for another student to learn from.

    No data are read, only the folder of the run. kd train SET --teacher RUN trains on the set.
    """

    LAYOUT: ClassVar = Layout(
        groups={
            "Images": "method images seed",
            "Weights of the loss": "bn_weight tv_weight balance_weight",
            "Optimizer": "steps batch_size lr width",
            "Output and resuming": "out resume",
            "Code of your own": "trust_module",
            "Hardware": "device",
        },
        examples=(
            "kd synthesize runs/teacher --images 5000 --out runs/images",
            "kd synthesize runs/teacher --method generator --width 32 --out runs/images",
        ),
    )

    run: Annotated[
        tyro.conf.Positional[Path | None], Shown("RUN", "with --resume that of the set")
    ] = None
    """Folder of a finished run of images, whose student is asked"""

    method: synthesis_settings.Method = "inversion"
    """inversion: optimise the pixels of each batch until the network calls the images their classes
    and their statistics are those that its batch norm layers have kept (DeepInversion); generator:
    train a network that makes such images from noise (DAFL)"""

    images: int = synthesis_settings.IMAGES
    """Number of images, spread over the classes"""

    seed: int = 0
    """Seed of the noise that the images start from"""

    bn_weight: Annotated[
        float | None, _by_method("bn_weight", "; without batch norm the generator does without")
    ] = None
    """Weight of the distance between the statistics of the images and those of the batch norm
    layers; 0 leaves it out, as for networks without such layers"""

    tv_weight: Annotated[float | None, _by_method("tv_weight")] = None
    """Weight of the total variation, which makes images smooth; of inversion"""

    balance_weight: Annotated[float | None, _by_method("balance_weight")] = None
    """Weight of the balance of the classes; of the generator"""

    steps: Annotated[int | None, _by_method("steps")] = None
    """Steps for each batch of images; of the generator, in all"""

    batch_size: Annotated[int | None, _by_method("batch_size")] = None
    """Images whose statistics are compared; of large networks as many as memory holds"""

    lr: Annotated[float | None, _by_method("lr")] = None
    """Learning rate of Adam, for pixels or for the generator's weights"""

    width: Annotated[int | None, _by_method("width")] = None
    """Channels of the generator's last hidden layer"""

    out: Annotated[Path | None, Shown("DIR", "the next free runs/kd-<run>-images-<n>")] = None
    """Folder of the set"""

    resume: bool = False
    """Continue the set in --out; the result is the same to the bit"""

    trust_module: NamesArg = None
    """Code that the run may name as its network, as module:attribute with its arguments; what only
    a file names is never imported"""

    device: Annotated[str, Shown("DEVICE")] = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N"""

    @property
    def source(self) -> Path:
        """Folder of the run that is asked."""
        assert self.run is not None
        return self.run

    @property
    def settings(self) -> synthesis_settings.SynthesisSettings:
        """The numbers of the synthesis, with the defaults of the method.

        Raises:
            UserError: With the option, the rule and the value.
        """
        names = {name for numbers in synthesis_settings.DEFAULTS.values() for name in numbers}
        given = {name: getattr(self, name) for name in sorted(names)}
        return synthesis_settings.resolve(self.method, self.images, given)

    def check(self) -> None:
        """Refuse values out of range and options that the method does not use.

        Raises:
            UserError: With the option, the rule and the value.
        """
        _require(self.seed >= 0, "--seed must be 0 or more", self.seed)
        _require(not self.resume or self.out is not None, "--resume needs --out", self.out)
        if not self.resume:
            _require(self.run is not None, "RUN, the folder of a finished run, is missing", "none")
            _ = self.settings


@dataclass(frozen=True)
class FeaturesOptions:
    """Write the features of a data set's images through a trained network to one file.

    `dsdistill` distils and evaluates features as it does images.
    """

    LAYOUT: ClassVar = Layout(
        groups={
            "Backbone": "student layer image_size trust_module",
            "Views": "views min_scale hflip seed",
            "Output and resuming": "out resume",
            "Data": "data_root",
            "Speed": "device batch_size workers",
        },
        examples=(
            "kd features FOLDER --student runs/backbone --out features.npz",
            "kd features cifar10 --student timm:resnet18 --views 4",
        ),
    )

    data: Annotated[tyro.conf.Positional[str], Shown("DATA")]
    """Data set name, folder of class folders, or .npz file of images and labels. Image files are
    read as they are needed, however many there are"""

    student: Annotated[str, Shown("NAME|RUN")]
    """Folder of a run of kd train, or the name of a network with published weights: any of timm,
    torchvision:NAME, hf:NAME; NAME@FILE with the weights in a file; module:attribute for code that
    returns a trained network"""

    layer: Annotated[str, Shown("NAME")] = "embedding"
    """Layer whose output is the feature, averaged over positions; embedding is the input of the
    classifier"""

    image_size: Annotated[int | None, Shown(default="as the backbone's weights need")] = None
    """Height and width of the images of a network that does not say it itself"""

    trust_module: NamesArg = None
    """Code that the run may name as its network, as module:attribute with its arguments; what only
    a file names is never imported"""

    views: int = 1
    """Views of each training image: the plain image, and random crops and flips of it. Validation
    and test images have the plain view alone"""

    min_scale: float = 0.25
    """Smallest share of an image's area in a random crop"""

    hflip: float = 0.5
    """Probability of a horizontal flip in a random view"""

    seed: int = 0
    """Seed of the random views"""

    out: Annotated[Path | None, Shown("FILE", "features-<data>-<backbone>.npz")] = None
    """File to write; until it is whole, its features are in the folder FILE.partial"""

    resume: bool = False
    """Continue a file that was stopped, with the same options; the result is the same to the bit"""

    data_root: Path = field(default_factory=paths.data_root)
    """Folder of the named data sets, downloaded when missing; the environment variable
    DSDISTILL_DATA sets it too"""

    device: Annotated[str, Shown("DEVICE")] = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N"""

    batch_size: int = 64
    """Images in a forward pass"""

    workers: Annotated[int | None, Shown(default=str(DEFAULT_WORKERS))] = None
    """Processes that read image files"""

    @property
    def readers(self) -> int:
        """Processes that read image files."""
        return DEFAULT_WORKERS if self.workers is None else self.workers

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            UserError: With the option, the rule and the value.
        """
        for name in ("views", "batch_size", "image_size"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{_option(name)} must be at least 1", value)
        for name in ("seed", "readers"):
            shown = _option("workers" if name == "readers" else name)
            _require(getattr(self, name) >= 0, f"{shown} must be 0 or more", getattr(self, name))
        _require(0 < self.min_scale <= 1, "--min-scale must be in (0, 1]", self.min_scale)
        _require(0 <= self.hflip <= 1, "--hflip must be in [0, 1]", self.hflip)
        _require(self.out is None or self.out.suffix == ".npz", "--out must end in .npz", self.out)


@dataclass(frozen=True)
class AugmentOptions:
    """Write copies of training texts in which words are changed, for a teacher to answer.

    The copies have no labels of their own.
    """

    LAYOUT: ClassVar = Layout(
        groups={
            "Copies": "by mlm copies seed",
            "Probabilities": "mask_probability replace_probability ngram_probability mask",
            "Output": "out preview cache",
            "Data": "task text label validation_fraction",
            "Hardware": "device",
        },
        examples=(
            "kd augment sst2 --by words --preview 3",
            "kd augment sst2 --by masked --mlm hf:DIR --out copies.jsonl",
        ),
    )

    data: Annotated[tyro.conf.Positional[Path], Shown("DATA")]
    """File of texts, or folder with train.tsv or .csv, .jsonl, .parquet; only its training part is
    copied"""

    by: Annotated[Literal["words", "masked"], Shown("words|masked")]
    """words: mask words, exchange them for others of the same frequency, keep only some consecutive
    ones (Tang et al. 2019); masked: exchange words for what a masked language model expects in
    their place (TinyBERT)"""

    mlm: Annotated[str | None, Shown("hf:NAME|DIR")] = None
    """Masked language model of --by masked: a name on the hub, or a folder"""

    copies: Annotated[int | None, Shown(default="20; 10 of pairs")] = None
    """Copies of each text. Those that are alike, or like their original, count once; of pairs the
    first text, the second and both are changed in turn"""

    seed: int = 0
    """Seed of the copies"""

    mask_probability: Annotated[float | None, Shown(default="0.1")] = None
    """With --by words: probability that a word becomes the mask"""

    replace_probability: Annotated[float | None, Shown(default="0.1; 0.4 with --by masked")] = None
    """Probability that a word is exchanged for another"""

    ngram_probability: Annotated[float | None, Shown(default="0.25")] = None
    """With --by words: probability that only 1 to 5 consecutive words of a copy are left"""

    mask: Annotated[str | None, Shown("TEXT", "[MASK]")] = None
    """With --by words: the mask of the tokenizer of teacher and student"""

    out: Annotated[Path | None, Shown("FILE", "augmented-<data>-<by>.jsonl")] = None
    """File to write, .jsonl or .tsv: the originals and their copies, in the columns text, or text1
    and text2, language where it is known, and original_row, the number of the training text from 0.
    It has no labels: those of the originals need not hold for the copies"""

    preview: Annotated[int | None, Shown("N")] = None
    """Print the first N texts with their copies, and write nothing"""

    cache: Annotated[Path | None, Shown("DIR", "transfer-sets in the cache folder")] = None
    """Folder where copies are kept, so that a stopped command continues; dsdistill cache lists and
    clears the default one"""

    task: Annotated[
        Literal["classify", "regress", "mlm", "embed"] | None,
        Shown("TASK", "told from the columns"),
    ] = None
    """classify, regress, mlm or embed, as for kd train; mlm and embed need no labels"""

    text: Annotated[str | None, Shown("NAME[,NAME]", "recognised by its name")] = None
    """Column of the texts, or two of pairs"""

    label: Annotated[str | None, Shown("NAME", "recognised by its name")] = None
    """Column of the labels"""

    validation_fraction: float = 0.1
    """Share of the training texts that kd train holds out where the data have no validation part:
    they are not copied"""

    device: Annotated[str, Shown("DEVICE")] = "auto"
    """Device of the language model: auto (a GPU where there is one), cpu, cuda or cuda:N"""

    def check(self) -> None:
        """Refuse values out of range and options that exclude each other.

        Raises:
            UserError: With the option, the rule and the value.
        """
        for name in ("copies", "preview"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{_option(name)} must be at least 1", value)
        _require(self.seed >= 0, "--seed must be 0 or more", self.seed)
        for name in ("mask_probability", "replace_probability", "ngram_probability"):
            value = getattr(self, name)
            rule = f"{_option(name)} must be in [0, 1]"
            _require(value is None or 0 <= value <= 1, rule, value)
        fraction = self.validation_fraction
        _require(0 <= fraction < 1, "--validation-fraction must be in [0, 1)", fraction)
        _require(
            self.out is None or self.out.suffix in (".jsonl", ".tsv"),
            "--out must end in .jsonl or .tsv",
            self.out,
        )
        _require(
            self.preview is None or self.out is None,
            "--preview writes nothing: leave --out out",
            self.out,
        )
        self._check_method()

    def _check_method(self) -> None:
        """Refuse options of the other method."""
        if self.by == "words":
            _require(self.mlm is None, "--mlm needs --by masked", "--by words")
            chances = (self.mask_probability, self.replace_probability)
            both = sum(0.1 if chance is None else chance for chance in chances)
            rule = "--mask-probability and --replace-probability must be at most 1 together"
            _require(both <= 1, rule, both)
            return
        if self.mlm is None:
            raise UserError("--by masked needs a masked language model: --mlm hf:NAME, or a folder")
        for name in ("mask", "mask_probability", "ngram_probability"):
            if getattr(self, name) is not None:
                raise UserError(f"{_option(name)} needs --by words, got --by masked")


@dataclass(frozen=True)
class ReportOptions:
    """Compare finished runs on one HTML page."""

    LAYOUT: ClassVar = Layout(
        groups={"Output": "out"},
        examples=("kd report runs/teacher runs/student --out students.html",),
    )

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, Shown("RUN ...")]
    """Folders of finished runs; runs that differ only in their seed are put together"""

    out: Path = Path("report.html")
    """Page to write"""


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
