"""calibrate: the error it promises is the error that attention makes, at the least work of what was tried."""

import pickle

import numpy as np
import pytest

import s2o_cupy as s2o
from s2o_cupy.calibration import VARIANTS, _search

ROWS = {"smollm2_code_l14": 2048, "smollm2_prose_l08": 4096}


@pytest.fixture(scope="module", params=list(ROWS))
def sample(request):
    """Three real heads, and their exact attention."""
    n = ROWS[request.param]
    q, k, v, _ = s2o.load_sample(request.param)
    arrays = [np.ascontiguousarray(x[:, :n]) for x in (q, k, v)]
    return arrays, s2o.dense_attention(*(x.astype(np.float32) for x in arrays), full_output=True)


def measured(arrays, exact, settings):
    """Relative error of each head over all rows, and density."""
    result = s2o.attend(*arrays, s2o.plan(*arrays[:2], settings), full_output=True)
    gap = result.out.astype(np.float64) - exact.out
    return np.linalg.norm(gap, axis=(1, 2)) / np.linalg.norm(exact.out, axis=(1, 2)), result


def small(n=300, heads_q=2, dtype=np.float32, seed=0, batch=1):
    rng = np.random.default_rng(seed)
    q = 2 * rng.standard_normal((batch, heads_q, n, 16))
    k, v = rng.standard_normal((2, batch, 1, n, 16))
    return [x.astype(dtype) for x in (q, k, v)]


SMALL = {"segment": 64, "block_q": 32, "block_k": 16, "pool": 16}


@pytest.mark.parametrize("error", [0.05, 0.02])
def test_the_error_is_met_on_all_rows(sample, error):
    arrays, exact = sample
    settings = s2o.calibrate(*arrays, error=error)
    found, result = measured(arrays, exact, settings)
    assert 0.5 * error <= found.max() <= 1.2 * error
    np.testing.assert_allclose(settings.evidence[0].error, found, rtol=0.01, atol=1e-4)
    np.testing.assert_allclose(settings.evidence[0].density, result.stats.head_density[0])
    assert settings.rows == arrays[0].shape[1]


def test_per_head_brings_every_head_near(sample):
    arrays, exact = sample
    one = s2o.calibrate(*arrays, error=0.03, variants=({},))
    each = s2o.calibrate(*arrays, error=0.03, variants=({},), per_head=True)
    assert len(each.tau) == 3
    found, result = measured(arrays, exact, each)
    assert (found <= 1.2 * 0.03).all()
    looser = each.replace(tau=[1.5 * t for t in each.tau])  # one row can carry an error's jump past the target
    assert ((found >= 0.5 * 0.03) | (measured(arrays, exact, looser)[0] > 0.03) | (np.array(each.tau) == 1)).all()
    assert result.stats.density < measured(arrays, exact, one)[1].stats.density


def test_captured_mass_is_the_metric(sample):
    arrays, exact = sample
    settings = s2o.calibrate(*arrays, error=0.04, metric="captured_mass", variants=({},), tail=None)
    _, result = measured(arrays, exact, settings)
    lost = 1 - np.exp(result.lse.astype(np.float64) - exact.lse).mean(axis=-1)
    assert settings.tail is None
    assert 0.5 * 0.04 <= lost.max() <= 1.2 * 0.04
    np.testing.assert_allclose(settings.evidence[0].error, lost, rtol=1e-3)


def test_a_sample_of_rows_comes_near(sample):
    arrays, exact = sample
    one, again = (s2o.calibrate(*arrays, error=0.05, rows=512, variants=({},), seed=s) for s in (1, 1))
    assert one.rows == 512
    assert one == again
    assert 0.3 * 0.05 < measured(arrays, exact, one)[0].max() < 2 * 0.05


def test_the_least_work_is_chosen_and_the_evidence_sorted(sample):
    arrays, _ = sample
    settings = s2o.calibrate(*arrays, error=0.1)
    assert [t.work for t in settings.evidence] == sorted(t.work for t in settings.evidence)
    assert settings.evidence[0].settings == settings
    assert all((t.error <= 0.1).all() for t in settings.evidence)
    tried = {s2o.Settings(tau=0.0, **x) for x in VARIANTS}
    assert {t.settings.replace(tau=0.0) for t in settings.evidence} <= tried
    assert 1 <= len(settings.evidence) <= len(tried)


def test_the_result_is_settings_to_use_save_and_load(tmp_path):
    q, k, v = small()
    settings = s2o.calibrate(q, k, v, 0.1, per_head=True, settings=s2o.Settings(**SMALL), variants=({},), scale=0.3)
    assert isinstance(settings, s2o.Settings)
    assert settings.scale == 0.3
    assert settings.segment == 64
    settings.save(tmp_path / "settings.json")
    loaded = s2o.Settings.load(tmp_path / "settings.json")
    assert type(loaded) is s2o.Settings
    assert loaded == settings
    assert settings == loaded
    assert hash(loaded) == hash(settings)
    assert settings != loaded.replace(tau=0.0)
    assert pickle.loads(pickle.dumps(settings)).rows == settings.rows == 300
    assert hash(settings) == hash(settings.replace(**settings.as_dict()))
    assert "_hash" not in vars(pickle.loads(pickle.dumps(settings)))  # another process hashes texts otherwise
    np.testing.assert_array_equal(s2o.attention(q, k, v, settings), s2o.attention(q, k, v, loaded))
    assert settings.replace(tau=0.5).tau == 0.5


def test_a_batch_counts_its_worst_entry():
    one, other = small(), small(seed=1)
    q, k, v = (np.concatenate(x) for x in zip(one, other))
    settings = s2o.calibrate(q, k, v, 0.1, variants=({},), **SMALL)
    worst = max(
        s2o.audit(*x, s2o.attend(*x, s2o.plan(*x[:2], settings), full_output=True), rows=300).error.max()
        for x in (one, other)
    )
    assert settings.evidence[0].error.max() == pytest.approx(worst, rel=1e-4)
    assert settings.evidence[0].error.shape == (2,)


