"""Kill runs at random moments, resume them, and compare them with runs that nobody disturbed.

    python benchmarks/kills.py --root runs/kills --kills 1000        an hour on two cores
    python benchmarks/kills.py --root runs/kills --kills 20 kip-fc kd-mlp       the ones named

A trial starts a small run of `dsdistill kip`, `dsdistill ls` or `kd train` on digits, or of `kd
train` on made-up texts with random teachers, ends it with
SIGKILL, SIGTERM or SIGINT at a moment drawn uniformly over its undisturbed duration, resumes it,
and so on, up to three times; then lets it finish. It holds if the arrays, the figures and
`metrics.jsonl` are those of the undisturbed run to the bit, nothing is left behind (but the file of
the lock, which holds nobody, where SIGKILL came after the last file), and no start
wrote a traceback, an ignored exception or a RuntimeWarning. Each trial is a line of
ROOT/results.jsonl; a campaign that is stopped goes on there. The last lines are a table: kills
tried, and kills of trials that held.

Every start is a fork of one process that has imported everything and started no thread: half a
second instead of five. Checkpoints are written ten times a second, and Label Solve reads its
targets in small chunks, so that there is something to tear.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_threads] = "1"  # before NumPy is imported: a fork has none of its parent's threads

import numpy as np  # noqa: E402
import safetensors  # noqa: E402

CONFIGURATIONS = {  # name: command line without --out; {texts} and {own} are folders
    "kip-fc": "dsdistill kip digits --images-per-class 1 --steps 60 --target-batch 100",
    "kip-labels": "dsdistill kip digits --images-per-class 1 --steps 40 --target-batch 100 "
    "--kernel fc,fc(2) --learn-labels --augment shift --warm-up fc(2):10 --schedule cosine",
    "kip-newton": "dsdistill kip digits --images-per-class 1 --steps 10 --target-batch 100 "
    "--optimizer gauss-newton --damping 0.1",
    "ls-fc": "dsdistill ls digits --images-per-class 5",
    "ls-conv": "dsdistill ls digits --images-per-class 1 --kernel conv",
    "kd-mlp": "kd train digits --student mlp:16 --epochs 12 --batch-size 64",
    "kd-convnet": "kd train digits --student convnet:4 --epochs 3 --batch-size 128",
    "text-copies": "kd train {texts} --student bilstm:8 --teacher hf:{texts}/bert --recipe bilstm "
    "--copies 4 --epochs 2 --batch-size 32 --cache {own}",
    "text-stages": "kd train {texts} --student bert:1x8 --teacher hf:{texts}/bert --recipe tinybert"
    " --batch-size 32",
    "text-mlm": "kd train {texts} --task mlm --student hf:{texts}/bert --epochs 4 --batch-size 16",
    "text-policy": "kd train {texts} --task causal --student hf:{texts}/writer --teacher "
    "hf:{texts}/writer2 --recipe gkd --max-length 24 --epochs 2 --batch-size 32",
}
RESULTS = {"dsdistill": "distilled.safetensors", "kd": "report.json"}  # the mark of a finished run
WEIGHTS = {"dsdistill": "distilled.safetensors", "kd": "student.safetensors"}
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TEXTS = "texts"  # folder in ROOT with texts and models
KILLS = 3  # at most, in a trial
PATIENCE = 120.0  # seconds in which a run must end after a signal
CHECKPOINT_EVERY = 0.1  # seconds
CHUNK = 60  # targets that Label Solve reads at a time
CLOCKS = {  # figures that differ from run to run
    "images_per_second",
    "latency_ms_batch_1",
    "pairs_per_second",
    "peak_memory",
    "seconds",
    "sha256",  # of files that hold such figures
    "startup_seconds",
    "texts_per_second",
    "tokens_per_second",
}


class End(NamedTuple):
    """How a start ended.

    Attributes:
        code: Exit code; negative for a signal.
        error: What it wrote on standard error.
        killed: Whether a signal was sent before it ended by itself.
    """

    code: int
    error: str
    killed: bool


@dataclass(frozen=True)
class Trial:
    """One run that is killed and resumed until it is finished."""

    configuration: str
    number: int
    folder: Path

    @property
    def line(self) -> list[str]:
        texts, own = self.folder.parent.resolve() / TEXTS, self.own.resolve()
        return CONFIGURATIONS[self.configuration].format(texts=texts, own=own).split()

    @property
    def own(self) -> Path:
        """What the run keeps outside its folder, such as copies of texts."""
        return self.folder.with_name(f"{self.folder.name}.kept")

    def remove(self) -> None:
        """Remove all of the run, with the earlier trainings of its chain."""
        chain = self.folder.parent.glob(f"{self.folder.name}-*")
        for path in (self.folder, self.own, *chain):
            shutil.rmtree(path, ignore_errors=True)

    @property
    def program(self) -> str:
        return self.line[0]

    @property
    def finished(self) -> bool:
        return (self.folder / RESULTS[self.program]).exists()

    def words(self) -> list[str]:
        """The command line of the next start."""
        if (self.folder / "config.json").exists():
            return [*self.line[:2], "--resume", "--out", str(self.folder)]
        return [*self.line, "--out", str(self.folder)]


def preload() -> None:
    """Import all that the commands import, and make checkpoints frequent."""
    import kd.cli  # noqa: F401
    from dsdistill.loops import checkpoints
    from dsdistill.methods import label_solve
    from dsdistill.parallel import devices  # noqa: F401
    from kd.commands import train  # noqa: F401
    from kd.training import saving

    checkpoints.SECONDS_BETWEEN_CHECKPOINTS = CHECKPOINT_EVERY
    saving.MAX_SECONDS_BETWEEN_CHECKPOINTS = CHECKPOINT_EVERY
    label_solve.CHUNK = label_solve.MAX_CHUNK_PAIRS = CHUNK


def write_texts(folder: Path) -> None:
    """Write made-up sentences with classes, and random models for them."""
    import torch
    import transformers

    from kd.models.language import tokenizer

    letters = "abcdefghij"
    rng = np.random.default_rng(0)
    for part, n in (("train", 160), ("dev", 40), ("test", 40)):
        texts = [" ".join(rng.choice(list(letters), k)) for k in rng.integers(2, 9, n)]
        rows = [f"{text}\t{'yes' if 'a' in text else 'no'}" for text in texts]
        folder.mkdir(exist_ok=True)
        (folder / f"{part}.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    sizes: dict[str, Any] = {
        "vocab_size": 16,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 32,
    }
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **names))
    models: dict[str, tuple[Any, Any]] = {
        "bert": (bert, transformers.BertTokenizer(vocab=vocabulary))
    }
    characters = tokenizer.train_on_characters([f"{letters} "])
    config = transformers.LlamaConfig(**{**sizes, "vocab_size": len(characters)})
    for name in ("writer", "writer2"):
        models[name] = (transformers.LlamaForCausalLM(config), characters)
    for name, (model, tokens) in models.items():
        model.save_pretrained(folder / name)
        tokens.save_pretrained(folder / name)


def execute(words: list[str], log: Path) -> NoReturn:
    """Run a command line in this process, which is a fork, and end it."""
    import kd.cli
    from dsdistill import cli

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    sys.argv = words
    code = 0
    try:
        (cli if words[0] == "dsdistill" else kd.cli).main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 99
    os._exit(code)


def start(words: list[str], log: Path, after: float | None = None, number: int = 0) -> End:
    """Fork a command line; send it a signal some seconds later, if it is still there."""
    child = os.fork()
    if child == 0:
        execute(words, log)
    began, killed = time.monotonic(), False
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        passed = time.monotonic() - began
        if ended:
            break
        if after is not None and not killed and passed > after:
            os.kill(child, number)
            killed, began = True, time.monotonic()
        elif killed and passed > PATIENCE:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return End(98, f"did not end {PATIENCE:.0f} s after the signal", True)
        time.sleep(0.002)
    return End(os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), killed)


def complaint(end: End, number: int) -> str | None:
    """What is wrong with the way a start ended; None if nothing is."""
    for word in ("Traceback", "Exception ignored", "RuntimeWarning"):
        if word in end.error:
            return f"{word}: {end.error[-2000:]}"
    if end.code == 0 or (end.killed and end.code == -number):
        return None
    if end.killed and number != signal.SIGKILL and end.code == 1:
        return None  # stopped in good order
    return f"exit code {end.code}: {end.error[-2000:]}"


def content(folder: Path, program: str) -> dict[str, Any]:
    """All of a finished run that a kill must not change."""
    with safetensors.safe_open(folder / WEIGHTS[program], framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    found: dict[str, Any] = {
        name: (str(a.dtype), a.shape, a.tobytes()) for name, a in arrays.items()
    }
    if program == "dsdistill":
        found["figures"] = json.loads(metadata["dsdistill"])["provenance"]["metrics"]
    else:
        found["figures"] = _without_clocks(json.loads((folder / "report.json").read_bytes()))
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    found["metrics.jsonl"] = [_without_clocks(json.loads(line)) for line in lines]
    return found


def _without_clocks(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name not in CLOCKS}


def run(trial: Trial, reference: dict[str, Any], seconds: float, seed: int) -> dict[str, Any]:
    """Do one trial; the folder stays only if it does not hold."""
    names = list(CONFIGURATIONS)
    rng = np.random.default_rng([seed, names.index(trial.configuration), trial.number])
    trial.remove()
    log, kills, wrong, cut = trial.folder.with_suffix(".log"), [], None, False
    while not trial.finished and wrong is None:
        last = len(kills) == KILLS
        number = int(rng.choice([int(n) for n in SIGNALS]))
        after = None if last else float(rng.uniform(0, seconds))
        end = start(trial.words(), log, after, number)
        cut = end.killed and number == signal.SIGKILL
        if end.killed:
            kills.append([signal.Signals(number).name, round(after or 0.0, 3)])
        wrong = complaint(end, number)
        if wrong is None and not end.killed and not trial.finished:
            wrong = f"ended without a result: {end.error[-2000:]}"
    if wrong is None:
        wrong = difference(trial, reference, cut=cut)
    if wrong is None:
        trial.remove()
        log.unlink(missing_ok=True)
    return {
        "configuration": trial.configuration,
        "trial": trial.number,
        "kills": kills,
        "held": wrong is None,
        "wrong": wrong,
    }


def difference(trial: Trial, reference: dict[str, Any], *, cut: bool) -> str | None:
    """How a finished run differs from the undisturbed one, or what it left behind.

    Args:
        trial: The run.
        reference: The undisturbed one.
        cut: Whether SIGKILL came after its last file: the file of the lock, which then locks
            nothing, may be there.
    """
    left = [path.name for path in trial.folder.rglob(".*") if not (cut and path.name == ".lock")]
    if left:
        return f"left behind: {left}"
    found = content(trial.folder, trial.program)
    if found.keys() != reference.keys():
        return f"names differ: {sorted(found.keys() ^ reference.keys())}"
    different = [name for name in found if found[name] != reference[name]]
    return f"differ: {different}" if different else None


def undisturbed(name: str, root: Path) -> tuple[dict[str, Any], float]:
    """The content of a run that was never stopped, and the seconds that it takes.

    The second of two runs is timed: the first one fills the cache of compiled programs.
    """
    seconds, contents = 0.0, []
    for i in range(2):
        trial = Trial(name, i, root / f"undisturbed-{name}-{i}")
        trial.remove()
        began = time.monotonic()
        end = start(trial.words(), trial.folder.with_suffix(".log"))
        seconds = time.monotonic() - began
        if end.code or not trial.finished:
            raise SystemExit(f"{name} fails undisturbed: {end.error}")
        contents.append(content(trial.folder, trial.program))
    different = [key for key in contents[1] if contents[0].get(key) != contents[1][key]]
    if different:
        raise SystemExit(f"{name} is not deterministic: two undisturbed runs differ in {different}")
    return contents[1], seconds


def stored(results: Path) -> list[dict[str, Any]]:
    """The trials so far; a line that was being written at a kill is none."""
    found = []
    for line in results.read_text().splitlines() if results.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def campaign(names: list[str], root: Path, kills: int, seed: int, jobs: int) -> None:
    """Do trials, in turn of every configuration, until there are enough kills."""
    results = root / "results.jsonl"
    references = {name: undisturbed(name, root) for name in names}
    for name, (_, seconds) in references.items():
        print(f"{name}: {seconds:.1f} s undisturbed", flush=True)
    workers = []
    for worker in range(jobs):
        child = os.fork()
        if child == 0:
            work(names, root, kills, seed, references, worker, jobs)
            os._exit(0)
        workers.append(child)
    for child in workers:
        os.waitpid(child, 0)
    table(stored(results))


def work(
    names: list[str],
    root: Path,
    kills: int,
    seed: int,
    references: dict[str, tuple[dict[str, Any], float]],
    worker: int,
    jobs: int,
) -> None:
    """Every `jobs`-th trial that is not done yet."""
    results = root / "results.jsonl"
    number = 0
    while sum(len(row["kills"]) for row in stored(results)) < kills:
        rows = stored(results)
        done = {(row["configuration"], row["trial"]) for row in rows}
        for name in names:
            if number % jobs == worker and (name, number) not in done:
                reference, seconds = references[name]
                trial = Trial(name, number, root / f"{name}-{number}")
                row = run(trial, reference, seconds, seed)
                with results.open("a") as file:  # one write: the lines of two workers never mix
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row)[:200], flush=True)
        number += 1


def table(rows: list[dict[str, Any]]) -> None:
    """Print kills tried and held, by configuration and by signal."""
    print(f"{'':12}{'trials':>8}{'kills':>8}{'held':>8}")
    names = dict.fromkeys(row["configuration"] for row in rows)
    for name in [*names, *(number.name for number in dict.fromkeys(SIGNALS)), "all"]:
        trials, tried, held = 0, 0, 0
        for row in rows:
            if name in (row["configuration"], "all"):
                count = len(row["kills"])
            else:
                count = sum(kill[0] == name for kill in row["kills"])
            trials += count > 0 or name in (row["configuration"], "all")
            tried, held = tried + count, held + count * row["held"]
        print(f"{name:12}{trials:8}{tried:8}{held:8}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CONFIGURATIONS)}; default: all")
    parser.add_argument("--root", type=Path, default=Path("runs/kills"))
    parser.add_argument("--kills", type=int, default=100, help="in all, with those done before")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(CONFIGURATIONS):
        parser.error(f"unknown configurations: {', '.join(sorted(unknown))}")
    arguments.root.mkdir(parents=True, exist_ok=True)
    # Compiled programs are kept: every start compiles the same ones.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str((arguments.root / "compiled").resolve())
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    preload()
    write_texts(arguments.root / TEXTS)
    names = arguments.names or list(CONFIGURATIONS)
    campaign(names, arguments.root, arguments.kills, arguments.seed, arguments.jobs)


if __name__ == "__main__":
    main()
