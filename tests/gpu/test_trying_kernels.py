"""On a GPU: variants inside the real `attention`, live reload, every shipped kernel under its own check and bench."""

import shutil
import time

import numpy as np
import pytest

import s2o_cupy as s2o
from s2o_cupy import sources
from s2o_cupy.iterate.session import Session
from s2o_cupy.sources import kernel_folder, kernel_names

cupy = pytest.importorskip("cupy", reason="needs CuPy")
try:
    DEVICES = cupy.cuda.runtime.getDeviceCount()
except cupy.cuda.runtime.CUDARuntimeError:
    DEVICES = 0
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not DEVICES, reason="needs a CUDA device")]
POOL = (kernel_folder() / "pool.cu").read_text()
DOUBLED = POOL.replace("total / (sum_t)count", "total / (sum_t)(2 * count)")


@pytest.fixture(scope="module")
def session():
    made = Session()
    yield made
    made.close()


def attention():
    rng = cupy.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, h, 8192, 64), dtype=np.float32).astype(np.float16) for h in (2, 1, 1))
    return s2o.attention(q, k, v, tau=0.3)


def test_a_variant_runs_inside_attention():
    before = attention()
    with s2o.use_kernel("pool", DOUBLED):
        inside = attention()
    assert (inside != before).any()
    assert (attention() == before).all()


def test_a_variant_that_does_not_compile_leaves_the_shipped_kernel():
    before = attention()
    with pytest.raises(RuntimeError, match=r"cell\(\d+\): error"), s2o.use_kernel("pool", POOL + "oops"):
        attention()
    assert (attention() == before).all()


def test_a_saved_file_runs_at_the_next_call(tmp_path, monkeypatch):
    before = attention()
    shutil.copytree(kernel_folder(), tmp_path / "kernels")
    monkeypatch.setenv("S2O_KERNELS", str(tmp_path / "kernels"))
    assert (attention() == before).all()
    time.sleep(2 * sources._SECONDS)
    (tmp_path / "kernels" / "pool.cu").write_text(DOUBLED)
    assert (attention() != before).any()


@pytest.mark.parametrize("name", kernel_names())
def test_shipped_kernels_are_right_by_their_own_cases(session, name):
    verdict = session.try_cuda(name, (kernel_folder() / f"{name}.cu").read_text(), check=True)
    assert verdict.status == "right", str(verdict)


def test_a_kernel_is_as_fast_as_itself(session):
    verdict = session.try_cuda("pool", POOL, bench=True)
    assert 0.9 < verdict.timing["ratio"] < 1.1, str(verdict)
    assert verdict.timing["launches"][0]["blocks"] >= 1
    assert verdict.timing["ms"] > 0.5 * verdict.timing["floor"]["ms"]


def test_a_bad_address_costs_the_shell_nothing(session):
    verdict = session.try_cuda("pool", POOL.replace("mean[c] = ", "mean[c + (1ll << 40)] = "), check=True)
    assert "the device failed in the case" in verdict.failure
    assert session.try_cuda("pool", POOL, check=True).status == "right"
    attention()
