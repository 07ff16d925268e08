"""A graph of `torch.export`, run node by node: operators by an allow-list, arguments by their type.

A node names an operator of `aten` and its arguments. Those of `OPERATORS` compute tensors from
tensors and touch nothing else: no file, no process, no library, no memory that they do not check.
Sizes are integers that `SYMBOLIC` computes; conditions on the sizes of the images are comparisons
of such integers. Nothing is evaluated, looked up by a path, or compiled.
"""

import ast
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsdistill.harness.errors import UserError
from kd.zoo.exported_archive import DTYPES, STRIDED, NotAllowed, shown

# What networks for images are exported to: those of kd, timm, torchvision and transformers, and
# their close relatives. Names that end in _ change their first argument, an intermediate result.
# Left out are operators that read or write files, print, draw random numbers, give uninitialised
# memory or trust indices without a check.
_NAMES = """
_adaptive_avg_pool2d _log_softmax _native_batch_norm_legit_no_training _softmax _to_copy
_unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact2d abs abs_
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d add add_ addcdiv addcmul addcmul_
addmm alias all amax amin any arange argmax argmin argsort as_strided atan atan2 avg_pool1d
avg_pool2d baddbmm batch_norm bitwise_and bitwise_not bitwise_or bitwise_xor bmm
broadcast_tensors broadcast_to cat ceil celu channel_shuffle chunk clamp clamp_ clamp_max
clamp_min clone col2im concat constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose2d
convolution copy copy_ cos cosh cumprod cumsum detach detach_ diag diagonal diff div div_ dot
dropout dropout_ dsplit einsum elu elu_ embedding eq erf exp expand expand_as expm1 eye
feature_dropout fill_ flatten flip floor floor_divide fmod full full_like gather ge gelu gelu_
glu grid_sampler group_norm gt hardshrink hardsigmoid hardsigmoid_ hardswish hardswish_ hardtanh
hardtanh_ hsplit im2col index index_select instance_norm isfinite isinf isnan layer_norm le
leaky_relu leaky_relu_ lerp lift_fresh_copy linalg_vector_norm linear linspace log log10 log1p
log2 log_sigmoid log_softmax logical_and logical_not logical_or logical_xor logsumexp lt
masked_fill masked_fill_ matmul max max_pool1d max_pool2d max_pool2d_with_indices maximum mean
meshgrid min minimum mish mish_ mm movedim mul mul_ multiply mv narrow native_group_norm
native_layer_norm ne neg new_full new_ones new_zeros norm one_hot ones ones_like outer pad
permute pixel_shuffle pixel_unshuffle pow prelu prod reciprocal reflection_pad1d
reflection_pad2d relu relu6 relu6_ relu_ remainder repeat repeat_interleave replication_pad2d
reshape reshape_as rms_norm roll rot90 round rsqrt rsub scalar_tensor
scaled_dot_product_attention scatter select selu selu_ sigmoid sigmoid_ sign silu silu_ sin sinh
slice softmax softplus softshrink sort split split_with_sizes sqrt square squeeze stack std sub
sub_ sum swapaxes sym_numel sym_size sym_stride t tan tanh tanh_ tensor_split threshold
threshold_ tile to topk transpose tril triu true_divide type_as unbind unflatten unfold
unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_nearest2d var var_mean view view_as
vsplit where zero_ zeros zeros_like
"""
OPERATORS = frozenset(_NAMES.split())
ASSERTIONS = frozenset({"_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size"})
SKIPPED = "_assert_tensor_metadata"  # of dtype and device, which an operator checks itself
INTEGERS = 2**63  # below which a size lies
BYTES = 2**33  # that a result may take

Number = int | float | bool
SYMBOLIC: Mapping[str, Callable[..., Any]] = {
    "_operator.add": operator.add,
    "_operator.sub": operator.sub,
    "_operator.mul": operator.mul,
    "_operator.floordiv": operator.floordiv,
    "_operator.truediv": operator.truediv,
    "_operator.mod": operator.mod,
    "_operator.neg": operator.neg,
    "_operator.pos": operator.pos,
    "_operator.eq": operator.eq,
    "_operator.ne": operator.ne,
    "_operator.lt": operator.lt,
    "_operator.le": operator.le,
    "_operator.gt": operator.gt,
    "_operator.ge": operator.ge,
    "_operator.and_": operator.and_,
    "_operator.or_": operator.or_,
    "math.trunc": math.trunc,
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "torch.sym_int": int,
    "torch.sym_float": float,
    "torch.sym_not": operator.not_,
    "torch.sym_max": max,
    "torch.sym_min": min,
    "torch.sym_ite": lambda condition, then, other: then if condition else other,
}


