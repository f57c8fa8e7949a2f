"""The online softmax of the CPU kernels: packed key tiles absorbed by panels of query lanes.

A *panel* is `width` queries, one a lane. All buffers are one-dimensional, in the compute type:
q [panels, D, width] scaled by scale * log2 e; o [panels, Dv, width]; m, l, before, gained, live
[panels, width]; s [TILE, width]; k [TILE, D]; v, raw [TILE, v_row].
"""

from collections import namedtuple

import numpy as np

from ._lanes import (
    BYTES,
    add,
    exp2,
    fetch,
    fetch_lanes,
    fill,
    inner,
    larger,
    load,
    multiply,
    muladd,
    product,
    product_onto,
    put,
    select_le,
    spread,
    store,
    subtract,
)

# Keys computed at a time: a panel's logits (8 KiB) and a tile's values stay in the first two caches.
TILE = 128
Work = namedtuple("Work", "dim dim_v v_row width head row position q o m l before gained live alpha limit bias s k v raw")


@inner
def make_work(panels, dim, dim_v, like):
    """Buffers for some panels; every lane empty (row -1), every sum zero. `like`: 1-D, the compute type."""
    width = BYTES // like.itemsize
    # An odd number of cache lines a row: a column of values then spreads over all cache sets.
    v_row = ((dim_v + width - 1) // width | 1) * width
    lanes = panels * width
    zeros = np.zeros((5, lanes), like.dtype)
    m = np.full(lanes, -np.inf, like.dtype)
    ids = np.full((3, lanes), -1, np.int64)
    small = np.zeros((2, width), like.dtype)
    return Work(
        dim, dim_v, v_row, width, ids[0], ids[1], ids[2],
        np.zeros(lanes * dim, like.dtype), np.zeros(lanes * dim_v, like.dtype),
        m, zeros[0], zeros[1], zeros[2], zeros[3], small[0], small[1],
        np.zeros(TILE, like.dtype), np.zeros(TILE * width, like.dtype), np.zeros(TILE * dim, like.dtype),
        np.zeros(TILE * v_row, like.dtype), np.zeros(TILE * v_row, like.dtype),
    )  # fmt: skip


@inner
def fetch_row(x, offset, stride, n, target, at):
    """``target[at : at + n]`` = a row of numbers `stride` bytes apart."""
    d = 0
    if stride == x.itemsize:
        step = BYTES // target.itemsize
        while d + step <= n:
            store(target, at + d, fetch_lanes(x, offset + d * stride))
            d += step
    while d < n:
        target[at + d] = fetch(x, offset + d * stride)
        d += 1


@inner
def load_rows(x, b, h, first, n, target, row):
    """Pack rows first .. first + n of ``x[b, h]`` into `target`, `row` numbers apart."""
    start = b * x.strides[0] + h * x.strides[1]
    for i in range(n):
        fetch_row(x, start + (first + i) * x.strides[2], x.strides[3], x.shape[3], target, i * row)


@inner
def gather_rows(x, b, h, index, first, n, target, row):
    """Pack the rows ``index[first : first + n]`` of ``x[b, h]`` into `target`, `row` numbers apart."""
    start = b * x.strides[0] + h * x.strides[1]
    for i in range(n):
        fetch_row(x, start + np.int64(index[first + i]) * x.strides[2], x.strides[3], x.shape[3], target, i * row)


@inner
def load_queries(work, q, b, factor):
    """Fill q for the lanes that have a row; `live` tells the rows that are finite."""
    for lane in range(work.row.size):
        if work.row[lane] < 0:
            continue
        start = b * q.strides[0] + work.head[lane] * q.strides[1] + work.row[lane] * q.strides[2]
        at = lane // work.width * work.dim * work.width + lane % work.width
        finite = True
        for d in range(work.dim):
            x = fetch(q, start + d * q.strides[3])
            finite &= np.isfinite(x)
            work.q[at + d * work.width] = x * factor
        work.live[lane] = finite


@inner
def absorb(work, p, first, n, biased, masked, counted):
    """Panel p takes rows first .. first + n of the packed tile into its softmax.

    biased: adds bias[key]; masked: hides keys above limit[lane] (tile rows); counted: the
    sum goes to `gained` as well. `before` and `gained` follow the running maximum.
    """
    width, s = work.width, work.s
    product(n, work.k, first * work.dim, work.dim, 1, work.dim, work.q, p * work.dim * width, s, 0, width)
    if biased:
        for i in range(n):
            store(s, i * width, add(load(s, i * width), spread(work.bias, first + i)))
    if masked:
        limit, hidden = load(work.limit, 0), fill(s, -np.inf)
        for i in range(n):
            store(s, i * width, select_le(fill(s, first + i), limit, load(s, i * width), hidden))
    lane = p * width
    old = load(work.m, lane)
    m = old
    for i in range(n):
        m = larger(load(s, i * width), m)
    safe = select_le(m, fill(s, -np.inf), fill(s, 0.0), m)
    alpha = exp2(subtract(old, safe))
    total = fill(s, 0.0)
    for i in range(n):
        weight = exp2(subtract(load(s, i * width), safe))
        store(s, i * width, weight)
        total = add(total, weight)
    store(work.m, lane, m)
    store(work.alpha, 0, alpha)
    store(work.l, lane, muladd(load(work.l, lane), alpha, total))
    store(work.before, lane, multiply(load(work.before, lane), alpha))
    gained = multiply(load(work.gained, lane), alpha)
    store(work.gained, lane, add(gained, total) if counted else gained)
    product_onto(
        work.dim_v, work.v, first * work.v_row, 1, work.v_row, n,
        s, 0, work.o, p * work.dim_v * width, work.alpha, 0, width,
    )  # fmt: skip


@inner
def hide_nonfinite(work, n):
    """Zero the non-finite numbers of the packed values, kept in `raw`; whether there were any."""
    found = False
    for i in range(n * work.v_row):
        found |= not np.isfinite(work.v[i])
    if found:
        work.raw[: n * work.v_row] = work.v[: n * work.v_row]
        for i in range(n * work.v_row):
            if not np.isfinite(work.v[i]):
                work.v[i] = 0
    return found


@inner
def restore_nonfinite(work, p, first, n):
    """Add what `hide_nonfinite` took out of the last `absorb`, to the lanes that see the key only."""
    width = work.width
    for i in range(n):
        for d in range(work.dim_v):
            x = work.raw[(first + i) * work.v_row + d]
            if np.isfinite(x):
                continue
            for lane in range(width):
                if first + i <= work.limit[lane]:
                    work.o[(p * work.dim_v + d) * width + lane] += work.s[i * width + lane] * x


@inner
def absorb_masked(work, p, key, first, n, nonfinite):
    """Panel p takes tile rows first .. first + n, tile row 0 being key `key`, as far as each lane may see."""
    last = np.int64(-1)
    for lane in range(work.width):
        seen = work.position[p * work.width + lane] - key
        last = max(last, seen)
        work.limit[lane] = min(max(seen, -1), TILE)
    n = min(n, last + 1 - first)
    if n > 0:
        absorb(work, p, first, n, False, True, False)
        if nonfinite:
            restore_nonfinite(work, p, first, n)


@inner
def finish(work, out, lse, b):
    """Write o / l and the natural-log LSE of every lane that has a row."""
    for lane in range(work.row.size):
        h, i = work.head[lane], work.row[lane]
        if i < 0:
            continue
        total = work.l[lane]
        divisor = total if total != 0 else total + 1  # no key seen: 0 and -inf
        # A non-finite query is NaN whatever its logits came to.
        poison = total * 0 if work.live[lane] else total * np.nan
        start = b * out.strides[0] + h * out.strides[1] + i * out.strides[2]
        at = lane // work.width * work.dim_v * work.width + lane % work.width
        for d in range(work.dim_v):
            put(out, start + d * out.strides[3], work.o[at + d * work.width] / divisor + poison)
        lse[b, h, i] = work.m[lane] * np.log(2.0) + np.log(total) + poison
