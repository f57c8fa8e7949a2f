"""Backends by name. Each module has the same stages: score, remap, pool, attend, and dense."""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np

_MODULES = {"cpu": "s2o_cupy.backends.cpu"}


def get(name: str | None, arrays: dict) -> ModuleType:
    """The backend called `name`, or the one for where the arrays are; refuses arrays it cannot read."""
    where, x = next(iter(arrays.items()))
    on_cpu = isinstance(x, np.ndarray)
    if name is None:
        name = "cpu" if on_cpu else "cuda"
    if name not in _MODULES:
        raise ValueError(f"backend is {name!r}; allowed: {', '.join(map(repr, _MODULES))}, or None")
    if name == "cpu" and not on_cpu:
        raise TypeError(f"{where} is on a GPU; backend 'cpu' takes NumPy arrays ({where}.get())")
    return importlib.import_module(_MODULES[name])
