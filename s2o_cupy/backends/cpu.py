"""The CPU backend: score, remap, pool, attend and dense as Numba kernels on a few threads.

Every kernel does one work item with the GIL released; a call hands its items, longest first, to
threads of its own, so calls from several threads are safe.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import numba
import numpy as np
from numba import types

from s2o_cupy import planning
from s2o_cupy.backends import _attend, _dense, _mixture, _order, _ranking
from s2o_cupy.backends._storage import pack_step
from s2o_cupy.backends._tiles import absorb_step
from s2o_cupy.problem import Problem, Slab

# Keys of the longest history from which ranking pays: at N=2048 the shipped heads take as long as dense.
RANKING_PAYS_FROM = 1792
NEEDS_STATS = True  # lse, tiles, tail_blocks and tail_mass, whoever reads them
# Scores that stage 1 leaves for stage 2 at a time.
SCORE_BYTES = 2**24
_LOG2E = float(np.log2(np.e))
# Query lanes of a work item: enough to make packing a key tile cheap, few enough for the second cache.
_LANES = 512
_INT = types.int64


ranked = partial(planning.ranked, sys.modules[__name__])


def rank(problem: Problem, q, k, slab: Slab, kv_offsets, kv_order) -> None:
    """Stages 1 and 2 for the slab's lists, a part of bounded score memory at a time."""
    for part, offsets in problem.parts(slab, SCORE_BYTES, kv_offsets):
        # No name holds the scores, so that the next part's do not find them still there.
        remap(problem, score(problem, q, k, part), part, offsets, kv_order)


