"""Every fact of docs/design.md section 2, on random small calls, for every backend."""

import numpy as np
import properties
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases

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


@given(cases(dtypes=("float64",), tail="pooled", min_keys=60))
def test_reaches_the_reference_in_float64(backend, case):
    properties.reaches_the_reference(backend, case)


@given(cases(), seeds, bad_numbers)
def test_a_bad_query_stays_in_its_row(backend, case, seed, bad):
    properties.a_bad_query_stays_in_its_row(backend, case, seed, bad)


@given(cases(causal=True, min_keys=20), seeds, bad_numbers, st.sampled_from("kv"))
def test_a_bad_key_or_value_stays_with_rows_that_see_it(backend, case, seed, bad, which):
    properties.a_bad_key_or_value_stays_with_rows_that_see_it(backend, case, seed, bad, which)


@given(cases())
def test_ranks_as_the_reference(backend, case):
    properties.ranks_as_the_reference(backend, case)


few_values = st.lists(st.integers(-3, 3), min_size=1, max_size=300)
any_values = st.lists(st.floats(width=16), min_size=1, max_size=300)


@given(few_values | any_values, st.sampled_from([None, 2, 3, 16, 256, 1024, 65536]), st.sampled_from([1.0, 0.5, 0.01]))
def test_exact_scores_order_bitwise(backend, scores, levels, cap):
    properties.exact_scores_order_bitwise(backend, scores, rank_levels=levels, cap=cap)


@pytest.mark.parametrize("levels", [None, 1024])
def test_long_lists_order_bitwise(backend, levels):
    scores = np.random.default_rng(0).standard_normal(20_000).astype(np.float16)
    properties.exact_scores_order_bitwise(backend, scores, rank_levels=levels, cap=0.3)
