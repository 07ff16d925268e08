"""Text files as people keep them: what they hold, and one line for what does not fit."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from dsdistill.harness.data import tables
from dsdistill.harness.errors import UserError

ROWS = {"text": ['a "b', "x, y", "é\u2028z"], "label": ["0", "1", "0"]}


def write(folder, name, content):
    data = content.encode() if isinstance(content, str) else content
    path = folder / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def tsv(rows) -> str:
    lines = [rows.keys(), *zip(*rows.values(), strict=True)]
    return "\n".join("\t".join(line) for line in lines) + "\n"


@pytest.mark.parametrize("name", ["a.tsv", "a.TSV", "a.b.tsv.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_tsv_has_no_quoting_and_only_line_feeds_part_lines(tmp_path, name, end, mark):
    table = tables.read(write(tmp_path, name, mark + tsv(ROWS).replace("\n", end)))
    assert table.columns == ROWS
    assert len(table) == 3
    assert table.place(2).endswith(f"{name}, line 4")


def test_csv_follows_rfc_4180(tmp_path):
    content = 'text,label\r\n"a ""b",0\r\n"x, y",1\r\n"two\r\nlines",1\r\nlast,0\r\n'
    table = tables.read(write(tmp_path, "a.csv", content))
    assert table.columns["text"] == ['a "b', "x, y", "two\r\nlines", "last"]
    assert table.place(3).endswith("line 6")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson"])
def test_json_lines_keep_the_types_of_values(tmp_path, name):
    rows = [{"tokens": ["a", "b"], "tags": [0, 1]}, {"tokens": [], "tags": []}]
    content = "\n".join(map(json.dumps, rows)) + "\n\n"
    assert tables.read(write(tmp_path, name, content)).columns == {
        "tokens": [["a", "b"], []],
        "tags": [[0, 1], []],
    }


def test_parquet(tmp_path):
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a", "b"], "label": [0.5, 1.0]}), tmp_path / "a.parquet"
    )
    table = tables.read(tmp_path / "a.parquet")
    assert table.columns == {"text": ["a", "b"], "label": [0.5, 1.0]}
    assert table.place(1).endswith("row 2")


def test_plain_text_is_one_row_a_line_without_the_empty_ones(tmp_path):
    table = tables.read(write(tmp_path, "a.txt.gz", "one\n\n  \ntwo \u2028 more\n"))
    assert table.columns == {"text": ["one", "two \u2028 more"]}
    assert table.place(1).endswith("line 4")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "text\tlabel\na\t0\nb\n", "line 3 has 1 field, the header has 2"),
        ("a.tsv", "text\tlabel\na\t0\t1\n", "line 2 has 3 fields"),
        ("a.tsv", b"", "is empty"),
        ("a.tsv", "text\tlabel\n", "has no rows"),
        ("a.tsv", "text,label\na,0\n", "parts its columns by commas: it needs a .csv file"),
        ("a.csv", "text;label\na;0\n", "parts its columns by semicolons"),
        ("a.csv", "text\tlabel\na\t0\n", "it needs a .tsv file"),
        ("a.tsv", "text\ttext\na\tb\n", "two columns 'text'"),
        ("a.tsv", "\t\tlabel\na\tb\tc\n", "column 2 has none"),
        ("a.tsv", '"text"\t"label"\n"a"\t"0"\n', "quotation marks around column"),
        ("a.tsv", 'text\tlabel\n"a"\t0\n"b"\t0\n"c"\t1\n', "quotation marks around column text"),
        ("a.csv", "text,label\na,b,0\n", "line 2 has 3 fields"),
        ("a.csv", 'text,label\n"a"b,0\n', "line 2 is no CSV"),
        ("a.csv", 'text,label\na,0\n"never closed,1\n', "is no CSV"),
        ("a.tsv", "text\tlabel\ncafé\t0\n".encode("latin1"), "line 2 is not UTF-8 .byte 0xe9"),
        ("a.tsv", "text\tlabel\na\t0\n".encode("utf-16"), "UTF-16: save it as UTF-8"),
        ("a.tsv", b"\x89PNG\r\n\0\0", "zero bytes"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2 is no JSON"),
        ("a.jsonl", '["a"]\n', "line 1 must be an object"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "they differ in text, txt"),
        ("a.parquet", b"PAR1 and no more", "is no Parquet file"),
        ("a.docx", "text", "is no text file that can be read: .csv, .jsonl"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as error:
        tables.read(write(tmp_path, name, content))
    assert "\n" not in str(error.value)


def test_a_damaged_archive_and_a_missing_file_are_refused(tmp_path):
    path = write(tmp_path, "a.tsv.gz", tsv(ROWS))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        tables.read(path)
    with pytest.raises(UserError, match="cannot be read"):
        tables.read(tmp_path / "none.tsv")


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_a_first_column_without_a_name_is_an_index(tmp_path, name, separator):
    """As pandas writes it."""
    content = ",text,label\n0,a,x\n1,b,y\n".replace(",", separator)
    table = tables.read(write(tmp_path, name, content))
    assert table.columns == {"text": ["a", "b"], "label": ["x", "y"]}


def test_objects_that_lack_keys_where_that_is_allowed(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n{"b": 2}\n')
    assert tables.read(path, partial=True).columns == {"a": [1, None], "b": [None, 2]}


def test_columns_of_parquet_that_are_not_wanted_are_not_read(tmp_path):
    pyarrow.parquet.write_table(
        pyarrow.table({"image": [b"x" * 1000], "label": [1]}), tmp_path / "a.parquet"
    )
    table = tables.read(tmp_path / "a.parquet", wanted=lambda name: name == "label")
    assert table.columns == {"label": [1]}


def test_a_few_quotation_marks_are_text(tmp_path):
    content = 'text\tlabel\n"Yes", he said\t0\n"all of it"\t1\n"b" and "c"\t1\nplain\t0\n'
    table = tables.read(write(tmp_path, "a.tsv", content))
    assert table.columns["text"][1] == '"all of it"'


def test_rows_of_cola_without_a_header_are_recognised(tmp_path):
    path = tmp_path / "in_domain_train.tsv"
    path.write_text("gj04\t1\t\tOur friends left.\ncj99\t0\t*\tThe more we left.\n")
    table = tables.read(path)
    assert table.columns == {
        "source": ["gj04", "cj99"],
        "label": ["1", "0"],
        "mark": ["", "*"],
        "sentence": ["Our friends left.", "The more we left."],
    }
    assert list(table.lines) == [1, 2]
    assert table.note == "no header: its columns are those of CoLA, source, label, mark, sentence"
    path.write_text("id\t1\t2\tsentence\na\tb\tc\td\n")  # names, though odd ones
    assert tables.read(path).note is None
