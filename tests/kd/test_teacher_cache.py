"""The teacher cache: what comes back, and that nothing damaged, foreign or half-written does."""

import copy
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from kd_support import environment
from torch import nn

from dsdistill.commands import cache as stored
from dsdistill.harness.errors import UserError
from kd.data import teacher_cache as caches
from kd.data import top_k
from kd.data.teacher_cache import TeacherCache, architecture, fingerprint, open_cache

N, K = 50, 7
KEY = {"data": "abc", "teacher": "def", "seed": 3, "shape": (32, 32, 3)}


def _logits(n: int = N, k: int = K, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def _log_softmax(logits: torch.Tensor) -> np.ndarray:
    z = logits.double().numpy()
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven rows of full logits a chunk, so that entries have several."""
    monkeypatch.setattr(caches, "CHUNK_BYTES", 4 * K * 11)


@pytest.mark.usefixtures("small_chunks")
def test_full_logits_come_back_bit_for_bit(tmp_path: Path) -> None:
    cache, logits = open_cache(tmp_path, KEY, top=None), _logits()
    cache.save("static", logits)
    assert len(list((cache.folder / "chunks").iterdir())) == 5
    found = cache.load("static", N, K)
    assert found is not None
    assert torch.equal(found, logits)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("top", [None, 3])
def test_rows_come_in_any_order_and_from_any_chunk(tmp_path: Path, top: int | None) -> None:
    cache = open_cache(tmp_path, KEY, top=top)
    cache.save("static", _logits())
    whole, entry = cache.load("static", N, K), cache.open("static", N, K)
    assert whole is not None
    assert entry is not None
    rows = np.random.default_rng(0).integers(0, N, 40)
    assert torch.equal(entry[rows], whole[torch.from_numpy(rows)])
    assert torch.equal(entry[9:37], whole[9:37])
    assert entry[5:5].shape == (0, K)
    for wrong in (-1, N):
        with pytest.raises(IndexError, match="rows must be"):
            entry[np.array([0, wrong])]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("top", [None, 2])
def test_an_epoch_written_step_by_step_equals_one_written_at_once(
    tmp_path: Path, top: int | None
) -> None:
    cache, logits = open_cache(tmp_path, KEY, top=top), _logits()
    cache.save("epoch-00000", logits)
    with cache.write("epoch-00001") as write:
        for step in logits.split(8):
            write(step)
    one, other = (cache.load(f"epoch-0000{i}", N, K) for i in (0, 1))
    assert one is not None
    assert other is not None
    assert torch.equal(one, other)


@pytest.mark.usefixtures("small_chunks")
def test_a_long_epoch_goes_to_disk_while_it_is_written(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, KEY, top=None)
    with cache.write("epoch-00000") as write:
        for done in range(1, 45):
            write(_logits(1, seed=done))
            assert len(list((cache.folder / "chunks").iterdir())) == done // 11


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_an_entry_is_mapped_and_not_loaded(tmp_path: Path) -> None:
    def anonymous() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

    cache, logits = open_cache(tmp_path, KEY, top=None), _logits(8000, 1000)  # 30.5 MiB
    cache.save("static", logits)
    before = anonymous()
    entry = cache.open("static", 8000, 1000)
    assert entry is not None
    # A whole check needs what `isfinite` makes of one chunk, 4 MiB, and no copy of the table.
    assert anonymous() - before < logits.nbytes / 2
    assert torch.equal(entry[7000:7010], logits[7000:7010])


def test_the_largest_probabilities_and_the_tail_match_float64() -> None:
    logits, top = _logits(200, 30), 4
    stored = top_k.compress(logits, top)
    expected = _log_softmax(logits)
    order = np.argsort(-expected, axis=1)
    assert np.array_equal(stored.indices.numpy(), order[:, :top])
    kept = np.take_along_axis(expected, order[:, :top], 1)
    # float16 has 11 significant bits; the rest is float32's rounding.
    np.testing.assert_allclose(stored.log_probs.numpy(), kept, rtol=2**-11, atol=1e-6)
    rest = np.exp(np.take_along_axis(expected, order[:, top:], 1)).sum(1)
    np.testing.assert_allclose(stored.tail.numpy(), rest, rtol=1e-5)
    assert [v.dtype for v in stored] == [torch.float16, torch.uint16, torch.float32]


def test_expanded_rows_spread_the_tail_evenly_and_sum_to_one() -> None:
    logits, top, k = _logits(200, 30), 4, 30
    stored = top_k.compress(logits, top)
    expanded = top_k.expand(stored, k)
    assert expanded.dtype == torch.float32
    indices = stored.indices.to(torch.int64)
    assert torch.equal(expanded.gather(1, indices), stored.log_probs.float())
    rest = np.exp(expanded.double().numpy())
    np.put_along_axis(rest, indices.numpy(), np.nan, 1)
    share = stored.tail.double().numpy()[:, None] / (k - top)
    np.testing.assert_allclose(rest[~np.isnan(rest)].reshape(200, -1) / share, 1, rtol=1e-5)
    # A logarithm l that is off by 2^-11 l moves its probability p by p |l| 2^-11 <= 2^-11 / e.
    np.testing.assert_allclose(expanded.double().exp().sum(1), 1, atol=top * 2**-11 / np.e + 1e-6)


def test_all_classes_kept_leave_no_tail() -> None:
    logits = _logits()
    for top in (K, K + 3):
        stored = top_k.compress(logits, top)
        assert not stored.tail.any()
        expanded = top_k.expand(stored, K)
        np.testing.assert_allclose(expanded.numpy(), _log_softmax(logits), rtol=2**-11, atol=1e-6)


def test_a_confident_teachers_tail_is_not_rounded_away_and_stays_finite() -> None:
    logits = torch.tensor([[40.0, 0, 0, 0], [300, 0, 0, 0], [1e6, 0, 0, 0], [0, -1e6, -1e6, 5]])
    stored = top_k.compress(logits, 1)
    assert stored.tail[0].item() == pytest.approx(3 * np.exp(-40), rel=1e-5)
    assert torch.isfinite(top_k.expand(stored, 4)).all()
    both = top_k.compress(logits, 2)
    assert torch.isfinite(top_k.expand(both, 4)).all()


def test_more_classes_than_uint16_counts(tmp_path: Path) -> None:
    k = 70000
    logits = torch.zeros(2, k)
    logits[0, k - 1], logits[1, 40000] = 20, 20
    cache = open_cache(tmp_path, KEY, top=1)
    cache.save("static", logits)
    found = cache.load("static", 2, k)
    assert found is not None
    assert found.argmax(1).tolist() == [k - 1, 40000]
    assert top_k.compress(logits, 1).indices.dtype == torch.int32
    # The last index of uint16 must not come back as -1.
    few = torch.zeros(1, 65535)
    few[0, 65534] = 20
    stored = top_k.compress(few, 1)
    assert stored.indices.dtype == torch.uint16
    assert top_k.expand(stored, 65535).argmax(1).item() == 65534


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_stored_as_their_float32_values(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    cache, logits = open_cache(tmp_path, KEY, top=None), _logits().to(dtype).requires_grad_()
    cache.save("static", logits)
    found = cache.load("static", N, K)
    assert found is not None
    assert torch.equal(found, logits.detach().float())


def test_nothing_is_there_before_it_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert open_cache(tmp_path, KEY, top=None).load("static", N, K) is None
    assert capsys.readouterr().err == ""


def test_the_key_is_in_clear_and_its_checksum_names_the_folder(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, KEY, top=5)
    stored = json.loads((cache.folder / "key.json").read_text())
    assert stored == {"format": 1, "top": 5, "key": {**KEY, "shape": [32, 32, 3]}}
    text = json.dumps(stored, sort_keys=True)
    assert cache.folder == tmp_path / hashlib.sha256(text.encode()).hexdigest()


def test_another_key_or_another_top_finds_nothing(tmp_path: Path) -> None:
    open_cache(tmp_path, KEY, top=None).save("static", _logits())
    reordered = dict(reversed(KEY.items()))
    assert open_cache(tmp_path, reordered, top=None).load("static", N, K) is not None
    for key, top in (({**KEY, "seed": 4}, None), ({**KEY, "x": None}, None), (KEY, 3)):
        assert open_cache(tmp_path, key, top=top).load("static", N, K) is None


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def _edit(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    """A change of the index by somebody who knows how to make its checksum."""

    def apply(path: Path) -> None:
        index = json.loads(path.read_text())["index"]
        change(index)
        sha256 = hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps({"index": index, "sha256": sha256}))

    return apply


def _plain_edit(path: Path) -> None:
    path.write_text(path.read_text().replace(f'"classes": {K}', '"classes": 9'))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("top", [None, 2])
@pytest.mark.parametrize(
    ("damage", "which", "why"),
    [
        (_flip, "chunk", "does not match its checksum"),
        (_cut, "chunk", "does not match its checksum"),
        (Path.unlink, "chunk", "is missing"),
        (lambda p: (p.unlink(), os.mkfifo(p)), "chunk", "is missing"),
        (_plain_edit, "index", "the index does not match its checksum"),
        (_cut, "index", ""),
        (lambda p: p.write_bytes(b"\xff" * 40), "index", ""),
        (lambda p: p.write_text("[" * 100_000), "index", ""),
        (lambda p: p.write_text("[]"), "index", ""),
        (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "index", ""),
        (lambda p: (p.unlink(), os.mkfifo(p)), "index", "missing or too large"),
        (_edit(lambda i: i.update(key="0" * 64)), "index", "another key"),
        (_edit(lambda i: i.pop("key")), "index", "key"),
        (_edit(lambda i: i["chunks"].pop()), "index", "rows, not 50"),
        (_edit(lambda i: i.update(classes=9)), "index", "9 classes, not 7"),
        (_edit(lambda i: i["chunks"][0].update(rows=10**30)), "index", "rows, not 50"),
        (_edit(lambda i: i["chunks"][0].update(rows=-1)), "index", "no rows"),
        (_edit(lambda i: i["chunks"][0].update(rows=11.0)), "index", "no rows"),
        (_edit(lambda i: i["chunks"][0].update(sha256="../../key")), "index", "not a checksum"),
        (_edit(lambda i: i["chunks"][0].update(sha256=7)), "index", ""),
    ],
)
def test_a_damaged_entry_is_said_in_one_line_and_not_used(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], Any],
    which: str,
    why: str,
    top: int | None,
) -> None:
    cache = open_cache(tmp_path, KEY, top=top)
    cache.save("static", _logits())
    assert cache.load("static", N, K) is not None
    index = cache.folder / "static.json"
    chunks = json.loads(index.read_text())["index"]["chunks"]
    chunk = cache.folder / "chunks" / f"{chunks[-1]['sha256']}.safetensors"
    damage(chunk if which == "chunk" else index)
    assert cache.load("static", N, K) is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "static.json is not used" in said
    assert why in said
    # New answers mend it.
    cache.save("static", _logits())
    assert cache.load("static", N, K) is not None
    assert capsys.readouterr().err == ""


def _stranger(cache: TeacherCache, tensors: dict[str, torch.Tensor] | bytes, rows: int) -> None:
    """An entry with checksums that are all right, whatever it holds."""
    content = tensors if isinstance(tensors, bytes) else safetensors.torch.save(tensors)
    sha256 = hashlib.sha256(content).hexdigest()
    (cache.folder / "chunks" / f"{sha256}.safetensors").write_bytes(content)
    index = {"key": cache.folder.name, "classes": K, "chunks": [{"sha256": sha256, "rows": rows}]}
    digest = hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
    (cache.folder / "static.json").write_text(json.dumps({"index": index, "sha256": digest}))


def _changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    stored = top_k.encode(_logits(), 2)
    return {**stored, name: change(stored[name]).contiguous()}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (pickle.dumps({"logits": [1.0]}), ""),
        (b"\xff" * 200, ""),
        (_changed("log_probs", lambda x: x.float()), "another form"),
        (_changed("log_probs", lambda x: x[:, :1]), "another form"),
        (_changed("tail", lambda x: x[:3]), "another form"),
        (_changed("indices", lambda x: x.to(torch.int32)), "another form"),
        ({"logits": _logits()}, "another form"),
        ({**top_k.encode(_logits(), 2), "more": torch.zeros(2)}, "another form"),
        (
            _changed("indices", lambda x: x.view(torch.int16).fill_(-1).view(x.dtype)),
            "are not logits",
        ),
        (_changed("indices", lambda x: torch.full((N, 2), K).to(x.dtype)), "are not logits"),
        (_changed("log_probs", lambda x: x.fill_(float("nan"))), "are not logits"),
        (_changed("log_probs", lambda x: x.fill_(1)), "are not logits"),
        (_changed("tail", lambda x: x.fill_(float("inf"))), "are not logits"),
        (_changed("tail", lambda x: x.fill_(-1)), "are not logits"),
    ],
)
def test_a_strangers_entry_with_right_checksums_is_not_used(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: dict[str, torch.Tensor] | bytes,
    why: str,
) -> None:
    cache = open_cache(tmp_path, KEY, top=2)
    _stranger(cache, content, N)
    assert cache.load("static", N, K) is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert why in said


def test_a_strangers_entry_with_right_values_is_used(tmp_path: Path) -> None:
    # Without this the test before could pass for another reason than the one it names.
    cache = open_cache(tmp_path, KEY, top=2)
    _stranger(cache, top_k.encode(_logits(), 2), N)
    assert cache.load("static", N, K) is not None


def test_an_error_in_the_middle_of_an_epoch_leaves_no_entry(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, KEY, top=None)

    def epoch() -> None:
        with cache.write("epoch-00000") as write:
            write(_logits())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        epoch()
    assert cache.load("epoch-00000", N, K) is None


_WRITE = """
import sys, torch
from pathlib import Path
from kd.data import teacher_cache as caches
caches.CHUNK_BYTES = 4 * 7 * 11
cache = caches.open_cache(Path(sys.argv[1]), {"data": "abc"}, top=None)
logits = torch.arange(50 * 7.).view(50, 7)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[2])):
    with cache.write("epoch-00000") as write:
        for step in logits.split(5):
            write(step)
            if sys.argv[2] == "1":
                print("step", flush=True)
                sys.stdin.readline()
