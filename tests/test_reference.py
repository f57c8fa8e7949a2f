"""The executable specification against hand-worked cases and against a plain softmax of our own."""

import itertools
from math import log

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import cases

from s2o_cupy import Settings, reference
from s2o_cupy.problem import Problem, make_problem
from s2o_cupy.settings import MOST_LIFT

F64 = {"dtypes": ("float64",), "contents": ("randn", "ties", "dominant", "equal", "constant")}


def column(*numbers):
    """(1, 1, n, 1): one head of n rows with D = 1."""
    return np.array(numbers, float)[None, None, :, None]


def logs(*weights):
    """Keys whose weights against a query of 1, with scale 1, are these numbers."""
    return np.log(column(*weights))


def walk(settings, q, k, v, order=None):
    problem = make_problem(q, k, v, settings)
    if order is None:
        return reference.attend(problem, q, k, v, *reference.plan(problem, q, k))
    return reference.attend(problem, q, k, v, np.array(order, np.int32), problem.offsets(problem.whole)[None])


# --- by hand ---------------------------------------------------------------------------------
ONE_ROW = Settings(causal=False, scale=1.0, segment=1, block_q=1, block_k=1, pool=4, rank="mean", rank_levels=None)


def test_dense_by_hand():
    # Weights 1, 2, 1 over values 0, 4, 8: (0 + 8 + 8) / 4 = 4, and lse = log 4.
    problem = make_problem(column(1), logs(1, 2, 1), column(0, 4, 8), ONE_ROW)
    out, lse = reference.dense(problem, column(1), logs(1, 2, 1), column(0, 4, 8))
    assert out.item() == pytest.approx(4)
    assert lse.item() == pytest.approx(log(4))


def test_causal_mask_is_bottom_right_aligned():
    # Nq = 2 over Nk = 3: query 0 sees keys 0 and 1, query 1 sees all; equal weights give plain means.
    q, k, v = column(0, 0), column(0, 0, 0), column(1, 3, 8)
    out, _ = reference.dense(make_problem(q, k, v, Settings()), q, k, v)
    np.testing.assert_allclose(out.ravel(), [2, 4])


def test_a_window_by_hand():
    # Positions 1, 2 and 3 with a window of 2 see keys 0-1, 1-2 and 2-3; equal weights give plain means.
    q, k, v = column(0, 0, 0), column(0, 0, 0, 0), column(1, 3, 8, 10)
    settings = Settings(window=2, segment=2, pool=1)
    problem = make_problem(q, k, v, settings)
    for out in (reference.dense(problem, q, k, v)[0], walk(settings, q, k, v).out):
        np.testing.assert_allclose(out.ravel(), [2, 5.5, 9])
    assert problem.allowed_pairs == problem.window_pairs.sum() == 6
    assert problem.history.tolist() == problem.listed.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("tau", "tiles"),
    [
        # Weights 8, 4, 2, 2 walked one at a time. Gains: inf (nothing before), 4/8, 2/12, 2/14.
        (0, 4),
        (0.14, 4),  # 2/14 = .1428 is not below
        (0.15, 4),  # the last tile counts whether or not it stops
        (0.17, 3),  # 2/12 = .1667 is below: stop after the third
        (0.5, 3),  # 4/8 is not below .5: strictly below stops
        (0.51, 2),
        (1e9, 2),  # +inf never stops
    ],
)
def test_stop_rule_by_hand(tau, tiles):
    answer = walk(ONE_ROW.replace(tau=tau), column(1), logs(8, 4, 2, 2), column(0, 0, 0, 0))
    assert answer.tiles.item() == tiles


def test_a_gain_of_exactly_tau_goes_on():
    # Equal keys: gains inf, 1, 1/2, 1/3, without rounding.
    answer = walk(ONE_ROW.replace(tau=1.0), column(1), column(0, 0, 0, 0), column(0, 0, 0, 0))
    assert answer.tiles.item() == 3


