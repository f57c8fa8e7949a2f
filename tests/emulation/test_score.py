"""Stage 1 from its own source and launches on the CPU, tensor cores emulated, against the reference."""

import numpy as np
import pytest
import rounding

from s2o_cupy import reference, specialisations
from s2o_cupy.iterate import emulation as run
from s2o_cupy.problem import Problem
from s2o_cupy.settings import Settings

from .backend import emulated

pytestmark = pytest.mark.skipif(run.compiler() is None, reason="needs g++")
RANKS = [
    {"rank": "mean"},
    {"rank_terms": 3},
    {"rank_terms": 7, "share_order": True},
    {"rank_terms": None},
    {"rank": "mixture", "rank_terms": 5},
    {"rank": "mixture", "rank_terms": 40, "share_order": True},
    {"rank": "mixture", "rank_terms": None, "causal": False},
]


def inputs(p, seed=11):
    rng, kind = np.random.default_rng(seed), rounding.DTYPES[p.dtype]
    mix = rng.standard_normal((p.dim_qk, p.dim_qk)) * np.exp(rng.standard_normal(p.dim_qk)) / p.dim_qk**0.5
    q = rng.standard_normal((p.batch, p.heads_q, p.n_q, p.dim_qk)) @ mix
    q += rng.standard_normal((p.batch, p.heads_q, 1, p.dim_qk))
    return q.astype(kind), rng.standard_normal((p.batch, p.heads_kv, p.n_k, p.dim_qk)).astype(kind)


def scores(engine, p, q, k, slab=None):
    """Scores of a slab's lists, (order heads, segments) of arrays, float64; nothing is written past an end."""
    slab = slab or p.whole
    with np.errstate(over="ignore"):
        found = engine.backend.score(p, engine.place(q), engine.place(k), slab)
    assert engine.guards.broken() == []
    rows = found.data.reshape((slab.kv_stop - slab.kv_start) * p.orders, -1)
    return [[row[a : a + n].astype(np.float64) for a, n in zip(found.starts[:-1], found.history)] for row in rows]


def check(engine, p, q, k):
    found = scores(engine, p, q, k)
    wanted = [rounding.score(p, q, k, *place) for place in np.ndindex(p.batch, p.heads_order, p.segments)]
    rounding.check_scores(p, [scores for row in found for scores in row], wanted)


@pytest.mark.parametrize(
    ("dtype", "reverse"),
    [("float16", False), ("float16", True), ("bfloat16", False), ("float32", True), ("float64", False)],
)
@pytest.mark.parametrize("settings", RANKS, ids=str)
def test_scores_are_the_reference(monkeypatch, settings, dtype, reverse):
    s = Settings(**{"segment": 40, "pool": 16, **settings})
    p = Problem(1, 2, 1, 100, 130, 20, 20, dtype, s)
    q, k = inputs(p)
    q[0, 1, 50, 3] = np.nan
    check(emulated(monkeypatch, reverse), p, q, k)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("dim", [64, 100, 256])
@pytest.mark.parametrize("rank", ["gaussian", "mixture"])
def test_wide_heads(monkeypatch, rank, dim, arch):
    """Each compiled width, several key tiles, two K/V heads and batches."""
    p = Problem(2, 2, 2, 40, 300, dim, dim, "bfloat16", Settings(segment=32, pool=32, rank=rank, rank_terms=15))
    check(emulated(monkeypatch, arch=arch), p, *inputs(p))


@pytest.mark.parametrize(
    ("dtype", "dim", "terms", "segment"),
    [
        ("bfloat16", 128, 15, 16),
        ("float16", 40, 7, 16),
        ("float16", 64, 31, 16),
        ("bfloat16", 70, 60, 16),
        ("bfloat16", 128, 0, 4),
        ("float16", 40, 0, 100),
        ("float16", 256, 15, 16),
        ("bfloat16", 200, 7, 16),
        ("float16", 130, 60, 16),
        ("float16", 256, 0, 4),
    ],
)
def test_hopper_scores_are_the_reference(monkeypatch, dtype, dim, terms, segment):
    """The `wgmma` kernel: every number of rows a list (0 terms: the mean), several chunks, more of them than stages."""
    rank = {"rank_terms": terms} if terms else {"rank": "mean"}
    p = Problem(1, 2, 1, 280, 300, dim, dim, dtype, Settings(segment=segment, pool=min(segment, 16), **rank))
    q, k = inputs(p)
    q[0, 1, 50, 3] = np.nan
    check(emulated(monkeypatch, arch="sm_90a"), p, q, k)


@pytest.mark.parametrize("rank", ["gaussian", "mixture"])
def test_hopper_key_tiles_of_another_size(monkeypatch, rank):
    """The backend's launches follow TILE_KEYS."""
    p = Problem(1, 2, 1, 280, 300, 64, 64, "float16", Settings(segment=40, pool=16, rank=rank, rank_terms=15))
    macros = specialisations.score_sm90_macros("float16", 64) | {"TILE_KEYS": 192}
    monkeypatch.setattr(specialisations, "score_sm90_macros", lambda dtype, dim: macros)
    check(emulated(monkeypatch, arch="sm_90a"), p, *inputs(p))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("rank", ["gaussian", "mixture"])
