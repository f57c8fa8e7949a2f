"""The CUDA backend on the CPU: its own launches, over NumPy arrays, by emulated kernels."""

from __future__ import annotations

import sys

from s2o_cupy.iterate.engines import Emulated


def emulated(monkeypatch, reverse: bool = False, arch: str = "sm_80") -> Emulated:
    """An engine whose backend is forgotten with the test; blocks run in turn, their threads in one of two orders."""
    for name in ("cupy", "s2o_cupy.backends.cuda"):
        monkeypatch.setitem(sys.modules, name, None)  # undone with the test
    del sys.modules["s2o_cupy.backends.cuda"]
    return Emulated(arch, reverse)
