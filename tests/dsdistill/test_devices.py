"""Targets divided among devices: the same kernel and gradient as on one device."""

import subprocess
import sys

import numpy as np
import pytest

PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
from dsdistill.methods import kip
from dsdistill.methods.gauss_newton import GaussNewton
from dsdistill.methods.initial_support import Support
from dsdistill.harness.data.labeled_images import Examples, LabeledImages
from dsdistill.harness.data.preprocess import identity
from dsdistill.parallel import devices
from dsdistill.kernels import networks
network = networks.parse("CR-flatten")
rng = np.random.default_rng(0)
x1, x2, g = (jnp.asarray(rng.standard_normal(s), jnp.float32)
             for s in ((3, 5, 4, 1), (37, 5, 4, 1), (3, 37)))
value, pull = jax.jit(lambda a, b: jax.vjp(network.kernel, a, b))(x1, x2)
half = jnp.asarray(rng.standard_normal((5, 5)), jnp.float32)


def shared(x, real, targets):
    gram = lambda x: jnp.sum(network.symmetric(x) * half)  # the same on every device
    k_ss, slope = network.symmetric(x), jax.grad(gram)(x)
    return k_ss, devices.total(slope) / jax.device_count()


k_ss, slope = jax.jit(devices.shard_targets(shared))(x2[:5], 37, x2)

labels = np.arange(37) % 3
data = LabeledImages(np.array(x2), labels, ("a", "b", "c"))
support = Support(np.array(x2[:6]), np.eye(3, dtype=np.float32)[labels[:6]],
                  np.zeros(x2[:6].shape, bool))
# A well-conditioned solve: rounding stays rounding.
objective = kip.KipObjective((networks.parse("fc"),), 1e-3, GaussNewton(0.3, damping=10),
                             learn_labels=True)
*_, last = kip.distill(objective, support, Examples(data, identity(1), is_preprocessed=True),
                       steps=1, target_batch=33, seed=0)
np.savez(sys.argv[2], value, *pull(g), k_ss, slope, last.state.images, last.state.labels)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    results = {}
    for count in (1, 2):
        path = tmp_path_factory.mktemp("devices") / f"{count}.npz"
        subprocess.run([sys.executable, "-c", PROGRAM, str(count), str(path)], check=True)
        with np.load(path) as arrays:
            results[count] = [arrays[name] for name in arrays.files]
    return results


def test_two_devices_give_the_same_as_one(results):
    """Results on one and two devices for 37 targets and 5 support images, both odd numbers."""
    for one, many in zip(results[1], results[2], strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6 * abs(one).max())


def test_all_cores_are_used_by_the_command():
    program = (
        "import os, sys; from dsdistill.parallel import devices; devices.use_all(); import jax; "
        "sys.exit(jax.local_device_count() != len(os.sched_getaffinity(0)))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
