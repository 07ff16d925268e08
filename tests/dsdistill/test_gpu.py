"""GPU: kernels against the host, KIP, half precision, resuming.

Without a GPU, its kernels are interpreted, and lowered as far as possible.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import kd_support as support
import kernel_oracle as oracle
import numpy as np
import pytest
import safetensors.numpy
import torch

from dsdistill.harness.data import preprocess
from dsdistill.harness.data.labeled_images import Examples
from dsdistill.kernels import networks, notation
from dsdistill.kernels.conv import conv_kernel, gpu, lanes, planes, stages, variances
from dsdistill.methods import kip
from dsdistill.methods.adam import Adam
from dsdistill.methods.gauss_newton import GaussNewton
from dsdistill.methods.initial_support import draw_support

on_jax = pytest.mark.skipif(jax.default_backend() == "cpu", reason="JAX has no GPU here")
on_torch = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no GPU here")
VALUE, GRADIENT = 1e-6, 1e-5  # relative to the largest entry
STUDENT = ("train", "digits", "--student", "convnet:8", "--device", "cuda", "--seed", "5")


def relative(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def images(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, *shape)).astype(np.float32)


def planes_of(text: str, *shape: int) -> list[tuple]:
    """Every level of a network for one image against four: level, what enters it, deviations.

    Also those of the images' variances, where both sides have lanes and there is no tangent.
    """
    network = notation.parse(text)
    x1, x2 = (jnp.asarray(images(n, *shape, seed=n), jnp.float64) for n in (1, 4))
    one, two = (
        conv_kernel._PreparedImages.one_by_one(x1, network),
        conv_kernel._PreparedImages.in_lanes(x2, network),
    )
    image, block = (jax.tree.map(lambda a: a[0], side) for side in (one, two))
    levels = lanes.build_levels(network, block.images.shape)
    sigmas = conv_kernel._relu_deviations(levels, image.deviations, block.deviations)
    entering, _ = conv_kernel._level_inputs(levels, image.images, block.images, sigmas)
    levels_and_inputs = list(zip(levels, entering, sigmas, strict=True))
    deviations, levels, entering, _ = variances._propagate(block.images, network)
    rest = iter(deviations)
    for level, source in zip(levels, entering, strict=True):
        own = [next(rest) for stage in level.stages if stage.relu]
        levels_and_inputs.append(
            (level, source, tuple(stages.pair_deviations(level.grid, d, d) for d in own))
        )
    return levels_and_inputs


@pytest.fixture
def unoptimized() -> Iterator[None]:
    """XLA's optimisations would take half of the time, for programs that run once."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize(
    ("text", "shape"), [("CR-CRP-flatten", (5, 4, 2)), ("CR-PCRC-gap", (4, 5, 1))]
)
def test_programs_of_a_level_are_what_planes_computes(
    monkeypatch: pytest.MonkeyPatch, text: str, shape: tuple[int, int, int]
) -> None:
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        for level, source, sigmas in planes_of(text, *shape):
            expected = planes.forward(level, source, sigmas)
            g = jnp.asarray(rng.normal(size=expected.shape))
            g = jax.lax.complex(g, g[::-1]) if stages.is_complex(expected) else g
            expected_back = planes.backward(level, source, sigmas, g)
            with monkeypatch.context() as patch:
                patch.setattr(gpu, "INTERPRET", True)
                forward = planes.forward(level, source, sigmas)
                found_back = planes.backward(level, source, sigmas, g)
            pairs = zip(*map(jax.tree.leaves, (found_back, expected_back)), strict=True)
            for mine, theirs in [(forward, expected), *pairs]:
                np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("text", ["CR-2xCRP-flatten", "CR-CRP-CR-gap"])
def test_programs_are_lowered_for_a_gpu_that_is_not_here(
    monkeypatch: pytest.MonkeyPatch, text: str, dtype: str
) -> None:
    monkeypatch.setattr(gpu, "is_enabled", lambda: True)
    with jax.enable_x64(dtype == "float64"):
        ones, others = (jax.ShapeDtypeStruct((n, 28, 28, 1), dtype) for n in (4, 300))
        traced = jax.jit(networks.parse(text).slopes).trace(ones, others)
        try:
            lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
        except RuntimeError as error:
            pytest.skip(f"JAX {jax.__version__} needs a GPU for it: {error}")
    assert lowered.count("xla.gpu.triton") > 10


