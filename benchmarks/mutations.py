"""Damaged and crafted files, fed to whatever reads them: is each noticed, and said in one line?

    python benchmarks/mutations.py --out mutations                    10,000 files, all kinds
    python benchmarks/mutations.py --out mutations --count 500 --kinds "distilled set,student"
    python benchmarks/mutations.py --out mutations --again "student:17"     one file, with its error

An original of every kind is made by the commands' own functions, then changed, again and again,
by one of: flipped, deleted, inserted, zeroed, doubled or swapped bytes, a cut, or an edit of what
the file holds (an entry of its JSON or of its header dropped, of another type, huge, nested
20,000 deep, not a number, code, another path; a member of its archive changed, doubled or renamed
under a right checksum). The changed file is read in this process, in a worker a kind, which the
parent starts again after a crash. The random numbers of a file depend on the seed, the kind and
its number alone. A campaign that was stopped goes on where it was.

A file is **held** if it is

    refused   by a `UserError` or an `OSError`, which the commands show, of one line;
    equal     read, and every array and every word is that of the original: the change lay where
              nothing is stored; of a cache: noticed, and computed again to the same bits;
    other     read, and different, only where a reader cannot know: data sets and sets of other
              projects (`.npz`, `.pt`, `.pt2`, pictures), options and figures that are legal
              (`config.json`, `metrics.jsonl`, the `report.json` files), a set signed anew;
    runs on   a resumed run whose `config.json` now asks for more work than its time here.

Everything else is a fault: another exception, a silent difference, a second line, 2 GiB more
memory, 20 seconds, a crash, a file written outside the folder, another program started, or the
marker that the crafted code would leave. The files of a fault are kept under `faults/`.
`results.jsonl` has a line for each file.
"""

import argparse
import contextlib
import io
import json
import os
import re
import resource
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = 20.0  # of one file
RESUMED_SECONDS = 8.0  # of a run that is resumed whole
MEMORY = 2 << 30  # bytes more than a worker has before the first changed file
DEEP = 20_000  # brackets
HELD = ("refused", "equal", "other", "runs on")

Read = Callable[[Path], Any]
Random = np.random.Generator
Changed = tuple[bytes, str]  # content, and what was done to it


@dataclass(frozen=True)
class Kind:
    """Files of one kind.

    Attributes:
        share: Of the campaign's files.
        make: Writes the originals into a folder, which every trial copies.
        reader: Called once in a worker; gives what reads such a folder.
        files: Patterns of the files that are changed, in that folder.
        legal: Those of them that hold nothing but options, figures or data of other projects.
        change: Changes a file of a name; `changed` for most.
        seconds: Of one file.
    """

    share: float
    make: Callable[[Path], None]
    reader: Callable[[], Read]
    files: tuple[str, ...]
    legal: tuple[str, ...] = ()
    change: Callable[[Random, str, bytes, str], Changed] = field(default_factory=lambda: changed)
    seconds: float = SECONDS


# ---- what is done to a file


def changed(rng: Random, name: str, content: bytes, marker: str) -> Changed:
    """One change, by bytes or, as often, by what a file of that name holds."""
    suffix = Path(name).suffix
    edits: dict[str, Callable[[Random, bytes, str], Changed]] = {
        ".json": _edit_json,
        ".jsonl": _edit_lines,
        ".safetensors": _edit_safetensors,
        ".npy": _edit_npy,
        ".npz": _edit_archive,
        ".pt": _edit_archive,
        ".pt2": _edit_archive,
        ".png": _edit_png,
    }
    if suffix in edits and rng.random() < 0.5:
        return edits[suffix](rng, content, marker)
    return _edit_bytes(rng, content)


def _edit_bytes(rng: Random, content: bytes) -> Changed:
    data = bytearray(content)
    size = max(len(data), 1)
    # Headers lie at one of the ends: half of the changes are there.
    ends = [(0, size), (0, min(size, 512)), (max(0, size - 512), size)]
    low, high = ends[int(rng.choice(3, p=[0.5, 0.3, 0.2]))]
    at = int(rng.integers(low, high))
    length = int(rng.integers(1, 65))
    kind = str(rng.choice(["flip", "flips", "delete", "insert", "cut", "zero", "double", "swap"]))
    if kind == "flip":
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == "flips":
        for place in rng.integers(low, high, length):
            data[place] ^= 1 << int(rng.integers(8))
    elif kind == "delete":
        del data[at : at + length]
    elif kind == "insert":
        data[at:at] = rng.bytes(length)
    elif kind == "cut":
        del data[at:]
    elif kind == "zero":
        data[at : at + 4 * length] = bytes(len(data[at : at + 4 * length]))
    elif kind == "double":
        data[at:at] = data[at : at + 4 * length]
    else:
        other = int(rng.integers(0, size))
        one, two = bytes(data[at : at + 8]), bytes(data[other : other + 8])
        if len(one) == len(two) == 8:
            data[at : at + 8], data[other : other + 8] = two, one
    return bytes(data), f"{kind} at {at} of {size}"


