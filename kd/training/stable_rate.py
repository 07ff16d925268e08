"""The largest stable learning rate of a network on squared error, from its own tangent kernel.

With J the derivative of all outputs on n images by all weights, the loss
(1/n) sum_i 1/2 |f(x_i) - y_i|^2 of `centred_mse` has the Gauss-Newton Hessian J^T J / n, whose
largest eigenvalue is that of the empirical neural tangent kernel J J^T (n k x n k), divided by n.
Gradient descent with classical momentum b converges on a quadratic of curvature h if and only if
its rate is below 2 (1 + b) / h.

Sources: Jacot et al. (2018), arXiv:1806.07572; Polyak (1964) for the bound with momentum. Nguyen
et al. (2021), arXiv:2107.13034, take shares of the same rate, without momentum.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

PASSES = 20  # of the power iteration, each one product with J and one with its transpose
CHUNK = 100  # images of one product, which bounds the memory


def largest_curvature(network: nn.Module, images: Float[Tensor, "n c h w"]) -> float:
    """Estimate the largest eigenvalue of J J^T / n by power iteration.

    It is a lower bound that 20 passes bring within about a percent. The largest eigenvalue of a
    kernel matrix grows in proportion to n, so that this, divided by n, hardly depends on it: a
    sample of a set is enough, whose value is a little above that of the set, on average.

    Args:
        network: The network; used in evaluation mode, and left in the mode that it was in.
        images: Images after preprocessing.

    Returns:
        The eigenvalue of the Gauss-Newton Hessian of `centred_mse`.
    """
    chunks = images.split(CHUNK)
    weights = {k: p.detach() for k, p in network.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    was = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        direction = {k: torch.randn(p.shape, generator=generator).to(p) for k, p in weights.items()}
        curvature = 0.0
        for _ in range(PASSES):
            norm = torch.stack([v.double().square().sum() for v in direction.values()]).sum().sqrt()
            direction = {k: (v / norm).to(v.dtype) for k, v in direction.items()}
            total: dict[str, Tensor] = {}
            squares = 0.0
            for chunk in chunks:

                def outputs(values: dict[str, Tensor], chunk: Tensor = chunk) -> Tensor:
                    return functional_call(network, values, (chunk,))

                change = jvp(outputs, (weights,), (direction,))[1]
                squares += change.double().square().sum().item()
                (gradient,) = vjp(outputs, weights)[1](change)
                total = {k: total[k] + v if total else v for k, v in gradient.items()}
            curvature, direction = squares / len(images), total
        return curvature
    finally:
        for module, training in was:
            module.training = training


def stable_rate(curvature: float, momentum: float) -> float:
    """The rate below which gradient descent with momentum converges on a curvature.

    Args:
        curvature: Largest eigenvalue of the loss's Hessian.
        momentum: Classical momentum in [0, 1); 0 for none.
    """
    return 2 * (1 + momentum) / curvature
