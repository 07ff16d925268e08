"""`kd train` on texts: what it refuses in one line, before anything is written."""

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import language_support
import numpy as np
import pytest
import safetensors.numpy
import text_data
import text_support
import transformers
from kd_support import main, read_report, refused
from PIL import Image
from text_data import rows, write_tsv
from transformers.models.bert import modeling_bert

STUDENT = ("--student", "hf:bert", "--epochs", 1, "--device", "cpu")
FRESH = ("--student", "bert:1x8", "--tokenizer", "words", "--steps", 2, "--device", "cpu")
CAUSAL = ("--task", "causal", "--student", "hf:llama", "--epochs", 1, "--device", "cpu")
WRITTEN = (*CAUSAL, "--teacher", "hf:llama")
PAIR_OF_TEACHERS = ("--student", "bert:1x16", "--teacher", "hf:bert,hf:judge", "--epochs", 1)
LAYERS = ("--student", "bert:1x16", "--teacher", "T", "--loss", "relations", "--epochs", 1)
TINYBERT = ("--student", "bert:2x16", "--teacher", "T", "--recipe", "tinybert", "--epochs", 1)
TAUGHT = ("--student", "bert:1x8", "--teacher", "T", "--epochs", 1, "--device", "cpu")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data of every task, models, and a run of texts and one of images."""
    folder = tmp_path_factory.mktemp("texts")
    text_data.write_all(folder)
    names = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    text_support.bert_folder(folder / "bert", "ForMaskedLM")
    text_support.bert_folder(folder / "judge", "ForSequenceClassification", **names)
    text_support.bert_folder(folder / "bare", "Model")
    for path in (folder / "bare").glob("token*"):
        path.unlink()
    other = {piece: i for i, piece in enumerate((*text_support.PIECES[::-1], "z"))}
    text_support.bert_folder(folder / "other", "ForSequenceClassification", **names)
    transformers.BertTokenizer(vocab=other).save_pretrained(folder / "other")
    for name, letters in (("llama", "abcdefghij "), ("foreign", "abcdefghij xyz")):
        tokenizer = language_support.characters(letters)
        model = language_support.causal_model(tokenizer, positions=48)
        model.network.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("kd.runs.curves.draw", lambda folder: None)
        main(patch, "train", "one", *STUDENT, "--out", "T")
        main(patch, "train", "score", *STUDENT, "--out", "scores")
        main(patch, "train", "digits", "--student", "mlp:4", "--steps", 2, "--out", "images")
    return folder


@pytest.fixture
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(work)
    monkeypatch.setattr("kd.runs.curves.draw", lambda folder: None)
    return monkeypatch


def refused_train(inside: pytest.MonkeyPatch, *words: object) -> str:
    """The one line in which a training is refused that leaves no folder behind."""
    before = {path.name for path in Path.cwd().iterdir()}
    line = refused(inside, "train", *words, "--out", "refused")
    assert {path.name for path in Path.cwd().iterdir()} == before
    return line


GOOD = rows()


def _tsv(*lines: tuple[str, ...], header: str = "sentence\tlabel") -> bytes:
    return "".join(f"{line}\n" for line in (header, *map("\t".join, lines))).encode()


def _json(lines: list[dict]) -> bytes:
    return "".join(f"{json.dumps(line)}\n" for line in lines).encode()


FILES: dict[str, tuple[bytes, str]] = {
    "empty.tsv": (b"", "empty.tsv is empty"),
    "header.tsv": (_tsv(), "header.tsv has no rows"),
    "binary.tsv": (bytes(range(256)), "is no UTF-8 text: it holds zero bytes"),
    "latin.tsv": (_tsv(("é", "pos")).decode().encode("latin-1"), "line 2 is not UTF-8"),
    "utf16.tsv": (_tsv(*GOOD).decode().encode("utf-16"), "but UTF-16: save it as UTF-8"),
    "few.tsv": (
        _tsv(*GOOD[:9], ("a",), *GOOD[9:]),
        "few.tsv, line 11 has 1 field, the header has 2",
    ),
    "quotes.tsv": (_tsv(*((f'"{x}"', y) for x, y in GOOD)), "TSV has no quoting"),
    "cut.tsv.gz": (gzip.compress(_tsv(*GOOD))[:-9], "cut.tsv.gz cannot be read"),
    "one-class.tsv": (_tsv(*((x, "pos") for x, _ in GOOD)), "at least two classes, has 1"),
    "single.tsv": (_tsv(*GOOD[:1]), "at least two classes, has 1"),
    "blank.tsv": (_tsv(*(("", y) for _, y in GOOD)), "has no text in column sentence"),
    "unlabelled.tsv": (_tsv(*GOOD[:3], ("a", ""), *GOOD), "line 5 has no label: add it"),
    "nan.tsv": (_tsv(("a", "0.5"), ("b", "nan")), "line 3: label must be a number, got 'nan'"),
    "nan.jsonl": (_json([{"text": float("nan"), "label": "x"}]), "must be a text, got nan"),
    "nested.jsonl": (_json([{"text": {"a": "b"}, "label": "x"}]), "must be a text, got {'a': 'b'}"),
    "label.jsonl": (_json([{"text": "a", "label": {"x": 1}}]), "one name or number, got {'x': 1}"),
    "list.jsonl": (_json([{"text": "a", "label": ["x"]}]), "one name or number, got ['x']"),
    "half.jsonl": (b'{"text": "a \\ud800", "label": "x"}\n', "line 1: text holds half of a surr"),
    "rows.jsonl": (b'["a", "x"]\n', "line 1 must be an object"),
    "torn.jsonl": (b'{"text": "a", "label": "x"}\n{"text"\n', "line 2 is no JSON"),
    "rows.json": (b"[]", "is no text file that can be read: .csv, .jsonl"),
    "rows.parquet": (b"PAR1", "is no Parquet file"),
    "tags.jsonl": (_json([{"tokens": ["a", "b"], "tags": ["O"]}]), "has 2 tokens and 1 tags"),
    "chat.jsonl": (_json([{"messages": [], "id": "1"}]), "which --task causal learns: add it"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_does_not_fit_is_refused_with_its_line(
    inside: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    line = refused_train(inside, tmp_path / name, *STUDENT)
    assert message in line
    assert name in line or name == "one-class.tsv"


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("sentence", None, "row 4: sentence must be a text, got nothing"),
        ("label", None, "row 4 has no label: add it, or remove the row"),
    ],
)
def test_a_null_in_parquet_is_refused_with_its_row(
    inside: pytest.MonkeyPatch, tmp_path: Path, column: str, value: None, message: str
) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"sentence": [x for x, _ in GOOD], "label": [y for _, y in GOOD]}
    columns[column] = [value if i == 3 else each for i, each in enumerate(columns[column])]
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert message in refused_train(inside, tmp_path / "a.parquet", *STUDENT)


OTHER_PARTS: list[tuple[str, tuple[bytes, str]]] = [
    ("test.tsv", (_tsv(("a", "maybe")), "line 2: the label 'maybe' is none of the training rows'")),
    ("dev.tsv", (_tsv(("a", "maybe")), "line 2: the label 'maybe' is none of the training rows'")),
    (
        "dev.tsv",
        (_tsv(("a",), header="sentence"), "has no column label: its rows cannot be judged"),
    ),
    ("dev.tsv", (_tsv(("a", "pos"), header="text\tlabel"), "has no column sentence, which")),
    ("dev.csv", (b"sentence,label\na,pos\n", "has two files of its validation part")),
]


@pytest.mark.parametrize(("name", "part"), OTHER_PARTS)
def test_a_part_that_does_not_fit_the_training_part_is_refused(
    inside: pytest.MonkeyPatch, tmp_path: Path, name: str, part: tuple[bytes, str]
) -> None:
    write_tsv(tmp_path / "train.tsv", GOOD)
    if name == "dev.csv":
        write_tsv(tmp_path / "dev.tsv", GOOD)
    (tmp_path / name).write_bytes(part[0])
    assert part[1] in refused_train(inside, tmp_path, *STUDENT)


OPTIONS: list[tuple[str, tuple[object, ...], str]] = [
    # columns and tasks
    ("one", (*STUDENT, "--label", "mood"), "--label mood is no column of one/train.tsv, which has"),
    ("one", (*STUDENT, "--text", "body"), "--text body is no column of one/train.tsv, which has"),
    ("one", (*STUDENT, "--task", "tag"), "label must be a list with a tag for each token"),
    ("one", (*STUDENT, "--task", "regress"), "line 2: label must be a number, got"),
    (
        "pair",
        (*STUDENT, "--task", "mlm", "--text", "sentence1,sentence2"),
        "--task mlm learns from one column",
    ),
    ("nowhere", (*STUDENT, "--task", "mlm"), "no such file or folder of texts: nowhere"),
    ("one", (*STUDENT, "--validation-fraction", 0.2), "has a validation part of its own"),
    ("one/dev.tsv", (*STUDENT, "--validation-fraction", 1), "must be in [0, 1), got 1"),
    (
        "one/dev.tsv",
        (*STUDENT, "--validation-fraction", 0, "--patience", 2),
        "--patience has no effect without validation texts",
    ),
    # figures and losses of another task
    ("one", (*STUDENT, "--metric", "spearman"), "no figure of --task classify: use accuracy, nll"),
    ("score", (*STUDENT, "--metric", "accuracy"), "no figure of --task regress: use spearman, pea"),
    ("plain", (*STUDENT, "--task", "mlm", "--metric", "macro_f1"), "no figure of --task mlm"),
    ("one", (*STUDENT, "--metric", "entity_f1"), "entity_f1 is no figure of --task classify"),
    ("score", (*STUDENT, "--loss", "ce"), "--loss ce takes classes, and --task regress has scores"),
    ("score", (*STUDENT, "--teacher", "scores", "--loss", "kd"), "has scores: use logits"),
    ("one", (*TAUGHT, "--loss", "tokens"), "takes answers for tokens, and with --task classify"),
    ("one", (*TAUGHT, "--loss", "at"), "compares maps of images, which texts have not"),
    (
        "score",
        (
            "--student",
            "bilstm:4",
            "--teacher",
            "scores",
            "--min-teacher-accuracy",
            0.5,
            "--epochs",
            1,
        ),
        "--min-teacher-accuracy has no effect on scores",
    ),
    ("one", (*TAUGHT, "--min-teacher-accuracy", 0.999), "below --min-teacher-accuracy 0.999"),
    # students
    ("one", ("--student", "resnet18", "--epochs", 1), "unknown student of texts 'resnet18': known"),
    ("one", ("--student", "bert:2", "--teacher", "T"), "named by blocks and width, as bert:4x312"),
    ("one", ("--student", "bilstm:0", "--teacher", "T"), "unknown student of texts 'bilstm:0'"),
    ("one", ("--student", "bert:1x8"), "has no tokenizer: it takes that of --teacher"),
    ("one", ("--epochs", 1), "--student must name a network of texts"),
    ("one", ("--student", "teacher"), "--student teacher is a copy of the teacher: add --teacher"),
    ("one", (*STUDENT, "--tokenizer", "words"), "hf:bert brings its tokenizer"),
    ("one", ("--student", "hf:bare"), "bare has no tokenizer: its vocabulary is missing"),
    (
        "one",
        ("--student", "images"),
        "images holds a student of images, and one of texts is needed",
    ),
    ("one", (*STUDENT, "--teacher", "images"), "images holds a student of images"),
    (
        "one",
        ("--student", "bilstm:4", "--teacher", "T", "--checkpoint-gradients"),
        "and BiLstm has no such switch",
    ),
    ("one", (*STUDENT, "--max-length", 17), "more than the 16 tokens that hf:bert takes"),
    ("one", (*STUDENT, "--max-length", 2), "more than the 2 special tokens of a row"),
    ("one", (*TAUGHT, "--max-length", 40), "teacher T takes 16 tokens and the student 40"),
    ("one", (*STUDENT, "--keep-layers", "5"), "--keep-layers 5: there are the blocks 0 to 1"),
    ("one", (*STUDENT, "--keep-layers", "1,0"), "must be ascending numbers, got 1,0"),
    ("one", (*TAUGHT, "--keep-layers", "0"), "needs blocks with weights, and bert:1x8 is a fresh"),
    (
        "plain",
        ("--task", "mlm", "--student", "bilstm:4", "--tokenizer", "words"),
        "--task mlm needs a transformer",
    ),
    ("plain", ("--task", "causal", "--student", "hf:bert"), "sees the tokens after the one"),
    ("one", (*STUDENT, "--task", "embed"), "fits the embeddings of a teacher: name it with"),
    # teachers
    ("one", (*STUDENT, "--teacher", "hf:bert"), "has no trained head for classify"),
    ("score", (*STUDENT, "--teacher", "T"), "has no trained head for regress"),
    ("plain", (*CAUSAL, "--teacher", "hf:foreign"), "another tokenizer than the student"),
    ("one", (*TAUGHT, "--teacher-weights", "by-label"), "is for several teachers"),
    ("one", (*STUDENT, "--teacher", "T,T"), "--teacher names one twice"),
    # blocks and heads
    (
        "one",
        ("--student", "bert:3x8", "--teacher", "T", "--recipe", "tinybert"),
        "2 blocks of the teacher are no multiple of 3",
    ),
    (
        "one",
        ("--student", "bert:2x9", "--teacher", "T", "--loss", "scores"),
        "compares heads: the student's block has 1 and the teacher's 2",
    ),
    (
        "one",
        ("--student", "bilstm:4", "--teacher", "T", "--recipe", "pkd"),
        "compares blocks of transformers, and BiLstm has none",
    ),
    # texts that others write
    ("one", (*TAUGHT, "--augment", "words"), "makes copies without labels, and --loss ce needs"),
    (
        "one",
        (*TAUGHT, "--augment", "masked", "--loss", "kd"),
        "masked and --mlm NAME need each oth",
    ),
    ("one", (*TAUGHT, "--mlm", "hf:bert"), "masked and --mlm NAME need each other"),
    ("one", (*TAUGHT, "--augment", "teacher", "--loss", "ce"), "--augment teacher needs a teacher"),
    ("plain", (*CAUSAL, "--recipe", "sequence"), "--teacher must name one, got none"),
    ("plain", (*CAUSAL, "--on-policy", 0.5), "has no teacher: add --teacher and tokens:1"),
    ("one", (*TAUGHT, "--on-policy", 0.5), "--on-policy needs a student that writes"),
    # caches
    (
        "one",
        ("--student", "bert:2x8", *TAUGHT[2:], "--cache", "c", "--loss", "ce,hidden"),
        "--loss hidden takes whole layers, ",
    ),
    (
        "plain",
        (*WRITTEN, "--loss", "tokens,kd:1:temperature=4", "--cache", "c", "--cache-top", 3),
        "--cache-top keeps probabilities at one temperature, and the terms of --loss have 2, 4",
    ),
    (
        "score",
        ("--student", "bert:1x8", "--teacher", "scores", "--cache", "c", "--cache-top", 1),
        "--cache-top keeps probabilities, and --loss logits compares the logits",
    ),
    # options without effect
    ("one", (*LAYERS, "--patience", 2), "--patience has no effect on --loss relations, which"),
    (
        "one",
        (*LAYERS, "--min-teacher-accuracy", 0.9),
        "--min-teacher-accuracy has no effect on --loss relations, which teaches layers alone",
    ),
    (
        "plain",
        (*WRITTEN, "--recipe", "gkd", "--cache", "c"),
        "--cache has no effect with --on-policy",
    ),
    (
        "plain",
        (*WRITTEN, "--recipe", "sequence", "--min-teacher-accuracy", 0.9),
        "--min-teacher-accuracy has no effect with --augment teacher",
    ),
    (
        "score",
        ("--student", "bert:1x8", "--teacher", "scores", "--class-map", "c.json"),
        "--class-map has no effect on --task regress",
    ),
    (
        "plain",
        (*PAIR_OF_TEACHERS, "--task", "embed", "--teacher-weights", "by-label"),
        "--teacher-weights by-label needs classes, which --task embed has not",
    ),
    # recipes of several trainings are checked before the first one
    (
        "one",
        ("--student", "bert:2x16", "--teacher", "hf:bert", "--recipe", "tinybert"),
        "teacher hf:bert has no trained head for classify",
    ),
    (
        "one",
        (*TINYBERT, "--min-teacher-accuracy", 0.999),
        "below --min-teacher-accuracy 0.999",
    ),
    (
        "one",
        ("--student", "teacher", "--keep-layers", "1", "--teacher", "T", "--generations", 2),
        "would keep blocks of a student that has these alone: leave --generations out",
    ),
    # students that teach each other
    (
        "one",
        (*STUDENT, "--peers", "hf:bert", "--loss", "ce,hidden"),
        "in place of --peers",
    ),
    ("one", (*STUDENT, "--peers", "hf:bert", "--loss", "kd"), "nothing else teaches them"),
    ("one", (*STUDENT, "--peers", "hf:bert", "--lora", 2), "--lora changes one student"),
    ("one", (*STUDENT, "--peers", "hf:bert", "--teacher", "T"), "leave --teacher out"),
    ("one", (*STUDENT, "--peers", "mlp:4"), "unknown student of texts 'mlp:4'"),
    (
        "one",
        (*FRESH, "--max-length", 16, "--peers", "hf:bert"),
        "--peers hf:bert divides texts into other tokens than the student bert:1x8",
    ),
    # options of images
    ("one", (*STUDENT, "--channels", 3), "--channels is for images"),
    ("one", (*STUDENT, "--mixup", 0.2), "--mixup is for images"),
    ("one", (*STUDENT, "--augment", "crop-flip"), "--augment crop-flip is for images"),
    ("one", (*STUDENT, "--recipe", "cifar"), "--recipe cifar is for images"),
    # what is not compiled
    (
        "one",
        ("--student", "bilstm:4", "--tokenizer", "words", "--compile"),
        "--compile makes a step of bilstm slower",
    ),
    ("plain", (*WRITTEN, "--on-policy", 0.5, "--compile"), "--on-policy lets it write token by"),
    # options of texts on images
    ("digits", ("--student", "mlp:4", "--max-length", 5), "--max-length is for texts, and digits"),
    ("digits", ("--student", "mlp:4", "--lora", 2), "--lora is for texts"),
    ("digits", ("--student", "mlp:4", "--on-policy", 0.5), "--on-policy is for texts"),
    ("digits", ("--student", "mlp:4", "--augment", "words"), "--augment words is for texts"),
    ("digits", ("--student", "mlp:4", "--metric", "spearman"), "--metric spearman is for texts"),
    ("digits", ("--student", "mlp:4", "--recipe", "finetune"), "--recipe finetune is for texts"),
    ("digits", ("--student", "bert:2x8"), "--student bert:2x8 is for texts"),
    ("digits", ("--student", "teacher", "--teacher", "images"), "--student teacher is for texts"),
    ("digits", ("--student", "T"), "T holds a student of texts, and one of images is needed here"),
    ("digits", ("--student", "mlp:4", "--teacher", "T"), "T holds a student of texts"),
    ("nowhere", ("--student", "bilstm:4"), "and nowhere is no file or folder of texts"),
]


@pytest.mark.parametrize(("data", "options", "message"), OPTIONS)
def test_what_does_not_fit_together_is_refused(
    inside: pytest.MonkeyPatch, data: str, options: tuple[object, ...], message: str
) -> None:
    assert message in refused_train(inside, data, *options)


def _images(folder: Path) -> Path:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(np.full((8, 8), 9 * i, np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_a_teacher_that_writes_is_not_said_to_read_the_students_texts(
    inside: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--teacher", "hf:foreign", "--recipe", "sequence", "--max-length", 12)
    more = ("--cache", tmp_path / "cache", "--out", tmp_path / "run")
    main(inside, "train", "prompt", *CAUSAL, *options, *more)
    said = capfd.readouterr().err
    assert "the teacher wrote 96 completions" in said
    assert "tokenised twice" not in said


def test_fewer_texts_than_a_loss_compares_are_refused(
    inside: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = write_tsv(tmp_path / "few.tsv", [("a", "pos"), ("b", "neg")])
    options = (*TAUGHT, "--loss", "rkd-angle", "--validation-fraction", 0)
    assert "few has 2 training texts, and a batch needs 3 for each process, 3 in all" in (
        refused_train(inside, data, *options)
    )


def test_a_folder_of_images_with_a_table_is_one_of_images(
    inside: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = _images(tmp_path / "pets")
    (folder / "train.csv").write_text("file_name,label\ncat/0.png,cat\n")
    main(inside, "train", folder, "--student", "mlp:4", "--steps", 2, "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "model.json").read_text())["classes"] == ["cat", "dog"]
    line = refused_train(inside, folder / "cat", *STUDENT, "--task", "classify")
    assert "has no train file of texts" in line


def _empty(texts: list[tuple[str, str]]) -> list[tuple[str, ...]]:
    return [("" if i % 4 == 0 else text, label) for i, (text, label) in enumerate(texts)]


ACCEPTED: dict[str, Callable[[Path], object]] = {
    "lines of Windows": lambda path: path.write_bytes(_tsv(*GOOD).replace(b"\n", b"\r\n")),
    "a byte order mark": lambda path: path.write_bytes(b"\xef\xbb\xbf" + _tsv(*GOOD)),
    "gzip": lambda path: path.write_bytes(gzip.compress(_tsv(*GOOD))),
    "rows again and again": lambda path: write_tsv(path, GOOD * 3),
    "empty texts": lambda path: write_tsv(path, _empty(GOOD)),
    "a long text": lambda path: write_tsv(path, [("a b " * 9999, "pos"), *GOOD]),
    "two rows": lambda path: write_tsv(path, [("a", "pos"), ("c", "neg")]),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_a_file_that_looks_odd_trains(
    inside: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    ACCEPTED[kind](tmp_path / "a.tsv")
    main(inside, "train", tmp_path / "a.tsv", *FRESH, "--max-length", 8, "--out", tmp_path / "run")
    assert np.isfinite(read_report(tmp_path / "run")["seconds"])


def test_whole_numbers_are_classes_unless_scores_are_asked_for(
    inside: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = [(text, str(i % 6), f"{i / 7:.2f}") for i, (text, _) in enumerate(GOOD)]
    data = write_tsv(tmp_path / "a.tsv", lines, "sentence\tlabel\tvalue")
    tasks = {}
    for options in ((), ("--task", "regress"), ("--label", "value")):
        out = tmp_path / f"run{len(tasks)}"
        main(inside, "train", data, *FRESH, *options, "--out", out)
        tasks[options] = read_report(out)["task"]
    assert list(tasks.values()) == ["classify", "regress", "regress"]


def test_a_class_for_almost_every_row_is_said(
    inside: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_tsv(tmp_path / "a.tsv", [(text, f"id{i}") for i, (text, _) in enumerate(GOOD)])
    main(inside, "train", data, *FRESH, "--out", tmp_path / "run")
    assert "warning: column label has 40 classes in 40 rows" in capsys.readouterr().err


def test_the_template_of_conversations_is_said(
    inside: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(inside, "train", "chat", *CAUSAL, "--out", tmp_path / "run")
    assert "the tokenizer has no chat template" in capsys.readouterr().err


def test_options_of_a_folder_are_stored_as_absolute_paths(
    inside: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ("--student", "bert:1x8", "--tokenizer", "other", "--steps", 1)
    main(inside, "train", "one", *options, "--out", tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["tokenizer"] == str(Path("other").resolve())


def test_a_folder_with_one_file_is_its_training_part(
    inside: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "input.txt").write_text("a b c d e f\n" * 40)
    options = ("--max-length", 16, "--out", tmp_path / "run")
    main(inside, "train", tmp_path / "book", *CAUSAL, *options)
    assert read_report(tmp_path / "run")["task"] == "causal"


def test_the_rows_that_are_cut_are_counted(
    inside: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_tsv(tmp_path / "a.tsv", [("a " * 30, "pos"), *GOOD, *GOOD])
    main(inside, "train", data, *STUDENT, "--validation-fraction", 0, "--out", tmp_path / "run")
    assert "1 of 81 train texts (1.2%) are longer than --max-length 16" in capsys.readouterr().err


def test_activations_that_are_computed_twice_change_nothing(
    inside: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counts, forward = [0], modeling_bert.BertIntermediate.forward

    def counted(*arguments: Any) -> object:
        counts[-1] += arguments[0].training  # the latency is measured by any number of calls
        return forward(*arguments)

    inside.setattr(modeling_bert.BertIntermediate, "forward", counted)
    line = ("train", "one", *STUDENT, "--teacher", "T", "--loss", "ce,kd,hidden,scores", "--out")
    main(inside, *line, tmp_path / "kept")
    counts.append(0)
    main(inside, *line, tmp_path / "twice", "--checkpoint-gradients")
    assert counts[1] > counts[0]
    kept, twice = (
        safetensors.numpy.load_file(tmp_path / name / "student.safetensors")
        for name in ("kept", "twice")
    )
    for name, value in kept.items():
        np.testing.assert_allclose(twice[name], value, rtol=0, atol=1e-6, err_msg=name)


def test_options_of_the_schedule_are_for_the_last_stage(
    inside: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ("--final", 0.1, "--warmup-from", 0.1, "--average-best", 2, "--device", "cpu")
    main(inside, "train", "one", *TINYBERT, *options, "--epochs", 2, "--out", tmp_path / "run")
    first, last = (
        json.loads((tmp_path / name / "recipe.json").read_text()) for name in ("run-1", "run")
    )
    assert (first["final"], first["average_best"]) == (0.0, 1)
    assert (last["final"], last["average_best"]) == (0.1, 2)


@pytest.mark.parametrize("copies", [(), ("--augment", "words", "--copies", 1)])
def test_recipes_fit_scores_and_their_last_stage_alone_uses_the_cache(
    inside: pytest.MonkeyPatch, tmp_path: Path, copies: tuple[object, ...]
) -> None:
    student = ("--student", "bert:2x16", "--teacher", "scores", "--device", "cpu")
    cached = ("--recipe", "tinybert", "--cache", tmp_path / "cache", *copies, "--epochs", 1)
    main(inside, "train", "score", *student, *cached, "--out", tmp_path / "run")
    losses = [
        json.loads((tmp_path / name / "recipe.json").read_text())["loss"]
        for name in ("run-1", "run")
    ]
    assert losses == ["hidden:1,scores:1", "logits:1"]
    keys = [path.read_text() for path in (tmp_path / "cache").glob("*/key.json")]
    answers = [key for key in keys if '"teacher"' in key]  # the others are of copies
    assert len(answers) == 1
    assert "vector" not in answers[0]
    if copies:
        return
    main(inside, "train", "score", *student, "--recipe", "pkd", "--out", tmp_path / "pkd")
    recipe = json.loads((tmp_path / "pkd" / "recipe.json").read_text())
    assert recipe["loss"] == "mse:0.5,logits:0.5,patient:0.1"
    assert read_report(tmp_path / "pkd")["metric"] == "spearman"


def test_a_teacher_of_copies_is_checked_on_the_originals(
    inside: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_tsv(tmp_path / "a.tsv", GOOD)
    options = ("--augment", "words", "--loss", "kd", "--copies", 2, "--validation-fraction", 0)
    main(inside, "train", data, *TAUGHT, *options, "--out", tmp_path / "run")
    checked = re.search(
        r"teacher T: accuracy ([0-9.]+)%.* on training texts", capsys.readouterr().err
    )
    assert checked
    main(inside, "evaluate", "T", data, "--json")
    judged = json.loads(capsys.readouterr().out)
    assert float(checked[1]) == pytest.approx(100 * judged["accuracy"], abs=0.06)
    assert judged["texts"] == len(GOOD)


def test_a_cache_of_more_than_the_disk_is_refused(inside: pytest.MonkeyPatch) -> None:
    disk = shutil.disk_usage(".")._replace(free=500)
    inside.setattr("shutil.disk_usage", lambda folder: disk)
    line = refused_train(inside, "one", *TAUGHT, "--loss", "ce,kd", "--cache", "c")
    assert "--cache c would take 768 B for the answers to 96 texts, and the disk has 500 B" in line


def test_the_help_says_what_the_defaults_of_texts_are(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(inside, "train", "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "of texts they are --epochs 3 --batch-size 32 --optimizer adamw --lr 5e-5" in shown
    assert "of a fresh student --epochs 5 --batch-size 64 --lr 0.001" in shown


def test_a_common_class_of_validation_texts_is_not_called_one_of_test_texts(
    inside: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train", "dev"):
        write_tsv(tmp_path / "data" / f"{name}.tsv", [*GOOD[:8], *[("a", "pos")] * 40])
    main(inside, "train", tmp_path / "data", *FRESH, "--out", tmp_path / "run")
    said = capsys.readouterr().err
    assert "% of the texts are of class 'pos'" in said
    assert "test text" not in said