def _values(marker: str) -> list[Any]:
    code = f"__import__('pathlib').Path({marker!r}).touch()"
    numbers = [0, -1, 1, 2**31, 2**63, 10**30, 1e308, -0.5, float("nan"), float("inf")]
    words = ["", "x", "../../../outside", "/etc/passwd", "\x00", "\ud800", "a" * 100_000, code]
    return [None, True, *numbers, *words, [], {}, [[]], {"x": 1}, "@DEEP@", "os:system"]


def _edit_value(rng: Random, value: Any, marker: str) -> tuple[Any, str]:
    """A JSON value with one entry of it, at any depth, changed."""
    places = list(_places(value))
    if not places:
        return _values(marker)[int(rng.integers(len(_values(marker))))], "whole"
    holder, key = places[int(rng.integers(len(places)))]
    old, kind = holder[key], str(rng.choice(["other", "other", "drop", "more", "near", "inner"]))
    if kind == "drop":
        del holder[key]
    elif kind == "more" and isinstance(holder, list):
        holder.insert(key, old)
    elif kind == "more":
        holder[f"{key}x"] = old
    elif kind == "near" and isinstance(old, int | float) and not isinstance(old, bool):
        holder[key] = old + int(rng.choice([-1, 1]))
    elif kind == "inner" and isinstance(old, str) and (inner := _json(old)) is not None:
        inner, what = _edit_value(rng, inner, marker)
        holder[key] = _dumps(inner)
        return value, f"{key}: inner {what}"
    else:
        values = _values(marker)
        holder[key] = values[int(rng.integers(len(values)))]
        return value, f"{key}: {ascii(holder[key])[:40]}"
    return value, f"{key}: {kind}"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    if isinstance(value, dict | list):
        for key, inner in entries:
            yield value, key
            if isinstance(inner, dict | list):
                yield from _places(inner)


def _json(text: str | bytes) -> Any:
    """A JSON object or list; None for anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict | list) else None


def _dumps(value: Any) -> str:
    return json.dumps(value).replace('"@DEEP@"', "[" * DEEP + "]" * DEEP)


def _edit_json(rng: Random, content: bytes, marker: str) -> Changed:
    value = _json(content)
    if value is None:
        return _edit_bytes(rng, content)
    value, what = _edit_value(rng, value, marker)
    return _dumps(value).encode(), what


def _edit_lines(rng: Random, content: bytes, marker: str) -> Changed:
    lines = content.splitlines()
    at = int(rng.integers(len(lines)))
    kind = str(rng.choice(["edit", "edit", "drop", "double", "order"]))
    if kind == "drop":
        del lines[at]
    elif kind == "double":
        lines.insert(at, lines[at])
    elif kind == "order":
        lines.reverse()
    else:
        lines[at], kind = _edit_json(rng, lines[at], marker)
    return b"\n".join(lines) + b"\n", f"line {at}: {kind}"


def _header(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a .safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _with_header(header: Any, data: bytes) -> bytes:
    text = _dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def _edit_safetensors(rng: Random, content: bytes, marker: str) -> Changed:
    header, data = _header(content)
    if rng.random() < 0.1:
        lengths = (0, 7, 2**31, 2**62, 2**64 - 1, 100_000_000)
        length = lengths[int(rng.integers(len(lengths)))]
        return struct.pack("<Q", length) + content[8:], f"header of {length} bytes"
    if rng.random() < 0.2:  # two tensors exchange their data
        named = [name for name in header if name != "__metadata__"]
        one, two = rng.choice(named, 2)
        header[one], header[two] = header[two], header[one]
        return _with_header(header, data), f"{one} for {two}"
    header, what = _edit_value(rng, header, marker)
    return _with_header(header, data), what


def sign_anew(rng: Random, name: str, content: bytes, marker: str) -> Changed:
    """A distilled set whose header says other things, under a checksum that is right."""
    from dsdistill.harness import artifact

    header, data = _header(content)
    inner, what = _edit_value(rng, json.loads(header["__metadata__"]["dsdistill"]), marker)
    text = _dumps(inner)
    tensors = {}
    for key, entry in header.items():
        if key != "__metadata__":
            begin, end = entry["data_offsets"]
            tensors[key] = np.frombuffer(data[begin:end], "<f4").reshape(entry["shape"])
    header["__metadata__"] = {"dsdistill": text, "sha256": artifact._digest(text, tensors)}
    return _with_header(header, data), what


def _edit_npy(rng: Random, content: bytes, marker: str) -> Changed:
    """Other words in the header of an array."""
    match = re.search(rb"\{.*?\}", content[:256])
    if match is None:
        return _edit_bytes(rng, content)
    text = match[0].decode("latin-1")
    edits = {
        "shape": re.sub(r"\((\d+)", lambda m: f"({int(m[1]) * 10**6}", text),
        "shorter": re.sub(r"\((\d+)", lambda m: f"({max(int(m[1]) - 1, 0)}", text),
        "negative": text.replace("(", "(-"),
        "order": text.replace("False", "True"),
        "pickled": re.sub(r"'descr': '[^']*'", "'descr': '|O'", text),
        "type": re.sub(r"'descr': '[^']*'", "'descr': '<f2'", text),
        "names": re.sub(r"'descr': '[^']*'", "'descr': [('a', '<f4')]", text),
        "code": text.replace("(", f"({marker!r}, "),
        "deep": "(" * 5000,
    }
    kind = str(rng.choice(list(edits)))
    header = edits[kind].encode("latin-1")
    rest = content[match.end() :]
    blanks = len(rest) - len(rest.lstrip(b" "))
    room = max(blanks + len(match[0]) - len(header), 0)
    return content[: match.start()] + header + b" " * room + rest[blanks:], f"npy {kind}"


def _edit_archive(rng: Random, content: bytes, marker: str) -> Changed:
    """Another archive, whole in itself: a member changed, dropped, doubled or renamed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    at = int(rng.integers(len(members)))
    info, inner = members[at]
    kind = str(rng.choice(["edit", "edit", "edit", "drop", "double", "rename", "add", "pack"]))
    what = ""
    if kind == "edit":
        inner, what = _edit_member(rng, info.filename, inner, marker)
        members[at] = (info, inner)
    elif kind == "drop":
        del members[at]
    elif kind == "double":
        inner, what = _edit_member(rng, info.filename, inner, marker)
        members.insert(at + int(rng.integers(2)), (info, inner))
    elif kind == "rename":
        other = replace_name(info, str(rng.choice(["../../outside", "/tmp/outside", "x", ""])))
        members[at] = (other, inner)
    elif kind == "add":
        pickled = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
        folder = info.filename.rpartition("/")[0]
        extra = str(rng.choice(["data.pkl", "custom_obj_0", "data/0", "extra/model.json"]))
        members.append((replace_name(info, f"{folder}/{extra}"), pickled))
        what = extra
    else:
        members = [(_deflated(info), inner) for info, inner in members]
    box = io.BytesIO()
    with zipfile.ZipFile(box, "w") as archive, warnings_off():
        for info, inner in members:
            archive.writestr(info, inner)
    return box.getvalue(), f"{kind} {info.filename} {what}"


