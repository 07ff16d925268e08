"""Effect of a ReLU on the two kernels of an infinitely wide network, with finite gradients.

For two Gaussian pre-activations with covariance K and deviations σ1, σ2, write n = σ1 σ2,
c = K / n, θ = arccos c. Then

    K' = n (s + c g),    T' = T g,    s = sin θ / 2π,    g = (π - θ) / 2π

where K is the covariance (NNGP) and T the tangent kernel (NTK). At fixed T, with
g' = dg/dc = 1 / (4 π² s):

    dK' = g dK + s dn
    dT' = g dT + T g' (dK - c dn) / n

Differentiating the formulas automatically gives inf * 0 = NaN at |c| = 1, so the rule is
written out, with g' = 0 where the angle vanishes.

Source: Cho and Saul (2009), arc-cosine kernels of degree 0 and 1; Jacot et al. (2018),
arXiv:1806.07572.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.polynomial import Chebyshev, Polynomial

# 1 - |c| of two equal vectors is a few rounding units, not 0, and its square root is 1e-3 in
# float32: a relative error of 2e-4 in the kernel. Up to this many units it is set to 0.
MAX_GAP_IN_EPS = 10


def relu(
    nngp: Float[Array, "*s"], ntk: Float[Array, "*s"], scale: Float[Array, "*s"]
) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """Compute NNGP and NTK after a ReLU.

    Args:
        nngp: Covariance K of the pre-activations.
        ntk: Tangent kernel T of the pre-activations.
        scale: n = σ1 σ2, at least |K| up to rounding; where it is 0 the results are 0.

    Returns:
        K' and T'. Where c = 1 within `MAX_GAP_IN_EPS` rounding units, K' is n / 2 and T' is T / 2
        exactly.
    """
    return _relu(nngp, ntk, scale)


@jax.custom_jvp
def _relu(nngp: Array, ntk: Array, scale: Array) -> tuple[Array, Array]:
    cos, sine, gain, _ = _angle(nngp, scale)
    return scale * (sine + cos * gain), ntk * gain


@_relu.defjvp
def _relu_jvp(primals, tangents):
    nngp, ntk, scale = primals
    d_nngp, d_ntk, d_scale = tangents
    cos, sine, gain, slope = _angle(nngp, scale)
    out = scale * (sine + cos * gain), ntk * gain
    d_cos = (d_nngp - cos * d_scale) / jnp.maximum(scale, jnp.finfo(scale.dtype).tiny)
    return out, (gain * d_nngp + sine * d_scale, gain * d_ntk + ntk * slope * d_cos)


def _angle(nngp: Array, scale: Array) -> tuple[Array, Array, Array, Array]:
    return angle(nngp / jnp.maximum(scale, jnp.finfo(scale.dtype).tiny))


def angle(cos: Float[Array, "*s"]) -> tuple[Array, Array, Array, Array]:
    """Compute c, s, g and g' of the equations above, for c in [-1, 1] up to rounding.

    Where the angle vanishes, the c returned is exactly 1 or -1, and s and g' are 0.
    """
    gap = 1 - jnp.abs(cos)
    gap = jnp.where(gap < MAX_GAP_IN_EPS * jnp.finfo(cos.dtype).eps, 0, gap)
    squared = gap * (2 - gap)  # sin² θ without the cancellation in 1 - c²
    sin = jnp.sqrt(squared)
    acute = sin * _angle_over_sine(gap)  # arccos |c| / 2π
    gain = jnp.where(cos > 0, 0.5 - acute, acute)
    # The inner `where` keeps the division finite in the branch that is not taken.
    slope = jnp.where(squared > 0, 0.5 / jnp.pi / jnp.where(squared > 0, sin, 1), 0)
    return jnp.where(cos > 0, 1 - gap, gap - 1), sin / (2 * jnp.pi), gain, slope


def _angle_over_sine(gap: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """arccos(1 - u) / sqrt(u (2 - u)) / 2π for u in [0, 1], a smooth function, as a polynomial.

    XLA's own arccos is neither vectorised on a CPU nor accurate near u = 0. Relative error of
    the polynomial: 1e-8 of degree 9 for float32, 4e-15 of degree 20 for float64.
    """
    coefficients = _COEFFICIENTS[9 if gap.dtype == jnp.float32 else 20]
    value = jnp.full_like(gap, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * gap + coefficient
    return value


def _fit(degree: int) -> list[float]:
    """Coefficients of the Chebyshev interpolant, lowest power first, as Python floats."""

    def ratio(u: np.ndarray) -> np.ndarray:
        sin = np.sqrt(u * (2 - u))
        return np.arctan2(sin, 1 - u) / sin / (2 * np.pi)

    fitted = Chebyshev.interpolate(ratio, degree, domain=[0, 1])
    return fitted.convert(kind=Polynomial, domain=[-1, 1], window=[-1, 1]).coef.tolist()


_COEFFICIENTS = {degree: _fit(degree) for degree in (9, 20)}
