"""Trained layers between a student's features and a loss; they are not saved with the student.

Each is built from the layouts of a pair of layers and called with their features as the taps
return them. It returns the arguments of its loss, of one shape and with the teacher's features
detached: `fitnet(*regressor(student, teacher))`. A vector is a map of one position, and the larger
of two maps is averaged down to the smaller, so any layer can be compared with any other.

Layers compute in autocast's precision, or else in that of their weights, whatever the precision of
the features. Batch norm uses the images of one process. Initial weights are drawn from torch's
global generator.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsdistill.harness.errors import UserError
from kd.losses import contrastive
from kd.objectives.taps import FeatureLayout, as_map, as_vector

Feature = Float[Tensor, "n ..."]  # of any layout
Maps = Float[Tensor, "n c h w"]
MapPair = tuple[Maps, Maps]
Rows = Float[Tensor, "n d"]
MemoryScores = Float[Tensor, "n 1+k"]


class Regressor(nn.Module):
    """A linear map of channels at each position: a 1x1 convolution. For `fitnet`.

    It is used even where the shapes agree, so that the student need not match the teacher's basis.

    Source: Romero et al. (2015), arXiv:1412.6550, section 2.2, whose regressor is larger; 1x1 as
    in Tian et al. (2020), arXiv:1910.10699.
    """

    def __init__(
        self, student: FeatureLayout, teacher: FeatureLayout, *, norm: bool = False
    ) -> None:
        """Build for a pair of layers; `norm` puts batch norm in place of the bias."""
        super().__init__()
        self.layouts = student, teacher
        self.convolution = nn.Conv2d(student.channels, teacher.channels, 1, bias=not norm)
        self.norm = nn.BatchNorm2d(teacher.channels) if norm else nn.Identity()

    def forward(self, student: Feature, teacher: Feature) -> MapPair:
        """Return the student's maps after the regressor, and the teacher's maps."""
        ours, theirs = _map_pair(student, teacher, self.layouts)
        return self.norm(self.convolution(_cast(ours, self.convolution))), theirs


class GaussianRegressor(nn.Module):
    """A Gaussian of the teacher's features, given the student's. For `vid`.

    Attributes:
        raw_variance: One per channel; softplus(raw_variance) plus the loss's 1e-5 is 5 at first.

    Source: Ahn et al. (2019), arXiv:1904.05835, section 2.2; the three convolutions of the
    teacher's width are those of Tian et al. (2020), arXiv:1910.10699.
    """

    def __init__(self, student: FeatureLayout, teacher: FeatureLayout) -> None:
        super().__init__()
        self.layouts = student, teacher
        c = teacher.channels
        first, second, third = (nn.Conv2d(inputs, c, 1) for inputs in (student.channels, c, c))
        self.mean = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        self.raw_variance = nn.Parameter(torch.full((c,), math.log(math.expm1(5 - 1e-5))))

    def forward(self, student: Feature, teacher: Feature) -> tuple[Maps, Float[Tensor, " c"], Maps]:
        """Return mean and raw variance of the teacher's maps, and these maps."""
        ours, theirs = _map_pair(student, teacher, self.layouts)
        return self.mean(_cast(ours, self.mean)), self.raw_variance, theirs


class MaskedGenerator(nn.Module):
    """The teacher's features from the student's at a few positions. For `mgd`.

    Each call drops a position with probability `ratio`, drawn from torch's global generator.

    Source: Yang et al. (2022), arXiv:2205.01529, section 3; their code aligns only unequal widths.
    """

    def __init__(
        self, student: FeatureLayout, teacher: FeatureLayout, *, ratio: float = 0.65
    ) -> None:
        super().__init__()
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio of dropped positions must be in [0, 1), got {ratio}")
        self.layouts = student, teacher
        self.ratio = ratio
        c = teacher.channels
        self.align = nn.Conv2d(student.channels, c, 1)
        first, second = (nn.Conv2d(c, c, 3, padding=1) for _ in range(2))
        self.generate = nn.Sequential(first, nn.ReLU(), second)

    def forward(self, student: Feature, teacher: Feature) -> MapPair:
        """Return the generated maps, and the teacher's maps."""
        ours, theirs = _map_pair(student, teacher, self.layouts)
        aligned = self.align(_cast(ours, self.align))
        kept = torch.rand_like(aligned[:, :1], dtype=torch.float32) >= self.ratio
        return self.generate(aligned * kept), theirs


