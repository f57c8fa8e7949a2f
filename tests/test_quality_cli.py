"""The commands sweep, calibrate and audit, through subprocesses; and `bench quality` on small files."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import s2o_cupy as s2o
from s2o_cupy.cli import main
from s2o_cupy.files import save_json


def s2o_command(*arguments):
    command = [sys.executable, "-m", "s2o_cupy", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """A file of two small heads with a common K/V head, and its arrays."""
    path = tmp_path_factory.mktemp("heads") / "heads.npz"
    rng = np.random.default_rng(0)
    q = 2 * rng.standard_normal((2, 2500, 16), np.float32)
    k, v = rng.standard_normal((2, 1, 2500, 16), np.float32)
    np.savez(path, q=q, k=k, v=v)
    return path, q, k, v


SIZES = ("--segment", 256, "--block-q", 64, "--block-k", 32, "--pool", 64)
SETTINGS = {"segment": 256, "block_q": 64, "block_k": 32, "pool": 64}


def good(done):
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def refused(done, code: int, *texts: str) -> None:
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("s2o: error: ")
    assert not done.stdout
    for text in texts:
        assert text in lines[0]


def test_sweep_prints_what_the_call_returns_and_draws_it(heads, tmp_path):
    path, q, k, v = heads
    arguments = ("sweep", path, "--taus", "0.3,0.1", "--rows", 300, "--seed", 2, *SIZES)
    curve = s2o.sweep(q, k, v, tau=(0.3, 0.1), rows=300, seed=2, **SETTINGS)
    picture = tmp_path / "sweep.png"
    report = json.loads(good(s2o_command(*arguments, "--json", "--png", picture)))
    assert report["rows"] == 300
    assert report["settings"] == s2o.Settings(**SETTINGS).as_dict()
    assert [(p["head"], p["tau"]) for p in report["points"]] == [(0, 0.3), (0, 0.1), (1, 0.3), (1, 0.1)]
    for name in ("error", "density", "captured_mass", "tail_mass"):
        got = np.array([p[name] for p in report["points"]]).reshape(2, 2).T
        np.testing.assert_allclose(got, getattr(curve, name)[:, 0], rtol=1e-6)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [picture]


def test_sweep_prints_a_table(heads):
    path, q, k, v = heads
    lines = good(s2o_command("sweep", path, "--taus", "0.3", "--rows", 100, *SIZES)).splitlines()
    assert len(lines) == 3
    for name in ("head", "tau", "density", "error", "captured", "tail"):
        assert name in lines[0]
    curve = s2o.sweep(q, k, v, tau=(0.3,), rows=100, **SETTINGS)
    assert lines[2].split()[:3] == ["1", "0.3", f"{curve.density[0, 0, 1]:.3f}"]


def test_calibrate_writes_settings_that_run_takes(heads, tmp_path):
    path = heads[0]
    out = tmp_path / "settings.json"
    arguments = ("calibrate", path, "--error", 0.1, "--per-head", "--out", out, *SIZES)
    table = good(s2o_command(*arguments))
    settings = s2o.Settings.load(out)
    assert len(settings.tau) == 2
    lines = table.splitlines()
    assert lines[1].startswith("chosen:")
    assert f"{settings.segment:7d}" in lines[1]
    assert "judged on 2500 query rows" in table
    assert str(out) in lines[-1]
    report = json.loads(good(s2o_command("run", path, "--settings", out, "--dense", "--json")))
    assert report["settings"] == json.loads(json.dumps(settings.as_dict()))
    errors = [row["error"] for row in report["heads"]]
    assert 0.05 <= max(errors) <= 0.12
    audit = json.loads(good(s2o_command("audit", path, "--settings", out, "--rows", 2500, "--json")))
    np.testing.assert_allclose([h["error"] for h in audit["heads"]], errors, rtol=1e-3)


def test_calibrate_shows_how_far_it_is(heads, capsys, monkeypatch):
    monkeypatch.setattr("s2o_cupy.progress.DELAY", 0)
    assert main(["calibrate", str(heads[0]), "--error", "0.3", *map(str, SIZES)]) == 0
    assert "calibrate [" in capsys.readouterr().err


def test_calibrate_json_holds_the_evidence(heads):
    path, *_ = heads
    report = json.loads(good(s2o_command("calibrate", path, "--error", 0.1, "--rows", 700, "--json", *SIZES)))
    assert report["rows"] == 700
    work = [trial["gflop"] for trial in report["trials"]]
    assert work == sorted(work)
    assert report["trials"][0]["settings"] == report["settings"]
    assert all(max(trial["error"]) <= 0.1 for trial in report["trials"])
    assert all(len(trial["density"]) == 2 for trial in report["trials"])


def test_audit_prints_what_the_call_returns(heads):
    path, q, k, v = heads
    arguments = ("audit", path, "--tau", 0.2, "--rows", 64, "--seed", 3, *SIZES)
    settings = s2o.Settings(tau=0.2, **SETTINGS)
    wanted = s2o.audit(q, k, v, s2o.attention(q, k, v, settings, full_output=True), rows=64, seed=3)
    assert good(s2o_command(*arguments)).strip() == str(wanted)
    report = json.loads(good(s2o_command(*arguments, "--json")))
    for row, table in zip(report["heads"], wanted.table(), strict=True):
        assert row == pytest.approx(table, rel=1e-6)


@pytest.mark.parametrize("command", ["sweep", "calibrate", "audit"])
def test_wrong_files_are_one_line(heads, tmp_path, command):
    _, q, k, v = heads
    refused(s2o_command(command, tmp_path / "missing.npz"), 1, "missing.npz", "does not exist")
    nan = v.copy()
    nan[0, 1200, 5] = np.nan
    np.savez(tmp_path / "nan.npz", q=q, k=k, v=nan)
    refused(s2o_command(command, tmp_path / "nan.npz"), 2, "v has nan at [0, 1200, 5]")
    assert [x.name for x in tmp_path.iterdir()] == ["nan.npz"]


@pytest.mark.parametrize(
    ("command", "arguments", "texts"),
    [
        ("sweep", ("--taus", "0.1,-2"), ("tau is -2.0", "0 or above")),
        ("sweep", ("--taus", "0.1,nan"), ("tau is nan",)),
        ("sweep", ("--rows", "0"), ("rows is 0", "from 1")),
        ("calibrate", ("--error", "0"), ("error is 0.0", "above 0")),
        ("calibrate", ("--error", "nan"), ("error is nan",)),
        ("calibrate", ("--error", "1e-12"), ("error is 1e-12", "the least", "tau=0")),
        ("audit", ("--rows", "-5"), ("rows is -5",)),
        ("audit", ("--tau", "-1"), ("tau is -1",)),
    ],
)
def test_wrong_options_are_one_line(heads, capsys, command, arguments, texts):
    """In this process: each start of another takes a second."""
    assert main([command, str(heads[0]), *arguments, *map(str, SIZES)]) == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.startswith("s2o: error: ")
    assert error.count("\n") == 1
    for text in texts:
        assert text in error


@pytest.mark.parametrize("taus", ["a,b", "", "0.1,,0.2"])
def test_taus_that_are_no_numbers_are_a_usage_error(heads, capsys, taus):
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", str(heads[0]), "--taus", taus])
    assert stopped.value.code == 2
    assert "argument --taus" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_picture_or_settings_that_cannot_be_written_leaves_nothing(heads, tmp_path):
    missing = tmp_path / "nowhere"
    refused(s2o_command("sweep", heads[0], "--taus", "0.3", "--png", missing / "x.png", *SIZES), 1, "nowhere")
    refused(s2o_command("calibrate", heads[0], "--error", "0.5", "--out", missing / "x.json", *SIZES), 1, "nowhere")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["sweep", "calibrate", "audit"])
def test_a_file_of_one_token(tmp_path, command):
    x = np.ones((1, 8), np.float16)
    np.savez(tmp_path / "one.npz", q=x, k=x, v=x)
    more = {"sweep": ("--taus", "0.1", "--png", tmp_path / "x.png"), "calibrate": (), "audit": ()}[command]
    assert good(s2o_command(command, tmp_path / "one.npz", *more))


# --- bench quality -----------------------------------------------------------------------------
@pytest.fixture
def bench_files(tmp_path, monkeypatch):
    """`bench quality` without the shipped samples, on files that lack axes, that share a name, and with a batch."""
    from bench import quality

    q, k, v, _ = s2o.load_sample("smollm2_code_l14")
    noise = np.random.default_rng(0).standard_normal((4, 2, 2, 300, 16), np.float32)
    arrays = {
        "a/one": (q[0, :2048], k[0, :2048], v[0, :2048]),
        "b/one": (q[1:, :1536], k[:, :1536], v[:, :1536]),
        "b/batch": (noise[0], noise[1, :, :1], noise[2, :, :1]),
    }
    for name, qkv in arrays.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.savez(tmp_path / f"{name}.npz", **dict(zip("qkv", qkv)))
    monkeypatch.setattr(quality, "NAMES", ())
    monkeypatch.setattr(quality, "TAUS", (0.8, 0.4, 0.2, 0.1, 0.05))
    return quality, [tmp_path / f"{name}.npz" for name in arrays]


def test_bench_quality_measures_every_head_of_every_file(bench_files, capsys, tmp_path):
    quality, files = bench_files
    settings = s2o.Settings(segment=128, block_q=64, block_k=32, pool=64, scale=0.125)
    report = quality.main(SimpleNamespace(files=files, settings=settings, plots=str(tmp_path)))
    assert list(report["files"]) == ["one", "one_2", "batch"]
    assert [len(f["PBS-Attn"]) for f in report["files"].values()] == [1, 2, 4]
    for file in report["files"].values():
        for method in quality.METHODS:  # all measure against the same exact attention
            assert [h["norm"] for h in file[method]] == pytest.approx([h["norm"] for h in file["ours"]], rel=1e-3)
    ratios = report["ratios"]["PBS-Attn"]
    assert 0 < ratios["compared"] <= ratios["points"]
    assert 1 < ratios["mse_least"] <= 1.0001 * ratios["mse"]
    assert report["ratios"]["oracle"]["mse"] < 1
    text = capsys.readouterr().out
    assert "batch: relative error at density, 4 heads pooled" in text
    assert f"{ratios['compared']} of {ratios['points']}" in text
    for name in report["files"]:
        assert (tmp_path / f"quality_{name}.png").read_bytes().startswith(b"\x89PNG")
    save_json(tmp_path / "report.json", report)
    assert json.loads((tmp_path / "report.json").read_text())["files"].keys() == report["files"].keys()


def test_bench_quality_scales_the_baselines_too(bench_files):
    quality, files = bench_files
    one, other = (
        quality.main(SimpleNamespace(files=files[2:], settings=s2o.Settings(scale=scale), plots=None))
        for scale in (0.1, 0.5)
    )
    for method in quality.METHODS:
        a, b = (report["files"]["batch"][method][0]["norm"] for report in (one, other))
        assert b > 1.5 * a


def test_bench_quality_refuses_what_baselines_cannot(bench_files):
    quality, files = bench_files
    with pytest.raises(ValueError, match="causal is False; allowed: True"):
        quality.main(SimpleNamespace(files=files[:1], settings=s2o.Settings(causal=False), plots=None))


def test_bench_quality_of_one_token(bench_files, tmp_path, capsys):
    quality, _ = bench_files
    x = np.ones((1, 8), np.float32)
    np.savez(tmp_path / "token.npz", q=x, k=x, v=x)
    quality.main(SimpleNamespace(files=[tmp_path / "token.npz"], settings=s2o.Settings(), plots=None))
    assert "token: relative error at density" in capsys.readouterr().out