def _edit_member(rng: Random, name: str, inner: bytes, marker: str) -> Changed:
    if inner.startswith(b"\x93NUMPY") and rng.random() < 0.7:
        return _edit_npy(rng, inner, marker)
    if _json(inner) is not None:
        return _edit_json(rng, inner, marker)
    if name.endswith(".pkl") and rng.random() < 0.3:
        return f"cos\nsystem\n(S'touch {marker}'\ntR.".encode(), "pickled code"
    return _edit_bytes(rng, inner)


def replace_name(info: zipfile.ZipInfo, name: str) -> zipfile.ZipInfo:
    """A new member of another name."""
    other = zipfile.ZipInfo(name or "?", info.date_time)
    other.compress_type = info.compress_type
    return other


def _deflated(info: zipfile.ZipInfo) -> zipfile.ZipInfo:
    other = replace_name(info, info.filename)
    other.compress_type = zipfile.ZIP_DEFLATED
    return other


@contextlib.contextmanager
def warnings_off() -> Iterator[None]:
    """Within it, zipfile says nothing of names that come twice."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _edit_png(rng: Random, content: bytes, marker: str) -> Changed:
    """A PNG whose header says another size, depth or kind of colour, under a right checksum."""
    data = bytearray(content)
    fields = {"width": (16, ">I"), "height": (20, ">I"), "depth": (24, "B"), "colour": (25, "B")}
    name = str(rng.choice(list(fields)))
    at, form = fields[name]
    small = [0, 1, 2, 3, 4, 5, 6, 8, 16, 255]
    value = int(rng.choice(small if form == "B" else [0, 1, 7, 9, 20_000, 65_535, 2**31 - 1]))
    struct.pack_into(form, data, at, value)
    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    return bytes(data), f"{name} {value}"


# ---- kinds: how an original is made, and how it is read


def _data(folder: Path) -> Path:
    """A small data set that lies beside all originals."""
    path = folder.parent / "data.npz"
    if not path.exists():
        rng = np.random.default_rng(0)
        labels = np.arange(90) % 3
        images = rng.integers(0, 100, (90, 8, 8, 1), dtype=np.uint8)
        images[np.arange(90), labels] = 255
        np.savez(path, images=images, labels=labels)
    return path.resolve()


def _make_set(folder: Path) -> None:
    from dsdistill.harness import artifact, preprocess

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (50, 4, 4, 1), dtype=np.uint8)
    fitted = preprocess.fit("zca", lambda size: iter([pixels]), (4, 4, 1))
    labels = rng.normal(size=(6, 3)).astype(np.float32)
    provenance = {
        "method": "kip",
        "config": {"command": "kip", "data": "digits", "image_size": None, "seed": 3},
        "kernel": "fc",
        "data": {"name": "digits", "source": "digits", "sha256": "0" * 64, "train": 40},
        "metrics": {"test_accuracy": 0.75, "initial_test_accuracy": 0.5},
        "seconds": 1.5,
        "peak_memory": 12345,
        "stopped": None,
        "versions": {"numpy": "2.0"},
    }
    names = ("cat", "dog", "under_$5_$10")
    made = artifact.Distilled(fitted.apply(pixels[:6]), labels, fitted, names, provenance)
    artifact.save(folder / artifact.FILE, made)


def _set_reader() -> Read:
    from dsdistill import summary
    from dsdistill.harness import artifact

    def read(folder: Path) -> Any:
        made = artifact.load(folder / artifact.FILE)
        for as_json in (False, True):
            summary.print_set(folder, as_json=as_json)
        return made

    return read


def _make_kip(folder: Path) -> None:
    from dsdistill import pipeline
    from dsdistill.options import Kip

    pipeline.run_kip(Kip(str(_data(folder)), out=folder, images_per_class=2, steps=6))
    (folder / "distilled.safetensors").unlink()  # so that there is something to resume


def _make_label_solve(folder: Path) -> None:
    from dsdistill import pipeline
    from dsdistill.options import LabelSolve

    pipeline.run_label_solve(LabelSolve(str(_data(folder)), out=folder, images_per_class=2))
    (folder / "distilled.safetensors").unlink()


def _make_training(folder: Path) -> None:
    from kd import session
    from kd.options import Overrides, Train

    few: Any = Overrides(epochs=2, batch_size=16)
    session.run(
        session.settled(
            Train(str(_data(folder)), student="mlp:8", out=folder, preprocess="zca", overrides=few)
        )
    )


def _make_stopped_training(folder: Path) -> None:
    _make_training(folder)
    (folder / "report.json").unlink()


def _state_reader() -> Read:
    from dsdistill.harness import runs

    def read(folder: Path) -> Any:
        return runs.Run(folder, runs.read_json(folder / "config.json"), True).load_state()

    return read


def _kip_reader() -> Read:
    from dsdistill import pipeline
    from dsdistill.harness import artifact
    from dsdistill.options import Kip

    def read(folder: Path) -> Any:
        pipeline.run_kip(Kip(out=folder, resume=True))
        made = artifact.load(artifact.locate(folder))
        return made.images, made.labels

    return read


def _label_solve_reader() -> Read:
    from dsdistill import pipeline
    from dsdistill.harness import artifact
    from dsdistill.options import LabelSolve

    def read(folder: Path) -> Any:
        pipeline.run_label_solve(LabelSolve(out=folder, resume=True))
        made = artifact.load(artifact.locate(folder))
        return made.images, made.labels

    return read


def _training_reader() -> Read:
    from kd import models, session
    from kd.options import Train

    def read(folder: Path) -> Any:
        report = session.run(session.settled(Train(out=folder, resume=True)))
        state = models.load_run(folder).classifier.network.state_dict()
        return {k: v.numpy() for k, v in state.items()}, report["test_accuracy"]

    return read


def _student_reader() -> Read:
    from kd import models

    def read(folder: Path) -> Any:
        model = models.load_run(folder)
        state = model.classifier.network.state_dict()
        return {k: v.numpy() for k, v in state.items()}, models.card(model), model.preprocess

    return read


def _kd_report_reader() -> Read:
    from kd import report

    return lambda folder: re.sub(re.escape(str(folder)), "", report.render([folder]))


def _kd_evaluate_reader() -> Read:
    from kd.evaluate import evaluate
    from kd.options import Evaluate

    def read(folder: Path) -> Any:
        found = evaluate(Evaluate(folder))
        return {k: v for k, v in found.items() if not k.startswith("latency") and k != "run"}

    return read


def _make_evaluation(folder: Path) -> None:
    from dsdistill.harness.reports import report
    from dsdistill.harness.results import Result

    rng = np.random.default_rng(0)
    found = []
    for arm in ("distilled", "random", "full"):
        for seed in range(3):
            counts = rng.multinomial(20, (0.6, 0.2, 0.2), 3)
            counts = [np.roll(row, i).tolist() for i, row in enumerate(counts)]
            right = [counts[i][i] / 20 for i in range(3)]
            facts = {"parameters": 12, "curve": [[0, 2.0], [10, 1.0], [20, 0.5]]}
            figures = {"validation_accuracy": 0.6, "nll": 0.8, "calibration_error": 0.1}
            one = Result(arm, "convnet", False, seed, 30, 900, 0.01, float(np.mean(right)))
            found.append(replace(one, confusion=counts, per_class=right, facts=facts, **figures))
    made = report.Report(
        title="kip on digits, 30 images",
        notes=["a note"],
        commands=["dsdistill evaluate runs/kip-1"],
        classes=["a", "b", "c"],
        data={"name": "digits", "sha256": "0", "train": 90, "validation": 9, "test": 60},
        images_per_class=10,
        results=tuple(found),
        distilled={"method": "kip", "kernel": "fc", "seconds": 1.0, "images": 30, "bytes": 900},
        seconds=2.0,
        peak_memory=1000,
        machine="here",
        versions={"numpy": "2"},
    )
    report.write(folder, made)
    shutil.rmtree(folder / "plots")


def _evaluation_reader() -> Read:
    from dsdistill.harness.reports import markdown, page, report

    def read(folder: Path) -> Any:
        found = report.load(folder)
        markdown.render(found)
        if zlib.crc32((folder / "report.json").read_bytes()) % 5 == 0:  # takes half a second
            page.render([found], title=found.title)
        return asdict(found)

    return read


def _make_pictures(folder: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    forms = {"png": {}, "jpg": {}, "gif": {}, "tif": {"compression": "tiff_lzw"}, "webp": {}}
    for label in ("cat", "dog"):
        (folder / "data" / label).mkdir(parents=True)
        for suffix, options in forms.items():
            smooth = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
            image = Image.fromarray(smooth).resize((20, 16))
            image.save(folder / "data" / label / f"{suffix}.{suffix}", **options)


def _pictures_reader() -> Read:
    from dsdistill.harness import folders

    def read(folder: Path) -> Any:
        return _splits(folders.read(folder / "data", folder / "cache", 8))

    return read


def _splits(parts: Sequence[Any]) -> Any:
    return [(np.asarray(p.images()), p.labels, p.classes) for p in parts]


def _make_decoded(folder: Path) -> None:
    _make_pictures(folder)
    # The key holds the times of the files, which a copy keeps, and their folder: a link to it.
    shutil.move(folder / "data", folder.parent / "decoded-data")
    from dsdistill.harness import folders

    folders.read(folder.parent / "decoded-data", folder / "cache", 8)


def _decoded_reader() -> Read:
    from dsdistill.harness import folders

    def read(folder: Path) -> Any:
        data = folder.parent / "originals" / "decoded-data"
        return _splits(folders.read(data, folder / "cache", 8))

    return read


KEY = {"arm": ["full"], "learner": "convnet", "seed": 0}


def _make_kept(folder: Path) -> None:
    _kept(folder).put(KEY, _result())


def _kept(folder: Path) -> Any:
    from dsdistill.harness.kept import Kept

    return Kept(folder / "results", say=lambda line: None)


def _result() -> Any:
    from dsdistill.harness.results import Result

    facts = {"parameters": 12, "curve": [[0, 2.0], [10, 1.0]]}
    one = Result("full", "convnet", False, 0, 30, 900, 0.01, 0.75, 0.7, 0.5, 0.1)
    return replace(one, per_class=[0.5, 1.0], confusion=[[5, 5], [0, 10]], facts=facts)


def _kept_reader() -> Read:
    # A result that is not known is measured again, to the same.
    return lambda folder: asdict(_kept(folder).get(KEY) or _result())


def _answers() -> Any:
    import torch

    return torch.randn(50, 7, generator=torch.Generator().manual_seed(0))


def _teacher_cache(folder: Path) -> Any:
    from kd import cache

    return cache.open_cache(folder / "cache", {"teacher": "x", "views": 1}, top=None)


def _make_teacher_cache(folder: Path) -> None:
    opened = _teacher_cache(folder)
    opened.save("static", _answers())
    opened.save("epoch-00001", _answers() + 1)


def _teacher_cache_reader() -> Read:
    def read(folder: Path) -> Any:
        opened = _teacher_cache(folder)
        found = []
        for name, more in (("static", 0), ("epoch-00001", 1)):
            rows = opened.load(name, 50, 7)
            if rows is None:
                opened.save(name, _answers() + more)
                rows = opened.load(name, 50, 7)
            found.append(rows.numpy())
        return found

    return read


def _make_npz(folder: Path) -> None:
    shutil.copy(_data(folder), folder / "data.npz")
    with np.load(folder / "data.npz") as stored:
        names = np.array(["cat", "dog", "under_$5_$10"])
        np.savez(folder / "named.npz", **stored, classes=names)


def _npz_reader() -> Read:
    from dsdistill.harness import datasets

    def read(folder: Path) -> Any:
        found = [datasets.load(str(path), root=folder) for path in sorted(folder.glob("*.npz"))]
        return [_splits((one.train, one.validation, one.test)) for one in found]

    return read


def _make_foreign(folder: Path) -> None:
    import torch

    rng = np.random.default_rng(0)
    images = rng.normal(size=(6, 1, 8, 8)).astype(np.float32)
    labels = np.arange(6) % 3
    torch.save({"images": torch.tensor(images), "labels": torch.tensor(labels)}, folder / "a.pt")
    np.savez(folder / "b.npz", images=images, labels=labels)


def _foreign_reader() -> Read:
    from dsdistill import foreign
    from dsdistill.harness import npz, preprocess

    data = npz.read(_DATA[0])
    fitted = preprocess.fit("standardise", data.chunks, data.shape)
    stated = foreign.Stated(pixels="standardised", mean=(0.5,), std=(0.25,))

    def read(folder: Path) -> Any:
        found = []
        for path in sorted(folder.iterdir()):
            made = foreign.load(path, data, stated, preprocess=fitted)
            found.append((made.images, made.labels))
        return found

    return read


def _make_program(folder: Path) -> None:
    from kd.export import export
    from kd.options import Export

    _make_training(folder / "run")
    export(Export(folder / "run", format="pt2", out=folder / "program.pt2"))
    shutil.rmtree(folder / "run")


def _program_reader() -> Read:
    import torch

    from kd.zoo import exported

    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def read(folder: Path) -> Any:
        found = exported.load(folder / "program.pt2", (8, 8, 1))
        with torch.no_grad():
            return found.network(images).numpy(), found.shape, found.classes, found.card

    return read


_DATA: list[Path] = []  # the data set beside the originals, set in a worker
CONFIG, FIGURES, STATE = "config.json", "metrics.jsonl", "checkpoint.safetensors"
RUN = (CONFIG, FIGURES, STATE)
STUDENT = ("student.safetensors", "model.json", "preprocess.safetensors")
SET = ("distilled.safetensors",)
KINDS = {
    "distilled set": Kind(16, _make_set, _set_reader, SET),
    "set signed anew": Kind(10, _make_set, _set_reader, SET, SET, sign_anew),
    "kip checkpoint": Kind(8, _make_kip, _state_reader, (STATE,)),
    "ls checkpoint": Kind(8, _make_label_solve, _state_reader, (STATE,)),
    "kd checkpoint": Kind(8, _make_stopped_training, _state_reader, (STATE,)),
    "student": Kind(12, _make_training, _student_reader, STUDENT),
    "decoded images": Kind(8, _make_decoded, _decoded_reader, ("cache/*/*.npy", "cache/*/*.json")),
    "evaluation results": Kind(6, _make_kept, _kept_reader, ("results/*.json",)),
    "teacher cache": Kind(
        8, _make_teacher_cache, _teacher_cache_reader, ("cache/*/*.json", "cache/*/*/*.safetensors")
    ),
    "evaluation report": Kind(
        6, _make_evaluation, _evaluation_reader, ("report.json",), ("report.json",)
    ),
    "kd report": Kind(
        3,
        _make_training,
        _kd_report_reader,
        (CONFIG, FIGURES, "report.json"),
        (CONFIG, FIGURES, "report.json"),
    ),
    "kd evaluate": Kind(
        2,
        _make_training,
        _kd_evaluate_reader,
        (CONFIG, "recipe.json", *STUDENT),
        (CONFIG, "recipe.json"),
    ),
    ".npz data set": Kind(8, _make_npz, _npz_reader, ("*.npz",), (".npz",)),
    "foreign set": Kind(8, _make_foreign, _foreign_reader, ("*.pt", "*.npz"), (".pt", ".npz")),
    "pictures": Kind(
        10,
        _make_pictures,
        _pictures_reader,
        ("data/*/*",),
        (".png", ".jpg", ".gif", ".tif", ".webp"),
    ),
    ".pt2 program": Kind(2, _make_program, _program_reader, ("*.pt2",), (".pt2",)),
    "kip resumed": Kind(
        0.7, _make_kip, _kip_reader, RUN, (CONFIG, FIGURES), seconds=RESUMED_SECONDS
    ),
    "ls resumed": Kind(
        0.7, _make_label_solve, _label_solve_reader, RUN, (CONFIG, FIGURES), seconds=RESUMED_SECONDS
    ),
    "kd resumed": Kind(
        1,
        _make_stopped_training,
        _training_reader,
        (*RUN, "recipe.json"),
        (CONFIG, FIGURES, "recipe.json"),
        seconds=RESUMED_SECONDS,
    ),
}


# ---- a worker: one kind, file after file


class OutOfTime(BaseException):
    """Raised by the alarm of a file; no `except Exception` catches it."""


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal to the bit, in arrays and in words."""
    if is_dataclass(one) and not isinstance(one, type):
        if type(one) is not type(other):
            return False
        return all(same(getattr(one, f), getattr(other, f)) for f in one.__dataclass_fields__)
    if isinstance(one, np.ndarray):
        alike = isinstance(other, np.ndarray) and one.dtype == other.dtype
        return alike and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        alike = isinstance(other, dict) and one.keys() == other.keys()
        return alike and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        alike = isinstance(other, list | tuple) and len(one) == len(other)
        return alike and all(map(same, one, other))
    return type(one) is type(other) and (one == other or one != one)


