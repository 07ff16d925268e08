"""`kd export` of students of texts: what is written answers as the student does, on any length."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors.numpy
import torch
import transformers
from text_support import TEXTS, bert_folder

from dsdistill.harness import files
from dsdistill.harness.errors import UserError
from kd import cli
from kd.commands import export
from kd.exports import text_export, text_export_formats
from kd.models.language import saved_text_models, text_students
from kd.models.language.text_model import TextModel
from kd.options import ExportOptions

ROUNDING = 1e-5
CLASSES = ("neg", "pos")
RUNS = {
    "classify": ("hf", "classify", CLASSES, True),
    "bilstm": ("bilstm:6", "classify", CLASSES, True),
    "regress": ("bilstm:6", "regress", (), False),
    "tag": ("hf", "tag", ("B", "I", "O"), False),
    "mlm": ("hf", "mlm", (), False),
    "embed": ("bert:2x8", "embed", (), False),
}
DATA = (
    *(("classify", "pairs.tsv"), ("bilstm", "pairs.tsv")),
    *(("mlm", "texts.txt"), ("embed", "pairs.tsv")),
)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Finished runs of each task, with their data."""
    folder = tmp_path_factory.mktemp("export")
    mlm = "hf:" + bert_folder(folder / "bert", "ForMaskedLM")
    rows = enumerate(TEXTS)
    lines = [f"{text}\t{TEXTS[-i]}\t{CLASSES[i % 2]}\n" for i, text in rows]
    (folder / "pairs.tsv").write_text("sentence1\tsentence2\tlabel\n" + "".join(lines * 3))
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    for run, (name, task, classes, pairs) in RUNS.items():
        options: dict[str, Any] = {"teacher": mlm, "max_length": 12, "pairs": pairs, "seed": 1}
        model = text_students.build(mlm if name == "hf" else name, task, classes, **options)
        (folder / run).mkdir()
        saved_text_models.save_run(folder / run, model)
    for run, data in DATA:
        files.write_json(folder / run / "config.json", {"data": str(folder / data)})
    return folder


