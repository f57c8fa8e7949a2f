"""The command `s2o`, through subprocesses: answers, files, exit codes and one-line errors."""

import json
import subprocess
import sys

import numpy as np
import pytest

import s2o_cupy as s2o
from s2o_cupy import cli
from s2o_cupy.call import Call


def s2o_command(*arguments, **kwargs):
    command = [sys.executable, "-m", "s2o_cupy", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **kwargs)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """A file of small heads, and its arrays."""
    path = tmp_path_factory.mktemp("heads") / "heads.npz"
    q = np.random.default_rng(0).standard_normal((2, 2500, 16), np.float32)
    k, v = np.random.default_rng(1).standard_normal((2, 1, 2500, 16), np.float32)
    np.savez(path, q=q, k=k, v=v)
    return path, q, k, v


def refused(done, code: int, *texts: str) -> None:
    """One clear line on standard error, the exit code, and never a traceback."""
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("s2o: error: ")
    for text in texts:
        assert text in lines[0]


def test_run_writes_what_attention_returns(heads, tmp_path):
    path, q, k, v = heads
    out = tmp_path / "out.npz"
    done = s2o_command("run", path, "--out", out, "--tau", "0.05", "--segment", 256, "--block-k", 64)
    assert done.returncode == 0, done.stderr
    wanted = s2o.attention(q, k, v, tau=0.05, segment=256, block_k=64, full_output=True)
    with np.load(out) as answer:
        np.testing.assert_array_equal(answer["out"], wanted.out)
        np.testing.assert_array_equal(answer["lse"], wanted.lse)
    assert f"{wanted.stats.head_density[0, 0]:.3f}" in done.stdout


def test_run_json_reports_the_error_against_dense(heads):
    path, q, k, v = heads
    done = s2o_command("run", path, "--dense", "--json", "--rank", "mean", "--tail", "none")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    exact = s2o.dense_attention(q, k, v)
    out = s2o.attention(q, k, v, rank="mean", tail=None)
    for head in range(2):
        error = np.linalg.norm(out[head] - exact[head]) / np.linalg.norm(exact[head])
        assert report["heads"][head]["error"] == pytest.approx(error, rel=1e-5)
    assert report["settings"]["tail"] is None


def test_run_with_a_window(heads):
    path, q, k, v = heads
    done = s2o_command("run", path, "--dense", "--json", "--window", 50)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["path"], report["settings"]["window"]) == ("dense", 50)
    assert max(head["error"] for head in report["heads"]) == 0
    assert np.abs(s2o.dense_attention(q, k, v) - s2o.attention(q, k, v, window=50)).max() > 0.01
    refused(s2o_command("run", path, "--window", 50, "--no-causal"), 2, "window is 50 and causal False")


def test_run_takes_three_npy_files_and_a_settings_file(heads, tmp_path):
    _, q, k, v = heads
    for name, x in (("q", q), ("k", k), ("v", v)):
        np.save(tmp_path / f"{name}.npy", x)
    s2o.Settings(tau=0.2, causal=False).save(tmp_path / "settings.json")
    files = [tmp_path / f"{name}.npy" for name in "qkv"]
    done = s2o_command("run", *files, "--settings", tmp_path / "settings.json", "--segment", 512, "--json")
    assert done.returncode == 0, done.stderr
    settings = json.loads(done.stdout)["settings"]
    assert (settings["tau"], settings["causal"], settings["segment"]) == (0.2, False, 512)


def test_demo_draws_and_reports_every_sample_head(tmp_path):
    picture = tmp_path / "demo.png"
    done = s2o_command("demo", "--sample", "smollm2_prose_l08", "--png", picture, "--json")
    assert done.returncode == 0, done.stderr
    heads = json.loads(done.stdout)["heads"]
    assert [row["head"] for row in heads] == [f"smollm2_prose_l08:{h}" for h in range(3)]
    for row in heads:
        assert 0.05 < row["density"] < 1
        assert 0 < row["error"] < 0.2
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_info_lists_versions_and_backends():
    report = json.loads(s2o_command("info", "--json").stdout)
    assert report["versions"]["numpy"] == np.__version__
    assert report["backends"]["cpu"][0] is True
    assert "cpu" in s2o_command("info").stdout


