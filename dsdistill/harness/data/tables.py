r"""Tables as people keep them: TSV, CSV, JSON lines, Parquet, plain text.

Every format becomes columns of equal length, and every refusal names the row as an editor numbers
it. TSV has no quoting, as in GLUE: a quotation mark is a character of the text. CSV is RFC 4180.
Lines end with \n or \r\n and with nothing else, whatever Unicode calls a line separator. A first
column without a name, as pandas writes an index, is left out.
"""

import csv
import gzip
import io
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsdistill.harness.errors import UserError, first_line

SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet", ".tsv", ".txt")
GZIP_MAGIC = b"\x1f\x8b"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
# Columns of CoLA's files, which have no header: Warstadt et al. (2019), arXiv:1805.12471.
COLA = ("source", "label", "mark", "sentence")
_QUOTED_ROWS = 3  # from so many on, a column in which every value is quoted is no accident


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of equal length, with the place of each row for messages.

    Attributes:
        path: File that it was read from.
        columns: Values by the name of their column.
        lines: Line of each row in the file, from 1; empty where rows have none.
        names: Names of the values of a column of numbers, where the file knows them.
        note: What was recognised that the file does not say; None without.
    """

    path: Path
    columns: Mapping[str, Sequence[Any]]
    lines: Sequence[int] = ()
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    note: str | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def place(self, row: int) -> str:
        """A row for messages, as `train.tsv, line 17`."""
        return f"{self.path}, {f'line {self.lines[row]}' if self.lines else f'row {row + 1}'}"


def read(
    path: Path,
    *,
    documents: bool = False,
    partial: bool = False,
    wanted: Callable[[str], bool] | None = None,
) -> Table:
    """Read a file by its suffix, compressed with gzip or not.

    Args:
        path: A file with a suffix of `SUFFIXES`, perhaps followed by `.gz`.
        documents: Whether a file of plain text is one text with all its lines; else each line that
            is not empty is one.
        partial: Whether an object of JSON lines may lack keys of others; their values are None.
        wanted: Which columns of a Parquet file are read; None: all.

    Raises:
        UserError: If it is not such a file, empty, not text, or a row does not fit.
    """
    suffix = table_suffix(path)
    if suffix is None:
        raise UserError(
            f"{path} is no text file that can be read: {', '.join(SUFFIXES)}, with .gz or without"
        )
    match suffix:
        case ".tsv":
            table = _read_tsv(path)
        case ".csv":
            table = _read_csv(path)
        case ".parquet":
            table = _read_parquet(path, wanted)
        case ".txt":
            table = _read_document(path) if documents else _read_plain(path)
        case _:
            table = _read_json_lines(path, partial=partial)
    none_wanted = wanted is not None and not table.columns
    if not len(table) and not none_wanted:
        raise UserError(f"{path} has no rows")
    return table


def table_suffix(path: Path) -> str | None:
    """The suffix that says how a file is read, such as `.tsv` of `train.tsv.gz`; None: it is not.

    Args:
        path: Any path.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def _read_tsv(path: Path) -> Table:
    rows = _lines(path)
    first = next(rows, (0, ""))
    header, note = first[1].split("\t"), None
    if _is_cola(header):
        header, rows = list(COLA), itertools.chain([first], rows)
        note = f"no header: its columns are those of CoLA, {', '.join(COLA)}"
    _check_header(path, header, "\t")
    values: list[list[str]] = [[] for _ in header]
    numbers = []
    for number, line in rows:
        if not line:
            continue  # an empty line at the end
        fields = line.split("\t")
        if len(fields) != len(header):
            raise UserError(
                f"{path}, line {number} has {_fields(len(fields))}, the header has {len(header)} "
                f"({', '.join(header)}): TSV has one row in each line and no quoting"
            )
        for column, value in zip(values, fields, strict=True):
            column.append(value)
        numbers.append(number)
    _refuse_quoting(path, header, values)
    return Table(path, _named_columns(header, values), numbers, note=note)


def _is_cola(row: Sequence[str]) -> bool:
    """Whether a first line is a row as CoLA's files have them, and no names of columns."""
    return len(row) == len(COLA) and row[1] in ("0", "1") and row[2] in ("", "*")


def _read_csv(path: Path) -> Table:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    values: list[list[str]] = []
    header: list[str] = []
    numbers: list[int] = []
    before = 0
    try:
        for fields in reader:
            number, before = before + 1, reader.line_num
            if not header:
                header = fields
                _check_header(path, header, ",")
                values = [[] for _ in header]
                continue
            if not fields:
                continue  # an empty line
            if len(fields) != len(header):
                raise UserError(
                    f"{path}, line {number} has {_fields(len(fields))}, the header has "
                    f"{len(header)} ({', '.join(header)}): a comma or a quotation mark in a text "
                    "needs quotation marks around the text"
                )
            for column, value in zip(values, fields, strict=True):
                column.append(value)
            numbers.append(number)
    except csv.Error as error:
        raise UserError(
            f"{path}, line {before + 1} is no CSV ({error}): quotation marks in a text are doubled"
        ) from error
    return Table(path, _named_columns(header, values), numbers)


