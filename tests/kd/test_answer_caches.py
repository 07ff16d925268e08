"""Teachers of texts answer once: tokens, hidden tokens and vectors of layers from the cache."""

import json
import signal
from pathlib import Path

import language_support
import numpy as np
import pytest
import safetensors.numpy
import text_data
import text_support
import torch
from kd_support import main, refused, stop_in

from kd.data import teacher_cache
from kd.data.batching import Batch, LayerVector
from kd.data.teacher_answers import FromTables, Kept, Table
from kd.data.teacher_cache import open_cache
from kd.models.language.text_teachers import TextTeacher
from kd.models.token_inputs import TokenInputs

COMMON = ("--epochs", 2, "--batch-size", 16, "--device", "cpu")
MLM = ("plain", "--task", "mlm", "--student", "bert:1x8", "--teacher", "hf:bert")
CAUSAL = ("prompt", "--task", "causal", "--student", "hf:small", "--teacher", "hf:large")
TAG = ("tag", "--student", "bert:1x8", "--teacher", "tagger")
ONE = ("one", "--student", "bert:2x16", "--teacher", "hf:judge")
# What is trained; whether the cached answers are those of the very batches, to the bit.
RUNS: dict[str, tuple[tuple[object, ...], bool]] = {
    "mlm": ((*MLM, "--loss", "mlm,tokens,kd"), True),
    "mlm-top": ((*MLM, "--loss", "mlm,tokens", "--cache-top", 3), False),
    "causal": ((*CAUSAL, "--loss", "clm,tokens"), False),
    "causal-top": ((*CAUSAL, "--loss", "clm,tokens:1:beta=0.5", "--cache-top", 2), False),
    "tag": ((*TAG, "--loss", "ce,kd,rkd-distance"), False),
    "answers": ((*ONE, "--loss", "ce,kd", "--cache-top", 1), False),
    "vectors": ((*ONE, "--loss", "ce,kd,patient,srd,rkd-distance@1=0"), False),
    "vectors-alone": ((*ONE, "--loss", "ce,patient"), False),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and teachers of every task."""
    folder = tmp_path_factory.mktemp("answers")
    text_data.write_all(folder)
    names = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    text_support.bert_folder(folder / "bert", "ForMaskedLM")
    text_support.bert_folder(folder / "judge", "ForSequenceClassification", seed=1, **names)
    tokenizer = language_support.characters("abcdefghij ")
    for seed, name in enumerate(("small", "large")):
        model = language_support.causal_model(tokenizer, seed=seed, positions=48, dropout=0.1)
        model.network.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("kd.runs.curves.draw", lambda folder: None)
        main(patch, "train", "tag", "--student", "hf:bert", "--steps", 4, "--out", "tagger")
    return folder


@pytest.fixture
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(work)
    monkeypatch.setattr("kd.runs.curves.draw", lambda folder: None)
    return monkeypatch


def weights(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "student.safetensors")


def same(one: Path, other: Path, tolerance: float = 0) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, rtol=0, atol=tolerance)


class Asked:
    """Counts the texts that a teacher is asked about."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.texts = 0
        answer = TextTeacher.forward

        def counted(teacher: TextTeacher, inputs: TokenInputs) -> torch.Tensor:
            self.texts += len(inputs)
            return answer(teacher, inputs)

        patch.setattr(TextTeacher, "forward", counted)

    def since(self) -> int:
        texts, self.texts = self.texts, 0
        return texts


@pytest.mark.parametrize("kind", RUNS)
def test_a_teacher_answers_once_and_teaches_the_same(
    inside: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    options, exact = RUNS[kind]
    line = ("train", *options, *COMMON)
    asked, cache = Asked(inside), ("--cache", tmp_path / "cache")
    if "--cache-top" not in line:
        main(inside, *line, "--out", tmp_path / "plain")
        asked.since()
    main(inside, *line, *cache, "--out", tmp_path / "first")
    first = asked.since()
    main(inside, *line, *cache, "--out", tmp_path / "second")
    # 96 texts, hidden anew in each of two epochs for the masked model.
    assert first - asked.since() == (192 if kind.startswith("mlm") else 96)
    same(tmp_path / "first", tmp_path / "second")
    if "--cache-top" not in line:
        # A table was computed in other batches than the training's, so that sums round anew.
        same(tmp_path / "plain", tmp_path / "first", 0 if exact else 2e-4)


@pytest.mark.parametrize("kind", ["mlm-top", "causal-top", "vectors"])
def test_a_stopped_training_goes_on_to_the_same_bits(
    inside: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """Also where an earlier training has filled a cache of its own."""
    line = ("train", *RUNS[kind][0], *COMMON, "--cache")
    main(inside, *line, tmp_path / "one", "--out", tmp_path / "whole")
    stopped = (*line, tmp_path / "two", "--out", tmp_path / "run")
    stop_in(inside, 8, *stopped, sign=signal.SIGINT)
    main(inside, "train", "--resume", "--out", tmp_path / "run")
    same(tmp_path / "whole", tmp_path / "run")


def test_a_stopped_table_goes_on_where_it_was(inside: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inside.setattr("kd.data.teacher_answers.PART_BATCHES", 1)
    inside.setattr("kd.data.batching.SCORE_BATCH", 16)
    line = ("train", *RUNS["causal"][0], *COMMON, "--cache", tmp_path / "cache")
    answers = teacher_cache.TeacherCache.write
    with inside.context() as patch:
        written = []

        def interrupted(cache: teacher_cache.TeacherCache, name: str) -> object:
            written.append(name)
            if len(written) == 5:
                raise KeyboardInterrupt
            return answers(cache, name)

        patch.setattr(teacher_cache.TeacherCache, "write", interrupted)
        said = refused(patch, *line, "--out", tmp_path / "run")
        assert said == "kd: interrupted; the same line goes on with what is finished"
    written = []

    def counted(cache: teacher_cache.TeacherCache, name: str) -> object:
        written.append(name)
        return answers(cache, name)

    inside.setattr(teacher_cache.TeacherCache, "write", counted)
    main(inside, *line, "--out", tmp_path / "run")
    assert written == ["part-00004", "part-00005"]


def test_the_cache_belongs_to_teacher_tokens_seed_and_length(
    inside: pytest.MonkeyPatch, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what it will take is said; a temperature counts only for probabilities."""
    text_support.bert_folder(work / "other", "ForMaskedLM", seed=3)
    line = ("train", *MLM, "--steps", 2, "--device", "cpu", "--cache", tmp_path / "cache")
    changes = [
        ("--loss", "mlm,tokens"),
        ("--loss", "mlm,tokens:1:temperature=1"),
        ("--loss", "mlm,tokens", "--teacher", "hf:other"),
        ("--loss", "mlm,tokens", "--seed", 1),
        ("--loss", "mlm,tokens", "--max-length", 6),
        ("--loss", "mlm,tokens", "--cache-top", 3),
        ("--loss", "mlm,tokens:1:temperature=1", "--cache-top", 3),
    ]
    folders = []
    for i, change in enumerate(changes):
        capsys.readouterr()
        main(inside, *line, *change, "--out", tmp_path / str(i))
        folders.append(len(list((tmp_path / "cache").iterdir())))
        said = capsys.readouterr().err
        if i == 1:
            assert "the answers to 96 texts of " in said
            assert "hidden anew in each of 1 epochs are there" in said
        else:
            assert f"teacher cache {tmp_path / 'cache'}: " in said
    assert folders == [1, 1, 2, 3, 4, 5, 6]
    keys = [json.loads(path.read_text()) for path in (tmp_path / "cache").glob("*/key.json")]
    assert [key["temperature"] for key in keys if "temperature" in key] == [2.0]


def test_the_room_that_is_stated_is_what_the_entries_take(
    inside: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside.setattr("kd.assembly.text_answers.TOKEN_TOP", 8)
    options = (*CAUSAL, "--loss", "clm,tokens", *COMMON, "--cache", tmp_path / "cache")
    main(inside, "train", *options, "--out", tmp_path / "run")
    said = capsys.readouterr().err
    assert "keeps the 8 largest of the 15 probabilities of a token" in said
    (key,) = (tmp_path / "cache").iterdir()
    index = json.loads((key / "part-00000.json").read_text())["index"]
    tokens = sum(chunk["rows"] for chunk in index["chunks"])
    assert f"{tokens * (8 * (2 + 2) + 4) / 1024:.1f} KiB for the answers to 96 texts of " in said
    assert f" of {tokens:,} tokens" in said


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_probabilities_at_the_temperature_of_the_loss_are_exact(
    tmp_path: Path, temperature: float
) -> None:
    logits = 4 * torch.randn(20, 5000, generator=torch.Generator().manual_seed(0))
    cache = open_cache(tmp_path, {"x": 1}, top=16, temperature=temperature)
    cache.save("static", logits)
    read = cache.load("static", 20, 5000)
    assert read is not None
    assert torch.equal(read, cache.as_kept(logits))
    ours, exact = (x.double().div(temperature).softmax(1) for x in (read, logits))
    top = exact.topk(16).indices
    # float16 has 11 significant bits of the logarithm, which is below 10.
    torch.testing.assert_close(ours.gather(1, top), exact.gather(1, top), rtol=5e-3, atol=0)
    torch.testing.assert_close(
        1 - ours.gather(1, top).sum(1), 1 - exact.gather(1, top).sum(1), rtol=1e-2, atol=1e-4
    )


def test_tables_give_each_text_its_own_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row names its text and token, whatever the order, the parts and the batch."""
    monkeypatch.setattr("kd.data.teacher_answers.PART_BATCHES", 2)
    lengths = np.random.default_rng(0).integers(1, 7, 23)
    caches = [open_cache(tmp_path, {"kind": kind}, top=None) for kind in ("token", "vector")]
    vector = LayerVector("3", "first")
    kept = (Kept(0, None, 2, "tokens", caches[0]), Kept(0, vector, 1, "rows", caches[1]))
    table = Table(lengths, 3)

    def batch(rows: np.ndarray) -> Batch:
        mask = torch.arange(lengths[rows].max())[None] < torch.from_numpy(lengths[rows])[:, None]
        index = torch.from_numpy(rows)
        return Batch(TokenInputs(mask.long(), mask), index, index=index)

    def ask(teacher: int, batch: Batch) -> tuple[torch.Tensor, dict[LayerVector, torch.Tensor]]:
        assert batch.index is not None
        text = batch.index[:, None].expand(-1, batch.inputs.mask.shape[1])  # pyright: ignore
        token = torch.arange(text.shape[1]).expand_as(text)
        return torch.stack([text, token], -1).float(), {vector: 10.0 * batch.index[:, None]}

    for rank in (1, 0):
        table.fill(kept, batch, ask, rank=rank, world=2)
    entries = [table.open(each) for each in kept]
    assert None not in entries
    add = FromTables(kept, (table, table), tuple(entries), len(lengths))  # pyright: ignore
    for rows in (np.array([22, 0, 7]), np.random.default_rng(1).permutation(23)):
        plain = batch(rows)
        full = add(plain, 0)
        logits, vectors = ask(0, plain)
        mask = plain.inputs.mask  # pyright: ignore[reportAttributeAccessIssue]
        assert full.teacher_logits is not None
        assert full.teacher_vectors is not None
        assert torch.equal(full.teacher_logits[0], torch.where(mask[..., None], logits, 0.0))
        assert torch.equal(full.teacher_vectors[0][vector], vectors[vector])
