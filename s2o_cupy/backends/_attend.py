"""Stage 3 on the CPU: the ranked walk of one list's row tiles, and the pooled tail."""

import numpy as np

from s2o_cupy.backends._lanes import BYTES, inner, kernel, lean
from s2o_cupy.backends._storage import pack_rows
from s2o_cupy.backends._tiles import (
    BIASED,
    COUNTED,
    HEAD,
    MASKED,
    PLAIN,
    POSITION,
    ROW,
    TILE,
    absorb,
    absorb_masked,
    finish,
    hide_nonfinite,
    load_queries,
    make_work,
)
from s2o_cupy.settings import MOST_LIFT

# Columns of `tiles` [row tiles of a work item] int64: its panels, least and greatest position, state,
# key tiles walked, pooled keys taken.
BEGIN, END, LOW, HIGH, STATE, WALKED, POOLED = range(7)
STOPPED, WALKING, STOPPING = np.int64([0, 1, 2])


@kernel
def attend_tiles(
    step, pack, pack_pooled, q, k, v, out, lse, tiles_out, blocks_out, mass_out,
    kv_order, query_order, k_pool, v_pool, spread, tau,
    segment_size, block_q, block_k, pool, tiles_a_segment, shift, causal, tail, guide,
    b, h, first_head, segment, first_tile, last_tile, start, listed, history, factor,
):  # fmt: skip
    """Attention of the row tiles first_tile .. last_tile that share one list.

    q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv], out [B, Hq, Nq, Dv]: storage types;
    lse [B, Hq, Nq] compute type; tiles_out, blocks_out [B, Hq, row tiles] int32; mass_out
    [B, Hq, Nq] float32; kv_order [.] int32, the list at `start`; query_order [B, Hq, Nq] int32,
    read if `guide`; k_pool, v_pool [B, Hkv, blocks, .] compute type; spread like k_pool, or empty: no row is lifted;
    tau [Hq] float64.
    The tiles count through the heads that share the list, from first_head. step, pack, pack_pooled: addresses
    of `absorb_step` and of the `pack_step` of k and of k_pool.
    """
    lean()
    rows = min(segment_size, q.shape[2] - segment * segment_size)
    per_head = -(-rows // block_q)
    like = np.empty(0, lse.dtype)
    panels = -(-min(block_q, rows) * like.itemsize // BYTES)
    count = last_tile - first_tile
    work = make_work(step, count * panels, q.shape[3], v.shape[3], like)
    tiles = np.zeros((count, 7), np.int64)
    for t in range(count):
        head, tile = first_head + (first_tile + t) // per_head, (first_tile + t) % per_head
        first = segment * segment_size + tile * block_q
        n = min(block_q, segment * segment_size + rows - first)
        _seat(work, tiles[t], t * panels, b, head, first, n, shift, query_order, guide)
    load_queries(work, pack, q, b, factor)
    if causal:
        _window(work, pack, tiles, k, v, b, h, history, _extreme(tiles, LOW, 1), PLAIN)
    ranked = kv_order[start : start + listed]
    lift = np.zeros(work.seat.shape[0])
    if tail and spread.size and listed:
        _lift(work, tiles, spread[b, h, -(-history // pool) - 1], lift)
    _walk(work, pack, pack_pooled, tiles, k, v, b, h, ranked, block_k, history, pool, k_pool, v_pool, tail, tau, lift)
    if causal:
        _window(work, pack, tiles, k, v, b, h, _extreme(tiles, LOW, -1), _extreme(tiles, HIGH, 1) + 1, MASKED)
    finish(work, out, lse, b)
    for t in range(count):
        head, tile = first_head + (first_tile + t) // per_head, (first_tile + t) % per_head
        tiles_out[b, head, segment * tiles_a_segment + tile] = tiles[t, WALKED]
        blocks_out[b, head, segment * tiles_a_segment + tile] = tiles[t, POOLED]
        for lane in range(tiles[t, BEGIN] * work.width, tiles[t, END] * work.width):
            if work.seat[lane, ROW] >= 0:
                share = work.x[work.gained + lane] / work.x[work.l + lane] if tiles[t, POOLED] else 0.0
                mass_out[b, head, work.seat[lane, ROW]] = share


@inner
def _seat(work, tile, panel, b, head, first, n, shift, query_order, guide):
    """Give the rows first .. first + n of a head, in walking order, the lanes from `panel` on."""
    lean()
    tile[BEGIN], tile[END] = panel, panel + -(-n // work.width)
    tile[STATE], tile[LOW], tile[HIGH] = WALKING, 2**62, -1
    for i in range(n):
        row = np.int64(query_order[b, head, first + i]) if guide else first + i
        seat = work.seat[panel * work.width + i]
        seat[HEAD], seat[ROW], seat[POSITION] = head, row, row + shift
        tile[LOW] = min(tile[LOW], row + shift)
        tile[HIGH] = max(tile[HIGH], row + shift)


@inner
def _extreme(tiles, column, sign):
    """Greatest number of a column, or least if the sign is negative."""
    lean()
    most = tiles[0, column]
    for t in range(tiles.shape[0]):
        if sign * tiles[t, column] > sign * most:
            most = tiles[t, column]
    return most


@inner
def _window(work, pack, tiles, k, v, b, h, start, stop, mode):
    """Window keys start .. stop: before each tile's least position, where every row sees them, or (MASKED) the rest."""
    lean()
    masked = mode == MASKED
    nothing = np.empty(0, np.int32)
    for key in range(start, stop, TILE):
        n = min(TILE, stop - key)
        pack_rows(pack, k, b, h, nothing, key, n, work.x, work.k, work.dim)
        pack_rows(pack, v, b, h, nothing, key, n, work.x, work.v, work.v_row)
        nonfinite = masked and hide_nonfinite(work, n)
        for t in range(tiles.shape[0]):
            low = tiles[t, LOW] - key
            first, last = (max(low, 0), n) if masked else (0, min(low, n))
            if first < last and (not masked or key <= tiles[t, HIGH]):
                for p in range(tiles[t, BEGIN], tiles[t, END]):
                    if masked:
                        absorb_masked(work, p, key, first, last - first, k.shape[2], nonfinite)
                    else:
                        absorb(work, p, first, last - first, mode)


@inner
def _lift(work, tiles, variance, lift):
    """lift [lanes], base 2: what the spread of keys inside blocks adds to a row's pooled logits; see `row_lift`."""
    lean()
    x, width = work.x, work.width
    mean = np.empty(work.dim)
    for t in range(tiles.shape[0]):
        mean[:] = 0
        rows = 0
        for lane in range(tiles[t, BEGIN] * width, tiles[t, END] * width):
            if work.seat[lane, ROW] >= 0 and x[work.live + lane]:
                rows += 1
                at = work.q + lane // width * work.dim * width + lane % width
                for d in range(work.dim):
                    mean[d] += x[at + d * width]
        for lane in range(tiles[t, BEGIN] * width, tiles[t, END] * width):
            if work.seat[lane, ROW] >= 0 and x[work.live + lane]:
                at, total = work.q + lane // width * work.dim * width + lane % width, 0.0
                for d in range(work.dim):
                    away = x[at + d * width] - mean[d] / rows
                    total += away * away * variance[d]
                # The queries carry scale * log2 e, so the square carries log2 e once too often.
                if total == total:
                    lift[lane] = min(np.log(2.0) / 2 * total, MOST_LIFT / np.log(2.0))


@inner
def _walk(work, pack, pack_pooled, tiles, k, v, b, h, ranked, block_k, history, pool, k_pool, v_pool, tail, tau, lift):
    """History keys in ranked order until each tile stops; its tail as soon as it does.

    A tail's `gained` stays: the pooled keys' share of l.
    """
    lean()
    blocks = -(-history // pool)
    skipped = np.full(blocks, pool, np.int64)
    if blocks:
        skipped[-1] = history - (blocks - 1) * pool
    shift = 0
    while 1 << shift < pool:
        shift += 1
    walking, at = tiles.shape[0], 0
    while walking:
        _restart_sums(work, tiles, WALKING)
        keys = min(block_k, ranked.size - at)
        for first in range(at, at + keys, TILE):
            n = min(TILE, at + keys - first)
            pack_rows(pack, k, b, h, ranked, first, n, work.x, work.k, work.dim)
            pack_rows(pack, v, b, h, ranked, first, n, work.x, work.v, work.v_row)
            for i in range(first, first + n):
                skipped[ranked[i] >> shift] -= 1
            _absorb_in(work, tiles, WALKING, n, COUNTED)
        at += keys
        stopping = _vote(work, tiles, tau, keys, at == ranked.size)
        if stopping:
            walking -= stopping
            _set_ceiling(work, tiles, keys)
            _restart_sums(work, tiles, STOPPING)
            if tail:
                left = (1 - at / history) ** 2 if history else 1.0
                _tail(work, pack_pooled, tiles, b, h, skipped, pool, history, k_pool, v_pool, lift, left)
            for t in range(tiles.shape[0]):
                if tiles[t, STATE] == STOPPING:
                    tiles[t, STATE] = STOPPED


@inner
def _absorb_in(work, tiles, state, n, mode):
    """The panels of the tiles in a state take the packed tile's n rows."""
    lean()
    for t in range(tiles.shape[0]):
        if tiles[t, STATE] == state:
            for p in range(tiles[t, BEGIN], tiles[t, END]):
                absorb(work, p, 0, n, mode)


@inner
def _restart_sums(work, tiles, state):
    """before = l, gained = 0 in the tiles of a state."""
    lean()
    for t in range(tiles.shape[0]):
        if tiles[t, STATE] == state:
            for lane in range(tiles[t, BEGIN] * work.width, tiles[t, END] * work.width):
                work.x[work.before + lane] = work.x[work.l + lane]
                work.x[work.gained + lane] = 0


@inner
def _set_ceiling(work, tiles, keys):
    """In the stopping tiles, the log of the mean weight of the last key tile's `keys` keys."""
    lean()
    for t in range(tiles.shape[0]):
        if tiles[t, STATE] == STOPPING:
            for lane in range(tiles[t, BEGIN] * work.width, tiles[t, END] * work.width):
                ceiling = work.x[work.m + lane] + np.log2(work.x[work.gained + lane] / keys) if keys else np.inf
                work.x[work.ceiling + lane] = ceiling


@inner
def _vote(work, tiles, tau, keys, last):
    """How many tiles stop after `keys` keys: those where each voting row gained less than tau, or all at the `last`."""
    lean()
    x, stopping = work.x, 0
    for t in range(tiles.shape[0]):
        if tiles[t, STATE] != WALKING:
            continue
        tiles[t, WALKED] += keys > 0
        first = tiles[t, BEGIN] * work.width
        least = tau[work.seat[first, HEAD]]
        stop = least > 0
        for lane in range(first, tiles[t, END] * work.width):
            finite = np.isfinite(x[work.m + lane]) and np.isfinite(x[work.l + lane])
            if work.seat[lane, ROW] >= 0 and x[work.live + lane] and finite:
                before = np.float64(x[work.before + lane])
                stop &= before != 0 and x[work.gained + lane] / before < least
        if stop or last:
            tiles[t, STATE] = STOPPING
            stopping += 1
    return stopping


@inner
def _shift(work, tiles, lift, share):
    """Raise the stopping tiles' maxima and ceilings by share * lift: pooled logits are then lower by as much."""
    lean()
    for t in range(tiles.shape[0]):
        if tiles[t, STATE] == STOPPING:
            for lane in range(tiles[t, BEGIN] * work.width, tiles[t, END] * work.width):
                work.x[work.m + lane] += share * lift[lane]
                work.x[work.ceiling + lane] += share * lift[lane]


@inner
def _tail(work, pack_pooled, tiles, b, h, skipped, pool, history, k_pool, v_pool, lift, left):
    """The stopping tiles take each block with a quarter of its keys left as one pooled key, at most `ceiling` a key."""
    lean()
    index, n, entered = np.empty(TILE, np.int32), 0, 0
    for block in range(skipped.size):
        if 4 * skipped[block] >= min(pool, history - block * pool):
            index[n] = block
            work.x[work.bias + n] = np.log2(np.float64(skipped[block]))
            n += 1
        if n == TILE or (n and block == skipped.size - 1):
            pack_rows(pack_pooled, k_pool, b, h, index, 0, n, work.x, work.k, work.dim)
            pack_rows(pack_pooled, v_pool, b, h, index, 0, n, work.x, work.v, work.v_row)
            if not entered:
                _shift(work, tiles, lift, -left)
            entered += n
            _absorb_in(work, tiles, STOPPING, n, BIASED + COUNTED)
            for t in range(tiles.shape[0]):
                if tiles[t, STATE] == STOPPING:
                    tiles[t, POOLED] += n
            n = 0
    if entered:
        _shift(work, tiles, lift, left)
