"""Options of a run to `config.json` and back."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from dsdistill.harness import paths
from dsdistill.harness.data import datasets
from dsdistill.harness.runs.options import Storage
from dsdistill.harness.runs.run_folder import RunError


@dataclass(frozen=True)
class Recipe:
    rate: float | None = None
    drops: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Options:
    data: str = "digits"
    root: Path = Path("root")
    kind: Literal["a", "b", 3] | None = None
    size: Annotated[int | str, "shown"] = 1
    share: float = 0.5
    loud: bool = False
    maps: tuple[float | str, ...] = ()
    recipe: Recipe = field(default_factory=Recipe)
    out: Path | None = None


STORAGE = Storage(unstored=("out",), free=("root",), absolute={"data": paths.absolute})
CHANGED = Options(
    "mine", Path("there"), "b", "2s", 1, True, (0.5, ","), Recipe(0.1, (3.0, 4)), Path("run")
)


def stored(options: Options, **changed: Any) -> dict[str, Any]:
    return json.loads(json.dumps(STORAGE.to_json(options))) | changed


def restored(config: dict[str, Any], options: Options | None = None) -> Options:
    return STORAGE.from_json(options or Options(), Path("run"), config)


def test_options_come_back_as_they_were() -> None:
    call = Options(root=Path("elsewhere"), out=Path("run"))
    assert restored(stored(CHANGED), call) == replace(CHANGED, root=Path("elsewhere"))


def test_options_inside_an_option_are_stored_beside_the_others() -> None:
    names = ["data", "root", "kind", "size", "share", "loud", "maps", "rate", "drops"]
    assert list(stored(CHANGED)) == names


def test_what_exists_is_stored_with_its_absolute_path(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert stored(CHANGED)["data"] == "mine"
    Path("mine").mkdir()
    config = stored(CHANGED)
    assert (config["data"], config["root"]) == (str(tmp_path / "mine"), str(tmp_path / "there"))


def test_a_data_set_keeps_its_name_beside_a_folder_of_that_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mnist", "mine"):
        Path(name).mkdir()
    named = [datasets.absolute_name(data) for data in ("mnist", "mine", "none", "")]
    assert named == ["mnist", str(tmp_path / "mine"), "none", ""]


def test_options_that_a_file_lacks_are_those_of_the_call() -> None:
    assert restored({"size": 4}, Options(share=0.25)) == Options(share=0.25, size=4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data", 3),
        ("data", None),
        ("kind", "c"),
        ("kind", 3.0),
        ("size", 1.5),
        ("share", "0.5"),
        ("share", True),
        ("loud", 1),
        ("maps", 0.5),
        ("maps", [None]),
        ("rate", "fast"),
        ("drops", [1.0, "x"]),
        ("out", "run"),
        ("unknown", 1),
    ],
)
def test_a_value_that_is_none_of_the_option_is_refused_in_one_line(name: str, value: Any) -> None:
    config = stored(CHANGED, **{name: value})
    with pytest.raises(RunError, match=rf"config\.json is damaged.*: {name} cannot be") as caught:
        restored(config)
    assert "\n" not in str(caught.value)


def test_what_a_run_adds_to_its_options_is_no_option() -> None:
    beside = {"command": "kip", "chosen": {"target_batch": 5}, "inputs": {"data": "0" * 64}}
    assert restored(stored(CHANGED, **beside)) == replace(CHANGED, root=Options().root, out=None)
