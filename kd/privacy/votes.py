"""Disjoint shards of private images, and noisy answers from the votes of their teachers."""

import hashlib
from collections.abc import Callable
from random import SystemRandom

import numpy as np
from jaxtyping import Int

from dsdistill.harness.data.labeled_images import LabeledImages
from kd.privacy.settings import PateSettings

REFUSED = -1  # in place of an answer

Noise = Callable[[float], float]  # a draw from N(0, σ²)


def shards(images: LabeledImages, count: int) -> list[Int[np.ndarray, " m"]]:
    """Share images out among teachers, each by a hash of its own pixels.

    Where an image goes, and in which order a teacher has its images, depends on no other image: one
    image more or less changes one shard and nothing of the others, which the privacy rests on.
    Copies of an image are in one shard.

    Args:
        images: The private images.
        count: Number of shards, whose sizes vary about n / count.

    Returns:
        The rows of each shard.
    """
    rows: list[list[tuple[bytes, int, int]]] = [[] for _ in range(count)]
    row = 0
    for chunk in images.chunks(1024):
        for image in chunk:
            digest = hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()
            label = int(images.labels[row])
            rows[int.from_bytes(digest[:8], "big") % count].append((digest, label, row))
            row += 1
    return [np.array([row for *_, row in sorted(shard)], np.int64) for shard in rows]


def system_noise(deviation: float) -> float:
    """Draw from N(0, deviation²) by the randomness of the operating system.

    No seed repeats it: noise that can be computed again can be taken away again.
    """
    return SystemRandom().normalvariate(0.0, deviation)


def noisy_answers(
    votes: Int[np.ndarray, "q k"], settings: PateSettings, noise: Noise = system_noise
) -> list[int]:
    """Answer queries by the most votes, with noise: Confident-GNMax, or GNMax without a threshold.

    Args:
        votes: For each query, the number of teachers that name each class.
        settings: Noise, threshold, and the most queries and answers.
        noise: Source of the noise.

    Returns:
        The class of each query that was asked, `REFUSED` where the teachers do not agree enough.
        Once there are as many answers as allowed, no further query is asked.

    Source: Papernot et al. (2018), arXiv:1802.08908, algorithms 1 and 2.
    """
    queries, most = settings.bounds(len(votes))
    answers: list[int] = []
    for counts in votes[:queries]:
        if len(answers) - answers.count(REFUSED) == most:
            break
        if _is_refused(counts, settings, noise):
            answers.append(REFUSED)
        else:
            answers.append(int(np.argmax([n + noise(settings.sigma) for n in counts])))
    return answers


def _is_refused(counts: Int[np.ndarray, " k"], settings: PateSettings, noise: Noise) -> bool:
    """Whether too few teachers agree, by a test with its own noise; never without a threshold."""
    if settings.threshold is None or settings.sigma1 is None:
        return False
    return max(counts) + noise(settings.sigma1) < settings.threshold
