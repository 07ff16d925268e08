"""Small sets of texts in files, and trained models for them, as `kd train` takes them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import text_support

Row = tuple[str, ...]
PARTS = (("train", 96, 0), ("dev", 24, 1), ("test", 24, 2))


def sentences(n: int, seed: int = 0) -> list[str]:
    """Sentences of two to eight letters."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 9, n)
    return [" ".join(text_support.LETTERS[i] for i in rng.integers(0, 10, k)) for k in lengths]


def label(text: str) -> str:
    """Class of a sentence: whether it has one of two letters."""
    return "pos" if set("ab") & set(text.split()) else "neg"


def rows(n: int = 40, seed: int = 0) -> list[Row]:
    """Sentences with their classes."""
    return [(text, label(text)) for text in sentences(n, seed)]


def write_tsv(path: Path, lines: Sequence[Row], header: str = "sentence\tlabel") -> Path:
    """Rows as a TSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in (header, *map("\t".join, lines))))
    return path


def write_json(path: Path, lines: Sequence[dict]) -> Path:
    """Rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def pair(one: str, other: str) -> Row:
    """Two sentences, and whether both have the letter a."""
    return one, other, "same" if ("a" in one) == ("a" in other) else "other"


def score(one: str, other: str) -> Row:
    """Two sentences, and by how many letters a they differ."""
    return one, other, f"{abs(one.count('a') - other.count('a')):.3f}"


def tags(text: str) -> dict:
    """Tokens with tags that mark entities."""
    words = text.split()
    return {"tokens": words, "tags": ["B-X" if word in "ab" else "O" for word in words]}


def write_all(folder: Path) -> None:
    """Write folders `one`, `pair`, `score`, `tag`, `plain`, `prompt` and `chat`."""
    to_json: dict[str, Callable[[str], dict]] = {
        "tag": tags,
        "prompt": lambda text: {"prompt": f"{text} ", "completion": text[::-1]},
        "chat": lambda text: {
            "messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": text[::-1]},
            ]
        },
    }
    for name, n, seed in PARTS:
        texts, others = sentences(n, seed), sentences(n, seed + 10)
        write_tsv(folder / "one" / f"{name}.tsv", rows(n, seed))
        both = list(zip(texts, others, strict=True))
        for kind, row, last in (("pair", pair, "label"), ("score", score, "score")):
            lines = [row(*x) for x in both]
            write_tsv(folder / kind / f"{name}.tsv", lines, f"sentence1\tsentence2\t{last}")
        for kind, to_row in to_json.items():
            write_json(folder / kind / f"{name}.jsonl", list(map(to_row, texts)))
        (folder / "plain").mkdir(exist_ok=True)
        (folder / "plain" / f"{name}.txt").write_text("".join(f"{text}\n" for text in texts))
