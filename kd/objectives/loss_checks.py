"""Checks of a loss: that its terms fit the data, each other, the recipe, and what teaches.

Each refuses with the term and what it needs, before anything is trained.
"""

from collections.abc import Container, Sequence
from dataclasses import replace

from dsdistill.harness.errors import UserError
from kd.models.language.task import ALIGNED
from kd.objectives.adversary import Against
from kd.objectives.terms import Term, TermDefinition
from kd.recipe import METRICS, Recipe


def check(terms: Sequence[Term], *, classes: int, batch_size: int, mixed: bool) -> None:
    """Refuse terms that cannot work with the data.

    Args:
        terms: Terms of the loss.
        classes: Number of classes.
        batch_size: Number of images in a batch.
        mixed: Whether images are mixed.

    Raises:
        UserError: With the term and what it needs.
    """
    for term in terms:
        needs = term.definition
        if mixed and needs.whole:
            raise UserError(
                f"--loss {term.name} needs whole labels, one class for each image: leave --mixup "
                "and --cutmix out"
            )
        if classes < needs.classes and not needs.reads_layers:
            raise UserError(
                f"--loss {term.name} needs {needs.classes} classes or more, and the data have "
                f"{classes}: use kd"
            )
        if batch_size < (least := term.min_images):
            raise UserError(
                f"--loss {term.name} compares the images of a batch: --batch-size must be at "
                f"least {least}, got {batch_size}"
            )


def check_labels(terms: Sequence[Term], *, several: bool) -> None:
    """Refuse terms that do not work with the kind of labels of the data.

    Args:
        terms: Terms of the loss.
        several: Whether an image has any number of labels; else one class.

    Raises:
        UserError: With the term and what it needs.
    """
    for term in terms:
        needs = term.definition
        if several and (
            needs.label_kind == "one" or (needs.reads_layers and not features_alone(term))
        ):
            raise UserError(
                f"--loss {term.name} is of one class an image, and here an image has any number of "
                "labels: use bce, mld of a teacher's answers, logits, or a loss of layers"
            )
        if not several and needs.label_kind == "several":
            raise UserError(
                f"--loss {term.name} is of images with any number of labels, and here each has one "
                f"class: use {'kd' if needs.needs_teacher else 'ce'}"
            )


def check_texts(terms: Sequence[Term], *, task: str, same_ids: bool) -> None:
    """Refuse terms that do not work with texts, their task, or two tokenizers.

    Args:
        terms: Terms of the loss.
        task: `classify`, `regress`, `tag`, `mlm`, `causal` or `embed`.
        same_ids: Whether student and teachers see the same tokens.

    Raises:
        UserError: With the term and what it needs.
    """
    check_labels(terms, several=False)
    for term in terms:
        needs = term.definition
        on_answers = not (needs.reads_layers or needs.of_tokens)
        if needs.of_maps:
            raise UserError(
                f"--loss {term.name} compares maps of images, which texts have not: use hidden, "
                "cosine, or a loss of vectors such as srd"
            )
        if needs.against is not None:
            raise UserError(
                f"--loss {term.name} is of images whose pixels an attack changes, and texts have "
                f"none: use {'kd' if needs.needs_teacher else 'ce'}"
            )
        if needs.of_tokens and task not in ALIGNED:
            raise UserError(
                f"--loss {term.name} takes answers for tokens, and with --task {task} the networks "
                f"give them for texts: use {'kd' if needs.needs_teacher else 'ce'}"
            )
        if needs.task not in (None, task):
            raise UserError(
                f"--loss {term.name} takes the targets of --task {needs.task}, not those of --task "
                f"{task}: use {'clm' if task == 'causal' else 'mlm' if task == 'mlm' else 'ce'}"
            )
        if task == "embed" and _needs_labels_or_classes(needs):
            raise UserError(
                f"--loss {term.name} takes labels or classes, and --task embed has neither: use "
                "logits, the mean squared error of the embeddings, or a loss of vectors such as "
                "rkd-distance"
            )
        if task == "regress" and (needs.needs_logits or (on_answers and needs.classes > 1)):
            raise UserError(
                f"--loss {term.name} takes classes, and --task regress has scores: use "
                f"{'logits' if needs.needs_teacher else 'mse'}"
            )
        by_token = needs.aligned or (on_answers and task in ALIGNED)
        if by_token and needs.needs_teacher and not same_ids:
            remedy = "kd, logits or a loss of vectors such as srd"
            if task in ALIGNED:
                remedy = "--recipe sequence" if task == "causal" else "a teacher with the same one"
            raise UserError(
                f"--loss {term.name} compares token by token, and the teacher has another "
                f"tokenizer: use {remedy}"
            )


