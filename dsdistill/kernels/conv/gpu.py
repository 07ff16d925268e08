"""The planes of one resolution on a GPU: one kernel for each stage, over all planes at once.

The result is that of `planes`. There a plane goes through all stages while it stays in a
processor's cache, which on a GPU would be hundreds of kernels, each shorter than its launch. Here a
program processes some pixels and lanes of one plane, or of many planes in turn where it sums over
them. K and T before a ReLU stay in registers; only the planes between two stages go through memory.

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

PLANES_PER_PROGRAM = 32  # in a program that sums over planes
INTERPRET = False  # runs the programs in plain JAX, for tests without a GPU


class Cotangent(NamedTuple):
    """Cotangent of the output of a stage.

    Attributes:
        kind: `pooled`: one for each pooled plane; `all`: the same for every plane, (h, w, lanes);
            `plane`: one for each plane; `window`: one for each plane, still to be summed over the
            window of each pixel.
        pair: Cotangents of K and T.
    """

    kind: str
    pair: Covariances


def is_enabled() -> bool:
    """Whether convolutional kernels are computed on a GPU in this process."""
    return INTERPRET or (triton is not None and jax.default_backend() == "gpu")


def covers(level: Level, source: LevelInput) -> bool:
    """Whether a level can be computed here: programs count entries in 32 bits."""
    lanes = (source.two if isinstance(source, PaddedImages) else source).shape[-1]
    return is_enabled() and len(level.grid) * math.prod(level.grid.shape) * lanes < 2**31


def forward(level: Level, source: LevelInput, sigmas: tuple[ReluDeviations, ...]) -> Array:
    """Compute `planes.forward`, with sums instead of means."""
    run = _LevelPrograms(level, source, sigmas)
    *_, last = run.stage_inputs(source)
    i = len(run.stages) - 1
    if level.coarse is None:
        return stages.pack_complex(*run.apply(i, last).map(lambda x: x.sum(0)))
    return _append_zero_plane(stages.pack_complex(*run.apply_and_pool(i, last)))


def backward(
    level: Level, source: LevelInput, sigmas: tuple[ReluDeviations, ...], cotangent: Array
) -> tuple[Array, list[Array]]:
    """Compute `planes.backward`."""
    run = _LevelPrograms(level, source, sigmas)
    after = Cotangent("pooled" if level.coarse else "all", Covariances.from_complex(cotangent))
    logs = []
    for i, stage_input in reversed(list(enumerate(run.stage_inputs(source)))):
        pair, log = run.window_cotangent(i, stage_input, after)
        after = Cotangent("window" if run.stages[i].conv else "plane", pair)
        logs += [] if log is None else [log]
    if isinstance(source, PaddedImages):
        return run.image_cotangent(source, after), logs[::-1]
    box = jax.vmap(stages.window_sum) if after.kind == "window" else lambda x: x
    return _append_zero_plane(stages.pack_complex(*after.pair.map(box))), logs[::-1]


def _append_zero_plane(planes: Array) -> Array:
    """Append a plane of zeros to all planes."""
    return jnp.concatenate([planes, jnp.zeros_like(planes[:1])])


class _LevelPrograms:
    """Stages of one level, each as a function of its input: images, or all planes."""

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
        """Input of each stage."""
        inputs: list[PaddedImages | Covariances] = [
            source if isinstance(source, PaddedImages) else Covariances.from_complex(source[:-1])
        ]
        for i in range(len(self.stages) - 1):
            inputs.append(self.apply(i, inputs[i]))
        return inputs

    def apply(self, i: int, source: PaddedImages | Covariances) -> Covariances:
        """Compute all planes after stage i, (n, h, w, lanes)."""
        if isinstance(source, Covariances) and self.stages[i] == Stage(False, False):
            return source
        out_shape = self.output_shape(i, source, len(self.grid), *self.grid.shape)

        def program(spot: ProgramPixels, refs: Any, out: Covariances) -> None:
            spot = spot.square().at(pl.program_id(2))
            value = self.stage(i, spot, *refs).after()
            out.map(lambda ref, x: spot.write(ref, x), value)

        return self.run(program, (source, self.sigmas[i]), out_shape, len(self.grid), SQUARE_PIXELS)

    def apply_and_pool(self, i: int, source: PaddedImages | Covariances) -> Covariances:
        """Compute all planes after stage i and the pooling, as sums of 16 pairs."""
        coarse = self.level.coarse
        assert coarse is not None  # a pooling follows
        out_shape = self.output_shape(i, source, len(coarse), *coarse.shape)

        def program(spot: ProgramPixels, refs: Any, out: Covariances) -> None:
            plane = pl.program_id(2)
            value = self.stage(i, spot.pairs(coarse, plane), *refs).after()
            at = plane, spot.y, spot.x, spot.lanes[0]
            out.map(lambda ref, x: triton.store(ref.at[*at], x.sum(0)), value)

        return self.run(program, (source, self.sigmas[i]), out_shape, len(coarse), 2)

    def window_cotangent(
        self, i: int, source: PaddedImages | Covariances, after: Cotangent
    ) -> tuple[Covariances, Array | None]:
        """Cotangents of the window sums that stage i takes, and of log σ1 at its ReLU.

        Without a convolution the former are the cotangents of the input of the stage.

        Returns:
            Cotangents of K and T, (n, h, w, lanes), and of log σ1, (h, w, lanes), or None without
            a ReLU.
        """
        planes, log = (self.array_shape(n, *self.grid.shape) for n in (len(self.grid), self.chunks))
        both = isinstance(source, Covariances) and source.ntk is not None
        out_shape = (
            Covariances(planes, planes if both else None),
            log if self.stages[i].relu else None,
        )

        def program(spot: ProgramPixels, refs: Any, out: Any) -> None:
            spot, chunk = spot.square(), pl.program_id(2)

            def step(plane: Array, total: Array) -> Array:
                at_plane = spot.at(plane)
                g = at_plane.cotangent(after.kind, refs[2], self.level.coarse)
                value, log = self.stage(i, at_plane, *refs[:2]).window_cotangent(g)
                out[0].map(lambda ref, x: at_plane.write(ref, x), value)
                return total if log is None else total + log

            total = self.loop_over_planes(chunk, step, jnp.zeros(spot.shape, self.dtype))
            if out[1] is not None:
                spot.at(chunk).write(out[1], total)

        refs = source, self.sigmas[i], after.pair
        pair, log = self.run(program, refs, out_shape, self.chunks, SQUARE_PIXELS)
        return pair, None if log is None else log.sum(0)

    def image_cotangent(self, source: PaddedImages, after: Cotangent) -> Array:
        """Cotangent of the image, (c, h, w, lanes)."""
        channels = len(source.two)
        out_shape = self.array_shape(channels, self.chunks, *self.grid.shape)

        def program(spot: ProgramPixels, refs: Any, out: Any) -> None:
            two, g = refs
            spot, chunk = spot.square(), pl.program_id(2)

            def step(plane: Array, totals: list[Array]) -> list[Array]:
                at_plane = spot.at(plane)
                nngp = at_plane.cotangent(after.kind, g, None).nngp
                return [t + nngp * at_plane.read_lanes(two, c) for c, t in enumerate(totals)]

            totals = self.loop_over_planes(
                chunk, step, [jnp.zeros(spot.shape, self.dtype)] * channels
            )
            for c, total in enumerate(totals):
                spot.at(chunk).write(out, total / channels, c)

        return self.run(
            program, (source.two, after.pair), out_shape, self.chunks, SQUARE_PIXELS
        ).sum(1)

    def stage(self, i: int, spot: ProgramPixels, source: Any, sigma: Any) -> StageProgram:
        """Build stage i inside a program."""
        return StageProgram(self.level, self.stages[i], spot, source, sigma)

    @property
    def chunks(self) -> int:
        """Number of chunks of `PLANES_PER_PROGRAM` planes."""
        return -(-len(self.grid) // PLANES_PER_PROGRAM)

    def loop_over_planes(self, chunk: Array, step: Callable[..., Any], start: Any) -> Any:
        """Fold a step over the planes of one chunk."""
        first = chunk * PLANES_PER_PROGRAM
        return lax.fori_loop(
            first, jnp.minimum(first + PLANES_PER_PROGRAM, len(self.grid)), step, start
        )

    def array_shape(self, *shape: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of an array (*shape, lanes)."""
        return jax.ShapeDtypeStruct((*shape, self.lanes), self.dtype)

    def output_shape(self, i: int, source: PaddedImages | Covariances, *shape: int) -> Covariances:
        """Shapes of K and T after stage i."""
        has_tangent = isinstance(source, Covariances) and source.ntk is not None
        both = has_tangent or (self.level.tangent and self.stages[i].conv)
        return Covariances(self.array_shape(*shape), self.array_shape(*shape) if both else None)

    def run(
        self, program: Callable[..., None], inputs: Any, out_shape: Any, planes: int, side: int
    ) -> Any:
        """Run a program for each block of lanes, square of pixels, and plane or chunk of planes."""
        h, w = self.grid.shape
        rows, columns = (h // 2, w // 2) if side == 2 else (-(-h // side), -(-w // side))
        width = min(LANES_PER_PROGRAM, self.lanes & -self.lanes)

        def kernel(inputs: Any, outputs: Any) -> None:
            lanes = pl.program_id(0) * width + lax.broadcasted_iota(jnp.int32, (1, width), 1)
            block = pl.program_id(1)
            y, x = lax.div(block, jnp.int32(columns)), lax.rem(block, jnp.int32(columns))
            program(ProgramPixels(self.grid, y, x, lanes), inputs, outputs)

        return pl.pallas_call(
            kernel,
            out_shape=(out_shape,),
            grid=(self.lanes // width, rows * columns, planes),
            interpret=INTERPRET,
            compiler_params=triton.CompilerParams(num_warps=WARPS_PER_PROGRAM, num_stages=1),
        )(inputs)[0]
