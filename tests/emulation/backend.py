"""The CUDA backend on the CPU: its own launches, over NumPy arrays, by emulated kernels."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import numpy as np

from s2o_cupy.iterate import emulation as run


def emulated(monkeypatch, reverse: bool = False, arch: str = "sm_80"):
    """`s2o_cupy.backends.cuda` with NumPy for CuPy; blocks run in turn, their threads in one of two orders."""
    stand_in = SimpleNamespace(
        ndarray=np.ndarray,
        empty=_unwritten,
        asarray=np.asarray,
        ascontiguousarray=np.ascontiguousarray,
        cuda=SimpleNamespace(
            runtime=SimpleNamespace(getDevice=lambda: 0),
            get_current_stream=lambda: SimpleNamespace(synchronize=lambda: None),
        ),
    )
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.delitem(sys.modules, "s2o_cupy.backends.cuda", raising=False)
    module = importlib.import_module("s2o_cupy.backends.cuda")
    monkeypatch.setitem(sys.modules, "s2o_cupy.backends.cuda", module)  # undone with the test
    monkeypatch.setattr(module, "device_target", lambda device=None: arch)
    monkeypatch.setattr(module, "_aligned", _aligned)

    def get_kernel(name, entry=None, source=None, **macros):
        def kernel(grid, block, arguments, shared_mem=0):
            arguments = [None if isinstance(a, np.intp) and a == 0 else a for a in arguments]
            run.launch(name, grid, block[0], arguments, entry=entry, shared=shared_mem, reverse=reverse, **macros)

        return kernel

    monkeypatch.setattr(module, "get_kernel", get_kernel)
    return module


def _unwritten(shape, dtype=np.float32):
    """An array full of bytes that make NaN or absurd integers, where an empty one might by chance hold the answer."""
    x = np.empty(shape, dtype)
    x.view(np.uint8).reshape(-1)[:] = 0xFF
    return x


def _aligned(x) -> int:
    return int(x.ctypes.data % 16 == 0 and all(s % 16 == 0 or n == 1 for s, n in zip(x.strides[:3], x.shape[:3])))