def test_one_row_that_gains_keeps_the_tile_walking():
    # Query 1: weights 4, 1, 1 -> gains 1/4, 1/5. Query 0 has equal weights: gains 1, 1/2. The greater decides.
    settings = ONE_ROW.replace(segment=2, block_q=2, tau=0.4)
    q, k, v = column(1, 0), logs(4, 1, 1), column(0, 0, 0)
    assert walk(settings, q, k, v, [0, 1, 2]).tiles.item() == 3
    assert walk(settings.replace(block_q=1), q, k, v, [0, 1, 2]).tiles.ravel().tolist() == [2, 3]


def test_window_before_the_history_makes_the_first_tile_vote():
    # Last query of 5: history keys 0-3 (pool 4) at weight 1 each, window key 4 at weight 9; its own tile holds
    # only itself, so "window keys that every row sees" is empty and the first gain is +inf; 1/1 then, 1/2, 1/3.
    settings = ONE_ROW.replace(causal=True, tau=0.6)
    q, k, v = column(1, 1), logs(1, 1, 1, 1, 9, 1), column(0, 0, 0, 0, 0, 0)
    problem = make_problem(q, k, v, settings)
    order, offsets = np.tile(np.arange(4, dtype=np.int32), 2), problem.offsets(problem.whole)[None]
    # Query 0 (position 4): gains inf, 1, .5 -> 3 tiles. Query 1 (position 5) has seen key 4: 1/9 stops at once.
    assert reference.attend(problem, q, k, v, order, offsets).tiles.ravel().tolist() == [3, 1]


def test_tau_of_each_head():
    q, k, v = (np.repeat(x, 2, axis=1) for x in (column(1), logs(8, 4, 2, 2), column(0, 0, 0, 0)))
    assert walk(ONE_ROW.replace(tau=[0.17, 0.51]), q, k, v).tiles.ravel().tolist() == [3, 2]


def test_tail_logit_is_log_count_by_hand():
    # Two blocks of 4. Walked: keys 0 and 4, of weights 8 and 4 (gain 4/8 < .6). Left: 3 keys in each block.
    # Block means: log-weights of block 0 are (log 8 + 3 log 1)/4 = log 8^(1/4); of block 1 (log 4)/4.
    k, v = logs(8, 1, 1, 1, 4, 1, 1, 1), column(8, 0, 0, 0, 4, 0, 0, 0)
    answer = walk(ONE_ROW.replace(tau=0.6), column(1), k, v, [0, 4, 1, 2, 3, 5, 6, 7])
    tail = np.array([3 * 8**0.25, 3 * 4**0.25])
    mass = 12 + tail.sum()
    assert answer.tiles.item() == 2
    assert answer.tail_blocks.item() == 2
    assert answer.out.item() == pytest.approx((8 * 8 + 4 * 4 + tail @ [2, 1]) / mass)
    assert answer.lse.item() == pytest.approx(log(mass))
    assert answer.tail_mass.item() == pytest.approx(tail.sum() / mass)


def test_tail_is_capped_by_the_last_tile_walked():
    # Walked: keys 0 and 4, of weights 8 and 1 (gain 1/8). Block 0's mean key weighs 8^(1/4) = 1.68, more than the
    # last tile's mean of 1: its three keys left count 1 each. Block 1's weigh 1/2^(3/4) = .59, below: unchanged.
    k, v = logs(8, 1, 1, 1, 1, 0.5, 0.5, 0.5), column(6, 6, 6, 6, 0, 0, 0, 0)
    answer = walk(ONE_ROW.replace(tau=0.6), column(1), k, v, [0, 4, 1, 2, 3, 5, 6, 7])
    mass = 8 + 1 + 3 + 3 * 0.5**0.75
    assert answer.out.item() == pytest.approx(6 * (8 + 3) / mass)
    assert answer.lse.item() == pytest.approx(log(mass))
    assert answer.tail_mass.item() == pytest.approx(1 - 9 / mass)