def _needs_labels_or_classes(needs: TermDefinition) -> bool:
    on_answers = not (needs.reads_layers or needs.of_tokens)
    return not needs.needs_teacher or needs.needs_logits or (on_answers and needs.classes > 1)


def teaches_outputs(terms: Sequence[Term], *, task: str) -> bool:
    """Whether a loss on texts reaches the student's outputs, and not layers before them alone.

    Losses of layers, such as TinyBERT's first stage and MiniLM, leave the head to a later training.
    The vectors that losses such as `rkd-distance` compare by default are the inputs of the head; of
    the task `embed` they are the outputs.

    Args:
        terms: Terms of the loss.
        task: Task of the texts.
    """
    return any(
        not term.definition.reads_layers
        or (task == "embed" and not term.definition.of_texts and not term.layers)
        for term in terms
    )


def gives_logits(terms: Sequence[Term], *, alone: bool) -> bool:
    """Whether a student's outputs are logits: those of MSE on labels alone are not.

    Args:
        terms: Terms of the loss.
        alone: Whether nothing but labels teaches the student.
    """
    rows = [term.definition for term in terms]
    on_labels = [row for row in rows if not (row.needs_teacher or row.reads_layers)]
    return not (alone and on_labels and all(row.centred for row in on_labels))


def apply_smoothing(terms: Sequence[Term], recipe: Recipe, given: Container[str]) -> Recipe:
    """The recipe with the label smoothing of a term of the loss, where one has a value.

    Args:
        terms: Terms of the loss.
        recipe: The recipe.
        given: Names of the fields that the user gave.

    Raises:
        UserError: If it is given twice, or has no effect.
    """
    smoothing = next((term.smoothing for term in terms if term.smoothing is not None), None)
    if "label_smoothing" not in given:
        return recipe if smoothing is None else replace(recipe, label_smoothing=smoothing)
    if smoothing is not None:
        raise UserError(
            f"--label-smoothing {recipe.label_smoothing:g} and smoothing={smoothing:g} in --loss "
            "set the same value: give one of them"
        )
    if not any(term.definition.smooths_labels for term in terms):
        raise UserError(
            f"--label-smoothing has no effect on --loss {recipe.loss}, which has no term ce: "
            "leave it out"
        )
    return recipe


def check_teaching(
    terms: Sequence[Term], recipe: Recipe, *, alone: bool, weighted: bool, extra: bool = False
) -> None:
    """Refuse a loss that does not fit what teaches the student, or the recipe's metric.

    Args:
        terms: Terms of the loss.
        recipe: The recipe with the loss.
        alone: Whether nothing but labels teaches the student.
        weighted: Whether weights of the teachers' logits are given.
        extra: Whether the user's own losses of logits are added.

    Raises:
        UserError: If it does not fit.
    """
    taught = [term for term in terms if term.definition.needs_teacher]
    if taught and alone:
        raise UserError(
            f"--loss {taught[0].name} needs a teacher: add --teacher, --peers or --mean-teacher"
        )
    if not (taught or alone or extra):
        raise UserError(f"--loss {recipe.loss} has no term that uses the teacher: add kd:0.9")
    if weighted and not extra and all(term.definition.reads_layers for term in taught):
        raise UserError(
            f"--teacher-weights has no effect on --loss {recipe.loss}, which has no term of "
            "teachers' logits: leave it out"
        )
    if gives_logits(terms, alone=alone):
        return
    if on_logits := [term.name for term in terms if term.definition.needs_logits]:
        raise UserError(
            f"--loss {on_logits[0]} trains its classifiers on the student's logits, and with mse "
            "the student has none: use ce"
        )
    if METRICS[recipe.metric].needs_logits:
        raise UserError(
            f"--metric {recipe.metric} needs logits, which a student trained by mse alone does not "
            "have: use --metric accuracy"
        )