@dataclass(frozen=True)
class Name:
    """A reference to an earlier result."""

    text: str


@dataclass(frozen=True)
class Device:
    """The device of the images, wherever the file says that its own were."""


@dataclass(frozen=True, eq=False)
class Node:
    """One call.

    Attributes:
        run: The operator.
        text: Its name, for messages.
        args, kwargs: Numbers, strings, `Name`s, `Device`s, and lists of them.
        outputs: Names of its results, nested as they are returned; None for one that is not used.
        done: Names that no later node refers to.
    """

    run: Callable[..., Any]
    text: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: Any
    done: tuple[str, ...]


@dataclass(frozen=True)
class Axis:
    """What the images' size along one axis may be: `factor` times a number in a range.

    Attributes:
        factor: Of the number; the size itself if there is no symbol.
        symbol: The number's name; axes with the same name have the same number.
        low, high: Of the number.
    """

    factor: int
    symbol: str | None = None
    low: int = 0
    high: int = INTEGERS


@dataclass(frozen=True, eq=False)
class Graph:
    """A checked program.

    Attributes:
        inputs: Name in the graph -> name of the tensor in the archive.
        images: Name of the images in the graph.
        axes: Of the images.
        conditions: On the images' sizes, each a checked expression.
        nodes: In the order in which they run.
        output: Name of the result.
    """

    inputs: Mapping[str, str]
    images: str
    axes: tuple[Axis, ...]
    conditions: tuple[ast.expr, ...]
    nodes: tuple[Node, ...]
    output: str


def parse(program: Mapping[str, Any]) -> Graph:
    """Check a program's JSON and resolve its operators.

    Raises:
        NotAllowed: If it holds an operator, an argument or an expression that is not allowed.
        UserError, KeyError, TypeError, ValueError, AttributeError: If it is not whole.
    """
    module = program["graph_module"]
    graph, signature = module["graph"], module["signature"]
    inputs, images = _inputs(signature["input_specs"])
    outputs = signature["output_specs"]
    if len(outputs) != 1 or len(graph["outputs"]) != 1:
        raise UserError(f"it answers with {len(outputs)} results, not with logits alone")
    if set(outputs[0]) != {"user_output"}:
        raise NotAllowed(f"the result {shown(next(iter(outputs[0]), None))} is not allowed")
    output = _text(graph["outputs"][0]["as_tensor"]["name"])
    meta = graph["tensor_values"][images]
    if meta["dtype"] != 7:
        raise UserError("it does not take float32 images")
    axes = tuple(_axis(size, program["range_constraints"]) for size in meta["sizes"])
    conditions = tuple(map(_condition, program.get("guards_code") or ()))
    known = {*inputs, images}
    nodes = [node for raw in graph["nodes"] if (node := _node(raw, known)) is not None]
    if output not in known:
        raise UserError(f"no node gives its result {shown(output)}")
    return Graph(inputs, images, axes, conditions, _with_last_uses(nodes, output), output)


