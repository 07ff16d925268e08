"""Decisions that one process makes for all, with threads in place of processes."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dsdistill.harness import agreement
from dsdistill.harness.errors import UserError

PROCESSES = 3


def decided(choose: Callable[[], Any]) -> list[Any]:
    """What every process gets, the errors too; the second one decides."""
    sent: list[agreement.Answer] = []
    everyone = threading.Barrier(PROCESSES, timeout=10)

    def process(number: int) -> Any:
        def broadcast(answer: agreement.Answer) -> agreement.Answer:
            if number == 1:
                sent.append(answer)
            everyone.wait()
            return sent[0]

        try:
            return agreement.decide(choose, decides=number == 1, broadcast=broadcast)
        except UserError as error:
            return error

    with ThreadPoolExecutor(PROCESSES) as pool:
        return list(pool.map(process, range(PROCESSES)))


def test_one_process_chooses_for_all() -> None:
    calls = []
    assert decided(lambda: calls.append(1) or "there") == ["there"] * PROCESSES
    assert calls == [1]


@pytest.mark.parametrize("error", [UserError("no such run"), PermissionError(13, "not there")])
def test_its_error_is_raised_in_all(error: Exception) -> None:
    def choose() -> None:
        raise error

    errors = decided(choose)
    assert [type(got) for got in errors] == [UserError] * PROCESSES
    assert {str(got) for got in errors} == {str(error)}