def test_the_cap_is_the_mean_of_the_last_tile():
    # One tile of two keys, weights 8 and 2: mean 5. The block of 4 weighs (8 * 2 * 5 * 5)^(1/4) = 4.47 < 5.
    # With the last two keys at weight 9 it is (8 * 2 * 81)^(1/4) = 6 > 5: capped.
    settings, q, v = ONE_ROW.replace(block_k=2, cap=0.5), column(1), column(1, 1, 1, 1)
    assert walk(settings, q, logs(8, 2, 5, 5), v, [0, 1]).lse.item() == pytest.approx(log(10 + 2 * 400**0.25))
    assert walk(settings, q, logs(8, 2, 9, 9), v, [0, 1]).lse.item() == pytest.approx(log(10 + 2 * 5))


@pytest.mark.parametrize(("walked", "blocks"), [(6, 1), (7, 0)])
def test_a_block_with_less_than_a_quarter_left_stays_out_of_the_tail(walked, blocks):
    # Eight equal keys of one block: with two left the block enters as two keys, with one it is left out.
    settings = ONE_ROW.replace(pool=8, cap=walked / 8)
    answer = walk(settings, column(1), column(*[0] * 8), column(*[5] * 8))
    assert answer.tail_blocks.item() == blocks
    assert answer.lse.item() == pytest.approx(log(8 if blocks else 7))
    assert answer.out.item() == pytest.approx(5)


def test_no_tail_renormalises_over_what_was_walked():
    k, v = logs(8, 4, 2, 2), column(0, 3, 50, 50)
    answer = walk(ONE_ROW.replace(tau=0.51, tail=None), column(1), k, v)
    assert answer.out.item() == pytest.approx(4 * 3 / 12)
    assert answer.lse.item() == pytest.approx(log(12))
    assert answer.tail_blocks.item() == answer.tail_mass.item() == 0


def test_spread_lifts_a_rows_pooled_logits_by_its_distance_from_the_mean_query():
    # Queries 1 and 3: 1 from their mean, 2. Keys of blocks (0, log 4, 0, 0) and (-1, 1, -1, 1) - log 16, so that the
    # variances inside the blocks are 3 (log 4 / 4)^2 and 1, the history's their mean. Walked: key 1 alone.
    a = log(4)
    keys = np.array([0, a, 0, 0, -1 - 2 * a, 1 - 2 * a, -1 - 2 * a, 1 - 2 * a])
    lift = ((3 * (a / 4) ** 2) + 1) / 2 / 2 * (7 / 8) ** 2  # seven keys of eight are left
    settings = ONE_ROW.replace(segment=2, block_q=2, cap=1 / 8, tail="spread")
    answer = walk(settings, column(1, 3), column(*keys), column(*[0] * 4, *[1] * 4), [1])
    for row, query in enumerate((1, 3)):
        first = 3 * np.exp(min(query * a / 4 + lift, query * a))  # three keys of block 0 are left
        second = 4 * np.exp(query * -2 * a + lift)
        assert answer.out.ravel()[row] == pytest.approx(second / (np.exp(query * a) + first + second))
    assert answer.tiles.tolist() == [[[1]]]


def test_spread_never_lifts_above_the_last_tile_nor_where_nothing_was_walked():
    q, v = column(-30, 30), column(6, 6, 6, 6)
    k = column(0.1, 0.2, -0.3, 0.0)
    settings = ONE_ROW.replace(segment=2, block_q=2, cap=1 / 4, tail="spread")
    lifted = walk(settings, q, k, v, [0])
    assert lifted.lse.ravel() == pytest.approx(np.array([-3, 3]) + log(4))  # each key left as heavy as key 0
    problem = make_problem(q, k, v, settings)
    nothing = reference.attend(problem, q, k, v, np.empty(0, np.int32), np.zeros((1, 1, 2), np.int64))
    assert nothing.lse.ravel() == pytest.approx(log(4))  # the mean key is 0


def test_partial_last_block_is_pooled_over_the_keys_it_has():
    # Not causal, 5 keys, blocks of 4: block 1 is key 4 alone, so as a tail of one key it is exact.
    answer = walk(ONE_ROW.replace(cap=0.8), column(1), logs(5, 4, 3, 2, 1), column(0, 0, 0, 0, 15))
    assert answer.tail_blocks.item() == 1
    assert answer.out.item() == pytest.approx(1)
    assert answer.lse.item() == pytest.approx(log(15))


