"""The ladder (examples/ladder): every step against the reference, in Numba's simulator or on a device."""

import importlib.util
import re

import numba
import numpy as np
import pytest
from properties import NUMBA

from examples.ladder import __main__ as program
from examples.ladder import checks, rungs
from examples.ladder.work import check, settings_of, small_work
from s2o_cupy import backends
from s2o_cupy.compile import kernel_folder

SIMULATED = bool(numba.config.ENABLE_CUDASIM)
NUMBA_STEPS = [rung.name for rung in rungs.RUNGS if rung.name in ("step1_naive", "step2_tiles")]
simulator = pytest.mark.skipif(not SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM=1")
needs_compiler = pytest.mark.skipif(
    not importlib.util.find_spec("cuda") or not importlib.util.find_spec("cuda.core"),
    reason="needs cuda-core and NVRTC",
)


@simulator
@pytest.mark.parametrize("tau", [0.15, 0.0])
@pytest.mark.parametrize("name", NUMBA_STEPS)
def test_numba_steps_are_the_reference(name, tau):
    work = small_work(n=27, heads=(2, 1), dim=4, tau=tau, block_q=4, segment=8, block_k=3, pool=4)
    answer = work.answer()
    grid = work.row_tiles, work.problem.heads_q
    kernel = rungs.numba_kernel(name, work.problem.dim_qk)
    kernel[grid, 4](work.q, work.k, work.v, work.order, work.starts, answer.out, answer.tiles, *work.numbers())
    check(work, answer)


@needs_compiler
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("name", list(rungs.RAW))
def test_raw_steps_compile(name, arch):
    from cuda.core import Program, ProgramOptions

    macros = [(key, str(value)) for key, value in rungs.raw_macros(name, 128, 128).items()]
    options = ProgramOptions(
        arch=arch, std="c++17", device_as_default_execution_space=True, include_path=[str(kernel_folder())],
        define_macro=macros,
    )  # fmt: skip
    assert len(Program(rungs.raw_source(name), "c++", options).compile("cubin").code)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("rung", rungs.RUNGS, ids=lambda rung: rung.name)
def test_steps_on_a_device(rung, dim):
    works, why = backends.status()["cuda"]
    if not works:
        pytest.skip(why)
    if rung.name in NUMBA_STEPS and (missing := NUMBA.missing()):
        pytest.skip(missing)
    if missing := rung.missing():
        pytest.skip(missing)
    import cupy

    for n, tau, block_k in ((700, 0.15, 128), (300, 0.0, 64)):
        work = small_work(n=n, dim=dim, tau=tau, segment=256, block_q=128, block_k=block_k, pool=64)
        on_device = work.on_device()
        answer = on_device.answer(cupy)
        rung.prepare(on_device, answer)()
        check(work, type(answer)(out=answer.out.get(), tiles=answer.tiles.get()))


def test_the_check_can_fail():
    work = small_work()
    wrong = work.answer()
    with pytest.raises(AssertionError, match="row tiles stopped after"):
        check(work, wrong)
    from s2o_cupy import reference

    want = reference.attend(work.problem, work.q[None], work.k[None], work.v[None], work.order, work.starts[None])
    right = type(wrong)(out=want.out[0].astype(np.float16), tiles=want.tiles[0])
    assert len(np.unique(right.tiles)) > 2, "row tiles should stop at places of their own"
    check(work, right)
    right.out[1, 5, 2] += 0.01
    with pytest.raises(AssertionError, match="off by"):
        check(work, right)


def test_a_rung_that_fails_says_so():
    assert checks.check_rung("no_such_step", 64).startswith(("StopIteration", "ModuleNotFoundError"))


def test_work_that_the_steps_do_not_walk_is_refused():
    with pytest.raises(ValueError, match="segment is 16; allowed: a multiple of pool 8 and of block_q 12"):
        small_work(block_q=12)
    with pytest.raises(ValueError, match="the ladder walks causal plans"):
        small_work(tail="pooled")
    assert settings_of().tail is None


def test_numbers_in_a_folder_are_named_by_day_and_commit(tmp_path):
    made_on = {"date": "2026-11-24 13:55", "commit": "abc1234"}
    assert program.json_file(tmp_path, made_on) == tmp_path / "ladder_2026-11-24_abc1234.json"
    assert program.json_file(tmp_path / "mine.json", made_on) == tmp_path / "mine.json"


def test_without_a_device_it_says_so(capsys):
    if backends.status()["cuda"][0]:
        pytest.skip("there is a CUDA device here")
    assert program.main([]) == 1
    assert re.match(r"the ladder needs a CUDA device: .+", capsys.readouterr().err)
