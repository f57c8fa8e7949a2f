"""Every launch of the CUDA backend, without a GPU: as many arguments as the kernel has parameters, each of its type."""

import importlib
import re
import sys
from types import SimpleNamespace
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest

from s2o_cupy.backends._tape import Place
from s2o_cupy.iterate import emulation as run
from s2o_cupy.problem import Problem
from s2o_cupy.settings import Settings
from s2o_cupy.sources import current

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
SCALARS = {"int": (np.int32,), "long long": (np.int64,), "float": (np.float32,), "real_t": (np.float32, np.float64)}


class Array:
    """The attributes of a device array that launching reads."""

    def __init__(self, shape, dtype=np.float32):
        host = np.empty((shape,) if isinstance(shape, int) else shape, np.int8)
        self.shape, self.size, self.dtype = host.shape, host.size, np.dtype(dtype)
        self.itemsize = self.dtype.itemsize
        self.strides = tuple(s * self.itemsize for s in host.strides)
        self.data = SimpleNamespace(ptr=4096)


class Kernel:
    """Stands for a compiled kernel and checks what it is launched with."""

    launched: ClassVar[set] = set()

    def __init__(self, name, entry):
        self.name, self.entry = name, entry or name

    def prepared(self, grid, block, arguments, shared_mem=0):
        assert all(n > 0 for n in (*grid, block))
        assert 0 <= shared_mem <= 227 * 1024
        wanted = parameters(self.name, self.entry)
        for parameter, argument in zip(wanted, arguments, strict=True):
            if "*" in parameter:
                assert argument is None or isinstance(argument, (Place, Array)), parameter
            else:
                kind = re.sub(r" ?\b\w+$", "", parameter) if parameter != "int" else "int"
                assert type(argument) in SCALARS[kind], (self.entry, parameter, type(argument))
        return lambda stream, addresses, extra: self.launched.add(self.entry)


def parameters(name, entry):
    """A kernel's parameters from its source."""
    return [re.sub(r"\s+", " ", part).strip() for part in run.parameter_list(current(name).text, entry).split(",")]


@pytest.fixture
def cuda(monkeypatch):
    """The backend over a stand-in for CuPy, on an H100."""
    runtime = SimpleNamespace(
        getDevice=lambda: 0,
        setDevice=lambda device: None,
        getDeviceProperties=lambda device: {"multiProcessorCount": 132},
        memsetAsync=lambda address, value, nbytes, stream: None,
    )
    stream = SimpleNamespace(ptr=0, synchronize=lambda: None)
    stand_in = SimpleNamespace(
        ndarray=Array,
        empty=Array,
        asarray=lambda x, dtype=None: Array(np.shape(x), dtype or x.dtype),
        cuda=SimpleNamespace(runtime=runtime, get_current_stream=lambda: stream),
    )
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.delitem(sys.modules, "s2o_cupy.backends.cuda", raising=False)
    module = importlib.import_module("s2o_cupy.backends.cuda")
    monkeypatch.setattr(module, "device_target", lambda device=None: "sm_90a")
    monkeypatch.setattr(module, "get_kernel", lambda name, entry=None, source=None, **macros: Kernel(name, entry))
    yield module
    sys.modules.pop("s2o_cupy.backends.cuda", None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank": "mean", "query_order": "guide"},
        {"rank_terms": 7, "share_order": True, "cap": 0.3},
        {"rank_terms": 31, "rank_levels": None},
        {"rank_terms": None, "rank_levels": 60000},
        {"rank": "mixture", "rank_terms": 31},
        {"rank": "mixture", "rank_terms": None, "causal": False},
        {"causal": False, "tail": None},
        {"tau": (0.1, 0.2, 0.0, 0.3), "block_q": 32},
    ],
)
def test_launches_match_their_kernels(cuda, dtype, settings):
    for dim, dim_v in ((128, 128), (64, 64), (256, 256), (33, 20)):
        p = Problem(1, 4, 2, 700, 900, dim, dim_v, dtype, Settings(**{"segment": 256, "pool": 64, **settings}))
        kind, rows = DTYPES[dtype], (1, 4, 700)
        q, k, v = Array((*rows, dim), kind), Array((1, 2, 900, dim), kind), Array((1, 2, 900, dim_v), kind)
        offsets, order = Array(p.offsets(p.whole).shape, np.int64), Array(10, np.int32)
        query_order = Array(rows, np.int32) if p.settings.query_order == "guide" else None
        tiles = (1, 4, len(p.tile_start))
        result = SimpleNamespace(
            out=Array((*rows, dim_v), kind),
            lse=Array(rows, p.compute_dtype),
            tiles=Array(tiles, np.int32),
            tail_blocks=Array(tiles, np.int32),
            tail_mass=Array(rows),
        )
        cuda.remap(p, cuda.score(p, q, k, p.whole), p.whole, offsets, order)
        cuda.rank(p, q, k, p.whole, offsets, order)
        cuda.attend(p, q, k, v, p.whole, order, offsets, query_order, cuda.pool(p, k, v), result)
        cuda.dense(p, q, k, v, result)
    if dtype in ("float16", "bfloat16"):
        assert "attend_sm90" in Kernel.launched
    assert {"remap", *(("centres",) if p.settings.rank == "mixture" else ("factor",))} <= Kernel.launched
