"""The notation of convolutional networks."""

import math

import pytest

from dsdistill.harness.errors import UserError
from dsdistill.kernels.notation import Architecture, Stage, is_notation, parse


@pytest.mark.parametrize(
    ("text", "layers", "head"),
    [
        ("3xCRP-flatten", "CRPCRPCRP", "flatten"),
        ("CR-3xCRP-flatten", "CRCRPCRPCRP", "flatten"),
        ("CR-2xCRP-CR-gap", "CRCRPCRPCR", "gap"),
        ("CCRP-CPR-flatten", "CCRPCPR", "flatten"),
        ("P-CRP-flatten", "PCRP", "flatten"),
        ("1xCR-gap", "CR", "gap"),
        ("10xC-flatten", "C" * 10, "flatten"),
        ("C-R-flatten", "CR", "flatten"),
        ("CP-gap", "CP", "gap"),
        ("flatten", "", "flatten"),
        ("gap", "", "gap"),
    ],
)
def test_notation(text, layers, head):
    assert parse(text) == Architecture(layers, head)
    assert is_notation(text)


def test_deviations():
    assert (parse("gap").w_std, parse("gap").b_std) == (math.sqrt(2), 0.1)
    assert parse("CR-flatten", w_std=1.5, b_std=0.0) == Architecture("CR", "flatten", 1.5, 0.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "CR",
        "3xCRP",
        "conv-flatten",
        "crp-flatten",
        "CRX-flatten",
        "3x-flatten",
        "0xCR-flatten",
        "100xCR-flatten",
        "-2xCR-flatten",
        "xCR-flatten",
        "CR--flatten",
        "CR-flatten-",
        "flatten-CR",
        "CR-flatten-gap",
        "CR flatten",
        "CR\n-flatten",
        "CR-Flatten",
    ],
)
def test_what_is_not_a_sequence_is_refused(text):
    with pytest.raises(UserError) as caught:
        parse(text)
    message = str(caught.value)
    assert "\n" not in message
    assert repr(text) in message
    for part in ("CR-3xCRP-flatten", "convolution", "ReLU", "average pooling", "flatten or gap"):
        assert part in message
    assert "module:attribute" in message


@pytest.mark.parametrize(
    "text",
    [
        "R-flatten",
        "RC-gap",
        "P-R-flatten",
        "CRR-flatten",
        "CR-RC-gap",
        "CRPR-flatten",
        "2xCRPR-gap",
    ],
)
def test_a_relu_needs_a_convolution_before_it(text):
    with pytest.raises(UserError, match="ReLU without a convolution") as caught:
        parse(text)
    assert "\n" not in str(caught.value)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3xCRP-flatten", True),
        ("CR", True),  # a head is missing: better said by `parse` than by the table of names
        ("X-flatten", True),
        ("fc", False),
        ("convnet3", False),
        ("my_network:flatten", False),
    ],
)
def test_what_is_meant_as_a_sequence(text, expected):
    assert is_notation(text) is expected


def test_levels_split_at_poolings_and_stages_at_convolutions():
    conv, both, relu = Stage(True, False), Stage(True, True), Stage(False, True)
    assert parse("CCRP-CPR-flatten").levels == ((conv, both), (conv,), (relu,))
    assert parse("P-CRP-flatten").levels == ((), (both,), ())
    assert parse("flatten").levels == ((),)
    assert parse("CR-2xCRP-CR-gap").levels == ((both, both), (both,), (both,))


@pytest.mark.parametrize(
    ("text", "pixels"), [("flatten", 1), ("2xCR-gap", 1), ("CP-gap", 2), ("CR-3xCRP-flatten", 8)]
)
def test_smallest_image(text, pixels):
    assert parse(text).min_size == pixels
