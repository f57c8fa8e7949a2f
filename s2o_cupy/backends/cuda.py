"""The CUDA backend: what each stage launches. No call waits for the device, but the first of a shape for its uploads.

A stage is recorded on a `Tape` for a problem, a slab and the layout of its arrays, and kept: what a call costs the host
is to find it, take its workspace and launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate

import cupy as cp
import numpy as np

from s2o_cupy import specialisations as kernels
from s2o_cupy.backends._tape import Place, Tape
from s2o_cupy.compile import device_target, get_kernel
from s2o_cupy.problem import Problem, Slab
from s2o_cupy.settings import MAX_SCALE, MOST_LIFT
from s2o_cupy.sources import current, version
from s2o_cupy.specialisations import shared_limit

# Keys of the longest history from which ranking pays (docs/kernels.md: between N=4096 and 8192 on an H100).
RANKING_PAYS_FROM = 4096
NEEDS_STATS = False  # lse, tiles, tail_blocks and tail_mass may be None
PART_KEYS = 4096  # of a list, that one block sums up for the mixture rank; a multiple of 64
SCORE_BYTES = 2**28 + 2**24  # a part's scores, counted at 4 bytes each; 16-bit inputs keep 2
ROW_BYTES = 2**26  # representatives that one launch makes
_LOG2_E = 1.4426950408889634
_HALVES = ("float16", "bfloat16")


@dataclass(frozen=True)
class Scores:
    """Stage 1's answer for a slab: scores of all lists end to end, head by head, from `starts` on."""

    data: cp.ndarray
    starts: cp.ndarray
    history: cp.ndarray
    longest: int


@dataclass(frozen=True)
class Rows:
    """Representatives of a slab's lists: `per_list` rows of `width`, `head_rows` of them an order head.

    mean: with the full covariance alone; step: segments, multiples of which from the slab's first a part may start at.
    """

    slab: Slab
    data: Place
    mean: Place | None
    per_list: int
    head_rows: int
    width: int
    step: int

    def of(self, p: Problem, part: Slab) -> Place:
        """Where those of a part start."""
        row = (part.kv_start - self.slab.kv_start) * p.orders * self.head_rows
        row += (part.segment_start - self.slab.segment_start) * self.per_list
        return replace(self.data, offset=self.data.offset + row * self.width * np.dtype(_type(p)).itemsize)


def ranked(problem: Problem, q, k, v, query_order, result, workspace: int, progress=None) -> None:
    """All stages, as many lists at a time as `workspace` holds; `progress` is called with those done."""
    stats = (result.lse, result.tiles, result.tail_blocks, result.tail_mass)
    done = progress and [*accumulate(slab.size for slab in problem.split(problem.whole, workspace, "listed"))]
    after = progress and (lambda step: progress(done[step]))
    _run(_ranked, problem, None, (q, k, v, result.out), (query_order, *stats), workspace, after=after)


def rank(problem: Problem, q, k, slab: Slab, kv_offsets, kv_order) -> None:
    """Stages 1 and 2 for the slab's lists, a part of bounded score memory at a time."""
    _run(_rank, problem, slab, (q, k, kv_offsets, kv_order), ())


def score(problem: Problem, q, k, slab: Slab) -> Scores:
    """Stage 1 for the slab's lists."""
    history, starts, _, longest = _lists(problem, slab)
    data = cp.empty(_score_count(problem, slab), _score_type(problem))
    if longest:
        _run(_score, problem, slab, (q, k), (data,))
    return Scores(data, starts, history, longest)


def remap(problem: Problem, scores: Scores, slab: Slab, kv_offsets, kv_order) -> None:
    """Stage 2: writes each list of the slab at its offset, the listed keys by descending score."""
    if scores.longest:
        arrays = (scores.data, scores.starts, scores.history, kv_order)
        _run(_remap, problem, slab, (kv_offsets,), arrays, scores.longest, scores.data.size)


def pool(problem: Problem, k, v):
    """Means of K and V over pool blocks, (B * Hkv, blocks, dim padded to 8), the inputs' dtype; None without a tail.

    With tail "spread" also the running sums over blocks of K's squared departures from them, (B * Hkv, blocks, D).
    """
    made = _pooled(problem, cp.empty, k.dtype)
    if not made:
        return None
    _run(_pool, problem, None, (k, v), _three(made))
    return made


