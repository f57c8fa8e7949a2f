"""Exact rows, audit, sweep and the pictures, against brute force and by hand."""

import sys

import ml_dtypes
import numpy as np
import pytest

import s2o_cupy as s2o
from s2o_cupy import exact, plots, reference
from s2o_cupy.exact import exact_rows, sample_rows, tile_mass
from s2o_cupy.problem import make_problem
from s2o_cupy.quality import Sweep

SMALL = {"segment": 64, "block_q": 32, "block_k": 16, "pool": 16}


def heads(batch=1, heads_q=2, heads_kv=1, n_q=300, n_k=None, dim=16, dim_v=8, dtype=np.float32, seed=0):
    """4-D arrays whose attention is peaked enough for a walk to stop early."""
    rng = np.random.default_rng(seed)
    n_k = n_k or n_q
    shapes = ((batch, heads_q, n_q, dim), (batch, heads_kv, n_k, dim), (batch, heads_kv, n_k, dim_v))
    q, k, v = (rng.standard_normal(shape) for shape in shapes)
    return [x.astype(dtype) for x in (2 * q, k, v)]


def ranked(q, k, v, **settings):
    """The ranked path at any shape, with its plan."""
    plan = s2o.plan(q, k, **{**SMALL, **settings})
    return s2o.attend(q, k, v, plan, full_output=True)