class Fusion(nn.Module):
    """Fusion of each stage of a student with its deeper stages. For `hierarchical_context`.

    From the deepest stage to the shallowest, two attention maps weight a stage's features and the
    residual of the next deeper stage.

    Source: Chen et al. (2021), arXiv:2104.09044, section 3.2; width and initial weights of the
    residual's convolutions as in the authors' code.
    """

    def __init__(
        self, students: Sequence[FeatureLayout], teachers: Sequence[FeatureLayout]
    ) -> None:
        """Build for the layouts of pairs of layers, from shallow to deep."""
        super().__init__()
        self.layouts = list(zip(students, teachers, strict=True))
        width = min(512, students[-1].channels)
        self.inner = nn.ModuleList(_conv_batch_norm(s.channels, width, 1) for s in students)
        self.attention = nn.ModuleList(nn.Conv2d(2 * width, 2, 1) for _ in students[:-1])
        self.outer = nn.ModuleList(_conv_batch_norm(width, t.channels, 3) for t in teachers)

    def forward(self, students: Sequence[Feature], teachers: Sequence[Feature]) -> list[MapPair]:
        """Return for each stage, in order, the fused maps and the teacher's, of one size."""
        pairs: list[MapPair] = []
        residual: Tensor | None = None
        for i in reversed(range(len(self.layouts))):
            ours = as_map(students[i], self.layouts[i][0])
            theirs = as_map(teachers[i].detach(), self.layouts[i][1])
            maps = self.inner[i](_cast(ours, self.inner[i]))
            fused = maps if residual is None else self._fuse(i, maps, residual)
            residual = F.interpolate(fused, theirs.shape[-2:])  # nearest neighbours
            pairs.insert(0, (self.outer[i](residual), theirs))
        return pairs

    def _fuse(self, stage: int, maps: Maps, residual: Maps) -> Maps:
        residual = F.interpolate(residual, maps.shape[-2:])
        scores = self.attention[stage](torch.cat([maps, residual], 1))
        shallow, deep = scores.sigmoid().split(1, 1)
        return shallow * maps + deep * residual


class Projector(nn.Module):
    """A linear map of the mean over positions. For `log_sum`, which normalises both sides itself.

    Source: Miles and Mikolajczyk (2024), arXiv:2303.11098.
    """

    def __init__(self, student: FeatureLayout, teacher: FeatureLayout) -> None:
        super().__init__()
        self.layouts = student, teacher
        self.linear = nn.Linear(student.channels, teacher.channels)

    def forward(self, student: Feature, teacher: Feature) -> tuple[Rows, Rows]:
        """Return the student's vectors after the projection, and the teacher's vectors."""
        ours = as_vector(student, self.layouts[0])
        return self.linear(_cast(ours, self.linear)), as_vector(teacher.detach(), self.layouts[1])


class Discriminator(nn.Module):
    """Two layers that tell the teacher's vectors from the student's. For `discrimination`.

    The student is behind a reversed gradient: what trains the discriminator to tell them apart
    trains the student to be taken for the teacher.
    """

    def __init__(self, channels: int, *, width: int = 128, reversal: float = 1.0) -> None:
        """Build for vectors of a length.

        Args:
            channels: Length of the vectors.
            width: Length of the hidden layer.
            reversal: Factor of the reversed gradient; at 0 the student gets none.
        """
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, 1))
        self.reversal = reversal

    def forward(self, student: Rows, teacher: Rows) -> tuple[Rows, Rows]:
        """Return the scores (n, 1) of the teacher's vectors and of the student's."""
        reversed_rows = _ReversedGradient.apply(student, self.reversal)
        theirs, ours = (_cast(rows, self.layers) for rows in (teacher.detach(), reversed_rows))
        return self.layers(theirs), self.layers(ours)


class _ReversedGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by minus a factor."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradients[0], None


class Embedder(nn.Module):
    """Linear maps of both networks' means over positions to one unit sphere. For `EmbeddingMemory`.

    The teacher's map is trained too: a gradient flows into it, but not into the teacher.

    Source: Tian et al. (2020), arXiv:1910.10699, section 3.1.
    """

    def __init__(self, student: FeatureLayout, teacher: FeatureLayout, *, dim: int = 128) -> None:
        super().__init__()
        self.layouts = student, teacher
        self.student = nn.Linear(student.channels, dim)
        self.teacher = nn.Linear(teacher.channels, dim)

    def forward(self, student: Feature, teacher: Feature) -> tuple[Rows, Rows]:
        """Return the student's and the teacher's embeddings: rows of norm 1 in float32."""
        ours = _cast(as_vector(student, self.layouts[0]), self.student)
        theirs = _cast(as_vector(teacher.detach(), self.layouts[1]), self.teacher)
        rows = self.student(ours), self.teacher(theirs)
        return F.normalize(rows[0].float(), dim=-1), F.normalize(rows[1].float(), dim=-1)