def run(graph: Graph, tensors: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """The program's answer.

    Args:
        graph: The program.
        tensors: By their names in the archive.
        images: Of a size that the program takes.

    Raises:
        ValueError: If it does not take their size, or a node fails or needs too much memory.
    """
    check_size(graph, images.shape)
    values: dict[str, Any] = {name: tensors[key] for name, key in graph.inputs.items()}
    values[graph.images] = images
    for node in graph.nodes:
        args = [_value(arg, values, images.device) for arg in node.args]
        kwargs = {key: _value(arg, values, images.device) for key, arg in node.kwargs.items()}
        _store(node, node.outputs, node.run(*args, **kwargs), values)
        for name in node.done:
            values.pop(name, None)
    return values[graph.output]


def check_size(graph: Graph, shape: Sequence[int]) -> None:
    """Refuse images that the program was not exported for.

    Raises:
        ValueError: If the size breaks a range or a condition.
    """
    text = "x".join(map(str, shape))
    if len(shape) != len(graph.axes):
        raise ValueError(f"it takes {len(graph.axes)} axes, got {text}")
    numbers: dict[str, int] = {}
    for size, axis in zip(shape, graph.axes, strict=True):
        if axis.symbol is None:
            fits = size == axis.factor
        else:
            number = size // axis.factor
            fits = size % axis.factor == 0 and axis.low <= number <= axis.high
            fits = fits and numbers.setdefault(axis.symbol, number) == number
        if not fits:
            raise ValueError(f"it was exported for other sizes than {text}")
    for condition in graph.conditions:
        if not _evaluate(condition, shape):
            raise ValueError(f"{ast.unparse(condition)[:200]} is false for {text}")


def _inputs(specs: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], str]:
    """Tensors of the archive by their names in the graph, and the name of the images."""
    inputs: dict[str, str] = {}
    users: list[str] = []
    keys = {
        "parameter": "parameter_name",
        "buffer": "buffer_name",
        "tensor_constant": "tensor_constant_name",
    }
    for spec in specs:
        ((kind, content),) = spec.items()
        if kind == "user_input" and "as_tensor" in content["arg"]:
            users.append(_text(content["arg"]["as_tensor"]["name"]))
        elif kind in keys:
            inputs[_text(content["arg"]["name"])] = _text(content[keys[kind]])
        else:
            raise NotAllowed(f"the input {shown(kind)} is not allowed")
    if len(users) != 1:
        raise UserError(f"it takes {len(users)} inputs, not one batch of images (n, c, h, w)")
    return inputs, users[0]


def _axis(size: Mapping[str, Any], ranges: Mapping[str, Any]) -> Axis:
    """A size of the images: a number, a symbol, or a multiple of a symbol."""
    if "as_int" in size:
        number = size["as_int"]
        if type(number) is not int or number < 0:
            raise NotAllowed(f"the size {shown(number)} is not allowed")
        return Axis(number)
    text = _text(size["as_expr"]["expr_str"])
    symbol = r"Symbol\('([A-Za-z_][A-Za-z_0-9]*)', positive=True, integer=True\)"
    match = re.fullmatch(rf"(?:Mul\(Integer\(([1-9][0-9]{{0,8}})\), {symbol}\)|{symbol})", text)
    if match is None:
        raise NotAllowed(f"the size {shown(text)} is not allowed")
    name = match[2] or match[3]
    limits = ranges.get(name) or {}
    low, high = limits.get("min_val"), limits.get("max_val")
    # torch writes 2 for every free size, and runs such a program on one image too.
    low = low if type(low) is int and low > 2 else 0
    return Axis(int(match[1] or 1), name, low, high if type(high) is int else INTEGERS)


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
_SIZE = re.compile(r"L\['[A-Za-z_][A-Za-z_0-9]*'\](?:\[0\])?\.size\(\)\[([0-3])\]")


def _condition(text: object) -> ast.expr:
    """A condition, parsed and never compiled: integers, sizes, + - * // %, min, max, comparisons.

    Raises:
        NotAllowed: For anything else.
    """
    if not isinstance(text, str) or len(text) > 10_000:
        raise NotAllowed(f"the condition {shown(text)} is not allowed")
    try:
        condition = ast.parse(text, mode="eval").body
        _evaluate(condition, None)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NotAllowed(f"the condition {shown(text)} is not allowed") from error
    return condition


def _evaluate(node: ast.expr, shape: Sequence[int] | None) -> Any:
    """The value of a condition for images of a shape; without one, only the grammar is checked.

    Raises:
        ValueError: If the grammar does not hold.
    """
    match node:
        case ast.Constant(value=int() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, shape)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            one, two = _evaluate(left, shape), _evaluate(right, shape)
            return 1 if shape is None else _limited(_BINARY[type(op)](one, two))
        case ast.BoolOp(op=op, values=parts):
            values = [_evaluate(part, shape) for part in parts]
            return all(values) if isinstance(op, ast.And) else any(values)
        case ast.Compare(left=left, ops=ops, comparators=rest) if all(
            type(op) in _COMPARE for op in ops
        ):
            values = [_evaluate(value, shape) for value in (left, *rest)]
            pairs = zip(ops, values, values[1:], strict=False)
            return all(_COMPARE[type(op)](one, two) for op, one, two in pairs)
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="torch"), attr="sym_max" | "sym_min" as name),
            args=[_, *_] as args,
            keywords=[],
        ):
            return (max if name == "sym_max" else min)(_evaluate(arg, shape) for arg in args)
        case ast.Subscript():
            match_ = _SIZE.fullmatch(ast.unparse(node))
            if match_:
                return 1 if shape is None else shape[int(match_[1])]
    raise ValueError("no condition on sizes")


