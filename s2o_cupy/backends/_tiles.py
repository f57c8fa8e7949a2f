"""The online softmax of the CPU kernels: packed key tiles absorbed by panels of query lanes.

A *panel* is `width` queries, one a lane. A work item's numbers lie in one array x of the compute
type, at the offsets that `Work` names: q [panels, D, width] scaled by scale * log2 e; o [panels,
o_rows, width]; m, l, before, gained, live, ceiling [panels, width]; then for the tile in hand k [TILE, D];
v, raw [TILE, v_row]; s [TILE, width]; bias [TILE]; alpha, limit, floor [width].
"""

from collections import namedtuple
from functools import cache

import numpy as np
from numba import carray, cfunc, from_dtype, types

from s2o_cupy.backends._lanes import (
    BYTES,
    ROWS,
    add,
    divide,
    exp2,
    fill,
    inlined,
    inner,
    larger,
    lean,
    load,
    muladd,
    multiply,
    product,
    product_onto,
    select_le,
    spread,
    store,
    subtract,
)
from s2o_cupy.backends._storage import call_at, pack_rows, put

# Keys computed at a time: a panel's logits and a tile's keys stay in the first two caches. ROOM: in whole blocks.
TILE = 128
ROOM = -(-TILE // ROWS) * ROWS
# Columns of `seat`: where a lane's query is from.
HEAD, ROW, POSITION = 0, 1, 2
# Modes of `absorb`, added: BIASED, logits are at most ceiling[lane], plus bias[key]; MASKED, keys past limit[lane] are
# hidden; COUNTED, the sum goes to `gained` too; FLOORED, keys before floor[lane] are hidden. (Python integers would
# each be a Numba type, and compiled for anew.)
PLAIN, BIASED, MASKED, COUNTED, FLOORED = np.int64([0, 1, 2, 4, 8])

Work = namedtuple(
    "Work",
    "step x seat dim dim_v o_rows v_row width q o m l before gained live ceiling k v raw s bias alpha limit floor",
)


@inner
def make_work(step, panels, dim, dim_v, like):
    """Room for some panels, every lane empty (row -1), every sum zero.

    step: address of `absorb_step`; like: 1-D array of the compute type.
    """
    lean()
    width = BYTES // like.itemsize
    o_rows = -(-dim_v // ROWS) * ROWS
    # An odd number of cache lines a row: a column of values then spreads over all cache sets.
    v_row = ((o_rows + width - 1) // width | 1) * width
    lanes = panels * width
    q = 0
    o = q + lanes * dim
    m = o + lanes * o_rows
    k = m + 6 * lanes
    v = k + ROOM * dim
    s = v + 2 * ROOM * v_row
    bias = s + ROOM * width
    alpha = bias + ROOM
    x = np.zeros(alpha + 3 * width, like.dtype)
    x[m : m + lanes] = -np.inf
    seat = np.full((lanes, 3), -1, np.int64)
    return Work(
        step, x, seat, dim, dim_v, o_rows, v_row, width, q, o, m, m + lanes, m + 2 * lanes, m + 3 * lanes,
        m + 4 * lanes, m + 5 * lanes, k, v, v + ROOM * v_row, s, bias, alpha, alpha + width,
        alpha + 2 * width,
    )  # fmt: skip


@inner
def load_queries(work, pack, q, b, factor):
    """Fill q for the lanes that have a row; `live` is 1 where the row is finite."""
    lean()
    x, seat, row = work.x, work.seat, work.raw
    nothing = np.empty(0, np.int32)
    for lane in range(seat.shape[0]):
        if seat[lane, ROW] < 0:
            continue
        pack_rows(pack, q, b, seat[lane, HEAD], nothing, seat[lane, ROW], 1, x, row, 0)
        at = work.q + lane // work.width * work.dim * work.width + lane % work.width
        finite = 0.0
        for d in range(work.dim):
            finite += x[row + d] * 0
            x[at + d * work.width] = x[row + d] * factor
        x[work.live + lane] = finite == 0


def _absorb_step(pointer, dim, v_row, o_rows, lane, apart, q, o, k, v, s, bias, alpha, limit, floor, first, n, mode):
    """One panel takes n packed keys: m, l, before, gained, live, ceiling lie at `lane`, `apart` from one another."""
    x = carray(pointer, 1)
    width = BYTES // x.itemsize
    for i in range(0, n, ROWS):
        product(x, k + i * dim, dim, 1, dim, x, q, x, s + i * width, x, 0)
    if mode & BIASED:
        ceiling = load(x, lane + 5 * apart)
        for i in range(n):
            logit = load(x, s + i * width)
            store(x, s + i * width, add(select_le(ceiling, logit, ceiling, logit), spread(x, bias + first + i)))
    if mode & MASKED:
        last, hidden = load(x, limit), fill(x, -np.inf)
        for i in range(n):
            store(x, s + i * width, select_le(fill(x, first + i), last, load(x, s + i * width), hidden))
    if mode & FLOORED:
        least, hidden = load(x, floor), fill(x, -np.inf)
        for i in range(n):
            store(x, s + i * width, select_le(least, fill(x, first + i), load(x, s + i * width), hidden))
    old = load(x, lane)
    m = old
    for i in range(n):
        m = larger(load(x, s + i * width), m)
    safe = select_le(m, fill(x, -np.inf), fill(x, 0.0), m)
    factor = exp2(subtract(old, safe))
    total = fill(x, 0.0)
    for i in range(n):
        weight = exp2(subtract(load(x, s + i * width), safe))
        store(x, s + i * width, weight)
        total = add(total, weight)
    store(x, lane, m)
    store(x, alpha, factor)
    lane += apart
    store(x, lane, muladd(load(x, lane), factor, total))
    lane += apart
    store(x, lane, multiply(load(x, lane), factor))
    lane += apart
    gained = multiply(load(x, lane), factor)
    store(x, lane, add(gained, total) if mode & COUNTED else gained)
    for d in range(0, o_rows, ROWS):
        product_onto(x, v + d, 1, v_row, n, x, s, x, o + d * width, x, alpha)


@cache
def absorb_step(dtype):
    """The compiled step for a compute type; the kernels call its address, so it is compiled once for all of them."""
    signature = types.void(types.CPointer(from_dtype(dtype)), *[types.int64] * 17)
    return cfunc(signature, cache=True, error_model="numpy")(_absorb_step)


@inlined
def absorb(work, p, first, n, mode):
    """Panel p takes rows first .. first + n of the packed tile into its softmax.

    `before` and `gained` follow the running maximum.
    """
    lane = p * work.width
    call_at(
        work.step,
        work.x,
        (
            work.dim, work.v_row, work.o_rows, work.m + lane, work.l - work.m,
            work.q + lane * work.dim, work.o + lane * work.o_rows,
            work.k + first * work.dim, work.v + first * work.v_row,
            work.s, work.bias, work.alpha, work.limit, work.floor, first, n, mode,
        ),
    )  # fmt: skip


@inner
def hide_nonfinite(work, n):
    """Zero the non-finite numbers of the packed values, kept in `raw`; whether there were any."""
    lean()
    x, size = work.x, n * work.v_row
    nothing = 0.0
    for i in range(work.v, work.v + size):
        nothing += x[i] * 0
    if nothing == 0:
        return False
    for i in range(size):
        x[work.raw + i] = x[work.v + i]
        if not np.isfinite(x[work.v + i]):
            x[work.v + i] = 0
    return True


@inner
def _restore_nonfinite(work, p, first, n):
    """Add what `hide_nonfinite` took out of the last `absorb`, to the lanes that see the key only."""
    lean()
    x, width = work.x, work.width
    for i in range(n):
        for d in range(work.dim_v):
            number = x[work.raw + (first + i) * work.v_row + d]
            if np.isfinite(number):
                continue
            for lane in range(width):
                if x[work.floor + lane] <= first + i <= x[work.limit + lane]:
                    x[work.o + (p * work.o_rows + d) * width + lane] += x[work.s + i * width + lane] * number


@inner
def absorb_masked(work, p, key, first, n, window, nonfinite):
    """Panel p takes tile rows first .. first + n as far as each lane may see; tile row 0 is key `key`.

    A lane sees the last `window` keys up to its position.
    """
    lean()
    last, least, most = np.int64(-1), np.int64(TILE), np.int64(0)
    for lane in range(work.width):
        seen = work.seat[p * work.width + lane, POSITION] - key
        floor = min(max(seen + 1 - window, 0), TILE)
        last = max(last, seen)
        if work.seat[p * work.width + lane, ROW] >= 0:
            least, most = min(least, floor), max(most, floor)
        work.x[work.limit + lane] = min(max(seen, -1), TILE)
        work.x[work.floor + lane] = floor
    stop = min(first + n, last + 1)
    first = max(first, least)
    n = stop - first
    if n > 0:
        absorb(work, p, first, n, MASKED + FLOORED if most > first else MASKED)
        if nonfinite:
            _restore_nonfinite(work, p, first, n)


@inner
def finish(work, out, lse, b):
    """Write o / l and the natural-log LSE of every lane that has a row."""
    lean()
    x, width, row = work.x, work.width, work.raw
    for lane in range(work.seat.shape[0]):
        h, i = work.seat[lane, HEAD], work.seat[lane, ROW]
        if i < 0:
            continue
        total = x[work.l + lane]
        # No key seen: 0 and -inf. A non-finite query: NaN, whatever its logits came to.
        divisor = total if total != 0 else total + 1
        if not x[work.live + lane]:
            total = divisor = total * np.nan
        at = work.o + lane // width * work.o_rows * width + lane % width
        for d in range(work.dim_v):
            x[row + d] = x[at + d * width]
        start, stride = b * out.strides[0] + h * out.strides[1] + i * out.strides[2], out.strides[3]
        d = 0
        if stride == out.itemsize:
            while d + width <= work.dim_v:
                put(out, start + d * stride, divide(load(x, row + d), fill(x, divisor)))
                d += width
        while d < work.dim_v:
            put(out, start + d * stride, x[row + d] / divisor)
            d += 1
        lse[b, h, i] = x[work.m + lane] * np.log(2.0) + np.log(total)
