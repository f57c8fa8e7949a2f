"""An attend kernel by itself: its arguments, as the three kernels take them, and its answers."""

import numpy as np
import rounding

from s2o_cupy import reference
from s2o_cupy.iterate import emulation as run

_LOG2_E = 1.4426950408889634


def attend(
    kernel, grid, threads, p, q, k, v, order, offsets, query_order=None, *,
    aligned, shared, macros, reverse, more=(), edit=None,
):  # fmt: skip
    """out, lse, tiles, tail_blocks and tail_mass of a kernel: along the lists, or where `order` is None dense."""
    s, wide = p.settings, [x.astype(np.float64) for x in (q, k, v)]
    heads, row_tiles = p.batch * p.heads_q, len(p.tile_start)
    out = np.full((p.batch, p.heads_q, p.n_q, p.dim_v), np.nan, q.dtype)
    lse, mass = np.full((heads, p.n_q), np.nan, p.compute_dtype), np.full((heads, p.n_q), np.nan, np.float32)
    tiles, blocks = (np.full((heads, row_tiles), -1, np.int32) for _ in range(2))
    pools, stats, lift = [None, None], [tiles, blocks, mass], None
    if order is None:
        stats = [None, None, None]
    elif s.tail:
        means = [reference.pool(p, x).reshape(-1, p.pool_blocks, x.shape[-1]) for x in wide[1:]]
        pools = [np.ascontiguousarray(x, q.dtype) for x in means]
        lift = _lifts(p, *wide[:2], query_order) if s.tail == "spread" else None
    seen = run.half_bits if p.dtype in rounding.HALVES else np.asarray
    arguments = [a for x in (q, k, v, out) for a in (seen(x), *(n // x.itemsize for n in x.strides[:3]))]
    pools = [x if x is None else seen(x) for x in pools]
    taus = (np.array(s.tau, np.float32), 0) if isinstance(s.tau, tuple) else (None, s.tau)
    arguments += [aligned, *pools, p.pool_blocks, p.dim_qk, p.dim_v, order, offsets, p.segments + 1, query_order, *taus]
    arguments += [lse, *stats, lift, p.heads_q, p.heads_kv, p.orders, 0, p.n_q, p.n_k, p.dim_qk, p.dim_v]
    arguments += [s.causal, p.window, s.segment, 0, p.tiles_per_segment, 0, row_tiles, row_tiles]
    arguments += [s.block_q, s.block_k, s.pool.bit_length() - 1, p.scale * _LOG2_E, *more]
    run.launch(kernel, grid, threads, arguments, shared=shared, reverse=reverse, edit=edit, **macros)
    rows, by_tile = out.shape[:-1], (*out.shape[:2], row_tiles)
    return out, lse.reshape(rows), tiles.reshape(by_tile), blocks.reshape(by_tile), mass.reshape(rows)


def _lifts(p, q, k, query_order):
    """What the rows' products with pooled keys are raised by, compute type."""
    variance, lift = reference.pool_spread(p, k), np.zeros((p.batch, p.heads_q, p.n_q), p.compute_dtype)
    for b, h, tile in np.ndindex(p.batch, p.heads_q, len(p.tile_start)):
        rows = p.tile_start[tile] + np.arange(p.tile_rows[tile])
        rows = rows if query_order is None else query_order[b, h, rows]
        blocks = -(-int(p.history[p.tile_segment[tile]]) // p.settings.pool)
        if blocks:
            lift[b, h, rows] = (
                reference.row_lift(q[b, h, rows], variance[b, h // p.group, blocks - 1], p.scale) / p.scale
            )
    return lift
