"""What a distilled set says of itself: it may be anything, and steers nothing by itself."""

import contextlib
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsdistill.commands import evaluate, evaluation_parts, inspect, reproduce
from dsdistill.harness.data import datasets, distilled_set, preprocess, provenance
from dsdistill.harness.data.distilled_set import DistilledSet
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation.results import Result
from dsdistill.harness.reports import markdown, report
from dsdistill.methods import initial_support
from dsdistill.options import EvaluateOptions
from kd.data import data_source

DIGITS = datasets.load("digits", root=Path("unused"))
WHOLE: dict[str, Any] = {
    "method": "kip",
    "kernel": "fc(1)",
    "evaluation_ridge": 1e-6,
    "data": {"name": "digits", "source": "digits", "sha256": DIGITS.digest},
    "config": {
        "data": "digits",
        "image_size": None,
        "validation_fraction": 0.1,
        "kernel": "fc",
        "depth": None,
        "w_std": 2**0.5,
        "b_std": 0.1,
    },
    "metrics": {"test_accuracy": 0.9},
    "seconds": 3.5,
    "peak_memory": 10**8,
}


def _set(**changed: Any) -> DistilledSet:
    """An image of each digit, with a provenance."""
    train = DIGITS.train
    fitted = preprocess.fit("standardise", train.chunks, train.shape)
    rows = np.array([np.flatnonzero(train.labels == k)[0] for k in range(10)])
    labels = np.eye(10, dtype=np.float32) - np.float32(0.1)
    stored = json.loads(json.dumps(WHOLE)) | changed
    return DistilledSet(fitted.apply(train.images(rows)), labels, fitted, train.classes, stored)


def _saved(folder: Path, **changed: Any) -> Path:
    distilled_set.save(folder / "set.safetensors", _set(**changed))
    return folder / "set.safetensors"


def _config(**changed: Any) -> dict[str, Any]:
    return {"config": WHOLE["config"] | changed}


def _data(**changed: Any) -> dict[str, Any]:
    return {"data": WHOLE["data"] | changed}


def _options(file: Path, **changed: Any) -> EvaluateOptions:
    small = {"learners": "ridge", "controls": "", "cache": None, "seeds": 1}
    return EvaluateOptions(file, **(small | changed))


def _module(folder: Path, patch: pytest.MonkeyPatch, name: str) -> Path:
    """A module in the current folder that leaves a file where it is imported."""
    marker = folder / "imported"
    (folder / f"{name}.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
        "def net(x1, x2, get):\n    import jax.numpy as jnp\n"
        "    x2 = x1 if x2 is None else x2\n"
        "    return x1.reshape(len(x1), -1) @ x2.reshape(len(x2), -1).T\n"
    )
    patch.chdir(folder)
    patch.syspath_prepend("")
    return marker


@pytest.mark.parametrize("kernel", ["stored_kernel:net", "fc,stored_kernel:net", "json:loads"])
def test_a_set_imports_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    marker = _module(tmp_path, monkeypatch, "stored_kernel")
    file = _saved(tmp_path, kernel=kernel, **_config(kernel=kernel))
    first = kernel.split(",")[0]
    if ":" in first:
        with pytest.raises(UserError, match=rf"--learners ridge:{first}") as caught:
            evaluation_parts.assemble(_options(file))
        assert "\n" not in str(caught.value)
    else:
        evaluation_parts.assemble(_options(file))
    inspect.print_set(file, as_json=False)
    initial_support.load(str(file))
    data_source.resolve(str(file), root=tmp_path)
    assert not marker.exists()
    assert "stored_kernel" not in sys.modules


def test_what_the_user_types_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = _module(tmp_path, monkeypatch, "typed_kernel")
    file = _saved(tmp_path, **_config(kernel="typed_kernel:net"))
    parts = evaluation_parts.assemble(_options(file, learners="ridge:typed_kernel:net"))
    assert marker.exists()
    assert [learner.name for learner in parts.learners] == ["ridge:typed_kernel:net"]