def write(run: Path, out: Path, format_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the command says, and the card beside what it wrote."""
    said = export.export(ExportOptions(run, format_, out))
    return said, json.loads((out / "card.json").read_text())


def texts(model: TextModel, count: int) -> Any:
    columns = (list(TEXTS[:count]), list(TEXTS[-count:]))
    options = {"padding": True, "truncation": True, "max_length": 12, "return_tensors": "pt"}
    return model.tokenizer(*columns[: 1 + model.pairs], **options)


@torch.no_grad()
def expected(model: TextModel, inputs: Any) -> np.ndarray:
    names = text_export_formats.input_names(model)
    outputs = model.network.network.eval()(**{name: inputs[name] for name in names})
    logits = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
    return logits[..., : model.network.vocabulary].numpy()


def check_use(card: dict[str, Any], out: Path) -> dict[str, Any]:
    """Run the code of the card as a person would, and return its variables."""
    names: dict[str, Any] = {}
    exec(card["use"].replace("FOLDER", str(out)), names)
    assert card["use"] in (out / "README.md").read_text()
    return names


@pytest.mark.parametrize("run", ["classify", "bilstm"])
def test_onnx_of_any_number_and_length_of_texts(work, tmp_path, run):
    said, card = write(work / run, tmp_path / "out", "onnx")
    assert said["largest_difference"] <= said["tolerance"]
    assert card["check"]["lengths"][0] == 1
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    assert [x.name for x in session.get_inputs()] == card["inputs"]["names"]
    model = saved_text_models.load_run(work / run)
    for count in (1, 2, len(TEXTS)):
        inputs = texts(model, count)
        arrays = {name: inputs[name].numpy() for name in card["inputs"]["names"]}
        answer = session.run(["logits"], arrays)[0]
        np.testing.assert_allclose(answer, expected(model, inputs), atol=ROUNDING)
    logits = check_use(card, tmp_path / "out")["logits"]
    content = (tmp_path / "out" / "model.onnx").read_bytes()
    assert text_export_formats.__file__.encode() not in content
    assert logits.shape[0] == 1
    assert logits.shape[-1] == len(model.classes)


@pytest.mark.parametrize("run", ["regress", "mlm"])
def test_pt2_of_any_number_and_length_of_texts(work, tmp_path, run):
    said, card = write(work / run, tmp_path / "out", "pt2")
    assert (said["texts"] > 0) == (run == "mlm")
    network = torch.export.load(tmp_path / "out" / "model.pt2").module()
    model = saved_text_models.load_run(work / run)
    for count in (1, 2, len(TEXTS)):
        inputs = texts(model, count)
        answer = network(*(inputs[name] for name in card["inputs"]["names"])).detach()
        np.testing.assert_allclose(answer, expected(model, inputs), atol=ROUNDING)
    assert check_use(card, tmp_path / "out")["logits"].shape[0] == 1
    path = tmp_path / "out" / "model.pt2"
    assert text_export_formats.__file__.encode() not in path.read_bytes()


def test_a_folder_for_transformers_and_its_pipeline(work, tmp_path):
    said, card = write(work / "classify", tmp_path / "out", "huggingface")
    assert said["data"] == "pairs"
    assert said["texts"] > 0
    path, model = str(tmp_path / "out"), saved_text_models.load_run(work / "classify")
    network = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    assert network.config.id2label == {0: "neg", 1: "pos"}
    inputs = texts(model, 3)
    with torch.no_grad():
        answer = network(**inputs).logits.numpy()
    np.testing.assert_array_equal(answer, expected(model, inputs))
    scores = {x["label"]: x["score"] for x in check_use(card, tmp_path / "out")["answer"]}
    pair = ("a text", "the text that it is compared with")
    cut = model.tokenizer(*pair, truncation=True, max_length=12, return_tensors="pt")
    probabilities = torch.from_numpy(expected(model, cut)).softmax(-1)[0].tolist()
    assert scores == pytest.approx(dict(zip(CLASSES, probabilities, strict=True)), abs=ROUNDING)


def test_a_model_of_embeddings_is_one_of_sentence_transformers(work, tmp_path):
    said, card = write(work / "embed", tmp_path / "out", "huggingface")
    assert said["texts"] > 0
    assert card["outputs"]["name"] == "sentence_embedding"
    assert card["outputs"]["shape"] == ["batch", 16]  # as the teacher's
    assert "SentenceTransformer" in card["use"]
    model = saved_text_models.load_run(work / "embed")
    out = tmp_path / "out"
    modules = json.loads((out / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Dense"]
    layer = safetensors.numpy.load_file(out / "2_Dense" / "model.safetensors")
    network = transformers.AutoModel.from_pretrained(out).eval()
    inputs = texts(model, 3)
    with torch.no_grad():
        states = network(**inputs).last_hidden_state.numpy()
    mask = inputs["attention_mask"].numpy()[..., None]
    pooled = (states * mask).sum(1) / mask.sum(1)
    answer = pooled @ layer["linear.weight"].T + layer["linear.bias"]
    np.testing.assert_allclose(answer, expected(model, inputs), atol=ROUNDING)


def test_embeddings_in_onnx(work, tmp_path):
    _, card = write(work / "embed", tmp_path / "out", "onnx")
    embedding = check_use(card, tmp_path / "out")["sentence_embedding"]
    model = saved_text_models.load_run(work / "embed")
    inputs = model.tokenizer(["a text"], return_tensors="pt")
    np.testing.assert_allclose(embedding, expected(model, inputs), atol=ROUNDING)


def test_a_masked_model_in_a_pipeline(work, tmp_path):
    _, card = write(work / "mlm", tmp_path / "out", "huggingface")
    answers = check_use(card, tmp_path / "out")["answer"]
    model = saved_text_models.load_run(work / "mlm")
    inputs = model.tokenizer("a [MASK]", return_tensors="pt")
    best = int(expected(model, inputs)[0, 2].argmax())
    assert answers[0]["token"] == best


def test_safetensors_is_a_run(work, tmp_path):
    _, card = write(work / "bilstm", tmp_path / "out", "safetensors")
    again = check_use(card, tmp_path / "out")["student"]
    model = saved_text_models.load_run(work / "bilstm")
    inputs = texts(model, 4)
    np.testing.assert_array_equal(expected(again, inputs), expected(model, inputs))


@pytest.mark.parametrize(
    ("run", "format_", "message"),
    [
        ("bilstm", "huggingface", "transformers has no such network as bilstm:6"),
        ("classify", "timm", "is for students of images"),
    ],
)
def test_formats_that_do_not_fit_are_one_line(work, tmp_path, run, format_, message):
    with pytest.raises(UserError, match=message) as refusal:
        export.export(ExportOptions(work / run, format_, tmp_path / "out"))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_for_transformers_is_of_texts(tmp_path):
    files.write_json(tmp_path / "model.json", {"classes": ["a", "b"]})  # of a run on images
    with pytest.raises(UserError, match="--format huggingface is for students of texts"):
        export.export(ExportOptions(tmp_path, "huggingface", tmp_path / "out"))


def test_an_export_that_answers_otherwise_is_not_written(work, tmp_path, monkeypatch):
    run = text_export_formats.FORMATS["safetensors"]
    spoilt = {
        "safetensors": text_export_formats.TextFormat(
            run.prepare,
            lambda path, model: lambda x: 1.01 * run.read(path, model)(x),
            run.tokenizer,
        )
    }
    monkeypatch.setattr(text_export, "FORMATS", spoilt)
    with pytest.raises(UserError, match="would answer differently"):
        export.export(ExportOptions(work / "tag", "safetensors", tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_is_noticed(work, tmp_path, monkeypatch):
    pieces = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a")
    other = transformers.BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})
    monkeypatch.setattr(
        "kd.models.language.tokenizer.save", lambda own, path: other.save_pretrained(path)
    )
    with pytest.raises(UserError, match="its tokenizer gives other ids"):
        export.export(ExportOptions(work / "mlm", "huggingface", tmp_path / "out"))


def test_the_command_writes_beside_the_run(work, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kd", "export", str(work / "tag"), "--format", "safetensors"])
    cli.main()
    assert "written" in capsys.readouterr().out
    (out,) = (work / "tag" / "export").iterdir()
    assert out.name.endswith("-safetensors")