def brute(q, k, v, causal=True):
    """Exact probabilities (B, Hq, Nq, Nk) and answer, float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    logit = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1])
    if causal:
        n_q, n_k = logit.shape[2:]
        logit[..., np.arange(n_k) > np.arange(n_q)[:, None] + n_k - n_q] = -np.inf
    p = np.exp(logit - logit.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return p, p @ v


# --- exact rows ------------------------------------------------------------------------------
@pytest.mark.parametrize("mask", [{}, {"causal": False}, {"window": 1}, {"window": 40}, {"window": 300}], ids=str)
@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("n_q", [37, 90])
def test_exact_rows_are_those_of_the_reference(monkeypatch, mask, small, n_q):
    if small:  # several runs of rows, and of 256 keys
        monkeypatch.setattr(exact, "_ROWS", 8)
        monkeypatch.setattr(exact, "_LOGITS", 1)
    q, k, v = heads(batch=2, heads_q=4, heads_kv=2, n_q=n_q, n_k=600, dtype=np.float64)
    problem = make_problem(q, k, v, s2o.Settings(scale=0.7, **mask))
    rows = sample_rows(n_q, 23, 1)
    found = exact_rows(problem, q, k, v, rows)
    out, lse = reference.dense(problem, q, k, v)
    np.testing.assert_allclose(found.out, out[:, :, rows], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.lse, lse[:, :, rows], rtol=1e-12)


def test_a_first_row_sees_only_the_first_key():
    q, k, v = heads(n_q=20)
    found = exact_rows(make_problem(q, k, v, s2o.Settings()), q, k, v, np.array([0]))
    np.testing.assert_array_equal(found.out[0, 1, 0], v[0, 0, 0])


@pytest.mark.parametrize(("n_q", "rows"), [(100, 7), (1000, 256), (5, 4), (2**20, 300)])
def test_sampled_rows_come_one_from_each_equal_run(n_q, rows):
    edges = np.linspace(0, n_q, rows + 1).astype(int)
    found = sample_rows(n_q, rows, 3)
    assert len(found) == rows
    assert (edges[:-1] <= found).all()
    assert (found < edges[1:]).all()
    np.testing.assert_array_equal(found, sample_rows(n_q, rows, 3))
    if n_q > 5:
        assert (found != sample_rows(n_q, rows, 4)).any()


def test_all_rows_where_there_are_no_more():
    np.testing.assert_array_equal(sample_rows(9, 9, 0), np.arange(9))
    np.testing.assert_array_equal(sample_rows(9, 1000, 0), np.arange(9))


@pytest.mark.parametrize(("rows", "error"), [(0, ValueError), (-3, ValueError), (2.5, TypeError), (True, TypeError)])
def test_a_wrong_number_of_rows_is_refused(rows, error):
    q, k, v = heads(n_q=20)
    result = ranked(q, k, v)
    with pytest.raises(error, match=f"rows is {rows}; allowed: an integer from 1"):
        s2o.audit(q, k, v, result, rows=rows)


@pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), (1.5, TypeError), ("x", TypeError), (None, TypeError)])
def test_a_wrong_seed_is_refused(seed, error):
    """Where every row is compared, too, and nothing is drawn."""
    for call in (s2o.sweep, s2o.calibrate):
        with pytest.raises(error, match=f"seed is {seed!r}; allowed: an integer from 0"):
            call(*heads(n_q=20), seed=seed)
    with pytest.raises(error, match=f"seed is {seed!r}; allowed: an integer from 0"):
        s2o.audit(*heads(n_q=20), ranked(*heads(n_q=20)), seed=seed)


# --- audit -----------------------------------------------------------------------------------
def test_audit_and_calibrate_know_windows():
    q, k, v = heads(n_q=300)
    result = s2o.attention(q, k, v, window=20, full_output=True)
    report = s2o.audit(q, k, v, result, rows=300)
    assert report.error.max() < 1e-6
    assert (report.density == 1).all()
    found = s2o.calibrate(q, k, v, error=0.1, window=20, variants=({},))
    assert found.window == 20
    assert found.evidence[0].error.max() < 1e-6


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("causal", [True, False])
def test_audit_of_every_row_is_brute_force(dtype, causal):
    q, k, v = heads(batch=2, heads_q=4, heads_kv=2, dtype=dtype)
    result = ranked(q, k, v, tau=0.1, causal=causal)
    report = s2o.audit(q, k, v, result, rows=300)
    _, wanted = brute(q, k, v, causal)
    gap = result.out.astype(np.float64) - wanted
    norms = np.linalg.norm(gap, axis=-1) / np.linalg.norm(wanted, axis=-1)
    error = np.linalg.norm(gap, axis=(2, 3)) / np.linalg.norm(wanted, axis=(2, 3))
    out = result.out.astype(np.float64)
    cosine = (out * wanted).sum(-1) / np.linalg.norm(out, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert report.error.shape == (2, 4)
    assert (report.error > 0.01).all()  # there is something to measure
    np.testing.assert_allclose(report.error, error, rtol=1e-4)
    np.testing.assert_allclose(report.mse, (gap**2).mean(axis=(2, 3)), rtol=1e-4)
    np.testing.assert_allclose(report.error_p99, np.quantile(norms, 0.99, axis=-1), rtol=1e-4)
    np.testing.assert_allclose(report.cosine, cosine.mean(axis=-1), rtol=1e-6)
    np.testing.assert_array_equal(report.density, result.stats.head_density)
    np.testing.assert_array_equal(report.rows, np.arange(300))
    assert (report.low <= report.error).all()
    assert (report.error <= report.high).all()
    assert (report.high > report.low).all()


def walked_mass(q, k, v, plan, result):
    """(B, Hq, Nq) exact mass of the window and of the keys that each row tile walked, from the plan's own lists."""
    problem, (p, _) = result.stats.problem, brute(q, k, v)
    mass = np.zeros(p.shape[:3])
    for b, h, tile in np.ndindex(result.stats.tiles.shape):
        s, first = problem.tile_segment[tile], problem.tile_start[tile]
        rows = first + np.arange(problem.tile_rows[tile])
        ranked_keys = plan.kv_order[plan.kv_offsets[b, h, s] : plan.kv_offsets[b, h, s + 1]]
        walked = ranked_keys[: result.stats.tiles[b, h, tile] * problem.settings.block_k]
        keys = np.concatenate([walked, np.arange(problem.history[s], p.shape[3])])
        mass[b, h, rows] = p[b, h][rows][:, keys].sum(axis=1)
    return mass


