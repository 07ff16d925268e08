"""Networks of the user's own code: `module:attribute` as student, teacher, peer and learner."""

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import kd_support as support
import numpy as np
import pytest
import safetensors.numpy
import torch
from kd_support import main, refused, stop_in

from dsdistill.harness.data import preprocess
from dsdistill.harness.errors import UserError
from kd.evaluation import learners
from kd.models import networks, saved_models, teachers
from kd.runs import finished_runs

CODE = """
import pathlib

import torch
from torch import nn

pathlib.Path("imported").touch()


class Net(nn.Module):
    def __init__(self, num_classes, in_channels=1, width=4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(in_channels, width, 3), nn.ReLU(), nn.Flatten())
        self.fc = nn.LazyLinear(num_classes)

    def forward(self, x):
        return self.fc(self.body(x))


def trained(num_classes=3):
    return Net(num_classes)


def colour(classes):
    return Net(classes, in_channels=3)


class Tuple(Net):
    def forward(self, x):
        return super().forward(x), x


class Raising(Net):
    def forward(self, x):
        raise IndexError("no such layer")  # line 35


class LayerNorm(Net):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return super().forward(self.norm(x))


ready = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
number = 3
seven = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))


def no_module():
    return 3
"""
SHAPE, NAMES = (8, 8, 1), ("0", "1", "2")
NET = "usernet:Net(width=6)"
QUICK = ("--epochs", 2, "--batch-size", 32)


