"""Columns of a table of text: which hold texts, labels, tags and languages.

Names that GLUE and its kind use are recognised; `--text` and `--label` name others.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dsdistill.harness.errors import UserError
from kd.models.language.task import Task

PAIRS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("source", "target"),
    ("english", "non_english"),
)
PARALLEL = PAIRS[-2:]  # a text and its translation
TEXTS = ("text", "sentence", "question", "review", "content", "document", "tweet", "comment")
LABELS = ("label", "labels", "class", "score", "category", "target", "sentiment", "coarse_label")
LANGUAGES = ("language", "lang")
TOKENS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "pos_tags", "labels", "label")
CONVERSATION = "messages"
PROMPT, COMPLETION = "prompt", "completion"


@dataclass(frozen=True)
class Columns:
    """What the columns of a table hold.

    Attributes:
        texts: One column of texts, or two of pairs; of conversations the one of messages, and of
            tagged sentences that of their tokens.
        label: Column of the labels or tags; None without.
        language: Column of the language of each row; None without.
    """

    texts: tuple[str, ...]
    label: str | None = None
    language: str | None = None

    def are_parallel(self, *, given: bool) -> bool:
        """Whether the second text of a row is a translation of the first, for `embed`.

        Other pairs, such as sentences of which a person has said how similar they are, are two
        texts of which each has its own embedding.

        Args:
            given: Whether the user has named the columns.
        """
        two = len(self.texts) == 2 and self.label is None
        return two and (given or self.texts in PARALLEL)

    @property
    def described(self) -> str:
        """The columns in words, for the line that says what was recognised."""
        parts = [" and ".join(self.texts)]
        parts += [f"label {self.label}"] if self.label else []
        parts += [f"language {self.language}"] if self.language else []
        return ", ".join(parts)


def recognise(
    where: object,
    names: Collection[str],
    task: Task | None,
    *,
    text: str | None = None,
    label: str | None = None,
) -> Columns:
    """Find the columns of a task among those of a table.

    Args:
        where: The file, for messages.
        names: Names of its columns.
        task: What they are for; None: to be told from them.
        text: One or two names as the user gave them, parted by a comma.
        label: The name that the user gave.

    Raises:
        UserError: If a given name is no column, or none is recognised.
    """
    texts = _given_texts(where, names, text) if text else _texts(where, names, task)
    if task in ("mlm", "tag") and len(texts) == 2:
        raise UserError(f"--task {task} learns from one column: --text must name one, got {text}")
    if label is not None:
        _require(where, names, label, "--label")
    elif task in ("mlm", "causal", "embed"):
        label = None
    else:
        known = TAGS if texts[0] in TOKENS else LABELS
        # In MS MARCO and others the second text of a pair is called as labels are elsewhere.
        label = next((name for name in known if name in names and name not in texts), None)
        if label is None:
            others = ", or say --task mlm, causal or embed" if task is None else ""
            raise UserError(
                f"{where} has no column of labels that is recognised among {_listed(names)}: name "
                f"it with --label{others}"
            )
    if label is not None and task == "embed" and len(texts) == 1:
        raise UserError(
            f"--label {label} must be a score of two texts with --task embed, and {where} has one "
            "text in a row: leave it out, or name two with --text ONE,OTHER"
        )
    if label in texts:
        raise UserError(f"--text and --label name one column, {label}")
    language = next((name for name in LANGUAGES if name in names and name not in texts), None)
    return Columns(texts, label, language)


def _texts(where: object, names: Collection[str], task: Task | None) -> tuple[str, ...]:
    if task == "causal":
        if CONVERSATION in names:
            return (CONVERSATION,)
        if PROMPT in names and COMPLETION in names:
            return PROMPT, COMPLETION
    if task == "tag" or (task is None and any(name in names for name in TOKENS)):
        for name in TOKENS:
            if name in names:
                return (name,)
    if task != "mlm":
        for pair in PAIRS:
            if all(name in names for name in pair):
                return pair
    for name in TEXTS:
        if name in names:
            return (name,)
    if CONVERSATION in names or (PROMPT in names and COMPLETION in names):
        raise UserError(
            f"{where} has conversations, or prompts with completions, which --task causal learns: "
            "add it, or name a column of texts with --text"
        )
    wanted = "tokens" if task == "tag" else "texts"
    raise UserError(
        f"{where} has no column of {wanted} that is recognised among {_listed(names)}: name it "
        "with --text, or two of pairs with --text ONE,OTHER"
    )


def _given_texts(where: object, names: Collection[str], text: str) -> tuple[str, ...]:
    given = tuple(name.strip() for name in text.split(","))
    if not 1 <= len(given) <= 2 or len(set(given)) < len(given):
        raise UserError(f"--text must name one column, or two of pairs, got {text}")
    for name in given:
        _require(where, names, name, "--text")
    return given


def _require(where: object, names: Collection[str], name: str, option: str) -> None:
    if name not in names:
        raise UserError(f"{option} {name} is no column of {where}, which has {_listed(names)}")


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) if names else "no columns"


def labels_are_scores(values: Sequence[object]) -> bool:
    """Whether labels are real numbers, to be regressed, and not the names or numbers of classes.

    Args:
        values: Labels of all rows, as a file holds them: `5.000` is a score, `5` a class.
    """
    texts = {str(value) for value in values if isinstance(value, str)}
    if texts:
        return all(map(_is_number, texts)) and any(
            not text.strip().lstrip("+-").isdigit() for text in texts
        )
    return any(isinstance(value, float) for value in values)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
