"""Shared by all tests: the commands, what is compiled, the inner loop, where Fashion-MNIST lies."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Tests run side by side: with a thread for each core, each would wait for those of the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from dsdistill.harness.paths import data_root

Command = Callable[..., subprocess.CompletedProcess[str]]

COMPILED = pytest.StashKey[str]()

# Modules of the inner loop, `pytest -m fast`: pure functions, parsers, options, losses, small
# kernels, the rules of the house. A new test of theirs joins by itself; one that takes longer than
# a second is marked `heavy` and stays out.
FAST = {
    "dsdistill": (
        "augment",
        "initial_support",
        "launchers",
        "notation",
        "offsets",
        "ridge",
        "timing",
    ),
    "harness": (
        "controls",
        "distilled_set",
        "folders_page",
        "help",
        "lists",
        "machine",
        "mel_images",
        "metrics",
        "origin",
        "preprocess",
        "protocol",
        "report",
        "run_folder",
        "statistics",
        "wav_files",
    ),
    "kd": (
        "adversary",
        "augment",
        "graph_file",
        "graph_networks",
        "loss_checks",
        "loss_spec",
        "losses_contrastive",
        "losses_feature",
        "losses_graph",
        "losses_relation",
        "losses_response",
        "privacy_accountant",
        "private_votes",
        "quantisers",
        "recipe",
        "synthesis",
        "terms",
    ),
    "project": (
        "empty_values",
        "rooms",
    ),
}
FAST_FILES = {f"{folder}/test_{name}.py" for folder, x in FAST.items() for name in x}
FAST_SECONDS = 1.5  # of processor time, with what the first test of a process imports and compiles


def pytest_configure(config: pytest.Config) -> None:
    """Programs that XLA compiles are shared by the workers and the commands of this run.

    Whoever starts the workers makes the folder: they, and what they start, inherit its name.
    """
    gone = [name for name in sorted(FAST_FILES) if not (Path(__file__).parent / name).is_file()]
    if gone:
        raise pytest.UsageError(f"tests/conftest.py: FAST names modules that are gone: {gone}")
    if not hasattr(config, "workerinput"):
        config.stash[COMPILED] = tempfile.mkdtemp(prefix="dsdistill-compiled-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = config.stash[COMPILED]
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"


def pytest_unconfigure(config: pytest.Config) -> None:
    if COMPILED in config.stash:
        shutil.rmtree(config.stash[COMPILED], ignore_errors=True)


def _is_fast(path: Path) -> bool:
    return f"{path.parent.name}/{path.name}" in FAST_FILES


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The inner loop does not even import the other modules, which takes seconds."""
    if config.option.markexpr != "fast" or not collection_path.name.startswith("test_"):
        return None
    return not _is_fast(collection_path) or None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    began = _processor_seconds()
    try:
        return (yield)
    finally:
        seconds = _processor_seconds() - began
        if item.get_closest_marker("fast") and seconds > FAST_SECONDS:
            item.warn(pytest.PytestWarning(f"{seconds:.1f} s for a fast test: mark it `heavy`"))


def _processor_seconds() -> float:
    """Of this process and those that it has started; other work on the machine does not count."""
    both = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _is_fast(item.path) and not any(map(item.get_closest_marker, ("heavy", "slow"))):
            item.add_marker(pytest.mark.fast)
    if (data_root() / "FashionMNIST" / "raw").is_dir():
        return
    for item in items:
        if item.get_closest_marker("fashion"):
            item.add_marker(pytest.mark.skip(reason=f"no Fashion-MNIST under {data_root()}"))


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded images and kept results stay out of the cache of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C reaches the commands that tests start, also where the tests run in the background.

    A shell starts background jobs with SIGINT ignored, and their children inherit that.
    """
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def dsdistill(tmp_path: Path) -> Command:
    """Runs the command `dsdistill` in this process, in an empty folder."""
    import in_process

    from dsdistill.cli import main

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return in_process.run(main, "dsdistill", arguments, tmp_path)

    return run


@pytest.fixture
def dsdistill_process(tmp_path: Path) -> Command:
    """Runs the installed command `dsdistill` in an empty folder, in a process of its own.

    For what only a process shows: its devices, its speed, its end. It takes seconds to start.
    """

    def run(
        *arguments: object, timeout: float = 300, **options
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [Path(sys.executable).with_name("dsdistill"), *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            **options,
        )

    return run