def test_history_window_and_row_tiles_by_hand():
    # Nk - Nq = 3; segments of 4 start at positions 3, 7, 11; pool blocks of 4: histories 0, 4, 8.
    problem = Problem(1, 1, 1, 9, 12, 1, 1, "float64", Settings(segment=4, block_q=3, pool=4, cap=0.3))
    assert problem.history.tolist() == [0, 4, 8]
    assert problem.listed.tolist() == [0, 2, 3]
    assert problem.tile_start.tolist() == [0, 3, 4, 7, 8]
    assert problem.tile_rows.tolist() == [3, 1, 3, 1, 1]
    # Positions 3-5 over window keys from 0: 4 + 5 + 6; 6: 7; 7-9 from 4: 4 + 5 + 6; 10: 7; 11 from 8: 4.
    assert problem.window_pairs.tolist() == [15, 7, 15, 7, 4]
    assert problem.allowed_pairs == sum(range(4, 13))


# --- stage 1 ---------------------------------------------------------------------------------
def test_gaussian_score_by_hand():
    # Queries 0 and 2: mean 1, variance 1. Key 3, scale 1/2: 3/2 + (1/4)/2 * 9 = 1.5 + 1.125.
    q, k = column(0, 2), column(3)
    problem = make_problem(q, k, k, Settings(causal=False, scale=0.5, rank_terms=None))
    assert reference.score(problem, q, k, 0, 0, 0).item() == pytest.approx(2.625)
    assert reference.score(problem.replace(rank="mean"), q, k, 0, 0, 0).item() == pytest.approx(1.5)


@given(cases(**F64, dims=st.integers(1, 24), rank="gaussian", rank_terms=None))
def test_full_covariance_score_is_the_definition(case):
    p, q, k = case.problem, case.q, case.k
    heads = p.group if p.settings.share_order else 1
    for b, h, s in np.ndindex(p.batch, p.heads_order, p.segments):
        rows = q[b, h * heads : (h + 1) * heads, s * p.settings.segment : (s + 1) * p.settings.segment]
        rows, keys = rows.reshape(-1, p.dim_qk), k[b, h * heads // p.group, : p.history[s]]
        covariance = np.cov(rows.T, bias=True).reshape(p.dim_qk, p.dim_qk)
        expected = p.scale * keys @ rows.mean(0) + p.scale**2 / 2 * np.einsum("ni,ij,nj->n", keys, covariance, keys)
        np.testing.assert_allclose(reference.score(p, q, k, b, h, s), expected, rtol=1e-6, atol=1e-6)


@given(st.integers(1, 40), st.integers(1, 24), st.integers(0, 2**32 - 1))
def test_low_rank_covariance(rows, dim, seed):
    x = np.random.default_rng(seed).standard_normal((rows, dim))
    x -= x.mean(axis=0)
    covariance = x.T @ x / rows
    full = reference.covariance_factors(x, dim)
    np.testing.assert_allclose(full @ full.T, covariance, atol=1e-10)
    for terms in range(1, dim):
        factors = reference.covariance_factors(x, terms)
        assert factors.shape == (dim, terms)  # compressed to a subspace: its eigenvalues interlace, never more
        assert (np.linalg.eigvalsh(factors @ factors.T) <= np.linalg.eigvalsh(covariance) + 1e-10).all()


def test_low_rank_keeps_the_greatest_axes():
    x = np.random.default_rng(0).standard_normal((500, 6)) * [1, 50, 1, 30, 1, 1]
    factors = reference.covariance_factors(x - x.mean(axis=0), 2)
    kept = np.trace(factors @ factors.T) / x.var(axis=0).sum()
    assert kept > 0.998


def test_non_finite_queries_leave_the_score_alone():
    q, k = column(0, 2, np.nan, np.inf), column(3)
    problem = make_problem(q, k, k, Settings(causal=False, scale=0.5))
    assert reference.score(problem, q, k, 0, 0, 0).item() == pytest.approx(2.625)
    assert reference.score(problem, q * np.nan, k, 0, 0, 0).item() == 0


def test_shared_order_takes_the_whole_group():
    q = np.array([0.0, 2.0]).reshape(1, 2, 1, 1)
    problem = make_problem(q, column(3), column(3), Settings(causal=False, scale=0.5, share_order=True))
    assert reference.score(problem, q, column(3), 0, 0, 0).item() == pytest.approx(2.625)


# --- stage 2 ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("scores", "levels", "order"),
    [
        ([1, 3, 2], None, [1, 2, 0]),
        ([2, 3, 3, 2], None, [1, 2, 0, 3]),
        ([0.0, -0.0, 0.0], None, [0, 1, 2]),
        ([np.nan, -np.inf, 1, np.inf], None, [3, 2, 0, 1]),  # NaN and -inf tie at the end, by index
        ([np.nan, -np.inf, 1, np.inf, 2], 4, [3, 4, 2, 0, 1]),
        ([0, 10, 9, 6], 2, [1, 2, 3, 0]),  # steps of 5: 10, 9 and 6 share the upper one
        ([0, 10, 5], 2, [1, 0, 2]),  # 5 lies on the edge: (10 - 5) * 2 / 10 = 1, the lower step, where the least is too
        ([6, 10, 0, 7], 2, [0, 1, 3, 2]),
        ([7, 7, 7], 2, [0, 1, 2]),
        ([np.nan, np.nan], 8, [0, 1]),
        ([], 8, []),
    ],
)
def test_remap_by_hand(scores, levels, order):
    assert reference.remap(np.array(scores), len(scores), levels).tolist() == order