def test_help_teaches_and_no_command_is_a_usage_error():
    assert "exit codes" in s2o_command("--help").stdout
    assert "--tau" in s2o_command("run", "--help").stdout
    assert s2o_command().returncode == 2


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (("--tau", "-1"), ("tau", "-1", "0 or above")),
        (("--tau", "nan"), ("tau", "nan")),
        (("--pool", "100"), ("pool", "100", "power of two")),
        (("--scale", "0"), ("scale", "0", "above 0")),
        (("--rank", "oracle"), ("rank", "oracle", "gaussian")),
        (("--settings", "missing.json"), ("missing.json",)),
        (("--tau", "0.1,0.2,0.3"), ("tau has 3 numbers", "each of 2 q heads")),
        (("--tau", "0.1,x"), ("tau is 'x'",)),
        (("--settings", "missing.json", "--paper"), ("--paper", "not allowed with", "--settings")),
        (("--backend", "tpu"), ("--backend", "tpu", "cpu")),
        (("--colour", "1"), ("--colour",)),
    ],
)
def test_a_wrong_setting_is_one_line(heads, arguments, texts):
    code = 1 if arguments == ("--settings", "missing.json") else 2
    refused(s2o_command("run", heads[0], *arguments), code, *texts)


@pytest.mark.parametrize("sizes", [{"q": (2, 0, 16)}, {"q": (0, 2, 5, 16), "k": (0, 1, 5, 16), "v": (0, 1, 5, 16)}])
def test_a_file_without_queries_or_batch(tmp_path, sizes):
    shapes = {"k": (1, 5, 16), "v": (1, 5, 16)} | sizes
    np.savez(tmp_path / "none.npz", **{name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    done = s2o_command("run", tmp_path / "none.npz", "--dense", "--out", tmp_path / "out.npz", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(row["tail_mass"] == 0 for row in json.loads(done.stdout)["heads"])
    with np.load(tmp_path / "out.npz") as answer:
        assert answer["out"].shape == shapes["q"]


def test_json_holds_no_nan(heads, tmp_path):
    _, q, k, v = heads
    np.savez(tmp_path / "nan.npz", q=np.where(np.arange(16) == 3, np.nan, q), k=k, v=v)
    done = s2o_command("run", tmp_path / "nan.npz", "--dense", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout, parse_constant=pytest.fail)
    assert [row["error"] for row in report["heads"]] == [None, None]


def test_wrong_files_are_one_line(heads, tmp_path):
    _, q, k, _ = heads
    missing = tmp_path / "missing.npz"
    refused(s2o_command("run", missing), 1, str(missing), "does not exist")
    refused(s2o_command("run", tmp_path), 1, "directory")
    np.savez(tmp_path / "no_v.npz", q=q, k=k)
    refused(s2o_command("run", tmp_path / "no_v.npz"), 2, "no array 'v'")
    np.savez(tmp_path / "pickle.npz", q=np.array([{}], object), k=k, v=k)
    refused(s2o_command("run", tmp_path / "pickle.npz"), 2, "pickle")
    (tmp_path / "text.npz").write_text("not an archive")
    refused(s2o_command("run", tmp_path / "text.npz"), 2, "not an npz")
    refused(s2o_command("run", heads[0], heads[0]), 2, "2 files")
    np.savez(tmp_path / "nan.npz", q=np.where(np.arange(16) == 3, np.nan, q), k=k, v=k)
    refused(s2o_command("run", tmp_path / "nan.npz", "--check-finite"), 2, "q has nan at [0, 0, 3]")


def test_a_refused_output_leaves_nothing(heads, tmp_path):
    refused(s2o_command("run", heads[0], "--out", tmp_path), 1, "directory")
    refused(s2o_command("run", heads[0], "--out", ""), 1, "directory")
    refused(s2o_command("demo", "--png", tmp_path), 1, "directory")
    refused(s2o_command("run", heads[0], "--out", tmp_path / "nowhere" / "out.npz"), 1, "nowhere", "does not exist")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_leaves_no_file(heads, tmp_path):
    full = tmp_path / "disk"
    full.mkdir()
    done = s2o_command("run", heads[0], "--out", full / "out.npz", preexec_fn=_limit_file_size)
    refused(done, 1, "File too large")
    assert not list(full.iterdir())


def _limit_file_size() -> None:
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def test_too_little_memory_says_what_takes_less(heads, monkeypatch, capsys):
    def too_much(*_, **__):
        raise MemoryError("Unable to allocate 8 GiB")

    monkeypatch.setattr(Call, "take", too_much)
    assert cli.main(["run", str(heads[0])]) == 1
    said = capsys.readouterr().err
    assert said.startswith("s2o: error: Unable to allocate 8 GiB; attention() of q (2, 2500, 16) and k (1, 2500, 16), ")
    assert said.endswith("a smaller cap or workspace, a smaller batch, or fewer heads at a time take less\n")