def test_slabs_score_alike(monkeypatch, rank, dtype):
    """A list's scores are bitwise the same alone and among others, and from run to run."""
    p = Problem(1, 4, 2, 100, 140, 24, 24, dtype, Settings(segment=32, pool=16, rank=rank, rank_terms=7))
    engine, (q, k) = emulated(monkeypatch), inputs(p)
    whole = scores(engine, p, q, k)
    for slab in p.split(p.whole, 2000, "history"):
        for head, row in enumerate(scores(engine, p, q, k, slab)):
            for segment, got in enumerate(row):
                want = whole[slab.kv_start * p.orders + head][slab.segment_start + segment]
                np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_more_lists_than_threads(monkeypatch, arch):
    p = Problem(1, 1, 1, 330, 360, 16, 16, "float16", Settings(segment=1, pool=1, rank_terms=7))
    check(emulated(monkeypatch, arch=arch), p, *inputs(p))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(("dim", "terms"), [(64, 31), (100, 70), (256, 31)])
def test_sums_in_parts(monkeypatch, dim, terms, arch):
    """The mixture's sums over histories of several parts, some of them of one part only."""
    p = Problem(1, 2, 1, 150, 300, dim, dim, "float16", Settings(segment=50, pool=2, rank="mixture", rank_terms=terms))
    engine = emulated(monkeypatch, arch=arch)
    monkeypatch.setattr(engine.backend, "PART_KEYS", 64)
    check(engine, p, *inputs(p))


@pytest.mark.parametrize(("dtype", "dim"), [("float16", 256), ("float64", 100)])
def test_more_queries_and_centres_than_a_block_holds(monkeypatch, dtype, dim):
    settings = Settings(segment=180, pool=4, rank="mixture", rank_terms=40, share_order=True)
    p = Problem(1, 3, 1, 190, 200, dim, dim, dtype, settings)
    q, k = inputs(p)
    q[0, 1, 7:30] = np.inf
    check(emulated(monkeypatch), p, q, k)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_a_segment_without_a_finite_query_keeps_its_keys_in_order(monkeypatch, dtype):
    p = Problem(1, 1, 1, 64, 64, 8, 8, dtype, Settings(segment=32, pool=16, rank="mixture", rank_terms=4))
    q, k = inputs(p)
    q[0, 0, 32:] = np.nan
    found = scores(emulated(monkeypatch), p, q, k)[0][1]
    np.testing.assert_allclose(found, -np.log(32), rtol=1e-3)
    assert np.ptp(found) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_equal_queries_are_one_centre(monkeypatch, dtype):
    """The centres that nobody joins count for nothing."""
    p = Problem(1, 1, 1, 64, 64, 8, 8, dtype, Settings(segment=32, pool=16, rank="mixture", rank_terms=6))
    q, k = inputs(p)
    q[...] = q[:, :, :1]
    check(emulated(monkeypatch), p, q, k)


@pytest.mark.parametrize("kind", ["constant", "one direction"])
def test_degenerate_covariances(monkeypatch, kind):
    """Queries of rank 0 or 1: the factors that do not exist are empty, not noise."""
    p = Problem(1, 1, 1, 64, 64, 8, 8, "float32", Settings(segment=32, pool=16, rank_terms=5))
    rng = np.random.default_rng(3)
    q = np.ones((1, 1, 64, 8), np.float32)
    if kind == "one direction":
        q += rng.standard_normal((1, 1, 64, 1)).astype(np.float32) * np.arange(8, dtype=np.float32)
    k = rng.standard_normal((1, 1, 64, 8)).astype(np.float32)
    want = reference.score(p, q.astype(np.float64), k.astype(np.float64), 0, 0, 1)
    np.testing.assert_allclose(scores(emulated(monkeypatch), p, q, k)[0][1], want, atol=1e-4 * np.ptp(want))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("settings", [{"rank": "mean"}, {"rank_terms": 7}, {"rank": "mixture"}], ids=str)
def test_a_bad_key_past_the_history_changes_no_score(monkeypatch, settings, arch):
    """In the same chunk of keys as the history's last ones: the mixture's sums once took it in."""
    p = Problem(1, 1, 1, 20, 20, 8, 8, "float16", Settings(segment=8, pool=1, **settings))
    engine, (q, k) = emulated(monkeypatch, arch=arch), inputs(p)
    before = scores(engine, p, q, k)[0]
    for bad in (np.nan, np.inf):
        k[0, 0, 9, 3] = bad
        np.testing.assert_array_equal(scores(engine, p, q, k)[0][1], before[1])
