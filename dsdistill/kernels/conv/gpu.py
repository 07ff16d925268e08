"""The planes of one resolution on a GPU: one kernel for each stage, over all planes at once.

It computes what `planes` computes. There a plane goes through all stages while it stays in a
processor's cache, which on a GPU would be hundreds of kernels that each take less than their start.
Here a program takes some pixels for some lanes, of one plane, or of many one after the other where
it sums over them. K and T before a ReLU stay in its registers; what goes through memory are the
planes between two stages.

Written in Pallas for its Triton backend. A JAX without that backend leaves the work to `planes`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from dsdistill.kernels.conv import stages
from dsdistill.kernels.conv.gpu_programs import (
    LANES_PER_PROGRAM,
    SQUARE_PIXELS,
    WARPS_PER_PROGRAM,
    Covariances,
    ProgramPixels,
    StageProgram,
    pl,
    triton,
)
from dsdistill.kernels.conv.stages import Level, LevelInput, PaddedImages, ReluDeviations
from dsdistill.kernels.notation import Stage

PLANES_PER_PROGRAM = 32  # planes of a program that sums over planes
INTERPRET = False  # run the programs in plain JAX: for tests without a GPU


class Cotangent(NamedTuple):
    """The cotangent of what leaves a stage.

    Attributes:
        kind: `pooled`, one for each pooled plane; `all`, the same for every plane, (h, w, lanes);
            `plane`, one for each plane; `window`, the sum of such over the window of a pixel.
        pair: Of K and T.
    """

    kind: str
    pair: Covariances


def is_enabled() -> bool:
    """Whether kernels are computed in this way here."""
    return INTERPRET or (triton is not None and jax.default_backend() == "gpu")


def covers(level: Level, source: LevelInput) -> bool:
    """Whether this level is computed in this way: programs count entries in 32 bits."""
    lanes = (source.two if isinstance(source, PaddedImages) else source).shape[-1]
    return is_enabled() and len(level.grid) * math.prod(level.grid.shape) * lanes < 2**31


def forward(level: Level, source: LevelInput, sigmas: tuple[ReluDeviations, ...]) -> Array:
    """What `planes.forward` returns, sums in place of means."""
    run = _LevelPrograms(level, source, sigmas)
    *_, last = run.stage_inputs(source)
    i = len(run.stages) - 1
    if level.coarse is None:
        return stages.pack_complex(*run.apply(i, last).map(lambda x: x.sum(0)))
    return _append_zero_plane(stages.pack_complex(*run.apply_and_pool(i, last)))


def backward(
    level: Level, source: LevelInput, sigmas: tuple[ReluDeviations, ...], cotangent: Array
) -> tuple[Array, list[Array]]:
    """What `planes.backward` returns."""
    run = _LevelPrograms(level, source, sigmas)
    after = Cotangent("pooled" if level.coarse else "all", Covariances.from_complex(cotangent))
    logs = []
    for i, entering in reversed(list(enumerate(run.stage_inputs(source)))):
        left, log = run.window_cotangent(i, entering, after)
        after = Cotangent("window" if run.stages[i].conv else "plane", left)
        logs += [] if log is None else [log]
    if isinstance(source, PaddedImages):
        return run.image_cotangent(source, after), logs[::-1]
    box = jax.vmap(stages.window_sum) if after.kind == "window" else lambda x: x
    return _append_zero_plane(stages.pack_complex(*after.pair.map(box))), logs[::-1]


def _append_zero_plane(planes: Array) -> Array:
    """A plane of zeros after all others."""
    return jnp.concatenate([planes, jnp.zeros_like(planes[:1])])


class _LevelPrograms:
    """The stages of one level, each as a function of what enters it: images, or all planes."""

    def __init__(
        self, level: Level, source: LevelInput, sigmas: tuple[ReluDeviations, ...]
    ) -> None:
        self.level, self.grid = level, level.grid
        self.stages = level.stages or (Stage(False, False),)
        rest = iter(sigmas)
        self.sigmas = [next(rest) if stage.relu else None for stage in self.stages]
        first = source.two if isinstance(source, PaddedImages) else source
        self.lanes, self.dtype = first.shape[-1], first.real.dtype

    def stage_inputs(self, source: LevelInput) -> list[PaddedImages | Covariances]:
        """What enters each stage."""
        found: list[PaddedImages | Covariances] = [
            source if isinstance(source, PaddedImages) else Covariances.from_complex(source[:-1])
        ]
        for i in range(len(self.stages) - 1):
            found.append(self.apply(i, found[i]))
        return found

    def apply(self, i: int, source: PaddedImages | Covariances) -> Covariances:
        """All planes after stage i, (n, h, w, lanes)."""
        if isinstance(source, Covariances) and self.stages[i] == Stage(False, False):
            return source
        made = self.output_shape(i, source, len(self.grid), *self.grid.shape)

        def program(spot: ProgramPixels, refs: Any, out: Covariances) -> None:
            spot = spot.square().at(pl.program_id(2))
            value = self.stage(i, spot, *refs).after()
            out.map(lambda ref, x: spot.write(ref, x), value)

        return self.run(program, (source, self.sigmas[i]), made, len(self.grid), SQUARE_PIXELS)

    def apply_and_pool(self, i: int, source: PaddedImages | Covariances) -> Covariances:
        """All planes after stage i and the pooling, sums of 16."""
        coarse = self.level.coarse
        assert coarse is not None  # a pooling follows
        made = self.output_shape(i, source, len(coarse), *coarse.shape)

        def program(spot: ProgramPixels, refs: Any, out: Covariances) -> None:
            plane = pl.program_id(2)
            value = self.stage(i, spot.pairs(coarse, plane), *refs).after()
            at = plane, spot.y, spot.x, spot.lanes[0]
            out.map(lambda ref, x: triton.store(ref.at[*at], x.sum(0)), value)

        return self.run(program, (source, self.sigmas[i]), made, len(coarse), 2)

    def window_cotangent(
        self, i: int, source: PaddedImages | Covariances, after: Cotangent
    ) -> tuple[Covariances, Array | None]:
        """Cotangents of what enters stage i, up to the adjoint of its convolution, and of log σ1.

        Returns:
            (n, h, w, lanes); and (h, w, lanes), or None without a ReLU.
        """
        like, log = (self.array_shape(n, *self.grid.shape) for n in (len(self.grid), self.chunks))
        both = isinstance(source, Covariances) and source.ntk is not None
        made = Covariances(like, like if both else None), log if self.stages[i].relu else None

        def program(spot: ProgramPixels, refs: Any, out: Any) -> None:
            spot, chunk = spot.square(), pl.program_id(2)

            def step(plane: Array, total: Array) -> Array:
                here = spot.at(plane)
                g = here.cotangent(after.kind, refs[2], self.level.coarse)
                value, log = self.stage(i, here, *refs[:2]).window_cotangent(g)
                out[0].map(lambda ref, x: here.write(ref, x), value)
                return total if log is None else total + log

            total = self.loop_over_planes(chunk, step, jnp.zeros(spot.shape, self.dtype))
            if out[1] is not None:
                spot.at(chunk).write(out[1], total)

        refs = source, self.sigmas[i], after.pair
        pair, log = self.run(program, refs, made, self.chunks, SQUARE_PIXELS)
        return pair, None if log is None else log.sum(0)

    def image_cotangent(self, source: PaddedImages, after: Cotangent) -> Array:
        """The cotangent of the image, (c, h, w, lanes)."""
        channels = len(source.two)
        made = self.array_shape(channels, self.chunks, *self.grid.shape)

        def program(spot: ProgramPixels, refs: Any, out: Any) -> None:
            two, g = refs
            spot, chunk = spot.square(), pl.program_id(2)

            def step(plane: Array, totals: list[Array]) -> list[Array]:
                here = spot.at(plane)
                whole = here.cotangent(after.kind, g, None).nngp
                return [t + whole * here.other(two, c) for c, t in enumerate(totals)]

            totals = self.loop_over_planes(
                chunk, step, [jnp.zeros(spot.shape, self.dtype)] * channels
            )
            for c, total in enumerate(totals):
                spot.at(chunk).write(out, total / channels, c)

        return self.run(program, (source.two, after.pair), made, self.chunks, SQUARE_PIXELS).sum(1)

    def stage(self, i: int, spot: ProgramPixels, source: Any, sigma: Any) -> StageProgram:
        """Stage i in a program."""
        return StageProgram(self.level, self.stages[i], spot, source, sigma)

    @property
    def chunks(self) -> int:
        return -(-len(self.grid) // PLANES_PER_PROGRAM)

    def loop_over_planes(self, chunk: Array, step: Callable[..., Any], start: Any) -> Any:
        """A loop over the planes of one chunk."""
        first = chunk * PLANES_PER_PROGRAM
        return lax.fori_loop(
            first, jnp.minimum(first + PLANES_PER_PROGRAM, len(self.grid)), step, start
        )

    def array_shape(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*shape, self.lanes), self.dtype)

    def output_shape(self, i: int, source: PaddedImages | Covariances, *shape: int) -> Covariances:
        """The shape of what leaves stage i."""
        given = isinstance(source, Covariances) and source.ntk is not None
        both = given or (self.level.tangent and self.stages[i].conv)
        return Covariances(self.array_shape(*shape), self.array_shape(*shape) if both else None)

    def run(
        self, program: Callable[..., None], given: Any, made: Any, planes: int, side: int
    ) -> Any:
        """A program for some lanes, each square of pixels, and each plane, or chunk of planes."""
        h, w = self.grid.shape
        rows, columns = (h // 2, w // 2) if side == 2 else (-(-h // side), -(-w // side))
        width = min(LANES_PER_PROGRAM, self.lanes & -self.lanes)

        def kernel(given: Any, made: Any) -> None:
            lanes = pl.program_id(0) * width + lax.broadcasted_iota(jnp.int32, (1, width), 1)
            block = pl.program_id(1)
            y, x = lax.div(block, jnp.int32(columns)), lax.rem(block, jnp.int32(columns))
            program(ProgramPixels(self.grid, y, x, lanes), given, made)

        return pl.pallas_call(
            kernel,
            out_shape=(made,),
            grid=(self.lanes // width, rows * columns, planes),
            interpret=INTERPRET,
            compiler_params=triton.CompilerParams(num_warps=WARPS_PER_PROGRAM, num_stages=1),
        )(given)[0]
