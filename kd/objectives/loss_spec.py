"""Parse a loss from the command line: `ce:0.1,kd:0.9:temperature=4,at:1000@layer2,layer3`.

    loss   = term, term, ...
    term   = NAME [:WEIGHT] [:PARAMETER=VALUE ...] [@LAYER, LAYER, ...]
    LAYER  = NAME of a layer in student and teacher, or STUDENT_LAYER=TEACHER_LAYER; the number of
             a block of a transformer is a name too

A number may be a fraction, such as 5/6. The text after a comma is another term if it begins with
the name of one, and otherwise another layer of the term before. The range of a parameter is an
annotation of the term's function, see `kd.losses.ranges`; without one, any number of 0 or more is
allowed.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dsdistill.harness.errors import UserError, unknown_name
from kd import numbers
from kd.losses.ranges import Range

LayerPair = tuple[str, str]  # a layer of the student and one of the teacher
WEIGHT_RANGE = Range(1e-9, 1e9)


@dataclass(frozen=True)
class TermSpec:
    """A parsed term.

    Attributes:
        name: Name in the table of `kd.objectives.terms`.
        weight: Factor of the term; None for the default weight.
        parameters: Keyword arguments of the term's function.
        layers: Pairs of layers, for terms of features.
    """

    name: str
    weight: float | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[LayerPair, ...] = ()


def parse(text: str, names: Mapping[str, Callable[..., Any]]) -> tuple[TermSpec, ...]:
    """Parse the terms of a loss.

    Args:
        text: The loss as on the command line.
        names: The known terms, and for each the function whose keyword-only arguments are its
            parameters.

    Raises:
        UserError: For an unknown term or parameter, a text that is not a number, a number out of
            its range, or the same term or parameter twice.
    """
    specs: list[TermSpec] = []
    for piece in map(str.strip, text.split(",")):
        head, at, layers = piece.partition("@")
        name = head.partition(":")[0]
        if name in names:
            specs.append(_parse_term(head, names[name]))
            if at:
                specs[-1] = replace(specs[-1], layers=(_parse_layer_pair(layers, piece),))
        elif specs and specs[-1].layers and ":" not in piece and not at:
            specs[-1] = replace(
                specs[-1], layers=(*specs[-1].layers, _parse_layer_pair(piece, piece))
            )
        else:
            raise unknown_name("loss", name, names)
    twice = {s.name for s in specs if [t.name for t in specs].count(s.name) > 1}
    if twice:
        raise UserError(f"--loss has {min(twice)} twice: give it once, with all its layers")
    return tuple(specs)


def _parse_term(head: str, function: Callable[..., Any]) -> TermSpec:
    name, *rest = head.split(":")
    weight, values = None, {}
    known = parameters(function)
    for part in rest:
        key, equals, value = part.partition("=")
        if not equals:
            if weight is not None:
                raise UserError(f"--loss {head}: two weights, {weight:g} and {part}")
            what = f"--loss {head}: a weight"
            weight = _parse_number(part, what)
            if weight == 0:
                raise UserError(f"--loss {head}: a term of weight 0 has no effect: leave it out")
            _require_within(WEIGHT_RANGE, weight, what)
            continue
        if key not in known:
            raise unknown_name(f"parameter of loss {name}", key, known)
        if key in values:
            raise UserError(f"--loss {head}: {key} occurs twice: give it once")
        what, allowed = f"--loss {head}: {key}", parameter_range(function, key)
        number = _parse_number(value, what)
        if allowed is not None:
            _require_within(allowed, number, what)
        elif not 0 <= number < float("inf"):
            raise UserError(f"{what} must be 0 or more and finite, got {value}")
        if isinstance(known[key], int) and number != int(number):
            raise UserError(f"{what} must be a whole number, got {value}")
        values[key] = int(number) if isinstance(known[key], int) else number
    return TermSpec(name, weight, values)


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only arguments of a loss and their defaults, which are numbers."""
    arguments = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in arguments if p.kind is p.KEYWORD_ONLY}


def parameter_range(function: Callable[..., Any], name: str) -> Range | None:
    """The range in the annotation of a keyword-only argument; None without one."""
    annotation = inspect.signature(function).parameters[name].annotation
    notes = getattr(annotation, "__metadata__", ())
    return next((note for note in notes if isinstance(note, Range)), None)


def _require_within(allowed: Range, value: float, what: str) -> None:
    if value not in allowed:
        raise UserError(f"{what} must be {allowed}, got {value:g}")


def _parse_number(text: str, what: str) -> float:
    try:
        return numbers.parse(text)
    except ValueError as error:
        raise UserError(f"{what} must be a number, got {text!r}") from error


def _parse_layer_pair(text: str, piece: str) -> LayerPair:
    if not re.fullmatch(r"-?[\w.]+(=-?[\w.]+)?", text):
        raise UserError(
            f"--loss {piece}: a layer is a name such as layer2 or blocks.3, or two as in "
            f"layer2=blocks.3 (student=teacher), got {text!r}"
        )
    student, _, teacher = text.partition("=")
    return student, teacher or student
