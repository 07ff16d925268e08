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
import subprocess
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mutation_kinds import CONFIG, KINDS, SECONDS, Read

MEMORY = 2 << 30  # bytes more than a worker has before the first changed file
HELD = ("refused", "equal", "other", "runs on")


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
    if not original.exists():
        made = original.with_name(f"{original.name}-half")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        with _quiet():
            kind.make(made)
        made.rename(original)
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
                log = out / "work" / f"{_slug(name)}.log"
                raise SystemExit(f"the worker of {name} ended before its first file, see {log}")
            print(f"{name}: {len(done) - before} in {time.monotonic() - began:.0f} s", flush=True)
    print(table(names, list(done.values())))


def _done(results: Path) -> dict[tuple[str, int], dict[str, Any]]:
    lines = results.read_text().splitlines() if results.exists() else []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the last may be cut
            rows.append(json.loads(line))
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
    # Decoders of pictures write to standard error themselves.
    with (out / "work" / f"{_slug(name)}.log").open("ab") as log:
        process = subprocess.Popen(
            [*line, "--pipe", str(theirs)],
            pass_fds=(theirs,),
            stdin=subprocess.PIPE,
            stderr=log,
            env=env,
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
    again = [chosen.again.rpartition(":")[0]] if chosen.again else []
    if unknown := {*chosen.kinds.split(","), *again} - set(KINDS):
        parser.error(f"no kind {', '.join(sorted(unknown))}: {', '.join(KINDS)}")
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
