"""The float32/float64 attend kernel from its own source on the CPU, in two thread orders, against the reference."""

import numpy as np
import pytest

from s2o_cupy import reference
from s2o_cupy.iterate import emulation as run
from s2o_cupy.problem import Problem
from s2o_cupy.settings import Settings
from s2o_cupy.specialisations import simt_macros, simt_shared_bytes

pytestmark = pytest.mark.skipif(run.compiler() is None, reason="needs g++")
LOG2_E = 1.4426950408889634


def lifts(p, q, k, query_order):
    """What the rows' products with pooled keys are raised by, compute type."""
    variance, lift = reference.pool_spread(p, k), np.zeros((p.batch, p.heads_q, p.n_q), p.compute_dtype)
    for b, h, tile in np.ndindex(p.batch, p.heads_q, len(p.tile_start)):
        rows = p.tile_start[tile] + np.arange(p.tile_rows[tile])
        rows = rows if query_order is None else query_order[b, h, rows]
        blocks = -(-int(p.history[p.tile_segment[tile]]) // p.settings.pool)
        if blocks:
            around = variance[b, h // p.group, blocks - 1]
            lift[b, h, rows] = reference.row_lift(q[b, h, rows].astype(np.float64), around, p.scale) / p.scale
    return lift


def attend(p, q, k, v, order, offsets, query_order, reverse):
    """The kernel's answer: along the lists, or where `order` is None dense."""
    s, real = p.settings, np.dtype(p.dtype)
    heads, row_tiles = p.batch * p.heads_q, len(p.tile_start)
    out = np.full((p.batch, p.heads_q, p.n_q, p.dim_v), np.nan, real)
    lse, mass = np.full((heads, p.n_q), np.nan, real), np.full((heads, p.n_q), np.nan, np.float32)
    tiles, blocks = np.full((heads, row_tiles), -1, np.int32), np.full((heads, row_tiles), -1, np.int32)
    pools, stats = [None, None], [tiles, blocks, mass]
    if order is None:
        stats = [None, None, None]
    elif s.tail:
        pools = [
            np.ascontiguousarray(reference.pool(p, x).reshape(-1, p.pool_blocks, x.shape[-1]), real) for x in (k, v)
        ]
    lift = lifts(p, q, k, query_order) if s.tail == "spread" and order is not None else None
    macros = simt_macros(p.dtype, p.dim_v)
    strides = [(x, *(n // x.itemsize for n in x.strides[:3])) for x in (q, k, v, out)]
    arguments = [a for x in strides for a in x]
    arguments += [0, *pools, p.pool_blocks, p.dim_qk, p.dim_v, order, offsets, p.segments + 1, query_order, None, s.tau]
    arguments += [lse, *stats, lift, p.heads_q, p.heads_kv, p.orders, 0, p.n_q, p.n_k, p.dim_qk, p.dim_v]
    arguments += [s.causal, p.window, s.segment, 0, p.tiles_per_segment, 0, row_tiles, row_tiles]
    arguments += [s.block_q, s.block_k, s.pool.bit_length() - 1, p.scale * LOG2_E]
    run.launch(
        "attend_simt", (row_tiles * p.group, p.batch * p.heads_kv), 256, arguments,
        shared=simt_shared_bytes(macros, p.pool_blocks), reverse=reverse, **macros,
    )  # fmt: skip
    shape = out.shape[:-1]
    return out, lse.reshape(shape), tiles.reshape(*shape[:2], -1), blocks.reshape(*shape[:2], -1), mass.reshape(shape)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        ("float32", {"tau": 0.3}),
        ("float64", {"tau": 0.3, "query_order": "guide", "cap": 0.6}),
        ("float64", {"tau": 0.0, "tail": None, "causal": False}),
        ("float64", {"tau": 0.5, "causal": False}),
        ("float64", {"tau": 0.5, "tail": "spread", "query_order": "guide"}),
    ],
)
def test_attend_is_the_reference(dtype, settings, reverse):
    s = Settings(**{"segment": 48, "block_q": 32, "block_k": 16, "pool": 16, "rank_terms": 3, **settings})
    p = Problem(1, 2, 1, 90, 130, 12, 7, dtype, s)
    rng = np.random.default_rng(7)
    q, k, v = (rng.standard_normal((1, h, n, d)).astype(dtype) for h, n, d in ((2, 90, 12), (1, 130, 12), (1, 130, 7)))
    q[0, 1, 40, 2], v[0, 0, 125, 3] = np.nan, np.inf
    order, offsets, query_order = reference.plan(p, q, k)
    with np.errstate(invalid="ignore"):
        want = reference.attend(p, q, k, v, order, offsets, query_order)
    out, lse, tiles, blocks, mass = attend(p, q, k, v, order, offsets, query_order, reverse)
    np.testing.assert_array_equal(tiles, want.tiles)
    np.testing.assert_array_equal(blocks, want.tail_blocks)
    good = np.isfinite(want.out).all(axis=-1)
    np.testing.assert_array_equal(np.isfinite(out).all(axis=-1), good)
    tolerance = 3e-5 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(out[good], want.out[good], atol=tolerance)
    np.testing.assert_allclose(lse[good], want.lse[good], atol=tolerance)
    np.testing.assert_allclose(mass[good], want.tail_mass[good], atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("window", [1, 7, 33, 100, 129, 130, 500])
def test_dense_attention_with_a_window_is_the_reference(window, reverse):
    p = Problem(1, 2, 1, 90, 130, 12, 7, "float64", Settings(window=window, segment=90, block_q=64))
    rng = np.random.default_rng(8)
    q, k, v = (rng.standard_normal((1, h, n, d)) for h, n, d in ((2, 90, 12), (1, 130, 12), (1, 130, 7)))
    q[0, 1, 40, 2], k[0, 0, 0, 1], v[0, 0, 60, 3] = np.nan, np.inf, np.inf
    with np.errstate(invalid="ignore"):
        want, want_lse = reference.dense(p, q, k, v)
    out, lse, *_ = attend(p, q, k, v, None, None, None, reverse)
    good = np.isfinite(want).all(axis=-1)
    np.testing.assert_array_equal(np.isfinite(out).all(axis=-1), good)
    np.testing.assert_allclose(out[good], want[good], atol=1e-12)
    np.testing.assert_allclose(lse[good], want_lse[good], atol=1e-12)