def check_students(terms: Sequence[Term], recipe: Recipe, *, teachers: bool, peers: bool) -> None:
    """Refuse terms that the scheme has nothing for: layers of a teacher or of several students.

    Args:
        terms: Terms of the loss.
        recipe: The recipe with the loss.
        teachers: Whether there are teachers, and not only other students or an average.
        peers: Whether several students teach each other.

    Raises:
        UserError: If a term does not fit.
    """
    taught = [term for term in terms if term.definition.needs_teacher]
    featured = [term.name for term in taught if term.definition.reads_layers]
    if featured and not teachers:
        way = "name a --teacher in place of --peers" if peers else "add --teacher"
        raise UserError(f"--loss {featured[0]} uses layers of a teacher: {way}")
    if not teachers and len(taught) == len(terms):
        raise UserError(
            f"--loss {recipe.loss} has no term that uses labels, and without --teacher nothing "
            "else teaches them: add ce:1"
        )
    layered = [term.name for term in terms if term.definition.reads_layers]
    if layered and peers:
        raise UserError(
            f"--loss {layered[0]} uses layers of one student: leave it out, or leave --peers out"
        )


def check_unlabelled(terms: Sequence[Term], data: str = "--transfer") -> None:
    """Refuse terms of labels, where the images trained on have none.

    Args:
        terms: Terms of the loss.
        data: Name of the images, for messages.

    Raises:
        UserError: With the term.
    """
    for term in terms:
        if term.definition.uses_labels:
            raise UserError(
                f"--loss {term.name} takes labels, and the images of {data} have none: use "
                "kd, or a loss of layers such as srd"
            )


def check_class_weights(terms: Sequence[Term]) -> None:
    """Refuse weights of classes without a cross-entropy of labels.

    Raises:
        UserError: If no term takes them.
    """
    if not any(term.definition.weighs_classes for term in terms):
        names = ",".join(term.name for term in terms)
        raise UserError(
            f"--class-weights weights the cross-entropy of labels, and --loss {names} has none: "
            "add ce, or leave the weights out"
        )


def takes_answers(terms: Sequence[Term]) -> bool:
    """Whether a loss takes the answers of a teacher, and not features of its layers alone."""
    return any(
        term.definition.needs_teacher
        and (not term.definition.reads_layers or bool(term.parameters.get("logits")))  # of `adv`
        for term in terms
    )


def check_headless(terms: Sequence[Term]) -> None:
    """Refuse terms of classes, where the student has no head.

    Raises:
        UserError: With the term.
    """
    for term in terms:
        needs = term.definition
        if not (needs.needs_teacher and needs.reads_layers) or not features_alone(term):
            raise UserError(
                f"--loss {term.name} takes labels or answers for classes, and --head none leaves "
                "the student without: use a loss of layers alone, such as srd:2 or rkd-distance"
            )


def features_alone(term: Term) -> bool:
    """Whether a term of layers takes neither labels nor logits."""
    return not (term.parameters.get("logits") or term.definition.needs_logits)


def check_adversary(
    terms: Sequence[Term], adversary: str | None, *, other: str | None = None
) -> Against | None:
    """Refuse an attack without a term of its images, and the reverse.

    Args:
        terms: Terms of the loss.
        adversary: Value of `--adversary`; None without an attack.
        other: Option of a scheme or data that no attack works with; None without one.

    Returns:
        What the attack drives the student away from; None without an attack.

    Raises:
        UserError: If they do not fit each other.
    """
    attacked = [term for term in terms if term.definition.against is not None]
    if not attacked and adversary is None:
        return None
    if not attacked:
        raise UserError(
            f"--adversary {adversary} has no effect on --loss {','.join(t.name for t in terms)}: "
            "add adv-ce, trades, ard, rslad or adaad"
        )
    first = attacked[0]
    if adversary is None:
        raise UserError(
            f"--loss {first.name} is of images that an attack has changed: add --adversary pgd"
        )
    for term in attacked[1:]:
        if term.definition.against != first.definition.against:
            raise UserError(
                f"--loss {first.name} and {term.name} are of different attacks, and a step has "
                "one: leave one of them out"
            )
    if any(term.definition.centred for term in terms):
        raise UserError(
            f"--loss {first.name} takes logits, and mse fits the outputs to centred labels: use ce"
        )
    if all(term.definition.against == "itself" for term in terms):
        raise UserError(
            f"--loss {first.name} alone is smallest where all images have one answer: add ce:1"
        )
    if other is not None:
        raise UserError(f"--adversary does not work with {other}: leave one of them out")
    return first.definition.against


def remarks(terms: Sequence[Term], *, images: int) -> list[str]:
    """Lines about terms whose parameters are lowered for lack of images.

    Args:
        terms: Terms of the loss.
        images: Number of training images; 0 if unknown.
    """
    lines = (term.definition.remark(term.parameters, images) for term in terms)
    return [line for line in lines if line is not None]
