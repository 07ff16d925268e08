"""Shared by all tests: the real command lines, and where Fashion-MNIST lies."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Tests run side by side: with a thread for each core, each would wait for those of the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from dsdistill.harness.paths import data_root

Command = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
    """Runs the installed command `dsdistill` in an empty folder."""

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
