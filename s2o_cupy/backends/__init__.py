"""Backends by name. Each module has the same stages: score, remap, pool, attend, and dense."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import numpy as np

NAMES = {"cpu": "s2o_cupy.backends.cpu", "cuda": "s2o_cupy.backends.cuda"}
_INSTALL = "pip install 's2o-cupy[cu13]' (or cu12, after the driver's CUDA version)"


def get(name: str | None, arrays: dict) -> ModuleType:
    """The backend called `name`, or the one for where the arrays are; refuses arrays it cannot read."""
    where, x = next(iter(arrays.items()))
    on_cpu = isinstance(x, np.ndarray)
    if name is None:
        name = "cpu" if on_cpu else "cuda"
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"backend is {name!r}; allowed: {', '.join(map(repr, NAMES))}, or None")
    if name == "cpu" and not on_cpu:
        raise TypeError(f"{where} is on a GPU; backend 'cpu' takes NumPy arrays ({where}.get())")
    if name == "cuda":
        require_cuda()
        if on_cpu:
            raise TypeError(f"{where} is a NumPy array; backend 'cuda' takes CuPy arrays: cupy.asarray({where})")
    return importlib.import_module(NAMES[name])


def require_cuda() -> None:
    """Refuse where the CUDA backend cannot run, saying why."""
    works, why = _cuda_status()
    if not works:
        raise RuntimeError(f"backend 'cuda' cannot run: {why}")


def status() -> dict[str, tuple[bool, str]]:
    """For each backend, whether it works on this machine and a line that says why or what to install."""
    return {"cpu": (True, "Numba, NumPy arrays"), "cuda": _cuda_status()}


@cache
def _cuda_status() -> tuple[bool, str]:
    try:
        import cupy
    except ImportError:
        return False, f"CuPy is missing: {_INSTALL}"
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return False, f"no usable CUDA device or driver: {error}"
    if not count:
        return False, "no CUDA device"
    capability = int(cupy.cuda.Device().compute_capability)
    name = runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    if capability < 80:
        return False, f"{name} has compute capability {capability / 10}; the kernels need 8.0"
    return True, f"raw CUDA kernels, CuPy arrays, on {name} ({count} device{'s' * (count > 1)})"
