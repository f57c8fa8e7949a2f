"""Every fact of docs/design.md section 2, on random small calls, for every backend."""

import importlib

import numpy as np
import properties
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, cases

from s2o_cupy import Settings, backends, reference
from s2o_cupy.backends import cpu
from s2o_cupy.problem import Problem, Slab

seeds = st.integers(0, 2**32 - 1)
bad_numbers = st.sampled_from([np.nan, np.inf, -np.inf])


@given(cases())
def test_tau_zero_is_dense(backend, case):
    properties.tau_zero_is_dense(backend, case)


@given(cases())
def test_work_falls_with_tau(backend, case):
    properties.work_falls_with_tau(backend, case)


@given(cases(causal=True), seeds)
def test_later_keys_do_not_matter(backend, case, seed):
    properties.later_keys_do_not_matter(backend, case, seed)


@given(st.integers(1, 160).flatmap(lambda window: cases(causal=True, window=window)))
def test_a_window_is_dense_within_it(backend, case):
    properties.tau_zero_is_dense(backend, case)
    assert backend.attention(case).stats.path == "dense"
    np.testing.assert_array_equal(backend.attention(case).out, backend.dense(case).out)


windowed = st.integers(1, 60).flatmap(lambda window: cases(causal=True, window=window, min_keys=30))


@given(windowed, seeds, st.sampled_from([np.nan, np.inf, -np.inf, 1e4]))
def test_keys_before_the_window_do_not_matter(backend, case, seed, bad):
    properties.keys_before_the_window_do_not_matter(backend, case, seed, bad)


@given(cases())
def test_out_lies_within_the_values(backend, case):
    properties.out_lies_within_the_values(backend, case)


@given(cases(), seeds)
def test_heads_and_batches_are_independent(backend, case, seed):
    properties.heads_and_batches_are_independent(backend, case, seed)


@given(cases(share_order=False), seeds)
def test_query_heads_are_independent(backend, case, seed):
    properties.query_heads_are_independent(backend, case, seed)


@given(cases())
def test_runs_agree_bitwise(backend, case):
    properties.runs_agree_bitwise(backend, case)


@given(cases())
def test_strides_do_not_matter(backend, case):
    properties.strides_do_not_matter(backend, case)


@given(cases())
def test_reaches_the_reference(backend, case):
    properties.reaches_the_reference(backend, case)


@given(cases(dtypes=("float64",), tail="pooled", min_keys=60) | cases(dtypes=("float64",), tail="spread", min_keys=60))
def test_reaches_the_reference_in_float64(backend, case):
    properties.reaches_the_reference(backend, case)


@given(cases(), seeds, bad_numbers)
def test_a_bad_query_stays_in_its_row(backend, case, seed, bad):
    properties.a_bad_query_stays_in_its_row(backend, case, seed, bad)


@given(cases(causal=True, min_keys=20), seeds, bad_numbers, st.sampled_from("kv"))
def test_a_bad_key_or_value_stays_with_rows_that_see_it(backend, case, seed, bad, which):
    properties.a_bad_key_or_value_stays_with_rows_that_see_it(backend, case, seed, bad, which)


@given(cases(contents=("randn",), dtypes=("float32",), tail=None), seeds, st.sampled_from([np.inf, -np.inf]))
def test_rows_that_an_infinite_key_spoils_do_not_vote(backend, case, seed, bad):
    properties.rows_that_an_infinite_key_spoils_do_not_vote(backend, case, seed, bad)


@given(cases())
def test_ranks_as_the_reference(backend, case):
    properties.ranks_as_the_reference(backend, case)


@given(cases(query_order="guide"))
def test_guide_orders_as_the_reference(backend, case):
    properties.guide_orders_as_the_reference(backend, case)


few_values = st.lists(st.integers(-3, 3), min_size=1, max_size=300)
any_values = st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=1, max_size=300)


@given(few_values | any_values, st.sampled_from([None, 2, 3, 16, 256, 1024, 65536]), st.sampled_from([1.0, 0.5, 0.01]))
def test_exact_scores_order_bitwise(backend, scores, levels, cap):
    properties.exact_scores_order_bitwise(backend, scores, rank_levels=levels, cap=cap)


