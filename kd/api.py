"""The library: plain modules and any iterable of (images, labels) in, a trained student out.

    import kd

    result = kd.distill(student, teacher, train_loader, validation=val_loader,
                        loss="ce:0.1,kd:0.9:temperature=4", epochs=5)

Nothing is written unless `checkpoint` names a file, and no global setting is left changed.
"""

import contextlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from dsdistill.harness import stopping
from dsdistill.harness.data import preprocess
from dsdistill.harness.errors import UserError, first_line, name_arguments
from dsdistill.harness.runs import progress as progress_display
from kd import api_arguments, attack, recipes
from kd.api_arguments import RecipeFields
from kd.data import batching, loader_batches, teacher_cache
from kd.data.batching import BatchSource
from kd.data.loader_batches import EndlessBatches, LoaderBatches, LoaderEvaluation
from kd.evaluation import robustness, scoring
from kd.models import networks
from kd.models.networks import Classifier
from kd.models.saved_models import Model
from kd.models.teachers import Teacher
from kd.models.zoo.modes import evaluation_mode
from kd.objectives import loss_checks, terms
from kd.objectives.adversary import Adversary, Bounds
from kd.objectives.schemes import Distillation
from kd.objectives.terms import LossOfLogits, Term
from kd.parallel import engine
from kd.parallel.engine import Engine
from kd.recipe import Optimizer, Recipe
from kd.training import borrowing, dry_run, optimization, training_file, user_optimizer
from kd.training import checkpoint as checkpoint_state
from kd.training.checkpoint import PackedState, TrainingState
from kd.training.loop import train as run_training
from kd.training.rounds import Callback, Round, RoundRecorder
from kd.training.user_optimizer import Every, UserOptimizer

Loader = Iterable[Any]  # of batches (images, labels)
ENDLESS_EPOCHS = 10  # parts of a training whose images have no known number, each with a validation


@dataclass(frozen=True, eq=False)
class DistillResult:
    """A finished training.

    Attributes:
        student: The module that was given, with the weights that validated best (without
            validation images the last), in evaluation mode; of a centred training the module that
            subtracts from it what it was at the start.
        history: The figures of each round.
        best_epoch: Number of the epoch, from 1, after which the student had these weights.
        accuracy: Validation accuracy of these weights in [0, 1]; None without validation images.
        nll: Their negative log-likelihood in nats; None where the outputs are no logits.
        epochs: Number of finished epochs.
        steps: Number of finished steps of the optimizer.
        seconds: Duration of the training, with its earlier parts if it was resumed.
    """

    student: nn.Module
    history: tuple[Round, ...]
    best_epoch: int
    accuracy: float | None
    nll: float | None
    epochs: int
    steps: int
    seconds: float


@dataclass(frozen=True, eq=False)
class _Task:
    """What is trained on what, once all arguments are checked."""

    student: Classifier
    objective: Distillation
    batches: BatchSource
    validation: LoaderEvaluation | None
    recipe: Recipe
    optimizer: UserOptimizer | None
    extra_losses: tuple[str, ...]
    logits: bool
    seed: int
    on: Engine


