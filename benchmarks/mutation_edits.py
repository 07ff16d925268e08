"""What `mutations.py` does to a file: bytes at random, or what a file of its kind holds."""

import contextlib
import hashlib
import io
import json
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

DEEP = 20_000  # brackets

Random = np.random.Generator
Changed = tuple[bytes, str]  # content, and what was done to it
Change = Callable[[Random, str, bytes, str], Changed]  # of a file's name and content, with a marker


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
    header, data = _header(content)
    inner, what = _edit_value(rng, json.loads(header["__metadata__"]["dsdistill"]), marker)
    text = _dumps(inner)
    tensors = {}
    for key, entry in header.items():
        if key != "__metadata__":
            begin, end = entry["data_offsets"]
            tensors[key] = np.frombuffer(data[begin:end], "<f4").reshape(entry["shape"])
    header["__metadata__"] = {"dsdistill": text, "sha256": _digest(text, tensors)}
    return _with_header(header, data), what


def _digest(text: str, tensors: dict[str, np.ndarray]) -> str:
    """The checksum of a distilled set, as a stranger who has read how it is made makes it."""
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        array = tensors[name]
        sha.update(f"{name} {array.dtype.str} {array.shape}".encode() + array.tobytes())
    return sha.hexdigest()


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
        other = _renamed(info, str(rng.choice(["../../outside", "/tmp/outside", "x", ""])))
        members[at] = (other, inner)
    elif kind == "add":
        pickled = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
        folder = info.filename.rpartition("/")[0]
        extra = str(rng.choice(["data.pkl", "custom_obj_0", "data/0", "extra/model.json"]))
        members.append((_renamed(info, f"{folder}/{extra}"), pickled))
        what = extra
    else:
        members = [(_deflated(info), inner) for info, inner in members]
    box = io.BytesIO()
    with zipfile.ZipFile(box, "w") as archive, _unsaid():
        for member, written in members:
            archive.writestr(member, written)
    return box.getvalue(), f"{kind} {info.filename} {what}"


def _edit_member(rng: Random, name: str, inner: bytes, marker: str) -> Changed:
    if inner.startswith(b"\x93NUMPY") and rng.random() < 0.7:
        return _edit_npy(rng, inner, marker)
    if _json(inner) is not None:
        return _edit_json(rng, inner, marker)
    if name.endswith(".pkl") and rng.random() < 0.3:
        return f"cos\nsystem\n(S'touch {marker}'\ntR.".encode(), "pickled code"
    return _edit_bytes(rng, inner)


def _renamed(info: zipfile.ZipInfo, name: str) -> zipfile.ZipInfo:
    """A new member of another name."""
    other = zipfile.ZipInfo(name or "?", info.date_time)
    other.compress_type = info.compress_type
    return other


def _deflated(info: zipfile.ZipInfo) -> zipfile.ZipInfo:
    other = _renamed(info, info.filename)
    other.compress_type = zipfile.ZIP_DEFLATED
    return other


@contextlib.contextmanager
def _unsaid() -> Iterator[None]:
    """Within it, zipfile says nothing of names that come twice."""
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