@given(
    st.lists(st.floats(width=32) | st.integers(-2, 2), min_size=40, max_size=40),
    st.sampled_from([None, 2, 16, 1024, 65536]),
    st.sampled_from([1.0, 0.5, 0.01]),
)
def test_cpu_remap_of_any_scores(scores, levels, cap):
    """Stage 2 alone, over a slab of one head's two longer segments, NaN and infinities included."""
    settings = Settings(segment=16, pool=4, rank_levels=levels, cap=cap)
    problem = Problem(1, 1, 1, 48, 56, 4, 4, "float32", settings)
    assert problem.history.tolist() == [8, 24, 40]
    slab = Slab(0, 1, 1, 3)
    offsets, lists = problem.offsets(slab), np.array([scores, scores[::-1]], np.float32)
    order = np.full(offsets[0, -1], -1, np.int32)
    cpu.remap(problem, lists, slab, offsets, order)
    for row, s, start, stop in zip(lists, (1, 2), offsets[0], offsets[0, 1:]):
        expected = reference.remap(row[: problem.history[s]], problem.listed[s], levels)
        np.testing.assert_array_equal(order[start:stop], expected)


@pytest.mark.parametrize("levels", [None, 1024])
def test_long_lists_order_bitwise(backend, levels):
    scores = np.random.default_rng(0).standard_normal(20_000).astype(np.float16)
    properties.exact_scores_order_bitwise(backend, scores, rank_levels=levels, cap=0.3)


@pytest.fixture
def ranks(backend, monkeypatch):
    """The backend, ranking wherever a list is to be ranked: each has a length of its own from which that pays."""
    monkeypatch.setattr(importlib.import_module(backends.NAMES[backend.name]), "RANKING_PAYS_FROM", 1)
    return backend


def long_case(dtype=np.float32, n_q=2400, n_k=2600, **changes):
    """Four query heads on two K/V heads, nine segments or more."""
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal((1, h, n, 16)).astype(dtype) for h, n in ((4, n_q), (2, n_k), (2, n_k)))
    settings = Settings(segment=256, block_q=64, block_k=32, pool=64, tau=0.1, rank_terms=7).replace(**changes)
    return Case(q, k, v, settings, "randn", ("plain",) * 3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"causal": False, "n_q": 700},
        {"share_order": True, "query_order": "guide", "cap": 0.4, "rank_levels": None},
        {"rank": "mean", "tail": None, "tau": (0.0, 0.3, 0.02, 1.0), "dtype": np.float64},
    ],
)
def test_workspace_does_not_matter(ranks, changes):
    properties.workspace_does_not_matter(ranks, long_case(**changes))


def test_long_calls_are_dense_at_tau_zero(ranks):
    case = long_case(tau=0.0)
    exact, result = ranks.dense(case), ranks.attention(case)
    assert result.stats.path == "ranked"
    properties.assert_near(result.out, exact.out, 1e-5)
    properties.assert_near(result.lse, exact.lse, 1e-5)
    assert result.stats.density == 1
    assert (result.stats.tiles == -(-case.problem.history[case.problem.tile_segment] // 32)).all()


def test_short_calls_are_dense_by_shape_alone(backend):
    case = long_case(n_q=900, n_k=1000, cap=0.5, tau=1.0)
    result = backend.attention(case)
    assert result.stats.path == "dense"
    assert result.stats.density == 1
    np.testing.assert_array_equal(result.out, backend.dense(case).out)


def test_lse_is_the_natural_log(backend):
    # 1500 equal keys, all with logit 2 * 3 * .5 = 3: log(1500) + 3. (No block is left with less than a quarter.)
    ones = np.ones((1, 1, 1500, 1), np.float32)
    case = Case(2 * ones[:, :, :1], 3 * ones, ones, Settings(causal=False, scale=0.5), "constant", ("plain",) * 3)
    for result in (backend.attention(case, tau=0), backend.ranked(case, cap=0.4), backend.dense(case)):
        np.testing.assert_allclose(result.lse, np.log(1500) + 3, rtol=1e-6)
        assert result.lse.dtype == np.float32