@given(st.lists(st.floats(width=32), max_size=60), st.integers(0, 60), st.sampled_from([None, 2, 7, 1024]))
def test_remap_is_a_prefix_of_the_full_order(scores, listed, levels):
    whole = reference.remap(np.array(scores), len(scores), levels)
    assert sorted(whole) == list(range(len(scores)))
    np.testing.assert_array_equal(reference.remap(np.array(scores), listed, levels), whole[:listed])


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60), st.sampled_from([2, 7, 1024]))
def test_quantising_errs_by_one_step_at_most(scores, levels):
    scores = np.array(scores, np.float32)
    assume(np.ptp(scores) == 0 or np.ptp(scores) > 1e-30)  # below it float32 has no steps, and all levels are 0
    ranked = scores[reference.remap(scores, len(scores), levels)].astype(float)
    assert all(b - a <= np.ptp(scores) * (1 / levels + 1e-6) for a, b in itertools.pairwise(ranked))


def test_guide_order_by_hand():
    # Segments of 3; mean key of segment 1's history (keys 0 and 1) is 2: rows 3-5 by descending q, ties by index.
    q, k = column(1, 2, 3, -1, 5, 5), column(1, 3, 9, 9, 9, 9)
    problem = make_problem(q, k, k, Settings(segment=3, pool=2, query_order="guide"))
    assert problem.history.tolist() == [0, 2]
    assert reference.guide(problem, q, k).ravel().tolist() == [0, 1, 2, 4, 5, 3]


def test_guide_order_puts_non_finite_queries_last():
    q, k = column(np.nan, 1, 2), column(1, 1, 1)
    problem = make_problem(q, k, k, Settings(causal=False, query_order="guide"))
    assert reference.guide(problem, q, k).ravel().tolist() == [2, 1, 0]


# --- brute force -----------------------------------------------------------------------------
def softmax_over(logits, values):
    """out, log of the sum, over the last axis of logits; -inf hides a key."""
    top = logits.max(axis=1, keepdims=True)
    weights = np.exp(logits - top)
    return weights @ values / weights.sum(1, keepdims=True), (top + np.log(weights.sum(1, keepdims=True)))[:, 0]


def hidden(settings, key, position):
    """Whether a causal query at a position may not see a key."""
    before = -np.inf if settings.window is None else position - settings.window
    return (key > position) | (key <= before)