@pytest.mark.parametrize("tail", [None, "pooled"])
def test_captured_mass_is_what_was_walked(tail):
    q, k, v = heads()
    plan = s2o.plan(q, k, **SMALL, tail=tail)
    result = s2o.attend(q, k, v, plan, tau=0.5, full_output=True)
    report = s2o.audit(q, k, v, result, rows=1000)
    mass = walked_mass(q, k, v, plan, result)
    assert 0.5 < mass.mean() < 0.97
    np.testing.assert_allclose(report.captured_mass, mass.mean(axis=-1), rtol=1e-5)
    np.testing.assert_allclose(report.captured_min, mass.min(axis=-1), rtol=1e-5)


def test_a_sample_is_its_rows_and_seeds_reproduce():
    q, k, v = heads()
    result = ranked(q, k, v, tau=0.1)
    one, again, other = (s2o.audit(q, k, v, result, rows=40, seed=seed) for seed in (5, 5, 6))
    _, wanted = brute(q, k, v)
    gap = (result.out - wanted)[:, :, one.rows]
    error = np.linalg.norm(gap, axis=(2, 3)) / np.linalg.norm(wanted[:, :, one.rows], axis=(2, 3))
    np.testing.assert_allclose(one.error, error, rtol=1e-4)
    for name in ("rows", "error", "low", "high", "captured_mass"):
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
        assert (getattr(one, name) != getattr(other, name)).any()


def test_the_interval_covers_the_error_of_all_rows():
    q, k, v = heads(n_q=1200, dim=8)
    result = ranked(q, k, v, tau=0.1)
    true = s2o.audit(q, k, v, result, rows=1200).error
    samples = [s2o.audit(q, k, v, result, rows=100, seed=seed) for seed in range(20)]
    hits = np.mean([(x.low <= true) & (true <= x.high) for x in samples])
    assert hits >= 0.8
    assert np.mean([x.high - x.low for x in samples]) < true.mean()


def test_audit_of_a_dense_answer_finds_rounding():
    q, k, v = heads()
    report = s2o.audit(q, k, v, s2o.dense_attention(q, k, v, full_output=True))
    assert (report.error < 1e-5).all()
    np.testing.assert_allclose(report.captured_mass, 1, rtol=1e-5)
    np.testing.assert_array_equal(report.density, 1)


def test_audit_reads_arrays_that_lack_axes_and_prints_a_line_a_head():
    q, k, v = heads()
    four, three = (ranked(*x, tau=0.1) for x in ((q, k, v), (q[0], k[0], v[0])))
    a, b = s2o.audit(q, k, v, four), s2o.audit(q[0], k[0], v[0], three)
    np.testing.assert_array_equal(a.error, b.error)
    assert len(str(a).splitlines()) == 3
    assert a.table()[1]["error"] == a.error[0, 1]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_audit_of_one_token(dtype):
    q, k, v = heads(n_q=1, dtype=dtype)
    report = s2o.audit(q, k, v, s2o.attention(q, k, v, full_output=True))
    np.testing.assert_allclose(report.error, 0, atol=1e-6)
    np.testing.assert_allclose(report.low, 0, atol=1e-6)
    np.testing.assert_allclose(report.cosine, 1, atol=1e-6)


def test_audit_where_every_value_is_zero():
    q, k, v = heads(n_q=50)
    report = s2o.audit(q, k, 0 * v, ranked(q, k, 0 * v))
    np.testing.assert_array_equal(report.error, 0)
    np.testing.assert_array_equal(report.cosine, 1)


