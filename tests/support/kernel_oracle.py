"""The kernels of `conv_kernel` in float64 NumPy, with every pair of pixels stored.

It shares neither formulas nor code with the engine, and is itself checked against neural-tangents.
All of it is analytic in the pixels, so a derivative is the imaginary part for an image with a tiny
imaginary part: exact to rounding, and with nothing to compile.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsdistill.kernels import neural_tangents as neural_tangents_kernel
from dsdistill.kernels.notation import Architecture

STEP = 1e-30
ANGLE = 1e-14  # up to this 1 - c² is taken for 0


def ntk(x1: Any, x2: Any, network: Architecture) -> np.ndarray:
    """The tangent kernel (n, m) of images (n, h, w, c) and (m, h, w, c)."""
    x1, x2 = np.asarray(x1), np.asarray(x2)
    return np.array([[_pair(a, b, network) for b in x2] for a in x1])


def slopes(x1: Any, x2: Any, network: Architecture, directions: Any) -> np.ndarray:
    """Derivatives of the kernel (n, m) when each x1[i] moves along directions[i].

    Where an angle vanishes the kernel has a tip, and 0 is taken for its slope.
    """
    return ntk(np.asarray(x1) + 1j * STEP * np.asarray(directions), x2, network).imag / STEP


def neural_tangents(network: Architecture) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The same through neural-tangents.

    As the off-diagonal block of one set: XLA's CPU compiler (jaxlib 0.10.2) crashes on the float64
    pooling of a kernel between two.
    """
    kernel = stax_kernel(network)

    def cross(x1: jax.Array, x2: jax.Array) -> jax.Array:
        both = jnp.concatenate([x1, x2])
        return kernel(both, None, "ntk")[: len(x1), len(x1) :]

    return cross


def stax_kernel(network: Architecture) -> Callable[..., jax.Array]:
    """The kernel function of neural-tangents."""
    stax = neural_tangents_kernel.load().stax
    std = {"W_std": network.w_std, "b_std": network.b_std}
    layers = {
        "C": stax.Conv(1, (3, 3), padding="SAME", **std),
        "R": stax.Relu(),
        "P": stax.AvgPool((2, 2), strides=(2, 2)),
        "flatten": stax.Flatten(),
        "gap": stax.GlobalAvgPool(),
    }
    names = [*network.layers, network.head]
    return stax.serial(*(layers[n] for n in names), stax.Dense(1, **std))[2]


def _pair(a: np.ndarray, b: np.ndarray, network: Architecture) -> complex:
    """Of two images (h, w, c): K and T of (a, a), (b, b) and (a, b), each (h, w, h, w)."""
    w, bias = network.w_std**2, network.b_std**2
    inner = [np.einsum("ijc,klc->ijkl", p, q) / p.shape[-1] for p, q in ((a, a), (b, b), (a, b))]
    states = [(k, 0 * k) for k in inner]
    for layer in network.layers:
        if layer == "C":
            states = [(w / 9 * _window(k) + bias, w / 9 * _window(t)) for k, t in states]
            states = [(k, t + k) for k, t in states]
        elif layer == "P":
            states = [(_pool(k), _pool(t)) for k, t in states]
        else:
            va, vb = (np.einsum("ijij->ij", k) for k, _ in states[:2])
            sides = ((va, va), (vb, vb), (va, vb))
            states = [_relu(*state, *v) for state, v in zip(states, sides, strict=True)]
    k, t = (_head(z, network.head) for z in states[2])
    return w * t + (w * k + bias)


def _window(k: np.ndarray) -> np.ndarray:
    """The sum over both pixels moved alike by up to one; zero outside."""
    h, w = k.shape[:2]
    k = np.pad(k, 1)
    moves = [(y, x) for y in range(3) for x in range(3)]
    return sum(k[y : y + h, x : x + w, y : y + h, x : x + w] for y, x in moves)


def _pool(k: np.ndarray) -> np.ndarray:
    h, w = (size // 2 for size in k.shape[:2])
    k = k[: 2 * h, : 2 * w, : 2 * h, : 2 * w]
    return k.reshape(h, 2, w, 2, h, 2, w, 2).mean((1, 3, 5, 7))


def _relu(
    k: np.ndarray, t: np.ndarray, v1: np.ndarray, v2: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    product = v1[:, :, None, None] * v2
    # A norm has a tip at 0, where the slope is half that to the left and half that to the right:
    # that of a right angle.
    n = np.sqrt(np.where(product.real > STEP, product, 0))
    cos = np.divide(k, n, out=np.zeros_like(n), where=n.real > 0)
    vanishes = 1 - cos.real**2 < ANGLE
    inner = np.where(vanishes, 0, cos)
    angle = np.where(vanishes, np.where(cos.real > 0, 0, np.pi), np.arccos(inner))
    sin = np.where(vanishes, 0, np.sqrt(1 - inner**2))
    rest = (np.pi - angle) / (2 * np.pi)
    return n * sin / (2 * np.pi) + k * rest, t * rest


def _head(k: np.ndarray, head: str) -> np.ndarray:
    return k.mean() if head == "gap" else np.einsum("ijij->ij", k).mean()
