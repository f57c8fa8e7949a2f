"""The float32/float64 attend kernel from its own source on the CPU, in two thread orders, against the reference."""

import numpy as np
import pytest

from s2o_cupy import reference
from s2o_cupy.iterate import emulation as run
from s2o_cupy.problem import Problem
from s2o_cupy.settings import Settings
from s2o_cupy.specialisations import simt_macros, simt_shared_bytes

from . import attending

pytestmark = pytest.mark.skipif(run.compiler() is None, reason="needs g++")


def attend(p, q, k, v, order, offsets, query_order, reverse):
    macros = simt_macros(p.dtype, p.dim_v)
    how = {"aligned": 0, "shared": simt_shared_bytes(macros, p.pool_blocks), "macros": macros, "reverse": reverse}
    grid = len(p.tile_start) * p.group, p.batch * p.heads_kv
    return attending.attend("attend_simt", grid, 256, p, q, k, v, order, offsets, query_order, **how)


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
