"""work.py: what every rung is given, and what it must answer: one plan's walk without the tail, in float16."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from s2o_cupy.problem import Problem, make_problem
from s2o_cupy.settings import Settings


@dataclass(frozen=True)
class Work:
    """Arrays of one device, a plan over them, and the problem that says what they mean.

    `q` (heads_q, n, dim) and `k`, `v` (heads_kv, n, dim) are float16, contiguous and finite. A history is all the keys
    before a segment: pool blocks divide segments, and row tiles do.
    """

    problem: Problem
    q: object
    k: object
    v: object
    order: object  # (keys,) int32: ranked lists end to end
    starts: object  # (heads_q, segments + 1) int64: where they start

    def __post_init__(self):
        p, s = self.problem, self.problem.settings
        if not s.causal or p.n_q != p.n_k or s.tail or s.cap != 1 or p.orders != p.group or s.query_order != "position":
            raise ValueError(
                f"settings are {s}; the ladder walks causal plans of as many queries as keys, without a tail"
            )
        if s.segment % s.pool or s.segment % s.block_q:
            raise ValueError(f"segment is {s.segment}; allowed: a multiple of pool {s.pool} and of block_q {s.block_q}")

    @property
    def row_tiles(self) -> int:
        return len(self.problem.tile_start)

    def numbers(self) -> tuple:
        """(segment, block_k, tau, scale), as the kernels take them."""
        s = self.problem.settings
        return s.segment, s.block_k, np.float32(s.tau), np.float32(self.problem.scale)

    def answer(self, xp=np):
        """`out` and `tiles`, to be filled."""
        tiles = xp.full((self.problem.heads_q, self.row_tiles), -1, np.int32)
        return SimpleNamespace(out=xp.zeros_like(self.q), tiles=tiles)

    def on_device(self) -> Work:
        """The same over CuPy arrays."""
        import cupy

        arrays = (self.q, self.k, self.v, self.order, self.starts)
        return Work(self.problem, *map(cupy.asarray, arrays))


def settings_of(**changes) -> Settings:
    """The settings that the ladder is measured with."""
    return Settings(segment=512, block_q=128, block_k=128, pool=256, tail=None, tau=1e-2).replace(**changes)


def ranked_work(length: int, dim: int, tau: float) -> Work:
    """The `diffuse` preset of the benchmarks, ranked by the package on the current CuPy device."""
    import cupy

    from bench import workloads
    from s2o_cupy.backends import cuda

    q, k, v = workloads.make("diffuse", length, dim=dim, dtype="float16", xp=cupy)
    problem = make_problem(q[None], k[None], v[None], settings_of(tau=tau))
    starts = cupy.asarray(problem.offsets(problem.whole))
    order = cupy.empty(int(starts[-1, -1]), np.int32)
    cuda.rank(problem, q[None], k[None], problem.whole, starts, order)
    return Work(problem, q, k, v, order, starts)


def small_work(n=60, heads=(4, 2), dim=32, seed=0, **settings) -> Work:
    """A small case with a plan of the reference, to check a rung by: ragged, with stops of its own in each row tile."""
    from s2o_cupy import reference

    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((1, h, n, dim)).astype(np.float16) for h in (heads[0], heads[1], heads[1]))
    small = {"segment": 16, "block_q": 8, "block_k": 6, "pool": 8, "tau": 0.15, "rank": "mean"}
    problem = make_problem(q, k, v, settings_of(**{**small, **settings}))
    order, offsets, _ = reference.plan(problem, q, k)
    return Work(problem, q[0], k[0], v[0], order, offsets[0])


def check(work: Work, answer, tolerance: float = 4e-3) -> None:
    """Refuse an answer (NumPy) that is not the reference's: the same stops, `out` to weights rounded to float16."""
    from s2o_cupy import reference

    arrays = (x[None] for x in (work.q, work.k, work.v))
    want = reference.attend(work.problem, *arrays, work.order, work.starts[None])
    if not np.array_equal(answer.tiles, want.tiles[0]):
        raise AssertionError(f"row tiles stopped after {answer.tiles.tolist()}, not {want.tiles[0].tolist()}")
    error = np.abs(answer.out.astype(np.float64) - want.out[0]).max()
    if not error <= tolerance:
        raise AssertionError(f"off by {error}, more than {tolerance}")