@pytest.fixture(autouse=True)
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's module in the current folder, which leaves a file where it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("kd.runs.curves.draw", lambda folder: None)
    for name in ("usernet", "broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    support.write_npz(tmp_path / "data.npz")
    (tmp_path / "usernet.py").write_text(CODE)
    (tmp_path / "broken.py").write_text("import usernet\n\nraise KeyError('gone')\n")
    return tmp_path / "usernet.py"


def forget() -> None:
    """As in a new process: the module is not imported."""
    sys.modules.pop("usernet", None)
    Path("imported").unlink(missing_ok=True)


def train(monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    main(monkeypatch, "train", "data.npz", *QUICK, *options)


def test_a_run_of_own_code_is_used_only_where_its_code_is_named_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(monkeypatch, "--student", NET, "--out", "run")
    assert json.loads(Path("run/model.json").read_text())["name"] == NET
    command = finished_runs.read(Path("run")).command
    assert f"--student '{NET}'" in command
    forget()
    student = ("--student", "mlp:4", "--teacher", "run")
    commands = (
        ("evaluate", "run"),
        ("export", "run", "--format", "safetensors", "--out", "exported"),
        ("train", "data.npz", *QUICK, *student, "--out", "taught"),
        ("train", "data.npz", *QUICK, "--student", "run", "--out", "further"),
    )
    for words in commands:
        line = refused(monkeypatch, *words)
        assert f'--trust-module "{NET}"' in line
        assert "a file may not choose the code that runs here" in line
        other = ("--trust-module", "usernet:Net(width=4),usernet:Net")
        assert "--trust-module" in refused(monkeypatch, *words, *other)
    assert not Path("imported").exists()
    for words in commands:
        main(monkeypatch, *words, "--trust-module", "usernet:Net( width = 6 )")
    assert Path("imported").exists()
    assert Path("exported/student.safetensors").exists()
    # Named as another part of the same line, it is named.
    forget()
    train(monkeypatch, "--student", NET, "--teacher", "run", "--out", "same")
    capsys.readouterr()
    main(monkeypatch, "report", "run", "--out", "page.html")
    assert "usernet:Net(width=6)" in Path("page.html").read_text()


@pytest.mark.parametrize(
    "name", ["os:system(command='touch run')", "usernet:Net", "usernet:Net(width=6,num_classes=3)"]
)
def test_a_description_from_elsewhere_runs_nothing(tmp_path: Path, name: str) -> None:
    """Of an earlier version, which had no checksums: anybody can write such a file."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    classifier = networks.build("mlp:4", SHAPE, 3)
    model = saved_models.Model(classifier, "mlp:4", NAMES, SHAPE, preprocess.identity(1))
    saved_models.save_run(folder, model)
    card = json.loads((folder / "model.json").read_text())
    del card["sha256"]
    (folder / "model.json").write_text(json.dumps(card | {"name": name}))
    with pytest.raises(UserError, match="a file may not choose the code"):
        saved_models.load_run(folder, typed=[NET, "os:getcwd"])
    assert not Path("imported").exists()
    assert not Path("run").exists()


def test_a_teacher_that_a_run_names_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    train(monkeypatch, "--student", "mlp:4", "--teacher", "usernet:trained", "--out", "run")
    forget()
    assert '--trust-module "usernet:trained"' in refused(monkeypatch, "evaluate", "run")
    assert not Path("imported").exists()
    main(monkeypatch, "evaluate", "run", "--teacher", "usernet:trained")


@pytest.mark.parametrize("student", ["usernet:Net", "usernet:colour", "usernet:ready"])
def test_a_class_a_function_and_a_network_are_students(student: str) -> None:
    built = networks.build(student, SHAPE, 3, seed=1)
    again = networks.build(student, SHAPE, 3, seed=1)
    pairs = zip(built.network.parameters(), again.network.parameters(), strict=True)
    assert all(a is not b and torch.equal(a, b) for a, b in pairs)
    assert built(torch.rand(5, 1, 8, 8)).shape == (5, 3)
    assert built.training
    assert built.channels == (3 if student == "usernet:colour" else None)


def test_the_same_network_trains_as_a_built_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`usernet:twin` is `mlp:4`, so nothing but its name may differ."""
    shown = "\n\ndef twin(classes):\n    from kd.models.zoo import builtin\n"
    shown += "    return builtin.mlp((8, 8, 1), classes, 4)\n"
    Path("usernet.py").write_text(CODE + shown)
    for name, out in (("mlp:4", "built-in"), ("usernet:twin", "own")):
        train(monkeypatch, "--student", name, "--out", out)
    ours, theirs = (
        safetensors.numpy.load_file(Path(out) / "student.safetensors")
        for out in ("own", "built-in")
    )
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_teacher_brings_its_classes_and_weights() -> None:
    data = preprocess.identity(1)
    teacher = teachers.load("usernet:trained", data, SHAPE, NAMES)
    assert not teacher.training
    seven = teachers.load("usernet:seven", data, SHAPE, NAMES, class_map={"0": 6, "1": 5, "2": 4})
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(seven(images), seven.classifier(images)[:, [6, 5, 4]])
    large = teachers.load("usernet:trained", data, SHAPE, NAMES, image_size=12)
    assert large.resolved.size == (12, 12)
    torch.save(networks.build("usernet:trained", SHAPE, 7, seed=5).network.state_dict(), "w.pth")
    filed = teachers.load(
        "usernet:trained@w.pth", data, SHAPE, NAMES, class_map={"0": 6, "1": 5, "2": 4}
    )
    assert filed(images).shape == (4, 3)
    with pytest.raises(UserError, match="classes"):
        teachers.load("usernet:seven", data, SHAPE, NAMES)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("usernet:Nett", "has no 'Nett'; did you mean 'Net'?"),
        ("usernett:Net", "there is no module 'usernett' in the current folder"),
        ("timn:resnet18", "did you mean 'timm'?"),
        ("broken:net", "KeyError: 'gone' (broken.py, line 3)"),
        ("usernet:number", "must be a class of torch.nn.Module"),
        ("usernet:no_module", "returns int: it must return a torch.nn.Module"),
        ("usernet:seven", "gives 7 scores for each image, and there are 3 classes"),
        ("usernet:Tuple", "scores of shape (2, classes) for 2 images, got tuple"),
        ("usernet:Raising", "IndexError: no such layer (usernet.py, line 35)"),
        ("usernet:Net(16)", "literals by keyword, as in usernet:Net(width=32)"),
        ("usernet:Net(wide=1)", "unexpected keyword argument 'wide'"),
        ("usernet:ready(width=1)", "takes no arguments"),
        ("resnet18:32", "unknown source of networks 'resnet18'"),
    ],
)
def test_what_is_no_network_is_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    line = refused(monkeypatch, "train", "data.npz", "--student", name, "--out", "run")
    assert words in line
    assert not Path("run").exists()


def test_published_weights_of_own_code_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    line = refused(monkeypatch, "train", "data.npz", "--student", NET, "--pretrained")
    assert "leave --pretrained out" in line