"""


def _start(folder: Path, times: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _WRITE, str(folder), str(times)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment(), **pipes)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_a_killed_epoch_leaves_nothing_that_would_be_used(tmp_path: Path) -> None:
    process = _start(tmp_path, 1)
    assert process.stdout is not None
    for _ in range(6):  # 25 rows are written then: two chunks of eleven
        _tell(process)
        assert process.stdout.readline() == "step\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    cache = open_cache(tmp_path, {"data": "abc"}, top=None)
    assert len(list((cache.folder / "chunks").iterdir())) == 2
    assert cache.load("epoch-00000", N, K) is None
    assert not (cache.folder / "epoch-00000.json").exists()


def test_two_processes_that_write_one_entry_do_not_corrupt_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processes = [_start(tmp_path, 20) for _ in range(2)]
    for process in processes:
        _tell(process)
    cache, found = open_cache(tmp_path, {"data": "abc"}, top=None), 0
    expected = torch.arange(50 * 7.0).view(50, 7)
    while any(process.poll() is None for process in processes):
        logits = cache.load("epoch-00000", 50, 7)  # also while they write
        if logits is not None:
            found += 1
            assert torch.equal(logits, expected)
    assert [process.wait() for process in processes] == [0, 0]
    for process in processes:
        process.communicate()
    logits = cache.load("epoch-00000", 50, 7)
    assert logits is not None
    assert torch.equal(logits, expected)
    assert found
    assert capsys.readouterr().err == ""


def test_what_killed_processes_left_is_swept_away_when_it_is_old(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, KEY, top=None)
    cache.save("static", _logits())
    chunks = cache.folder / "chunks"
    left = [chunks / f"{'0' * 64}.safetensors", chunks / ".x.abc", cache.folder / ".static.json.x"]
    young = chunks / f"{'1' * 64}.safetensors"
    old = time.time() - caches.ABANDONED_SECONDS - 60
    for path in (*left, young):
        path.write_bytes(b"")
    for path in (*left, *chunks.glob("[!1]*.safetensors"), cache.folder / "static.json"):
        os.utime(path, (old, old))
    cache = open_cache(tmp_path, KEY, top=None)
    assert not any(path.exists() for path in left)
    assert young.exists()
    assert cache.load("static", N, K) is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("top", [None, 2])
def test_logits_that_are_not_finite_are_refused(
    tmp_path: Path, bad: float, top: int | None
) -> None:
    logits = _logits()
    logits[3, 2] = bad
    with pytest.raises(ValueError, match="must be finite"):
        open_cache(tmp_path, KEY, top=top).save("static", logits)


def test_rows_of_another_length_are_refused(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, KEY, top=None)

    def epoch() -> None:
        with cache.write("static") as write:
            write(_logits(2, 7))
            write(_logits(2, 8))

    with pytest.raises(ValueError, match="rows of 7 logits"):
        epoch()


@pytest.mark.parametrize("name", ["", "../x", "a/b", "key", ".x", "Static"])
def test_names_that_are_no_entries_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="an entry's name"):
        open_cache(tmp_path, KEY, top=None).save(name, _logits())


def test_a_folder_or_a_top_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--cache .*file cannot be used"):
        open_cache(tmp_path / "file", KEY, top=None)
    with pytest.raises(UserError, match="--cache-top must be at least 1, got 0"):
        open_cache(tmp_path, KEY, top=0)


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, Path("x")])
def test_a_key_that_is_not_json_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match=r"JSON"):
        open_cache(tmp_path, {"value": value}, top=None)


def _module() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


def test_a_fingerprint_is_that_of_names_types_shapes_and_bytes() -> None:
    module, sha = _module(), hashlib.sha256()
    for name, value in sorted((n, v.numpy()) for n, v in module.state_dict().items()):
        sha.update(f"{name} torch.{value.dtype} {value.shape}\n".encode() + value.tobytes())
    assert fingerprint(module) == sha.hexdigest()
    assert fingerprint(module) == fingerprint(_module())


def test_a_fingerprint_changes_with_everything_it_is_made_of() -> None:
    def nudged(module: nn.Sequential) -> nn.Sequential:
        weight = module.state_dict()["0.weight"]
        weight.view(-1)[-1] = torch.nextafter(weight.view(-1)[-1], torch.tensor(9.0))
        return module

    def counted(module: nn.Sequential) -> nn.Sequential:
        module.state_dict()["1.num_batches_tracked"] += 1
        return module

    def transposed(module: nn.Sequential) -> nn.Sequential:
        linear = module[2]
        assert isinstance(linear, nn.Linear)
        linear.weight = nn.Parameter(linear.weight.detach().view(4, 2))
        return module

    module = _module()
    others = [
        nudged(_module()),
        counted(_module()),
        transposed(_module()),
        _module().bfloat16(),
        nn.Sequential(*_module(), nn.ReLU(), nn.Linear(1, 1)),
        nn.ModuleDict({"a": _module()}),
    ]
    assert len({fingerprint(m) for m in (module, *others)}) == 1 + len(others)
    assert fingerprint(_module().to(memory_format=torch.channels_last)) == fingerprint(module)


def test_equal_weights_of_another_function_have_another_architecture() -> None:
    class Scaled(nn.Linear):
        def __init__(self, scale: float) -> None:
            torch.manual_seed(0)
            super().__init__(3, 2)
            self.scale = scale

    def bert(heads: int, **more: Any) -> nn.Module:
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=7,
            hidden_size=12,
            num_hidden_layers=1,
            num_attention_heads=heads,
            intermediate_size=8,
            **more,
        )
        return transformers.BertModel(config)

    pairs = [
        (nn.Conv2d(3, 4, 3, stride=1), nn.Conv2d(3, 4, 3, stride=2)),
        (Scaled(1.0), Scaled(2.0)),
        (bert(2), bert(3)),
        (bert(2), bert(2, hidden_act="relu")),
    ]
    for one, other in pairs:
        assert architecture(one) != architecture(other)
        assert architecture(one) == architecture(copy.deepcopy(one).train(not one.training))
    assert fingerprint(pairs[2][0]) == fingerprint(pairs[2][1])


def test_a_model_loaded_from_another_folder_has_the_same_architecture(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=7, hidden_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    loaded = [transformers.BertModel.from_pretrained(tmp_path / n) for n in ("one", "other")]
    assert architecture(loaded[0]) == architecture(loaded[1])


def test_a_teachers_answers_are_not_cleared_while_they_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DSDISTILL_CACHE", str(tmp_path))
    monkeypatch.setenv("DSDISTILL_DATA", str(tmp_path / "data"))
    used = open_cache(tmp_path / "answers", {"a": 1}, top=None)
    beside = open_cache(tmp_path / "answers", {"a": 1}, top=None)  # shares it
    stored.run(clear=True, older_than=None)
    assert "is kept" in capsys.readouterr().err
    with used.write("static") as write:
        write(torch.zeros(2, 3))
    loaded = beside.load("static", 2, 3)
    assert loaded is not None
    assert loaded.shape == (2, 3)
    folder = used.folder
    del used
    stored.run(clear=True, older_than=None)
    assert not folder.exists()