def distill(
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module] | None,
    train: Loader,
    *,
    validation: Loader | None = None,
    loss: str | None = None,
    extra_losses: Mapping[str, LossOfLogits] | None = None,
    teacher_weights: Literal["alike", "by-label"] = "alike",
    centred: bool = False,
    optimizer: Optimizer | torch.optim.Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    scheduler_every: Every = "epoch",
    recipe: str | Recipe | None = None,
    device: str = "auto",
    seed: int = 0,
    callbacks: Callback | Sequence[Callback] | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    **recipe_fields: Unpack[RecipeFields],
) -> DistillResult:
    """Train a student from teachers, or from labels alone.

    The student is trained in place and comes back on the device where it was, in evaluation mode,
    with the weights that validated best. Teachers come back as they were. Both keep no hooks, and
    torch's, NumPy's and Python's random numbers go on as if nothing had been trained, also after an
    exception; the student then has the weights of its last step.

    Several processes (`torchrun`, `accelerate launch`) share each batch of `train`, or train on
    their own batches where its sampler is a `DistributedSampler` or it comes from
    `accelerator.prepare`. Callbacks are called in the first.

    Args:
        student: Network of images (n, c, h, w); returns logits (n, k), or an object or a mapping
            with `logits`. Parameters that require no gradient stay as they are.
        teacher: Network of the same images with as many outputs, or several; None for none.
        train: Iterable of batches (images, labels) that starts anew each time it is iterated, such
            as a DataLoader or a list; each pass is an epoch. Images are float tensors (n, c, h, w)
            as the networks take them; labels are class numbers (n,), or probabilities (n, k) of
            images that were mixed. What a DataLoader draws at random depends on `seed` and the
            epoch. One without a length is counted in one pass, or with `steps` repeated until
            these are taken, and then a tenth of them counts as an epoch.
        validation: As `train`, to choose the best epoch.
        loss: Weighted terms as on the command line: `ce:0.1,kd:0.9:temperature=4`, with layers
            `ce:1,at:1000@layer2=layer3` (student=teacher). The default with a teacher is the first
            of these, and without one `ce:1`.
        extra_losses: Functions of your own by name: (student's logits, teacher's logits or None,
            labels) -> scalar, added to the loss with weight 1. With several teachers they get the
            mean logits. `loss=""` leaves these alone. One that is a module is trained too, and
            comes back on its device and in its mode.
        teacher_weights: How the logits of several teachers are weighted: alike, or for each image
            by how well each teacher knows its label.
        centred: Whether the prediction is f(x) - f0(x), the student minus the function that it is
            when it is given, as with `kd train --centred`: it helps wide networks without batch
            norm on few images. `DistillResult.student` is this difference, of one more forward
            pass.
        optimizer: Optimizer by name; or the user's own over the student's parameters, of which it
            trains those that it has. Trained layers of the loss itself join it for the time of the
            training, with the options of its first group.
        scheduler: Schedule of the user's own optimizer.
        scheduler_every: Whether `scheduler` takes a step after each epoch or after each step.
        recipe: Name or value of a recipe in place of the default one: its loss, optimizer,
            schedule, averages, validation and precision. The images are those of `train`, whatever
            it says of batches and augmentation.
        device: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`.
        seed: Seed of all randomness in the training.
        callbacks: Functions that are called with a `Round` after each round: one epoch, or
            `validate_every` epochs. One that returns True ends the training there.
        progress: Whether to show a bar on standard error.
        checkpoint: File in which the training is saved as it goes on. The same call with the same
            file goes on from there to the same bits. With more `epochs` or `steps` it trains
            further, a finished training too: from the step reached, at the learning rate that the
            longer schedule has there, and with its patience anew. The images are not compared.
        **recipe_fields: Fields of the recipe to change: `epochs`, `lr`, `patience`, ...; those of
            `kd.Recipe` that do not concern the images. With `adversary="pgd:eps=8/255:steps=10"`
            the student learns to withstand this attack, and images must be pixels in [0, 1].

    Returns:
        The student and the figures of the training.

    Raises:
        UserError: A ValueError of one line: an argument breaks a rule, modules, images and loss do
            not fit together, or the loss is not finite.
        KeyboardInterrupt: If the training was interrupted; with `checkpoint` it is saved first.
    """
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(name_arguments(api_arguments.PHRASES, api_arguments.TEXTS))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        given = api_arguments.check_fields(recipe_fields)
        calls = api_arguments.check_callbacks(callbacks)
        teachers = _as_modules(student, teacher)
        own = api_arguments.build_optimizer(optimizer, scheduler, scheduler_every, student, given)
        if own is None and optimizer is not None:
            given |= api_arguments.check_fields({"optimizer": optimizer}, extra=("optimizer",))
        if loss is not None and not isinstance(loss, str):
            raise UserError(f"loss must be a text such as ce:0.1,kd:0.9, got {loss!r}")
        if not isinstance(seed, int) or seed < 0:
            raise UserError(f"seed must be a whole number of 0 or more, got {seed!r}")
        stack.enter_context(loader_batches.preserve_random_state(train, validation))
        if own is not None:
            stack.callback(own.detach)
        extra = api_arguments.check_extra_losses(extra_losses)
        of_losses = [loss for loss in extra.values() if isinstance(loss, nn.Module)]
        home = borrowing.device_of(student)
        stack.enter_context(borrowing.borrow(student, [*teachers, *of_losses]))
        chosen = api_arguments.resolve_recipe(recipe, given, student, own)
        if loss is None or (not loss and not extra):
            loss = chosen.loss or _default_loss(teachers, chosen)
        chosen = replace(chosen, loss=loss)
        on = stack.enter_context(engine.temporary(device, chosen.precision))
        task = _prepare(
            student,
            teachers,
            train,
            validation,
            chosen,
            extra,
            given,
            own,
            teacher_weights,
            centred,
            seed,
            on,
        )
        path = None if checkpoint is None else Path(checkpoint)
        state, rounds, seconds = _train(task, teachers, calls, progress, path, started)
        network = task.student.network
        network.load_state_dict(state.best)
        figures = state.kept[0].figures
        if task.validation is not None and len(state.kept) > 1:  # a mean, which no round measured
            figures = _validate(task, network)
        if task.student.initial is not None:
            task.student.initial.to(home)
        return DistillResult(
            task.student.eval() if centred else student,
            tuple(rounds),
            state.best_epoch,
            figures.get("accuracy"),
            figures.get("nll"),
            state.epoch,
            state.step,
            seconds,
        )


