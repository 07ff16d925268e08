"""Parse a graph of `torch.export` and run it node by node.

A node names an operator and its arguments. Nothing is evaluated, looked up by a path, or compiled:
operators are those of `exported_operators`, arguments are numbers, words, and earlier results, and
`exported_sizes` checks the images that the program takes.
"""

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsdistill.harness.errors import UserError
from kd.models.zoo import exported_operators as operators
from kd.models.zoo import exported_sizes as sizes
from kd.models.zoo.exported_archive import (
    DTYPES,
    STRIDED_LAYOUT,
    NotAllowed,
    parse_string,
    printable,
)
from kd.models.zoo.exported_sizes import ImageAxis, require_below_limit

MAX_LIVE_BYTES = 2**33  # of the results that are alive at once, for the images of the first run


@dataclass(frozen=True)
class ResultReference:
    """A reference to an earlier result."""

    text: str


@dataclass(frozen=True)
class ImageDevice:
    """The device of the images, in place of the device named in the file."""


@dataclass(frozen=True, eq=False)
class Node:
    """One call of an operator.

    Attributes:
        run: The operator.
        text: Name of the operator, for messages.
        args, kwargs: Numbers, strings, `ResultReference`s, `ImageDevice`s, and lists of them.
        outputs: Names of the results, nested as they are returned; None for an unused result.
        done: Names that no later node refers to.
        writes: Whether the operator changes its first argument.
    """

    run: Callable[..., Any]
    text: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: Any
    done: tuple[str, ...]
    writes: bool = False


@dataclass(frozen=True, eq=False)
class Graph:
    """A checked program.

    Attributes:
        inputs: Name in the graph -> name of the tensor in the archive.
        images: Name of the images in the graph.
        axes: Axes of the images.
        conditions: Checked expressions on the images' sizes.
        nodes: Calls in the order in which they run.
        output: Name of the result.
    """

    inputs: Mapping[str, str]
    images: str
    axes: tuple[ImageAxis, ...]
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
    inputs, images = _parse_inputs(signature["input_specs"])
    outputs = signature["output_specs"]
    if len(outputs) != 1 or len(graph["outputs"]) != 1:
        raise UserError(f"it returns {len(outputs)} results, not logits alone")
    if set(outputs[0]) != {"user_output"}:
        raise NotAllowed(f"the result {printable(next(iter(outputs[0]), None))} is not allowed")
    output = parse_string(graph["outputs"][0]["as_tensor"]["name"])
    meta = graph["tensor_values"][images]
    if meta["dtype"] != 7:
        raise UserError("it does not take float32 images")
    axes = tuple(sizes.parse_axis(size, program["range_constraints"]) for size in meta["sizes"])
    conditions = tuple(map(sizes.parse_condition, program.get("guards_code") or ()))
    known = {*inputs, images}
    nodes = [node for raw in graph["nodes"] if (node := _parse_node(raw, known)) is not None]
    if output not in known:
        raise UserError(f"no node gives its result {printable(output)}")
    return Graph(inputs, images, axes, conditions, _with_last_uses(nodes, output), output)