@pytest.mark.parametrize("per_head", [True, False])
def test_an_error_that_cannot_be_met_says_what_can(sample, per_head):
    arrays, exact = sample
    rounding = measured(arrays, exact, s2o.Settings(tau=0))[0].max()
    with pytest.raises(
        ValueError, match=r"error is 1e-07; the least that these settings reach is .*, at tau=0"
    ) as raised:
        s2o.calibrate(*arrays, error=1e-7, per_head=per_head, variants=({},))
    least = float(str(raised.value).split(" reach is ")[1].split(",")[0])
    assert least == pytest.approx(rounding, rel=0.05)
    assert (
        s2o.calibrate(*arrays, error=1.2 * least, per_head=per_head, variants=({},)).evidence[0].error.max()
        <= 1.2 * least
    )


def test_a_cap_that_leaves_too_little_is_met_by_another_ranking():
    q, k, v = small()
    tight = {"cap": 0.05, "tail": None}
    with pytest.raises(ValueError, match=r"error is 0.01; the least that these settings reach is 0.[1-9]"):
        s2o.calibrate(q, k, v, 0.01, variants=({},), **SMALL, **tight)
    settings = s2o.calibrate(q, k, v, 0.01, variants=({}, {"cap": 1.0}), **SMALL, **tight)
    assert settings.cap == 1
    assert len(settings.evidence) == 1


def test_any_error_is_met_by_the_loosest():
    q, k, v = small()
    settings = s2o.calibrate(q, k, v, 5.0, variants=({},), **SMALL)
    assert settings.tau == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_one_token(dtype):
    settings = s2o.calibrate(*small(n=1, dtype=dtype), error=0.01)
    assert settings.tau == 1
    assert settings.rows == 1
    assert settings.evidence[0].error.max() < 1e-3


def test_progress_counts_the_variants():
    seen = []
    s2o.calibrate(*small(n=20), variants=({}, {"segment": 128}), progress=lambda *x: seen.append(x))
    assert seen == [(0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"error": 0}, ValueError, "error is 0.0; allowed: a finite number above 0"),
        ({"error": -0.1}, ValueError, "error is -0.1; allowed"),
        ({"error": np.nan}, ValueError, "error is nan; allowed"),
        ({"error": "0.1"}, TypeError, "error is '0.1'; allowed"),
        ({"error": True}, TypeError, "error is True; allowed"),
        ({"metric": "cosine"}, ValueError, "metric is 'cosine'; allowed: 'relative', 'captured_mass'"),
        ({"variants": ()}, ValueError, "variants is empty; allowed"),
        ({"variants": None}, TypeError, "variants is None; allowed: a sequence of dicts"),
        ({"variants": {"segment": 128}}, TypeError, "variants is {'segment': 128}; allowed: a sequence of dicts"),
        ({"variants": ({"scale": 1.0},)}, ValueError, "variants change causal or scale"),
        ({"variants": ({}, {"causal": False})}, ValueError, "variants change causal or scale"),
        ({"variants": ({"segments": 3},)}, TypeError, "unknown setting 'segments'"),
        ({"rows": 0}, ValueError, "rows is 0; allowed"),
        ({"colour": 1}, TypeError, "unknown setting 'colour'"),
        ({"backend": "tpu"}, ValueError, "tpu"),
    ],
)
def test_wrong_arguments_are_refused(keywords, error, message):
    with pytest.raises(error, match=message):
        s2o.calibrate(*small(n=20), **keywords)


@pytest.mark.parametrize("power", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("target", [1e-3, 0.03, 0.4])
@pytest.mark.parametrize("per_head", [True, False])
def test_the_search_lands_near_on_power_laws(power, target, per_head):
    """Errors that grow as a power of tau, a different one for each head: met, and not by far, in a few steps."""
    factor, calls = np.array([0.2, 0.7, 1.0]), []

    def measure(tau):
        calls.append(tau)
        return factor * np.broadcast_to(tau, 3) ** power, 1 - np.broadcast_to(tau, 3) / 2

    found = _search(measure, target, np.full(3, target), per_head, lambda density: False)
    assert found.meets
    assert len(calls) <= 9
    assert (found.error <= target).all()
    assert (found.tau > 0).all()
    assert (found.tau <= 1).all()
    judged = found.error if per_head else found.error.max()
    assert ((judged >= 0.5 * target) | (found.tau == 1)).all()
    np.testing.assert_allclose(found.density, 1 - found.tau / 2)


def test_a_search_that_must_cost_more_is_given_up():
    calls = []

    def measure(tau):
        calls.append(tau)
        return np.array([tau]), np.array([0.5])

    found = _search(measure, 0.01, np.full(1, 0.1), False, lambda density: bool(density[0] >= 0.5))
    assert not found.meets
    assert calls == [0.1]


def test_the_search_survives_a_cliff():
    """An error that jumps between tau=0.9 and 1, and one that is zero below a tau."""
    found = _search(
        lambda tau: (np.array([0.02 if tau < 0.9 else 3.0]), np.ones(1)),
        0.05,
        np.full(1, 0.05),
        False,
        lambda density: False,
    )
    assert found.meets
    assert 0.2 < found.tau[0] < 0.9
    found = _search(
        lambda tau: (np.array([0.0 if tau < 1e-3 else 1.0]), np.ones(1)),
        0.05,
        np.full(1, 0.05),
        False,
        lambda density: False,
    )
    assert found.meets
    assert 1e-5 < found.tau[0] < 1e-3
