"""The Numba CUDA backend: what each stage launches, over CuPy arrays, or NumPy arrays in Numba's simulator.

The kernels are the readable twins of the raw ones (``kernels/*_numba.py``). Means, covariance factors
and centres of the queries are linear algebra of the arrays' own module, in float64.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import warnings
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from pathlib import Path
from types import FunctionType

import numba
import numpy as np
from numba import cuda

from s2o_cupy import planning
from s2o_cupy.arrays import namespace
from s2o_cupy.problem import Problem, Slab
from s2o_cupy.twins import SOURCES, twin

# Keys of the longest history from which `attention` ranks: the raw kernels' number, not measured for these.
RANKING_PAYS_FROM = 4096
NEEDS_STATS = True  # lse, tiles, tail_blocks and tail_mass, whoever reads them
SCORE_BYTES = 2**27
SIMULATED = bool(numba.config.ENABLE_CUDASIM)
_WARP = 1 if SIMULATED else 32
_THREADS = 4 if SIMULATED else 128  # a simulated thread is a Python thread
_DENSE_ROWS = 4 if SIMULATED else 128
_WIDTHS = (64, 128, 256)
_compiling = threading.Lock()
if SIMULATED:
    from s2o_cupy.backends._simulator import simulate


ranked = partial(planning.ranked, sys.modules[__name__])


def rank(problem: Problem, q, k, slab: Slab, kv_offsets, kv_order) -> None:
    """Stages 1 and 2 for the slab's lists, a part of bounded score memory at a time."""
    for part, offsets in problem.parts(slab, SCORE_BYTES, kv_offsets):
        # No name holds the scores, so that the next part's do not find them still there.
        remap(problem, score(problem, q, k, part), part, offsets, kv_order)