def test_a_resume_imports_only_what_is_typed_again_and_refuses_changed_code(
    monkeypatch: pytest.MonkeyPatch, code: Path
) -> None:
    """A `config.json` could name any code of the machine, as `subprocess:getoutput(cmd=...)`."""
    peer = "usernet:Net(width=2)"
    options = ("--student", NET, "--peers", f"{peer},mlp:4")
    train(monkeypatch, *options, "--out", "whole")
    stop_in(monkeypatch, 2, "train", "data.npz", *QUICK, *options, "--out", "run")
    forget()
    line = refused(monkeypatch, "train", "--resume", "--out", "run")
    assert f"config.json names the code {NET}, and a file may not choose" in line
    line = refused(monkeypatch, "train", "--resume", "--out", "run", "--student", NET)
    assert f"names the code {peer}" in line
    assert "usernet" not in sys.modules
    again = ("train", "--resume", "--out", "run", "--trust-module", f"{NET},{peer}")
    code.write_text(CODE.replace("nn.ReLU()", "nn.Tanh()"))
    line = refused(monkeypatch, *again)
    assert "was started: module of the student" in line
    code.write_text(CODE)
    forget()
    main(monkeypatch, *again)
    name = "student.safetensors"
    assert Path("run", name).read_bytes() == Path("whole", name).read_bytes()


@pytest.mark.parametrize("known", [True, False], ids=["on record", "of an earlier version"])
def test_a_resume_refuses_other_layers_of_equal_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], known: bool
) -> None:
    """Only the module that is named is hashed as code, not what it imports."""
    network = "usernet:Imported"
    Path("useract.py").write_text("from torch.nn import ReLU as Act\n")
    with Path("usernet.py").open("a") as file:
        file.write("\n\nimport useract\n\n\nclass Imported(Net):\n")
        file.write("    def __init__(self, num_classes):\n        super().__init__(num_classes)\n")
        file.write("        self.body[1] = useract.Act()\n")
    monkeypatch.delitem(sys.modules, "useract", raising=False)
    stop_in(monkeypatch, 2, "train", "data.npz", *QUICK, "--student", network, "--out", "run")
    config = json.loads(Path("run/config.json").read_text())
    (name,) = (name for name in config["inputs"] if name.startswith("layers of the student"))
    assert name == f"layers of the student (torch {version('torch')})"
    if not known:
        del config["inputs"][name]
        Path("run/config.json").write_text(json.dumps(config))
    forget()
    del sys.modules["useract"]
    Path("useract.py").write_text("from torch.nn import Tanh as Act\n")
    again = ("train", "--resume", "--out", "run", "--trust-module", network)
    capsys.readouterr()
    if known:
        assert f"was started: {name} (SHA-256 was" in refused(monkeypatch, *again)
    else:
        main(monkeypatch, *again)
        assert f"note: run has no hash of: {name}; whether" in capsys.readouterr().err


def test_changed_code_of_a_teacher_is_another_teacher(code: Path) -> None:
    """Its answers in the cache, and a resume, go by its hash: its weights may be equal."""
    first = networks.build("usernet:ready", SHAPE, 3)
    shutil.copy(code, "other.py")
    Path("other.py").write_text(code.read_text() + "\n# changed\n")
    sys.modules.pop("other", None)
    other = networks.build("other:ready", SHAPE, 3)
    assert first.code is not None
    assert other.code is not None
    assert not torch.equal(first.code, other.code)
    assert "code" in first.state_dict()
    assert "code" not in first.network.state_dict()


def test_a_chain_of_assistants_trusts_its_own_links(monkeypatch: pytest.MonkeyPatch) -> None:
    train(monkeypatch, "--student", "mlp:8", "--out", "teacher")
    chain = ("--teacher", "teacher", "--assistants", "usernet:Net(width=3,in_channels=1),mlp:4")
    train(monkeypatch, "--student", "mlp:4", *chain, "--out", "run")
    assert saved_models.class_order("run-1") == ("0", "1", "2")


def test_own_code_is_a_learner_whose_results_are_not_kept() -> None:
    learner = learners.network_learner(NET, steps=2, shape=SHAPE, classes=3)
    assert learner.identity is None
    assert learner.recipe.optimizer == "adamw"
    examples = support.easy(n=9, classes=3)
    trained = learner(examples, examples, 0)
    assert trained(examples.images()).shape == (9, 3)
    assert trained.facts["parameters"] == networks.parameter_count(trained.network)
    norm = learners.network_learner("usernet:LayerNorm", shape=SHAPE, classes=3)
    assert norm.recipe.lr != learner.recipe.lr
