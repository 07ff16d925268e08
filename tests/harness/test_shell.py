"""Command lines to copy, read again as a shell reads them."""

import shlex
from pathlib import Path

import pytest

from dsdistill.harness import shell

DEFAULTS = {"rate": 0.1, "loud": False, "flip": None, "sizes": (1, 2), "out": None}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (DEFAULTS, []),
        ({"loud": True, "flip": True}, ["--loud", "--flip", "True"]),
        ({"flip": False}, ["--flip", "False"]),
        ({"sizes": [3, 4]}, ["--sizes", "3", "4"]),
        ({"rate": 1e-9, "min_size": 3}, ["--rate", "1e-09", "--min-size", "3"]),
        ({"out": Path("a b; rm c")}, ["--out", "a b; rm c"]),
        ({"out": Path("-x"), "rate": -1}, ["--out=-x", "--rate", "-1"]),
    ],
)
def test_a_line_has_the_options_that_differ(options, words) -> None:
    assert shlex.split(shell.line("kd train", options, DEFAULTS)) == ["kd", "train", *words]


def test_an_argument_is_no_option() -> None:
    assert shell.line("kd train", {}, {}, "--out") == "kd train ./--out"


def test_a_resume_is_of_the_command_and_its_folder() -> None:
    line = shell.resume_line("dsdistill evaluate", Path("a run"), "set")
    assert line == "dsdistill evaluate set --resume --out 'a run'"


def test_a_line_to_resume_names_the_code_that_is_imported() -> None:
    code = "net:Net(width=2)"
    line = shell.resume_line("kd train", Path("run"), trust_module=code, kernel=None)
    assert line == f"kd train --resume --out run --trust-module '{code}'"
