"""The first part of `kd train --pate`: teachers of private images answer, with noise, once.

The answers are stored in the run's `config.json` as soon as they are known, and a run that goes on
has them from there: noise that were drawn again would cost again. The teachers, their votes and all
that is computed from private images stay in memory; a run that is stopped before its answers begins
anew, and has given nothing away. After the answers no private image is used.
"""

import os
from dataclasses import replace

import numpy as np
from jaxtyping import Int
from torch import nn

from dsdistill.harness.data.labeled_images import Examples, LabeledImages
from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress, run_folder
from kd import recipe, recipes
from kd.assembly import image_training, text_parts
from kd.data import batching
from kd.data.batching import SCORE_BATCH
from kd.data.public_images import PublicImages
from kd.evaluation import scoring
from kd.models import networks
from kd.models.seals import REPORT
from kd.objectives import terms
from kd.objectives.schemes import Distillation
from kd.options import TrainOptions
from kd.parallel.engine import Engine
from kd.privacy import votes
from kd.privacy.settings import PateSettings
from kd.runs import private_data, run_options
from kd.training.loop import train as run_training

_TEACHER_SEED = 0x9A7E  # tells the seeds of teachers from that of the student
_FREE_EVERY = 16  # teachers after which Accelerate forgets what it has prepared


def ask(options: TrainOptions) -> TrainOptions:
    """Let teachers of private images answer, unless the run has its answers already.

    Everything that follows is tried first, with made-up answers.

    Args:
        options: Options of the training.

    Returns:
        The options with `resume`, for the training on the answers.

    Raises:
        UserError: If an option, the data or the loss do not fit, or the guarantee is too weak.
    """
    assert options.out is not None
    if options.resume and private_data.stored_answers(options.out) is not None:
        return options
    if text_parts.is_text(options):
        raise UserError(f"--pate is for images, and {options.data} is of texts: leave it out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--pate trains its teachers in one process: start it without torchrun")
    parts = image_training.assemble(options)
    objective = parts.build_objective()
    parts.check_options()
    parts.check_step(objective, parts.load())
    settings = private_data.settings_of(options)
    size, classes = parts.parts.recipe.image_size, parts.parts.source.classes
    private = private_data.private_images(options, size, classes)
    public = private_data.public_of(options, private)
    if options.max_epsilon is not None:
        settings.require_at_most(options.max_epsilon, len(public.images))
    storage = run_options.STORAGE
    run = run_folder.start(
        options.out,
        storage.to_json(options),
        result=REPORT,
        resume=options.resume,
        defaults=storage.to_json(TrainOptions()),
        free=storage.free,
    )
    with run, run.clean_up_on_error():
        run.require_same({run_options.HASH_KEY: run_options.digest(options)})
        fitted = parts.parts.student.preprocess  # of public images
        counts = count_votes(private, public, fitted, settings, parts.on, options.seed)
        run.choose_once(private_data.ANSWERS, lambda: votes.noisy_answers(counts, settings))
    return replace(options, resume=True)


def count_votes(
    private: LabeledImages,
    public: PublicImages,
    fitted: Preprocess,
    settings: PateSettings,
    on: Engine,
    seed: int,
) -> Int[np.ndarray, "q k"]:
    """Train a teacher on each shard of the private images, and count what they call public ones.

    Args:
        private: The private images.
        public: The public images.
        fitted: Preprocessing, of public images.
        settings: Number of teachers, their network and its training.
        on: Device of the teachers.
        seed: Seed of their weights and of the order of their images.

    Returns:
        For each query that may be asked, the number of teachers that name each class.
    """
    queries, _ = settings.bounds(len(public.images))
    asked = public.images.select(np.arange(queries))
    batches = batching.prepare_resident(Examples(asked, fitted), SCORE_BATCH, on.device)
    counts = np.zeros((queries, len(private.classes)), np.int64)
    progress.say(f"training {settings.teachers} teachers, each on private images of its own")
    with progress.bar(settings.teachers) as show:
        for number, rows in enumerate(votes.shards(private, settings.teachers)):
            shard = Examples(private.select(rows), fitted)
            own_seed = batching.derive_seed(seed, number, _TEACHER_SEED)
            teacher = train_teacher(shard, settings, on, own_seed)
            named = scoring.outputs(teacher, batches).argmax(1)
            counts[np.arange(queries), named] += 1
            if number % _FREE_EVERY == 0:
                on.free_memory()
            show(number + 1)
    return counts


def train_teacher(
    shard: Examples, settings: PateSettings, on: Engine, seed: int
) -> networks.Classifier:
    """Train a teacher on its shard alone; one of fewer than two images stays as it is made.

    Args:
        shard: Its images.
        settings: Its network and the steps of its training.
        on: Its device.
        seed: Seed of its weights and of the order of its images.
    """
    classes = len(shard.data.classes)
    teacher = networks.build(settings.network, shard.data.shape, classes, seed=seed)
    teacher.to(on.device)
    if len(shard) < batching.MIN_IMAGES_PER_PROCESS:
        return teacher
    layer_norm = any(isinstance(module, nn.LayerNorm) for module in teacher.modules())
    base = recipes.default(distilled=True, layer_norm=layer_norm)  # the one of few images
    chosen = recipe.override(base, {"steps": settings.steps})
    chosen = replace(chosen, loss=recipes.LABEL_LOSS)
    objective = Distillation(teacher, terms.build(terms.parse(recipes.LABEL_LOSS), teacher))
    batches = batching.prepare_resident(shard, chosen.batch_size, on.device)
    run_training(objective, batches, chosen, seed, on=on)
    return teacher