class EmbeddingMemory(nn.Module):
    """The embeddings of all N training images by both networks. For `crd`.

    All tensors are buffers, and so in checkpoints. Each process writes the embeddings of all
    processes, so all hold the same memory, and it need not be broadcast.

    Attributes:
        student, teacher: Unit rows (N, d); random until the image's first step.
        log_z: Logarithms (2,) of the normalisers of the student's and the teacher's scores,
            estimated from the first batch; NaN before it.
        negatives: Number of rows that an image is compared with, at most N - 1.

    Source: Tian et al. (2020), arXiv:1910.10699, section 3.1 and the authors' code.
    """

    def __init__(
        self,
        n_data: int,
        *,
        dim: int = 128,
        momentum: float = 0.5,
        negatives: int = 16384,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if n_data < 2:
            raise UserError(f"crd compares images: it needs 2 to train on, got {n_data}")
        self.n_data, self.momentum = n_data, momentum
        self.negatives = min(negatives, n_data - 1)
        random = torch.Generator().manual_seed(seed)
        rows = F.normalize(torch.randn(2, n_data, dim, generator=random), dim=-1)
        self.student, self.teacher = nn.Buffer(rows[0].clone()), nn.Buffer(rows[1].clone())
        self.log_z = nn.Buffer(torch.full((2,), math.nan))

    def forward(
        self, student: Rows, teacher: Rows, index: Int[Tensor, " n"], *, temperature: float = 0.07
    ) -> tuple[MemoryScores, MemoryScores]:
        """Compute scores against the memory, then write the batch into it.

        Args:
            student, teacher: Embeddings from `Embedder`.
            index: Rows of the images in the training set.
            temperature: > 0.

        Returns:
            Scores of the student against the teacher's rows, and of the teacher against the
            student's; `crd` takes them with `log_z` and `n_data`.
        """
        rows = self.draw(index)
        # Copies: the backward pass needs the rows before the update.
        ours = contrastive.scores(student, self.teacher.clone(), rows, temperature=temperature)
        theirs = contrastive.scores(teacher, self.student.clone(), rows, temperature=temperature)
        self._estimate_log_z(ours, theirs)
        self._update(index, student, teacher)
        return ours, theirs

    def draw(self, index: Int[Tensor, " n"]) -> Int[Tensor, "n 1+k"]:
        """Return each image's row and k random rows, drawn with replacement.

        torch's global generator draws them.
        """
        others = torch.randint(self.n_data, (len(index), self.negatives), device=index.device)
        return torch.cat([index[:, None], others], 1)

    @torch.no_grad()
    def _update(self, index: Int[Tensor, " n"], student: Rows, teacher: Rows) -> None:
        index = _gather_rows(index)
        # Several views of an image are averaged: the order of writing must not matter.
        same = (index[:, None] == index).float()
        for memory, rows in ((self.student, student), (self.teacher, teacher)):
            with torch.autocast(rows.device.type, enabled=False):
                mean = same @ _gather_rows(rows.float()) / same.sum(1, keepdim=True)
            moved = self.momentum * memory[index] + (1 - self.momentum) * mean
            memory[index] = F.normalize(moved, dim=-1)

    @torch.no_grad()
    def _estimate_log_z(self, *scores: MemoryScores) -> None:
        log_z = [contrastive.log_normaliser(s, n_data=self.n_data) for s in scores]
        by_process = _gather_rows(torch.stack(log_z)[None])  # (processes, 2)
        mean = by_process.logsumexp(0) - math.log(len(by_process))
        # To ask whether this is the first batch would wait for the device.
        self.log_z.copy_(torch.where(self.log_z.isnan(), mean, self.log_z))


def match_sizes(a: Float[Tensor, "n _ _ _"], b: Float[Tensor, "n _ _ _"]) -> MapPair:
    """Average two maps down to the smaller of the two heights and of the two widths."""
    size = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
    a, b = (x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size) for x in (a, b))
    return a, b


def _map_pair(
    student: Feature, teacher: Feature, layouts: tuple[FeatureLayout, FeatureLayout]
) -> MapPair:
    return match_sizes(as_map(student, layouts[0]), as_map(teacher.detach(), layouts[1]))


def _conv_batch_norm(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def _cast(features: Tensor, layer: nn.Module) -> Tensor:
    """Convert features to the dtype of the layer's weights, unless autocast does."""
    if torch.is_autocast_enabled(features.device.type):
        return features
    return features.to(next(layer.parameters()).dtype)


def _gather_rows(rows: Tensor) -> Tensor:
    """Gather the rows of all processes, whose numbers may differ."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = [int(n) for n in counts]
    padded = F.pad(rows, [0, 0] * (rows.ndim - 1) + [0, max(sizes) - len(rows)])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
