"""A training on texts that was stopped goes on to the same bits; changed inputs are refused."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import language_support
import numpy as np
import pytest
import safetensors.numpy
import text_data
import text_support
import torch
import torch._dynamo.utils
import transformers
from kd_support import main, read_report, refused, stop_in

from kd.data.text import transfer_set
from kd.evaluation import text_scoring
from kd.training import steps

COMMON = ("--batch-size", 16, "--device", "cpu")
RUNS: dict[str, tuple[object, ...]] = {  # dropout, stored answers, layers, chance of every kind
    "answers": ("one", "--student", "hf:bert", "--teacher", "hf:judge", "--epochs", 2),
    "layers": ("one", "--student", "hf:bert", "--teacher", "hf:judge", "--epochs", 2,
               "--loss", "ce,kd,hidden", "--ema", 0.9, "--accumulate", 2, "--average-best", 2),
    "copies": ("one", "--student", "bilstm:4", "--teacher", "hf:judge", "--epochs", 1,
               "--recipe", "bilstm", "--copies", 2),
    "mlm": ("plain", "--task", "mlm", "--student", "hf:bert", "--epochs", 2),
    "policy": ("prompt", "--task", "causal", "--student", "hf:small", "--teacher", "hf:large",
               "--recipe", "gkd", "--epochs", 2),
    "peers": ("one", "--student", "hf:bert", "--peers", "bilstm:4,hf:judge", "--epochs", 2),
    "adapters": ("one", "--student", "hf:bert", "--lora", 2, "--epochs", 2,
                 "--ema", 0.9, "--average-best", 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and models."""
    folder = tmp_path_factory.mktemp("resumed")
    text_data.write_all(folder)
    names = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    text_support.bert_folder(folder / "bert", "ForMaskedLM")
    text_support.bert_folder(folder / "judge", "ForSequenceClassification", seed=1, **names)
    tokenizer = language_support.characters("abcdefghij ")
    for seed, name in enumerate(("small", "large")):
        model = language_support.causal_model(tokenizer, seed=seed, positions=48, dropout=0.1)
        model.network.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(work)
    monkeypatch.setattr("kd.runs.curves.draw", lambda folder: None)
    return monkeypatch


def weights(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "student.safetensors")