@pytest.mark.parametrize("call", ["audit", "sweep", "calibrate"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_nan_is_named_with_its_place(call, name):
    q, k, v = heads()
    result = s2o.attention(q, k, v, full_output=True)
    {"q": q, "k": k, "v": v}[name][0, 0, 41, 3] = np.nan
    arguments = (q, k, v, result) if call == "audit" else (q, k, v)
    with pytest.raises(ValueError, match=rf"{name} has nan at \[0, 0, 41, 3\]"):
        getattr(s2o, call)(*arguments)


def test_audit_refuses_what_is_no_result():
    q, k, v = heads()
    with pytest.raises(TypeError, match="result is a ndarray; allowed: the AttentionResult of full_output=True"):
        s2o.audit(q, k, v, s2o.attention(q, k, v))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_q": 200, "n_k": 300}, "q, k, v have n_q 200 and the result 300"),
        ({"n_q": 300, "n_k": 301}, "q, k, v have n_k 301 and the result 300"),
        ({"heads_q": 4}, "q, k, v have heads_q 4 and the result 2"),
        ({"heads_kv": 2}, "q, k, v have heads_kv 2 and the result 1"),
        ({"dim_v": 4}, "q, k, v have dim_v 4 and the result 8"),
        ({"batch": 2}, "q, k, v have batch 2 and the result 1"),
        ({"dtype": np.float64}, "q, k, v have dtype float64 and the result float32"),
    ],
)
def test_audit_refuses_arrays_of_another_call(changes, message):
    result = ranked(*heads())
    with pytest.raises(ValueError, match=message):
        s2o.audit(*heads(**changes), result)


