"""The options of `kd train`: which of them go together, and their defaults by data and recipe."""

from dataclasses import asdict, dataclass, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_type_hints

import tyro

from dsdistill.harness import paths, shell
from dsdistill.harness.errors import UserError
from dsdistill.harness.help_page import Layout, Shown, format_default
from kd import attack, per_teacher, recipe, recipes
from kd.models.quantised import bit_widths
from kd.options.shared import (
    DEFAULT_WORKERS,
    TEACHER_INPUT_OPTIONS,
    NamesArg,
    option_name,
    require,
)
from kd.privacy import settings as pate_settings

if TYPE_CHECKING:
    from dsdistill.harness.data.mel_images import MelOptions

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
        require(self.seed >= 0, "--seed must be 0 or more", self.seed)
        require(self.readers >= 0, "--workers must be 0 or more", self.workers)
        require(not self.resume or self.out is not None, "--resume needs --out", self.out)
        for name in ("min_teacher_accuracy", "mean_teacher"):
            value = getattr(self, name)
            rule = f"{option_name(name)} must be in [0, 1)"
            require(value is None or 0 <= value < 1, rule, value)
        for name in ("cache_top", "generations", "lora", "max_length"):
            value = getattr(self, name)
            rule = f"{option_name(name)} must be at least 1"
            require(value is None or value >= 1, rule, value)
        if self.sound is not None:
            self.sound.check()
        per_teacher.read_sizes("--teacher-image-size", self.teacher_image_size)
        for name in ("teacher_mean", "teacher_std"):
            per_teacher.read(option_name(name), getattr(self, name))
        schemes = ("peers", "mean_teacher", "generations", "assistants")
        chosen = [option_name(name) for name in schemes if getattr(self, name) is not None]
        if self.recipe in recipes.STAGES:
            chosen.append(f"--recipe {self.recipe}, which has stages,")
        require(len(chosen) < 2, "only one scheme at a time", " and ".join(chosen))
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
        given = [option_name(name) for name in others if getattr(self, name) is not None]
        given += ["--teacher-weights"] if self.teacher_weights else []
        given += ["--centred"] if self.centred else []
        given += [*schemes]
        fields = ("adversary", "label_smoothing", "mixup", "cutmix")
        given += [option_name(name) for name in fields if self.given.get(name)]
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
            require(not self.full_range, "--full-range needs --quantize", "none")
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
        require(0 < self.prune < 1, "--prune must be in (0, 1)", self.prune)
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
                    raise UserError(f"{option_name(name)} needs --pate")
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
        require(positive, "--max-epsilon must be positive", self.max_epsilon)
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
                    "--pate makes its teachers from the private images, and "
                    f"{option_name(name)} names others, of which nothing is known: leave one of "
                    "them out"
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
                f"{option_name('peers' if self.peers else 'mean_teacher')} is a scheme without a "
                "teacher: leave --teacher out"
            )
        needing = ("cache", "class_map", "min_teacher_accuracy", "teacher_weights", "assistants")
        needing += ("transfer", "teacher_data")
        for name in (*needing, *TEACHER_INPUT_OPTIONS):
            if getattr(self, name) is not None and not teacher:
                raise UserError(f"{option_name(name)} needs --teacher")
        if self.teacher_weights and "," not in (teacher or ""):
            raise UserError("--teacher-weights is for several teachers: --teacher ONE,OTHER")
        require(self.cache_top is None or self.cache is not None, "--cache-top needs --cache", "")
