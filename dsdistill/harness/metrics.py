"""How good predictions are: pure NumPy functions of scores, probabilities and labels.

Everything is computed in float64 and returned as a fraction or in nats, never in percent.
"""

import numpy as np
from jaxtyping import Float, Int

BINS = 15  # of the calibration error, as in Guo et al. (2017)


def softmax(logits: Float[np.ndarray, "n k"], temperature: float = 1.0) -> Float[np.ndarray, "n k"]:
    """Probabilities exp(z_k / T) / Σ_j exp(z_j / T), one row a sample.

    Args:
        logits: Unnormalised log-probabilities.
        temperature: T > 0; larger is softer.
    """
    z = np.asarray(logits, np.float64) / temperature
    z = np.exp(z - z.max(1, keepdims=True))  # the largest exponent is 0: no overflow
    return z / z.sum(1, keepdims=True)


def accuracy(scores: Float[np.ndarray, "n k"], labels: Int[np.ndarray, " n"]) -> float:
    """Fraction of samples whose largest score is that of their label."""
    return float((scores.argmax(1) == labels).mean())


def agreement(a: Float[np.ndarray, "n k"], b: Float[np.ndarray, "n k"]) -> float:
    """Fraction of samples for which two models predict the same class, right or wrong."""
    return float((a.argmax(1) == b.argmax(1)).mean())


def nll(probabilities: Float[np.ndarray, "n k"], labels: Int[np.ndarray, " n"]) -> float:
    """Negative log-likelihood -log p(label), mean over samples, in nats.

    A probability that underflowed to 0 counts as the smallest positive float64, 708 nats.
    """
    p = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(p, np.finfo(np.float64).tiny)).mean())


def expected_calibration_error(
    probabilities: Float[np.ndarray, "n k"], labels: Int[np.ndarray, " n"], bins: int = BINS
) -> float:
    """Σ_b (n_b / n) |accuracy_b - confidence_b| over bins of equal width of the confidence.

    The confidence is the largest probability; bin b holds the confidences in (b/B, (b+1)/B].

    Source: Guo, Pleiss, Sun and Weinberger (2017), arXiv:1706.04599, equation 3.
    """
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    # n_b |accuracy_b - confidence_b| is the absolute sum of right - confidence over the bin.
    gaps = np.bincount(bin_of, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))