def _node(raw: Mapping[str, Any], known: set[str]) -> Node | None:
    """One call, whose results become known; None for one that checks what needs no check."""
    target = _text(raw["target"])
    if target in SYMBOLIC:
        args = [_argument(item["arg"], known) for item in raw["inputs"]]
        return _named(_number(SYMBOLIC[target]), target, tuple(args), {}, raw, known)
    match = re.fullmatch(r"torch\.ops\.aten\.([A-Za-z0-9_]+)\.([A-Za-z0-9_]+)", target)
    if match is None:
        raise NotAllowed(f"the operator {shown(target)} is not allowed")
    name, overload = match[1], match[2]
    if name == SKIPPED:
        return None
    if name in ASSERTIONS:
        args = tuple(_argument(item["arg"], known) for item in raw["inputs"])
        check = _true if name == "_assert_scalar" else _nothing
        return Node(check, target, args, {}, None, ())
    if name not in OPERATORS:
        raise NotAllowed(f"the operator {shown(target)} is not allowed")
    packet = getattr(torch.ops.aten, name)
    if overload not in packet.overloads():
        raise UserError(f"this torch has no operator {target}")
    found = getattr(packet, overload)
    if not _gives_tensors(found._schema, name):
        raise NotAllowed(f"the operator {shown(target)} is not allowed")
    if found._schema.is_mutable and not name.endswith("_"):
        raise NotAllowed(f"the operator {shown(target)} writes into its arguments")
    args, kwargs = _bound(found._schema, raw["inputs"], known, target)
    return _named(found, target, args, kwargs, raw, known)


def _gives_tensors(schema: Any, name: str) -> bool:
    """Whether its results are tensors, or sizes of one; of the same name, some join strings."""
    kinds = {str(result.type) for result in schema.returns}
    sizes = {"int", "SymInt"} if name.startswith("sym_") else set()
    return bool(kinds) and kinds <= {"Tensor", "List[Tensor]", *sizes}


