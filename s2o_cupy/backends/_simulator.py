"""Numba's CUDA simulator, for numba_cuda.py: a launch over NumPy arrays, a Python thread for each CUDA thread."""

from __future__ import annotations

import sys
import threading
import warnings
from contextlib import contextmanager

import numpy as np
from numba import cuda, types
from numba.cuda.simulator import kernel as simulated
from numba.cuda.simulator import kernelapi
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray
from numba.np.numpy_support import as_dtype


def simulate(kernel, grid, threads: int, arguments) -> None:
    """Run a kernel over NumPy arrays, views included."""
    wrapped = [FakeCUDAArray(x) if isinstance(x, np.ndarray) else x for x in arguments]
    with warnings.catch_warnings():  # NaN and overflow are answers here, as on a device
        warnings.simplefilter("ignore", RuntimeWarning)
        kernel[grid, threads](*wrapped)


def _shared_array(self, shape, dtype):
    """A block's array of one line of source, as Numba makes it.

    Numba's own looks and then stores: threads that come there at once get arrays of their own, and share nothing.
    """
    caller = sys._getframe(1)
    made = np.empty(shape, as_dtype(dtype) if isinstance(dtype, types.Type) else dtype)
    return self._allocations.setdefault((caller.f_code.co_filename, caller.f_lineno), made)


kernelapi.FakeCUDAShared.array = _shared_array


_inside: dict[int, list] = {}  # by a module's names: threads in its functions, and which of the names were `cuda`
_counting = threading.Lock()


@contextmanager
def _swapped_cuda_module(function, fake):
    """The simulator's module in place of `cuda`, where a function of the block's threads looks it up.

    Numba's own gives `cuda` back as soon as one thread leaves a device function, while others are in its module.
    """
    names = function.__globals__
    with _counting:
        inside = _inside.setdefault(id(names), [0, [name for name, x in names.items() if x is cuda]])
        inside[0] += 1
        names.update(dict.fromkeys(inside[1], fake))
    try:
        yield
    finally:
        with _counting:
            inside[0] -= 1
            if not inside[0]:
                names.update(dict.fromkeys(inside[1], cuda))
                del _inside[id(names)]


simulated.swapped_cuda_module = _swapped_cuda_module
