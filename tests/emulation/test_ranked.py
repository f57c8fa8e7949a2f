"""Whole calls by the CUDA backend's own launches, emulated: one tape gives what the stages give one by one."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import rounding

from s2o_cupy import reference
from s2o_cupy.iterate import emulation as run
from s2o_cupy.problem import Problem
from s2o_cupy.settings import Settings

from .backend import emulated

pytestmark = pytest.mark.skipif(run.compiler() is None, reason="needs g++")


@pytest.mark.parametrize(("workspace", "tail"), [(1, "pooled"), (2500, "spread"), (2**30, "pooled")])
def test_a_whole_call_is_its_stages(monkeypatch, workspace, tail):
    s = Settings(segment=32, pool=16, block_q=16, block_k=16, rank_terms=3, tau=(0.3, 0.1, 0.2, 0.05), tail=tail)
    p = Problem(2, 4, 2, 90, 100, 12, 7, "float32", s)
    rng = np.random.default_rng(5)
    q, k, v = (
        rng.standard_normal((2, h, n, d)).astype(np.float32) for h, n, d in ((4, 90, 12), (2, 100, 12), (2, 100, 7))
    )
    engine = emulated(monkeypatch)
    device, cuda, done = [engine.place(x) for x in (q, k, v)], engine.backend, []
    monkeypatch.setattr(cuda, "SCORE_BYTES", 1500)  # several parts
    order, offsets = engine.guards.empty(int(p.offsets(p.whole)[-1, -1]), np.int32), engine.place(p.offsets(p.whole))
    cuda.rank(p, *device[:2], p.whole, offsets, order)
    alone = engine.attend(p, *device, engine.host(order), engine.host(offsets), None)
    whole = engine.answer(p)
    cuda.ranked(p, *device, None, whole, workspace, done.append)
    steps = p.split(p.whole, workspace, "listed")
    assert done == np.cumsum([slab.size for slab in steps]).tolist()
    assert (len(steps) > 1) == (workspace < 2**30)
    for name, x in vars(whole).items():
        np.testing.assert_array_equal(engine.host(x), getattr(alone, name), err_msg=name)
    bare = engine.answer(p)
    bare.lse = bare.tiles = bare.tail_blocks = bare.tail_mass = None
    cuda.ranked(p, *device, None, bare, workspace)
    np.testing.assert_array_equal(engine.host(bare.out), alone.out)
    assert engine.guards.broken() == []
    want = reference.attend(p, q, k, v, engine.host(order), p.offsets(p.whole).reshape(2, 4, -1))
    np.testing.assert_allclose(alone.out, want.out, atol=3e-5)


@pytest.mark.parametrize("workspace", [2500, 2**30])
def test_row_tiles_side_by_side_on_hopper(monkeypatch, workspace):
    """Groups of three query heads, two and then one in a block; a slab starts where it starts."""
    chosen = {"segment": 32, "pool": 16, "block_q": 32, "block_k": 64, "rank": "mean", "share_order": True}
    s = Settings(**chosen, tau=(1.0, 0.3, 0.0, 0.5, 2.0, 0.5))
    p = Problem(2, 6, 2, 90, 300, 64, 64, "bfloat16", s)
    rng = np.random.default_rng(6)
    q, k, v = (rng.standard_normal((2, h, n, 64)).astype(ml_dtypes.bfloat16) for h, n in ((6, 90), (2, 300), (2, 300)))
    engine = emulated(monkeypatch, arch="sm_90a")
    device, cuda, launched = [engine.place(x) for x in (q, k, v)], engine.backend, []
    monkeypatch.setattr(cuda, "_processors", lambda device: 3)
    monkeypatch.setattr(cuda, "get_kernel", lambda name, *a, **m: launched.append(name) or engine.kernel(name, *a, **m))
    order, offsets = engine.guards.empty(int(p.offsets(p.whole)[-1, -1]), np.int32), engine.place(p.offsets(p.whole))
    cuda.rank(p, *device[:2], p.whole, offsets, order)
    whole = engine.answer(p)
    cuda.ranked(p, *device, None, whole, workspace)
    assert len(p.split(p.whole, workspace, "listed")) == (1 if workspace == 2**30 else launched.count("attend_sm90"))
    assert "attend" not in launched
    assert (workspace < 2**30) == (launched.count("attend_sm90") > 1)
    assert engine.guards.broken() == []
    steps = rounding.steps_of(p, "sm_90a")
    want = rounding.attend(p, q, k, v, engine.host(order), p.offsets(p.whole), **steps)
    np.testing.assert_array_equal(engine.host(whole.tiles), want.tiles)
    np.testing.assert_array_equal(engine.host(whole.tail_blocks), want.tail_blocks)
    rounding.check_answer(p, SimpleNamespace(**{name: engine.host(x) for name, x in vars(whole).items()}), want)


@pytest.mark.parametrize(
    ("arch", "cap", "alone", "whole"),
    [("sm_90a", 1.0, 3, 2), ("sm_90a", 0.5, 3, 3), ("sm_90a", 0.25, 4, 3), ("sm_80", 1.0, 3, 2)],
)
def test_scores_lie_where_an_order_will(monkeypatch, arch, cap, alone, whole):
    """Parts of several K/V heads while what later heads fill of the order holds their scores, then small ones, whose
    scores a whole call has behind its order."""
    scored = "score_means_64" if arch == "sm_90a" else "score_1"
    p = Problem(2, 4, 2, 160, 192, 64, 64, "float16", Settings(segment=32, pool=64, rank="mean", cap=cap))
    head = 4 * 2 * int(p.history.sum())
    made = [ranked(monkeypatch, p, part, arch) for part in (2**28, head)]  # all in one, a K/V head
    for (order, call, _), (other_order, other_call, _) in [made]:
        np.testing.assert_array_equal(order, other_order)
        np.testing.assert_array_equal(call, other_call)
    assert [launched.count(scored) for _, _, launched in made] == [1 + 1, alone + whole]
    assert [launched.count("means_64") for _, _, launched in made] == [2, 2]


@pytest.mark.parametrize("terms", [15, 7])
def test_representatives_are_made_once(monkeypatch, terms):
    """Also where one K/V head's scores are too many: a run of segments begins where a chunk of 64 rows does."""
    p = Problem(1, 4, 2, 128, 128, 64, 64, "float16", Settings(segment=8, pool=16, rank_terms=terms, cap=0.5))
    head = 4 * 2 * int(p.history.sum())
    made = [ranked(monkeypatch, p, part) for part in (2**28, head * 4 // 5)]
    for (order, call, _), (other_order, other_call, _) in [made]:
        np.testing.assert_array_equal(order, other_order)
        np.testing.assert_array_equal(call, other_call)
    scored = [sum(entry.startswith("score_") for entry in launched) for _, _, launched in made]
    assert [launched.count("factors_64") for _, _, launched in made] == [2, 2]
    assert scored == [2, 4 + 3]  # two runs of each of two K/V heads; in a whole call the first head is one part


def ranked(monkeypatch, p, part: int, arch: str = "sm_90a"):
    """The order of all lists, a whole call's answer, and what both launched; `part`: SCORE_BYTES."""
    rng, launched = np.random.default_rng(7), []
    engine = emulated(monkeypatch, arch=arch)
    q, k, v = (
        engine.place(rng.standard_normal((p.batch, h, n, 64)).astype(np.float16))
        for h, n in ((p.heads_q, p.n_q), (p.heads_kv, p.n_k), (p.heads_kv, p.n_k))
    )
    cuda, kernel = engine.backend, engine.kernel
    monkeypatch.setattr(cuda, "SCORE_BYTES", part)
    monkeypatch.setattr(cuda, "_processors", lambda device: 3)
    monkeypatch.setattr(
        cuda,
        "get_kernel",
        lambda name, entry=None, *a, **m: launched.append(entry or name) or kernel(name, entry, *a, **m),
    )
    order, call = engine.guards.empty(int(p.offsets(p.whole)[-1, -1]), np.int32), engine.answer(p)
    cuda.rank(p, q, k, p.whole, engine.place(p.offsets(p.whole)), order)
    cuda.ranked(p, q, k, v, None, call, 2**30)
    assert engine.guards.broken() == []
    return engine.host(order), engine.host(call.out), launched
