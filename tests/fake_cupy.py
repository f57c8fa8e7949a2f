"""NumPy in CuPy's clothes, and the CPU backend as 'cuda': the GPU benchmarks' own logic runs without a GPU.

Nothing here says how fast or right a kernel is; times are host times.
"""

from __future__ import annotations

import contextlib
import sys
import time
import types

import numpy as np


class Event:
    """A host clock."""

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass


class Pool:
    """A memory pool that holds nothing."""

    def free_all_blocks(self):
        pass

    def total_bytes(self):
        return 0

    def malloc(self, nbytes):
        """Never called: NumPy allocates."""


class Device:
    """One made-up device."""

    id, pci_bus_id, attributes = 0, "none", {"MaxThreadsPerMultiProcessor": 2048}


def install(monkeypatch) -> types.ModuleType:
    """Put the module in place of cupy, and the CPU backend in place of the CUDA one, for one test."""
    from s2o_cupy import backends, call
    from s2o_cupy.backends import cpu

    cupy = types.ModuleType("cupy")
    cupy.__dict__.update({name: getattr(np, name) for name in dir(np) if not name.startswith("__")})
    cupy.__version__ = "none"
    properties = {"name": b"no GPU", "multiProcessorCount": 1, "l2CacheSize": 0, "totalGlobalMem": 0}
    properties["maxThreadsPerMultiProcessor"] = 2048
    runtime = types.SimpleNamespace(
        deviceSynchronize=lambda: None,
        getDevice=lambda: 0,
        getDeviceProperties=lambda _: properties,
        driverGetVersion=lambda: 13000,
    )
    cupy.cuda = types.SimpleNamespace(
        Event=Event,
        Device=Device,
        get_current_stream=lambda: types.SimpleNamespace(synchronize=lambda: None),
        runtime=runtime,
        get_elapsed_time=lambda a, b: 1e3 * (b.at - a.at),
        MemoryPool=Pool,
        using_allocator=lambda _: contextlib.nullcontext(),
        nvrtc=types.SimpleNamespace(getVersion=lambda: (0, 0)),
    )
    rng = np.random.default_rng(0)
    cupy.random = types.SimpleNamespace(
        seed=lambda _: None, standard_normal=lambda shape, dtype: rng.standard_normal(shape, dtype)
    )
    cupy.get_default_memory_pool = Pool
    cupy.from_dlpack = lambda x: x.numpy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "s2o_cupy.backends.cuda", cpu)
    monkeypatch.setattr(backends, "cuda", cpu, raising=False)
    monkeypatch.setattr(backends, "get", lambda *_: cpu)
    monkeypatch.setattr(backends, "require", lambda name: None)
    monkeypatch.setattr(call, "_layout", lambda *_: None)  # these arrays' devices have no number
    return cupy
