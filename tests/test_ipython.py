"""A real IPython shell: its magics try variants in a process of their own, and what goes wrong there stays there."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.dom import minidom

import numpy as np
import pytest

import s2o_cupy as s2o
from s2o_cupy.iterate import emulation
from s2o_cupy.iterate.bench import compared
from s2o_cupy.iterate.report import History, Verdict
from s2o_cupy.iterate.worker import has_gpu
from s2o_cupy.sources import current, kernel_folder
from s2o_cupy.variants import definitions, make_variant

POOL = (kernel_folder() / "pool.cu").read_text()
TWIN = (kernel_folder() / "pool_numba.py").read_text()
GPU = has_gpu()
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("IPython"), reason="needs IPython (the extra 'ipython')")
checks = pytest.mark.skipif(not GPU and emulation.compiler() is None, reason="needs a GPU, or g++ to emulate one")


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """An IPython shell with the extension loaded."""
    from IPython.core.interactiveshell import InteractiveShell

    os.environ.setdefault("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
    made = InteractiveShell.instance()
    made.run_line_magic("load_ext", "s2o_cupy")
    yield made
    made.run_line_magic("unload_ext", "s2o_cupy")
    InteractiveShell.clear_instance()


def run(shell, text):
    """What a cell's last expression gave."""
    done = shell.run_cell(text, store_history=False)
    done.raise_error()
    return done.result


def cuda(shell, options, cell) -> Verdict:
    return run(shell, f"%%s2o_cuda {options}\n{cell}")


def before_barrier(statement) -> str:
    return POOL.replace("    __syncthreads();", f"    {statement}\n    __syncthreads();")


def refused(shell, text) -> str:
    error = shell.run_cell(text, store_history=False)
    assert type(error.error_in_exec).__name__ == "UsageError", error
    return str(error.error_in_exec)


@checks
def test_the_shipped_kernel_is_right(shell):
    verdict = cuda(shell, "pool --check", POOL)
    assert verdict.status == "right", verdict
    assert len(verdict.cases) == 4
    assert 0 < verdict.worst["worst"]["share"] < 1
    where = "on the GPU" if GPU else "emulated on the CPU"
    assert f"4 of 4 cases right, {where}" in str(verdict)


@checks
@pytest.mark.parametrize("limit", ["-1", "0", "nan", "1e300", "soon"])
def test_a_limit_that_is_none_is_refused_and_the_next_verdict_is_its_own(shell, limit):
    assert "allowed: above 0, to 86400 seconds" in refused(shell, f"%%s2o_cuda pool --check --limit {limit}\n{POOL}")
    assert cuda(shell, "pool --check", POOL).status == "right"


