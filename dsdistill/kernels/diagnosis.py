"""Explanation of a kernel that is not finite: which image, and before which layer."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dsdistill.kernels.networks import InfiniteNetwork

IMAGES_PER_CHUNK = 1000  # images of the second set at a time

ImageSet = Float[np.ndarray, "n h w c"]


def explain_not_finite(network: InfiniteNetwork, support: ImageSet, targets: ImageSet) -> str:
    """Describe the first place where the kernel between two sets of images is not finite.

    Args:
        network: Network of the kernel.
        support, targets: Images that the kernel was evaluated on; numbered from 0.
    """
    for name, images in (("support image", support), ("target", targets)):
        explanation = _explain_image(network, images)
        if explanation is not None:
            return f"{name} {explanation}"
    kernel = jax.jit(network.kernel)
    for name, images in (("support image", support), ("target", targets)):
        for first in range(0, len(images), IMAGES_PER_CHUNK):
            bad = ~np.isfinite(kernel(support, images[first : first + IMAGES_PER_CHUNK]))
            if bad.any():
                i, j = np.argwhere(bad)[0]
                return f"the kernel of support image {i} with {name} {first + j} is not finite"
    return "the kernel itself is finite"


def _explain_image(network: InfiniteNetwork, images: ImageSet) -> str | None:
    """Describe the first image that is not finite by itself; None if there is none."""
    largest = np.abs(images).max((1, 2, 3))
    if not np.isfinite(largest).all():
        return f"{np.argmin(np.isfinite(largest))} has a pixel that is not finite"
    if network.deviations is None:
        return None
    layers = network.deviations(jnp.asarray(images))
    for layer, deviations in enumerate(layers):
        is_finite = np.isfinite(deviations).all((1, 2))
        if not is_finite.all():
            i = int(np.argmin(is_finite))
            return (
                f"{i}, whose largest pixel is {largest[i]:.3g}, is not finite before ReLU "
                f"{layer + 1} of {len(layers)}"
            )
    return None
