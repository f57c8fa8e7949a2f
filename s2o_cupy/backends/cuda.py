"""The CUDA backend: what each stage launches. No call here waits for the device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cupy as cp
import numpy as np

from s2o_cupy import specialisations as kernels
from s2o_cupy.compile import device_target, get_kernel
from s2o_cupy.problem import Problem, Slab
from s2o_cupy.sources import Source, current
from s2o_cupy.specialisations import shared_limit

# Keys of the longest history from which ranking pays (docs/kernels.md: between N=4096 and 8192 on an H100).
RANKING_PAYS_FROM = 4096
PART_KEYS = 4096  # of a list, that one block sums up for the mixture rank; a multiple of 64
SCORE_BYTES = 2**28  # a slab's scores, counted at 4 bytes each; 16-bit inputs keep 2
_LOG2_E = 1.4426950408889634
_HALVES = ("float16", "bfloat16")


@dataclass(frozen=True)
class Scores:
    """Stage 1's answer for a slab: scores of all lists end to end, head by head, from `starts` on."""

    data: cp.ndarray
    starts: cp.ndarray
    history: cp.ndarray
    longest: int


def score(problem: Problem, q, k, slab: Slab) -> Scores:
    """Stage 1 for the slab's lists."""
    p, halves = problem, problem.dtype in _HALVES
    if p.settings.rank == "mixture":
        return _score_mixture(p, q, k, slab)
    q, k = _rows(q), _rows(k)
    heads, segments = (slab.kv_stop - slab.kv_start) * p.orders, slab.segments
    lists, terms = heads * segments, p.terms
    full = terms > 0 and (p.settings.rank_terms is None or terms > 63)
    if full and terms < p.dim_qk:
        raise ValueError(f"rank_terms is {p.settings.rank_terms}; the CUDA backend supports 1 to 63, or None")
    width = kernels.rank_width(p.dim_qk) if halves else p.dim_qk
    per_list = width if full else next(n for n in (1, 8, 16, 32, 64) if 1 + terms <= n) if halves else 1 + terms
    history, starts, total, longest = _lists_on(
        cp.cuda.runtime.getDevice(), _geometry(p), slab.segment_start, slab.segment_stop
    )

    totals, counts = cp.empty((lists, width), np.float32), cp.empty(lists, np.int32)
    moment = cp.empty((lists, width, width), np.float32) if terms else None
    members, order_start = p.group // p.orders, slab.kv_start * p.orders
    sizes = (p.heads_order, members, order_start, p.n_q, p.dim_qk, p.settings.segment, slab.segment_start)
    arguments = (q, *_strides(q), *([np.int32(_aligned(q))] if halves else []), totals, counts, moment)
    arguments = (*map(_pointer, arguments), *map(np.int32, sizes))
    if halves:
        grid, block = (segments, heads, max(width // 128, 1) if terms else 1), 2 * min(width, 128)
        kernel, _ = _kernel("moments", p.dtype, entry=f"moments_{width}")
        kernel(grid, (block,), arguments, shared_mem=kernels.moments_shared_bytes(width))
    else:
        grid = (segments, heads, (-(-width // 32)) ** 2 if terms else 1)
        _kernel("score_simt", p.dtype, entry="moments")[0](grid, (256,), arguments)

    hopper = halves and device_target() == "sm_90a" and width <= 128 and per_list > 1 and not full
    head_rows = -(-segments * per_list // 64) * 64 if hopper else segments * per_list
    rows = cp.empty((heads, head_rows, width), np.uint16 if halves else p.dtype)
    mean = cp.empty((lists, width), np.float32) if full else None
    room = shared_limit(device_target())
    staged = (
        halves and terms > 0 and not full and 2 * kernels.factor_shared_bytes(width, terms, full, True) + 4096 <= room
    )
    shared = kernels.factor_shared_bytes(width, terms, full, staged)
    if shared > room:
        raise ValueError(f"rank_terms is {terms} at head dim {p.dim_qk}, which needs {shared} bytes of shared memory")
    sizes = (width, p.dim_qk, terms, per_list, not halves, full, segments if hopper else 0, staged)
    arguments = (*map(_pointer, (totals, counts, moment, rows, mean)), *map(np.int32, sizes), np.float32(p.scale))
    kernel, _ = _kernel("moments" if halves else "score_simt", p.dtype, entry="factor")
    kernel((lists,), (256,), arguments, shared_mem=shared)

    scores = cp.empty(heads * total, np.float16 if halves else np.float32)
    if not longest:
        return Scores(scores, starts, history, longest)
    keys = (k, *_strides(k), *([np.int32(_aligned(k))] if halves else []), rows)
    lengths, mean = (history, starts, scores), _pointer(mean)
    if not halves:
        kernel, _ = _kernel("score_simt", p.dtype, entry="score")
        sizes = (p.heads_kv, slab.kv_start, p.dim_qk, segments, per_list, p.orders)
        shared = (32 * (p.dim_qk + 1) + 256) * np.dtype(p.dtype).itemsize
        grid = (-(-longest // 32), segments, heads)
        kernel(grid, (256,), (*keys, mean, *lengths, *map(np.int32, sizes)), shared_mem=shared)
        return Scores(scores, starts, history, longest)
    sizes = tuple(map(np.int32, (p.heads_kv, slab.kv_start, p.n_k, p.dim_qk, segments)))
    if hopper:
        kernel, _ = _kernel("score_sm90", p.dtype, entry=f"score_{per_list}_{width}")
        grid = (-(-longest // 128), p.orders, heads // p.orders)
        kernel(grid, (288,), (*keys, *lengths, *sizes), shared_mem=kernels.score_sm90_shared_bytes(width))
    else:
        kernel, macros = _kernel("score", p.dtype, p.dim_qk, "score_full" if full else f"score_{per_list}")
        block = 32 * macros["WARPS"]
        grid = (-(-longest // block), p.orders, heads // p.orders)
        kernel(grid, (block,), (*keys, mean, *lengths, *sizes), shared_mem=kernels.score_shared_bytes(macros))
    return Scores(scores, starts, history, longest)


def _score_mixture(p: Problem, q, k, slab: Slab) -> Scores:
    """`score` for the mixture rank: centres, their sums over the history, scores."""
    q, k, halves = _rows(q), _rows(k), p.dtype in _HALVES
    heads, segments = (slab.kv_stop - slab.kv_start) * p.orders, slab.segments
    lists, width = heads * segments, kernels.rank_width(p.dim_qk) if halves else p.dim_qk
    per_list = p.terms if not halves else 32 if p.terms <= 32 else -(-p.terms // 64) * 64
    history, starts, total, longest = _lists_on(
        cp.cuda.runtime.getDevice(), _geometry(p), slab.segment_start, slab.segment_stop
    )
    scores = cp.empty(heads * total, np.float16 if halves else np.float32)
    if not longest:
        return Scores(scores, starts, history, longest)

    hopper = halves and device_target() == "sm_90a" and width <= 128
    head_rows = -(-segments * per_list // 64) * 64 if hopper else segments * per_list
    rows = cp.empty((heads, head_rows, width), np.uint16 if halves else p.dtype)
    variance = cp.empty((lists, width), rows.dtype)
    offset = cp.empty((heads, head_rows), p.compute_dtype)
    members, order_start, real = p.group // p.orders, slab.kv_start * p.orders, p.compute_dtype.type
    capacity = members * min(p.settings.segment, p.n_q)
    arrays = (q, *_strides(q), rows, offset, variance, cp.empty((lists, 2, capacity), np.int32))
    sizes = (p.heads_order, members, order_start, p.n_q, p.dim_qk, p.settings.segment, slab.segment_start)
    sizes = (*sizes, width, p.terms, per_list, capacity, hopper)
    kernel, _ = _kernel("moments" if halves else "score_simt", p.dtype, entry="centres")
    kernel((segments, heads), (256,), (*arrays, *map(np.int32, sizes), real(p.scale)))

    unit = real(p.scale * _LOG2_E)
    if not halves:
        sizes = tuple(map(np.int32, (p.heads_kv, slab.kv_start, p.dim_qk, segments, per_list, p.orders)))
        shared = (32 * (p.dim_qk + 1) + 512) * p.compute_dtype.itemsize
        arrays = (k, *_strides(k), rows, variance, offset, history)
        kernel, _ = _kernel("score_simt", p.dtype, entry="normalise")
        kernel((segments, heads, -(-per_list // 32)), (256,), (*arrays, *sizes, unit), shared_mem=shared)
        kernel, _ = _kernel("score_simt", p.dtype, entry="score_mixture")
        grid = (-(-longest // 32), segments, heads)
        kernel(grid, (256,), (*arrays, starts, scores, *sizes, unit), shared_mem=shared)
        return Scores(scores, starts, history, longest)

    keys, lengths = (k, *_strides(k), np.int32(_aligned(k))), (history, starts, scores)
    sizes = tuple(map(np.int32, (p.heads_kv, slab.kv_start, p.n_k, p.dim_qk, segments)))
    kernel, macros = _kernel("score", p.dtype, p.dim_qk, "score_square")
    block, shared, kv_heads = 32 * macros["WARPS"], kernels.score_shared_bytes(macros), heads // p.orders
    grid = (-(-longest // block), p.orders, kv_heads)
    kernel(grid, (block,), (*keys, variance, _pointer(None), *lengths, *sizes), shared_mem=shared)

    last, parts, part_keys = (np.int32(per_list), unit), -(-longest // PART_KEYS), np.int32(PART_KEYS)
    partial = cp.empty((heads, parts, head_rows, 2), np.float32)
    if hopper:
        chunks, block, threads, shared = -(-longest // 64), 128, 288, kernels.score_sm90_shared_bytes(width)
        tiles = cp.empty((kv_heads, chunks, 64, width), np.uint16)
        kernel, _ = _kernel("score_sm90", p.dtype, entry="tile_keys")
        kernel((chunks, kv_heads), (256,), (*keys, tiles, *sizes[:4], np.int32(width)))
        kernel, _ = _kernel("score_sm90", p.dtype, entry=f"normalise_{width}")
        arguments = (tiles, rows, partial, *lengths, np.int32(chunks), sizes[4], *last, part_keys)
        final, _ = _kernel("score_sm90", p.dtype, entry=f"score_mixture_{width}")
    else:
        threads = block
        kernel, _ = _kernel("score", p.dtype, p.dim_qk, "normalise")
        arguments = (*keys, rows, partial, *lengths, *sizes, *last, part_keys)
        final, _ = _kernel("score", p.dtype, p.dim_qk, "score_mixture")
    row_tiles = -(-head_rows // block)
    kernel((row_tiles * parts, p.orders, kv_heads), (threads,), arguments, shared_mem=shared)
    kernel, _ = _kernel("score", p.dtype, p.dim_qk, "join_parts")
    counts = (np.int32(parts), np.int32(segments), np.int32(per_list), np.int32(head_rows), part_keys)
    kernel((-(-segments * per_list // 256), heads), (256,), (partial, offset, history, *counts))
    grid = (-(-longest // block), p.orders, kv_heads)
    final(grid, (threads,), (*keys, rows, offset, *lengths, *sizes, *last), shared_mem=shared)
    return Scores(scores, starts, history, longest)


def remap(problem: Problem, scores: Scores, slab: Slab, kv_offsets, kv_order) -> None:
    """Stage 2: writes each list of the slab at its offset, the listed keys by descending score."""
    if not scores.longest:
        return
    levels, segments, heads = problem.settings.rank_levels or 0, slab.segments, kv_offsets.shape[0]
    lists = (scores.data, scores.starts, scores.history, kv_offsets, _stride(kv_offsets), kv_order)
    fit = kernels.remap_fit(levels, scores.longest, device_target())
    if fit is not None:
        warps, window, planes, shared = fit
        kernel, _ = _kernel("remap", problem.dtype)
        arguments = (*lists, *map(_int, (segments, levels, window, planes)))
    else:
        bins, warps, passes = 256, 16, -(-(levels + 1).bit_length() // 8) if levels else 4
        kernel, _ = _kernel("remap", problem.dtype, entry="remap_digits")
        scratch, shared = cp.empty(2 * scores.data.size, np.int32), 4 * warps * bins
        arguments = (*lists, scratch, *map(_int, (segments, levels, bins, passes)))
    kernel((segments, heads), (32 * warps,), tuple(arguments), shared_mem=shared)


def pool(problem: Problem, k, v):
    """Means of K and V over pool blocks, (B * Hkv, blocks, dim padded to 8), the inputs' dtype; None without a tail."""
    if problem.settings.tail is None or not problem.pool_blocks:
        return None
    kernel, _ = _kernel("pool", problem.dtype)
    means = []
    for x in (k, v):
        x, dim = _rows(x), x.shape[3]
        row, heads = -(-dim // 8) * 8, problem.batch * problem.heads_kv
        mean = cp.empty((heads, problem.pool_blocks, row), x.dtype)
        sizes = (problem.heads_kv, problem.n_k, dim, row, problem.pool_blocks, problem.settings.pool)
        kernel((problem.pool_blocks, heads), (256,), (x, *_strides(x), mean, *map(_int, sizes)))
        means.append(mean)
    return tuple(means)


def attend(problem: Problem, q, k, v, slab: Slab, kv_order, kv_offsets, query_order, pooled, result) -> None:
    """Stage 3 for the slab's heads and segments: fills out, lse, tiles, tail_blocks and tail_mass."""
    _launch(problem, q, k, v, slab, result, kv_order, kv_offsets, query_order, pooled)


def dense(problem: Problem, q, k, v, result) -> None:
    """Exact attention, the same walk with no history: fills out and lse."""
    _launch(problem, q, k, v, None, result)


def _launch(problem, q, k, v, slab, result, kv_order=None, kv_offsets=None, query_order=None, pooled=None):
    walk = slab is not None
    blocks = problem.pool_blocks if pooled is not None else 0
    q, k, v, out = _rows(q), _rows(k), _rows(v), _rows(result.out)
    aligned = sum(_aligned(x) << bit for bit, x in enumerate((q, k, v, out)))
    names = ("attend", "attend_sm90") if problem.dtype in _HALVES else ("attend_simt",)
    sources, device = tuple(map(current, names)), cp.cuda.runtime.getDevice()
    launch = _attend_launch(device, sources, problem, slab, blocks, aligned == 15)
    if launch is None:
        return
    kernel, grid, threads, shared, tau, sizes, draws = launch
    taus = _taus(problem.settings.tau) if walk and isinstance(problem.settings.tau, tuple) else None
    stats = (result.tiles, result.tail_blocks, result.tail_mass) if walk else (None, None, None)
    order = (kv_order, kv_offsets, _stride(kv_offsets)) if walk else (None, None, _integer(0))
    pools = (*pooled, pooled[0].shape[1], pooled[0].shape[2], pooled[1].shape[2]) if blocks else (None, None, 0, 0, 0)
    arguments = []
    for x in (q, k, v, out):
        arguments += [x, *_strides(x)]
    arguments += [_int(aligned), *pools[:2], *map(_int, pools[2:]), *order, query_order, taus, tau]
    arguments += [result.lse, *stats, *sizes]
    if draws:
        arguments.append(cp.zeros(1, np.int32))
    kernel(grid, (threads,), tuple(map(_pointer, arguments)), shared_mem=shared)
    if out is not result.out:
        result.out[...] = out


@functools.lru_cache(maxsize=1024)
def _attend_launch(device: int, sources: tuple[Source, ...], p: Problem, slab: Slab | None, blocks: int, aligned: bool):
    """What stage 3 launches for a slab (None: dense), apart from arrays: kernel, grid, threads, shared bytes, scalars,
    and whether its blocks draw row tiles from a counter. `aligned`: all rows start on 16 bytes.

    None where there is nothing to do.
    """
    s, arch, walk = p.settings, device_target(device), slab is not None
    if not walk:
        slab = p.whole
        block_q = _dense_block_q(arch, p.dtype, p.dim_qk, p.dim_v)
        segment, tiles_per_segment = p.n_q, -(-p.n_q // block_q)
        row_tiles = tiles_per_segment
        tile_start, tile_stop = 0, row_tiles
    else:
        segment, block_q, tiles_per_segment = s.segment, s.block_q, p.tiles_per_segment
        whole = p.segments - 1
        row_tiles = whole * tiles_per_segment + -(-(p.n_q - whole * segment) // block_q)
        tile_start = slab.segment_start * tiles_per_segment
        tile_stop = min(slab.segment_stop * tiles_per_segment, row_tiles)
    grid = ((tile_stop - tile_start) * p.group, slab.kv_stop - slab.kv_start)
    if not grid[0] or not grid[1]:
        return None
    if block_q > 128:
        raise ValueError(f"block_q is {block_q}; the CUDA backend supports 1 to 128")
    served = aligned and kernels.sm90_serves(arch, p.dtype, p.dim_qk, p.dim_v, block_q, s.pool)
    if served:
        kernel, macros = _kernel_on(device, sources[1], p.dtype, p.dim_qk, None, p.dim_v, s.block_k if walk else 128)
        shared, threads = kernels.sm90_shared_bytes(macros, blocks), 384
        served = shared <= shared_limit(arch)
    if not served and p.dtype in _HALVES:
        kernel, macros = _kernel_on(device, sources[0], p.dtype, p.dim_qk, None, p.dim_v, block_q)
        shared, threads = kernels.attend_shared_bytes(macros, blocks), kernels.attend_threads(macros)
    elif not served:
        kernel, macros = _kernel_on(device, sources[0], p.dtype, None, None, p.dim_v, None)
        shared, threads = kernels.simt_shared_bytes(macros, blocks), 256
    if shared > shared_limit(arch) - (0 if served else 1024):
        raise ValueError(f"{blocks} pool blocks need {shared} bytes of shared memory; choose a pool above {s.pool}")
    sizes = (p.heads_q, p.heads_kv, p.orders, slab.kv_start, p.n_q, p.n_k, p.dim_qk, p.dim_v)
    shape = (s.causal, p.window, segment, slab.segment_start, tiles_per_segment, tile_start, tile_stop, row_tiles)
    steps = (block_q, s.block_k, s.pool.bit_length() - 1)
    scalars = (*map(np.int32, (*sizes, *shape, *steps)), p.compute_dtype.type(p.scale * _LOG2_E))
    tau = np.float32(s.tau if walk and not isinstance(s.tau, tuple) else 0)
    if served:  # blocks stay, and draw row tiles by a counter
        scalars = (*scalars, np.int32(grid[1]))
        grid = (min(grid[0] * grid[1], _processors(device)),)
    return kernel, grid, threads, shared, tau, scalars, served


@functools.cache
def _processors(device: int) -> int:
    return cp.cuda.runtime.getDeviceProperties(device)["multiProcessorCount"]


@functools.lru_cache(maxsize=4096)
def _int(x: int):
    return np.int32(x)


@functools.lru_cache(maxsize=4096)
def _integer(x: int):
    return np.int64(x)


def _stride(offsets):
    """From one head's offsets to the next's."""
    return _integer(offsets.strides[0] // 8)


def _kernel(name: str, dtype: str, dim=None, entry: str | None = None, dim_v=None, block=None):
    """A kernel on the current device, and its macros."""
    return _kernel_on(cp.cuda.runtime.getDevice(), current(name), dtype, dim, entry, dim_v, block)


@functools.lru_cache(maxsize=512)
def _kernel_on(device: int, source: Source, dtype: str, dim, entry, dim_v, block):
    arch, name = device_target(device), source.name
    macros = source.applied(kernels.launch_macros(name, dtype, dim, dim_v, block, arch))
    return get_kernel(name, entry, source, **macros), macros


@functools.lru_cache(maxsize=256)
def _dense_block_q(arch: str, dtype: str, dim_qk: int, dim_v: int) -> int:
    return kernels.largest_block_q(dtype, dim_qk, dim_v, arch) if dtype in _HALVES else 128


def _geometry(p: Problem) -> tuple:
    return p.settings.causal, p.settings.segment, p.settings.pool, p.n_q, p.n_k


@functools.lru_cache(maxsize=1024)
def _lists_on(device: int, geometry: tuple, segment_start: int, segment_stop: int):
    """Histories and score starts of a run of segments, on the device; a head's scores, and the longest history."""
    causal, segment, pool_size, n_q, n_k = geometry
    first = np.arange(segment_start, segment_stop, dtype=np.int64) * segment + n_k - n_q
    history = first // pool_size * pool_size if causal else np.full(len(first), n_k, np.int64)
    starts = np.concatenate([[0], np.cumsum(-(-history // 64) * 64)]).astype(np.int64)
    kept = cp.asarray(history.astype(np.int32)), cp.asarray(starts)
    cp.cuda.get_current_stream().synchronize()  # other streams will read them
    return *kept, int(starts[-1]), int(history.max(initial=0))


_NULL = np.intp(0)


def _pointer(x):
    """None is a null pointer."""
    return _NULL if x is None else x


def _rows(x):
    """`x` as the kernels read it: a last axis without gaps, rows less than 2 GiB apart; else a copy of it."""
    gaps = x.shape[3] > 1 and x.strides[3] != x.itemsize
    return cp.ascontiguousarray(x) if gaps or (x.shape[2] > 1 and abs(x.strides[2]) >= 2**31) else x


def _strides(x) -> tuple:
    return _in_elements(x.strides, x.itemsize)


@functools.lru_cache(maxsize=1024)
def _in_elements(strides: tuple, itemsize: int) -> tuple:
    return tuple(np.int64(s // itemsize) for s in strides[:3])


def _aligned(x) -> int:
    """Whether every row starts on 16 bytes."""
    return int(x.data.ptr % 16 == 0 and _rows_aligned(x.strides, x.shape))


@functools.lru_cache(maxsize=1024)
def _rows_aligned(strides: tuple, shape: tuple) -> bool:
    return all(s % 16 == 0 or n == 1 for s, n in zip(strides[:3], shape[:3]))


@functools.lru_cache(maxsize=1024)
def _taus_on(device: int, taus: tuple):
    kept = cp.asarray(taus, np.float32)
    cp.cuda.get_current_stream().synchronize()  # other streams will read it
    return kept


def _taus(taus: tuple):
    return _taus_on(cp.cuda.runtime.getDevice(), taus)
