"""On a GPU: variants inside the real `attention`, live reload, every shipped kernel under its own check and bench."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from devices import ON_DEVICE, cupy

import s2o_cupy as s2o
from s2o_cupy import sources
from s2o_cupy.iterate.recording import rehearsed
from s2o_cupy.iterate.session import Session
from s2o_cupy.sources import kernel_folder, kernel_names

pytestmark = ON_DEVICE
POOL = (kernel_folder() / "pool.cu").read_text()
SM90 = (kernel_folder() / "attend_sm90.cu").read_text()
DOUBLED = POOL.replace("total / (sum_t)count", "total / (sum_t)(2 * count)")


@pytest.fixture(scope="module")
def session():
    made = Session()
    yield made
    made.close()


@pytest.fixture(scope="module")
def verdicts():
    """Every shipped kernel's verdict, each from a worker of its own, all at the same time."""
    sessions = [Session() for _ in kernel_names()]
    try:
        with ThreadPoolExecutor(len(sessions)) as pool:
            texts = [(kernel_folder() / f"{name}.cu").read_text() for name in kernel_names()]
            found = pool.map(lambda s, name, text: s.try_cuda(name, text, check=True), sessions, kernel_names(), texts)
            yield dict(zip(kernel_names(), found))
    finally:
        for one in sessions:
            one.close()


@pytest.fixture(scope="module")
def attention():
    """A call of `attention`, the kernels that it launches compiled at the same time."""
    from s2o_cupy.backends import cuda

    rng = np.random.default_rng(0)
    q, k, v = (cupy.asarray(rng.standard_normal((1, h, 8192, 64)).astype(np.float16)) for h in (2, 1, 1))
    with rehearsed(cuda) as wanted:
        s2o.attention(q, k, v, tau=0.3)
    with ThreadPoolExecutor(len(wanted)) as pool:
        list(pool.map(lambda one: cuda.get_kernel(*one[:3], **dict(one[3])), wanted))
    return lambda: s2o.attention(q, k, v, tau=0.3).get()  # compared on the host: CuPy's own kernels compile for seconds


def test_a_variant_runs_inside_attention(attention):
    before = attention()
    with s2o.use_kernel("pool", DOUBLED):
        inside = attention()
    assert (inside != before).any()
    assert (attention() == before).all()


def test_a_variant_that_does_not_compile_leaves_the_shipped_kernel(attention):
    before = attention()
    with pytest.raises(RuntimeError, match=r"cell\(\d+\): error"), s2o.use_kernel("pool", POOL + "oops"):
        attention()
    assert (attention() == before).all()


def test_a_saved_file_runs_at_the_next_call(attention, tmp_path, monkeypatch):
    before = attention()
    shutil.copytree(kernel_folder(), tmp_path / "kernels")
    monkeypatch.setenv("S2O_KERNELS", str(tmp_path / "kernels"))
    assert (attention() == before).all()
    time.sleep(2 * sources._SECONDS)
    (tmp_path / "kernels" / "pool.cu").write_text(DOUBLED)
    assert (attention() != before).any()


@pytest.mark.parametrize("name", kernel_names())
def test_shipped_kernels_are_right_by_their_own_cases(verdicts, name):
    verdict = verdicts[name]
    assert verdict.status == "right", str(verdict)
    assert all(one["blocks"] >= 1 for one in verdict.launched)
    assert {one["kernel"] for one in verdict.launched} <= {one["kernel"] for one in verdict.compiled["kernels"]}


def test_a_kernel_is_as_fast_as_itself(session):
    verdict = session.try_cuda("pool", POOL, bench=True)
    assert 0.9 < verdict.timing["ratio"] < 1.1, str(verdict)
    assert verdict.timing["launches"][0]["blocks"] >= 1
    assert verdict.timing["ms"] > 0.5 * verdict.timing["floor"]["ms"]


def test_a_check_that_would_not_launch_the_variant_is_refused(session):
    verdict = session.try_cuda("attend_sm90", SM90, macros={"HEAD_DIM": 96, "HEAD_DIM_V": 96}, check=True)
    assert "attend_sm90 -D HEAD_DIM=96 -D HEAD_DIM_V=96 is launched in no case of the check" in verdict.failure


def test_a_variant_that_another_kernel_serves_is_told(attention):
    unused = (kernel_folder() / "attend_simt.cu").read_text() + "// a variant\n"
    told = pytest.warns(UserWarning, match=r"use_kernel\('attend_simt', ...\) changed nothing")
    with told, s2o.use_kernel("attend_simt", unused):
        attention()


def test_a_write_past_the_end_is_told(session):
    last = "if (blockIdx.x == blocks - 1 && blockIdx.y == gridDim.y - 1 && threadIdx.x < 8)"
    cell = POOL.rstrip().removesuffix("}") + f"    {last} mean[row + threadIdx.x] = from_sum((sum_t)0);\n}}\n"
    verdict = session.try_cuda("pool", cell, check=True)
    assert verdict.status == "wrong", str(verdict)
    assert "wrote 16 bytes past the end of a bfloat16 array" in str(verdict)


def test_a_bad_address_costs_the_shell_nothing(session, attention):
    verdict = session.try_cuda("pool", POOL.replace("mean[c] = ", "mean[c + (1ll << 40)] = "), check=True)
    assert "the device failed in the case" in verdict.failure
    assert session.try_cuda("pool", POOL, check=True).status == "right"
    attention()