def brute_row_tile(p, q, k, v, rows, history, ranked, tau):
    """One row tile from whole logit matrices: the stop from plain sums, then one softmax over all that counts."""
    s, position = p.settings, rows + p.shift
    logits = p.scale * q[rows] @ k.T
    keys = np.arange(len(k))
    if s.causal:
        logits[hidden(s, keys[None], position[:, None])] = -np.inf
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    before = weights[:, (keys >= history) & (keys < position.min())].sum(axis=1) if s.causal else np.zeros(len(rows))
    tiles, ceiling = 0, np.full(len(rows), np.inf)
    for start in range(0, len(ranked), s.block_k):
        keys_walked = ranked[start : start + s.block_k]
        added = weights[:, keys_walked].sum(axis=1)
        ceiling = softmax_over(logits[:, keys_walked], v[keys_walked])[1] - np.log(len(keys_walked))
        tiles += 1
        gain = np.divide(added, before, out=np.full(len(rows), np.inf), where=before > 0).max()
        before = before + added
        if gain < tau:
            break
    walked = ranked[: tiles * s.block_k]
    seen = np.concatenate([walked, keys[keys >= history]])
    logits, values = logits[:, seen], v[seen]
    left = np.setdiff1d(keys[:history], walked)
    blocks, counts = np.unique(left // s.pool, return_counts=True) if s.tail else (left[:0], left[:0])
    lift = 0
    if s.tail == "spread" and tiles:
        block = keys[:history] // s.pool
        apart = [
            np.sum((k[:history][block == b] - k[:history][block == b].mean(axis=0)) ** 2, axis=0) for b in set(block)
        ]
        lift = p.scale**2 / 2 * ((q[rows] - q[rows].mean(axis=0)) ** 2 @ (np.sum(apart, axis=0) / history))
    entering = counts >= np.minimum(s.pool, history - blocks * s.pool) / 4
    for block, count in zip(blocks[entering], counts[entering]):
        whole = slice(block * s.pool, (block + 1) * s.pool)
        lifted = np.minimum(lift, MOST_LIFT) * (len(left) / history) ** 2
        mean_logit = p.scale * q[rows] @ k[whole].mean(axis=0) + lifted
        pooled = np.minimum(mean_logit, ceiling) + np.log(count)
        logits, values = np.column_stack([logits, pooled]), np.vstack([values, v[whole].mean(axis=0)])
    return *softmax_over(logits, values), tiles, entering.sum()


@given(cases(**F64))
def test_attend_is_brute_force(case):
    p = case.problem
    order, offsets, query_order = reference.plan(p, *case.arrays[:2])
    answer = reference.attend(p, *case.arrays, order, offsets, query_order)
    for b, h, tile in np.ndindex(answer.tiles.shape):
        s, kv = p.tile_segment[tile], h // p.group
        rows = p.tile_start[tile] + np.arange(p.tile_rows[tile])
        rows = rows if query_order is None else query_order[b, h, rows]
        ranked = order[slice(*offsets[b, kv if p.settings.share_order else h, s : s + 2])]
        out, lse, tiles, blocks = brute_row_tile(
            p, case.q[b, h], case.k[b, kv], case.v[b, kv], rows, p.history[s], ranked, p.tau[h]
        )
        if tiles != answer.tiles[b, h, tile]:  # a gain within rounding of tau: equal keys make such ties
            assert case.contents in ("ties", "equal", "constant")
            continue
        assert answer.tail_blocks[b, h, tile] == blocks
        np.testing.assert_allclose(answer.out[b, h, rows], out, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(answer.lse[b, h, rows], lse, rtol=1e-9, atol=1e-9)


@given(cases(**F64))
def test_dense_is_brute_force(case):
    p = case.problem
    out, lse = reference.dense(p, *case.arrays)
    position = np.arange(p.n_q) + p.shift
    for b, h in np.ndindex(p.batch, p.heads_q):
        k, v = case.k[b, h // p.group], case.v[b, h // p.group]
        logits = p.scale * case.q[b, h] @ k.T
        if p.settings.causal:
            logits[hidden(p.settings, np.arange(p.n_k)[None], position[:, None])] = -np.inf
        expected = softmax_over(logits, v)
        np.testing.assert_allclose(out[b, h], expected[0], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(lse[b, h], expected[1], rtol=1e-9, atol=1e-9)