@on_jax
@pytest.mark.parametrize("text", ["2xCRP-flatten", "CR-2xCRP-flatten", "CR-CRP-CR-gap"])
def test_kernels_of_exact_planes(text: str) -> None:
    x1, x2 = images(2, 8, 6, 1), images(3, 8, 6, 1, seed=1)
    network, plain = networks.parse(text), notation.parse(text)
    value, pull = jax.vjp(lambda x: network.kernel(x, x2), jnp.asarray(x1))
    assert relative(value, oracle.ntk(x1, x2, plain)) < VALUE
    direction = images(2, 8, 6, 1, seed=2)
    moved = (pull(jnp.ones_like(value))[0] * direction).sum((1, 2, 3))
    assert relative(moved, oracle.slopes(x1, x2, plain, direction).sum(1)) < GRADIENT


@on_jax
def test_the_closed_form_does_not_use_tf32() -> None:
    x = images(200, 28, 28, 1)
    kernel = networks.parse("fc").kernel
    with jax.enable_x64(True):
        exact = kernel(jnp.asarray(x, jnp.float64), jnp.asarray(x[:7], jnp.float64))
    assert relative(jax.jit(kernel)(x, x[:7]), exact) < VALUE


OPTIMIZERS = {"adam": Adam(), "gauss-newton": GaussNewton(0.04)}


def first_step(optimizer: str) -> tuple[np.ndarray, float]:
    """The change of the images by KIP's first step on digits, and the loss before it."""
    train = support.digits().train
    examples = Examples(train, preprocess.fit("standardise", train.chunks, train.shape))
    start = draw_support(examples, 1, noise=False, corruption=0, seed=0)
    network = networks.parse("CRP-flatten")
    objective = kip.KipObjective(
        (network,), optimizer=OPTIMIZERS[optimizer], learn_labels=True, ridge=1e-3
    )
    stream = kip.distill(objective, start, examples, steps=1, target_batch=50, seed=0)
    step = next(stream)
    return np.asarray(step.state.images) - start.images, step.loss


@on_jax
@pytest.mark.parametrize("optimizer", ["adam", "gauss-newton"])
def test_a_step_of_kip_is_that_of_the_host(tmp_path: Path, optimizer: str) -> None:
    code = (
        "import sys, numpy, test_gpu; "
        f"numpy.savez(sys.argv[1], *test_gpu.first_step({optimizer!r}))"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    file = tmp_path / "host.npz"
    subprocess.run([sys.executable, "-c", code, file], env=env, check=True)
    with np.load(file) as host:
        expected, expected_loss = host["arr_0"], host["arr_1"]
    moved, loss = first_step(optimizer)
    assert relative(loss, expected_loss) < GRADIENT
    # Conjugate gradients, and Adam's division of small numbers, enlarge rounding.
    assert np.corrcoef(moved.ravel(), expected.ravel())[0, 1] > 0.999


@on_torch
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_student_learns_in_every_precision(tmp_path: Path, precision: str) -> None:
    done = support.kd(
        *STUDENT, "--precision", precision, "--epochs", 40, "--out", "run", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["test_accuracy"] > 0.8
    stored = safetensors.numpy.load_file(tmp_path / "run" / "student.safetensors")
    assert {value.dtype for value in stored.values()} == {np.dtype(np.float32)}


@on_torch
def test_a_compiled_student_in_channels_last_format(tmp_path: Path) -> None:
    options = ("--compile", "--channels-last", "--precision", "bf16", "--out", "run")
    done = support.kd(*STUDENT, *options, "--epochs", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@on_torch
def test_killed_in_fp16_and_resumed_is_bit_for_bit_the_uninterrupted_run(tmp_path: Path) -> None:
    line = (*STUDENT, "--precision", "fp16", "--epochs", "20")
    command = [sys.executable, "-m", "kd", *line, "--out", "killed"]
    with subprocess.Popen(command, cwd=tmp_path, env=support.environment()) as process:
        while not (tmp_path / "killed" / "checkpoint.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    for options in (("train", "--out", "killed", "--resume"), (*line, "--out", "whole")):
        done = support.kd(*options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    killed, whole = (
        safetensors.numpy.load_file(tmp_path / name / "student.safetensors")
        for name in ("killed", "whole")
    )
    assert killed.keys() == whole.keys()
    assert all(np.array_equal(killed[name], whole[name]) for name in whole)
