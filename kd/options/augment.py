"""The options of `kd augment`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from dsdistill.harness.errors import UserError
from dsdistill.harness.help_page import Layout, Shown
from kd.options.shared import option_name, require

if TYPE_CHECKING:
    pass


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
            require(value is None or value >= 1, f"{option_name(name)} must be at least 1", value)
        require(self.seed >= 0, "--seed must be 0 or more", self.seed)
        for name in ("mask_probability", "replace_probability", "ngram_probability"):
            value = getattr(self, name)
            rule = f"{option_name(name)} must be in [0, 1]"
            require(value is None or 0 <= value <= 1, rule, value)
        fraction = self.validation_fraction
        require(0 <= fraction < 1, "--validation-fraction must be in [0, 1)", fraction)
        require(
            self.out is None or self.out.suffix in (".jsonl", ".tsv"),
            "--out must end in .jsonl or .tsv",
            self.out,
        )
        require(
            self.preview is None or self.out is None,
            "--preview writes nothing: leave --out out",
            self.out,
        )
        self._check_method()

    def _check_method(self) -> None:
        """Refuse options of the other method."""
        if self.by == "words":
            require(self.mlm is None, "--mlm needs --by masked", "--by words")
            chances = (self.mask_probability, self.replace_probability)
            both = sum(0.1 if chance is None else chance for chance in chances)
            rule = "--mask-probability and --replace-probability must be at most 1 together"
            require(both <= 1, rule, both)
            return
        if self.mlm is None:
            raise UserError("--by masked needs a masked language model: --mlm hf:NAME, or a folder")
        for name in ("mask", "mask_probability", "ngram_probability"):
            if getattr(self, name) is not None:
                raise UserError(f"{option_name(name)} needs --by words, got --by masked")
