"""On a GPU: PyTorch's and JAX's arrays viewed and answered in kind, and the commands that use the GPU."""

import json

import numpy as np
import pytest
from devices import ON_DEVICE, cupy

import s2o_cupy as s2o
from s2o_cupy import cli

pytestmark = ON_DEVICE


def arrays(dtype=np.float16):
    rng = cupy.random.default_rng(0)
    return [rng.standard_normal((h, 5000, 64), dtype=np.float32).astype(dtype) for h in (2, 1, 1)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tensors_of_pytorch_are_viewed_and_answered_in_kind(dtype):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    if not torch.cuda.is_available():
        pytest.skip("needs PyTorch with CUDA")
    mine = arrays(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.float16)
    tensors = [torch.from_dlpack(x) for x in mine]
    want = s2o.attention(*mine, full_output=True)
    found = s2o.attention(*tensors, full_output=True)
    assert type(found.out) is type(found.lse) is torch.Tensor
    assert (found.out.device.type, found.out.dtype) == ("cuda", getattr(torch, dtype))
    assert (cupy.from_dlpack(found.out) == want.out).all()
    assert (cupy.from_dlpack(found.lse) == want.lse).all()
    out = torch.full_like(tensors[0], 7)
    assert s2o.attention(*tensors, out=out) is out
    assert (cupy.from_dlpack(out) == want.out).all()


def test_arrays_of_jax_are_viewed_and_answered_in_kind():
    jax = pytest.importorskip("jax", reason="needs JAX")
    if jax.default_backend() != "gpu":
        pytest.skip("needs JAX with CUDA")
    mine = arrays()
    found = s2o.attention(*map(jax.dlpack.from_dlpack, mine))
    assert isinstance(found, jax.Array)
    assert (cupy.from_dlpack(found) == s2o.attention(*mine)).all()


def test_what_has_only_the_cuda_array_interface_is_viewed():
    class Bare:
        def __init__(self, array):
            self.array, self.shape, self.dtype = array, array.shape, array.dtype
            self.__cuda_array_interface__ = array.__cuda_array_interface__

    mine = arrays()
    found = s2o.attention(*map(Bare, mine))
    assert isinstance(found, cupy.ndarray)
    assert (found == s2o.attention(*mine)).all()


def test_the_commands_use_the_gpu(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="s2o demo draws")
    assert cli.main(["info"]) == 0
    assert "backend    cuda   available: raw CUDA kernels, CuPy arrays, on " in capsys.readouterr().out
    assert cli.main(["demo", "--sample", "smollm2_prose_l08", "--json", "--png", str(tmp_path / "demo.png")]) == 0
    assert json.loads(capsys.readouterr().out)["backend"] == "cuda"
    q, k, v, _ = s2o.load_sample("smollm2_prose_l08")
    np.savez(tmp_path / "qkv.npz", q=q, k=k, v=v)
    assert cli.main(["run", str(tmp_path / "qkv.npz"), "--backend", "cuda", "--out", str(tmp_path / "out.npz")]) == 0
    want = s2o.dense_attention(q, k, v).astype(float)
    with np.load(tmp_path / "out.npz") as file:
        assert np.linalg.norm(file["out"] - want) < 0.1 * np.linalg.norm(want)