def _train(
    task: _Task,
    teachers: Sequence[nn.Module],
    callbacks: Sequence[Callback],
    progress: bool,
    path: Path | None,
    started: float,
) -> tuple[TrainingState, list[Round], float]:
    """Train from the start or from a checkpoint; return the state, the rounds and the seconds."""
    recipe, on, own = task.recipe, task.on, task.optimizer
    saved, inputs = None, {}
    if path is not None:
        inputs = _inputs(task, teachers)
        if own is not None:
            user_optimizer.check_storable(own)
        saved = training_file.read(path, recipe, inputs)
        _require_same_step(path, saved, on)
    total = recipe.total_steps(math.ceil(len(task.batches) / recipe.accumulate))
    earlier = 0.0
    if saved is not None:
        saved, earlier = _continue(saved, recipe, total), saved[1]["seconds"]
        if own is not None:
            own = replace(own, start=saved[1]["scheduler_start"])
    called = callbacks if on.is_main_process else ()
    recorder = RoundRecorder(called, saved[1]["rounds"] if saved else ())

    def save(state: PackedState) -> None:
        assert path is not None
        arrays, meta = state
        more = {
            "inputs": inputs,
            "recipe": asdict(recipe),
            "rounds": recorder.to_json(),
            "scheduler_start": own.start if own else 0,
            "seconds": earlier + time.perf_counter() - started,
        }
        if on.is_main_process:
            training_file.write(path, (arrays, {**meta, **more}))

    with contextlib.ExitStack() as stack:
        show = None
        if progress and on.is_main_process:
            done = saved[1]["step"] if saved else 0
            show = stack.enter_context(progress_display.bar(total, start=done))
        flag = stack.enter_context(stopping.watch()) if path is not None else None
        state = run_training(
            task.objective,
            task.batches,
            recipe,
            task.seed,
            on=on,
            validate=partial(_validate, task) if task.validation is not None else None,
            saved=saved,
            save=None if path is None else save,
            stopping=lambda: flag is not None and flag.requested,
            stop_early=lambda: engine.decide_on_main(on, lambda: recorder.stop),
            log=recorder,
            show=show,
            optimizer=own,
        )
    return state, recorder.rounds, earlier + time.perf_counter() - started


def _validate(task: _Task, network: nn.Module) -> Mapping[str, float]:
    assert task.validation is not None
    classifier = task.student.with_network(network)
    classes = task.validation.classes if task.recipe.metric in scoring.BY_CLASS else None
    figures = scoring.validate(
        classifier, task.validation, task.on, logits=task.logits, classes=classes
    )
    if task.recipe.metric != "robust_accuracy":
        return figures
    assert task.recipe.adversary is not None
    trained = attack.parse_adversary(task.recipe.adversary)
    plain = preprocess.identity(1)
    robust = robustness.validation_accuracy(classifier, task.validation, trained, plain, task.on)
    return {**figures, "robust_accuracy": robust}


def _inputs(task: _Task, teachers: Sequence[nn.Module]) -> dict[str, Any]:
    """What must be the same when a training goes on, JSON-compatible."""
    own, network = task.optimizer, task.student.network
    endless = isinstance(task.batches, EndlessBatches)  # an epoch is a part of the length
    parameters = networks.parameter_count(network)
    kind = "centred " if task.student.initial is not None else ""
    return {
        "student": f"{kind}{type(network).__name__} of {parameters} parameters",
        **teacher_cache.layer_hash("the student", network),
        "number of teachers": len(teachers),
        **{
            name: value
            for i, each in enumerate(teachers, 1)
            for name, value in teacher_cache.input_hashes(f"teacher {i}", each).items()
        },
        "seed": task.seed,
        **(own.identity if own else {"optimizer": task.recipe.optimizer}),
        **({} if endless else {"batches of train": len(task.batches)}),
        "extra_losses": sorted(task.extra_losses),
        "teacher_weights": "by-label" if task.objective.by_label else "alike",
        "validation": task.validation is not None,
    }


