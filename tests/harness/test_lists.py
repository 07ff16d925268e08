"""Comma-separated names."""

import pytest

from dsdistill.harness import lists
from dsdistill.harness.errors import UserError


def test_commas_within_brackets_do_not_split():
    assert lists.parse_names("--kernel", "conv(2), fc(3),seq(a,(b,c)),[x,y]") == [
        "conv(2)",
        "fc(3)",
        "seq(a,(b,c))",
        "[x,y]",
    ]


def test_an_unbalanced_bracket_is_left_to_whoever_knows_the_names():
    assert lists.parse_names("--kernel", "fc),conv") == ["fc)", "conv"]
    assert lists.parse_names("--kernel", "fc(3,conv") == ["fc(3,conv"]


def test_empty_lists():
    assert lists.parse_names("--controls", " , ", empty=True) == []
    with pytest.raises(UserError, match="--kernel must name at least one"):
        lists.parse_names("--kernel", ",")


def test_a_name_that_comes_twice():
    with pytest.raises(UserError, match="--kernel names one twice: fc, fc"):
        lists.parse_names("--kernel", "fc, fc")