def work(
    name: str, out: Path, numbers: Sequence[int], seed: int, send: Callable[..., None]
) -> None:
    """Change and read the files of these numbers, one after the other."""
    kind, trials = KINDS[name], out / "work"
    original = trials / "originals" / _slug(name)
    _DATA[:] = [_data(original)] if original.parent.mkdir(parents=True, exist_ok=True) else []
    if not original.exists():
        made = original.with_name(f"{original.name}-half")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        with _quiet():
            kind.make(made)
        made.rename(original)
    _DATA[:] = [_data(original)]
    read = kind.reader()
    with _quiet():
        trial = _copy(original, trials)
        expected = read(trial)
        trial = _copy(original, trials)
        assert same(expected, read(trial)), f"two readings of an unchanged {name} differ"
    outside: list[str] = []
    _watch(trials.resolve(), outside)
    _limit_memory()
    marker = trials / "MARKER"
    for number in numbers:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
        trial = _copy(original, trials)
        files = sorted({p for pattern in kind.files for p in trial.glob(pattern)})
        file = files[int(rng.integers(len(files)))]
        content, what = kind.change(rng, file.name, file.read_bytes(), str(marker))
        times = file.stat()
        file.write_bytes(content)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        legal = file.name in kind.legal or file.suffix in kind.legal
        kept = _copy(trial, trials, "kept")
        send({"start": number, "file": file.name, "mutation": what})
        outside.clear()
        began = time.monotonic()
        outcome, detail = judge(read, trial, expected, legal=legal, seconds=kind.seconds)
        seconds = time.monotonic() - began
        if outcome == "too long" and name.endswith("resumed") and file.name == CONFIG:
            outcome = "runs on"
        if outside:
            outcome, detail = "outside", outside[0]
        if marker.exists():
            outcome = "marker"
            marker.unlink()
        if outcome not in HELD:
            place = out / "faults" / f"{_slug(name)}-{number}"
            shutil.rmtree(place, ignore_errors=True)
            place.parent.mkdir(exist_ok=True)
            shutil.copytree(kept, place)
        send({"number": number, "outcome": outcome, "detail": detail, "seconds": round(seconds, 3)})


