"""Check the sizes of images that an exported program takes: axes with ranges, and conditions.

A condition is the text of an expression. It is parsed and never compiled: this module lists the
nodes that its tree may hold, and evaluates them.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd.models.zoo.exported_archive import NotAllowed, parse_string, printable

SIZE_LIMIT = 2**63  # every size is below it


@dataclass(frozen=True)
class ImageAxis:
    """The allowed sizes of the images along one axis: `factor` times a number in a range.

    Attributes:
        factor: Factor of the number; the size itself if there is no symbol.
        symbol: Name of the number; axes with the same name have the same number.
        low, high: Smallest and largest value of the number.
    """

    factor: int
    symbol: str | None = None
    low: int = 0
    high: int = SIZE_LIMIT


def parse_axis(size: Mapping[str, Any], ranges: Mapping[str, Any]) -> ImageAxis:
    """Parse a size of the images: a number, a symbol, or a multiple of a symbol.

    Args:
        size: The size in the program's JSON.
        ranges: The program's `range_constraints`.

    Raises:
        NotAllowed: For anything else.
    """
    if "as_int" in size:
        number = size["as_int"]
        if type(number) is not int or number < 0:
            raise NotAllowed(f"the size {printable(number)} is not allowed")
        return ImageAxis(number)
    text = parse_string(size["as_expr"]["expr_str"])
    symbol = r"Symbol\('([A-Za-z_][A-Za-z_0-9]*)', positive=True, integer=True\)"
    match = re.fullmatch(rf"(?:Mul\(Integer\(([1-9][0-9]{{0,8}})\), {symbol}\)|{symbol})", text)
    if match is None:
        raise NotAllowed(f"the size {printable(text)} is not allowed")
    name = match[2] or match[3]
    limits = ranges.get(name) or {}
    low, high = limits.get("min_val"), limits.get("max_val")
    # torch writes 2 for every free size, and runs such a program on one image too.
    low = low if type(low) is int and low > 2 else 0
    return ImageAxis(int(match[1] or 1), name, low, high if type(high) is int else SIZE_LIMIT)


def parse_condition(text: object) -> ast.expr:
    """Parse a condition: integers, sizes, + - * // %, min, max, comparisons, and, or.

    Raises:
        NotAllowed: For anything else.
    """
    if not isinstance(text, str) or len(text) > 10_000:
        raise NotAllowed(f"the condition {printable(text)} is not allowed")
    try:
        condition = ast.parse(text, mode="eval").body
        _evaluate(condition, None)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NotAllowed(f"the condition {printable(text)} is not allowed") from error
    return condition


def check(axes: Sequence[ImageAxis], conditions: Sequence[ast.expr], shape: Sequence[int]) -> None:
    """Refuse images that the program was not exported for.

    Raises:
        ValueError: If the size breaks a range or a condition.
    """
    text = "x".join(map(str, shape))
    if len(shape) != len(axes):
        raise ValueError(f"it takes {len(axes)} axes, got {text}")
    numbers: dict[str, int] = {}
    for size, axis in zip(shape, axes, strict=True):
        if axis.symbol is None:
            fits = size == axis.factor
        else:
            number = size // axis.factor
            fits = size % axis.factor == 0 and axis.low <= number <= axis.high
            fits = fits and numbers.setdefault(axis.symbol, number) == number
        if not fits:
            raise ValueError(f"it was exported for other sizes than {text}")
    for condition in conditions:
        if not _evaluate(condition, shape):
            raise ValueError(f"{ast.unparse(condition)[:200]} is false for {text}")


def require_below_limit(value: Any) -> Any:
    """Return the value; refuse an integer as large as `SIZE_LIMIT`.

    Raises:
        ValueError: If it is too large.
    """
    if isinstance(value, int) and abs(value) >= SIZE_LIMIT:
        raise ValueError("a number in it is too large")
    return value


_BINARY: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE: Mapping[type, Callable[[int, int], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_SIZE_PATTERN = re.compile(r"L\['[A-Za-z_][A-Za-z_0-9]*'\](?:\[0\])?\.size\(\)\[([0-3])\]")


def _evaluate(node: ast.expr, shape: Sequence[int] | None) -> Any:
    """Evaluate a condition for images of a shape; without a shape, only check the grammar.

    Raises:
        ValueError: If the grammar does not hold.
    """
    match node:
        case ast.Constant(value=int() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, shape)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            a, b = _evaluate(left, shape), _evaluate(right, shape)
            return 1 if shape is None else require_below_limit(_BINARY[type(op)](a, b))
        case ast.BoolOp(op=op, values=parts):
            values = [_evaluate(part, shape) for part in parts]
            return all(values) if isinstance(op, ast.And) else any(values)
        case ast.Compare(left=left, ops=ops, comparators=rest) if all(
            type(op) in _COMPARE for op in ops
        ):
            values = [_evaluate(value, shape) for value in (left, *rest)]
            pairs = zip(ops, values, values[1:], strict=False)
            return all(_COMPARE[type(op)](a, b) for op, a, b in pairs)
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="torch"), attr="sym_max" | "sym_min" as name),
            args=[_, *_] as args,
            keywords=[],
        ):
            return (max if name == "sym_max" else min)(_evaluate(arg, shape) for arg in args)
        case ast.Subscript():
            match_ = _SIZE_PATTERN.fullmatch(ast.unparse(node))
            if match_:
                return 1 if shape is None else shape[int(match_[1])]
    raise ValueError("it is not a condition on sizes")
