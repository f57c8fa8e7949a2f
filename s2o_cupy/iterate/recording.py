"""Launches of one kernel file, recorded as the CUDA backend makes them, to be played again and timed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np


class Arguments:
    """A copy of a launch's arguments, which no other launch can change, and the address of their addresses."""

    def __init__(self, addresses: int, count: int):
        places = (ctypes.c_uint64 * count).from_address(addresses)
        self.values = np.array([ctypes.c_uint64.from_address(place).value for place in places], np.uint64)
        self._addresses = self.values.ctypes.data + 8 * np.arange(count, dtype=np.uint64)
        self.address = self._addresses.ctypes.data


@dataclass
class Launch:
    """One launch: call it to launch again on the same arrays."""

    entry: str
    kernel: Any
    prepared: Callable
    block: int
    arguments: Arguments
    shared: int
    zeroed: list  # of the arguments: counters that a launch expects to be zero

    def __call__(self) -> None:
        import cupy

        for counter in self.zeroed:
            counter.fill(0)
        self.prepared(cupy.cuda.get_current_stream().ptr, self.arguments.address, 0)

    def usage(self) -> dict:
        """What the kernel takes in this launch (`compile.Kernel.usage`), under its name."""
        return {"kernel": self.entry, **self.kernel.usage(self.block, self.shared)}


def distinct(launches: list[Launch]) -> list[dict]:
    """The usage of each kernel that was launched, and of each way that it was; those launched alike once."""
    found = {(x.entry, id(x.kernel), x.block, x.shared): x for x in launches}
    return [launch.usage() for launch in found.values()]


@contextmanager
def _asked_of(backend, get_kernel: Callable) -> Iterator[None]:
    """Inside the block the CUDA backend asks `get_kernel` for kernels, and nothing that it recorded stays."""
    original = backend.get_kernel
    backend.get_kernel = get_kernel
    backend._recorded.cache_clear()
    try:
        yield
    finally:
        backend.get_kernel = original
        backend._recorded.cache_clear()


@contextmanager
def rehearsed(backend) -> Iterator[dict[tuple, None]]:
    """The kernels that the CUDA backend asks for inside the block, as (file, entry, source, macros): none is compiled,
    none runs, and what the stages answer is nothing."""
    wanted: dict[tuple, None] = {}

    def get_kernel(file, entry=None, source=None, **macros):
        wanted[file, entry or file, source, tuple(sorted(macros.items()))] = None
        return SimpleNamespace(prepared=lambda *launch, **shared: lambda stream, addresses, extra: None)

    with _asked_of(backend, get_kernel):
        yield wanted


@contextmanager
def recorded(backend, name: str) -> Iterator[list[Launch]]:
    """The launches of ``kernels/NAME.cu`` that the CUDA backend makes inside the block; they run too."""
    launches: list[Launch] = []
    original = backend.get_kernel

    def get_kernel(file, entry=None, source=None, **macros):
        kernel = original(file, entry, source, **macros)
        if file != name:
            return kernel

        def prepared(grid, block, arguments, shared_mem=0):
            launch = kernel.prepared(grid, block, arguments, shared_mem)

            def both(stream, addresses, extra):
                kept = Arguments(addresses, len(arguments))
                zeroed = [x for x in backend.cp.zeroed if x.data.ptr in kept.values]
                launches.append(Launch(entry or file, kernel, launch, block, kept, shared_mem, zeroed))
                launch(stream, addresses, extra)

            return both

        return SimpleNamespace(prepared=prepared)

    with _asked_of(backend, get_kernel):
        yield launches


@contextmanager
def recorded_twins(backend) -> Iterator[list]:
    """The launches that the Numba backend makes inside the block, to be played again; they run too."""
    launches, original = [], backend._launch

    def launch(*arguments):
        launches.append(lambda: original(*arguments))
        original(*arguments)

    backend._launch = launch
    try:
        yield launches
    finally:
        backend._launch = original