def attend(problem: Problem, q, k, v, slab: Slab, kv_order, kv_offsets, query_order, pooled, result) -> None:
    """Stage 3 for the slab's heads and segments: fills out, lse, tiles, tail_blocks and tail_mass."""
    stats = (result.tiles, result.tail_blocks, result.tail_mass)
    plain = (kv_order, query_order, *_three(pooled or ()), result.lse, *stats)
    _run(_attend, problem, slab, (q, k, v, result.out, kv_offsets), plain)


def dense(problem: Problem, q, k, v, result) -> None:
    """Exact attention, the same walk with no history: fills out and lse."""
    _run(_attend, problem, None, (q, k, v, result.out, None), (*(None,) * 5, result.lse, *(None,) * 3))


# --- recorded stages ------------------------------------------------------------------------------
def _run(stage, p: Problem, slab: Slab | None, strided, plain, *numbers, after=None) -> None:
    """Launch a stage on arrays of any strides and on contiguous ones; None among them is a null pointer."""
    device, stream = cp.cuda.runtime.getDevice(), cp.cuda.get_current_stream().ptr
    addresses = [0 if x is None else x.data.ptr for x in strided + plain]
    layouts = tuple(
        [None if x is None else (x.shape, x.strides, x.itemsize, at % 16) for x, at in zip(strided, addresses)]
    )
    given = tuple([x is not None for x in plain])
    tape = _recorded(stage, device, version(), p, slab, layouts, given, *numbers)
    memory, rooms = workspace(tape, stream)
    cp.cuda.runtime.setDevice(device)  # in a thread's first call this makes the device's context its own
    tape.run(stream, addresses + rooms, after)
    del memory  # not before: the pool may give it to another thread


@functools.lru_cache(maxsize=1024)
def _recorded(stage, device: int, sources, p: Problem, slab: Slab | None, layouts, given, *numbers) -> Tape:
    """The launches of a stage; `sources`: the kernels as they are now."""
    tape = Tape(len(layouts) + len(given))
    places = [layout and Place.of(i, 0, *layout) for i, layout in enumerate(layouts)]
    places += [Place(i) if there else None for i, there in enumerate(given, len(layouts))]
    stage(tape, p, slab, *places, *numbers)
    tape.pack(_built)
    return tape


def workspace(tape: Tape, stream: int):
    """Memory for a run, and where each room starts in it."""
    if not tape.nbytes:
        return None, []
    memory = cp.cuda.alloc(tape.nbytes)
    if tape.zeroed:
        cp.cuda.runtime.memsetAsync(memory.ptr, 0, tape.zeroed, stream)
    return memory, [memory.ptr + offset for offset in tape.offsets]


def _kept(tape: Tape, x) -> Place:
    """A host array on the device, for as long as the tape."""
    kept = cp.asarray(x)
    cp.cuda.get_current_stream().synchronize()  # other streams will read it
    return tape.keep(kept)


