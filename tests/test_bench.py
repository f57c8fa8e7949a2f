"""The benchmarks' own logic: lines, JSON, sweeps, tables, plots, and whole runs over NumPy in place of CuPy."""

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton loads, where it is there

import fake_cupy
import numpy as np
import pytest

from bench import __main__ as command
from bench import building, figures, kernels, ours, peers, report, scaling, timing, workloads
from bench.faster import crossing, faster
from bench.record import Record
from bench.sweep import Sweep
from bench.timing import Timing
from s2o_cupy import backends
from s2o_cupy.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
WHERE = ("Hq2 Hkv1 N2048 D64", "float32")


def run(*arguments):
    """`python -m bench ...` in this process; its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            command.main()
    return done.value.code


@pytest.fixture
def small(monkeypatch):
    """No GPU: NumPy as CuPy, float32, few small heads."""
    fake_cupy.install(monkeypatch)
    make = ours.workloads.make
    for name, value in (("HEADS_Q", 2), ("HEADS_KV", 1), ("DIM", 64)):
        monkeypatch.setattr(ours, name, value)
    monkeypatch.setattr(ours.workloads, "make", lambda *a, **k: make(*a, **k | {"dtype": "float32", "xp": np}))
    monkeypatch.setattr(building.Building, "start", lambda self, tasks: None)  # another process has no such CuPy


class Missing:
    """A peer that cannot be made."""

    name = "FlexAttention"

    def __init__(self, *_):
        raise ImportError("no such peer here")


# --- the record ------------------------------------------------------------------------------------
def test_the_machine_comes_first_and_every_case_is_one_line(capsys, tmp_path):
    record = Record("gpu", {"gpu": "made up"}, tmp_path / "x.json")
    record.case("one", *WHERE, time=Timing(1.5, 1.25, 2.0, 5), density=0.25, error=0.0123, tflops=123.4, ratio=2.0)
    record.case("two", *WHERE, note="no time")
    first, head, one, two = capsys.readouterr().out.splitlines()
    assert first == "gpu: made up"
    for name, text in (("ms", "1.500"), ("p10", "1.250"), ("TFLOP/s", "123"), ("ratio", "2.00"), ("error", "0.0123")):
        end = head.index(name) + len(name)
        assert one[:end].endswith(text), name
    assert two.endswith("no time")
    assert "-" in two


def test_json_is_written_after_each_case(tmp_path):
    path = tmp_path / "x.json"
    record = Record("gpu", {"gpu": "made up"}, path)
    assert json.loads(path.read_text())["cases"] == []
    record.case("one", *WHERE, time=Timing.of([1.0, 2.0, 3.0]), wanted=0.05)
    case = json.loads(path.read_text())["cases"][0]
    assert case["time"] == pytest.approx({"median": 2.0, "p10": 1.2, "p90": 2.8, "repeats": 3})
    assert case["wanted"] == 0.05
    record.put(crossings={"dense": 4096.0})
    assert json.loads(path.read_text())["crossings"] == {"dense": 4096.0}


def test_a_json_path_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    with pytest.raises(FileNotFoundError, match="no"):
        Record("gpu", {}, tmp_path / "no" / "x.json")


def test_in_a_folder_the_day_and_the_commit_name_the_json(tmp_path):
    Record("peers", {"date": "2026-11-24 10:00", "commit": "abc1234"}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["peers_2026-11-24_abc1234.json"]


class OutOfMemoryError(RuntimeError):
    """As CuPy and PyTorch name theirs."""


@pytest.mark.parametrize("error", [OutOfMemoryError("4 GiB wanted"), MemoryError("4 GiB wanted")])
def test_out_of_memory_is_one_line_and_the_rest_runs(error, capsys):
    record = Record("gpu", {})
    with record.attempt("big", *WHERE):
        raise error
    record.case("small", *WHERE)
    assert [case["name"] for case in record.report["cases"]] == ["big", "small"]
    assert "not measured: out of memory: 4 GiB wanted" in capsys.readouterr().out


def test_other_errors_are_not_hidden_unless_asked():
    record = Record("gpu", {})
    with pytest.raises(ValueError, match="wrong"), record.attempt("one"):
        raise ValueError("wrong")
    with record.attempt("two", catch=(ValueError,)):
        raise ValueError("wrong\nand more")
    assert record.report["cases"][0]["note"] == "not measured: ValueError: wrong"
    with pytest.raises(KeyboardInterrupt), record.attempt("three", catch=(Exception,)):
        raise KeyboardInterrupt


def test_a_device_that_is_lost_ends_the_run_and_what_was_measured_is_kept(small, tmp_path, monkeypatch):
    record = Record("peers", {}, tmp_path / "x.json")
    with record.attempt("one", catch=(Exception,)):
        raise ValueError("refused")
    runtime = sys.modules["cupy"].cuda.runtime

    def lost():
        raise RuntimeError("cudaErrorIllegalAddress: an illegal memory access")

    monkeypatch.setattr(runtime, "deviceSynchronize", lost)
    with (
        pytest.raises(RuntimeError, match=r"two made the device unusable \(cudaErrorIllegalAddress"),
        record.attempt("two", catch=(Exception,)),
    ):
        raise RuntimeError("an illegal memory access")
    assert [case["name"] for case in json.loads((tmp_path / "x.json").read_text())["cases"]] == ["one", "two"]


# --- the command -----------------------------------------------------------------------------------
@pytest.mark.parametrize("bench", ["gpu", "peers", "scaling", "kernels"])
def test_without_a_gpu_one_line_says_so(bench, monkeypatch):
    monkeypatch.setattr(backends, "_cuda_status", lambda: (False, "no CUDA device"))
    assert run(bench) == "bench: error: backend 'cuda' cannot run: no CUDA device"


def test_an_interrupted_run_keeps_what_was_measured(small, monkeypatch, tmp_path, capsys):
    def interrupted(options, record):
        record.case("one", *WHERE)
        raise KeyboardInterrupt

    monkeypatch.setattr(peers, "main", interrupted)
    assert run("peers", "--json", tmp_path / "x.json") == 130
    kept = json.loads((tmp_path / "x.json").read_text())
    assert kept["interrupted"] is True
    assert kept["finished"] is False
    assert [case["name"] for case in kept["cases"]] == ["one"]
    assert "interrupted after 1 cases" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "x", "0.1,", "0", "1.5"])
def test_errors_that_nothing_can_have_are_refused(text, capsys):
    assert run("peers", "--errors", text) == 2
    assert "allowed: numbers above 0 and below 1" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "1000", "2048,x", "2048,", "1024"])
def test_lengths_that_peers_cannot_take_are_refused(text, capsys):
    assert run("peers", "--length", text) == 2
    assert "allowed: multiples of 1024 from 2048 on" in capsys.readouterr().err


def test_a_busy_gpu_is_said():
    assert timing.busy("0", "600") == ""
    assert timing.busy("", "[N/A]") == ""
    assert timing.busy("40", "600").startswith("the GPU is busy (40 % utilisation before")
    assert "(40 % utilisation, 9000 MiB in use before" in timing.busy("40", "9000")


# --- building ------------------------------------------------------------------------------------------
def test_building_says_how_long_each_took_or_why_not(monkeypatch, capsys):
    script = "import sys, time; print('x'); time.sleep(60 * ('slow' in sys.argv[1])); 1 / ('bad' not in sys.argv[1])"
    spawn, made = building.subprocess.Popen, []

    def stand_in(command, **how):
        made.append(spawn([sys.executable, "-c", script, command[-1]], **how))
        return made[-1]

    monkeypatch.setattr(building.subprocess, "Popen", stand_in)
    with building.Building() as built:
        built.start([{"task": "good", "settings": Settings().as_dict()}, {"task": "bad"}])
        built.wait()
        monkeypatch.setattr(built, "_seconds", 0.5)
        built.start([{"task": "slow"}])
        built.wait()
        built.start([{"task": "slow, and interrupted"}])
    assert capsys.readouterr().out.splitlines() == [
        "built good, {'rank': 'gaussian', 'rank_terms': 15, 'block_k': 64}: x",
        "built bad: ZeroDivisionError: division by zero",
        "built slow: not done after 0.5 s",
    ]
    assert [process.returncode for process in made] == [0, 1, -9, -9]


def test_everything_is_built_for_every_bench(small, monkeypatch):
    tasks = []
    monkeypatch.setattr(building.Building, "start", lambda self, more: tasks.extend(more))
    monkeypatch.setattr(peers, "rivals_or_none", lambda: None)
    monkeypatch.setattr(building, "LENGTH", 1024)
    building.everything()
    kinds = [task["task"] for task in tasks]
    assert {"arrays", "dense", "walk", "rank"} == set(kinds)
    assert "mean" in [task["settings"]["rank"] for task in tasks if task["task"] == "rank"]
    for task in tasks:  # each runs, here over NumPy
        building.main(json.dumps(task))


def test_each_kernel_of_ours_is_built_once():
    tasks = building.of_ours(ours.VARIANTS.values())
    assert tasks[0] == {"task": "dense"}
    assert sum(task["task"] == "walk" for task in tasks) == 2
    ranks = [task["settings"] for task in tasks if task["task"] == "rank"]
    kinds = [(x["rank"], x["rank_terms"]) for x in ranks]
    assert kinds == [("gaussian", 15), ("gaussian", 7), ("mean", 7), ("mixture", 31)]
    for task in tasks:
        assert task["task"] in building.TASKS


# --- the sweep ---------------------------------------------------------------------------------------
class Method:
    """An error that grows with a knob, and how often it was measured."""

    def __init__(self, error):
        self.error, self.asked = error, []

    def __call__(self, x):
        self.asked.append(x)
        return self.error(x), f"at {x}"


@pytest.mark.parametrize("power", [0.25, 1.0, 3.0])
def test_a_sweep_meets_errors_closely_from_below_and_measures_no_point_twice(power):
    method = Method(lambda x: x**power)
    sweep = Sweep(method, 1e-8, 1e4)
    for wanted in (0.1, 0.05, 0.02, 0.01):
        x, error, point = sweep.meet(wanted)
        assert 0.97 * wanted <= error <= wanted
        assert (error, point) == (x**power, f"at {x}")
    assert len(method.asked) == len(set(method.asked)) < 40


def test_a_sweep_of_steps_takes_the_last_step_that_meets():
    method = Method(lambda x: 0.03 if x < 0.5 else 0.07)
    x, error, _ = Sweep(method, 1e-5, 1.0).meet(0.05)
    assert error == 0.03
    assert 0.45 < x < 0.5
    assert len(method.asked) <= 12


def test_a_sweep_says_when_not_even_the_most_work_meets():
    sweep = Sweep(Method(lambda x: 0.2 + x), 1e-5, 1.0)
    assert sweep.meet(0.1) is None
    assert sweep.least_error == pytest.approx(0.2, abs=1e-4)


def test_a_sweep_goes_no_further_than_its_least_work():
    x, error, _ = Sweep(Method(lambda x: x / 100), 1e-5, 1.0).meet(0.1)
    assert (x, error) == (1.0, 0.01)


def test_the_time_of_a_length_is_expected_from_the_fastest_calls_of_the_last_one():
    assert scaling.expected([], 0.05, 1024) == 0
    cases = [{"n": 4096, "wanted": 0.05, "time": {"median": ms}} for ms in (300.0, 250.0)]
    assert scaling.expected(cases, 0.05, 8192) == 8.0
    assert scaling.expected(cases, 0.02, 8192) == 0


def test_a_crossing_lies_between_the_lengths_around_it():
    assert crossing([]) is None
    assert crossing([(1024, 0.5), (2048, 1.0)]) is None
    assert crossing([(1024, 2.0), (2048, 3.0)]) == 1024
    assert crossing([(4096, 2.0), (1024, 0.5)]) == pytest.approx(2048)
    assert 4096 < crossing([(1024, 2.0), (2048, 0.9), (4096, 0.9), (8192, 1.5)]) < 8192


# --- whole runs --------------------------------------------------------------------------------------
def test_peers_says_what_is_missing_and_measures_the_rest(small, monkeypatch, tmp_path, capsys):
    pytest.importorskip("torch", reason="the peers need torch")
    from bench import rivals

    monkeypatch.setattr(rivals, "sparse_peers", lambda quick: [("S2O Triton", Missing)])
    monkeypatch.setattr(rivals, "Flex", Missing)
    monkeypatch.setattr(peers, "OURS", {"s2o_cupy": Settings()})
    assert run("peers", "--length", "4096", "--errors", "0.1,0.01", "--rows", "64", "--json", tmp_path / "x.json") == 0
    cases = json.loads((tmp_path / "x.json").read_text())["cases"]
    by_name = {case["name"]: case for case in cases}
    for name, why in (("FlashInfer", "ModuleNotFoundError"), ("S2O Triton", "ImportError: no such peer here")):
        assert by_name[name]["time"] is None
        assert f"not measured: {why}" in by_name[name]["note"]
    mine = [case for case in cases if case.get("kind") == "ours"]
    assert [case["wanted"] for case in mine] == [0.1, 0.01]
    for case in mine:
        assert case["error"] <= case["wanted"]
    assert 0 < mine[0]["density"] < mine[1]["density"] < 1
    assert "N=4096: time of each over that of our fastest variant" in capsys.readouterr().out


def test_peers_takes_two_errors_at_all_lengths_first_and_leaves_out_what_is_slow(small, monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "rivals_or_none", lambda: None)
    monkeypatch.setattr(peers, "OURS", {"one": Settings(segment=128, block_k=128), "other": Settings(segment=128)})
    arguments = ("--length", "4096,2048", "--rows", "32", "--errors", "0.2,0.1,0.3", "--only", "one")
    assert run("peers", *arguments, "--json", tmp_path / "x.json") == 0
    mine = [case for case in json.loads((tmp_path / "x.json").read_text())["cases"] if case.get("kind") == "ours"]
    turns = [(0.2, 4096), (0.2, 2048), (0.1, 4096), (0.1, 2048), (0.3, 2048), (0.3, 4096)]
    assert [(case["wanted"], case["n"], case["name"]) for case in mine] == [(*turn, "one") for turn in turns]
    assert run("peers", *arguments, "--patience", "0", "--json", tmp_path / "y.json") == 0
    cases = json.loads((tmp_path / "y.json").read_text())["cases"]
    assert [case["wanted"] for case in cases if case.get("kind") == "ours"] == [0.2, 0.2]
    assert sum("--patience 0" in case["note"] for case in cases) == 2


def test_peers_takes_real_heads_from_files(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peers, "rivals_or_none", lambda: None)
    monkeypatch.setattr(peers, "OURS", {"s2o_cupy": Settings()})
    rng = np.random.default_rng(0)
    for name, n in (("good", 2048), ("short", 1000)):
        arrays = {x: rng.standard_normal((h, n, 40)).astype(np.float16) for x, h in (("q", 3), ("k", 1), ("v", 1))}
        np.savez(tmp_path / f"{name}.npz", **arrays)
    out = tmp_path / "heads.json"
    assert run("peers", tmp_path / "good.npz", "--errors", "0.1", "--rows", "64", "--json", out) == 0
    assert "good, N=2048: time of each over that of our fastest" in capsys.readouterr().out
    report_ = json.loads(out.read_text())
    mine = [case for case in report_["cases"] if case.get("kind") == "ours"]
    assert [(case["preset"], case["shape"], case["dtype"]) for case in mine] == [
        ("good", "Hq3 Hkv1 N2048 D40", "float16")
    ]
    assert mine[0]["error"] <= 0.1
    assert "| s2o_cupy |" in "\n".join(report.table_matched(report_, "good"))
    assert len(figures.of(report_)) == 1
    assert "allowed: one batch entry and as many queries as keys" in run("peers", tmp_path / "short.npz")


def test_without_torch_peers_measures_ours(small, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bench.rivals", None)
    monkeypatch.delattr("bench.rivals", raising=False)
    monkeypatch.setattr(peers, "OURS", {"s2o_cupy": Settings()})
    assert run("peers", "--quick", "--length", "4096", "--rows", "64", "--json", tmp_path / "x.json") == 0
    cases = json.loads((tmp_path / "x.json").read_text())["cases"]
    assert "pip install torch" in cases[0]["note"]
    assert [case.get("kind") for case in cases[1:]] == ["dense", "ours", "ours"]
    assert [case["wanted"] for case in cases[2:]] == [0.05, 0.02]
    assert cases[2]["settings"] == Settings().as_dict()


def test_a_wrong_dense_answer_is_not_timed(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "bench.rivals", None)
    monkeypatch.delattr("bench.rivals", raising=False)
    wrong = peers.s2o.dense_attention
    monkeypatch.setattr(peers.s2o, "dense_attention", lambda *a, **k: wrong(*a, **k) * 1.1)
    assert "from exact attention; allowed: 0.02" in run("peers", "--quick", "--length", "4096", "--rows", "32")


def test_scaling_has_both_errors_and_shares_that_add_up(small, monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "cudnn", lambda *_: Missing())
    monkeypatch.setattr(scaling, "SETTINGS", {"one": Settings(), "two": Settings(segment=128)})
    path = tmp_path / "x.json"
    assert run("scaling", "--length", "1024", "4096", "--seconds", "300", "--json", path) == 0
    found = json.loads(path.read_text())
    calls = [case for case in found["cases"] if "wanted" in case]
    assert [(case["n"], case["path"]) for case in calls] == [(1024, "dense")] * 4 + [(4096, "ranked")] * 4
    for case in calls:
        assert sum(case["shares"].values()) == pytest.approx(1)
        assert {"rank", "attend"} <= set(case["shares"]) or case["path"] == "dense"
        assert case["dense"] > 0
        assert case["cudnn"] is None
    assert found["finished"] is True
    assert set(found["crossings"]) == {f"{rival}, error {e}" for rival in ("dense", "cudnn") for e in (0.05, 0.02)}


def test_long_scaling_goes_on_with_the_faster_settings_and_begins_on_a_part(small, monkeypatch, tmp_path):
    monkeypatch.setattr(ours, "HEADS_Q", 6)
    monkeypatch.setattr(ours, "HEADS_KV", 3)
    monkeypatch.setattr(scaling, "cudnn", lambda *_: Missing())
    monkeypatch.setattr(scaling, "SETTINGS", {"slow": Settings(segment=256), "fast": Settings(segment=128)})
    for name, value in (("ALL_UPTO", 4096), ("PART_FROM", 4096), ("ERRORS", (0.2,))):
        monkeypatch.setattr(scaling, name, value)
    heads, attention = [], scaling.s2o.attention
    monkeypatch.setattr(scaling.s2o, "attention", lambda q, *a, **k: heads.append(q.shape[1]) or attention(q, *a, **k))
    assert run("scaling", "--length", "4096", "5120", "--dense", "4096", "--json", tmp_path / "x.json") == 0
    calls = [case for case in json.loads((tmp_path / "x.json").read_text())["cases"] if "wanted" in case]
    fastest = min(calls[:2], key=lambda case: case["time"]["median"])["name"]
    assert [(case["n"], case["name"]) for case in calls] == [(4096, "slow"), (4096, "fast"), (5120, fastest)]
    assert calls[-1]["dense"] is None
    assert all(case["error"] <= 0.2 for case in calls)
    assert heads[0] == 4  # two K/V heads of three
    assert heads[-1] == 6


def test_scaling_begins_nothing_that_would_end_too_late(small, monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "cudnn", lambda *_: Missing())
    monkeypatch.setattr(scaling, "SETTINGS", {"one": Settings(segment=128)})
    monkeypatch.setattr(scaling, "expected", lambda cases, wanted, n: 1e6 * (wanted == 0.02))
    assert run("scaling", "--length", "1024", "--seconds", "300", "--json", tmp_path / "x.json") == 0
    cases = json.loads((tmp_path / "x.json").read_text())["cases"]
    assert [case.get("wanted") for case in cases[2:]] == [0.05, None]
    assert re.search(r"not measured at error 0.02: about 1000000 s, \d+ of --seconds 300 left", cases[-1]["note"])


def test_gpu_measures_every_stage(small, tmp_path):
    arguments = ("--lengths", "2048", "--presets", "sparse", "--no-torch", "--json", tmp_path / "x.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.ON_GPU["gpu"][0], "CROSSOVER", (2048,))
        patch.setattr(command.ON_GPU["gpu"][0].twins, "measure", Missing)
        patch.setattr(command.ON_GPU["gpu"][0], "FIRST_CALL", "print(0.5)\nprint(1.5)")
        assert run("gpu", *arguments) == 0
    cases = json.loads((tmp_path / "x.json").read_text())["cases"]
    names = [case["name"] for case in cases]
    assert "not measured: ImportError" in cases[names.index("Numba twins")]["note"]
    for name in ("sparse: dense", "sparse: plan, mean", "sparse: attend, tau 0.01", "crossover, randn: attention()"):
        assert name in names
    assert cases[names.index("first call, empty CuPy cache")]["seconds"] == {"import": 0.5, "attention": 1.5}
    assert "not measured" not in cases[names.index("sparse: plan(), cap 1")]["note"]
    walks = [case for case in cases if "attend, tau" in case["name"]]
    assert [case["density"] for case in walks] == sorted(case["density"] for case in walks)


def test_density_meets_errors_on_synthetic_heads_and_on_files(tmp_path):
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2048, 64), np.float32)
    np.savez(tmp_path / "mine.npz", q=q, k=k, v=v)
    only = ("--only", "S=128 shared, spread;S=1024")
    assert run("density", "--length", "2048", "--heads", "2", *only, "--json", tmp_path / "x.json") == 0
    assert run("density", tmp_path / "mine.npz", *only, "--json", tmp_path / "y.json") == 0
    made, mine = (json.loads((tmp_path / name).read_text()) for name in ("x.json", "y.json"))
    names = ["s2o_cupy, S=128 shared, spread tail", "S2O Triton's: S=1024"]
    assert [case["name"] for case in made["cases"]] == [name for name in names for _ in range(2)]
    assert all(case["error"] <= case["wanted"] and 0 < case["density"] < 1 for case in made["cases"])
    assert {case["source"] for case in mine["cases"]} == {"mine"}
    head, _, first, _ = report.table_density(made, None)
    assert head == "| density | diffuse, N=2048, error 0.05 | diffuse, N=2048, error 0.02 |"
    assert first.startswith(f"| s2o_cupy, S=128 shared, spread tail | {made['cases'][0]['density']:.3f} |")


# --- kernels -----------------------------------------------------------------------------------------
def problem(n=1024, **settings):
    from s2o_cupy.problem import Problem
    from s2o_cupy.settings import Settings

    return Problem(1, 4, 2, n, n, 64, 64, "bfloat16", Settings(segment=256, pool=128, rank_terms=7, **settings))


def test_costs_count_operations_and_bytes_once():
    p, pairs = problem(), 4 * 1024 * 1025 / 2
    operations, moved = kernels.costs("attend", p, None)
    assert operations == 4 * 64 * pairs
    assert moved == 2 * 64 * 1024 * (4 + 2 + 2 + 4)
    scores = 4 * (0 + 256 + 512 + 768)
    assert kernels.costs("score", p, None) == (2 * 64 * 8 * scores, 2 * (scores + 2 * 1024 * 64))
    assert kernels.costs("remap", p, None) == (0, 2 * scores + 4 * scores)
    assert kernels.costs("remap", problem(cap=0.5), None)[1] == 2 * scores + 4 * scores / 2
    assert kernels.costs("pool", p, None)[1] == 2 * 2 * 2 * 1024 * 64 * (1 + 1 / 128)
    assert kernels.costs("score_8_64", p, None) == kernels.costs("score", p, None)
    assert kernels.costs("moments_64", p, None) == kernels.costs("moments", p, None)
    assert kernels.costs("factors_64", p, None) == (2 * 64 * 4 * 1024 * 64, 2 * 64 * (4 * 1024 + 4 * 4 * 8))
    for unknown in ("unheard of", "score_mixture_64", "tile_keys"):
        assert kernels.costs(unknown, p, None) is None


class Raw:
    """A kernel of CuPy's that does nothing, with resources."""

    name, num_regs, local_size_bytes, shared_size_bytes = "attend", 168, 0, 1024
    kernel = SimpleNamespace(ptr=0)


