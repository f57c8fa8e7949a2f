"""What a check runs a stage on: raw kernels on the GPU or emulated on the CPU, Numba twins on the GPU or simulated.

An engine places host arrays, runs a stage of its backend and hands the answer back as NumPy arrays. Everything that
the stage allocates lies between guards, so that a write past an end shows.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
import types
from types import SimpleNamespace

import numpy as np

from s2o_cupy.backends._tape import Tape
from s2o_cupy.iterate import emulation
from s2o_cupy.problem import Problem
from s2o_cupy.sources import Source
from s2o_cupy.variants import only

GUARD = 64  # elements on either side of an array; none where a sanitizer watches each allocation
_BYTE = 0xA5


class Guards:
    """`empty` of an array module, with guards around what it gives; `broken` names the arrays written past."""

    def __init__(self, xp):
        self.xp, self.given, self.zeroed = xp, [], []

    def __getattr__(self, name):
        return getattr(self.xp, name)

    def empty(self, shape, dtype=np.float64):
        shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(map(int, shape))
        dtype, size = np.dtype(dtype), math.prod(shape)
        edge = GUARD * dtype.itemsize
        room = self.xp.empty(2 * edge + size * dtype.itemsize, np.uint8)
        _set(room, _BYTE)
        self.given.append((room, edge, shape, dtype))
        inside = room[edge : edge + size * dtype.itemsize]
        _set(inside, 0xFF)  # NaN, or -1: what is not written shows
        return inside.view(dtype).reshape(shape)

    def zeros(self, shape, dtype=np.float64):
        x = self.empty(shape, dtype)
        _set(x.reshape(-1).view(np.uint8), 0)
        self.zeroed.append(x)
        return x

    def workspace(self, tape: Tape, stream: int):
        """Memory for a recorded stage, each of its rooms between guards; their addresses."""
        rooms = [(self.zeros if room.zeroed else self.empty)(room.shape, room.dtype) for room in tape.rooms]
        return rooms, [room.data.ptr for room in rooms]

    def broken(self) -> list[str]:
        """A line for each array past whose ends something was written; forgets all arrays."""
        found = []
        for room, edge, shape, dtype in self.given:
            for side, part in (("start", room[:edge]), ("end", room[len(room) - edge :])):
                wrong = np.count_nonzero(_bytes(part) != _BYTE)
                if wrong:
                    where = "before the start" if side == "start" else "past the end"
                    found.append(f"{wrong} bytes {where} of a {dtype.name} array of shape {shape}")
        self.forget()
        return found

    def forget(self) -> None:
        """Let go of every array."""
        self.given.clear()
        self.zeroed.clear()


def _set(x, byte: int) -> None:
    """Every byte of an array of bytes; on a GPU by a copy engine, since CuPy's own kernels take seconds to compile."""
    if hasattr(x.data, "memset_async"):
        x.data.memset_async(byte, x.nbytes)
    else:
        x.fill(byte)


def _bytes(x) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else x.get()


