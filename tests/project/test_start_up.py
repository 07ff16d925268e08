"""What a short run does not import, and what the default installation does not bring."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Neither command needs them before its first step.
UNUSED = ("neural_tangents", "tensorflow", "transformers", "datasets", "sklearn", "onnx", "IPython")
# Runs a command, and lists what is loaded when the first figures are written.
AT_FIRST_FIGURES = """
import sys
from {module} import main
from dsdistill.harness.runs.metrics_file import Metrics

class FirstFigures(BaseException):
    pass

def stop(self, *args, **figures):
    raise FirstFigures

Metrics.write = stop
sys.argv = {argv}
try:
    main()
except FirstFigures:
    print(*(name for name in {names} if name in sys.modules))
else:
    raise SystemExit("no figures were written")
"""
KIP = ("dsdistill.cli", ["dsdistill", "kip", "digits", "--steps", "1"])
TRAIN = ("kd.cli", ["kd", "train", "digits", "--student", "mlp:8", "--epochs", "1"])


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (KIP, ("torch", "timm", "torchvision", "accelerate", "matplotlib", *UNUSED)),
        (TRAIN, ("jax", "optax", "timm", "torchvision", "matplotlib", "scipy", *UNUSED)),
    ],
    ids=["dsdistill kip", "kd train"],
)
def test_the_start_imports_nothing_that_the_run_does_not_use(tmp_path, command, names):
    module, argv = command
    argv = [*argv, "--out", str(tmp_path / "run")]
    script = AT_FIRST_FIGURES.format(module=module, argv=argv, names=names)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2].split() == [], done.stdout


def _project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_default_installation_has_no_neural_tangents_and_the_tests_have():
    project = _project()["project"]
    assert not any(line.startswith("neural-tangents") for line in project["dependencies"])
    extras = project["optional-dependencies"]
    assert [line.split(">=")[0] for line in extras["tangents"]] == ["neural-tangents"]
    assert "tangents" in extras["test"][0].removeprefix("dsdistill[").rstrip("]").split(",")


def test_uv_leaves_tensorflow_out():
    overrides = _project()["tool"]["uv"]["override-dependencies"]
    assert {line.split(";")[0] for line in overrides} == {"tensorflow", "tf2jax"}
