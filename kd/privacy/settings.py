"""The settings of PATE, as `--pate teachers=200,sigma=40,answers=500` gives them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from dsdistill.harness import lists
from dsdistill.harness.errors import UserError, unknown_name
from kd.privacy import accountant

OPTION = "--pate"


@dataclass(frozen=True)
class PateSettings:
    """How private images are shared out, asked and protected.

    Attributes:
        teachers: Number of teachers, each on images of its own.
        sigma: Deviation of the noise on each class's count of votes, in votes.
        threshold: Votes that the most frequent class must have, with noise, for an answer; None to
            answer every query.
        sigma1: Deviation of the noise in this test, in votes.
        queries: Most public images that are asked about; None for all.
        answers: Most answers, after which nothing is asked; None for as many as queries.
        delta: δ of the guarantee.
        network: Name of the teachers' network.
        steps: Steps of the training of each teacher.
    """

    teachers: int
    sigma: float
    threshold: float | None = None
    sigma1: float | None = None
    queries: int | None = None
    answers: int | None = None
    delta: float = 1e-5
    network: str = "mlp:64"
    steps: int = 300

    def bounds(self, images: int) -> tuple[int, int]:
        """Most queries and most answers, where there are so many public images."""
        queries = min(images, self.queries or images)
        answers = min(queries, self.answers or queries)
        return (answers if self.threshold is None else queries), answers

    def epsilon(self, images: int) -> float:
        """ε of the guarantee, where there are so many public images."""
        queries, answers = self.bounds(images)
        return self._epsilon(queries, answers)

    def _epsilon(self, queries: int, answers: int) -> float:
        tests = {} if self.sigma1 is None else {"queries": queries, "sigma1": self.sigma1}
        return accountant.epsilon(answers=answers, sigma=self.sigma, delta=self.delta, **tests)

    def require_at_most(self, limit: float, images: int) -> None:
        """Refuse to spend more than a limit.

        Args:
            limit: Largest ε.
            images: Number of public images.

        Raises:
            UserError: If the guarantee would be worse; the message says how many answers fit.
        """
        spent = self.epsilon(images)
        if spent <= limit:
            return
        queries, answers = self.bounds(images)
        fit, least = 0, 1
        while least <= answers:
            middle = (least + answers) // 2
            asked = middle if self.threshold is None else queries
            if self._epsilon(asked, middle) <= limit:
                fit, least = middle, middle + 1
            else:
                answers = middle - 1
        remedy = f"answers={fit} would fit" if fit else "lower queries, or raise sigma and sigma1"
        if not fit and self.threshold is None:
            remedy = "raise sigma"
        raise UserError(
            f"{OPTION} would spend epsilon {spent:.3g} at delta {self.delta:g}, and --max-epsilon "
            f"is {limit:g}: {remedy}"
        )


_KINDS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("teachers", "queries", "answers", "steps"), int),
    **dict.fromkeys(("sigma", "threshold", "sigma1", "delta"), float),
    "network": str,
}


@lru_cache
def parse(text: str) -> PateSettings:
    """Parse the settings.

    Args:
        text: `NAME=VALUE` of some fields of `PateSettings`, separated by commas.

    Raises:
        UserError: For an unknown name, a value that breaks a rule, or one that is missing.
    """
    given: dict[str, Any] = {}
    for item in lists.parse_names(OPTION, text):
        name, equals, value = item.partition("=")
        if name not in _KINDS:
            raise unknown_name(f"setting of {OPTION}", name, _KINDS)
        if not equals or name in given:
            raise UserError(f"{OPTION} takes each setting once, as in teachers=50, got {item}")
        try:
            given[name] = _KINDS[name](value)
        except ValueError as error:
            raise UserError(f"{OPTION} {name} must be a number, got {value!r}") from error
    for name in ("teachers", "sigma"):
        if name not in given:
            raise UserError(
                f"{OPTION} needs {name}: the guarantee rests on it; as in teachers=200,sigma=40"
            )
    settings = PateSettings(**given)
    _check(settings)
    return settings


def _check(settings: PateSettings) -> None:
    least = {"teachers": 2, "queries": 1, "answers": 1, "steps": 1}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name in least and value is not None and value < least[field.name]:
            rule = f"at least {least[field.name]}"
            raise UserError(f"{OPTION} {field.name} must be {rule}, got {value}")
    for name in ("sigma", "sigma1", "threshold"):
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{OPTION} {name} must be positive and finite, got {value}")
    if not 0 < settings.delta < 1:
        raise UserError(f"{OPTION} delta must be in (0, 1), got {settings.delta}")
    if (settings.threshold is None) != (settings.sigma1 is None):
        raise UserError(
            f"{OPTION} threshold and sigma1 belong together: votes that an answer needs, and the "
            "noise of that test; give both or none"
        )
    if settings.threshold is None and settings.queries is not None:
        raise UserError(
            f"{OPTION} queries has no effect without threshold, since each query is answered: give "
            "answers"
        )
