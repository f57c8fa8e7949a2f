"""Backends by name. Each module has the same stages: rank (score and remap), pool, attend, and dense."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from types import ModuleType

import numpy as np

from s2o_cupy.sources import called_on

NAMES = {
    "cpu": "s2o_cupy.backends.cpu",
    "cuda": "s2o_cupy.backends.cuda",
    "numba": "s2o_cupy.backends.numba_cuda",
}
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
        require("cuda")
        if on_cpu:
            raise TypeError(f"{where} is a NumPy array; backend 'cuda' takes CuPy arrays: cupy.asarray({where})")
    if name == "numba":
        _require_numba(where, on_cpu)
    if not on_cpu:
        _require_current(where, x.device)
    if name == "cuda":
        for where, x in arrays.items():
            _require_rows(where, x.shape, x.strides, x.itemsize)
    return module(name)


def module(name: str) -> ModuleType:
    """A backend for a call whose arrays were checked."""
    called_on(name)
    return sys.modules.get(NAMES[name]) or importlib.import_module(NAMES[name])


def _require_current(where: str, device) -> None:
    """Refuse arrays of another device than the current one, which is where kernels run and memory comes from."""
    import cupy

    if device.id != (current := cupy.cuda.runtime.getDevice()):
        raise ValueError(
            f"{where} is on device {device.id} and the current device is {current}; allowed: the current one "
            f"(with cupy.cuda.Device({device.id}): ...)"
        )


def _require_rows(where: str, shape: tuple, strides: tuple, itemsize: int) -> None:
    """Refuse rows that the CUDA kernels cannot read: they would have to be copied."""
    if shape[-1] > 1 and strides[-1] != itemsize:
        raise ValueError(
            f"{where} has strides {strides}, gaps in its last axis; backend 'cuda' takes {itemsize} bytes from each "
            f"element of a row to the next: cupy.ascontiguousarray({where})"
        )
    if shape[-2] > 1 and abs(strides[-2]) >= 2**31:
        raise ValueError(
            f"{where} has strides {strides}; backend 'cuda' takes less than 2**31 bytes from each row to the next: "
            f"cupy.ascontiguousarray({where})"
        )


def takes_numpy(name: str | None) -> bool:
    """Whether a backend, None for the default, runs on NumPy arrays here."""
    return name in (None, "cpu") or (name == "numba" and _simulator_on())


def require(name: str) -> None:
    """Refuse where the backend "cuda" or "numba" cannot run, saying why."""
    works, why = _cuda_status() if name == "cuda" else _numba_status()
    if not works:
        raise RuntimeError(f"backend {name!r} cannot run: {why}")


def _require_numba(where: str, on_cpu: bool) -> None:
    """Refuse where the Numba CUDA backend cannot run, or does not run on the kind of array given."""
    if _simulator_on():
        if not on_cpu:
            raise TypeError(
                f"{where} is a CuPy array and Numba's simulator is on; unset NUMBA_ENABLE_CUDASIM, or give NumPy arrays"
            )
        return
    if on_cpu:
        raise TypeError(
            f"{where} is a NumPy array; backend 'numba' takes CuPy arrays, "
            "and NumPy arrays in Numba's simulator: set NUMBA_ENABLE_CUDASIM=1 before Python starts"
        )
    require("numba")


def _simulator_on() -> bool:
    import numba

    return bool(numba.config.ENABLE_CUDASIM)


def status() -> dict[str, tuple[bool, str]]:
    """For each backend, whether it works on this machine and a line that says why or what to install."""
    return {"cpu": (True, "Numba, NumPy arrays"), "cuda": _cuda_status(), "numba": _numba_status()}


@cache
def _gpu() -> tuple[int, str]:
    """Compute capability (75 for 7.5) and name of the current GPU; 0 and what is wrong where none can be used."""
    try:
        import cupy
    except ImportError:
        return 0, f"CuPy is missing: {_INSTALL}"
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return 0, f"no usable CUDA device or driver: {error}"
    if not count:
        return 0, "no CUDA device"
    device = cupy.cuda.Device()
    name = runtime.getDeviceProperties(device.id)["name"].decode()
    return int(device.compute_capability), f"{name} ({count} device{'s' * (count > 1)})"


@cache
def _cuda_status() -> tuple[bool, str]:
    capability, gpu = _gpu()
    if not capability:
        return False, gpu
    if capability < 80:
        why = "the raw kernels need 8.0; backend='numba' serves older GPUs"
        return False, f"{gpu} has compute capability {capability / 10}; {why}"
    return True, f"raw CUDA kernels, CuPy arrays, on {gpu}"


@cache
def _numba_status() -> tuple[bool, str]:
    if _simulator_on():
        return True, "Numba CUDA kernels, NumPy arrays, in Numba's simulator (NUMBA_ENABLE_CUDASIM)"
    try:
        import cupy  # noqa: F401
    except ImportError:
        return False, f"CuPy is missing: {_INSTALL}; or set NUMBA_ENABLE_CUDASIM=1 for the simulator"
    if not importlib.util.find_spec("numba_cuda"):
        return False, f"numba-cuda is missing: {_INSTALL}"
    capability, gpu = _gpu()
    return (True, f"Numba CUDA kernels, CuPy arrays, on {gpu}") if capability else (False, gpu)
