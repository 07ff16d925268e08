"""How good predictions are: pure functions of scores, probabilities and labels.

Everything is computed in float64 and returned as a fraction or in nats, never in percent.
"""

import numpy as np
from jaxtyping import Float, Int

BINS = 15  # of the calibration error, as in Guo et al. (2017)


def softmax(logits: Float[np.ndarray, "n k"], temperature: float = 1.0) -> Float[np.ndarray, "n k"]:
    """Probabilities exp(z_k / T) / Σ_j exp(z_j / T), one row per sample.

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


def confusion(
    predicted: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], k: int
) -> Int[np.ndarray, "k k"]:
    """Number of samples by true class (row) and predicted class (column).

    Args:
        predicted, labels: Class indices.
        k: Number of classes; one without samples keeps its row and column of zeros.

    Raises:
        ValueError: If an index is not one of 0 to k - 1.
    """
    predicted, labels = np.asarray(predicted, np.int64), np.asarray(labels, np.int64)
    for name, indices in (("predicted", predicted), ("true", labels)):
        if ((indices < 0) | (indices >= k)).any():
            span = f"{indices.min()} to {indices.max()}"
            raise ValueError(f"{name} classes must lie in 0 to {k - 1}, got {span}")
    return np.bincount(labels * k + predicted, minlength=k * k).reshape(k, k)


def per_class_accuracy(confusion: Int[np.ndarray, "k k"]) -> list[float | None]:
    """Fraction of each true class that is predicted right; None for a class without samples."""
    counts = confusion.sum(1)
    return [
        float(right / n) if n else None
        for right, n in zip(confusion.diagonal(), counts, strict=True)
    ]


def class_counts(
    predicted: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], k: int
) -> Int[np.ndarray, "3 k"]:
    """Number of samples of each class that are predicted right, predicted so, and truly so.

    Counts of parts of the samples can be added; `macro_f1` and `balanced_accuracy` follow from the
    sums.

    Args:
        predicted, labels: Class indices.
        k: Number of classes.
    """
    each = labels[predicted == labels], predicted, labels
    return np.stack([np.bincount(indices, minlength=k) for indices in each])


def macro_f1(counts: Float[np.ndarray, "3 k"] | Int[np.ndarray, "3 k"]) -> float:
    """Mean over classes of F1 = 2 right / (predicted + true), as scikit-learn's `f1_score`.

    A class that neither occurs nor is predicted does not count.

    Args:
        counts: As `class_counts`.
    """
    right, predicted, true = counts
    seen = predicted + true > 0
    return float((2 * right[seen] / (predicted + true)[seen]).mean())


def balanced_accuracy(counts: Float[np.ndarray, "3 k"] | Int[np.ndarray, "3 k"]) -> float:
    """Mean over the classes that occur of the share of their samples that are predicted right.

    Args:
        counts: As `class_counts`.
    """
    right, _, true = counts
    return float((right[true > 0] / true[true > 0]).mean())


def kl(p: Float[np.ndarray, "n k"], q: Float[np.ndarray, "n k"]) -> float:
    """KL(p || q) = Σ_k p_k log(p_k / q_k), mean over samples, in nats.

    0 log 0 is 0. A q that underflowed to 0 counts as the smallest positive float64, as in `nll`.

    Args:
        p, q: Probabilities, one row per sample; p is the reference, such as a teacher.
    """
    # Of p the floor only keeps 0 log 0 from being NaN.
    log_p, log_q = (np.log(np.maximum(x, np.finfo(np.float64).tiny)) for x in (p, q))
    return float((p * (log_p - log_q)).sum(1).mean())


def fit_temperature(scores: Float[np.ndarray, "n k"], labels: Int[np.ndarray, " n"]) -> float:
    """The T for which softmax(scores / T) has the smallest NLL, in [e^-7, e^7].

    Estimates of centred labels lie within about ±1, so their plain softmax is nearly uniform; one
    temperature, fitted on validation images, turns them into useful probabilities.

    Source: temperature scaling, Guo et al. (2017), arXiv:1706.04599, section 4.2.
    """
    from scipy.optimize import minimize_scalar

    def loss(log_t: float) -> float:
        return nll(softmax(scores, float(np.exp(log_t))), labels)

    optimum = minimize_scalar(loss, bounds=(-7, 7), method="bounded")
    return float(np.exp(optimum["x"]))
