"""Launches of one kernel file, recorded as the CUDA backend makes them, to be played again and timed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Launch:
    """One launch: call it to launch again on the same arrays."""

    entry: str
    kernel: Any
    grid: tuple
    block: tuple
    arguments: tuple
    shared: int
    zeroed: list  # of the arguments: counters that a launch expects to be zero

    def __call__(self) -> None:
        for counter in self.zeroed:
            counter.fill(0)
        self.kernel(self.grid, self.block, self.arguments, shared_mem=self.shared)

    def usage(self) -> dict:
        """Registers, local and shared bytes, and the blocks and warps that a multiprocessor holds at once."""
        import cupy

        threads = self.block[0]
        blocks = cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(
            self.kernel.kernel.ptr, threads, self.shared
        )
        runtime = cupy.cuda.runtime
        most = runtime.getDeviceProperties(runtime.getDevice())["maxThreadsPerMultiProcessor"]
        return {
            "kernel": self.entry,
            "registers": self.kernel.num_regs,
            "local_bytes": self.kernel.local_size_bytes,
            "shared_bytes": self.kernel.shared_size_bytes + self.shared,
            "blocks": blocks,
            "occupancy": blocks * threads / most,
        }


@contextmanager
def recorded(backend, name: str) -> Iterator[list[Launch]]:
    """The launches of ``kernels/NAME.cu`` that the CUDA backend makes inside the block; they run too."""
    launches: list[Launch] = []
    original = backend.get_kernel

    def get_kernel(file, entry=None, source=None, **macros):
        kernel = original(file, entry, source, **macros)
        if file != name:
            return kernel

        def launch(grid, block, arguments, shared_mem=0):
            zeroed = [a for a in arguments if any(a is x for x in backend.cp.zeroed)]
            launches.append(Launch(entry or file, kernel, grid, block, tuple(arguments), shared_mem, zeroed))
            kernel(grid, block, arguments, shared_mem=shared_mem)

        return launch

    backend.get_kernel = get_kernel
    _forget(backend)
    try:
        yield launches
    finally:
        backend.get_kernel = original
        _forget(backend)


def _forget(backend) -> None:
    """Empty the caches that hold kernels."""
    backend._kernel_on.cache_clear()
    backend._attend_launch.cache_clear()