@checks
def test_what_a_broken_off_job_says_answers_no_other(shell, monkeypatch):
    session = shell.magics_manager.registry["KernelMagics"].session
    monkeypatch.setattr(type(session.cuda), "_next", lambda self, wait: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.try_cuda("pool", POOL.replace("(sum_t)count", "(sum_t)(2 * count)"), check=True)
    monkeypatch.undo()
    assert cuda(shell, "pool --check", POOL).status == "right"


@checks
def test_a_wrong_kernel_shows_its_worst_element(shell):
    verdict = cuda(shell, "pool --check", POOL.replace("total / (sum_t)count", "total / (sum_t)(2 * count)"))
    assert verdict.status == "wrong"
    worst = verdict.worst["worst"]
    assert worst["share"] > 1
    assert worst["got"] == pytest.approx(worst["wanted"] / 2, rel=0.02)
    assert f"{worst['array']}[{', '.join(map(str, worst['index']))}]: got {worst['got']:.6g}" in str(verdict)


@checks
def test_the_worker_that_runs_reads_the_folder_of_now(shell, tmp_path, monkeypatch):
    cuda(shell, "pool", POOL)  # it runs
    shutil.copytree(kernel_folder(), tmp_path / "kernels")
    (tmp_path / "kernels" / "pool.cu").write_text(POOL + "\n#error mine\n")
    monkeypatch.setenv("S2O_KERNELS", str(tmp_path / "kernels"))
    verdict = cuda(shell, "attend_simt --check", (kernel_folder() / "attend_simt.cu").read_text())
    assert "does not compile" in verdict.failure  # the stage's pool.cu, from the folder
    assert "mine" in verdict.failure


@checks
def test_nan_is_wrong(shell):
    verdict = cuda(shell, "pool --check", POOL.replace("total / (sum_t)count", "(total - total) / (sum_t)0"))
    assert verdict.status == "wrong"
    assert "got nan, wanted" in str(verdict)


@checks
def test_a_write_past_the_end_is_told(shell):
    last = "if (blockIdx.x == blocks - 1 && blockIdx.y == gridDim.y - 1 && threadIdx.x < 8)"
    cell = POOL.rstrip().removesuffix("}") + f"    {last} mean[row + threadIdx.x] = from_sum((sum_t)0);\n}}\n"
    verdict = cuda(shell, "pool --check", cell)
    assert verdict.status == "wrong"
    assert "wrote 16 bytes past the end of a bfloat16 array" in str(verdict)


@checks
def test_an_error_points_at_the_cells_line(shell):
    cell = POOL.replace("sum_t sum[8];", "sum_t sum[8]; undefined_thing = 3;")
    verdict = cuda(shell, "pool --check", cell)
    line = next(i for i, text in enumerate(cell.split("\n"), 1) if "undefined_thing" in text)
    assert verdict.status == "failed"
    assert "does not compile" in verdict.failure
    assert f"line {line}: " in verdict.failure
    assert "undefined_thing = 3;" in verdict.failure
    assert "the shell goes on with the shipped kernel" in str(verdict)


@checks
def test_an_error_in_a_patch_points_at_the_cells_line(shell):
    cell = "\n\n__device__ int scan_block(int x, int* totals) {\n    return x + frob;\n}\n"
    verdict = cuda(shell, "remap --check", cell)
    assert "line 4: " in verdict.failure, verdict
    assert "return x + frob;" in verdict.failure


@checks
def test_a_hang_is_killed_and_the_shell_goes_on(shell):
    cell = POOL.replace(
        "    __syncthreads();", "    while (*(volatile sum_t*)partial != 123456) ;\n    __syncthreads();"
    )
    start = time.perf_counter()
    verdict = cuda(shell, "pool --check --limit 2", cell)
    assert verdict.status == "failed"
    assert "hung: no answer in the case" in verdict.failure
    assert f"for {2 if GPU else 6} s. Its process was killed." in verdict.failure
    assert time.perf_counter() - start < 60
    assert cuda(shell, "pool --check", POOL).status == "right"


@checks
def test_a_crash_is_told_and_the_shell_goes_on(shell):
    verdict = cuda(shell, "pool --check", POOL.replace("mean[c] = ", "mean[c + (1ll << 40)] = "))
    assert verdict.status == "failed"
    told = "the device failed" if GPU else f"its process died (by signal 11, {signal.strsignal(signal.SIGSEGV)})"
    assert told in verdict.failure
    assert cuda(shell, "pool --check", POOL).status == "right"


@checks
def test_what_a_kernel_prints_is_shown(shell):
    cell = POOL.replace(
        "    __syncthreads();", '    if (threadIdx.x == 0) printf("hello %d\\n", n_keys);\n    __syncthreads();'
    )
    assert "hello 130" in cuda(shell, "pool --check", cell).printed or GPU


@checks
@pytest.mark.parametrize("name", ["remap", "attend_simt"])
def test_other_kernels_are_right(shell, name):
    verdict = cuda(shell, f"{name} --check --limit 120", (kernel_folder() / f"{name}.cu").read_text())
    assert verdict.status == "right", verdict


@checks
def test_a_missing_barrier_is_seen(shell):
    source = (kernel_folder() / "remap.cu").read_text()
    head, tail = source.split("// Places: digit by digit", 1)
    cell = head + "// Places: digit by digit" + tail.replace("__syncthreads();", "", 1)
    verdict = cuda(shell, "remap --check", cell)
    assert verdict.status in ("wrong", "failed") or GPU  # on a GPU a race need not show


@pytest.mark.skipif(GPU, reason="says what only a machine without a GPU says")
def test_a_sanitizer_without_a_gpu_finds_nothing_wrong(shell, tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\nshift 4\n"$@"\necho "========= Error: Target application terminated before"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for cell in (POOL, POOL + "oops"):
        verdict = cuda(shell, "pool --sanitize", cell)
        assert verdict.status in ("compiled", "not compiled", "failed")
        assert verdict.notes[-1] == "not sanitized: nothing ran on a GPU"


@pytest.mark.skipif(GPU, reason="says what only a machine without a GPU says")
def test_code_of_a_variant_that_was_only_checked_names_what_is_missing(shell, monkeypatch):
    session = shell.magics_manager.registry["KernelMagics"].session
    checked = Verdict("pool", "cuda", make_variant("pool", POOL), "shipped", 1.0)  # as it is without cuda-core
    monkeypatch.setattr(session, "latest", lambda name: checked)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    assert "compiling without a GPU needs cuda-core" in refused(shell, "%s2o ptx pool")


@pytest.mark.skipif(GPU, reason="says what only a machine without a GPU says")
def test_without_a_gpu_it_says_what_it_cannot_do(shell):
    verdict = cuda(shell, "attend --check --bench", (kernel_folder() / "attend.cu").read_text())
    assert "not checked: there is no GPU here" in str(verdict)
    assert "Without a GPU, try the idea in attend_simt" in str(verdict)
    assert "not timed: that needs a GPU" in str(verdict)
    assert verdict.status in ("compiled", "not compiled")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("%%s2o_cuda frob\nint x;", "kernel is 'frob'; allowed: attend, attend_simt"),
        ("%%s2o_cuda pool\nint x;", "the cell is no whole pool.cu and patches nothing: it defines no function"),
        ("%%s2o_cuda pool\n" + POOL.replace("int blocks, ", ""), "pool takes 16 parameters; the launcher gives it 17"),
        ("%%s2o_cuda pool --against previously\nint x;", "invalid choice: 'previously'"),
        ("%%s2o_cuda attend_simt --against previous\n" + POOL, "is no function of attend_simt.cu|lacks the kernel"),
        ("%%s2o_cuda pool -D 3=4\nint x;", "-D 3=4: allowed: MACRO=VALUE"),
        ("%%s2o_numba frob\nx = 1", "kernel is 'frob'; allowed: pool, score, mixture, remap, attend"),
        ("%%s2o_numba pool\nx = 1", "the cell is no whole pool_numba.py and patches nothing"),
        ("%%s2o_numba pool\ndef (", "SyntaxError"),
        ("%%s2o_cuda pool --arch foo\nint x;", "--arch foo: allowed: sm_80 or above, such as sm_80, sm_90a, sm_100"),
        ("%%s2o_cuda pool --arch sm_75\nint x;", "--arch sm_75: allowed: sm_80 or above"),
        ("%%s2o_cuda pool 'x\nint x;", "%%s2o_cuda pool 'x: No closing quotation"),
        ("%s2o show 'pool", "%s2o show 'pool: No closing quotation"),
        ("%s2o kernels frob", "%s2o kernels frob: allowed: one of attend, attend_simt"),
        ("%s2o frob", "%s2o frob: allowed: kernels, show, ptx, sass, keep, history"),
        ("%s2o show frob", "allowed: attend.cu"),
        ("%s2o show ../README.md", "allowed: attend.cu"),
        ("%s2o keep score x.cu", "no variant of score compiled in this shell"),
    ],
)
def test_bad_input_is_told_plainly(shell, text, message):
    assert re.search(message, refused(shell, text))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("score -D WIDTH=300", "-D WIDTH=300: allowed: 1 to 256"),
        ("attend -D HEAD_DIM=wide", "-D HEAD_DIM=wide: allowed: 1 to 256"),
        ("attend -D HEAD_DIM=100", "the variant of attend fixes HEAD_DIM=100; this call needs 128"),
        ("pool -D IS_BF16=7", "the variant of pool fixes IS_BF16=7; this call needs 1"),
    ],
)
def test_a_specialisation_that_no_arrays_have_is_refused(shell, options, message):
    verdict = cuda(shell, options, (kernel_folder() / f"{options.split()[0]}.cu").read_text())
    assert verdict.failure == message