def test_launches_are_watched_and_summed_by_call(small, monkeypatch):
    from s2o_cupy import compile as building

    made, cupy = [], sys.modules["cupy"]
    driver = SimpleNamespace(
        occupancyMaxActiveBlocksPerMultiprocessor=lambda *_: 2, launchKernel=lambda *given: made.append(given)
    )
    monkeypatch.setattr(cupy.cuda, "driver", driver, raising=False)
    plain = building.Kernel
    with kernels.watched() as launches:
        launch = building.Kernel(cupy, Raw()).prepared((3, 2), 256, (), 4096)
        for _ in range(2 * kernels.REPEATS):  # two launches in each call
            launch(7, 8, 0)
        found = kernels.by_kernel(launches)
    assert building.Kernel is plain
    assert made == 2 * kernels.REPEATS * [(0, 3, 2, 1, 256, 1, 1, 4096, 7, 8, 0)]
    time, held, count = found["attend"]
    assert (time.repeats, count) == (kernels.REPEATS, 2)
    assert held == {
        "registers": 168, "local_bytes": 0, "shared_bytes": 5120, "threads": 256, "blocks": 2, "occupancy": 0.25,
    }  # fmt: skip


def test_a_kernels_line_has_its_floor_and_its_resources(capsys):
    record, held = Record("kernels", {}), {"registers": 168, "blocks": 2, "threads": 256, "occupancy": 0.25}
    launched = (Timing(2.0, 1.9, 2.1, 7), held | {"local_bytes": 0, "shared_bytes": 0}, 3)
    kernels.say("attention: attend", 1024, problem(), launched, (4e11, 1e6), 4e14, 3e12, record)
    case = record.report["cases"][0]
    assert (case["floor_ms"], case["floor"], case["ratio"]) == (1.0, "operations", 0.5)
    assert case["tflops"] == 200
    assert "168 registers, 2 x 256 threads a multiprocessor (25%), 3 launches" in capsys.readouterr().out
    kernels.say("attention: new", 1024, problem(), launched, None, 4e14, 3e12, record)
    assert "ratio" not in record.report["cases"][1]


