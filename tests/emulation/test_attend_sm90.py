"""The Hopper attend kernel from its own source on the CPU, in two thread orders, against the reference."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import rounding

from s2o_cupy import reference
from s2o_cupy.iterate import emulation as run
from s2o_cupy.problem import Problem
from s2o_cupy.settings import Settings
from s2o_cupy.specialisations import sm90_macros, sm90_shared_bytes

from . import attending

pytestmark = pytest.mark.skipif(run.compiler() is None, reason="needs g++")


def attend(p, q, k, v, order, offsets, reverse, query_order=None, edit=None):
    """By two blocks: each takes several row tiles."""
    macros = sm90_macros(p.dtype, p.dim_qk, p.dim_v, p.settings.block_k)
    how = {"aligned": 15, "shared": sm90_shared_bytes(macros, p.pool_blocks), "macros": macros, "reverse": reverse}
    how |= {"more": (p.batch * p.heads_kv, np.zeros(1, np.int32)), "edit": edit}
    return attending.attend("attend_sm90", (2,), 384, p, q, k, v, order, offsets, query_order, **how)


def arrays(p, scale):
    rng = np.random.default_rng(7)
    dtype = np.float16 if p.dtype == "float16" else ml_dtypes.bfloat16
    sizes = ((p.heads_q, p.n_q, p.dim_qk), (p.heads_kv, p.n_k, p.dim_qk), (p.heads_kv, p.n_k, p.dim_v))
    q, k, v = (rng.standard_normal((1, *size)) for size in sizes)
    return [x.astype(dtype) for x in (scale * q, k, v)]


def agree(p, want, out, lse, tiles, blocks, mass):
    np.testing.assert_array_equal(tiles, want.tiles)
    np.testing.assert_array_equal(blocks, want.tail_blocks)
    rounding.check_answer(p, SimpleNamespace(out=out, lse=lse, tail_mass=mass), want)


def wanted(p, q, k, v, order, offsets, query_order=None):
    steps = rounding.steps_of(p, "sm_90a", query_order is not None)
    return rounding.attend(p, q, k, v, order, offsets, query_order, **steps)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(
    ("dims", "scale", "settings"),
    [
        (
            (64, 64),
            1,
            {"tau": 2.0},
        ),  # stops after the first tile of a step and after the second, with a tail and without
        ((64, 64), 1, {"tau": 0.9, "causal": False}),
        ((64, 64), 2, {"tau": 0.8, "causal": False, "tail": None}),
        ((64, 64), 1, {"tau": 0.0, "cap": 0.7}),
        ((64, 64), 1, {"tau": 3.0, "block_k": 192}),  # a tile ends where the first part of a step does
        ((64, 64), 1, {"tau": 2.0, "block_k": 128}),
        ((64, 64), 1, {"tau": 9.0, "block_k": 256}),  # a tile of two steps: the one after its end does not close one
        ((128, 128), 4, {"tau": 2.0, "causal": False}),
        ((192, 128), 1, {"tau": 2.0}),  # steps of 64 keys
        ((64, 64), 1, {"tau": 2.0, "tail": "spread"}),
    ],
)
def test_attend_is_the_reference(dims, scale, settings, reverse):
    s = Settings(**{"segment": 192, "pool": 64, "rank": "mean", "block_k": 64, **settings})
    p = Problem(1, 2, 1, 384, 700, *dims, "float16" if scale == 2 else "bfloat16", s)
    q, k, v = arrays(p, scale)
    q[0, 1, 40, 2], v[0, 0, 690, 3] = np.nan, np.inf
    wide = [x.astype(np.float64) for x in (q, k, v)]
    order, offsets, _ = reference.plan(p, *wide[:2])
    want = wanted(p, *wide, order, offsets)
    if s.block_k == 64 and s.tau:
        assert (want.tiles % 2 == 1).any(), "no row tile stops within a step"
    agree(p, want, *attend(p, q, k, v, order, offsets, reverse))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(
    ("group", "dims", "settings"),
    [
        (2, (64, 64), {"tau": 2.0}),
        (2, (64, 64), {"tau": (2.0, 1.0), "tail": "spread"}),
        (3, (64, 64), {"tau": 2.0}),  # the last one alone
        (2, (64, 64), {"tau": (0.0, 3.0)}),  # one walks to the end, and then the other one
        (2, (64, 64), {"tau": (3.0, 0.0), "causal": False}),
        (2, (64, 64), {"tau": (0.6, 2.0), "causal": False, "tail": None}),
        (3, (64, 64), {"tau": 2.0, "block_k": 128, "query_order": "guide"}),
        (2, (64, 64), {"tau": (2.0, 1.0), "block_k": 192, "block_q": 24}),  # several ragged tiles of a segment
        (2, (128, 128), {"tau": (3.0, 1.0), "cap": 0.8}),
        (2, (192, 128), {"tau": (1.0, 3.0), "causal": False}),  # steps of 64 keys
    ],
)
def test_two_row_tiles_of_a_list_are_the_reference(group, dims, settings, reverse):
    chosen = {"segment": 50, "block_q": 64, "pool": 32, "rank": "mean", "block_k": 64, "share_order": True, **settings}
    if isinstance(chosen["tau"], tuple):
        chosen["tau"] *= 2
    s = Settings(**chosen)
    p = Problem(1, 2 * group, 2, 130, 700, *dims, "bfloat16", s)  # segments of 50, 50 and 30 queries
    q, k, v = arrays(p, 1)
    q[0, 1, 40, 2], v[0, 0, 690, 3] = np.nan, np.inf
    q[0, group, 50:100, 5] = np.inf  # a whole row tile without a vote
    wide = [x.astype(np.float64) for x in (q, k, v)]
    order, offsets, query_order = reference.plan(p, *wide[:2])
    want = wanted(p, *wide, order, offsets, query_order)
    beside = want.tiles.reshape(2, group, -1)
    assert (beside[:, 0] < beside[:, 1]).any() or (beside[:, 0] > beside[:, 1]).any(), "none stops before the other one"
    answers = attend(p, q, k, v, order, offsets, reverse, query_order=query_order)
    agree(p, want, *answers)


@pytest.mark.parametrize("block_q", [32, 128])
def test_a_slow_producer_still_brings_the_values_of_the_step_that_stopped(block_q):
    def slower(source):
        opened = "const unsigned int values_to = producer.open();"
        assert source.count(opened) == 1
        return source.replace(opened, f"{opened} for (int i = 0; i < 400; ++i) s2o_emulation::yield();")

    s = Settings(segment=64, block_q=block_q, block_k=128, pool=64, rank="mean", tau=1e9, cap=0.2, share_order=True)
    p = Problem(1, 2, 1, 128, 700, 64, 64, "bfloat16", s)
    q, k, v = arrays(p, 1)
    wide = [x.astype(np.float64) for x in (q, k, v)]
    order, offsets, _ = reference.plan(p, *wide[:2])
    want = wanted(p, *wide, order, offsets)
    assert (want.tiles == 1).all(), "a list is one key tile, which stops the walk as the list ends"
    agree(p, want, *attend(p, q, k, v, order, offsets, False, edit=slower))


@pytest.mark.parametrize("block_q", [40, 128])
@pytest.mark.parametrize("window", [None, 33, 129])
def test_dense_attention_is_the_reference(window, block_q):
    s = Settings(window=window, segment=200, block_k=128, block_q=block_q)
    p = Problem(1, 2, 1, 200, 300, 64, 64, "bfloat16", s)
    q, k, v = arrays(p, 1)
    q[0, 1, 40, 2], v[0, 0, 160, 3] = np.nan, np.inf
    want = rounding.dense(p, q, k, v, block_q, step=128, across=False)
    out, lse, *_ = attend(p, q, k, v, None, None, False)
    rounding.check_answer(p, SimpleNamespace(out=out, lse=lse), want)


@pytest.mark.parametrize("causal", [False, True])
def test_a_query_all_of_whose_logits_are_minus_infinity_is_not_a_number(causal):
    s = Settings(segment=64, block_k=128, pool=64, rank="mean", tau=2.0, causal=causal)
    p = Problem(1, 2, 1, 128, 700, 64, 64, "bfloat16", s)
    q, k, v = arrays(p, 1)
    k[..., 2] = 1 + np.abs(k[..., 2])
    q[0, 1, 40, 2] = -np.inf
    wide = [x.astype(np.float64) for x in (q, k, v)]
    order, offsets, _ = reference.plan(p, *wide[:2])
    want = wanted(p, *wide, order, offsets)
    assert np.isnan(want.out[0, 1, 40]).all()
    assert np.isnan(want.out).all(axis=-1).sum() == 1
    agree(p, want, *attend(p, q, k, v, order, offsets, False))
