"""Stage 3 on the CPU: the ranked walk of one list's row tiles, the pooled tail, and dense attention."""

from collections import namedtuple

import numpy as np

from ._lanes import inner, kernel
from ._tiles import (
    TILE,
    absorb,
    absorb_masked,
    fetch_row,
    finish,
    gather_rows,
    hide_nonfinite,
    load_queries,
    load_rows,
    make_work,
)

# Row tiles of a work item, each a run of panels: first panel and one past the last, least and
# greatest position, state, key tiles walked, pooled keys taken. All [tiles] int64.
Tiles = namedtuple("Tiles", "begin end low high state walked pooled")
STOPPED, WALKING, STOPPING = 0, 1, 2


@kernel
def attend_tiles(
    q, k, v, out, lse, tiles_out, blocks_out, mass_out, kv_order, query_order, k_pool, v_pool, tau,
    segment_size, block_q, block_k, pool, tiles_a_segment, shift, causal, tail, guide,
    b, h, first_head, segment, first_tile, last_tile, start, listed, history, factor,
):  # fmt: skip
    """Attention of the row tiles first_tile .. last_tile that share one list.

    q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv], out [B, Hq, Nq, Dv]: storage types;
    lse [B, Hq, Nq] compute type; tiles_out, blocks_out [B, Hq, row tiles] int32; mass_out
    [B, Hq, Nq] float32; kv_order [.] int32, the list at `start`; query_order [B, Hq, Nq] int32,
    read if `guide`; k_pool, v_pool [B, Hkv, blocks, .] compute type; tau [Hq] float64.
    The tiles count through the heads that share the list, from first_head.
    """
    rows = min(segment_size, q.shape[2] - segment * segment_size)
    per_head = -(-rows // block_q)
    like = np.empty(0, lse.dtype)
    width = 64 // like.itemsize
    panels = -(-min(block_q, rows) // width)
    work = make_work((last_tile - first_tile) * panels, q.shape[3], v.shape[3], like)
    state = np.zeros((7, last_tile - first_tile), np.int64)
    tiles = Tiles(state[0], state[1], state[2], state[3], state[4], state[5], state[6])
    for t in range(last_tile - first_tile):
        head, tile = first_head + (first_tile + t) // per_head, (first_tile + t) % per_head
        first = segment * segment_size + tile * block_q
        n = min(block_q, segment * segment_size + rows - first)
        _seat(work, tiles, t, t * panels, b, head, first, n, shift, query_order, guide)
    load_queries(work, q, b, factor)
    if causal:
        _window_seen(work, tiles, k, v, b, h, history)
    _walk(work, tiles, k, v, b, h, kv_order, start, listed, block_k, history, pool, k_pool, v_pool, tail, tau)
    if causal:
        _window_masked(work, tiles, k, v, b, h)
    finish(work, out, lse, b)
    for t in range(last_tile - first_tile):
        head, tile = first_head + (first_tile + t) // per_head, (first_tile + t) % per_head
        tiles_out[b, head, segment * tiles_a_segment + tile] = tiles.walked[t]
        blocks_out[b, head, segment * tiles_a_segment + tile] = tiles.pooled[t]
    for lane in range(work.row.size):
        if work.row[lane] >= 0:
            share = work.gained[lane] / work.l[lane] if tail and work.l[lane] != 0 else 0.0
            mass_out[b, work.head[lane], work.row[lane]] = share


@inner
def _seat(work, tiles, t, panel, b, head, first, n, shift, query_order, guide):
    """Give the rows first .. first + n of a head, in walking order, the lanes from `panel` on."""
    tiles.begin[t], tiles.end[t] = panel, panel + -(-n // work.width)
    tiles.state[t] = WALKING
    tiles.low[t], tiles.high[t] = 2**62, -1
    for i in range(n):
        row = np.int64(query_order[b, head, first + i]) if guide else first + i
        lane = panel * work.width + i
        work.head[lane], work.row[lane], work.position[lane] = head, row, row + shift
        tiles.low[t] = min(tiles.low[t], row + shift)
        tiles.high[t] = max(tiles.high[t], row + shift)


@inner
def _window_seen(work, tiles, k, v, b, h, history):
    """Window keys before each tile's least position: every row of the tile sees them."""
    for key in range(history, tiles.low.max(), TILE):
        n = min(TILE, tiles.low.max() - key)
        load_rows(k, b, h, key, n, work.k, work.dim)
        load_rows(v, b, h, key, n, work.v, work.v_row)
        for t in range(tiles.low.size):
            seen = min(n, tiles.low[t] - key)
            if seen > 0:
                for p in range(tiles.begin[t], tiles.end[t]):
                    absorb(work, p, 0, seen, False, False, False)


@inner
def _window_masked(work, tiles, k, v, b, h):
    """Keys from each tile's least position on, as far as each row sees."""
    for key in range(tiles.low.min(), tiles.high.max() + 1, TILE):
        n = min(TILE, tiles.high.max() + 1 - key)
        load_rows(k, b, h, key, n, work.k, work.dim)
        load_rows(v, b, h, key, n, work.v, work.v_row)
        nonfinite = hide_nonfinite(work, n)
        for t in range(tiles.low.size):
            first = max(0, tiles.low[t] - key)
            if first < n and key <= tiles.high[t]:
                for p in range(tiles.begin[t], tiles.end[t]):
                    absorb_masked(work, p, key, first, n, nonfinite)


@inner
def _walk(work, tiles, k, v, b, h, kv_order, start, listed, block_k, history, pool, k_pool, v_pool, tail, tau):
    """History keys in ranked order until each tile stops; its tail as soon as it does."""
    blocks = -(-history // pool)
    skipped = np.full(blocks, pool, np.int64)
    if blocks:
        skipped[-1] = history - (blocks - 1) * pool
    shift = 0
    while 1 << shift < pool:
        shift += 1
    walking = tiles.low.size
    for at in range(0, listed, block_k):
        _restart_sums(work, tiles, WALKING)
        stop = min(at + block_k, listed)
        for first in range(at, stop, TILE):
            n = min(TILE, stop - first)
            gather_rows(k, b, h, kv_order, start + first, n, work.k, work.dim)
            gather_rows(v, b, h, kv_order, start + first, n, work.v, work.v_row)
            for i in range(start + first, start + first + n):
                skipped[kv_order[i] >> shift] -= 1
            for t in range(tiles.low.size):
                if tiles.state[t] == WALKING:
                    for p in range(tiles.begin[t], tiles.end[t]):
                        absorb(work, p, 0, n, False, False, True)
        stopping = _vote(work, tiles, tau)
        if stopping:
            _tail(work, tiles, b, h, skipped, k_pool, v_pool, tail)
            walking -= stopping
            if not walking:
                return
    for t in range(tiles.low.size):
        if tiles.state[t] == WALKING:
            tiles.state[t] = STOPPING
    _tail(work, tiles, b, h, skipped, k_pool, v_pool, tail)


@inner
def _restart_sums(work, tiles, state):
    """before = l, gained = 0 in the tiles of a state."""
    for t in range(tiles.low.size):
        if tiles.state[t] == state:
            lanes = slice(tiles.begin[t] * work.width, tiles.end[t] * work.width)
            work.before[lanes] = work.l[lanes]
            work.gained[lanes] = 0


@inner
def _vote(work, tiles, tau):
    """Count a key tile; tiles whose every voting row gained less than tau stop. How many did."""
    stopping = 0
    for t in range(tiles.low.size):
        if tiles.state[t] != WALKING:
            continue
        tiles.walked[t] += 1
        first = tiles.begin[t] * work.width
        least = tau[work.head[first]]
        stop = least > 0
        for lane in range(first, tiles.end[t] * work.width):
            if work.row[lane] >= 0 and work.live[lane]:
                before = np.float64(work.before[lane])
                stop &= before != 0 and work.gained[lane] / before < least
        if stop:
            tiles.state[t] = STOPPING
            stopping += 1
    return stopping


@inner
def _tail(work, tiles, b, h, skipped, k_pool, v_pool, tail):
    """The stopping tiles take every block with keys left as one pooled key; `gained` becomes their share."""
    _restart_sums(work, tiles, STOPPING)
    index, n = np.empty(TILE, np.int64), 0
    for block in range(skipped.size if tail else 0):
        if skipped[block] > 0:
            index[n] = block
            work.bias[n] = np.log2(np.float64(skipped[block]))
            n += 1
        if n == TILE or (n and block == skipped.size - 1):
            gather_rows(k_pool, b, h, index, 0, n, work.k, work.dim)
            gather_rows(v_pool, b, h, index, 0, n, work.v, work.v_row)
            for t in range(tiles.low.size):
                if tiles.state[t] == STOPPING:
                    tiles.pooled[t] += n
                    for p in range(tiles.begin[t], tiles.end[t]):
                        absorb(work, p, 0, n, True, False, True)
            n = 0
    for t in range(tiles.low.size):
        if tiles.state[t] == STOPPING:
            tiles.state[t] = STOPPED


@kernel
def pool_blocks(x, mean, b, h, size):
    """mean[b, h, block] = mean over the keys of a block. x [B, H, N, D] storage, mean [B, H, blocks, D] compute type."""
    row, total = np.zeros(x.shape[3], mean.dtype), np.zeros(x.shape[3])
    for block in range(mean.shape[2]):
        total[:] = 0
        stop = min((block + 1) * size, x.shape[2])
        for key in range(block * size, stop):
            offset = b * x.strides[0] + h * x.strides[1] + key * x.strides[2]
            fetch_row(x, offset, x.strides[3], x.shape[3], row, 0)
            total += row
        mean[b, h, block] = total / (stop - block * size)


@kernel
def dense_rows(q, k, v, out, lse, b, h, first, n, shift, causal, factor):
    """Exact attention of rows first .. first + n of all the query heads of one K/V head; arrays as above."""
    group, like = q.shape[1] // k.shape[1], np.empty(0, lse.dtype)
    width = 64 // like.itemsize
    panels = -(-n // width)
    work = make_work(group * panels, q.shape[3], v.shape[3], like)
    for g in range(group):
        for i in range(n):
            lane = g * panels * width + i
            work.head[lane], work.row[lane] = h * group + g, first + i
            work.position[lane] = first + i + shift if causal else k.shape[2] - 1
    load_queries(work, q, b, factor)
    stop = first + n + shift if causal else k.shape[2]
    for key in range(0, stop, TILE):
        count = min(TILE, stop - key)
        load_rows(k, b, h, key, count, work.k, work.dim)
        load_rows(v, b, h, key, count, work.v, work.v_row)
        whole = work.position[0] >= key + count - 1
        nonfinite = not whole and hide_nonfinite(work, count)
        for p in range(group * panels):
            if work.position[p * width] >= key + count - 1:
                absorb(work, p, 0, count, False, False, False)
            else:
                absorb_masked(work, p, key, 0, count, nonfinite)
    finish(work, out, lse, b)