def test_audit_holds_no_more_than_a_draw_at_a_time():
    import tracemalloc

    q, k, v = heads(n_q=4096, dim=1, dim_v=1)
    result = s2o.attention(q, k, v, full_output=True, segment=512, block_k=128)
    tracemalloc.start()
    s2o.audit(q, k, v, result, rows=4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 48e6  # 500 draws of all rows of both heads would take 33 MB for each of gap and norm, and draws


# --- sweep -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def curve():
    q, k, v = heads(n_q=600)
    steps = []
    taus = (0.5, 0.3, 0.2, 0.1, 0.05)
    found = s2o.sweep(q, k, v, tau=taus, rows=600, progress=lambda *step: steps.append(step), **SMALL)
    return (q, k, v), taus, found, steps


def test_sweep_measures_what_attend_returns(curve):
    (q, k, v), taus, found, _ = curve
    _, wanted = brute(q, k, v)
    np.testing.assert_array_equal(found.tau, taus)
    assert found.settings == s2o.Settings(**SMALL)
    plan = s2o.plan(q, k, **SMALL)
    for place, tau in enumerate(taus):
        result = s2o.attend(q, k, v, plan, tau=tau, full_output=True)
        error = np.linalg.norm(result.out - wanted, axis=(2, 3)) / np.linalg.norm(wanted, axis=(2, 3))
        np.testing.assert_allclose(found.error[place], error, rtol=1e-4)
        np.testing.assert_array_equal(found.density[place], result.stats.head_density)
        np.testing.assert_allclose(found.tail_mass[place], result.stats.tail_mass.mean(axis=-1), rtol=1e-5)
        np.testing.assert_allclose(
            found.captured_mass[place], walked_mass(q, k, v, plan, result).mean(axis=-1), rtol=1e-5
        )


def test_density_falls_and_error_grows_with_tau(curve):
    found = curve[2]
    assert (np.diff(found.density, axis=0) >= 0).all()
    assert (np.diff(found.density.mean(axis=(1, 2))) > 0).all()
    assert (np.diff(found.error.mean(axis=(1, 2))) < 0).all()
    assert (np.diff(found.captured_mass, axis=0) >= 0).all()


def test_progress_counts_the_points(curve):
    assert curve[3] == [(done, 5) for done in range(1, 6)]


def test_sweep_samples_rows(curve):
    q, k, v = curve[0]
    one, again, other = (s2o.sweep(q, k, v, tau=(0.1,), rows=50, seed=s, **SMALL) for s in (1, 1, 2))
    np.testing.assert_array_equal(one.error, again.error)
    assert (one.error != other.error).any()
    np.testing.assert_array_equal(one.density, other.density)


def test_interpolation_by_hand():
    column = np.array([0.1, 0.3, 0.5]).reshape(3, 1, 1)
    error = np.array([1e-1, 1e-2, 1e-4]).reshape(3, 1, 1)
    empty = np.zeros((3, 1, 1))
    sweep = Sweep(s2o.Settings(), np.array([0.3, 0.2, 0.1]), column, error, empty, empty)
    assert sweep.error_at(0.3)[0, 0] == pytest.approx(1e-2)
    assert sweep.error_at(0.2)[0, 0] == pytest.approx(10**-1.5)
    assert sweep.error_at(0.45)[0, 0] == pytest.approx(10**-3.5)
    assert sweep.density_at(1e-3)[0, 0] == pytest.approx(0.4)
    assert sweep.density_at(1e-1)[0, 0] == pytest.approx(0.1)
    for outside in (sweep.error_at(0.09), sweep.error_at(0.51), sweep.density_at(0.2), sweep.density_at(5e-5)):
        assert np.isnan(outside).all()
    for wrong in (0, -1.0, np.nan):
        with pytest.raises(ValueError, match=r"error is .*; allowed: a finite number above 0"):
            sweep.density_at(wrong)
    with pytest.raises(TypeError, match="density is 'x'; allowed: a finite number"):
        sweep.error_at("x")


@pytest.mark.parametrize(
    ("tau", "error", "message"),
    [
        ((), ValueError, "tau is empty; allowed"),
        (0.1, TypeError, "tau is 0.1; allowed: a sequence"),
        ("0.1", TypeError, "tau is '0.1'; allowed: a sequence"),
        (np.array(0.1), TypeError, "allowed: a sequence"),
        (np.ones((2, 2)), TypeError, r"tau is an array of shape \(2, 2\); allowed: a sequence"),
        (((0.1, 0.2),), TypeError, r"tau is \(0.1, 0.2\); allowed"),
        ((0.1, -1), ValueError, "tau is -1.0; allowed"),
        ((0.1, np.nan), ValueError, "tau is nan; allowed"),
    ],
)
def test_wrong_taus_are_refused(tau, error, message):
    with pytest.raises(error, match=message):
        s2o.sweep(*heads(), tau=tau)


def test_sweep_passes_the_backend_on():
    with pytest.raises((ValueError, ImportError), match="tpu"):
        s2o.sweep(*heads(), tau=(0.1,), backend="tpu")


def test_sweep_of_one_token():
    found = s2o.sweep(*heads(n_q=1), tau=(0.1, 0.0))
    np.testing.assert_allclose(found.error, 0, atol=1e-6)
    np.testing.assert_array_equal(found.density, 1)


@pytest.mark.parametrize("call", ["sweep", "calibrate"])
@pytest.mark.parametrize(("n_q", "n_k", "settings"), [(0, 0, {}), (3, 0, {"causal": False})])
def test_nothing_to_measure_is_refused(call, n_q, n_k, settings):
    q, k, v = (np.zeros((1, 1, n, 8), np.float32) for n in (n_q, n_k, n_k))
    with pytest.raises(ValueError, match="allowed: at least one query and one key"):
        getattr(s2o, call)(q, k, v, **settings)


# --- tile mass and pictures --------------------------------------------------------------------
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n_q", "n_k", "segment"), [(100, 100, None), (70, 100, None), (100, 100, 48)])
def test_tile_mass_is_the_mean_probability(causal, n_q, n_k, segment):
    q, k, v = heads(n_q=n_q, n_k=n_k)
    p, _ = brute(q, k, v, causal)
    starts = [0, 32, 48, 80, 96] if segment else [s for s in (0, 32, 64, 96) if s < n_q]
    wanted = np.stack([p[0, 1, a:b].mean(axis=0) for a, b in zip(starts, [*starts[1:], n_q])])
    mass = tile_mass(q[0, 1], k[0, 0], 32, causal=causal, segment=segment)
    np.testing.assert_allclose(mass, wanted, atol=1e-6)
    np.testing.assert_allclose(mass.sum(axis=1), 1, rtol=1e-5)


@pytest.fixture(scope="module")
def head():
    q, k, v = (x[0, 0] for x in heads(n_q=400))
    plan = s2o.plan(q, k, **SMALL)
    stats = s2o.attend(q, k, v, plan, tau=0.1, full_output=True).stats
    return tile_mass(q, k, 32), plan, stats


def is_png(path):
    data = path.read_bytes()
    return data.startswith(b"\x89PNG\r\n\x1a\n") and data.rstrip().endswith(b"IEND\xaeB`\x82") and len(data) > 5000


def test_pictures_are_whole_pngs(head, tmp_path):
    plots.save_before_after(tmp_path / "map.png", *head, "a head of cost $5 and $6_")
    curves = {"ours": (np.linspace(0.1, 0.5, 5)[:, None], np.geomspace(0.1, 1e-3, 5)[:, None]), "other": ([[0.1]],) * 2}
    curves["other"] = (np.array([[0.1, 0.2]]), np.array([[0.1, 0.0]]))
    plots.save_sweep(tmp_path / "sweep.png", curves, "costs $5 and $6_")
    plots.save_sweep(tmp_path / "nothing.png", {"exact": (np.ones((2, 1)), np.zeros((2, 1)))}, "one token")
    many = (np.linspace(0.1, 0.5, 12 * 3).reshape(3, 12), np.geomspace(0.1, 1e-3, 12 * 3).reshape(3, 12))
    plots.save_sweep(tmp_path / "many.png", {"sparse": many}, "twelve heads")
    assert all(is_png(tmp_path / f"{name}.png") for name in ("map", "sweep", "nothing", "many"))
    assert len(list(tmp_path.iterdir())) == 4


def test_axes_are_labelled_with_units(head, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    plots.save_before_after(tmp_path / "map.png", *head, "head")
    before, after, along = figures[0].axes[:3]
    assert before.get_ylabel() == "row tile (32 queries each)"
    assert "tokens" in before.get_xlabel()
    assert after.get_xlabel()
    assert along.get_xlabel()
    assert along.get_ylabel()
    assert "head, density" in figures[0].get_suptitle()


def test_the_map_refuses_what_does_not_go_together(head, tmp_path):
    mass, plan, stats = head
    with pytest.raises(ValueError, match="mass has 12 rows and the result 13 row tiles"):
        plots.save_before_after(tmp_path / "map.png", mass[:-1], plan, stats, "head")
    q, k, v = (x[0, 0] for x in heads(n_q=10))
    plan = s2o.plan(q, k, **SMALL)
    stats = s2o.attend(q, k, v, plan, full_output=True).stats
    with pytest.raises(ValueError, match="nothing was ranked over 10 keys"):
        plots.save_before_after(tmp_path / "map.png", tile_mass(q, k, 32), plan, stats, "head")
    assert not list(tmp_path.iterdir())


def test_a_missing_matplotlib_says_what_to_install(head, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    curves = {"ours": (np.ones((1, 1)), np.ones((1, 1)))}
    for draw in (
        plots.require,
        lambda: plots.save_sweep(tmp_path / "x.png", curves, ""),
        lambda: plots.save_before_after(tmp_path / "x.png", *head, ""),
    ):
        with pytest.raises(ImportError, match=r"^pictures need matplotlib: pip install 's2o-cupy\[plot\]'$"):
            draw()
    assert not list(tmp_path.iterdir())


def test_a_failed_drawing_leaves_the_old_picture(head, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def breaks(self, file, **_):
        file.write(b"\x89PNG half")
        raise OSError("disk full")

    path = tmp_path / "x.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", breaks)
    with pytest.raises(OSError, match="disk full"):
        plots.save_before_after(path, *head, "head")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_importing_the_package_does_not_import_matplotlib():
    import subprocess

    code = "import sys, s2o_cupy, s2o_cupy.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