def _require_same_step(path: Path, saved: PackedState | None, on: Engine) -> None:
    """Refuse processes that have read different checkpoints.

    Raises:
        UserError: In every process, if any two differ.
    """
    if on.num_processes == 1:
        return
    steps = gather_object([saved[1]["step"] if saved else 0])
    for rank, step in enumerate(steps):
        if step != steps[0]:
            raise UserError(
                f"checkpoint {path} is after step {steps[0]} in process 0 and after step {step} in "
                f"process {rank}: put it where all processes read the same file"
            )


def _continue(saved: PackedState, recipe: Recipe, total: int) -> PackedState:
    """The stored state, adapted to another length of the training.

    Raises:
        UserError: If it has gone further than is asked for.
    """
    step = saved[1]["step"]
    if step > total:
        raise UserError(
            f"checkpoint is after step {step}, and this training has {total}: give more "
            "epochs or steps, or another checkpoint"
        )
    return checkpoint_state.adapt_to_length(saved, recipe)


def _prepare(
    student: nn.Module,
    teachers: Sequence[nn.Module],
    train: Loader,
    validation: Loader | None,
    recipe: Recipe,
    extra: Mapping[str, LossOfLogits],
    given: Mapping[str, Any],
    own: UserOptimizer | None,
    teacher_weights: str,
    centred: bool,
    seed: int,
    on: Engine,
) -> _Task:
    """Check that all parts fit together, and build the objective and the batches."""
    if on.is_fsdp2:
        raise UserError(
            "kd.distill gives back the student that it was given, which FSDP would take apart: "
            "launch it without --use_fsdp, or use kd train"
        )
    if teacher_weights not in ("alike", "by-label"):
        raise UserError(f"teacher_weights must be 'alike' or 'by-label', got {teacher_weights!r}")
    if not isinstance(centred, bool):
        raise UserError(f"centred must be True or False, got {centred!r}")
    images, labels = loader_batches.first_pair(train, "train")
    _, c, h, w = images.shape
    shape = h, w, c
    classifier = Classifier(student)
    classes = count_classes("student", classifier, images)
    if centred:
        classifier.centre()
    mixed = labels.is_floating_point()
    assert recipe.loss is not None
    chosen = terms.parse(recipe.loss) if recipe.loss else ()
    text = ",".join(filter(None, (recipe.loss, *extra)))
    _refuse_rows(chosen)
    loss_checks.check_labels(chosen, several=False)
    recipe = loss_checks.apply_smoothing(chosen, recipe, given)
    weighted = teacher_weights == "by-label"
    loss_checks.check_teaching(
        chosen, recipe, alone=not teachers, weighted=weighted, extra=bool(extra)
    )
    logits = loss_checks.gives_logits(chosen, alone=not teachers)
    loss_checks.check(chosen, classes=classes, batch_size=len(labels), mixed=mixed)
    adversary = _adversary(chosen, recipe, images)
    if own is None:
        optimization.check_optimizer(recipe)
    adapted = [_as_teacher(each, images, classes, i) for i, each in enumerate(teachers, 1)]
    built = terms.build(
        chosen,
        classifier,
        adapted,
        sample=shape,
        classes=classes,
        smoothing=recipe.label_smoothing,
        seed=seed,
    )
    built += [terms.user_term(name, loss, taught=bool(teachers)) for name, loss in extra.items()]
    objective = Distillation(classifier, built, adapted, by_label=weighted, adversary=adversary)
    least = max([batching.MIN_IMAGES_PER_PROCESS, *(term.min_images for term in chosen)])
    batches = _batches(train, len(labels), classes, mixed, least, recipe, on)
    check = partial(dry_run.check, shape=shape, classes=classes, images=0, on=on, mixed=mixed)
    if loader_batches.has_own_share(train):
        check(objective, text, [size // on.num_processes for size in batches.sizes], world=1)
    else:
        check(objective, text, batches.sizes)
    evaluation = None
    if validation is not None:
        first = loader_batches.first_pair(validation, "validation")
        loader_batches.read_pair(first, "validation", classes)
        evaluation = LoaderEvaluation(validation, on.device, classes)
    else:
        api_arguments.refuse_validation_fields(given)
    return _Task(
        classifier,
        objective,
        batches,
        evaluation,
        recipe,
        own,
        tuple(extra),
        logits,
        seed,
        on,
    )


def _adversary(chosen: Sequence[Term], recipe: Recipe, images: torch.Tensor) -> Adversary | None:
    """The attack on the student, on images that are pixels in [0, 1]; None without one."""
    against = loss_checks.check_adversary(chosen, recipe.adversary)
    if against is None or recipe.adversary is None:
        return None
    if images.min() < 0 or images.max() > 1:
        raise UserError(
            "adversary changes pixels in [0, 1], and train has values from "
            f"{images.min().item():.3g} to {images.max().item():.3g}: give images in [0, 1], and "
            "networks that normalise them"
        )
    chosen_attack = attack.parse_adversary(recipe.adversary)
    return Adversary(chosen_attack, Bounds(chosen_attack.eps), against)


def _batches(
    train: Loader, first: int, classes: int, mixed: bool, least: int, recipe: Recipe, on: Engine
) -> BatchSource:
    """The training batches; of a loader without a length, counted or repeated."""
    own_share = loader_batches.has_own_share(train)
    world, parts = (1, on.num_processes) if own_share else (on.num_processes, 1)
    least = batching.min_shared_size(world, least)
    batching.check_size(first, world, least)
    if recipe.steps is not None and loader_batches.length(train) is None:
        count = math.ceil(recipe.steps / ENDLESS_EPOCHS) * recipe.accumulate
        sizes = [first * parts] * count
        return EndlessBatches(LoaderBatches(train, sizes, on.device, classes, mixed, least))
    sizes = [parts * size for size in loader_batches.batch_sizes(train, first, least)]
    return LoaderBatches(train, sizes, on.device, classes, mixed, least)


def _as_modules(student: nn.Module, teacher: Any) -> list[nn.Module]:
    """The teachers as a list, checked."""
    several = isinstance(teacher, list | tuple | nn.ModuleList)
    teachers = [*teacher] if several else [] if teacher is None else [teacher]
    for name, module in (("student", student), *(("teacher", each) for each in teachers)):
        if not isinstance(module, nn.Module):
            raise UserError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
        tensors = (*module.parameters(), *module.buffers())
        kinds = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        if kinds - {torch.float32}:
            kind = min(map(str, kinds - {torch.float32}))
            raise UserError(
                f"{name} must be in float32, got {kind}: convert it with .float(); "
                'precision="bf16" computes faster with weights in float32'
            )
    if several and not teachers:
        raise UserError("teacher is an empty list: give None to train on labels alone")
    student_ids = {id(parameter) for parameter in student.parameters()}
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise UserError("student has no parameters that require gradients, so nothing is trained")
    if any(id(p) in student_ids for each in teachers for p in each.parameters()):
        raise UserError("student and teacher share parameters: give a copy.deepcopy as the teacher")
    return teachers


def _as_teacher(module: nn.Module, images: torch.Tensor, classes: int, number: int) -> Teacher:
    """Wrap a teacher that takes the student's very images."""
    _, c, h, w = images.shape
    classifier, plain = Classifier(module), preprocess.identity(c)
    count = count_classes(f"teacher {number}", classifier, images)
    if count != classes:
        raise UserError(f"teacher {number} has {count} outputs for an image, the student {classes}")
    names = tuple(map(str, range(classes)))
    model = Model(classifier, type(module).__name__, names, (h, w, c), plain)
    return Teacher(model, plain, (h, w))


def count_classes(name: str, classifier: Classifier, images: torch.Tensor) -> int:
    """Count a network's outputs for an image, tried in evaluation mode on the first two.

    Args:
        name: Name of the network, for messages.
        classifier: The network, whose modes are restored.
        images: Images (n, c, h, w).

    Raises:
        UserError: If it cannot take the images, or gives no logits.
    """
    device = borrowing.device_of(classifier)
    try:
        with evaluation_mode(classifier), torch.no_grad():
            outputs = classifier(images[:2].to(device))
    except Exception as error:  # a network may raise anything
        raise UserError(
            f"{name} cannot take images {tuple(images[:2].shape)} of train, or gives no logits: "
            f"{first_line(error)}"
        ) from error
    n = len(images[:2])
    if not isinstance(outputs, torch.Tensor) or outputs.ndim != 2 or len(outputs) != n:
        got = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise UserError(f"{name} must give logits ({n}, k) for {n} images, got {got}")
    return outputs.shape[1]


def _default_loss(teachers: Sequence[nn.Module], recipe: Recipe) -> str:
    if recipe.adversary is not None:
        return recipes.ADVERSARIAL_TEACHER_LOSS if teachers else recipes.ADVERSARIAL_LABEL_LOSS
    return recipes.TEACHER_LOSS if teachers else recipes.LABEL_LOSS


def _refuse_rows(chosen: Sequence[Term]) -> None:
    """Refuse terms that know each training image by its number."""
    for term in chosen:
        if term.definition.needs_rows:
            raise UserError(
                f"--loss {term.name} remembers each training image by its number, which batches of "
                "(images, labels) do not have: use another term, such as srd, or kd train"
            )