def _bound(
    schema: Any, inputs: Sequence[Mapping[str, Any]], known: set[str], target: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments in the operator's order: by position up to the first that is left out."""
    given = {_text(item["name"]): _argument(item["arg"], known) for item in inputs}
    args, kwargs, gap = [], {}, False
    for argument in schema.arguments:
        if argument.name not in given:
            gap = True
        elif gap or argument.kwarg_only:
            kwargs[argument.name] = given.pop(argument.name)
        else:
            args.append(given.pop(argument.name))
    # What is made from no tensor lies with the images too.
    makes = not any("Tensor" in str(argument.type) for argument in schema.arguments)
    if makes and any(argument.name == "device" for argument in schema.arguments):
        kwargs["device"] = Device()
    if given:
        raise UserError(f"{target} has no argument {shown(next(iter(given)))}")
    return tuple(args), kwargs


def _named(
    function: Callable[..., Any],
    target: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    raw: Mapping[str, Any],
    known: set[str],
) -> Node:
    outputs = [_output(item) for item in raw["outputs"]]
    for name in _names(outputs):
        if name in known:
            raise UserError(f"two results are called {shown(name)}")
        known.add(name)
    return Node(function, target, args, kwargs, outputs[0] if len(outputs) == 1 else outputs, ())


def _output(item: Mapping[str, Any]) -> Any:
    ((kind, value),) = item.items()
    if kind == "as_tensor":
        return _text(value["name"])
    if kind == "as_tensors":
        return [_text(one["name"]) for one in value]
    if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
        return _text(value["as_name"])
    if kind == "as_none":
        return None
    raise NotAllowed(f"the result {shown(kind)} is not allowed")


def _argument(item: Mapping[str, Any], known: set[str]) -> Any:
    """A checked argument.

    Raises:
        NotAllowed: For a graph, an operator, an object, or whatever else no tensor operator needs.
    """
    ((kind, value),) = item.items()
    scalars = {"as_int": int, "as_bool": bool, "as_string": str}
    if kind == "as_none":
        return None
    if kind in scalars:
        return _scalar(value, scalars[kind])
    if kind in ("as_ints", "as_bools"):
        return [_scalar(one, scalars[kind[:-1]]) for one in value]
    if kind == "as_float":
        return _float(value)
    if kind == "as_floats":
        return [_float(one) for one in value]
    if kind == "as_tensor":
        return _reference(value["name"], known)
    if kind == "as_tensors":
        return [_reference(one["name"], known) for one in value]
    if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
        return _symbolic(value, known)
    if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools"):
        return [_symbolic(one, known) for one in value]
    if kind == "as_optional_tensor":
        return _argument(value, known)
    if kind == "as_optional_tensors":
        return [_argument(one, known) for one in value]
    if kind == "as_device":
        return Device()
    if kind == "as_scalar_type" and value in DTYPES:
        return DTYPES[value]
    if kind == "as_memory_format" and value in _MEMORY_FORMATS:
        return _MEMORY_FORMATS[value]
    if kind == "as_layout" and value == STRIDED:
        return torch.strided
    raise NotAllowed(f"the argument {shown(item)} is not allowed")


_MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
_WORD = re.compile(r"[A-Za-z_,.>\- ]{0,64}")  # a mode of padding, an equation of einsum


def _scalar(value: object, kind: type) -> Any:
    if type(value) is not kind:
        raise NotAllowed(f"the argument {shown(value)} is not allowed")
    if isinstance(value, str) and not _WORD.fullmatch(value):
        raise NotAllowed(f"the argument {shown(value)} is not allowed")
    return _limited(value) if isinstance(value, int) else value


def _float(value: object) -> float:
    if value in ("Infinity", "-Infinity", "NaN"):  # as JSON cannot write them
        return float(str(value).replace("Infinity", "inf"))
    if type(value) not in (int, float):
        raise NotAllowed(f"the argument {shown(value)} is not allowed")
    return float(value)  # pyright: ignore[reportArgumentType]


def _symbolic(value: Mapping[str, Any], known: set[str]) -> Any:
    ((kind, content),) = value.items()
    if kind == "as_name":
        return _reference(content, known)
    return _float(content) if kind == "as_float" else _scalar(content, type(content))


def _reference(name: object, known: set[str]) -> Name:
    if not isinstance(name, str) or name not in known:
        raise UserError(f"a node refers to {shown(name)} before there is such a result")
    return Name(name)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise NotAllowed(f"the name {shown(value)} is not allowed")
    return value


def _number(function: Callable[..., Any]) -> Callable[..., Number]:
    """The function for numbers alone, and of numbers that stay small."""

    def checked(*args: object) -> Number:
        if not all(isinstance(arg, int | float) for arg in args):
            raise TypeError("a size is computed from what is no number")
        return _limited(function(*args))

    return checked


def _limited(value: Any) -> Any:
    if isinstance(value, int) and abs(value) >= INTEGERS:
        raise ValueError("a number in it is too large")
    return value


def _true(value: object, *_: object) -> None:
    if not value:
        raise ValueError("a condition of the program does not hold for these images")


def _nothing(*_: object, **__: object) -> None:
    """Ranges of sizes that are known when the program runs are no news."""


def _with_last_uses(nodes: Sequence[Node], output: str) -> tuple[Node, ...]:
    """The nodes, each with the names that it is the last to use, so that memory is given back."""
    seen, kept = {output}, []
    for node in reversed(nodes):
        names = [*_references((*node.args, *node.kwargs.values())), *_names(node.outputs)]
        done = tuple(name for name in dict.fromkeys(names) if name not in seen)
        seen.update(names)
        kept.append(Node(node.run, node.text, node.args, node.kwargs, node.outputs, done))
    return tuple(reversed(kept))


def _references(values: Sequence[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, Name):
            yield value.text
        elif isinstance(value, list):
            yield from _references(value)


def _names(outputs: Any) -> Iterator[str]:
    if isinstance(outputs, str):
        yield outputs
    elif isinstance(outputs, list):
        for item in outputs:
            yield from _names(item)


def _value(arg: Any, values: Mapping[str, Any], device: torch.device) -> Any:
    if isinstance(arg, Name):
        return values[arg.text]
    if isinstance(arg, Device):
        return device
    if isinstance(arg, list):
        return [_value(one, values, device) for one in arg]
    return arg


def _store(node: Node, names: Any, result: Any, values: dict[str, Any]) -> None:
    """Give the results their names."""
    if isinstance(result, Tensor) and result.nbytes > BYTES:
        raise ValueError(f"{node.text} needs {result.nbytes} bytes for one result")
    if isinstance(names, str):
        values[names] = result
    elif isinstance(names, list):
        for name, one in zip(names, result, strict=True):
            _store(node, name, one, values)
