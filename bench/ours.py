"""Our stages as the GPU benchmarks call them: room for a whole plan and an answer, computed pairs, errors."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from bench import workloads
from s2o_cupy.arrays import on_host
from s2o_cupy.problem import Problem
from s2o_cupy.settings import Settings

HEADS_Q, HEADS_KV, DIM = 32, 8, 128  # of every synthetic case
BASE = {"segment": 512, "block_k": 128, "pool": 256}  # fixed here, whatever the package's defaults are
S512 = Settings(**BASE)
S128 = Settings(segment=128, block_k=128, rank_terms=7)
SHARED = S128.replace(share_order=True)
S64 = SHARED.replace(segment=64, block_q=64, rank="mean", cap=0.25)
VARIANTS = {  # which is the fastest depends on the error and on the length: smaller segments stop sooner, and rank more
    "s2o_cupy": Settings(),
    "s2o_cupy, S=128 shared, spread tail": SHARED.replace(tail="spread"),
    "s2o_cupy, S=128, spread tail": S128.replace(tail="spread"),
    "s2o_cupy, S=64 shared, mean rank": S64,
    "s2o_cupy, S=64 shared, mean rank, spread tail": S64.replace(tail="spread"),
    "s2o_cupy precise, shared": Settings.precise(block_k=128, share_order=True),
}


def inputs(preset: str, n: int, seed: int = 0) -> list:
    """q, k, v of a preset, or of 'randn', as bfloat16 CuPy arrays of four axes."""
    import cupy

    arrays = workloads.make(
        "diffuse" if preset == "randn" else preset,
        n, heads_q=HEADS_Q, heads_kv=HEADS_KV, dim=DIM, seed=seed, xp=cupy,
    )  # fmt: skip
    if preset == "randn":
        cupy.random.seed(seed)
        for x in arrays:  # head by head: float32 noise of a whole array would take twice its room
            for head in x:
                head[...] = cupy.random.standard_normal(head.shape, dtype=np.float32).astype(x.dtype)
    return [x[None] for x in arrays]


def read(path: str) -> list:
    """q, k, v of a file as `s2o run` takes them, as CuPy arrays of four axes."""
    import cupy

    with np.load(path) as file:
        arrays = [cupy.asarray(file[name]) for name in ("q", "k", "v")]
    return [x.reshape((1,) * (4 - x.ndim) + x.shape) for x in arrays]


def lists(problem: Problem) -> tuple:
    """Offsets of a whole plan's lists, and room for their keys."""
    import cupy

    offsets = cupy.asarray(problem.offsets(problem.whole))
    return offsets, cupy.empty(int(offsets[-1, -1]), np.int32)


def answer(problem: Problem, q) -> SimpleNamespace:
    """Room for what stage 3 fills."""
    import cupy

    rows = (problem.batch, problem.heads_q, problem.n_q)
    tiles = (*rows[:2], len(problem.tile_start))
    return SimpleNamespace(
        out=cupy.zeros((*rows, problem.dim_v), q.dtype),
        lse=cupy.zeros(rows, problem.compute_dtype),
        tiles=cupy.zeros(tiles, np.int32),
        tail_blocks=cupy.zeros(tiles, np.int32),
        tail_mass=cupy.zeros(rows, np.float32),
    )


def computed(problem: Problem, result) -> tuple[float, float]:
    """Density, and computed pairs of all heads."""
    tiles, blocks = (
        on_host(x).reshape(-1, len(problem.tile_start)).astype(np.int64) for x in (result.tiles, result.tail_blocks)
    )
    walked = np.minimum(tiles * problem.settings.block_k, problem.listed[problem.tile_segment])
    pairs = len(tiles) * problem.window_pairs.sum() + ((walked + blocks) * problem.tile_rows).sum()
    return float(pairs / len(tiles) / problem.allowed_pairs), float(pairs)


def causal_pairs(n: int, heads: int | None = None) -> float:
    """(query, key) pairs that all heads may see."""
    return (heads or HEADS_Q) * n * (n + 1) / 2


def gap(out, exact) -> float:
    """Relative L2 error over all heads of two arrays (B, Hq, N, Dv), a head at a time."""
    import cupy

    found = norm = 0.0
    for h in range(out.shape[1]):
        want = exact[:, h].astype(np.float32)
        found += float(cupy.linalg.norm(out[:, h].astype(np.float32) - want)) ** 2
        norm += float(cupy.linalg.norm(want)) ** 2
    return float(np.sqrt(found / norm))


def rows_error(out, rows: np.ndarray, exact) -> float:
    """Relative L2 error over all heads of sampled rows, out (.., Hq, N, Dv) and exact (Hq, rows, Dv)."""
    import cupy

    out = out if isinstance(out, cupy.ndarray) else cupy.from_dlpack(out.detach())
    out = out.reshape(-1, *out.shape[-2:])[:, cupy.asarray(rows)].astype(np.float64)
    return float(cupy.linalg.norm(out - exact) / cupy.linalg.norm(exact))


def shape_text(n: int, heads_q: int | None = None, heads_kv: int | None = None, dim: int | None = None) -> str:
    """The shape column: heads, keys and head dim, by default those of the synthetic cases."""
    return f"Hq{heads_q or HEADS_Q} Hkv{heads_kv or HEADS_KV} N{n} D{dim or DIM}"
