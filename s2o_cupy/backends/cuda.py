"""The CUDA backend: what each stage launches. No call here waits for the device."""

from __future__ import annotations

import functools

import cupy as cp
import numpy as np

from s2o_cupy.compile import (
    DTYPE_MACROS,
    attend_macros,
    attend_shared_bytes,
    attend_threads,
    device_target,
    get_kernel,
    shared_limit,
)
from s2o_cupy.problem import Problem, Slab

SCORE_BYTES = 2**28  # a slab's scores, counted at 4 bytes each; half inputs keep 2
_LOG2_E = 1.4426950408889634


def pool(problem: Problem, k, v):
    """Means of K and V over pool blocks, (B * Hkv, blocks, dim padded to 8), the inputs' dtype; None without a tail."""
    if problem.settings.tail is None or not problem.pool_blocks:
        return None
    kernel = get_kernel("pool", **DTYPE_MACROS[problem.dtype])
    means = []
    for x in (k, v):
        x, dim = _rows(x), x.shape[3]
        row, heads = -(-dim // 8) * 8, problem.batch * problem.heads_kv
        mean = cp.empty((heads, problem.pool_blocks, row), x.dtype)
        sizes = (problem.heads_kv, problem.n_k, dim, row, problem.pool_blocks, problem.settings.pool)
        kernel((problem.pool_blocks, heads), (256,), (x, *_strides(x), mean, *map(np.int32, sizes)))
        means.append(mean)
    return tuple(means)


def attend(problem: Problem, q, k, v, slab: Slab, kv_order, kv_offsets, query_order, pooled, result) -> None:
    """Stage 3 for the slab's heads and segments: fills out, lse, tiles, tail_blocks and tail_mass."""
    _launch(problem, q, k, v, slab, result, kv_order, kv_offsets, query_order, pooled)


def dense(problem: Problem, q, k, v, result) -> None:
    """Exact attention, the same walk with no history: fills out and lse."""
    _launch(problem, q, k, v, None, result)


def _launch(problem, q, k, v, slab, result, kv_order=None, kv_offsets=None, query_order=None, pooled=None):
    s, p = problem.settings, problem
    walk = slab is not None
    if not walk:
        slab = p.whole
        segment, block_q, tiles_per_segment, row_tiles = p.n_q, 128, -(-p.n_q // 128), -(-p.n_q // 128)
        tile_start, tile_stop = 0, row_tiles
    else:
        segment, block_q, tiles_per_segment, row_tiles = s.segment, s.block_q, p.tiles_per_segment, len(p.tile_start)
        tile_start = slab.segment_start * tiles_per_segment
        tile_stop = min(slab.segment_stop * tiles_per_segment, row_tiles)
    grid = ((tile_stop - tile_start) * p.group, slab.kv_stop - slab.kv_start)
    if not grid[0] or not grid[1]:
        return
    blocks = p.pool_blocks if pooled is not None else 0
    taus = _taus(s.tau) if walk and isinstance(s.tau, tuple) else None
    sizes = (p.heads_q, p.heads_kv, p.orders, slab.kv_start, p.n_q, p.n_k, p.dim_qk, p.dim_v)
    shape = (s.causal, segment, slab.segment_start, tiles_per_segment, tile_start, tile_stop, row_tiles)
    steps = (block_q, s.block_k, s.pool.bit_length() - 1)
    stats = (result.tiles, result.tail_blocks, result.tail_mass) if walk else (None, None, None)
    q, k, v = _rows(q), _rows(k), _rows(v)
    tau = 0.0 if taus is not None or not walk else s.tau
    order = (kv_order, kv_offsets, np.int64(kv_offsets.strides[0] // 8)) if walk else (None, None, np.int64(0))
    pools = (*pooled, pooled[0].shape[1], pooled[0].shape[2], pooled[1].shape[2]) if blocks else (None, None, 0, 0, 0)
    if p.dtype not in ("float16", "bfloat16"):
        raise NotImplementedError(f"dtype {p.dtype} on the CUDA backend")
    macros = attend_macros(p.dtype, p.dim_qk, p.dim_v, block_q, device_target())
    if block_q > macros["BLOCK_M"]:
        raise ValueError(f"block_q is {block_q}; the CUDA backend supports 1 to 128")
    shared = attend_shared_bytes(macros, blocks)
    if shared > shared_limit(device_target()) - 1024:
        raise ValueError(f"{blocks} pool blocks need {shared} bytes of shared memory; choose a pool above {s.pool}")
    aligned = sum(_aligned(x) << bit for bit, x in enumerate((q, k, v, result.out)))
    arguments = []
    for x in (q, k, v, result.out):
        arguments += [x, *_strides(x)]
    arguments += [np.int32(aligned), *pools[:2], *map(np.int32, pools[2:]), *order, query_order, taus, np.float32(tau)]
    arguments += [result.lse, *stats, *map(np.int32, (*sizes, *shape, *steps)), np.float32(p.scale * _LOG2_E)]
    get_kernel("attend", **macros)(grid, (attend_threads(macros),), tuple(map(_pointer, arguments)), shared_mem=shared)


def _pointer(x):
    """None is a null pointer."""
    return np.intp(0) if x is None else x


def _rows(x):
    """`x` with a unit last stride (it may be any where there is one column), or a refusal."""
    if x.shape[3] > 1 and x.strides[3] != x.itemsize:
        raise ValueError(
            f"an array of shape {x.shape} has strides {x.strides}; the CUDA backend needs a last axis without gaps "
            "(cupy.ascontiguousarray)"
        )
    return x


def _strides(x) -> list:
    return [np.int64(s // x.itemsize) for s in x.strides[:3]]


def _aligned(x) -> int:
    """Whether every row starts on 16 bytes."""
    return int(x.data.ptr % 16 == 0 and all(s % 16 == 0 or n == 1 for s, n in zip(x.strides[:3], x.shape[:3])))


@functools.lru_cache(maxsize=64)
def _taus_on(device: int, taus: tuple):
    return cp.asarray(taus, np.float32)


def _taus(taus: tuple):
    return _taus_on(cp.cuda.runtime.getDevice(), taus)