def run(graph: Graph, tensors: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Run a program.

    Args:
        graph: The program.
        tensors: Tensors by their names in the archive.
        images: Images (n, c, h, w) of a size that the program takes.

    Returns:
        The program's result.

    Raises:
        ValueError: If it does not take their size, or a node fails or needs too much memory.
    """
    sizes.check(graph.axes, graph.conditions, images.shape)
    values: dict[str, Any] = {name: tensors[key] for name, key in graph.inputs.items()}
    values[graph.images] = images
    writes = any(node.writes for node in graph.nodes)
    protected = {_storage_address(value) for value in values.values()} - {0} if writes else set()
    for node in graph.nodes:
        args = [_resolve_argument(arg, values, images.device) for arg in node.args]
        kwargs = {
            key: _resolve_argument(arg, values, images.device) for key, arg in node.kwargs.items()
        }
        # torch.export lists a changed input among the results, but a file may omit it.
        if node.writes and _storage_address(args[0]) in protected:
            raise ValueError(f"{node.text} would change the images or the weights")
        _store_results(node, node.outputs, node.run(*args, **kwargs), values)
        if images.is_meta:
            _check_memory(node, [values[name] for name in values.keys() - graph.inputs.keys()])
        for name in node.done:
            values.pop(name, None)
    return values[graph.output]


def _parse_inputs(specs: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], str]:
    """Map names in the graph to tensors of the archive; return the map and the images' name."""
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
            users.append(parse_string(content["arg"]["as_tensor"]["name"]))
        elif kind in keys:
            inputs[parse_string(content["arg"]["name"])] = parse_string(content[keys[kind]])
        else:
            raise NotAllowed(f"the input {printable(kind)} is not allowed")
    if len(users) != 1:
        raise UserError(f"it takes {len(users)} inputs, not one batch of images (n, c, h, w)")
    return inputs, users[0]


def _parse_node(raw: Mapping[str, Any], known: set[str]) -> Node | None:
    """Parse one call and add its results to `known`; None for a check that is not needed."""
    target = parse_string(raw["target"])
    if target in operators.SYMBOLIC_OPERATORS:
        args = [_parse_argument(item["arg"], known) for item in raw["inputs"]]
        return _build_node(
            operators.restrict_to_numbers(operators.SYMBOLIC_OPERATORS[target]),
            target,
            tuple(args),
            {},
            raw,
            known,
        )
    name, _ = operators.split_target(target)
    if name == operators.SKIPPED_OPERATOR:
        return None
    if name in operators.ASSERTIONS:
        args = tuple(_parse_argument(item["arg"], known) for item in raw["inputs"])
        check = _require_true if name == "_assert_scalar" else _accept_any
        return Node(check, target, args, {}, None, ())
    function = operators.resolve(target)
    args, kwargs = _bind_arguments(function._schema, raw["inputs"], known, target)
    node = _build_node(operators.with_checks(function), target, args, kwargs, raw, known)
    return replace(node, writes=function._schema.is_mutable)


def _bind_arguments(
    schema: Any, inputs: Sequence[Mapping[str, Any]], known: set[str], target: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put arguments in the operator's order: by position up to the first that is left out."""
    by_name = {parse_string(item["name"]): _parse_argument(item["arg"], known) for item in inputs}
    args, kwargs, gap = [], {}, False
    for argument in schema.arguments:
        if argument.name not in by_name:
            gap = True
        elif gap or argument.kwarg_only:
            kwargs[argument.name] = by_name.pop(argument.name)
        else:
            args.append(by_name.pop(argument.name))
    # A tensor created from no other goes to the images' device too.
    creates = not any("Tensor" in str(argument.type) for argument in schema.arguments)
    if creates and any(argument.name == "device" for argument in schema.arguments):
        kwargs["device"] = ImageDevice()
    if by_name:
        raise UserError(f"{target} has no argument {printable(next(iter(by_name)))}")
    return tuple(args), kwargs


def _build_node(
    function: Callable[..., Any],
    target: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    raw: Mapping[str, Any],
    known: set[str],
) -> Node:
    outputs = [_parse_output(item) for item in raw["outputs"]]
    for name in _output_names(outputs):
        if name in known:
            raise UserError(f"two results are called {printable(name)}")
        known.add(name)
    return Node(function, target, args, kwargs, outputs[0] if len(outputs) == 1 else outputs, ())


def _parse_output(item: Mapping[str, Any]) -> Any:
    ((kind, value),) = item.items()
    if kind == "as_tensor":
        return parse_string(value["name"])
    if kind == "as_tensors":
        return [parse_string(item["name"]) for item in value]
    if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
        return parse_string(value["as_name"])
    if kind == "as_none":
        return None
    raise NotAllowed(f"the result {printable(kind)} is not allowed")


def _parse_argument(item: Mapping[str, Any], known: set[str]) -> Any:
    """Parse and check an argument.

    Raises:
        NotAllowed: For a graph, an operator, an object, or anything else that no tensor operator
            takes.
    """
    ((kind, value),) = item.items()
    scalars = {"as_int": int, "as_bool": bool, "as_string": str}
    if kind == "as_none":
        return None
    if kind in scalars:
        return _parse_scalar(value, scalars[kind])
    if kind in ("as_ints", "as_bools"):
        return [_parse_scalar(element, scalars[kind[:-1]]) for element in value]
    if kind == "as_float":
        return _parse_float(value)
    if kind == "as_floats":
        return [_parse_float(element) for element in value]
    if kind == "as_tensor":
        return _parse_reference(value["name"], known)
    if kind == "as_tensors":
        return [_parse_reference(element["name"], known) for element in value]
    if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
        return _parse_symbolic(value, known)
    if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools"):
        return [_parse_symbolic(element, known) for element in value]
    if kind == "as_optional_tensor":
        return _parse_argument(value, known)
    if kind == "as_optional_tensors":
        return [_parse_argument(element, known) for element in value]
    if kind == "as_device":
        return ImageDevice()
    if kind == "as_scalar_type" and value in DTYPES:
        return DTYPES[value]
    if kind == "as_memory_format" and value in _MEMORY_FORMATS:
        return _MEMORY_FORMATS[value]
    if kind == "as_layout" and value == STRIDED_LAYOUT:
        return torch.strided
    raise NotAllowed(f"the argument {printable(item)} is not allowed")


_MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
_WORD_PATTERN = re.compile(r"[A-Za-z_,.>\- ]{0,64}")  # a mode of padding, an equation of einsum


def _parse_scalar(value: object, kind: type) -> Any:
    if type(value) is not kind:
        raise NotAllowed(f"the argument {printable(value)} is not allowed")
    if isinstance(value, str) and not _WORD_PATTERN.fullmatch(value):
        raise NotAllowed(f"the argument {printable(value)} is not allowed")
    return require_below_limit(value) if isinstance(value, int) else value


def _parse_float(value: object) -> float:
    if value in ("Infinity", "-Infinity", "NaN"):  # strings, since JSON has no such numbers
        return float(str(value).replace("Infinity", "inf"))
    if type(value) not in (int, float):
        raise NotAllowed(f"the argument {printable(value)} is not allowed")
    return float(value)  # pyright: ignore[reportArgumentType]


def _parse_symbolic(value: Mapping[str, Any], known: set[str]) -> Any:
    ((kind, content),) = value.items()
    if kind == "as_name":
        return _parse_reference(content, known)
    return _parse_float(content) if kind == "as_float" else _parse_scalar(content, type(content))


def _parse_reference(name: object, known: set[str]) -> ResultReference:
    if not isinstance(name, str) or name not in known:
        raise UserError(f"a node refers to {printable(name)} before there is such a result")
    return ResultReference(name)


def _require_true(value: object, *_: object) -> None:
    if not value:
        raise ValueError("a condition of the program does not hold for these images")


def _accept_any(*_: object, **__: object) -> None:
    """Accept a range of sizes: the sizes are known when the program runs."""


def _with_last_uses(nodes: Sequence[Node], output: str) -> tuple[Node, ...]:
    """Give each node the names that it is the last to use, so that their memory is freed."""
    used_later, reversed_nodes = {output}, []
    for node in reversed(nodes):
        names = [
            *_referenced_names((*node.args, *node.kwargs.values())),
            *_output_names(node.outputs),
        ]
        done = tuple(name for name in dict.fromkeys(names) if name not in used_later)
        used_later.update(names)
        reversed_nodes.append(replace(node, done=done))
    return tuple(reversed(reversed_nodes))


def _referenced_names(values: Sequence[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, ResultReference):
            yield value.text
        elif isinstance(value, list):
            yield from _referenced_names(value)


def _output_names(outputs: Any) -> Iterator[str]:
    if isinstance(outputs, str):
        yield outputs
    elif isinstance(outputs, list):
        for item in outputs:
            yield from _output_names(item)


def _resolve_argument(arg: Any, values: Mapping[str, Any], device: torch.device) -> Any:
    if isinstance(arg, ResultReference):
        return values[arg.text]
    if isinstance(arg, ImageDevice):
        return device
    if isinstance(arg, list):
        return [_resolve_argument(element, values, device) for element in arg]
    return arg


def _storage_address(tensor: Tensor) -> int:
    """Address of the tensor's storage; 0 without one."""
    return tensor.untyped_storage().data_ptr()


def _check_memory(node: Node, values: Sequence[Any]) -> None:
    size = sum(value.nbytes for value in values if isinstance(value, Tensor))
    if size > MAX_LIVE_BYTES:
        raise ValueError(f"with the result of {node.text} it needs {size} bytes at once")


def _store_results(node: Node, names: Any, result: Any, values: dict[str, Any]) -> None:
    """Store the results under their names."""
    if isinstance(result, Tensor) and result.nbytes > MAX_LIVE_BYTES:
        raise ValueError(f"{node.text} needs {result.nbytes} bytes for one result")
    if isinstance(names, str):
        values[names] = result
    elif isinstance(names, list):
        for name, element in zip(names, result, strict=True):
            _store_results(node, name, element, values)
