"""Choose real images by the ridge regression that they give: greedily, then by exchanges.

With Phi the rows of a linear map (features that are centred, and a constant) and hard labels Y,
images S give the scores

    f(x) = phi(x)^T W,   W = P Phi_S^T Y_S,   P = (Phi_S^T Phi_S + ridge I)^-1

which are judged on all N training images by the squared error of the best multiple of f:

    min_a |a F - Y|^2 / |Y|^2 = 1 - <F, Y>^2 / (|F|^2 |Y|^2)

The multiple does not change a prediction, and without it the images would be chosen by the size of
their scores: the regression from few images is always too small. Nothing is chosen on validation
images, so these judge the choice.

An image c that is added changes W by a matrix of rank one, W + g r^T with g = P phi_c and
r = (y_c - W^T phi_c) / (1 + phi_c^T g), so that with A = Phi^T Phi / N and B = Phi^T Y / N of all
images

    |F|^2  = <W, A W> + 2 g^T A W r + g^T A g |r|^2,     <F, Y> = <W, B> + g^T B r

are exact for every candidate without a prediction. A pass goes once through the classes and adds
(or exchanges) one image of each, the best of all its class: N p (4 p + 6 k) operations, in memory
of 8 p (3 p + 3 k) bytes and a few chunks of candidates, for p values and k classes. In float64.

Passes fill the set first, one image per class in each. Then each exchanges one image of every
class for the best of its class, the removed one included, so the loss never rises.

Source: linear regression on a subset of data chosen greedily is Nyström's method with greedy
basis selection, Smola and Schölkopf (2000); conditioning by one image, Rasmussen and Williams
(2006), appendix A.3. The scale-free loss and the exchanges are this project's.
"""

import collections
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from dsdistill.harness.data.labeled_images import Examples, centred_one_hot
from dsdistill.kernels.linear import linear_map
from dsdistill.methods import linear_sums

CHUNK = 4096  # candidates that are judged at a time
EMPTY = -1  # an image that is not chosen yet


class Choice(NamedTuple):
    """Chosen images after some passes.

    Attributes:
        rows: Position of each image, (images_per_class, k); `EMPTY` where none is chosen yet.
        passes: Number of passes.
        unchanged: Number of last passes in a row that have exchanged nothing.
        loss: Squared error of the best multiple of the scores, as a share of that of none.
    """

    rows: Int[np.ndarray, "m k"]
    passes: int
    unchanged: int
    loss: float


