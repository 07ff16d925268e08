"""Explanations of a kernel that is not finite."""

import numpy as np
import pytest

from dsdistill.kernels import diagnosis, networks


def images(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 6, 6, 1)).astype(np.float32)


@pytest.mark.parametrize("kernel", ["fc", "CRP-flatten"])
def test_a_pixel(kernel):
    support, targets = images(3, 0), images(4, 1)
    targets[2, 1, 1] = np.nan
    said = diagnosis.explain_not_finite(networks.parse(kernel), support, targets)
    assert said == "target 2 has a pixel that is not finite"


def test_a_layer():
    support, targets = images(3, 0), images(4, 1)
    support[1, 2, 3] = 3e19  # finite in float32, its square is not
    said = diagnosis.explain_not_finite(networks.parse("CRP-flatten"), support, targets)
    assert said.startswith("support image 1, whose largest pixel is 3e+19, is not finite before")
    assert said.endswith("ReLU 1 of 1")
    support[1, 2, 3] = 2e9  # W = 1e10 makes it overflow one layer later
    network = networks.parse("CRCR-flatten", w_std=1e10)
    assert diagnosis.explain_not_finite(network, support, targets).endswith("ReLU 2 of 2")


def test_a_pair():
    support, targets = images(3, 0), images(4, 1)
    support[2] = 3e19  # `fc` does not tell its layers
    said = diagnosis.explain_not_finite(networks.parse("fc"), support, targets)
    assert said == "the kernel of support image 0 with support image 2 is not finite"


def test_nothing():
    said = diagnosis.explain_not_finite(networks.parse("CRP-gap"), images(2, 0), images(3, 1))
    assert said == "the kernel itself is finite"
