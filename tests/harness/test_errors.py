"""Errors of other libraries as one line."""

import pytest

from dsdistill.harness.errors import first_line, one_line

LONG = RuntimeError("\n  mat1 and  mat2\tdo not fit\nCPU: registered at x.cpp\n")


@pytest.mark.parametrize(
    ("error", "whole", "first"),
    [
        (LONG, "mat1 and mat2 do not fit CPU: registered at x.cpp", "mat1 and mat2 do not fit"),
        (ValueError("one"), "one", "one"),
    ],
)
def test_an_error_is_its_message_or_the_first_line_of_it(error, whole, first) -> None:
    assert (one_line(error), first_line(error)) == (whole, first)
    kind = type(error).__name__
    assert one_line(error, kind=True) == f"{kind}: {whole}"
    assert first_line(error, kind=True) == f"{kind}: {first}"


@pytest.mark.parametrize("line", [one_line, first_line])
@pytest.mark.parametrize("kind", [True, False])
def test_an_error_without_a_message_is_the_name_of_its_class(line, kind: bool) -> None:
    assert line(KeyboardInterrupt(), kind=kind) == "KeyboardInterrupt"
