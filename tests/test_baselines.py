"""The baselines against masks built as their descriptions say, and attended densely."""

import numpy as np
import pytest

from bench import baselines
from bench.baselines import Curve, Points

BLOCK = 128
THRESHOLDS = (0.0, 0.3, 0.7, 0.95, 1.0)
OTHERS = {"PBS-Attn": baselines.pbs_attention, "block top-CDF": baselines.block_attention}


def head(n=1000, dim=16, seed=0, dtype=np.float32):
    """Queries and keys around a few centres that drift with position, so that blocks differ in mass."""
    rng = np.random.default_rng(seed)
    centres = 2 * rng.standard_normal((n // 100 + 1, dim))
    q = centres[rng.integers(len(centres), size=n)] + rng.standard_normal((n, dim))
    k = centres[np.arange(n) // 100] + rng.standard_normal((n, dim))
    return [x.astype(dtype) for x in (q / 2, k, rng.standard_normal((n, 8)))]


def probabilities(q, k, scale=None):
    logit = q.astype(np.float64) @ k.astype(np.float64).T * (scale or 1 / np.sqrt(q.shape[1]))
    logit[~np.tri(len(q), dtype=bool)] = -np.inf
    p = np.exp(logit - logit.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def judged(q, k, v, mask, scale=None):
    """Density, squared error and squared norm of attention under a boolean mask."""
    p, v = probabilities(q, k, scale), v.astype(np.float64)
    assert not (mask & ~np.tri(len(q), dtype=bool)).any()
    kept = np.where(mask, p, 0)
    out, exact = kept / kept.sum(axis=1, keepdims=True) @ v, p @ v
    n = len(q)
    return mask.sum() / (n * (n + 1) / 2), ((out - exact) ** 2).sum(), (exact**2).sum()


def top_cdf_mask(q, k, order, segment, threshold, scale=None):
    """Query blocks against blocks of `order`ed keys: the greatest pooled probabilities up to the threshold."""
    n, scale = len(q), scale or 1 / np.sqrt(q.shape[1])
    mask = np.zeros((n, n), bool)
    for start in range(0, n, BLOCK):
        rows, own = slice(start, start + BLOCK), start // segment * segment
        mask[rows, own:] = True
        blocks = [order[i : i + BLOCK] for i in range(0, own, BLOCK)]
        if not blocks:
            continue
        logit = np.array([scale * q[rows].mean(axis=0) @ k[keys].mean(axis=0) for keys in blocks])
        share = np.exp(logit - logit.max())
        share /= share.sum()
        reached = 0.0
        for block in sorted(range(len(blocks)), key=lambda b: -share[b]):
            mask[rows, blocks[block]] = True
            reached += share[block]
            if reached >= threshold and threshold < 1:
                break
        for keys in blocks:
            if 0 in keys:
                mask[rows, keys] = True
    return mask & np.tri(n, dtype=bool)


def pbs_order(q, k, scale=None):
    """Keys of each run of 256 by the mean attention that the last 128 queries give them."""
    received = probabilities(q, k, scale)[-BLOCK:].mean(axis=0)
    return np.concatenate([s + np.argsort(-received[s : s + 256], kind="stable") for s in range(0, len(k), 256)])


@pytest.mark.parametrize("n", [1024, 1000, 700, 300, 130, 128, 5, 1])
@pytest.mark.parametrize("method", OTHERS)
def test_block_methods_are_dense_attention_under_their_mask(method, n):
    q, k, v = head(n)
    found = OTHERS[method](q, k, v, thresholds=THRESHOLDS)
    order, segment = (pbs_order(q, k), 256) if method == "PBS-Attn" else (np.arange(n), BLOCK)
    for i, threshold in enumerate(THRESHOLDS):
        density, gap, norm = judged(q, k, v, top_cdf_mask(q, k, order, segment, threshold))
        assert found.density[i] == pytest.approx(density, rel=1e-12)
        assert found.gap[i] == pytest.approx(gap, rel=1e-3, abs=1e-9 * norm)
        assert found.norm == pytest.approx(norm, rel=1e-5)
    if n == 1024:
        assert (np.diff(found.density)[:3] > 0).all()
        assert found.gap[0] > 1e-3 * found.norm


def test_pbs_permutes_and_its_sink_is_where_the_first_token_went():
    """The last queries attend to keys 100..227 of the first 256: they fill its first block, and key 0 its second."""
    n = 512
    q, k, v = np.zeros((n, 4), np.float32), np.zeros((n, 4), np.float32), head(n)[2]
    q[:, 0] = 8
    k[100:228, 0] = 1
    np.testing.assert_array_equal(np.sort(pbs_order(q, k)[:128]), np.arange(100, 228))
    found = baselines.pbs_attention(q, k, v, scale=1.0, thresholds=(0.0, 0.9))
    assert found.density[0] == pytest.approx(
        1
    )  # the heavy block and the sink's: both blocks of the only segment before
    assert found.gap[0] == pytest.approx(0, abs=1e-6)
    k[0, 0] = 2  # now key 0 is the heaviest, and its block is enough
    found = baselines.pbs_attention(q, k, v, scale=1.0, thresholds=(0.0,))
    assert found.density[0] == pytest.approx(1 - 256 * 128 / (n * (n + 1) / 2))


def test_position_order_takes_the_block_of_the_first_token():
    n = 512
    q, k, v = np.ones((n, 4), np.float32), np.zeros((n, 4), np.float32), head(n)[2]
    k[128:256] = 1  # the heaviest block is the second
    found = baselines.block_attention(q, k, v, thresholds=(0.0,))
    mask = np.tri(n, dtype=bool)
    mask[384:, 256:384] = False
    density, gap, _ = judged(q, k, v, mask)
    assert found.density[0] == pytest.approx(density)
    assert found.gap[0] == pytest.approx(gap, rel=1e-4)


def oracle_mask(q, k, segment, block_q, block_k, pool, threshold, scale=None):
    """Keys by true mean mass of the segment, whole tiles until every row has its share of mass; the window dense."""
    n, p = len(q), probabilities(q, k, scale)
    mask = np.zeros((n, n), bool)
    for start in range(0, n, segment):
        end, history = min(start + segment, n), start // pool * pool
        order = np.argsort(-p[start:end, :history].mean(axis=0), kind="stable")
        for first in range(start, end, block_q):
            rows = slice(first, min(first + block_q, end))
            mask[rows, history:] = True
            for tile in range(0, history, block_k):
                got = np.where(mask & np.tri(n, dtype=bool), p, 0)[rows].sum(axis=1)
                if threshold < 1 and got.min() >= threshold:
                    break
                mask[rows, order[tile : tile + block_k]] = True
    return mask & np.tri(n, dtype=bool)


@pytest.mark.parametrize("sizes", [(64, 32, 16, 16), (96, 40, 24, 32), (128, 128, 64, 64), (50, 50, 7, 1)])
@pytest.mark.parametrize("n", [300, 256])
def test_the_oracle_walks_true_mass(sizes, n):
    q, k, v = head(n)
    found = baselines.oracle(q, k, v, *sizes, thresholds=THRESHOLDS)
    for i, threshold in enumerate(THRESHOLDS):
        density, gap, norm = judged(q, k, v, oracle_mask(q, k, *sizes, threshold))
        assert found.density[i] == pytest.approx(density, rel=1e-12)
        assert found.gap[i] == pytest.approx(gap, rel=1e-3, abs=1e-9 * norm)
        assert found.norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("method", [*OTHERS.values(), lambda *x, **y: baselines.oracle(*x, 128, 64, 32, 32, **y)])
@pytest.mark.parametrize("n", [1000, 1])
def test_threshold_one_is_dense(method, n):
    """Even where the last blocks weigh nothing beside the first."""
    q, k, v = head(n)
    k[: n // 2] += 3 * q.mean(axis=0)
    found = method(q, k, v, thresholds=(0.5, 1.0), scale=1.0)
    assert found.density[-1] == 1
    assert found.gap[-1] <= 1e-9 * found.norm


@pytest.mark.parametrize("method", [*OTHERS.values(), lambda *x, **y: baselines.oracle(*x, 128, 64, 32, 32, **y)])
def test_half_precision_is_computed_in_float32(method):
    q, k, v = head(dtype=np.float16)
    half = method(q, k, v, thresholds=(0.9,))
    wide = method(*(x.astype(np.float32) for x in (q, k, v)), thresholds=(0.9,))
    assert half.density == wide.density
    assert half.gap == wide.gap


@pytest.mark.parametrize("method", [*OTHERS.values(), lambda *x: baselines.oracle(*x, 128, 64, 32, 32)])
@pytest.mark.parametrize("wrong", ["fewer queries", "more values", "heads", "nothing"])
def test_other_shapes_are_refused(method, wrong):
    q, k, v = head(300)
    q, k, v = {
        "fewer queries": (q[:200], k, v),
        "more values": (q, k[:200], v),
        "heads": (q[None], k[None], v[None]),
        "nothing": (q[:0], k[:0], v[:0]),
    }[wrong]
    with pytest.raises(ValueError, match=r"q has shape .*; allowed: \(N, D\), \(N, D\), \(N, Dv\)"):
        method(q, k, v)


# --- points and curves -------------------------------------------------------------------------
def test_a_curve_keeps_what_lowers_the_error():
    points = Points(np.array([0.5, 0.1, 0.2, 0.3, 0.2, 0.9]), np.array([4.0, 100, 25, 36, 16, 0]), 100.0)
    curve = points.curve
    np.testing.assert_allclose(curve.density, [0.1, 0.2, 0.5])
    np.testing.assert_allclose(curve.error, [1, 0.4, 0.2])


def test_a_curve_interpolates_in_log_error():
    curve = Curve(np.array([0.1, 0.2, 0.4]), np.array([1e-1, 1e-2, 1e-4]))
    assert curve.error_at(0.3) == pytest.approx(1e-3)
    assert curve.density_at(1e-3) == pytest.approx(0.3)
    np.testing.assert_allclose(curve.error_at(np.array([0.1, 0.15, 0.4])), [1e-1, 10**-1.5, 1e-4])
    np.testing.assert_allclose(curve.density_at(curve.error_at(np.array([0.11, 0.2, 0.39]))), [0.11, 0.2, 0.39])
    assert np.isnan(curve.error_at(np.array([0.09, 0.41]))).all()
    assert np.isnan(curve.density_at(np.array([0.2, 1e-5]))).all()


def test_an_exact_method_has_an_empty_curve():
    curve = Points(np.ones(3), np.zeros(3), 0.0).curve
    assert np.isnan(curve.error_at(0.5))
    assert np.isnan(curve.density_at(np.array([0.5, 0.1]))).all()


def test_pooled_heads_are_one():
    one = Points(np.array([0.1, 0.3]), np.array([4.0, 1.0]), 10.0)
    other = Points(np.array([0.3, 0.7]), np.array([8.0, 0.0]), 30.0)
    both = Points.pooled([one, other])
    np.testing.assert_allclose(both.density, [0.2, 0.5])
    np.testing.assert_allclose(both.gap, [12, 1])
    assert both.norm == 40
    np.testing.assert_allclose(both.curve.error, np.sqrt([12 / 40, 1 / 40]))