def _read_json_lines(path: Path, *, partial: bool) -> Table:
    rows: list[dict[str, Any]] = []
    numbers = []
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is no JSON: {first_line(error)}") from error
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, line {number} must be an object such as "
                f'{{"text": "...", "label": "..."}}, got {type(row).__name__}'
            )
        if not partial and rows and row.keys() != rows[0].keys():
            lacking = sorted(rows[0].keys() ^ row.keys())
            raise UserError(
                f"{path}, line {number} and line {numbers[0]} must have the same keys: they differ "
                f"in {', '.join(lacking)}"
            )
        rows.append(row)
        numbers.append(number)
    keys = dict.fromkeys(key for row in rows for key in row)
    return Table(path, {key: [row.get(key) for row in rows] for key in keys}, numbers)


def _read_parquet(path: Path, wanted: Callable[[str], bool] | None) -> Table:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{path} needs pyarrow to be read: pip install pyarrow, or write it as CSV"
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(_content(path)))
        names = [name for name in file.schema_arrow.names if wanted is None or wanted(name)]
        table = file.read(columns=names)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no Parquet file: {first_line(error)}") from error
    return Table(path, table.to_pydict())


def _read_plain(path: Path) -> Table:
    rows = [(number, line) for number, line in _lines(path) if line.strip()]
    return Table(path, {"text": [line for _, line in rows]}, [number for number, _ in rows])


def _read_document(path: Path) -> Table:
    text = "\n".join(line for _, line in _lines(path))
    return Table(path, {"text": [text] if text.strip() else []}, [1])


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        if content.startswith(GZIP_MAGIC):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    if not content:
        raise UserError(f"{path} is empty")
    return content


def _text(path: Path) -> str:
    """The content as text, without a byte order mark.

    Raises:
        UserError: If it is not UTF-8, with the line.
    """
    content = _content(path)
    if content.startswith(_UTF16) or b"\0" in content[:4096]:
        raise UserError(
            f"{path} is no UTF-8 text"
            + (
                ", but UTF-16: save it as UTF-8"
                if content.startswith(_UTF16)
                else ": it holds zero bytes"
            )
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line} is not UTF-8 (byte {content[error.start]:#04x}): save the file "
            "as UTF-8, as by iconv -f latin1 -t utf-8"
        ) from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each line with its number from 1, without its end."""
    for number, line in enumerate(_text(path).split("\n"), start=1):
        yield number, line.removesuffix("\r")


def _fields(count: int) -> str:
    return f"{count} field{'' if count == 1 else 's'}"


def _check_header(path: Path, header: Sequence[str], separator: str) -> None:
    """Refuse a header without names, with a name twice, or of another kind of file."""
    if len(header) == 1:
        for other, what in (("\t", "tabs"), (",", "commas"), (";", "semicolons")):
            if other != separator and other in header[0]:
                right = {"\t": "a .tsv file", ",": "a .csv file"}.get(other, "commas or tabs")
                raise UserError(f"{path} parts its columns by {what}: it needs {right}")
    named = header[1:] if len(header) > 1 else header
    if "" in named:
        raise UserError(
            f"{path} must begin with a line of column names, and column "
            f"{len(header) - len(named) + named.index('') + 1} has none"
        )
    if twice := {name for name in header if header.count(name) > 1}:
        raise UserError(f"{path} has two columns {sorted(twice)[0]!r}: rename one")


def _named_columns(
    header: Sequence[str], values: Sequence[Sequence[str]]
) -> dict[str, Sequence[str]]:
    return {name: column for name, column in zip(header, values, strict=True) if name}


def _refuse_quoting(path: Path, header: Sequence[str], values: Sequence[Sequence[str]]) -> None:
    """Refuse a TSV file whose texts are quoted as in CSV: the quotation marks would be learned."""
    for name, column in zip(header, values, strict=True):
        quoted = name.startswith('"') and name.endswith('"') and len(name) > 1
        every = len(column) >= _QUOTED_ROWS and all(
            len(value) > 1 and value[0] == value[-1] == '"' for value in column
        )
        if quoted or every:
            raise UserError(
                f"{path} has quotation marks around column {name}, and TSV has no quoting: they "
                "would be part of the text. Save it without them, or as .csv"
            )