@pytest.mark.parametrize(
    "content",
    ["1 +", "raise RuntimeError('two\\nlines')", "raise ValueError", "import nowhere_at_all", ""],
)
def test_an_error_in_a_users_module_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    _module(tmp_path, monkeypatch, "unused")
    name = f"broken_{abs(hash(content))}"
    (tmp_path / f"{name}.py").write_text(content)
    options = _options(_saved(tmp_path), learners=f"ridge:{name}:net")
    with pytest.raises(UserError, match="cannot be imported: ") as caught:
        evaluation_parts.assemble(options)
    assert "\n" not in str(caught.value)


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "a huge size": (_config(image_size=1_000_000), "config.image_size"),
    "another size": (_config(image_size=9), "config.image_size"),
    "a size as text": (_config(image_size="8"), "config.image_size"),
    "a fractional size": (_config(image_size=8.0), "config.image_size"),
    "a negative size": (_config(image_size=-8), "config.image_size"),
    "true as size": (_config(image_size=True), "config.image_size"),
    "a list as size": (_config(image_size=[8]), "config.image_size"),
    "all held out": (_config(validation_fraction=1.0), "config.validation_fraction"),
    "a negative share": (_config(validation_fraction=-0.1), "config.validation_fraction"),
    "a share as text": (_config(validation_fraction="0.1"), "config.validation_fraction"),
    "a checksum as number": (_data(sha256=7), "data.sha256"),
    "a short checksum": (_data(sha256="abc"), "data.sha256"),
}
ODD_FOR_RIDGE: dict[str, tuple[dict[str, Any], str]] = {
    "an address": (_data(source="https://example.com/set.npz"), "data.source"),
    "an option": (_data(source="--out=x"), "data.source"),
    "a number as source": (_data(source=3), "data.source"),
    "a deep network": (_config(kernel="fc(99999999)"), "config.kernel"),
    "a long sequence": (_config(kernel="CR-9999999xCRP-flatten"), "config.kernel"),
    "a kernel in two lines": (_config(kernel="fc\nconv"), "config.kernel"),
    "a kernel of numbers": (_config(kernel=[1]), "config.kernel"),
    "a depth of a million": (_config(kernel="fc", depth=10**6), "config.depth"),
    "a depth as text": (_config(depth="3"), "config.depth"),
    "no deviation": (_config(w_std="wide"), "config.w_std"),
    "a negative ridge": ({"evaluation_ridge": -1.0}, "evaluation_ridge"),
    "a ridge as text": ({"evaluation_ridge": "small"}, "evaluation_ridge"),
    "a list for a config": ({"config": [1]}, "config"),
    "a text for data": ({"data": "digits"}, "data"),
}


@pytest.mark.parametrize("kind", [*ODD, *ODD_FOR_RIDGE])
def test_an_odd_value_is_one_line_before_anything_is_trained(tmp_path: Path, kind: str) -> None:
    changed, name = (ODD | ODD_FOR_RIDGE)[kind]
    file = _saved(tmp_path, **changed)
    with pytest.raises(UserError, match=rf"states a {name} that cannot be used"):
        evaluation_parts.assemble(_options(file))
    if kind in ODD:
        with pytest.raises(UserError, match=rf"states a {name} that cannot be used"):
            data_source.resolve(str(file), root=tmp_path)


@pytest.mark.parametrize("lacking", ["method", "seconds", "config", "metrics", "kernel"])
def test_a_missing_part_is_not_needed(tmp_path: Path, lacking: str) -> None:
    distilled = _set()
    rest = {k: v for k, v in distilled.provenance.items() if k != lacking}
    file = tmp_path / "set.safetensors"
    distilled_set.save(file, replace(distilled, provenance=rest))
    parts = evaluation_parts.assemble(_options(file))
    assert parts.splits.digest == DIGITS.digest
    evaluate.build_report(parts, _results(), 1.0)


def test_data_that_a_set_does_not_name_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "set.safetensors"
    distilled_set.save(file, replace(_set(), provenance={}))
    with pytest.raises(UserError, match=r"add --data, such as"):
        evaluation_parts.assemble(_options(file))
    parts = evaluation_parts.assemble(_options(file, data="digits"))
    assert parts.splits.digest == DIGITS.digest


def test_a_folder_that_a_set_names_is_read_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    images = np.random.default_rng(0).random((200, 8, 8, 1)).astype(np.float32)
    labels = np.arange(200) % 10
    np.savez(tmp_path / "mine.npz", images=images, labels=labels)
    source = str(tmp_path / "mine.npz")
    splits = datasets.load(source, root=tmp_path)
    changed = _data(source=source, sha256=splits.digest)
    distilled = replace(_set(**changed), classes=splits.train.classes)
    distilled_set.save(tmp_path / "set.safetensors", distilled)
    evaluation_parts.assemble(_options(tmp_path / "set.safetensors"))
    assert f"names {source} as its data, which is read" in capsys.readouterr().err


# --- commands to copy


def test_a_command_to_copy_runs_nothing_else() -> None:
    config = {"data": "a; touch x $(y) `z`", "kernel": "fc' || true '", "seed": 3}
    line = reproduce.distil_line("kip", config)
    assert line is not None
    assert shlex.split(line) == [
        *("dsdistill", "kip", config["data"], "--kernel", config["kernel"], "--seed", "3"),
    ]