def test_help(shell, capsys):
    run(shell, "%s2o")
    run(shell, "%%s2o_cuda -h\n ")
    said = capsys.readouterr().out
    assert "%s2o kernels" in said
    assert "--sanitize" in said
    assert "option_strings" not in said  # argparse reads a % of a help text as a format
    assert "%%s2o_cuda" in shell.magics_manager.magics["cell"]["s2o_cuda"].__doc__ or said


def test_kernels_and_show(shell, capsys):
    run(shell, "%s2o kernels")
    said = capsys.readouterr().out
    assert "score_1, score_8" in said
    assert "-D HEAD_DIM_V=256 -D REAL=double" in said
    for name in ("pool", "half.cuh", "pool_numba"):
        run(shell, f"%s2o show {name}")
    assert "the mean of every pool block" in capsys.readouterr().out


def test_resources_of_one_kernel(shell, capsys):
    if not GPU and not (importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.core")):
        assert "pool was not compiled: ImportError: compiling without a GPU needs cuda-core" in refused(
            shell, "%s2o kernels pool"
        )
        return
    cuda(shell, "pool", POOL)
    capsys.readouterr()
    run(shell, "%s2o kernels pool")
    said = capsys.readouterr().out
    number = (
        r"(?: +\w+: [^\n]+\n)*? +pool: \d+ registers(, \d+ bytes of local memory)?, \d+ bytes of static shared memory"
    )
    assert len(re.findall(rf"-D \w+=\w+\n{number}", said)) >= 4, said  # three types and two halves, and the variant
    assert re.search(rf"variant #\d+, sm_\w+ -D IS_BF16=1\n{number}", said), said


def test_the_extension_takes_its_magics_away(shell):
    run(shell, "%unload_ext s2o_cupy")
    assert "`%s2o` not found" in refused(shell, "%s2o kernels")
    run(shell, "%load_ext s2o_cupy.ipython")
    session = shell.magics_manager.registry["KernelMagics"].session
    run(shell, "%load_ext s2o_cupy")  # by its other name: the shell's history stays
    assert shell.magics_manager.registry["KernelMagics"].session is session
    run(shell, "%s2o help")
    run(shell, "%unload_ext s2o_cupy.ipython")
    assert "`%s2o` not found" in refused(shell, "%s2o kernels")
    run(shell, "%reload_ext s2o_cupy")
    run(shell, "%s2o help")


@checks
def test_keep_and_history(shell, tmp_path, capsys):
    source = (kernel_folder() / "remap.cu").read_text()
    scan = next(d for d in definitions(source) if d.name == "scan_block")
    cell = source[scan.start : source.index("{", scan.start)] + "{ /* kept */ return 0; }"
    wrong = cuda(shell, "remap --check", cell)
    assert wrong.status in ("wrong", "failed")
    assert "does not compile" not in wrong.failure
    path = tmp_path / "mine.cu"
    if wrong.compiled:  # without a GPU, where cuda-core is installed
        run(shell, f"%s2o keep remap {path}")
        assert "/* kept */" in path.read_text()
        assert "#line" not in path.read_text()
        assert "is there; --force writes over it" in refused(shell, f"%s2o keep remap {path}")
    tried = run(shell, "%s2o history")
    assert str(wrong.number) in str(tried)
    assert [v.number for v in tried] == list(range(1, len(tried) + 1))
    minidom.parseString(f"<x>{tried._repr_html_()}{wrong._repr_html_()}</x>")


def test_a_numba_twin(shell):
    verdict = run(shell, f"%%s2o_numba pool --check\n{TWIN}")
    assert verdict.status == "right", verdict
    assert GPU or "in Numba's simulator" in str(verdict)
    wrong = run(shell, f"%%s2o_numba pool --check\n{TWIN.replace('total = real(0)', 'total = real(1)')}")
    assert wrong.status == "wrong"
    bad = run(shell, f"%%s2o_numba pool --check\n{TWIN.replace('total += real', 'total += frob')}")
    assert bad.status == "failed"
    assert "frob" in bad.failure
    assert bad.failure.startswith("failed in the case 'whole blocks, ")
    assert run(shell, f"%%s2o_numba pool\n{TWIN}").status == "read"
    assert "compile" not in str(verdict)  # the simulator compiles nothing, and Numba only what is launched


def test_a_twin_without_the_spread_tails_lift(shell):
    text = (kernel_folder() / "attend_numba.py").read_text()
    lift = "row_lift(query, dim, v_tile, scale)"
    verdict = run(shell, f"%%s2o_numba attend --check\n{text.replace(lift, 'real(0)')}")
    assert verdict.status == "wrong"
    assert [case["label"].split(",")[0] for case in verdict.wrong] == ["spread tail"] * 2
    verdict = run(shell, f"%%s2o_numba pool --check\n{TWIN.replace('departure * departure', 'departure')}")
    assert [case["label"].split(",")[0] for case in verdict.wrong] == ["a partial last block"]


def test_a_patch_of_a_twins_inner_function(shell):
    cell = "@cuda.jit(device=True)\ndef exact_code(x, bits):\n    return int64(0)\n"
    verdict = run(shell, f"%%s2o_numba remap --check\n{cell}")
    assert verdict.status == "wrong"
    assert verdict.wrong[0]["label"] == "exact order"


def test_a_shell_of_its_own(tmp_path):
    """`ipython` itself, fed from its input: loads the extension, tries a variant, ends its worker when it ends."""
    lines = ["%load_ext s2o_cupy", "%s2o kernels", "%%s2o_cuda pool", "int x;", "", "", "print('still here', 6 * 7)"]
    environment = {**os.environ, "IPYTHONDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "IPython", "--simple-prompt", "--colors=NoColor", "--no-banner"]
    done = subprocess.run(
        command, input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "%s2o alone says what they do" in done.stdout
    assert "patches nothing: it defines no function" in done.stdout + done.stderr
    assert "still here 42" in done.stdout


# --- pieces -----------------------------------------------------------------------------------
def verdict_of(ratio, low, high) -> Verdict:
    timing = {"ms": 1.0, "other_ms": ratio, "ratio": ratio, "low": low, "high": high, "turns": 5, "what": "a call"}
    launch = {"registers": 32, "shared_bytes": 0, "local_bytes": 0, "blocks": 8, "occupancy": 1.0, "kernel": "pool"}
    timing |= {"launches": [launch], "other_launches": [launch], "floor": {"ms": 0.5, "why": "bytes"}}
    return Verdict("pool", "cuda", None, "shipped", 1.0, timing=timing, number=1)


def test_speed_says_no_more_than_the_spread():
    assert "1.070 times as fast as shipped (1.060 to 1.080)" in str(verdict_of(1.07, 1.06, 1.08))
    assert "as fast as shipped: ratio 1.010 (0.990 to 1.030)" in str(verdict_of(1.01, 0.99, 1.03))
    assert "1.250 times the time of shipped" in str(verdict_of(0.8, 0.79, 0.81))
    assert "0.5000 ms (bytes): 2.00 times that" in str(verdict_of(1.0, 0.9, 1.1))
    assert "1 ######" in str(History([verdict_of(1.07, 1.06, 1.08)]))


def test_ratios_are_taken_turn_by_turn():
    found = compared(np.array([1.0, 2.0, 4.0]), np.array([2.0, 4.0, 8.0]))
    assert (found["ratio"], found["low"], found["high"], found["ms"]) == (2, 2, 2, 2)


def test_a_variant_is_what_use_kernel_takes(shell):
    verdict = cuda(shell, "pool", POOL + "// a variant\n")
    before = current("pool")
    with s2o.use_kernel("pool", verdict.variant):
        assert current("pool") is verdict.variant.source
    assert current("pool") == before