# --- tables, plots, the page -------------------------------------------------------------------------
@pytest.fixture
def peers_json(tmp_path):
    """A small `peers` report on disk."""
    path = tmp_path / "peers_20260101_abc.json"
    record = Record("peers", {"gpu": "made <up>"}, path)
    same = {"n": 4096, "preset": "diffuse", "density": 1.0, "error": 0.001}
    record.case("cuDNN (PyTorch SDPA)", *WHERE, time=Timing(10.0, 9.0, 11.0, 5), kind="dense", ratio=1.0, **same)
    for wanted, ms in ((0.05, 1.0), (0.02, 2.0)):
        for name, kind, factor in (("s2o_cupy", "ours", 1), ("s2o_cupy, 7 terms", "ours", 2), ("S2O", "sparse", 4)):
            more = same | {"density": wanted * factor, "error": 0.98 * wanted}
            record.case(name, *WHERE, time=Timing(ms * factor, 0, 0, 5), kind=kind, wanted=wanted, **more)
    more = same | {"wanted": 0.05, "kind": "sparse", "at_cudnn_rate_ms": 5.0}
    record.case("PBS-Attn, Triton", *WHERE, time=Timing(6.0, 0, 0, 5), **more)
    record.case("FlashInfer", *WHERE, note="not measured: ImportError")
    return path