def test_a_command_to_copy_takes_no_option_from_a_value() -> None:
    line = reproduce.distil_line("ls", {"data": "--kernel=evil:net", "init": "x", "kernel": "-h"})
    assert line is not None
    assert shlex.split(line)[2:] == ["./--kernel=evil:net", "--kernel=-h"]


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("kip; rm -r x", {"data": "digits"}),
        ("kip", {"data": 3}),
        ("kip", {"data": "a\nb"}),
        ("kip", {"data": "a\x1b[2Jb"}),
        ("kip", {"data": "\u202edigits"}),
        ("kip", {"data": "digits", "optimizer": "unknown"}),
        ("kip", {"data": "digits", "optimizer": []}),
        ("ls", {}),
    ],
)
def test_a_command_that_a_file_does_not_give_is_left_out(
    method: str, config: dict[str, Any]
) -> None:
    assert reproduce.distil_line(method, config) is None


# --- what is shown


def test_inspect_shows_what_the_file_holds_and_not_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    said = {"images": [9, 9, 9, 9], "bytes": "none", "peak_memory": "much", "[/x]": "[bold]y[/]"}
    file = _saved(tmp_path, **said, note="\x1b[2Jgone\u202e", deep=_nested(40))
    inspect.print_set(file, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown["images"] == [10, 8, 8, 1]
    assert shown["bytes"] == _set().nbytes
    inspect.print_set(file, as_json=False)
    text = capsys.readouterr().out
    assert "[/x]" in text
    assert "[bold]y[/]" in text
    assert "\\x1b[2Jgone\\u202e" in text
    assert "\x1b" not in text


def _nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def test_a_whole_provenance_is_read_whole() -> None:
    made = provenance.parse(WHOLE, (8, 8, 1))
    assert (made.method, made.kernel, made.judge) == ("kip", "fc(1)", "fc")
    assert (made.source, made.sha256) == ("digits", DIGITS.digest)
    assert (made.ridge, made.seconds, made.peak_memory) == (1e-6, 3.5, 10**8)
    assert (made.w_std, made.b_std, made.validation_fraction) == (2**0.5, 0.1, 0.1)
    assert made.metrics == {"test_accuracy": 0.9}
    assert made.config == WHOLE["config"]
    assert made.unusable == ()
    assert provenance.parse(_config(image_size=8), (8, 8, 1)).image_size == 8


# --- anything at all

TEXT = st.text(max_size=12) | st.sampled_from(["kip", "ls", "digits", "fc", "a:b", "[/x]", "$x$"])
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
# Half of the values as they should be, so that what comes after them is reached too.
KEYS = {key: JSON | st.just(value) for key, value in WHOLE.items()}
CONFIG = {key: JSON | st.just(value) for key, value in WHOLE["config"].items()}
DATA = {key: JSON | st.just(value) for key, value in WHOLE["data"].items()}
ANY = st.fixed_dictionaries(
    {},
    optional=KEYS
    | {"notes": JSON, "stopped": JSON}
    | {"config": JSON | st.fixed_dictionaries({}, optional=CONFIG | {"chosen": JSON})}
    | {"data": JSON | st.fixed_dictionaries({}, optional=DATA)},
) | st.dictionaries(TEXT, JSON, max_size=4)


def _results() -> list[Result]:
    confusion = np.eye(10, dtype=int).tolist()
    return [
        Result(
            learner="ridge",
            arm="distilled",
            augmented=False,
            seed=0,
            images=10,
            bytes=2960,
            accuracy=0.5,
            per_class=tuple([0.5] * 10),
            confusion=tuple(map(tuple, confusion)),
        )
    ]


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(stored=ANY)
def test_no_provenance_is_more_than_one_line(
    tmp_path: Path, stored: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "set.safetensors"
    distilled_set.save(file, replace(_set(), provenance=stored))
    inspect.print_set(file, as_json=True)
    inspect.print_set(file, as_json=False)
    made, _ = initial_support.load(str(file))
    initial_support.overlaps_validation(made, DIGITS.digest, 0.1)
    for consume in (
        lambda: data_source.resolve(str(file), root=tmp_path),
        lambda: _evaluated(_options(file)),
        lambda: _evaluated(_options(file, data="digits", learners="mlp:8")),
    ):
        with contextlib.suppress(UserError):
            consume()
    capsys.readouterr()


def _evaluated(options: EvaluateOptions) -> None:
    """Everything of an evaluation but the trainings and the drawing."""
    parts = evaluation_parts.assemble(options)
    text = evaluate.build_report(parts, _results(), 1.0, reproduce.evaluate_line(options))
    markdown.render(text)
    report.schema.check("distilled", dict(text.distilled), report.DISTILLED_TYPES)
    json.dumps(dict(text.distilled), allow_nan=False)
