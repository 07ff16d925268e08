"""Losses as they are written on a command line."""

import pytest

from dsdistill.harness.errors import UserError
from kd.objectives import loss_spec
from kd.objectives.loss_spec import TermSpec


def kd(s, t, *, temperature: float = 4.0): ...


def at(s, t): ...


def cc(s, t, *, order: int = 2): ...


NAMES = {"kd": kd, "at": at, "cc": cc}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kd", [TermSpec("kd")]),
        ("kd:0.5", [TermSpec("kd", 0.5)]),
        ("kd:0.5:temperature=2, cc:order=3", [
            TermSpec("kd", 0.5, {"temperature": 2.0}), TermSpec("cc", None, {"order": 3}),
        ]),
        ("kd:0.5,at:1000@layer2,layer3", [
            TermSpec("kd", 0.5), TermSpec("at", 1000.0, {}, (("layer2",) * 2, ("layer3",) * 2)),
        ]),
        ("at@layer1=blocks.0,layer2=blocks.1,kd:1", [
            TermSpec("at", None, {}, (("layer1", "blocks.0"), ("layer2", "blocks.1"))),
            TermSpec("kd", 1.0),
        ]),
    ],
)  # fmt: skip
def test_what_was_written(text, expected) -> None:
    assert list(loss_spec.parse(text, NAMES)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kdd:1", "unknown loss 'kdd'; did you mean 'kd'"),
        ("", "unknown loss ''"),
        ("kd:much", "a weight must be a number, got 'much'"),
        ("kd:-1", "must be in [1e-09, 1e+09], got -1"),
        ("kd:1:2", "two weights, 1 and 2"),
        ("kd:temprature=2", "unknown parameter of loss kd 'temprature'; did you mean"),
        ("kd:temperature=hot", "temperature must be a number, got 'hot'"),
        ("kd:1,kd:2", "--loss has kd twice"),
        ("at@lay er", "a layer is a name such as layer2"),
        ("at@", "a layer is a name such as layer2"),
        ("kd:1,layer2", "unknown loss 'layer2'"),
    ],
)
def test_what_cannot_be_read(text, message) -> None:
    with pytest.raises(UserError) as error:
        loss_spec.parse(text, NAMES)
    assert message in str(error.value)