def _ranked(tape: Tape, p: Problem, _, q, k, v, out, query_order, lse, tiles, tail_blocks, tail_mass, nbytes) -> None:
    pooled = _three(_pooled(p, tape.room, _type(p)))
    if pooled[0]:
        _pool(tape, p, None, k, v, *pooled)
    slabs = p.split(p.whole, nbytes, "listed")
    all_rows = _rows_at_once(tape, p, p.whole, q) if slabs[0].segments == p.segments else None
    before = tape.top
    for slab in slabs:
        rows, offsets = all_rows or _rows_at_once(tape, p, slab, q), p.offsets(slab)
        parts = p.split(slab, SCORE_BYTES, "history", rows.step if rows else 1)
        order, behind = -(-4 * int(offsets[-1, -1]) // 256) * 256, max(_score_bytes(p, part) for part in parts)
        kv_offsets, start = _kept(tape, offsets), tape.top
        kv_order = tape.room((order + behind) // 4, np.int32)
        _rank(tape, p, slab, q, k, kv_offsets, kv_order, order + behind, rows)
        tape.top = start + order  # what was behind it is free again
        stats = (lse, tiles, tail_blocks, tail_mass)
        _attend(tape, p, slab, q, k, v, out, kv_offsets, kv_order, query_order, *pooled, *stats)
        tape.end_step()
        tape.top = before


def _rank(tape: Tape, p: Problem, slab: Slab, q, k, kv_offsets, kv_order, nbytes: int = 0, rows: Rows | None = None):
    """`nbytes`: of the order and of what lies behind it, where that is for scores; `rows`: made already."""
    rows = rows or _rows_at_once(tape, p, slab, q)
    for part, offsets, start in _parts(p, slab, kv_offsets, kv_order, nbytes, rows):
        history, starts, _, longest = _lists(p, part)
        size, before = _score_count(p, part), tape.top
        if longest:
            own = start is None
            scores = tape.room(size, _score_type(p)) if own else replace(kv_order, offset=kv_order.offset + start)
            ranges, after = _ranges(tape, p, part, longest), tape.top
            _score(tape, p, part, q, k, scores, ranges, rows)
            tape.top = after
            lists = scores, tape.keep(starts), tape.keep(history)
            _remap(tape, p, part, offsets, *lists, kv_order, longest, size, ranges)
            tape.top = before


def _parts(p: Problem, slab: Slab, kv_offsets, kv_order: Place, nbytes: int, rows: Rows | None):
    """Parts of a slab, their offsets, and where in the order's memory their scores start; None: elsewhere.

    Launches of long lists end with idle multiprocessors, so parts are great where they cost nothing: where scores fit
    between what they and earlier heads fill of the order and its end. What is left goes SCORE_BYTES at a time.
    """
    heads, segments, done = slab.kv_stop - slab.kv_start, slice(0, slab.segments + 1), 0
    listed, counted = (
        4 * p.orders * int(x[slab.segment_start : slab.segment_stop].sum()) for x in (p.listed, p.history)
    )
    scores, end = _score_bytes(p, slab) // max(heads, 1), (nbytes or heads * listed) // 128 * 128  # as scores are
    while rows and kv_order.aligned and _no_scratch(p):
        more = min(heads - done, (end - done * listed) // max(listed + scores, 1))
        if more * counted <= SCORE_BYTES:
            break
        part = replace(slab, kv_start=slab.kv_start + done, kv_stop=slab.kv_start + done + more)
        yield part, kv_offsets[p.orders * done : p.orders * (done + more), segments], end - more * scores
        done += more
    left = kv_offsets[p.orders * done : p.orders * heads, segments]
    rest = replace(slab, kv_start=slab.kv_start + done)
    for part, offsets in p.parts(rest, SCORE_BYTES, left, rows.step if rows else 1):
        start = end - _score_bytes(p, part)
        yield part, offsets, start if start >= heads * listed else None


def _no_scratch(p: Problem) -> bool:
    """Whether remap needs no memory beside scores and order."""
    levels, listed = p.settings.rank_levels or 0, int(p.listed.max(initial=0))
    return kernels.remap_fit(levels, p.longest, listed, device_target()) is not None


def _rows_at_once(tape: Tape, p: Problem, slab: Slab, q) -> Rows | None:
    """Representatives of all of a slab's lists, where one kernel makes them without scratch; None: by part."""
    width = kernels.rank_width(p.dim_qk)
    if p.settings.rank == "mixture" or p.dtype not in _HALVES or (p.terms and not _one_block(p, width)):
        return None
    heads, head_rows, step, _ = _row_sizes(p, slab)
    run = p.history[slab.segment_start : slab.segment_stop][-step:]  # no part is less than such a run of a K/V head
    fits = 2 * heads * head_rows * width <= ROW_BYTES and 0 < 4 * p.orders * int(run.sum()) <= SCORE_BYTES
    return _representatives(tape, p, slab, q) if fits and heads < 2**16 else None


def _row_sizes(p: Problem, slab: Slab) -> tuple[int, int, int, int]:
    """Of a slab's representatives: order heads, rows of one, `step` as in `Rows`, rows of a list."""
    heads, halves, terms = (slab.kv_stop - slab.kv_start) * p.orders, p.dtype in _HALVES, p.terms
    if _full(p):
        per_list = kernels.rank_width(p.dim_qk) if halves else p.dim_qk
    else:
        per_list = next(n for n in (1, 8, 16, 32, 64) if 1 + terms <= n) if halves else 1 + terms
    rows = slab.segments * per_list
    if _hopper(p):  # whole chunks of 64
        return heads, -(-rows // 64) * 64, 64 // per_list, per_list
    return heads, rows, slab.segments, per_list


def _hopper(p: Problem) -> bool:
    """Whether score_sm90.cu serves, and representatives lie as tiled.cuh says."""
    return p.dtype in _HALVES and device_target() == "sm_90a" and not _full(p)


def _one_block(p: Problem, width: int) -> bool:
    """Whether a block makes a list's factors of its queries: moment and factors fit its shared memory."""
    room = shared_limit(device_target()) - 2048
    return width <= 128 and not _full(p) and kernels.factors_shared_bytes(width, p.terms) <= room


def _full(p: Problem) -> bool:
    """Whether the whole covariance is wanted."""
    return p.terms > 0 and (p.settings.rank_terms is None or p.terms > 63)


def _ranges(tape: Tape, p: Problem, slab: Slab, longest: int) -> Place | None:
    """Where the scores of mean queries leave the range of each part of a list; None where nothing leaves any."""
    if p.terms or p.dtype not in _HALVES or device_target() != "sm_90a":
        return None
    return tape.room((slab.kv_stop - slab.kv_start) * p.orders * slab.segments * -(-longest // PART_KEYS), np.uint32)


def _representatives(tape: Tape, p: Problem, slab: Slab, q) -> Rows:
    """The rows of each list whose products with a key make its score."""
    halves, terms, full = p.dtype in _HALVES, p.terms, _full(p)
    if full and terms < p.dim_qk:
        raise ValueError(f"rank_terms is {p.settings.rank_terms}; the CUDA backend supports 1 to 63, or None")
    width, segments = kernels.rank_width(p.dim_qk) if halves else p.dim_qk, slab.segments
    heads, head_rows, step, per_list = _row_sizes(p, slab)
    lists, rows = heads * segments, tape.room((heads, head_rows, width), _type(p))
    members, order_start = p.group // p.orders, slab.kv_start * p.orders
    sizes = (p.heads_order, members, order_start, p.n_q, p.dim_qk, p.settings.segment, slab.segment_start)
    queries = (q, *q.strides, *([np.int32(q.aligned)] if halves else []))
    room, tiled, mean = shared_limit(device_target()) - 2048, segments if _hopper(p) else 0, None
    if halves and not terms:
        kernel, _ = _kernel("moments", p.dtype, entry=f"means_{width}")
        arguments = (*queries, rows, *map(np.int32, (*sizes, tiled)), np.float32(p.scale))
        tape.launch(kernel, (segments, heads), 256, arguments)
    elif halves and _one_block(p, width):
        kernel, _ = _kernel("moments", p.dtype, entry=f"factors_{width}")
        arguments = (*queries, rows, *map(np.int32, (*sizes, terms, per_list, tiled)), np.float32(p.scale))
        tape.launch(kernel, (segments, heads), 2 * width, arguments, kernels.factors_shared_bytes(width, terms))
    else:
        shared = kernels.factor_shared_bytes(width, terms, full)
        if shared > room:
            raise ValueError(
                f"rank_terms is {terms} at head dim {p.dim_qk}, which needs {shared} bytes of shared memory"
            )
        totals, counts = tape.room((lists, width), np.float32), tape.room(lists, np.int32)
        moment = tape.room((lists, width, width), np.float32) if terms else None
        mean = tape.room((lists, width), np.float32) if full else None
        arguments = (*queries, totals, counts, moment, *map(np.int32, sizes))
        if halves:
            grid, block = (segments * (2 if width == 256 else 1), heads), 2 * min(width, 128)
            kernel, _ = _kernel("moments", p.dtype, entry=f"moments_{width}")
            tape.launch(kernel, grid, block, arguments, kernels.moments_shared_bytes(width))
        else:
            grid = (segments, heads, (-(-width // 32)) ** 2 if terms else 1)
            tape.launch(_kernel("score_simt", p.dtype, entry="moments")[0], grid, 256, arguments)
        sizes = (width, p.dim_qk, terms, per_list, not halves, full, tiled)
        arguments = (totals, counts, moment, rows, mean, *map(np.int32, sizes), np.float32(p.scale))
        kernel, _ = _kernel("moments" if halves else "score_simt", p.dtype, entry="factor")
        tape.launch(kernel, (lists,), 512, arguments, shared)
    return Rows(slab, rows, mean, per_list, head_rows, width, step)


def _score(tape: Tape, p: Problem, slab: Slab, q, k, scores, ranges=None, rows: Rows | None = None) -> None:
    """`rows`: those of a slab that holds this one, made already."""
    if p.settings.rank == "mixture":
        return _score_mixture(tape, p, slab, q, k, scores)
    rows = rows or _representatives(tape, p, slab, q)
    mean, per_list, width = rows.mean, rows.per_list, rows.width
    halves, full = p.dtype in _HALVES, _full(p)
    heads, segments = (slab.kv_stop - slab.kv_start) * p.orders, slab.segments
    history, starts, _, longest = _lists(p, slab)
    keys = (k, *k.strides, *([np.int32(k.aligned)] if halves else []), rows.of(p, slab))
    lengths = tape.keep(history), tape.keep(starts), scores
    if not halves:
        kernel, _ = _kernel("score_simt", p.dtype, entry="score")
        sizes = (p.heads_kv, slab.kv_start, p.dim_qk, segments, per_list, p.orders)
        shared = (32 * (p.dim_qk + 1) + 256) * np.dtype(p.dtype).itemsize
        grid = (-(-longest // 32), segments, heads)
        tape.launch(kernel, grid, 256, (*keys, mean, *lengths, *map(np.int32, sizes)), shared)
        return
    sizes = tuple(map(np.int32, (p.heads_kv, slab.kv_start, p.n_k, p.dim_qk, segments)))
    pitch = np.int32(rows.head_rows)
    if _hopper(p) and per_list == 1:
        kernel, macros = _kernel("score_sm90", p.dtype, p.dim_qk, f"score_means_{width}")
        block, shared = macros["TILE_KEYS"], kernels.score_sm90_shared_bytes(macros, width)
        grid = (-(-longest // PART_KEYS), -(-segments // block), heads)
        parts = (ranges or _ranges(tape, p, slab, longest), np.int32(p.orders), np.int32(PART_KEYS))
        tape.launch(kernel, grid, 2 * block + 32, (*keys, *lengths, *sizes, pitch, *parts), shared)
    elif _hopper(p):
        kernel, macros = _kernel("score_sm90", p.dtype, p.dim_qk, f"score_{per_list}_{width}")
        block, shared = macros["TILE_KEYS"], kernels.score_sm90_shared_bytes(macros, width)
        grid = (p.orders, -(-longest // block), heads // p.orders)
        tape.launch(kernel, grid, 2 * block + 32, (*keys, *lengths, *sizes, pitch), shared)
    else:
        kernel, macros = _kernel("score", p.dtype, p.dim_qk, "score_full" if full else f"score_{per_list}")
        block = 32 * macros["WARPS"]
        grid = (-(-longest // block), p.orders, heads // p.orders)
        tape.launch(kernel, grid, block, (*keys, mean, *lengths, *sizes), kernels.score_shared_bytes(macros))


def _score_mixture(tape: Tape, p: Problem, slab: Slab, q, k, scores) -> None:
    """`_score` for the mixture rank: centres, their sums over the history, scores."""
    halves = p.dtype in _HALVES
    heads, segments = (slab.kv_stop - slab.kv_start) * p.orders, slab.segments
    lists, width = heads * segments, kernels.rank_width(p.dim_qk) if halves else p.dim_qk
    per_list = p.terms if not halves else 32 if p.terms <= 32 else -(-p.terms // 64) * 64
    history, starts, _, longest = _lists(p, slab)
    history, starts = tape.keep(history), tape.keep(starts)
    hopper = halves and device_target() == "sm_90a"
    head_rows = -(-segments * per_list // 64) * 64 if hopper else segments * per_list
    kind = _type(p)
    rows, variance = tape.room((heads, head_rows, width), kind), tape.room((lists, width), kind)
    offset = tape.room((heads, head_rows), p.compute_dtype)
    members, order_start, real = p.group // p.orders, slab.kv_start * p.orders, p.compute_dtype.type
    capacity = members * min(p.settings.segment, p.n_q)
    arrays = (q, *q.strides, rows, offset, variance, tape.room((lists, 2, capacity), np.int32))
    sizes = (p.heads_order, members, order_start, p.n_q, p.dim_qk, p.settings.segment, slab.segment_start)
    sizes = (*sizes, width, p.terms, per_list, capacity, hopper)
    kernel, _ = _kernel("moments" if halves else "score_simt", p.dtype, entry="centres")
    block = 256 if p.dtype == "float64" else 512
    tape.launch(kernel, (segments, heads), block, (*arrays, *map(np.int32, sizes), real(p.scale)))

    unit = real(p.scale * _LOG2_E)
    if not halves:
        sizes = tuple(map(np.int32, (p.heads_kv, slab.kv_start, p.dim_qk, segments, per_list, p.orders)))
        shared = (32 * (p.dim_qk + 1) + 512) * p.compute_dtype.itemsize
        arrays = (k, *k.strides, rows, variance, offset, history)
        kernel, _ = _kernel("score_simt", p.dtype, entry="normalise")
        tape.launch(kernel, (segments, heads, -(-per_list // 32)), 256, (*arrays, *sizes, unit), shared)
        kernel, _ = _kernel("score_simt", p.dtype, entry="score_mixture")
        grid = (-(-longest // 32), segments, heads)
        tape.launch(kernel, grid, 256, (*arrays, starts, scores, *sizes, unit), shared)
        return

    keys, lengths = (k, *k.strides, np.int32(k.aligned)), (history, starts, scores)
    sizes = tuple(map(np.int32, (p.heads_kv, slab.kv_start, p.n_k, p.dim_qk, segments)))
    kernel, macros = _kernel("score", p.dtype, p.dim_qk, "score_square")
    block, shared, kv_heads = 32 * macros["WARPS"], kernels.score_shared_bytes(macros), heads // p.orders
    grid = (-(-longest // block), p.orders, kv_heads)
    tape.launch(kernel, grid, block, (*keys, variance, None, *lengths, *sizes), shared)

    last, parts, part_keys = (np.int32(per_list), unit), -(-longest // PART_KEYS), np.int32(PART_KEYS)
    partial = tape.room((heads, parts, head_rows, 2), np.float32)
    if hopper:
        chunks = -(-longest // 64)
        tiles = tape.room((kv_heads, chunks, 64, width), np.uint16)
        kernel, macros = _kernel("score_sm90", p.dtype, p.dim_qk, "tile_keys")
        block, shared = macros["TILE_KEYS"], kernels.score_sm90_shared_bytes(macros, width)
        threads = 2 * block + 32
        tape.launch(kernel, (chunks, kv_heads), 256, (*keys, tiles, *sizes[:4], np.int32(width)))
        kernel, _ = _kernel("score_sm90", p.dtype, p.dim_qk, f"normalise_{width}")
        arguments = (tiles, rows, partial, *lengths, np.int32(chunks), sizes[4], *last, part_keys)
        final, _ = _kernel("score_sm90", p.dtype, p.dim_qk, f"score_mixture_{width}")
    else:
        threads = block
        kernel, _ = _kernel("score", p.dtype, p.dim_qk, "normalise")
        arguments = (*keys, rows, partial, *lengths, *sizes, *last, part_keys)
        final, _ = _kernel("score", p.dtype, p.dim_qk, "score_mixture")
    row_tiles = -(-head_rows // block)
    tape.launch(kernel, (row_tiles * parts, p.orders, kv_heads), threads, arguments, shared)
    kernel, _ = _kernel("score", p.dtype, p.dim_qk, "join_parts")
    counts = (np.int32(parts), np.int32(segments), np.int32(per_list), np.int32(head_rows), part_keys)
    tape.launch(kernel, (-(-segments * per_list // 256), heads), 256, (partial, offset, history, *counts))
    grid = (-(-longest // block), p.orders, kv_heads)
    tape.launch(final, grid, threads, (*keys, rows, offset, *lengths, *sizes, *last), shared)


def _remap(
    tape: Tape, p: Problem, slab: Slab, kv_offsets, scores, starts, history, kv_order, longest, size, ranges=None
) -> None:
    levels, segments, heads = p.settings.rank_levels or 0, slab.segments, (slab.kv_stop - slab.kv_start) * p.orders
    lists = (scores, starts, history, kv_offsets, *kv_offsets.strides, kv_order)
    listed = int(p.listed[slab.segment_start : slab.segment_stop].max())
    fit = kernels.remap_fit(levels, longest, listed, device_target())
    if fit is not None:
        entry, warps, window, planes, shared = fit
        kernel, _ = _kernel("remap", p.dtype, entry=entry)
        arguments = (*lists, *map(np.int32, (segments, levels, window, planes)))
        arguments += (ranges, np.int32(PART_KEYS), np.int32(-(-longest // PART_KEYS)))
    else:
        bins, warps, passes = 256, 16, -(-(levels + 1).bit_length() // 8) if levels else 4
        kernel, _ = _kernel("remap", p.dtype, entry="remap_digits")
        scratch, shared = tape.room(2 * size, np.int32), 4 * warps * bins
        arguments = (*lists, scratch, *map(np.int32, (segments, levels, bins, passes)))
    tape.launch(kernel, (segments, heads), 32 * warps, arguments, shared)


def _pool(tape: Tape, p: Problem, _, k, v, k_mean, v_mean, sums) -> None:
    """Means of K and V, and with the spread tail K's departures from them, by one launch."""
    kernel, _ = _kernel("pool", p.dtype)
    sizes = tuple(map(np.int32, (p.heads_kv, p.n_k, p.dim_qk, p.dim_v, p.pool_blocks, p.settings.pool)))
    grid = (p.pool_blocks, p.batch * p.heads_kv, 3 if sums else 2)
    tape.launch(kernel, grid, 256, (k, *k.strides, k_mean, v, *v.strides, v_mean, sums, *sizes))
    if sums:
        kernel, _ = _kernel("pool", p.dtype, entry="running_sums")
        tape.launch(kernel, (-(-p.dim_qk // 32), grid[1]), 256, (sums, sizes[2], sizes[4]))


def _pool_row(dim: int) -> int:
    return -(-dim // 8) * 8


def _pooled(p: Problem, room: Callable, dtype) -> tuple:
    """Room for what pooling makes: means of K and V, with the spread tail running sums; nothing without a tail."""
    if p.settings.tail is None or not p.pool_blocks:
        return ()
    heads = p.batch * p.heads_kv, p.pool_blocks
    made = tuple([room((*heads, _pool_row(dim)), dtype) for dim in (p.dim_qk, p.dim_v)])
    return (*made, room((*heads, p.dim_qk), p.compute_dtype)) if p.settings.tail == "spread" else made


def _three(pooled: tuple) -> tuple:
    """Means and sums, None for what there is none of."""
    return (*pooled, None, None, None)[:3]


def _attend(
    tape, p, slab, q, k, v, out, kv_offsets, kv_order, query_order, k_mean, v_mean, sums, lse, tiles, tail_blocks, mass
) -> None:
    """Stage 3 along the slab's lists; without a slab dense."""
    s, arch, walk, blocks = p.settings, device_target(), slab is not None, p.pool_blocks if k_mean else 0
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
        return
    if block_q > 128:
        raise ValueError(f"block_q is {block_q}; the CUDA backend supports 1 to 128")
    aligned = sum(x.aligned << bit for bit, x in enumerate((q, k, v, out)))
    beside = walk and p.group > p.orders == 1 and (query_order is None or tiles_per_segment == 1)
    served = aligned == 15 and kernels.sm90_serves(arch, p.dtype, p.dim_qk, p.dim_v, block_q, s.pool, beside)
    if served:
        kernel, macros = _kernel("attend_sm90", p.dtype, p.dim_qk, None, p.dim_v, s.block_k if walk else 128)
        shared, threads = kernels.sm90_shared_bytes(macros, blocks), 384
        served = shared <= shared_limit(arch)
    if not served and p.dtype in _HALVES:
        kernel, macros = _kernel("attend", p.dtype, p.dim_qk, None, p.dim_v, block_q)
        shared, threads = kernels.attend_shared_bytes(macros, blocks), kernels.attend_threads(macros)
    elif not served:
        kernel, macros = _kernel("attend_simt", p.dtype, dim_v=p.dim_v)
        shared, threads = kernels.simt_shared_bytes(macros, blocks), 256
    if shared > shared_limit(arch) - (0 if served else 1024):
        raise ValueError(f"{blocks} pool blocks need {shared} bytes of shared memory; choose a pool above {s.pool}")
    rows = (p.pool_blocks, _pool_row(p.dim_qk), _pool_row(p.dim_v)) if blocks else (0, 0, 0)
    order = (kv_order, kv_offsets, *kv_offsets.strides) if walk else (None, None, np.int64(0))
    if walk and isinstance(s.tau, tuple):
        taus = _kept(tape, np.array(s.tau, np.float32)), np.float32(0)
    else:
        taus = None, np.float32(s.tau if walk else 0)
    sizes = (p.heads_q, p.heads_kv, p.orders, slab.kv_start, p.n_q, p.n_k, p.dim_qk, p.dim_v)
    shape = (s.causal, p.window, segment, slab.segment_start, tiles_per_segment, tile_start, tile_stop, row_tiles)
    steps = (block_q, s.block_k, s.pool.bit_length() - 1)
    arguments = [y for x in (q, k, v, out) for y in (x, *x.strides)]
    arguments += [np.int32(aligned), k_mean, v_mean, *map(np.int32, rows), *order, query_order, *taus]
    rows_of_q = (p.batch, p.heads_q, p.n_q)
    lift = tape.room(rows_of_q, p.compute_dtype) if sums else None
    if lift:
        kernel_of_lifts, _ = _kernel("pool", p.dtype, entry="lifts")
        numbers = (p.heads_q, p.heads_kv, slab.kv_start, p.n_q, p.n_k, p.dim_qk, s.causal, segment, tiles_per_segment)
        numbers = *numbers, tile_start, block_q, blocks, s.pool.bit_length() - 1, q.aligned and p.dim_qk % 2 == 0
        units = tuple(map(p.compute_dtype.type, (p.scale / 2, min(MOST_LIFT / p.scale, MAX_SCALE))))
        given = (q, *q.strides, query_order, sums, lift, *map(np.int32, numbers), *units)
        tape.launch(kernel_of_lifts, grid, 256, given)
    arguments += [lse or tape.room(rows_of_q, p.compute_dtype), tiles, tail_blocks, mass, lift]
    arguments += [*map(np.int32, (*sizes, *shape, *steps)), p.compute_dtype.type(p.scale * _LOG2_E)]
    if served:  # blocks stay, and draw row tiles, or two side by side, by a counter
        arguments += [np.int32(grid[1]), tape.room(1, np.int32, zeroed=True)]
        places = p.group if block_q > 64 else -(-p.group // 2)
        blocks_of_rows = (tile_stop - tile_start) * places * grid[1]
        grid = (min(blocks_of_rows, _processors(cp.cuda.runtime.getDevice())),)
    tape.launch(kernel, grid, threads, arguments, shared)


@functools.cache
def _processors(device: int) -> int:
    return cp.cuda.runtime.getDeviceProperties(device)["multiProcessorCount"]


_asked_for: set[tuple] = set()  # what was built together with others, by device


def _built(wanted: list[tuple]) -> list:
    """The kernels that `_kernel` named, on the current device; several new ones are compiled at the same time."""
    device = cp.cuda.runtime.getDevice()

    def build(name, entry, source, macros):
        cp.cuda.runtime.setDevice(device)  # a thread has its own current device
        return get_kernel(name, entry, source, **dict(macros))

    new, kernels = [one for one in dict.fromkeys(wanted) if (device, one) not in _asked_for], {}
    if len(new) > 1:
        with ThreadPoolExecutor(len(new)) as pool:
            kernels = dict(zip(new, pool.map(lambda one: build(*one), new)))
        _asked_for.update((device, one) for one in new)
    return [kernels.pop(one, None) or build(*one) for one in wanted]


def _kernel(name: str, dtype: str, dim=None, entry: str | None = None, dim_v=None, block=None):
    """A kernel as `_built` takes it, and its macros."""
    source, arch = current(name), device_target()
    macros = source.applied(kernels.launch_macros(name, dtype, dim, dim_v, block, arch))
    return (name, entry, source, tuple(sorted(macros.items()))), macros


@functools.lru_cache(maxsize=256)
def _dense_block_q(arch: str, dtype: str, dim_qk: int, dim_v: int) -> int:
    return kernels.largest_block_q(dtype, dim_qk, dim_v, arch) if dtype in _HALVES else 128


def _type(p: Problem):
    """A type of the inputs' size."""
    return np.uint16 if p.dtype in _HALVES else p.dtype


def _score_type(p: Problem):
    return np.float16 if p.dtype in _HALVES else np.float32


def _score_bytes(p: Problem, slab: Slab) -> int:
    return _score_count(p, slab) * np.dtype(_score_type(p)).itemsize


def _score_count(p: Problem, slab: Slab) -> int:
    """Scores of a slab, all lists end to end."""
    return (slab.kv_stop - slab.kv_start) * p.orders * _lists(p, slab)[2]


def _lists(p: Problem, slab: Slab):
    """Histories and score starts of the slab's lists, on the device; a head's scores, and the longest history."""
    geometry = p.settings.causal, p.settings.segment, p.settings.pool, p.n_q, p.n_k
    return _lists_on(cp.cuda.runtime.getDevice(), geometry, slab.segment_start, slab.segment_stop)


@functools.lru_cache(maxsize=1024)
def _lists_on(device: int, geometry: tuple, segment_start: int, segment_stop: int):
    causal, segment, pool_size, n_q, n_k = geometry
    first = np.arange(segment_start, segment_stop, dtype=np.int64) * segment + n_k - n_q
    history = first // pool_size * pool_size if causal else np.full(len(first), n_k, np.int64)
    starts = np.concatenate([[0], np.cumsum(-(-history // 64) * 64)]).astype(np.int64)
    kept = cp.asarray(history.astype(np.int32)), cp.asarray(starts)
    cp.cuda.get_current_stream().synchronize()  # other streams will read them
    return *kept, int(starts[-1]), int(history.max(initial=0))