@dataclass(frozen=True, eq=False)
class Problem:
    """What images are chosen for.

    Attributes:
        train: Features of all training images, with hard labels.
        gram_tt, gram_ty: A and B, the sums over all training images divided by their number.
        ridge: Ridge that is added to the diagonal, absolute.
        norm: Mean squared norm of a label.
    """

    train: Examples
    gram_tt: Float[np.ndarray, "p p"]
    gram_ty: Float[np.ndarray, "p k"]
    ridge: float
    norm: float

    def phi(self, rows: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m p"]:
        """The map of some images, in float64."""
        with jax.enable_x64(True):
            return np.asarray(linear_map(jnp.asarray(self.train.images(rows), jnp.float64)))

    def labels(self, rows: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m k"]:
        """Hard labels of some images, one-hot minus 1/k."""
        labels, k = self.train.data.labels[rows], len(self.train.data.classes)
        return centred_one_hot(labels, k).astype(np.float64)


def pose(train: Examples, ridge: float) -> Problem:
    """Sum over all training images, once.

    Args:
        train: Features of all training images, with hard labels.
        ridge: Ridge, relative to the mean of the kernel's diagonal over all training images.

    Raises:
        UserError: If the sums do not fit into memory.
    """
    n, k = len(train), len(train.data.classes)
    [sums] = collections.deque(linear_sums.accumulate(linear_map, train), maxlen=1)
    gram_tt, gram_ty = (np.asarray(array) / n for array in sums[1:])
    return Problem(train, gram_tt, gram_ty, ridge * float(np.trace(gram_tt)), 1 - 1 / k)


def select(
    problem: Problem, images_per_class: int, *, sweeps: int, start: Choice | None = None
) -> Iterator[Choice]:
    """Choose images of every class; yield after each pass.

    Args:
        problem: What they are chosen for.
        images_per_class: Number of images of each class, which no class has fewer of.
        sweeps: Largest number of exchanges of every image; they end where nothing changes.
        start: Choice to continue from, which gives the same images as without a stop.
    """
    k = len(problem.train.data.classes)
    empty = np.full((images_per_class, k), EMPTY)
    choice = start or Choice(empty, 0, 0, 1.0)
    members = [np.flatnonzero(problem.train.data.labels == label) for label in range(k)]
    while choice.passes < passes(images_per_class, sweeps) and not is_settled(choice):
        choice = _pass(problem, choice, members)
        yield choice


def passes(images_per_class: int, sweeps: int) -> int:
    """Largest number of passes."""
    return images_per_class * (1 + sweeps)


def is_settled(choice: Choice) -> bool:
    """Whether no exchange of one image lowers the loss."""
    return choice.unchanged >= len(choice.rows)


def _pass(problem: Problem, choice: Choice, members: list[Int[np.ndarray, " m"]]) -> Choice:
    """Add one image of each class to the choice, or exchange one."""
    rows, turn = choice.rows.copy(), choice.passes % len(choice.rows)
    # From the rows alone, so that a choice that was stored continues with the same bits.
    fit = _Fit(problem, rows[rows != EMPTY])
    for label, candidates in enumerate(members):
        old = rows[turn, label]
        if old != EMPTY:
            fit.remove(old)
        taken = np.delete(rows[:, label], turn)
        rows[turn, label] = fit.best(np.setdiff1d(candidates, taken, assume_unique=True))
        fit.add(rows[turn, label])
    exchanged = choice.passes >= len(rows)
    same = exchanged and bool((rows == choice.rows).all())
    return Choice(rows, choice.passes + 1, choice.unchanged + 1 if same else 0, fit.loss())


class _Fit:
    """Ridge regression on images that come and go, one at a time."""

    def __init__(self, problem: Problem, rows: Int[np.ndarray, " n"]) -> None:
        self.problem = problem
        regular, sums = problem.ridge * np.eye(len(problem.gram_tt)), np.zeros_like(problem.gram_ty)
        if len(rows):
            phi = problem.phi(rows)
            regular, sums = regular + phi.T @ phi, phi.T @ problem.labels(rows)
        self.inverse = np.linalg.inv(regular)
        self.weights = self.inverse @ sums
        self.smoothed = problem.gram_tt @ self.weights  # A W, kept up to date by ranks of one

    def add(self, row: int, sign: int = 1) -> None:
        """Add an image; with sign -1, remove it."""
        one = np.array([row])
        phi, label = self.problem.phi(one)[0], self.problem.labels(one)[0]
        g = self.inverse @ phi
        change = sign / (1 + sign * (phi @ g))
        residual = change * (label - phi @ self.weights)
        self.weights += np.outer(g, residual)
        self.smoothed += np.outer(self.problem.gram_tt @ g, residual)
        self.inverse -= np.outer(change * g, g)

    def remove(self, row: int) -> None:
        """Remove an image that was added."""
        self.add(row, -1)

    def loss(self) -> float:
        """Squared error of the best multiple of the scores, as a share of that of none."""
        w, problem = self.weights, self.problem
        inner, squares = np.vdot(w, problem.gram_ty), np.vdot(w, self.smoothed)
        return float(1 - max(inner, 0) ** 2 / (squares * problem.norm))

    def best(self, candidates: Int[np.ndarray, " m"]) -> int:
        """The candidate after whose addition the loss is lowest, of one class."""
        parts = [candidates[i : i + CHUNK] for i in range(0, len(candidates), CHUNK)]
        alignment = np.concatenate([self._alignments(part) for part in parts])
        return int(candidates[alignment.argmax()])

    def _alignments(self, rows: Int[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
        """<F, Y> / |F| after the addition of each image; the largest has the lowest loss."""
        problem, w = self.problem, self.weights
        phi = problem.phi(rows)
        g = phi @ self.inverse
        step = 1 + np.vecdot(phi, g)
        r = (problem.labels(rows) - phi @ w) / step[:, None]
        squares = np.vdot(w, self.smoothed) + 2 * np.vecdot(g @ self.smoothed, r)
        squares += np.vecdot(g @ problem.gram_tt, g) * np.vecdot(r, r)
        inner = np.vdot(w, problem.gram_ty) + np.vecdot(g @ problem.gram_ty, r)
        # Rounding may leave 0 or less where a change cancels all scores, which then say nothing.
        return np.where(squares > 0, inner / np.sqrt(np.maximum(squares, 1e-300)), -np.inf)