def score(problem: Problem, q: np.ndarray, k: np.ndarray, slab: Slab) -> np.ndarray:
    """Stage 1: (lists of the slab, longest history) float32 scores; beyond a list's history undefined."""
    if problem.settings.rank == "mixture":
        return _score_mixture(problem, q, k, slab)
    history = problem.history[slab.segment_start : slab.segment_stop]
    lists = (slab.kv_stop - slab.kv_start) * problem.orders * slab.segments
    width = int(history.max(initial=0))
    scores = np.empty((lists, width), np.float32)
    rows = -(-(1 + problem.terms) // _ranking.ROWS) * _ranking.ROWS
    rep = np.empty((lists, rows, problem.dim_qk), problem.compute_dtype)
    q, k = _storage(q), _storage(k)
    heads = problem.group // problem.orders
    segment = problem.settings.segment
    items = []
    for index, (kv, o, s) in enumerate(_lists(problem, slab)):
        b, h = divmod(kv, problem.heads_kv)
        rows = min(segment, problem.n_q - s * segment)
        if problem.history[s]:
            place = (b, h * problem.group + o * heads, heads, s * segment, rows)
            items.append((rows, (_pack(q), q, rep[index], *place, problem.terms, problem.scale)))
    signature = (_INT, _type(q), _type(rep[0], "C"), *(_INT,) * 6, types.float64)
    _run(_entry(_ranking.represent, *signature), items)
    _run_chunks(problem, slab, _ranking.score_keys, (k, rep, history, scores))
    return scores


def _score_mixture(problem: Problem, q, k, slab: Slab) -> np.ndarray:
    """`score` for the mixture rank: centres, then their sums over the keys, then the scores."""
    history = problem.history[slab.segment_start : slab.segment_stop]
    lists = (slab.kv_stop - slab.kv_start) * problem.orders * slab.segments
    width, dtype = int(history.max(initial=0)), problem.compute_dtype
    rows = -(-problem.terms // _ranking.ROWS) * _ranking.ROWS
    rep, variance = np.empty((lists, rows, problem.dim_qk), dtype), np.empty((lists, problem.dim_qk), dtype)
    share, scores = np.full((lists, rows), -np.inf, dtype), np.empty((lists, width), np.float32)
    q, k = _storage(q), _storage(k)
    heads, segment, items = problem.group // problem.orders, problem.settings.segment, []
    for index, (kv, o, s) in enumerate(_lists(problem, slab)):
        b, h = divmod(kv, problem.heads_kv)
        n = min(segment, problem.n_q - s * segment)
        place = (b, h * problem.group + o * heads, heads, s * segment, n, problem.terms, problem.scale)
        items.append((n, (_pack(q), q, rep[index], variance[index], share[index], *place)))
    if not items:
        return scores
    parts = [_type(x, "C") for x in items[0][1][2:5]]
    _run(_entry(_mixture.centre_queries, _INT, _type(q), *parts, *(_INT,) * 6, types.float64), items)
    sums = np.empty((-(-width // _ranking.CHUNK), lists, rows), dtype)
    _run_chunks(problem, slab, _mixture.sum_keys, (k, rep, variance, history, sums), numbered=True)
    with np.errstate(invalid="ignore"):
        offset = (share - 2 * np.logaddexp2.reduce(sums, axis=0, initial=-np.inf)).astype(dtype)
    _run_chunks(problem, slab, _mixture.score_keys, (k, rep, variance, history, offset, scores))
    return scores


def _run_chunks(problem: Problem, slab: Slab, kernel, arrays, numbered: bool = False) -> None:
    """Run a kernel of stage 1 on every chunk of keys of the slab's K/V heads; `numbered` passes the chunk's number."""
    k, history = arrays[0], problem.history[slab.segment_start : slab.segment_stop]
    width, lists, items = int(history.max(initial=0)), problem.orders * slab.segments, []
    for at, kv in enumerate(range(slab.kv_start, slab.kv_stop)):
        for chunk, key in enumerate(range(0, width, _ranking.CHUNK)):
            n = min(_ranking.CHUNK, width - key)
            place = (*divmod(kv, problem.heads_kv), at * lists, lists, slab.segments, key, n)
            cost = int((history > key).sum())
            items.append((cost, (_pack(k), *arrays, *((chunk,) if numbered else ()), *place)))
    signature = [_INT, _type(k), *(_type(x, "C") for x in arrays[1:])]
    _run(_entry(kernel, *signature, *(_INT,) * (8 if numbered else 7)), items)


def remap(problem: Problem, scores: np.ndarray, slab: Slab, kv_offsets: np.ndarray, kv_order: np.ndarray) -> None:
    """Stage 2: write each list of the slab at its offset, the listed keys by descending score."""
    levels, items = problem.settings.rank_levels, []
    for index, (_, _, s) in enumerate(_lists(problem, slab)):
        history, listed = int(problem.history[s]), int(problem.listed[s])
        head, at = divmod(index, slab.segments)
        item = (scores, index, history, listed) + (() if levels is None else (levels,))
        items.append((history, (*item, kv_order, int(kv_offsets[head, at]))))
    kernel, middle = (_order.order_exactly, 3) if levels is None else (_order.order_levels, 4)
    scratch = scores.shape[1] * (16 if levels is None else 4)  # bytes that a thread's list takes
    entry = _entry(kernel, _type(scores, "C"), *(_INT,) * middle, _type(kv_order), _INT)
    _run(entry, items, max(1, SCORE_BYTES // max(scratch, 1)))


def pool(problem: Problem, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, ...]:
    """Means of K and V over whole pool blocks: (B, Hkv, pool blocks, D) and (..., Dv), compute type.

    With `tail="spread"` also the variances (B, Hkv, pool blocks, D) of K inside its blocks, over the blocks up to each.
    """
    k, v = _storage(k), _storage(v)

    def by_head(kernel, x, *arrays) -> None:
        entry = _entry(kernel, _INT, _type(x), *map(_type, arrays), _INT, _INT, _INT)
        where, size = np.ndindex(x.shape[:2]), problem.settings.pool
        _run(entry, [(0, (_pack(x), x, *arrays, b, h, size)) for b, h in where])

    made = [np.empty((*x.shape[:2], problem.pool_blocks, x.shape[3]), problem.compute_dtype) for x in (k, v)]
    for x, mean in zip((k, v), made):
        by_head(_dense.pool_blocks, x, mean)
    if problem.settings.tail == "spread":
        made.append(np.empty_like(made[0]))
        by_head(_dense.pool_spread, k, made[0], made[2])
    return tuple(made)


def attend(problem: Problem, q, k, v, slab: Slab, kv_order, kv_offsets, query_order, pooled, answer) -> None:
    """Stage 3 for the slab's heads and segments: fills out, lse, tiles, tail_blocks and tail_mass."""
    s, tau = problem.settings, problem.tau
    guide = query_order is not None
    query_order = query_order if guide else np.empty((0, 0, 0), np.int32)
    nothing = np.empty((0, 0, 0, 0), problem.compute_dtype)
    k_pool, v_pool, spread = (*(pooled or (nothing, nothing)), nothing)[:3]
    arrays = [_storage(x) for x in (q, k, v, answer.out)]
    arrays += [answer.lse, answer.tiles, answer.tail_blocks, answer.tail_mass]
    arrays += [kv_order, query_order, k_pool, v_pool, spread]
    sizes = (s.segment, s.block_q, s.block_k, s.pool, problem.tiles_per_segment, problem.shift)
    steps = (absorb_step(problem.compute_dtype).address, _pack(arrays[1]), _pack(k_pool))
    flags = (int(s.causal), int(s.tail is not None), int(guide))
    items = []
    for index, (kv, o, segment) in enumerate(_lists(problem, slab)):
        b, h = divmod(kv, problem.heads_kv)
        rows = min(s.segment, problem.n_q - segment * s.segment)
        history, (head, at) = int(problem.history[segment]), divmod(index, slab.segments)
        start = int(kv_offsets[head, at])
        listed = int(kv_offsets[head, at + 1]) - start
        tiles = -(-rows // s.block_q) * (problem.group // problem.orders)
        step = max(1, _LANES // min(s.block_q, rows))
        for first in range(0, tiles, step):
            place = (b, h, h * problem.group + o, segment, first, min(first + step, tiles), start, listed, history)
            cost = (min(first + step, tiles) - first) * (listed + rows)
            items.append((cost, (*steps, *arrays, tau, *sizes, *flags, *place, problem.scale * _LOG2E)))
    signature = [_INT, _INT, _INT, *map(_type, arrays), _type(tau)]
    scalars = len(sizes) + len(flags) + 9
    _run(_entry(_attend.attend_tiles, *signature, *(_INT,) * scalars, types.float64), items)


def dense(problem: Problem, q: np.ndarray, k: np.ndarray, v: np.ndarray, answer) -> None:
    """Exact attention: fills out and lse."""
    arrays = [*(_storage(x) for x in (q, k, v, answer.out)), answer.lse]
    steps = (absorb_step(problem.compute_dtype).address, _pack(arrays[1]))
    block = max(16, _LANES // problem.group // 16 * 16)
    items = []
    for b in range(problem.batch):
        for h in range(problem.heads_kv):
            for first in range(0, problem.n_q, block):
                rows = min(block, problem.n_q - first)
                item = (*steps, *arrays, b, h, first, rows, problem.shift, int(problem.settings.causal), problem.window)
                items.append((rows * (min(first, problem.window) + rows), (*item, problem.scale * _LOG2E)))
    _run(_entry(_dense.dense_rows, _INT, _INT, *map(_type, arrays), *(_INT,) * 7, types.float64), items)


def _lists(problem, slab):
    """The slab's lists in order: (flattened K/V head, order head within it, segment)."""
    for kv in range(slab.kv_start, slab.kv_stop):
        for o in range(problem.orders):
            for segment in range(slab.segment_start, slab.segment_stop):
                yield kv, o, segment


def _storage(x):
    """A view that Numba takes: float16 as uint16, bfloat16 as int16."""
    return {"float16": lambda: x.view(np.uint16), "bfloat16": lambda: x.view(np.int16)}.get(x.dtype.name, lambda: x)()


def _pack(x):
    return pack_step(x.dtype).address


def _type(x, layout="A"):
    """One Numba type for arrays of any strides, alignment and writeability: one compilation serves all."""
    return types.Array(numba.from_dtype(x.dtype), x.ndim, layout, aligned=layout == "C")


@cache
def _entry(kernel, *signature):
    """The kernel's compiled entry for exactly this signature (no dispatch on the arrays' own layouts)."""
    return kernel.compile(signature)


def _run(entry, items, most: int = 2**31):
    """Call `entry` on every (cost, arguments), the costly first, on up to NUMBA_NUM_THREADS threads, or `most`."""
    items = [arguments for _, arguments in sorted(items, key=lambda item: -item[0])]
    threads = min(numba.config.NUMBA_NUM_THREADS, len(items), most)
    if threads <= 1:
        for arguments in items:
            entry(*arguments)
        return
    queue = iter(items)

    def work():
        for arguments in queue:
            entry(*arguments)

    with ThreadPoolExecutor(threads) as executor:
        for future in [executor.submit(work) for _ in range(threads)]:
            future.result()
