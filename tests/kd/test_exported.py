"""A `.pt2` file from elsewhere: it computes with tensors, and can do nothing else."""

import contextlib
import io
import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from dsdistill.harness.errors import UserError
from kd.data import teacher_cache
from kd.models.zoo import exported, exported_operators

SHAPE = (20, 20, 3)
Program = dict[str, Any]


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        self.scale = torch.tensor([1.0, 2.0, 3.0])

    def forward(self, images: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(images)).mean((2, 3))) * self.scale


class _Bomb:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.marker,)


def _saved(network: nn.Module, size: int = 20, sizes: Any = None, **how: Any) -> bytes:
    torch.manual_seed(3)
    content, images = io.BytesIO(), torch.rand(2, 3, size, size)
    sizes = sizes or {0: torch.export.Dim("n", min=1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(network.eval(), (images,), dynamic_shapes=(sizes,), **how)
        torch.export.save(program, content)
    return content.getvalue()


@pytest.fixture(scope="module")
def whole() -> bytes:
    torch.manual_seed(2)
    return _saved(_Small())


def _entries(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def _write(
    path: Path, entries: dict[str, bytes], *more: tuple[str, bytes], root: str = "a"
) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content in entries.items():
            archive.writestr(f"{root}/{name}", content)
        for name, content in more:
            archive.writestr(name, content)
    return path


def _changed(
    whole: bytes, path: Path, change: Callable[[Program], object], entry: str = "models/model.json"
) -> Path:
    entries = _entries(whole)
    content = json.loads(entries[entry])
    change(content)
    return _write(path, entries | {entry: json.dumps(content).encode()})


def _code(marker: Path) -> str:
    return f"__import__('pathlib').Path({str(marker)!r}).touch()"


def _graph(program: Program) -> Program:
    return program["graph_module"]["graph"]


def _renamed(program: Program, old: str, new: str) -> None:
    """Give a result another name wherever it stands."""
    text = json.dumps(program).replace(json.dumps(old), json.dumps(new))
    program.clear()
    program.update(json.loads(text))


# --- what would run code in torch's own loader


def _expression(whole: bytes, path: Path, marker: Path) -> None:
    def change(program: Program) -> None:
        for meta in _graph(program)["tensor_values"].values():
            for size in meta["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = _code(marker)

    _changed(whole, path, change)


def _hidden_expression(whole: bytes, path: Path, marker: Path) -> None:
    """Among the sizes of an intermediate result."""
    size = {"as_expr": {"expr_str": f"sympify({_code(marker)!r})", "hint": None}}

    def change(program: Program) -> None:
        _graph(program)["tensor_values"]["relu"]["sizes"][0] = size
        _graph(program)["sym_int_values"]["s"] = size

    _changed(whole, path, change)


def _bomb(marker: Path) -> bytes:
    content = io.BytesIO()
    torch.save({"weight": _Bomb(marker)}, content)
    return content.getvalue()


def _old_layout(whole: bytes, path: Path, marker: Path) -> None:
    bomb = _bomb(marker)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.20")
        program = _entries(whole)["models/model.json"]
        archive.writestr("serialized_exported_program.json", program)
        archive.writestr("serialized_example_inputs.pt", b"")
        for name in ("serialized_state_dict.json", "serialized_constants.json"):
            archive.writestr(name, bomb)


def _old_layout_beside(whole: bytes, path: Path, marker: Path) -> None:
    more = ("serialized_state_dict.json", _bomb(marker)), ("version", b"8.20")
    _write(path, _entries(whole), *more)


def _twice(bomb_first: bool) -> Callable[[bytes, Path, Path], None]:
    """An entry of which one reader takes the first and another the last."""

    def make(whole: bytes, path: Path, marker: Path) -> None:
        entries = _entries(whole)
        name = "data/weights/model_weights_config.json"
        pickled = json.loads(entries[name])
        payload = pickled["config"]["first.bias"]
        payload["use_pickle"] = True
        weight = f"data/weights/{payload['path_name']}"
        bomb = {name: json.dumps(pickled).encode(), weight: _bomb(marker)}
        plain = {key: entries[key] for key in bomb}
        one, other = (bomb, plain) if bomb_first else (plain, bomb)
        _write(path, entries | one, *((f"a/{key}", other[key]) for key in other))

    return make


def _object(
    name: str, entry: str | None = None, pickled: bool = False
) -> Callable[[bytes, Path, Path], None]:
    """A constant that is an object, by its name and that of its entry."""

    def make(whole: bytes, path: Path, marker: Path) -> None:
        key = "data/constants/model_constants_config.json"
        entries = _entries(whole)
        config = json.loads(entries[key])
        config["config"]["scale"] |= {"path_name": name, "use_pickle": pickled}
        entries[key] = json.dumps(config).encode()
        bomb = pickle.dumps(_Bomb(marker))
        bomb += b"." * (-len(bomb) % 4)  # so many bytes as float32 numbers have
        _write(path, entries | {f"data/constants/{entry or name}": bomb})

    return make


def _pickled_weight(whole: bytes, path: Path, marker: Path) -> None:
    key = "data/weights/model_weights_config.json"
    entries = _entries(whole)
    config = json.loads(entries[key])
    config["config"]["first.bias"]["use_pickle"] = True
    entry = f"data/weights/{config['config']['first.bias']['path_name']}"
    _write(path, entries | {key: json.dumps(config).encode(), entry: _bomb(marker)})


def _legacy_weights(whole: bytes, path: Path, marker: Path) -> None:
    _write(path, _entries(whole) | {"data/weights/model.pt": _bomb(marker)})


def _sample_inputs(whole: bytes, path: Path, marker: Path) -> None:
    _write(path, _entries(whole) | {"data/sample_inputs/model.pt": _bomb(marker)})


def _second_model(whole: bytes, path: Path, marker: Path) -> None:
    more = {"models/other.json": b"{}", "data/sample_inputs/other.pt": _bomb(marker)}
    _write(path, _entries(whole) | more)


def _entry(name: str) -> Callable[[bytes, Path, Path], None]:
    def make(whole: bytes, path: Path, marker: Path) -> None:
        _write(path, _entries(whole), (name, pickle.dumps(_Bomb(marker))))

    return make


def _name_as_code(whole: bytes, path: Path, marker: Path) -> None:
    """torch writes a function of Python from the names of the results."""
    name = f"relu=({_code(marker)});relu"
    _changed(whole, path, lambda program: _renamed(program, "relu", name))


def _argument_as_code(whole: bytes, path: Path, marker: Path) -> None:
    def change(program: Program) -> None:
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        signature["forward_arg_names"] = [f"images=({_code(marker)})"]

    _changed(whole, path, change)


def _guard(whole: bytes, path: Path, marker: Path) -> None:
    _changed(whole, path, lambda program: program.update(guards_code=[_code(marker)]))


def _hidden_guard(whole: bytes, path: Path, marker: Path) -> None:
    """Behind a comparison that is false, and in the index of a size."""
    text = f"1 == 2 and L['images'].size()[{_code(marker)}] == 0"
    _changed(whole, path, lambda program: program.update(guards_code=[text]))


def _operator(target: str, *arguments: Any) -> Callable[[bytes, Path, Path], None]:
    def make(whole: bytes, path: Path, marker: Path) -> None:
        def change(program: Program) -> None:
            node = next(n for n in _graph(program)["nodes"] if "relu" in n["target"])
            node["target"] = target
            values = [{"as_string": str(marker)} if a is marker_ else a for a in arguments]
            node["inputs"] = [{"name": "", "arg": value, "kind": 1} for value in values]

        _changed(whole, path, change)

    return make


marker_ = object()  # stands for the marker's path among the arguments of an operator


def _function_argument(whole: bytes, path: Path, marker: Path) -> None:
    def change(program: Program) -> None:
        node = next(n for n in _graph(program)["nodes"] if "relu" in n["target"])
        node["inputs"][0]["arg"] = {"as_operator": "torch.hub.load"}

    _changed(whole, path, change)


def _custom_object(whole: bytes, path: Path, marker: Path) -> None:
    def change(program: Program) -> None:
        specs = program["graph_module"]["signature"]["input_specs"]
        argument = {"name": "c", "class_fqn": "__torch__.torch.classes.x.Y"}
        specs.append({"custom_obj": {"arg": argument, "custom_obj_name": "c"}})

    _changed(whole, path, change)


def _two_names(whole: bytes, path: Path, marker: Path) -> None:
    """An entry is called one thing where it lies and another in the directory."""
    bomb = pickle.dumps(_Bomb(marker))
    _write(path, _entries(whole) | {"extra/aaaaaaaaaaaa": bomb})
    content = path.read_bytes()
    path.write_bytes(content.replace(b"a/extra/aaaaaaaaaaaa", b"a/data/constants/aaa", 1))


def _cut_name(whole: bytes, path: Path, marker: Path) -> None:
    """One reader ends a name at a NUL, another does not."""
    _write(path, _entries(whole) | {"extra/a#opaque_obj_0": pickle.dumps(_Bomb(marker))})
    path.write_bytes(path.read_bytes().replace(b"extra/a#", b"extra/a\0"))


REFUSED: dict[str, tuple[Callable[[bytes, Path, Path], object], str]] = {
    "expression": (_expression, "the size .*pathlib.* is not allowed"),
    "old layout": (_old_layout, "the entry 'version' is not allowed"),
    "old layout beside the new": (_old_layout_beside, "the entry 'serialized_state_dict.json'"),
    "an entry twice": (_twice(bomb_first=False), "is there twice"),
    "an entry twice, the other way": (_twice(bomb_first=True), "is there twice"),
    "opaque object": (_object("opaque_obj_0"), "the entry 'a/data/constants/opaque_obj_0'"),
    "in a folder": (_object("opaque_obj_0/x"), "the entry 'a/data/constants/opaque_obj_0/x'"),
    "of another case": (
        _object("opaque_obj_0", "OPAQUE_OBJ_0"),
        "the entry 'a/data/constants/OPAQUE_OBJ_0'",
    ),
    "behind dots": (_object("../constants/opaque_obj_0"), "is not allowed"),
    "custom object": (_object("custom_obj_0"), "the entry 'a/data/constants/custom_obj_0'"),
    "as a tensor": (_object("tensor_0", pickled=True), "'scale' is pickled"),
    "pickled weight": (_pickled_weight, "'first.bias' is pickled"),
    "legacy weights": (_legacy_weights, "the entry 'a/data/weights/model.pt' is not allowed"),
    "second model": (_second_model, "the entry 'a/models/other.json' is not allowed"),
    "compiled": (_entry("a/data/aotinductor/model/m.so"), "is not allowed"),
    "compiled, of another case": (_entry("a/data/AOTInductor/model/m.so"), "is not allowed"),
    "outside the folder": (_entry("../evil.py"), "the entry '../evil.py' is not allowed"),
    "absolute": (_entry("/tmp/evil.py"), "the entry '/tmp/evil.py' is not allowed"),
    "a second folder": (_entry("b/byteorder"), "is there twice"),
    "unicode": (_entry("a/models/model.j\u017fon"), "is not allowed"),
    "guard": (_guard, "the condition .* is not allowed"),
    "guard behind another": (_hidden_guard, "the condition .* is not allowed"),
    "file operator": (
        _operator("torch.ops.aten.from_file.default", {"as_string": "x"}, {"as_bool": True}),
        "the operator 'torch.ops.aten.from_file.default' is not allowed",
    ),
    "unpickler": (_operator("torch.load", marker_), "the operator 'torch.load' is not allowed"),
    "hub": (_operator("torch.hub.load", marker_), "the operator 'torch.hub.load' is not allowed"),
    "libraries": (
        _operator("torch.ops.load_library", marker_),
        "the operator 'torch.ops.load_library' is not allowed",
    ),
    "compiler": (
        _operator("torch.utils.cpp_extension.load_inline", marker_),
        "the operator 'torch.utils.cpp_extension.load_inline' is not allowed",
    ),
    "method": (_operator("_operator.methodcaller", marker_), "the operator '_operator.method"),
    "attribute": (_operator("math.__loader__.load_module", marker_), "the operator 'math.__load"),
    "extension": (_operator("#any:thing"), "the operator '#any:thing' is not allowed"),
    "higher order": (
        _operator("torch.ops.higher_order.wrap_with_autocast"),
        "the operator 'torch.ops.higher_order.wrap_with_autocast' is not allowed",
    ),
    "another library": (_operator("torch.ops.prims.add.default"), "is not allowed"),
    "newline": (_operator("torch.ops.aten.relu.default\n"), "is not allowed"),
    "unchecked memory": (
        _operator("torch.ops.aten._unsafe_index.Tensor"),
        "the operator 'torch.ops.aten._unsafe_index.Tensor' is not allowed",
    ),
    "written into": (_operator("torch.ops.aten.add.out"), "writes into its arguments"),
    "of strings": (_operator("torch.ops.aten.add.str"), "'torch.ops.aten.add.str' is not allowed"),
    "function as argument": (_function_argument, "the argument .*torch.hub.load.* is not allowed"),
    "object as input": (_custom_object, "the input 'custom_obj' is not allowed"),
    "two names": (_two_names, "is not a whole .pt2 file"),
    "cut name": (_cut_name, "is not allowed"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_archive_that_could_run_code_is_refused_and_runs_none(
    whole: bytes, tmp_path: Path, kind: str
) -> None:
    make, message = REFUSED[kind]
    path, marker = tmp_path / "a.pt2", tmp_path / "ran"
    make(whole, path, marker)
    with pytest.raises(UserError, match=message) as caught:
        exported.load(path, SHAPE)
    assert not marker.exists()
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "make",
    [_sample_inputs, _hidden_expression, _name_as_code, _argument_as_code],
    ids=["sample inputs", "sizes of results", "names of results", "names of arguments"],
)
def test_what_torch_would_run_and_a_program_does_not_need_is_never_read(
    whole: bytes, tmp_path: Path, make: Callable[[bytes, Path, Path], None]
) -> None:
    marker = tmp_path / "ran"
    make(whole, tmp_path / "a.pt2", marker)
    program = exported.load(tmp_path / "a.pt2", SHAPE)
    (tmp_path / "whole.pt2").write_bytes(whole)
    images = torch.rand(3, 3, 20, 20)
    expected = exported.load(tmp_path / "whole.pt2", SHAPE).network(images)
    assert torch.equal(program.network(images), expected)
    assert not marker.exists()


# --- damaged, foreign and greedy files


def _sized(name: str, **meta: Any) -> Callable[[bytes, Path], Path]:
    key = "data/weights/model_weights_config.json"

    def change(config: Program) -> None:
        config["config"][name]["tensor_meta"].update(meta)

    return lambda whole, path: _changed(whole, path, change, key)


def _nodes(*nodes: tuple[str, str | None, dict[str, Any]]) -> Callable[[bytes, Path], Path]:
    """A program that calls operators first: their names, names of their results, and arguments."""

    def node(target: str, result: str | None, arguments: dict[str, Any]) -> Program:
        inputs = [{"name": key, "arg": arg, "kind": 1} for key, arg in arguments.items()]
        output = {"as_none": True} if result is None else {"as_tensor": {"name": result}}
        target = f"torch.ops.aten.{target}"
        return {"target": target, "inputs": inputs, "outputs": [output], "metadata": {}}

    def change(program: Program) -> None:
        _graph(program)["nodes"][:0] = [node(*each) for each in nodes]

    return lambda whole, path: _changed(whole, path, change)


def _tensor(name: str) -> Program:
    return {"as_tensor": {"name": name}}


def _needs(sizes: list[int]) -> Callable[[bytes, Path], Path]:
    """A program that makes zeros of a size, and does not use them."""
    return _nodes(("zeros.default", None, {"size": {"as_ints": sizes}}))


def _normalised(target: str, values: str, **more: Any) -> Callable[[bytes, Path], Path]:
    """Batch norm of the images with these values as everything."""
    names = ("weight", "bias", "running_mean", "running_var")
    numbers = {"momentum": {"as_float": 0.1}, "eps": {"as_float": 1e-5}}
    arguments = {"input": _tensor("images")} | dict.fromkeys(names, _tensor(values)) | numbers
    return _nodes((target, None, arguments | more))


def _resized(scale: float) -> Callable[[bytes, Path], Path]:
    sizes = {"output_size": {"as_ints": [20, 20]}, "align_corners": {"as_bool": False}}
    scales = {name: {"as_float": scale} for name in ("scales_h", "scales_w")}
    arguments = {"self": _tensor("images")} | sizes | scales
    return _nodes(("_upsample_bilinear2d_aa.default", None, arguments))


def _overlapping(whole: bytes, path: Path) -> None:
    """A thousand names for the same megabyte."""
    entries = _entries(whole) | {"extra/0000": bytes(10**6)}
    _write(path, entries)
    content = path.read_bytes()
    end = content.rindex(b"PK\5\6")
    start = struct.unpack("<I", content[end + 16 : end + 20])[0]
    directory = content[start:end]
    at = directory.index(b"a/extra/0000") - 46
    one = directory[at : at + 46 + 12]
    many = b"".join(one.replace(b"0000", b"%04d" % i) for i in range(1, 1000))
    tail = bytearray(content[end:])
    count = len(entries) + 999
    struct.pack_into("<HHI", tail, 8, count, count, len(directory) + len(many))
    path.write_bytes(content[:start] + directory + many + bytes(tail))


def _compressed(whole: bytes, path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in _entries(whole).items():
            archive.writestr(f"a/{name}", content)
        archive.writestr("a/extra/zeros", bytes(10**7))


DAMAGED: dict[str, tuple[Callable[[bytes, Path], object], str]] = {
    "cut": (lambda whole, path: path.write_bytes(whole[:900]), "is not a whole .pt2 file"),
    "compressed": (_compressed, "is compressed or encrypted"),
    "overlapping": (_overlapping, "more than the file"),
    "deep JSON": (
        lambda whole, path: _write(path, _entries(whole) | {"models/model.json": b"[" * 10**6}),
        "is not a program that can be read",
    ),
    "long integer": (
        lambda whole, path: _write(path, _entries(whole) | {"models/model.json": b"9" * 10**5}),
        "is not a program that can be read",
    ),
    "a list": (
        lambda whole, path: _write(path, _entries(whole) | {"models/model.json": b"[]"}),
        "is not a program that can be read",
    ),
    "another version": (
        lambda whole, path: _changed(whole, path, lambda p: p["schema_version"].update(major=7)),
        "is of version 7, and 8 is read",
    ),
    "a huge weight": (
        _sized("first.bias", sizes=[{"as_int": 10**12}], strides=[{"as_int": 0}]),
        "is 1000000000000 numbers where the file has 4",
    ),
    "beyond its bytes": (_sized("first.bias", sizes=[{"as_int": 8}]), "out of bounds"),
    "an offset": (_sized("first.bias", storage_offset={"as_int": 4}), "out of bounds"),
    "a negative size": (_sized("first.bias", sizes=[{"as_int": -1}]), "has the size"),
    "a symbolic size": (
        _sized("first.bias", sizes=[{"as_expr": {"expr_str": "Integer(4)"}}]),
        "has the size",
    ),
    "another dtype": (_sized("first.bias", dtype=99), "is of the dtype 99"),
    "sparse": (_sized("first.bias", layout=2), "has the layout 2"),
    "a huge result": (_needs([10**6, 10**6]), "needs 4000000000000 bytes for one result"),
    "huge results together": (
        _nodes(
            ("zeros.default", "z1", {"size": {"as_ints": [2**30]}}),
            ("zeros.default", "z2", {"size": {"as_ints": [2**30]}}),
            ("add.Tensor", None, {"self": _tensor("z1"), "other": _tensor("z2")}),
            ("maximum.default", None, {"self": _tensor("z1"), "other": _tensor("z2")}),
        ),
        r"it needs \d{10} bytes at once",
    ),
    "short statistics": (
        _normalised("_native_batch_norm_legit_no_training.default", "p_first_bias"),
        "weight of batch norm is not 3 numbers",
    ),
    "averages that change": (
        _normalised(
            "batch_norm.default",
            "p_last_bias",
            training={"as_bool": True},
            cudnn_enabled={"as_bool": False},
        ),
        "exported in training mode",
    ),
    "a scale of other sizes": (_resized(3.0), "a resize from 20 to 20 has the scale 3"),
    "images that change": (
        _nodes(
            ("alias.default", "view", {"self": _tensor("images")}),
            ("relu_.default", None, {"self": _tensor("view")}),
        ),
        "would change the images or the weights",
    ),
    "weights that change": (
        _nodes(("zero_.default", None, {"self": _tensor("p_first_bias")})),
        "would change the images or the weights",
    ),
    "bytes as bool": (
        _nodes(("view.dtype", None, {"self": _tensor("images"), "dtype": {"as_scalar_type": 12}})),
        "the operator 'torch.ops.aten.view.dtype' is not allowed",
    ),
    "a result beyond all": (_needs([2**62, 2**62]), "cannot take 20x20 images"),
    "an unknown result": (
        lambda whole, path: _changed(whole, path, lambda p: _graph(p)["nodes"].pop(0)),
        "before there is such a result",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_or_greedy_archive_is_one_line(whole: bytes, tmp_path: Path, kind: str) -> None:
    make, message = DAMAGED[kind]
    make(whole, tmp_path / "a.pt2")
    with pytest.raises(UserError, match=message) as caught:
        exported.load(tmp_path / "a.pt2", SHAPE)
    assert "\n" not in str(caught.value)


def test_any_flipped_byte_of_the_program_is_one_line_or_a_program(
    whole: bytes, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    start = whole.index(b'{"graph_module"')
    length = len(_entries(whole)["models/model.json"])
    for at in torch.randint(length, (60,), generator=generator).tolist():
        content = bytearray(whole)
        content[start + at] ^= 1 << at % 8
        # The archive's own checksum would catch it: written anew, as an attacker would.
        text = bytes(content[start : start + length])
        path = _write(tmp_path / "a.pt2", _entries(whole) | {"models/model.json": text})
        with contextlib.suppress(UserError):
            exported.load(path, SHAPE)


# --- what ordinary networks need


def _loaded(content: bytes, path: Path, shape: tuple[int, int, int]) -> exported.ExportedProgram:
    path.write_bytes(content)
    return exported.load(path, shape)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet"])
def test_networks_of_timm_answer_to_the_bit(tmp_path: Path, name: str) -> None:
    network: nn.Module = timm.create_model(name, num_classes=4).eval()
    program = _loaded(_saved(network, 160), tmp_path / "a.pt2", (32, 32, 3))
    assert (program.shape, program.classes) == ((160, 160, 3), 4)
    images = torch.rand(3, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(program.network(images), network(images))
        assert torch.equal(program.network(images[:1]), network(images[:1]))


class _Sized(nn.Module):
    """Does something else for small images, and pads to a multiple of four."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 5)

    def forward(self, images: Tensor) -> Tensor:
        scale = 2.0 if images.shape[2] > 10 else 1.0
        padded = nn.functional.pad(images, (0, -images.shape[3] % 4))
        parts = padded.view(images.shape[0], 3, images.shape[2], padded.shape[3] // 4, 4)
        return self.last(parts.mean((2, 3, 4))) * scale


def test_a_program_whose_answers_are_no_numbers_is_one_line(tmp_path: Path) -> None:
    network = _Small()
    with torch.no_grad():
        network.last.weight[0, 0] = float("nan")
    path = tmp_path / "nan.pt2"
    path.write_bytes(_saved(network))
    with pytest.raises(UserError, match="not finite"):
        exported.load(path, SHAPE)


@pytest.mark.parametrize("strict", [False, True])
def test_images_of_any_size_that_it_was_exported_for(tmp_path: Path, strict: bool) -> None:
    auto = torch.export.Dim.AUTO
    network = _Sized().eval()
    content = _saved(network, sizes={0: auto, 2: auto, 3: auto}, strict=strict)
    program = _loaded(content, tmp_path / "a.pt2", (24, 22, 3))
    assert program.shape == (24, 22, 3)  # the data's
    for h, w in ((24, 22), (11, 32), (40, 8)):
        images = torch.rand(2, 3, h, w)
        with torch.no_grad():
            assert torch.equal(program.network(images), network(images))
    with pytest.raises(ValueError, match=r"other sizes|is false for"):
        program.network(torch.rand(2, 3, 10, 32))
    with pytest.raises(UserError, match="cannot take 8x8 images"):
        exported.load(tmp_path / "a.pt2", (8, 8, 3))


def test_multiples_and_ranges_of_a_size(tmp_path: Path) -> None:
    sizes = {
        0: torch.export.Dim("n", min=1, max=64),
        2: 4 * torch.export.Dim("k", min=3, max=6),
        3: torch.export.Dim("w", min=5, max=24),
    }
    program = _loaded(_saved(_Small(), sizes=sizes), tmp_path / "a.pt2", SHAPE)
    assert len(program.network(torch.rand(1, 3, 12, 24))) == 1
    for n, h, w in ((65, 20, 20), (2, 18, 20), (2, 28, 20), (2, 8, 20), (2, 20, 25), (2, 20, 4)):
        with pytest.raises(ValueError, match="other sizes than"):
            program.network(torch.rand(n, 3, h, w))


def test_a_program_runs_where_its_images_are(tmp_path: Path) -> None:
    """Also one that makes tensors, on the device that it was exported on."""

    class Places(_Small):
        def forward(self, images: Tensor) -> Tensor:
            ones = torch.ones(1, 3, 1, 1, device=images.device, dtype=images.dtype)
            return super().forward(images * ones.to(images.device))

    program = _loaded(_saved(Places()), tmp_path / "a.pt2", SHAPE)
    answer = program.network.to("meta")(torch.empty(5, 3, 20, 20, device="meta"))
    assert (answer.device.type, answer.shape) == ("meta", (5, 3))


def test_a_program_is_differentiable_in_its_images(whole: bytes, tmp_path: Path) -> None:
    images = torch.rand(2, 3, 20, 20, requires_grad=True)
    _loaded(whole, tmp_path / "a.pt2", SHAPE).network(images).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_programs_with_the_same_weights_have_different_fingerprints(
    whole: bytes, tmp_path: Path
) -> None:
    def change(program: Program) -> None:
        node = next(n for n in _graph(program)["nodes"] if "relu" in n["target"])
        node["target"] = "torch.ops.aten.gelu.default"

    one = _loaded(whole, tmp_path / "a.pt2", SHAPE).network
    other = exported.load(_changed(whole, tmp_path / "b.pt2", change), SHAPE).network
    again = exported.load(tmp_path / "a.pt2", SHAPE).network
    images = torch.rand(2, 3, 20, 20)
    assert not torch.equal(one(images), other(images))
    assert teacher_cache.fingerprint(one) != teacher_cache.fingerprint(other)
    assert teacher_cache.fingerprint(one) == teacher_cache.fingerprint(again)


def test_every_operator_that_is_allowed_takes_no_text_but_words_for_ways_to_compute() -> None:
    words = {"approximate", "mode", "equation", "rounding_mode", "indexing", "padding", "ord"}
    words |= {"padding_mode", "reduce", "interpolation"}
    text = set()
    for name in exported_operators.OPERATORS:
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            schema = getattr(packet, overload)._schema
            if exported_operators.returns_tensors(schema, name):
                text |= {a.name for a in schema.arguments if "str" in str(a.type)}
                assert not any("Generator" in str(a.type) for a in schema.arguments)
    assert text <= words