class Raw:
    """The raw CUDA kernels on a GPU, with a variant in place of one of them."""

    where = "on the GPU"

    def __init__(self):
        import cupy

        from s2o_cupy.backends import cuda

        self.xp, self.backend = cupy, cuda
        self.guards = Guards(cupy)
        cuda.cp, cuda.workspace, cuda.get_kernel = self.guards, self.guards.workspace, self.kernel

    def kernel(self, name: str, entry: str | None, source: Source, **macros):
        """One kernel of a file, compiled without the file's others."""
        from s2o_cupy.compile import get_kernel

        return get_kernel(name, entry, part(source, entry or name), **macros)

    def place(self, x: np.ndarray):
        return self.xp.asarray(x)

    def host(self, x) -> np.ndarray:
        return x.get()

    def wait(self) -> None:
        self.xp.cuda.runtime.deviceSynchronize()

    # --- stages -----------------------------------------------------------------------------------
    def pool(self, p: Problem, k, v):
        return self.backend.pool(p, k, v)

    def scores(self, p: Problem, q, k):
        """A function of (order head, segment): that list's scores."""
        found = self.backend.score(p, q, k, p.whole)
        starts = self.host(found.starts)
        rows = self.host(found.data).reshape(-1, int(starts[-1]))
        return lambda o, s: rows[o, starts[s] : starts[s] + p.history[s]]

    def order(self, p: Problem, scores: np.ndarray):
        """Stage 2 over (heads, keys) scores, one list a head: (heads, listed)."""
        keys = scores.shape[1]
        row = -(-keys // 64) * 64
        data = self.place(np.pad(scores, ((0, 0), (0, row - keys)), constant_values=np.nan))
        starts, history = self.place(np.array([0, row], np.int64)), self.place(np.array([keys], np.int32))
        given = self.backend.Scores(data.reshape(-1), starts, history, keys)
        return self._ordered(p, given)

    def _ordered(self, p: Problem, given):
        offsets = p.offsets(p.whole)
        order = self.guards.empty(int(offsets[-1, -1]), np.int32)
        self.backend.remap(p, given, p.whole, self.place(offsets), order)
        return self.host(order).reshape(len(offsets), -1)

    def attend(self, p: Problem, q, k, v, order, offsets, rows, second=False):
        """Stage 3: out, lse, tiles, tail_blocks and tail_mass on the host. `second`: in another thread order."""
        answer = self.answer(p)
        rows = None if rows is None else self.place(rows)
        offsets = self.place(offsets.reshape(-1, p.segments + 1))
        pooled = self.backend.pool(p, k, v)
        self.backend.attend(p, q, k, v, p.whole, self.place(order), offsets, rows, pooled, answer)
        return self._on_host(answer)

    def dense(self, p: Problem, q, k, v):
        answer = self.answer(p)
        self.backend.dense(p, q, k, v, answer)
        return self._on_host(answer)

    def answer(self, p: Problem) -> SimpleNamespace:
        """What stage 3 fills."""
        heads, empty = (p.batch, p.heads_q), self.guards.empty
        tiles = (*heads, len(p.tile_start))
        return SimpleNamespace(
            out=empty((*heads, p.n_q, p.dim_v), _dtype(p.dtype)),
            lse=empty((*heads, p.n_q), p.compute_dtype),
            tiles=empty(tiles, np.int32),
            tail_blocks=empty(tiles, np.int32),
            tail_mass=empty((*heads, p.n_q), np.float32),
        )

    def _on_host(self, answer) -> SimpleNamespace:
        return SimpleNamespace(**{name: self.host(x) for name, x in vars(answer).items()})


class Emulated(Raw):
    """The raw kernels from their own source on the CPU, for those that tests/emulation can run."""

    where = "emulated on the CPU"

    def __init__(self, arch: str = "sm_80", reverse: bool = False):
        self.xp = _array_module()
        sys.modules["cupy"] = self.xp  # this process has no other use for CuPy
        cuda = importlib.import_module("s2o_cupy.backends.cuda")
        self.backend, self.reverse = cuda, reverse
        self.guards = Guards(self.xp)
        cuda.cp, cuda.workspace, cuda.get_kernel = self.guards, self.guards.workspace, self.kernel
        cuda.device_target = lambda device=None: arch

    def kernel(self, name: str, entry: str | None, source: Source, **macros):
        text = part(source, entry or name).text
        function, kinds = emulation.built(text, entry or name, tuple(sorted(macros.items())))

        def prepared(grid, block, arguments, shared_mem=0):
            def launch(stream, addresses, extra):
                values = emulation.read(kinds, addresses)
                emulation.call(function, kinds, grid, block, values, shared_mem, self.reverse)

            return launch

        return SimpleNamespace(prepared=prepared)

    def host(self, x) -> np.ndarray:
        return np.array(x)

    def wait(self) -> None:
        pass

    def attend(self, *arguments, second=False):
        self.reverse = second
        try:
            return super().attend(*arguments)
        finally:
            self.reverse = False


@functools.lru_cache(maxsize=256)
def part(source: Source, entry: str) -> Source:
    """A source with one kernel of its kernels."""
    return Source(source.name, only(source.text, entry), source.macros)


class DeviceArray(np.ndarray):
    """A NumPy array with the one attribute of a CuPy array that launching reads besides."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)


def _array_module() -> types.ModuleType:
    """As much of CuPy as the CUDA backend uses, over NumPy."""
    module = types.ModuleType("cupy")
    module.ndarray = DeviceArray
    stream = SimpleNamespace(ptr=0, synchronize=lambda: None)
    runtime = SimpleNamespace(getDevice=lambda: 0, setDevice=lambda device: None)
    module.cuda = SimpleNamespace(runtime=runtime, get_current_stream=lambda: stream)
    module.empty = lambda shape, dtype=np.float64: np.empty(shape, dtype).view(DeviceArray)
    module.zeros = lambda shape, dtype=np.float64: np.zeros(shape, dtype).view(DeviceArray)
    module.full = lambda shape, value, dtype=None: np.full(shape, value, dtype).view(DeviceArray)
    module.asarray = lambda x, dtype=None: np.asarray(x, dtype).view(DeviceArray)
    return module


class Twins(Raw):
    """The Numba CUDA twins, on a GPU, or in Numba's simulator where this process was started with it."""

    def __init__(self):
        from s2o_cupy.backends import numba_cuda

        self.backend, self.simulated = numba_cuda, numba_cuda.SIMULATED
        self.where = "in Numba's simulator" if self.simulated else "on the GPU"
        if self.simulated:
            self.xp = np
        else:
            import cupy

            self.xp = cupy
        self.guards = Guards(self.xp)

    def host(self, x) -> np.ndarray:
        return x.copy() if self.simulated else x.get()

    def wait(self) -> None:
        if not self.simulated:
            self.xp.cuda.runtime.deviceSynchronize()

    def scores(self, p: Problem, q, k):
        rows = self.host(self.backend.score(p, q, k, p.whole))
        return lambda o, s: rows[o * p.segments + s, : p.history[s]]

    def order(self, p: Problem, scores: np.ndarray):
        return self._ordered(p, self.place(scores.astype(np.float32)))


def _dtype(name: str):
    from s2o_cupy.iterate.cases import DTYPES

    return np.dtype(DTYPES[name])
