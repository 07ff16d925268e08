"""Published test accuracies of distilled sets, for comparison.

Results marked `read` were taken from the paper, repository or notebook named; those marked `memory`
were recalled and not checked against it; for those marked `unstated` it is not known which.

Sources: KIP with fc kernels, Nguyen, Chen and Lee (2020), arXiv:2011.00050; KIP and Label Solve
with convolutional kernels, Nguyen, Novak, Xiao and Lee (2021), arXiv:2107.13034, tables 1 and 2,
and the notebook `kip/dataset.ipynb` of their code; RFAD, Loo et al. (2022), arXiv:2210.12067;
FRePo, Zhou et al. (2022), arXiv:2206.00719; RCIG, Loo et al. (2023), arXiv:2302.06755; DC, Zhao et
al. (2020), arXiv:2006.05929, and DSA, Zhao and Bilen (2021), arXiv:2102.08259, in the README of
their code; RDED, Sun et al. (2024); EDC, Shao et al. (2024); SRe2L, Yin et al. (2023).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

SourceStatus = Literal["read", "memory", "unstated"]
LearnerKind = Literal["ridge", "network"]


@dataclass(frozen=True)
class PublishedResult:
    """One method on one data set.

    Attributes:
        data: Name of the data set, as in `datasets.NAMES` where it is one of those.
        method: Method and, where it matters, its network or kernel.
        judge: What was trained on the set: kernel ridge regression, or a network.
        source: First author and year; the module's docstring names the paper.
        tag: How the figures were obtained.
        accuracies: Test accuracies, as fractions, by images per class.
    """

    data: str
    method: str
    judge: LearnerKind
    source: str
    tag: SourceStatus
    accuracies: Mapping[int, float]

    @property
    def label(self) -> str:
        """Method, source and status in a legend."""
        marks = {"read": "", "memory": " (memory)", "unstated": " (unverified)"}
        return f"{self.method}, {self.source}{marks[self.tag]}"


KIP_FC = "Nguyen 2020"
KIP = "Nguyen 2021"  # Label Solve too
RFAD = "Loo 2022"
FREPO = "Zhou 2022"
RCIG = "Loo 2023"
DC = "Zhao 2020"
DSA = "Zhao 2021"
SRE2L = "Yin 2023"
RDED = "Sun 2024"
EDC = "Shao 2024"

# Percent at 1, 10 and 50 images per class.
_PER_CLASS = (1, 10, 50)
_ROWS: tuple[tuple[str, str, LearnerKind, str, SourceStatus, tuple[float, ...]], ...] = (
    ("mnist", "Label Solve convnet", "ridge", KIP, "read", (73.4, 96.4, 98.3)),
    ("fashion-mnist", "Label Solve convnet", "ridge", KIP, "read", (65.3, 80.8, 86.9)),
    ("svhn", "Label Solve convnet", "ridge", KIP, "read", (23.9, 52.8, 76.8)),
    ("cifar10", "Label Solve convnet", "ridge", KIP, "read", (26.1, 53.6, 65.9)),
    ("cifar100", "Label Solve convnet", "ridge", KIP, "read", (23.8, 39.2)),
    ("mnist", "KIP convnet augmented", "ridge", KIP, "read", (96.5, 99.1, 99.5)),
    ("fashion-mnist", "KIP convnet augmented", "ridge", KIP, "read", (76.7, 88.8, 91.0)),
    ("svhn", "KIP convnet augmented", "ridge", KIP, "read", (64.3, 80.9, 84.0)),
    ("cifar10", "KIP convnet augmented", "ridge", KIP, "read", (63.4, 75.5, 79.7)),
    ("cifar100", "KIP convnet augmented", "ridge", KIP, "read", (33.3, 49.5)),
    ("mnist", "KIP convnet", "ridge", KIP, "memory", (97.3, 99.1, 99.4)),
    ("fashion-mnist", "KIP convnet", "ridge", KIP, "memory", (82.9, 91.0, 92.4)),
    ("svhn", "KIP convnet", "ridge", KIP, "memory", (62.4, 79.3, 82.0)),
    ("cifar10", "KIP convnet", "ridge", KIP, "memory", (64.7, 75.6, 78.2)),
    ("cifar100", "KIP convnet", "ridge", KIP, "memory", (34.9, 47.9)),
    ("mnist", "KIP fc", "ridge", KIP_FC, "read", (85.5, 97.2, 98.4)),
    ("cifar10", "KIP fc", "ridge", KIP_FC, "read", (40.5, 53.1, 58.6)),
    ("mnist", "KIP", "network", KIP, "read", (90.1, 97.5, 98.4)),
    ("fashion-mnist", "KIP", "network", KIP, "read", (73.8, 86.8, 87.8)),
    ("cifar10", "KIP", "network", KIP, "read", (50.0, 62.7, 68.4)),
    ("mnist", "Label Solve", "network", KIP, "read", (71.3, 95.3, 98.0)),
    ("fashion-mnist", "Label Solve", "network", KIP, "read", (61.3, 79.9, 84.9)),
    ("cifar10", "Label Solve", "network", KIP, "read", (24.8, 49.2, 62.1)),
    ("mnist", "RFAD", "network", RFAD, "memory", (94.4, 98.5, 98.8)),
    ("fashion-mnist", "RFAD", "network", RFAD, "memory", (78.6, 87.0, 88.8)),
    ("cifar10", "RFAD", "network", RFAD, "unstated", (53.6, 66.3, 71.1)),
    ("mnist", "FRePo", "network", FREPO, "memory", (93.0, 98.6, 99.2)),
    ("fashion-mnist", "FRePo", "network", FREPO, "memory", (75.6, 86.2, 89.6)),
    ("cifar10", "FRePo", "network", FREPO, "unstated", (46.8, 65.5, 71.7)),
    ("mnist", "RCIG", "network", RCIG, "memory", (94.7, 98.9, 99.2)),
    ("fashion-mnist", "RCIG", "network", RCIG, "memory", (79.8, 88.5, 90.2)),
    ("cifar10", "RCIG", "network", RCIG, "unstated", (53.9, 69.1, 73.5)),
    ("mnist", "DC", "network", DC, "read", (91.7, 97.4, 98.8)),
    ("fashion-mnist", "DC", "network", DC, "read", (70.5, 82.3, 83.6)),
    ("cifar10", "DC", "network", DC, "read", (28.3, 44.9, 53.9)),
    ("mnist", "DSA", "network", DSA, "read", (88.7, 97.8, 99.2)),
    ("fashion-mnist", "DSA", "network", DSA, "read", (70.6, 84.6, 88.7)),
    ("cifar10", "DSA", "network", DSA, "read", (28.8, 52.1, 60.6)),
    ("imagenet-1k", "RDED ResNet-18", "network", RDED, "read", (6.6, 42.0, 56.5)),
    ("imagenet-1k", "EDC ResNet-18", "network", EDC, "read", (12.8, 48.6, 58.0)),
)


def _from_percent(
    data: str,
    method: str,
    judge: LearnerKind,
    source: str,
    tag: SourceStatus,
    percents: tuple[float, ...],
) -> PublishedResult:
    accuracies = {n: value / 100 for n, value in zip(_PER_CLASS, percents, strict=False)}
    return PublishedResult(data, method, judge, source, tag, accuracies)


PUBLISHED: tuple[PublishedResult, ...] = (
    *(_from_percent(*row) for row in _ROWS),
    PublishedResult(
        "imagenet-1k", "SRe2L ResNet-18", "network", SRE2L, "read", {10: 0.213, 50: 0.468}
    ),
    PublishedResult(
        "imagenet-1k at 64x64", "FRePo", "network", FREPO, "memory", {1: 0.075, 2: 0.097}
    ),
)


def lookup(data: str, judge: LearnerKind) -> list[PublishedResult]:
    """Published results on a data set by one kind of learner."""
    return [result for result in PUBLISHED if (result.data, result.judge) == (data, judge)]
