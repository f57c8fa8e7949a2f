"""Stage 1's plain kernels and the covariance factor from their own source on the CPU, against the reference."""

import numpy as np
import pytest

from s2o_cupy import reference
from s2o_cupy.problem import Problem
from s2o_cupy.settings import Settings

from . import run

pytestmark = pytest.mark.skipif(run.compiler() is None, reason="needs g++")


def scores(p, q, k, reverse):
    """All lists' scores, (order heads, segments) of arrays."""
    real = {"float32": "float", "float64": "double"}[p.dtype]
    heads, segments, dim, terms = p.heads_order * p.batch, p.segments, p.dim_qk, p.terms
    lists, full = heads * segments, p.settings.rank_terms is None and terms > 0
    per_list = dim if full else 1 + terms
    total, count = np.full((lists, dim), np.nan, np.float32), np.full(lists, -1, np.int32)
    moment = np.full((lists, dim, dim), np.nan, np.float32) if terms else None
    rows = np.full((lists, per_list, dim), np.nan, p.dtype)
    mean = np.full((lists, dim), np.nan, np.float32) if full else None
    strides = [tuple(s // x.itemsize for s in x.strides[:3]) for x in (q, k)]
    sizes = (p.heads_order, p.group // p.orders, 0, p.n_q, dim, p.settings.segment, 0)
    run.launch(
        "score_simt", (segments, heads, (-(-dim // 32)) ** 2 if terms else 1), 256,
        (q, *strides[0], total, count, moment, *sizes), entry="moments", reverse=reverse, REAL=real,
    )  # fmt: skip
    floats = 2 * dim if full else 2 * terms * (dim + 1) + terms**2 + 2 * dim + 2 * terms + 16
    run.launch(
        "factor", (lists,), 128, (total, count, moment, rows, mean, dim, dim, terms, per_list, 1, int(full), p.scale),
        shared=4 * floats, reverse=reverse, REAL=real,
    )  # fmt: skip
    starts = np.concatenate([[0], np.cumsum(-(-p.history // 64) * 64)]).astype(np.int64)
    found = np.full((heads, starts[-1]), np.nan, np.float32)
    arguments = (k, *strides[1], rows, mean, p.history.astype(np.int32), starts, found)
    run.launch(
        "score_simt", (-(-int(p.history.max()) // 32), segments, heads), 256,
        (*arguments, p.heads_kv, 0, dim, segments, per_list, p.orders),
        entry="score", shared=(32 * (dim + 1) + 256) * np.dtype(p.dtype).itemsize, reverse=reverse, REAL=real,
    )  # fmt: skip
    return [[row[a : a + n] for a, n in zip(starts[:-1], p.history)] for row in found]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "settings",
    [{"rank": "mean"}, {"rank_terms": 3}, {"rank_terms": 7, "share_order": True}, {"rank_terms": None}],
)
def test_scores_are_the_reference(settings, dtype, reverse):
    s = Settings(**{"segment": 40, "pool": 16, **settings})
    p = Problem(1, 2, 1, 100, 130, 20, 20, dtype, s)
    rng = np.random.default_rng(11)
    mix = rng.standard_normal((20, 20)) * np.exp(rng.standard_normal(20))
    q = (rng.standard_normal((1, 2, 100, 20)) @ mix / 4 + rng.standard_normal((1, 2, 1, 20))).astype(dtype)
    k = rng.standard_normal((1, 1, 130, 20)).astype(dtype)
    q[0, 1, 50, 3] = np.nan
    found = scores(p, q, k, reverse)
    for head, segment in np.ndindex(p.heads_order, p.segments):
        want = reference.score(p, q.astype(np.float64), k.astype(np.float64), 0, head, segment)
        spread = max(np.ptp(want), 1e-9) if len(want) else 1
        np.testing.assert_allclose(found[head][segment], want, atol=2e-5 * spread)


@pytest.mark.parametrize("kind", ["constant", "one direction"])
def test_degenerate_covariances(kind):
    """Queries of rank 0 or 1: the factors that do not exist are empty, not noise."""
    p = Problem(1, 1, 1, 64, 64, 8, 8, "float32", Settings(segment=32, pool=16, rank_terms=5))
    rng = np.random.default_rng(3)
    q = np.ones((1, 1, 64, 8), np.float32)
    if kind == "one direction":
        q += rng.standard_normal((1, 1, 64, 1)).astype(np.float32) * np.arange(8, dtype=np.float32)
    k = rng.standard_normal((1, 1, 64, 8)).astype(np.float32)
    want = reference.score(p, q.astype(np.float64), k.astype(np.float64), 0, 0, 1)
    np.testing.assert_allclose(scores(p, q, k, False)[0][1], want, atol=1e-4 * np.ptp(want))
