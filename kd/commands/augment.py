"""`kd augment`: copies of training texts with words changed, to look at or in a file.

A transfer set has no labels, and so has the file none, not even of the originals: a table with
labels in some rows cannot be trained on. Labels of the originals are found by `original_row`.
"""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dsdistill.harness import paths, shell, stopping
from dsdistill.harness.errors import UserError
from dsdistill.harness.files import write_bytes
from dsdistill.harness.runs import progress
from dsdistill.harness.text import printable
from kd.data.text import corpus, masked_candidates, part_files, transfer_set, word_replacement
from kd.data.text.corpus import TextPart
from kd.data.text.transfer_set import Augmentation, TransferSet
from kd.data.text.word_replacement import WordReplacement
from kd.evaluation import backbones
from kd.options import AugmentOptions

PREVIEW_COPIES = 5  # of each text, where --copies does not say it
BETWEEN_TEXTS = "  |  "  # of a pair


def preview(options: AugmentOptions) -> Iterator[str]:
    """Yield lines with the first texts, each above its copies.

    Raises:
        UserError: If the data or the language model cannot be read.
    """
    part = _training_part(options)
    augmentation = _augmentation(options, part)
    most = options.copies or PREVIEW_COPIES
    for row in range(min(options.preview or 0, len(part))):
        texts = tuple(column[row] for column in part.texts)
        copies = transfer_set.distinct_copies(augmentation, part, row)
        yield f"{row}  {_line(texts)}"
        yield from (f"   {_line(copy)}" for copy in copies[:most])


def write(options: AugmentOptions) -> dict[str, Any]:
    """Write the transfer set of the training part to a file; return figures to print.

    Raises:
        UserError: If the data or the language model cannot be read, or the file exists.
        StopInterrupt: If stopped; what is finished is in the cache.
    """
    name = f"augmented-{part_files.short_name(options.data)}-{options.by}.jsonl"
    out = options.out or Path(name)
    if out.exists():
        raise UserError(f"{out} exists: choose another --out, or remove it")
    part = _training_part(options)
    _refuse_breaks(part, out)
    given = {name: value for name, value in vars(options).items() if name not in ("data", "by")}
    command = shell.line("kd augment", {"by": options.by} | given, _defaults(), str(options.data))
    began = time.monotonic()
    with stopping.explain_stop(command, out):
        augmentation = _augmentation(options, part)
        folder = options.cache or paths.transfer_sets()
        copies = transfer_set.build(part, augmentation, folder.expanduser())
        out.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(out, _table(copies, out).encode("utf-8", "surrogatepass"))
    return {
        "file": str(out),
        "originals": copies.originals,
        "copies": len(copies) - copies.originals,
        "seconds": time.monotonic() - began,
    }


def _training_part(options: AugmentOptions) -> TextPart:
    root = paths.data_root()
    path = part_files.locate(str(options.data), root)
    if not path.exists():
        raise UserError(
            f"there is no file or folder {options.data}, nor one of that name in {root}"
        )
    data = corpus.load(
        path,
        task=options.task,
        text=options.text,
        label=options.label,
        validation_fraction=options.validation_fraction,
    )
    if data.task == "tag":
        raise UserError(f"{options.data} has tagged tokens: their tags would not fit the copies")
    progress.say(f"{data.notes[0]}; {len(data.train):,} training texts")
    return data.train


def _augmentation(options: AugmentOptions, part: TextPart) -> Augmentation:
    copies = options.copies or transfer_set.default_copies(part)
    values = {"seed": options.seed, "replace_probability": options.replace_probability}
    if options.by == "masked":
        assert options.mlm is not None, "the options are checked"
        device = backbones.device(options.device)
        return masked_candidates.load(options.mlm, part, device, copies=copies, **_given(values))
    values |= {
        "mask": options.mask,
        "mask_probability": options.mask_probability,
        "ngram_probability": options.ngram_probability,
    }
    return WordReplacement(word_replacement.count_bands(part), copies, **_given(values))


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _defaults() -> dict[str, Any]:
    return vars(AugmentOptions(data=Path(), by="words")) | {"by": None}


def _line(texts: tuple[str, ...]) -> str:
    return printable(BETWEEN_TEXTS.join(texts))


def _refuse_breaks(part: TextPart, out: Path) -> None:
    """Refuse texts that do not fit into a line of TSV; copies have no other white space.

    Raises:
        UserError: If there is one.
    """
    if out.suffix != ".tsv":
        return
    for text in itertools.chain(*part.texts):
        if any(character in text for character in "\t\n\r"):
            raise UserError(
                f"a text with a tab or a line break does not fit into TSV ({text[:40]!r}): write "
                "--out FILE.jsonl"
            )


def _table(copies: TransferSet, out: Path) -> str:
    """The transfer set as the content of a file."""
    part = copies.part
    names = ("text",) if len(part.texts) == 1 else ("text1", "text2")
    columns: dict[str, Sequence[Any]] = dict(zip(names, part.texts, strict=True))
    columns |= {"language": part.languages} if part.languages else {}
    columns["original_row"] = copies.rows.tolist()
    rows = zip(*columns.values(), strict=True)
    if out.suffix == ".tsv":
        lines = ("\t".join(map(str, row)) for row in (tuple(columns), *rows))
    else:
        objects = (dict(zip(columns, row, strict=True)) for row in rows)
        lines = (json.dumps(each, ensure_ascii=False) for each in objects)
    return "".join(f"{line}\n" for line in lines)