def judge(
    read: Read, trial: Path, expected: Any, *, legal: bool, seconds: float
) -> tuple[str, str]:
    """What becomes of one changed file, and the error or the difference in words."""
    from dsdistill.harness.errors import UserError

    signal.signal(signal.SIGALRM, _out_of_time)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with _quiet():
            value = read(trial)
    except OutOfTime:
        return "too long", ""
    except (UserError, OSError) as error:
        text = str(error)
        return ("refused" if len(text.splitlines()) == 1 else "several lines"), text[:300]
    except MemoryError:
        return "memory", _where()
    except BaseException as error:
        return "traceback", f"{type(error).__name__}: {str(error)[:150]} {_where()}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if same(expected, value):
        return "equal", ""
    return ("other" if legal else "silent difference"), ""


def _where() -> str:
    """The last line of our own code in a traceback."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    root = str(Path(__file__).resolve().parents[1])
    own = [f for f in frames if f.filename.startswith(root) and f.filename != __file__]
    last = (own or frames)[-1]
    return f"({Path(last.filename).name}:{last.lineno} {last.name})"


def _out_of_time(*_: object) -> None:
    raise OutOfTime


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _copy(folder: Path, trials: Path, name: str = "trial") -> Path:
    trial = trials / name
    shutil.rmtree(trial, ignore_errors=True)
    return Path(shutil.copytree(folder, trial))


def _watch(root: Path, outside: list[str]) -> None:
    """Note every file that Python writes, moves or makes outside a folder, and every program."""
    paths = {"os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.symlink": 2}
    started = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")

    def within(path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return True  # a descriptor, opened before
        place = os.path.realpath(os.fsdecode(path))
        return place.startswith(f"{root}{os.sep}") or place == os.devnull

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if (writes or (isinstance(mode, str) and set(mode) & set("wax+"))) and not within(path):
                outside.append(f"open {path}")
        elif event in paths and not all(map(within, arguments[: paths[event]])):
            # Relative to an open folder, as rmtree works: its own path was seen before.
            if arguments[-1] in (-1, None):
                outside.append(f"{event} {arguments[0]}")
        elif event in started:
            outside.append(f"{event} {arguments[0]}")

    sys.addaudithook(hook)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-")


# ---- the campaign: workers, results, and the table


def campaign(names: Sequence[str], count: int, seed: int, out: Path) -> None:
    """Try what is not tried yet, and print the table."""
    results = out / "results.jsonl"
    done = _done(results)
    whole = sum(KINDS[name].share for name in names)
    for name in names:
        total = max(1, round(count * KINDS[name].share / whole))
        while left := [n for n in range(total) if (name, n) not in done]:
            began = time.monotonic()
            before = len(done)
            with results.open("a") as file:
                for line in _worker(name, left, seed, out):
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    done[name, line["number"]] = line
            if len(done) == before:
                raise SystemExit(f"the worker of {name} ended before its first file")
            print(f"{name}: {len(done) - before} in {time.monotonic() - began:.0f} s", flush=True)
    print(table(names, list(done.values())))


def _done(results: Path) -> dict[tuple[str, int], dict[str, Any]]:
    lines = results.read_text().splitlines() if results.exists() else []
    rows = (row for line in lines if (row := _json(line)))  # the last may be cut
    return {(row["kind"], row["number"]): row for row in rows}


def _worker(name: str, numbers: list[int], seed: int, out: Path) -> Iterator[dict[str, Any]]:
    """The results of a worker; of the file in which it crashed or hung, that it did."""
    ours, theirs = os.pipe()
    line = [sys.executable, __file__, "--worker", name, "--out", str(out), "--seed", str(seed)]
    home = (out / "work" / "home").resolve()
    home.mkdir(parents=True, exist_ok=True)
    env = {
        **os.environ,
        "TMPDIR": str(home),
        "MPLCONFIGDIR": str(home),
        "XDG_CACHE_HOME": str(home),
        "DSDISTILL_DATA": str(home),
        "DSDISTILL_CACHE": str(home / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.Popen(
        [*line, "--pipe", str(theirs)], pass_fds=(theirs,), stdin=subprocess.PIPE, env=env
    )
    os.close(theirs)
    assert process.stdin is not None
    process.stdin.write(json.dumps(numbers).encode())
    process.stdin.close()
    current: dict[str, Any] | None = None
    selector = selectors.DefaultSelector()
    with os.fdopen(ours) as pipe:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            wait = 3 * SECONDS if current else 300  # the originals are made first
            if not selector.select(wait):
                process.kill()
                process.wait()
                if current:
                    yield _line(name, current, {"outcome": "too long", "detail": "killed"})
                return
            text = pipe.readline()
            if not text:
                break
            message = json.loads(text)
            if "start" in message:
                current = message
            elif current:
                yield _line(name, current, message)
                current = None
    code = process.wait()
    if current:
        yield _line(name, current, {"outcome": "crash", "detail": f"exit {code}"})


def _line(name: str, start: dict[str, Any], end: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": name,
        "number": start["start"],
        "file": start["file"],
        "mutation": start["mutation"],
        "outcome": end["outcome"],
        "detail": end["detail"],
        "seconds": end.get("seconds"),
    }


def table(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """Tried and held by kind, with the outcomes, as Markdown; faults by cause below it."""
    lines = [f"| kind | tried | held | {' | '.join(HELD)} | faults |", "|---" * 8 + "|"]
    for name in [*names, "all"]:
        mine = [row for row in rows if name in ("all", row["kind"])]
        counts = Counter(row["outcome"] for row in mine)
        held = sum(counts[outcome] for outcome in HELD)
        faults = ", ".join(f"{n} {what}" for what, n in counts.items() if what not in HELD) or "0"
        cells = [name, len(mine), held, *(counts[outcome] for outcome in HELD), faults]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    causes: dict[tuple[str, ...], list[int]] = {}
    for row in rows:
        if row["outcome"] not in HELD:
            where = re.search(r"\(([\w.]+:\d+ \w+)\)$", row["detail"])
            what = row["detail"].split(":")[0] if where else row["detail"][:60]
            cause = (row["kind"], row["file"], row["outcome"], what, where[1] if where else "")
            causes.setdefault(cause, []).append(row["number"])
    found = sorted(causes.items(), key=lambda item: -len(item[1]))
    lines += ["", *(f"{len(n):5} x {' | '.join(c)}  e.g. {n[:3]}" for c, n in found)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Read damaged and crafted files.")
    parser.add_argument("--out", type=Path, default=Path("mutations"))
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated")
    parser.add_argument("--again", help="KIND:NUMBER, tried once more")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--pipe", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if chosen.worker:
        sys.dont_write_bytecode = True
        with os.fdopen(chosen.pipe, "w") as pipe:

            def send(message: dict[str, Any]) -> None:
                pipe.write(json.dumps(message) + "\n")
                pipe.flush()

            work(chosen.worker, out, json.load(sys.stdin), chosen.seed, send)
    elif chosen.again:
        name, _, number = chosen.again.rpartition(":")
        for line in _worker(name, [int(number)], chosen.seed, out):
            print(json.dumps(line, indent=2))
    else:
        campaign(chosen.kinds.split(","), chosen.count, chosen.seed, out)


if __name__ == "__main__":
    main()