def score(problem: Problem, q, k, slab: Slab):
    """Stage 1: (lists of the slab, longest history) float32 scores; beyond a list's history undefined."""
    p, xp = problem, namespace(q)
    history = _history(p, slab, xp)
    lists = (slab.kv_stop - slab.kv_start) * p.orders * slab.segments
    width = int(p.history[slab.segment_start : slab.segment_stop].max(initial=0))
    scores = xp.empty((lists, width), np.float32)
    if not scores.size:
        return scores
    blocks, scale = -(-width // _THREADS), p.compute_dtype.type(p.scale)
    kinds = _real(p), _width(p.dim_qk)
    describe = _centres if p.settings.rank == "mixture" else _means_and_factors
    parts = [describe(p, xp, _queries(p, xp, q, kv, slab)) for kv in range(slab.kv_start, slab.kv_stop)]
    rows, *mixture = (xp.concatenate(part).astype(p.compute_dtype) for part in zip(*parts))
    if mixture:
        variance, share = mixture
        norm = xp.empty(share.shape, p.compute_dtype)
        given = (k, rows, variance, history)
        norm_kernel, mixture_kernel = twin("mixture").norm_kernel, twin("mixture").mixture_kernel
        _launch(norm_kernel(*kinds), (rows.shape[1], lists), _THREADS, *given, norm, slab.kv_start, p.orders, scale)
        with np.errstate(all="ignore"):  # a centre whose every key weighs nothing, or a list without keys
            weights = share - 2 * norm
        _launch(
            mixture_kernel(*kinds), (blocks, lists), _THREADS, *given, weights, scores, slab.kv_start, p.orders, scale
        )
    else:
        score_kernel = twin("score").score_kernel
        _launch(
            score_kernel(*kinds), (blocks, lists), _THREADS, k, rows, history, scores, slab.kv_start, p.orders, scale
        )
    return scores


def _queries(p: Problem, xp, q, kv: int, slab: Slab):
    """The queries of each list of a K/V head, (lists, queries, D) float64; NaN rows fill the last segment."""
    b, h = divmod(kv, p.heads_kv)
    size = p.settings.segment
    x = q[b, h * p.group : (h + 1) * p.group, slab.segment_start * size : slab.segment_stop * size]
    x = xp.ascontiguousarray(x).astype(np.float64)
    x = xp.pad(x, ((0, 0), (0, slab.segments * size - x.shape[1]), (0, 0)), constant_values=np.nan)
    x = x.reshape(p.orders, -1, slab.segments, size, p.dim_qk).swapaxes(1, 2)
    return x.reshape(p.orders * slab.segments, -1, p.dim_qk)


def _means_and_factors(p: Problem, xp, x):
    """(lists, 1 + terms, D): the mean query of each list, then its covariance factors.

    A query that is not finite is left out; a covariance that is not finite counts as none.
    """
    keep = xp.isfinite(x).all(axis=-1, keepdims=True)
    count = xp.maximum(keep.sum(axis=1, keepdims=True), 1)
    mean = xp.where(keep, x, 0).sum(axis=1, keepdims=True) / count
    if not p.terms:
        return (mean,)
    with np.errstate(all="ignore"):
        centred = xp.where(keep, x - mean, 0)
        covariance = centred.swapaxes(1, 2) @ centred / count
    covariance = xp.where(xp.isfinite(covariance).all(axis=(1, 2), keepdims=True), covariance, 0)
    axes = xp.argsort(-xp.diagonal(covariance, axis1=1, axis2=2), axis=-1, kind="stable")[:, : p.terms]
    basis, _ = xp.linalg.qr(xp.take_along_axis(covariance, axes[:, None], axis=2))
    values, vectors = xp.linalg.eigh(basis.swapaxes(1, 2) @ covariance @ basis)
    factors = basis @ vectors * xp.sqrt(xp.maximum(values, 0))[:, None]
    return (xp.concatenate([mean, factors.swapaxes(1, 2)], axis=1),)


def _centres(p: Problem, xp, x):
    """Centres (lists, terms, D) of each list's finite queries, their variance (lists, D) and the log of their shares.

    A list with fewer queries than terms has centres of no share; one without queries has a centre at 0.
    """
    keep = xp.isfinite(x).all(axis=-1)
    found = keep.sum(axis=1)[:, None]
    x = xp.take_along_axis(xp.where(keep[..., None], x, 0), xp.argsort(~keep, axis=1, kind="stable")[..., None], axis=1)
    c, terms = xp.arange(p.terms)[None], xp.clip(found, 1, p.terms)
    start = xp.minimum(c * found // terms + found // (2 * terms), x.shape[1] - 1)
    centres = xp.take_along_axis(x, start[..., None], axis=1)
    near = x @ centres.swapaxes(1, 2) - (centres**2).sum(axis=2)[:, None] / 2
    near = xp.where(c[:, None] < terms[..., None], near, -np.inf)
    member = (near.argmax(axis=2)[..., None] == c[:, None]) & (xp.arange(x.shape[1]) < found)[..., None]
    count = member.sum(axis=1)
    member = member.astype(np.float64)
    means = member.swapaxes(1, 2) @ x / xp.maximum(count, 1)[..., None]
    centres = xp.where(count[..., None] > 0, means, centres)
    around = (member.sum(axis=2, keepdims=True) * (x - member @ centres)) ** 2
    with np.errstate(divide="ignore"):
        share = xp.log(xp.where(found > 0, count / xp.maximum(found, 1), c == 0))
    return centres, around.sum(axis=1) / xp.maximum(found, 1), share


def remap(problem: Problem, scores, slab: Slab, kv_offsets, kv_order) -> None:
    """Stage 2: writes each list of the slab at its offset, the listed keys by descending score."""
    xp, levels, kernels, sort = namespace(scores), problem.settings.rank_levels or 0, twin("remap"), twin("counting")
    threads = _THREADS if SIMULATED else kernels.THREADS
    passes, key_bits = sort.passes_for(levels + 1 if levels else kernels.LAST), scores.shape[1].bit_length()
    item = numba.int32 if sort.none_of(passes).bit_length() + key_bits < 32 else numba.int64
    chunk = threads * sort.run_of(item)
    scratch = xp.empty((2, len(scores), -(-scores.shape[1] // chunk) * chunk), np.dtype(str(item)))
    kernel, grid = kernels.remap_kernel(item, not levels, threads), (slab.segments, len(kv_offsets))
    arrays = (_history(problem, slab, xp), xp.ascontiguousarray(kv_offsets), kv_order, scratch)
    given = (scores, scores.view(np.uint32), *arrays, levels, passes, key_bits)
    _launch(kernel, grid, threads, *given, layout="C")


def _history(problem: Problem, slab: Slab, xp):
    """Scores of each of the slab's segments, int32."""
    device = None if SIMULATED else xp.cuda.runtime.getDevice()
    return _kept_history(problem, slab.segment_start, slab.segment_stop, xp, device)


@lru_cache(maxsize=1024)
def _kept_history(problem: Problem, start: int, stop: int, xp, device):
    """Kept, because a copy to the device costs more than a launch and cannot be captured in a graph."""
    history = xp.asarray(problem.history[start:stop].astype(np.int32))
    if not SIMULATED:
        xp.cuda.get_current_stream().synchronize()  # other streams will read it
    return history


def pool(problem: Problem, k, v):
    """Means of K and V over pool blocks, (B, Hkv, blocks, D) and (..., Dv), compute type; None without a tail.

    With ``tail="spread"`` a third, like K's means: K's squared departures from them, summed over the blocks so far.
    """
    p, kernels = problem, twin("pool")
    if p.settings.tail is None or not p.pool_blocks:
        return None
    grid, answers = (p.pool_blocks, p.batch * p.heads_kv), []
    for x in (k, v):
        mean = namespace(x).empty((p.batch, p.heads_kv, p.pool_blocks, x.shape[3]), p.compute_dtype)
        _launch(kernels.pool_kernel(_real(p)), grid, _THREADS, x, mean, p.settings.pool)
        answers.append(mean)
    if p.settings.tail == "spread":
        spread = namespace(k).empty_like(answers[0])
        _launch(kernels.departures_kernel(_real(p)), grid, _THREADS, k, answers[0], spread, p.settings.pool)
        _launch(kernels.running_kernel(_real(p)), (grid[1], 1), _THREADS, spread)
        answers.append(spread)
    return tuple(answers)


def attend(problem: Problem, q, k, v, slab: Slab, kv_order, kv_offsets, query_order, pooled, answer) -> None:
    """Stage 3 for the slab's heads and segments: fills out, lse, tiles, tail_blocks and tail_mass."""
    p, s, xp, kernels = problem, problem.settings, namespace(q), twin("attend")
    if s.block_q > kernels.MAX_ROWS:
        raise ValueError(f"block_q is {s.block_q}; the Numba CUDA backend supports 1 to {kernels.MAX_ROWS}")
    if pooled is not None and p.pool_blocks > kernels.MAX_BLOCKS:
        raise ValueError(
            f"pool is {s.pool}, which cuts {p.longest} keys into {p.pool_blocks} blocks; "
            f"the Numba CUDA backend supports {kernels.MAX_BLOCKS}: choose a greater pool"
        )
    tile_start = slab.segment_start * p.tiles_per_segment
    tile_stop = min(slab.segment_stop * p.tiles_per_segment, len(p.tile_start))
    grid = (tile_stop - tile_start, (slab.kv_stop - slab.kv_start) * p.group)
    sizes = (int(s.causal), 0, s.segment, s.block_q, p.tiles_per_segment, s.block_k, s.pool, p.shift, p.window)
    order = query_order if query_order is not None else xp.empty((1, 0, 0), np.int32)
    place = (slab.kv_start, tile_start, slab.segment_start)
    _walk(p, xp, (q, k, v), pooled, (kv_order, kv_offsets, order), answer, place, sizes, grid)


def dense(problem: Problem, q, k, v, answer) -> None:
    """Exact attention, the same walk with no history: fills out and lse."""
    p, xp = problem, namespace(q)
    tiles = -(-p.n_q // _DENSE_ROWS)
    sizes = (int(p.settings.causal), 1, p.n_q, _DENSE_ROWS, tiles, 1, 1, p.shift, p.window)
    order = (xp.empty(0, np.int32), xp.empty((0, 1), np.int64), xp.empty((1, 0, 0), np.int32))
    _walk(p, xp, (q, k, v), None, order, answer, (0, 0, 0), sizes, (tiles, p.batch * p.heads_q))


def _walk(p, xp, arrays, pooled, order, answer, place, sizes, grid) -> None:
    none = xp.empty((1, 1, 0, 1), p.compute_dtype)
    pooled = (*(pooled or ()), none, none, none)[:3]
    taus = xp.asarray(p.tau.astype(p.compute_dtype))
    answers = (answer.out, answer.lse, answer.tiles, answer.tail_blocks, answer.tail_mass)
    threads = -(-min(sizes[3], p.n_q) // _WARP) * _WARP
    scale = p.compute_dtype.type(p.scale)
    spread = pooled[2] is not none
    kernel = twin("attend").attend_kernel(_real(p), _width(max(p.dim_qk, p.dim_v)), spread)
    _launch(kernel, grid, threads, *arrays, *pooled, *order, taus, *answers, place, sizes, scale)


def _real(p: Problem):
    return numba.float64 if p.dtype == "float64" else numba.float32


def _width(dim: int) -> int:
    """Columns that a kernel is compiled for: few widths on a device, where compiling takes seconds."""
    return dim if SIMULATED else next(width for width in _WIDTHS if dim <= width)


def _launch(kernel, grid, threads: int, *arguments, layout: str = "A") -> None:
    """Launch on CuPy's current device and stream, or run in the simulator; an empty grid is no launch.

    Arrays are compiled for any strides, or with layout "C" as contiguous, which spares a product an index.
    """
    if not all(grid):
        return
    if SIMULATED:
        simulate(kernel, grid, threads, arguments)
        return
    import cupy

    device, stream = cupy.cuda.runtime.getDevice(), cupy.cuda.get_current_stream().ptr
    with cuda.gpus[device]:
        compiled = _compiled(kernel, tuple(map(_kind, arguments)), device, layout)
        _configured(compiled, grid, threads, stream)(*map(_handed, arguments))


@cache
def _compiled(kernel, kinds: tuple, device: int, layout: str):
    """The kernel for arguments of these kinds, from Numba's disk cache where it is there; one for each layout."""
    from numba.cuda.np.numpy_support import from_dtype  # of numba-cuda, which knows bfloat16

    def type_of(kind):
        if kind is int:
            return numba.int64
        if isinstance(kind, int):
            return numba.types.UniTuple(numba.int64, kind)
        return (
            from_dtype(kind) if isinstance(kind, np.dtype) else numba.types.Array(from_dtype(kind[0]), kind[1], layout)
        )

    function = _named(kernel.py_func, (layout, *kinds))
    kept = Path(function.__code__.co_filename).is_file()
    # bfloat16's conversions are linked in LLVM IR; the rest here does not gain from that, and it compiles twice.
    links = any("bfloat16" in str(kind) for kind in kinds)
    with _linked_kernels_kept():
        return cuda.jit(tuple(map(type_of, kinds)), cache=kept, lto=links)(function)


@contextmanager
def _linked_kernels_kept():
    """Numba does not keep a kernel on disk that links other code, though its cubin holds that code already."""
    from numba.cuda.codegen import CUDACodeLibrary

    plain = CUDACodeLibrary._reduce_states

    def reduce_states(library):
        if library._cubin_cache:
            library._linking_files = set()
        return plain(library)

    with _compiling:
        CUDACodeLibrary._reduce_states = reduce_states
        try:
            yield
        finally:
            CUDACodeLibrary._reduce_states = plain


def _named(function, kinds: tuple):
    """The function under a name that no other kinds, sizes or sources have.

    Numba keeps one index for all that has a file, a line and a name, and numbers what it lists: of processes that
    compile at once, one would read what another wrote for other kinds.
    """
    sizes = [x.cell_contents for x in function.__closure__ or () if isinstance(x.cell_contents, int)]
    mark = hashlib.sha256(repr((kinds, sizes, function.__globals__.get(SOURCES))).encode()).hexdigest()[:16]
    named = FunctionType(function.__code__, function.__globals__, function.__name__, None, function.__closure__)
    named.__qualname__ = f"{function.__qualname__}.{mark}"
    return named


def _kind(x):
    """int; the length of a tuple of ints; the dtype of a number; the dtype and axes of an array."""
    if isinstance(x, int):
        return int
    if isinstance(x, tuple):
        return len(x)
    return x.dtype if isinstance(x, np.floating) else (x.dtype, x.ndim)


def _handed(x):
    """An argument as Numba is to get it: where strides are negative, CuPy 14.2's DLPack is wrong (cupy#10172)."""
    if min(getattr(x, "strides", ()), default=0) < 0:
        return cuda.as_cuda_array(x, sync=False)
    return x


@lru_cache(maxsize=1024)
def _configured(compiled, grid, threads: int, stream: int):
    """A compiled kernel with its grid, block and stream."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Grid size")  # numba-cuda's advice to launch more blocks
        return compiled[grid, threads, cuda.external_stream(stream)]