def test_faster_is_against_our_fastest_variant_at_the_same_error(peers_json):
    found = faster(json.loads(peers_json.read_text())["cases"], 4096)
    assert found["cuDNN (PyTorch SDPA)"] == {0.05: 10.0, 0.02: 5.0}
    assert found["s2o_cupy, 7 terms"] == {0.05: 2.0, 0.02: 2.0}
    assert found["S2O"] == {0.05: 4.0, 0.02: 4.0}
    assert found["PBS-Attn, Triton"] == {0.05: 6.0}
    assert found["PBS-Attn's selection at cuDNN's dense rate"] == {0.05: 5.0}
    assert faster(json.loads(peers_json.read_text())["cases"], 999) == {}


def test_a_page_needs_no_other_file(peers_json, tmp_path, monkeypatch, capsys):
    (tmp_path / "old.json").write_text('{"machine": {}}')
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert run("report", "--out", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert "made &lt;up&gt;" in page
    assert page.count('<img src="data:image/png;base64,') == 1
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("<tr>") == 1 + 9
    assert "old.json: written by an older bench" in capsys.readouterr().out


def test_the_other_reports_have_figures(small, monkeypatch):
    case = {"name": "x", "shape": "N1", "dtype": "f", "time": {"median": 1.0}, "n": 4096, "note": ""}
    scaled = {"wanted": 0.05, "shares": {"score": 0.25, "between": 0.75}, "dense": 2.0, "cudnn": None}
    more = [case | scaled, case | scaled | {"n": 8192}]
    assert len(figures.of({"bench": "scaling", "machine": {}, "cases": more})) == 1
    floor = {"floor_ms": 0.5, "floor": "bytes", "ratio": 0.5}
    assert len(figures.of({"bench": "kernels", "machine": {}, "cases": [case | floor]})) == 1
    assert figures.of({"bench": "quality", "machine": {}, "cases": []}) == []


def test_the_headline_figure_names_the_json_it_was_made_from(peers_json, tmp_path):
    assert run("report", peers_json, "--figure", tmp_path / "x.png") == 0
    assert figures.source(tmp_path / "x.png") == {"file": peers_json.name, "sha256": figures.digest(peers_json)}
    assert "0 of the files are `peers` or `scaling` reports" in run(
        "report", "--figure", tmp_path / "y.png", _other(tmp_path)
    )


def _other(folder):
    Record("kernels", {}, folder / "kernels.json")
    return folder / "kernels.json"


def test_marked_tables_are_made_from_their_json(peers_json, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    text = "before\n<!-- bench peers_20260101_abc.json {} 4096 -->\n{}<!-- /bench -->\nafter\n"
    (tmp_path / "x.md").write_text(text.format("faster", "stale\n") + text.format("matched", ""))
    assert run("report", "--update", tmp_path / "x.md") == 0
    new = (tmp_path / "x.md").read_text()
    assert "| our fastest, ms | 1 | 2 |" in new
    assert "| cuDNN (PyTorch SDPA) | 10.00 | 5.00 |" in new
    assert "| S2O |  | 4, 0.200 | 8, 0.080 |" in new
    assert "stale" not in new
    assert (new.count("before"), new.count("after")) == (2, 2)
    assert report.updated(new) == new
    with pytest.raises(ValueError, match="allowed: faster, cases, matched, lengths"):
        report.updated(text.format("nothing", ""))


def test_a_star_is_the_newest_report_and_the_table_says_which(peers_json, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for name, date in (("peers_new.json", "2026-01-03 10:00"), ("peers_old.json", "2026-01-02 10:00")):
        made = json.loads(peers_json.read_text())
        made["machine"] |= {"date": date, "commit": name}
        made["arguments"] = ["peers", "--json", "somewhere/x.json", "--quick"]
        (tmp_path / name).write_text(json.dumps(made | {"finished": "old" in name}))
    assert report.newest("peers_*.json").name == "peers_new.json"
    new = report.updated("<!-- bench peers_*.json faster 4096 -->\n<!-- /bench -->\n")
    assert "From `bench/results/peers_new.json`: `python -m bench peers --quick`, made <up>, commit peers_new" in new
    assert "2026-01-03 10:00, cut off before its end." in new
    assert report.updated(new) == new
    nothing = report.updated("<!-- bench scaling_*.json lengths -->\n<!-- /bench -->\n")
    assert "Not measured yet: no `scaling_*.json`." in nothing
    listed = report.updated("<!-- bench * files -->\n<!-- /bench -->\n")
    assert all(f"| {path.name} | every method" in listed for path in tmp_path.glob("*.json"))


def test_a_slow_walk_stands_with_its_time_at_its_own_dense_rate(peers_json):
    found = json.loads(peers_json.read_text())
    slow = next(case for case in found["cases"] if case["name"] == "S2O")
    slow |= {"kernel_tflops": 300.0, "dense_tflops": 400.0, "at_dense_rate_ms": 3.25}
    assert "| S2O |  | 4 [3.25], 0.200 | 8, 0.080 |" in report.table_matched(found, 4096)
    slow["kernel_tflops"] = 341.0
    assert "| S2O |  | 4, 0.200 | 8, 0.080 |" in report.table_matched(found, 4096)


def test_lengths_are_a_table_of_the_faster_settings():
    same = {"wanted": 0.05, "density": 0.25, "bytes": 2**30, "dense": 4.0, "cudnn": None, "dtype": "", "note": ""}
    cases = [
        same | {"name": "attention()", "n": 1024, "time": {"median": 3.0}, "shares": {"dense": 0.9, "between": 0.1}},
        same | {"name": "attention()", "n": 2048, "time": {"median": 3.0}, "shares": {"rank": 0.35}},
        same | {"name": "attention(), x", "n": 2048, "time": {"median": 2.0}, "shares": {"rank": 0.4}},
    ]
    cases.append(cases[0] | {"wanted": 0.02, "density": 1.0})
    lines = report.table_lengths({"cases": cases}, None)
    assert lines[2:4] == [
        "| 1024 | 4 | - | 3, 0.250, dense | 1.00 | 3, 1.000, dense | 1.00 |",
        "| 2048 | 4 | - | 2, 0.250, 40%, x | 1.00 | - | - |",
    ]
    assert "dense, error 0.05 1024; cudnn, error 0.05 not reached; dense, error 0.02 1024" in lines[-1]


# --- what is committed ---------------------------------------------------------------------------------
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench/results/README.md"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tables_of_the_documents_are_those_of_their_json(path):
    assert report.updated(path.read_text()) == path.read_text()


@pytest.mark.parametrize("preset", workloads.PRESETS)
def test_presets_are_frozen(preset):
    assert workloads.digest(preset) == workloads.FROZEN[preset]


def test_presets_bracket_real_layers():
    """By the share of keys that hold 95 % of the mass: .018 to .094 in three layers of real models at N=8192."""
    made = {x: workloads.make(x, 8192, heads_q=4, heads_kv=2, dtype="float32") for x in workloads.PRESETS}
    shares = {name: workloads.coverage(q, k)["keys_95"] for name, (q, k, _) in made.items()}
    assert shares["sparse"] < 0.018 < 0.094 < shares["diffuse"]


def test_coverage_of_equal_weights():
    q = k = np.zeros((1, 2000, 4), np.float32)
    found = workloads.coverage(q, k, causal=False)
    assert [found[name] for name in ("keys_90", "keys_95", "keys_99")] == pytest.approx([0.9, 0.95, 0.99], abs=1e-3)
    assert found["sink_mass"] == pytest.approx(4 / 2000)
    seen = np.linspace(1000, 1999, 128).astype(int) + 1
    assert workloads.coverage(q, k)["last_256_mass"] == pytest.approx((256 / seen).mean(), rel=1e-4)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_results_that_documents_name_are_there(path):
    text = re.sub(r"writes `bench/results/[^`]*`", "", path.read_text())  # what a command leaves is no source
    for name in re.findall(r"bench/results/([\w.-]+\.(?:json|txt))", text):
        assert (ROOT / "bench" / "results" / name).is_file(), name


def test_every_result_has_its_line():
    lines = (ROOT / "bench" / "results" / "README.md").read_text()
    for path in (ROOT / "bench" / "results").iterdir():
        assert path.name == "README.md" or path.name in lines, path.name


def test_a_document_with_times_names_the_json_that_holds_them():
    for path in DOCUMENTS:
        text = path.read_text()
        timed = [
            row for row in text.splitlines() if row.startswith("|") and re.search(r"\d (ms|TFLOP/s|GFLOP/s)\b", row)
        ]
        assert not timed or re.search(r"(bench|examples/lm)/results/[\w-]+\.json", text), path


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "docs/bench.md"], ids=lambda path: path.name)
def test_a_section_with_speeds_names_the_result_that_holds_them(path):
    speeds = re.compile(r"\d (ms|us|TFLOP/s|GFLOP/s)\b|times (as fast|faster)|time over ours")
    sections = [text for text in re.split(r"(?m)^(?=## )", path.read_text()) if speeds.search(text)]
    assert sections
    for text in sections:
        assert re.search(r"bench/results/[\w.-]+\.(json|txt)", text), text[:200]


@pytest.mark.parametrize(("name", "pattern"), report.FIGURES.items())
def test_pictures_of_speed_were_made_from_the_newest_json(name, pattern):
    source, path = report.newest(pattern), ROOT / name
    assert path.exists() == bool(source)
    if source:
        assert figures.source(path) == {"file": source.name, "sha256": figures.digest(source)}


def test_every_picture_of_speed_is_made_by_the_report():
    stated = [path for path in (ROOT / "docs").rglob("*.png") if figures.source(path)]
    assert {str(path.relative_to(ROOT)) for path in stated} <= set(report.FIGURES)
