"""Backends by name. Each module has the same stages: score, remap, pool, attend, and dense."""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np

NAMES = {"cpu": "s2o_cupy.backends.cpu"}


def get(name: str | None, arrays: dict) -> ModuleType:
    """The backend called `name`, or the one for where the arrays are; refuses arrays it cannot read."""
    where, x = next(iter(arrays.items()))
    on_cpu = isinstance(x, np.ndarray)
    if name is None:
        name = "cpu" if on_cpu else "cuda"
    if name not in NAMES:
        raise ValueError(f"backend is {name!r}; allowed: {', '.join(map(repr, NAMES))}, or None")
    if name == "cpu" and not on_cpu:
        raise TypeError(f"{where} is on a GPU; backend 'cpu' takes NumPy arrays ({where}.get())")
    return importlib.import_module(NAMES[name])


def status() -> dict[str, tuple[bool, str]]:
    """For each backend, whether it works on this machine and a line that says why or what to install."""
    return {"cpu": (True, "Numba, NumPy arrays")}
