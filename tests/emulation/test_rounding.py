"""16-bit answers beside the rounded reference, tensor cores emulated: a rounding more, less or otherwise shows."""

from types import SimpleNamespace

import numpy as np
import pytest
import rounding

import s2o_cupy as s2o
from s2o_cupy import reference
from s2o_cupy.iterate import emulation as run
from s2o_cupy.problem import Problem
from s2o_cupy.settings import Settings
from s2o_cupy.sources import current

from .backend import emulated
from .test_score import inputs

pytestmark = pytest.mark.skipif(run.compiler() is None, reason="needs g++")
TAIL = {"segment": 128, "pool": 32, "rank": "mean", "tau": 2.0}


def case(dtype, settings, heads=1):
    """One row tile of each head, its plan, and room for it in float64."""
    p = Problem(1, heads, 1, 70, 500, 64, 64, dtype, Settings(**{**TAIL, **settings}))
    rng = np.random.default_rng(3)
    q, k, v = (
        rng.standard_normal((1, h, n, 64)).astype(rounding.DTYPES[dtype]) for h, n in ((heads, 70), (1, 500), (1, 500))
    )
    order, offsets, _ = reference.plan(p, q, k)
    return p, (q, k, v), order, offsets


def answered(engine, p, arrays, order, offsets):
    engine.backend._processors = lambda device: 2
    got = engine.attend(p, *map(engine.place, arrays), order, offsets, None)
    assert engine.guards.broken() == []
    return got


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("dtype", rounding.HALVES)
@pytest.mark.parametrize("settings", [{}, {"block_k": 128, "causal": False}], ids=str)
def test_answers_round_as_the_reference(monkeypatch, settings, dtype, arch):
    p, arrays, order, offsets = case(dtype, settings)
    got, steps = answered(emulated(monkeypatch, arch=arch), p, arrays, order, offsets), rounding.steps_of(p, arch)
    want = rounding.attend(p, *arrays, order, offsets, **steps)
    assert want.tail_blocks.all()
    np.testing.assert_array_equal(got.tiles, want.tiles)
    np.testing.assert_array_equal(got.tail_blocks, want.tail_blocks)
    rounding.check_answer(p, got, want)

    allowed = rounding.TOLERANCE["out"][dtype]
    for less in ({"weights": False}, {"means": False}, {"step": steps["step"] // 2}):
        other = rounding.attend(p, *arrays, order, offsets, **{**steps, **less})
        assert rounding.miss(got.out, other.out, dtype) > 1.5 * allowed, less
    if dtype == "bfloat16":  # of float16 means the rounding is no larger than float32's
        lse = rounding.attend(p, *arrays, order, offsets, **steps, means=False).lse
        assert np.abs(got.lse - lse).max() > 1.5 * rounding.TOLERANCE["lse"][dtype]


ONCE = "pack_halves(pair[0] * inverse, pair[1] * inverse)"
TWICE = "pack_halves(half_to_float(float_to_half(pair[0])) * inverse, half_to_float(float_to_half(pair[1])) * inverse)"
WEIGHTS = "weights[2 * j + h] = pack_halves(p[4 * j + 2 * h], p[4 * j + 2 * h + 1]);"
LESS = "IS_BF16 ? 1.f - 0x1p-10f : 1.f - 0x1p-13f"
LOW = WEIGHTS.replace("2 * h]", f"2 * h] * ({LESS})").replace("2 * h + 1]", f"2 * h + 1] * ({LESS})")


@pytest.mark.parametrize("dtype", rounding.HALVES)
@pytest.mark.parametrize(
    ("once", "other"),
    [
        (ONCE, TWICE),
        (WEIGHTS, LOW),
    ],
    ids=["answers rounded twice", "weights a quarter of a unit low"],
)
def test_a_kernel_that_rounds_otherwise_fails(monkeypatch, once, other, dtype):
    p, arrays, order, offsets = case(dtype, {})
    source, engine = current("attend_sm90").text, emulated(monkeypatch, arch="sm_90a")
    assert source.count(once) == 1
    with s2o.use_kernel("attend_sm90", source.replace(once, other)):
        got = answered(engine, p, arrays, order, offsets)
    want = rounding.attend(p, *arrays, order, offsets, **rounding.steps_of(p, "sm_90a"))
    with pytest.raises(AssertionError):
        rounding.check_answer(p, got, want)


@pytest.mark.parametrize("dtype", rounding.HALVES)
@pytest.mark.parametrize("rank", [{"rank": "mean"}, {"rank_terms": 7}, {"rank": "mixture", "rank_terms": 5}], ids=str)
def test_scores_without_a_rounding_fail(monkeypatch, rank, dtype):
    p = Problem(1, 1, 1, 128, 400, 64, 64, dtype, Settings(segment=128, pool=32, **rank))
    q, k = inputs(p)
    engine = emulated(monkeypatch, arch="sm_90a")
    found = engine.scores(p, engine.place(q), engine.place(k))
    got = [np.asarray(found(0, 0))]
    rounding.check_scores(p, got, [rounding.score(p, q, k, 0, 0, 0)])
    with pytest.raises(AssertionError):
        rounding.check_scores(p, got, [rounding.score(p, q, k, 0, 0, 0, rows=False)])


@pytest.mark.parametrize("dtype", rounding.HALVES)
def test_pool_means_are_rounded_once(monkeypatch, dtype):
    p, (_, k, v), *_ = case(dtype, {})
    engine = emulated(monkeypatch)
    for got, x in zip(engine.pool(p, *map(engine.place, (k, v))), (k, v)):
        want = reference.pool(p, x)
        assert rounding.miss(engine.host(got).view(x.dtype).reshape(want.shape), want, dtype) <= 1e-6


@pytest.mark.parametrize("dtype", rounding.HALVES)
def test_the_cpu_rounds_the_answer_alone(dtype):
    p, arrays, order, offsets = case(dtype, {}, heads=2)
    plan = s2o.Plan.from_arrays(*arrays[:2], p.settings, kv_order=order, kv_offsets=offsets)
    walked = s2o.attend(*arrays, plan, full_output=True)
    got = SimpleNamespace(out=walked.out, lse=walked.lse, tail_mass=walked.stats.tail_mass)
    rounding.check_answer(p, got, rounding.attend(p, *arrays, order, offsets))
    for wrong in ({"weights": True, "means": False}, {"weights": False, "means": True}):
        with pytest.raises(AssertionError):
            rounding.check_answer(p, got, rounding.attend(p, *arrays, order, offsets, step=64, across=False, **wrong))