def same(one: Path, other: Path) -> None:
    """Two runs with the same student, to the bit, and the same figures."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    figures = [
        {k: v for k, v in read_report(folder).items() if k.startswith(("test_", "validation_"))}
        for folder in (one, other)
    ]
    assert figures[0] == figures[1]
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (one, other)]
    assert len(lines[0]) == len(lines[1])


@pytest.mark.parametrize("kind", RUNS)
def test_a_training_stopped_in_an_epoch_goes_on_to_the_same_bits(
    inside: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    line = ("train", *RUNS[kind], *COMMON)
    main(inside, *line, "--out", tmp_path / "whole")
    said = stop_in(inside, 2, *line, "--out", tmp_path / "stopped", sign=signal.SIGINT)
    assert "kd train --resume --out" in said
    main(inside, "train", "--resume", "--out", tmp_path / "stopped")
    same(tmp_path / "whole", tmp_path / "stopped")
    assert not list((tmp_path / "stopped").rglob(".*"))
    if kind in ("answers", "mlm"):  # to more epochs, which replaces all files
        for name in ("whole", "stopped"):
            main(inside, "train", "--resume", "--out", tmp_path / name, "--epochs", 3)
        same(tmp_path / "whole", tmp_path / "stopped")
        assert read_report(tmp_path / "stopped")["epochs"] == 3
        assert not (tmp_path / "stopped" / "continued").exists()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_recipe_of_two_stages_goes_on_in_either(
    inside: pytest.MonkeyPatch, tmp_path: Path, stage: int
) -> None:
    line = ("train", "one", "--student", "bert:1x8", "--teacher", "hf:judge", "--recipe")
    line = (*line, "tinybert", "--batch-size", 32, "--epochs", 2, "--device", "cpu")
    main(inside, *line, "--out", tmp_path / "whole")
    calls, update = 0, steps.Trainer.update
    first = 10 * 3  # epochs of the first stage, and its steps in each

    def signalled(trainer: steps.Trainer, *arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == (4 if stage == 1 else first + 4):
            os.kill(os.getpid(), signal.SIGTERM)
        return update(trainer, *arguments)  # pyright: ignore[reportArgumentType]

    with inside.context() as patch:
        patch.setattr(steps.Trainer, "update", signalled)
        said = refused(patch, *line, "--out", tmp_path / "run")
    again = line if stage == 1 else ("train", "--resume")
    assert ("the same line goes on" in said) == (stage == 1)
    main(inside, *again, "--out", tmp_path / "run")
    for name in ("", "-1"):
        same(tmp_path / f"whole{name}", tmp_path / f"run{name}")


@pytest.mark.parametrize(
    ("module", "function"), [(transfer_set, "distinct_copies"), (text_scoring, "answers")]
)
def test_a_signal_before_the_first_step_leaves_no_folder(
    inside: pytest.MonkeyPatch, tmp_path: Path, module: object, function: str
) -> None:
    """While copies are made, and while the teacher is judged."""
    inside.setenv("DSDISTILL_CACHE", str(tmp_path / "cache"))
    line = ("train", *RUNS["copies"], *COMMON, "--out")
    real, calls = getattr(module, function), 0

    def signalled(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == (60 if function == "distinct_copies" else 1):
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    with inside.context() as patch:
        patch.setattr(module, function, signalled)
        said = refused(patch, *line, tmp_path / "run")
    assert said == "kd: interrupted; the same line goes on with what is finished"
    assert not (tmp_path / "run").exists()
    for name in ("run", "whole"):
        main(inside, *line, tmp_path / name)
    same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.heavy
def test_a_compiled_student_has_a_graph_for_all_lengths_and_goes_on_to_the_same_bits(
    inside: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the compiler's front end; code for the machine would take a minute more."""
    compiled = torch.nn.Module.compile

    def without_code(network: torch.nn.Module, **options: object) -> None:
        torch._dynamo.reset()  # as in a new process
        compiled(network, backend="aot_eager", **options)  # pyright: ignore[reportArgumentType]

    inside.setattr(torch.nn.Module, "compile", without_code)
    line = ("train", "one", "--student", "bert:1x8", "--tokenizer", "words", "--epochs", 2, *COMMON)
    main(inside, *line, "--out", tmp_path / "bare")
    torch._dynamo.utils.counters.clear()
    main(inside, *line, "--compile", "--out", tmp_path / "whole")
    # Of the student in training, and in validation; of a step the outputs alone are tried first.
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    stop_in(inside, 5, *line, "--compile", "--out", tmp_path / "stopped")
    main(inside, "train", "--resume", "--out", tmp_path / "stopped")
    same(tmp_path / "whole", tmp_path / "stopped")
    bare, whole = weights(tmp_path / "bare"), weights(tmp_path / "whole")
    assert all(np.allclose(bare[name], whole[name], atol=1e-5) for name in bare)


def _other_vocabulary(folder: Path) -> None:
    pieces = text_support.PIECES
    swapped = {piece: i for i, piece in enumerate((*pieces[:5], *pieces[:4:-1]))}
    transformers.BertTokenizer(vocab=swapped).save_pretrained(folder)


def _other_case(folder: Path) -> None:
    text_support.pieces(do_lower_case=False).save_pretrained(folder)


def _other_weights(folder: Path) -> None:
    text_support.bert_folder(folder, "ForMaskedLM", seed=5)


def _other_texts(folder: Path) -> None:
    with (folder.parent / "data" / "train.tsv").open("a") as file:
        file.write("c d\tneg\n")


def _other_heads(folder: Path) -> None:
    """The weights are of any number of heads."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))


CHANGES = [
    (_other_vocabulary, "the tokenizer"),
    (_other_case, "the tokenizer"),
    (_other_weights, "the student's first weights"),
    (_other_heads, "layers of the student"),
    (_other_texts, "texts"),
]


@pytest.mark.parametrize(("change", "what"), CHANGES)
def test_a_resume_onto_changed_inputs_is_refused(
    inside: pytest.MonkeyPatch,
    work: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    what: str,
) -> None:
    for name, source in (("bert", "bert"), ("data", "one")):
        shutil.copytree(work / source, tmp_path / name)
    data = tmp_path / "data" / "train.tsv"
    capitals = [row.replace("a", "A") for row in data.read_text().splitlines()[1:]]
    data.write_text("\n".join(["sentence\tlabel", *capitals, ""]))
    inside.chdir(tmp_path)
    line = ("train", "data", "--student", "hf:bert", "--epochs", 2, *COMMON, "--out", "run")
    stop_in(inside, 2, *line)
    change(tmp_path / "bert")
    said = refused(inside, "train", "--resume", "--out", "run")
    assert f"was started: {what} " in said
