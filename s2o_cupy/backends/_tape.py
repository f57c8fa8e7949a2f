"""A stage's launches, recorded once and run again on other arrays of the same layout: only addresses are written then.

A launch through CuPy looks at every argument, half a microsecond each, and a stage has 40. What a recorded stage costs
the host is one allocation, its addresses, and the driver's own launches.
"""

from __future__ import annotations

import ctypes
import math
import threading
from dataclasses import dataclass, replace

import numpy as np

_ALIGNMENT = 256


@dataclass(frozen=True)
class Place:
    """An array of a recorded stage: which of a run's addresses is its start, and how many bytes behind it.

    Strides are those of all axes but the last, in elements; `aligned`: every row starts on 16 bytes.
    """

    index: int
    itemsize: int = 1
    strides: tuple[np.int64, ...] = ()
    aligned: bool = True
    offset: int = 0

    def __getitem__(self, slices: tuple[slice, ...]) -> Place:
        """A part of it, by a slice with a start for each axis."""
        first = sum(int(step) * part.start for step, part in zip((*self.strides, 1), slices, strict=True))
        return replace(self, offset=self.offset + first * self.itemsize)


@dataclass(frozen=True)
class Room:
    """Memory that a run needs for itself: where it starts in the workspace, and whether with zeros."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    zeroed: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Slots:
    """Arguments of launches, 8 bytes each, and beside them the addresses of each, which the driver reads."""

    def __init__(self, values: np.ndarray):
        self.values = values
        self._addresses = values.ctypes.data + 8 * np.arange(len(values), dtype=np.uint64)
        self.address = self._addresses.ctypes.data

    @classmethod
    def copied(cls, address: int, count: int) -> Slots:
        """The arguments of one launch, which another launch cannot change."""
        first = ctypes.c_uint64.from_address(address).value
        return cls(np.array((ctypes.c_uint64 * count).from_address(first)))


class Tape:
    """Launches in order. `room` and `launch` record, `pack` ends the recording, `run` launches.

    Rooms lie end to end in one workspace of `nbytes`; `top` is where the next starts: set back, it gives rooms away.
    """

    def __init__(self, given: int):
        self.rooms: list[Room] = []
        self.nbytes = self.top = 0
        self._given = given
        self._kernels, self._launches, self._arguments = [], [], []
        self._lock = threading.Lock()

    def room(self, shape, dtype, zeroed: bool = False) -> Place:
        """An array of the workspace: uninitialised, or `zeroed` at each run."""
        shape, dtype = tuple(map(int, np.atleast_1d(shape))), np.dtype(dtype)
        room = Room(self.top, shape, dtype, zeroed)
        self.rooms.append(room)
        self.top += -(-room.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.nbytes = max(self.nbytes, self.top)
        return Place(self._given + len(self.rooms) - 1)

    def launch(self, kernel, grid, block: int, arguments, shared_mem: int = 0) -> None:
        """Record a launch of a `Kernel`. Arguments: places, device arrays that stay, None for null, NumPy scalars."""
        self._launches.append(kernel.prepared(grid, block, arguments, shared_mem))
        self._arguments.append(arguments)
        self._kernels.append(kernel)  # stays loaded

    def pack(self) -> None:
        """End the recording: lay out the arguments."""
        flat = [x for arguments in self._arguments for x in arguments]
        values, places = np.zeros(len(flat), np.uint64), []
        for slot, x in enumerate(flat):
            if isinstance(x, Place):
                places.append((slot, x.index, x.offset))
            elif isinstance(x, np.generic):
                values[slot : slot + 1].view(np.uint8)[: x.itemsize] = np.frombuffer(x.tobytes(), np.uint8)
            elif x is not None:
                values[slot] = x.data.ptr
        self._at, self._index, self._offset = np.array(places, np.int64).reshape(-1, 3).T.copy()
        self._slots = Slots(values)
        starts = self._slots.address + 8 * np.cumsum([0, *map(len, self._arguments)])
        self._ready = list(zip(self._launches, starts.tolist()))

    def run(self, stream: int, addresses: list[int]) -> None:
        """Launch everything on a stream. Addresses: of the arrays given, in order, then of each room."""
        with self._lock:  # the driver copies arguments at each launch
            self._slots.values[self._at] = np.array(addresses, np.int64)[self._index] + self._offset
            for launch, arguments in self._ready:
                launch(stream, arguments, 0)
