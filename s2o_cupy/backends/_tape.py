"""Launches recorded once and run again on other arrays of the same layout: only addresses are written then.

A launch through CuPy looks at every argument, half a microsecond each, and a launch has 40.
"""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

_ALIGNMENT = 256
_FORMS = {np.int32: "i4x", np.int64: "q", np.float32: "f4x", np.float64: "d"}  # of scalars, 8 bytes each


@dataclass(slots=True)
class Place:
    """An array of a tape: which of a run's addresses it is counted from, and the bytes from there on.

    Strides are those of all axes but the last, in elements; `aligned`: every row starts on 16 bytes.
    """

    index: int
    offset: int = 0
    itemsize: int = 1
    strides: tuple[np.int64, ...] = ()
    aligned: bool = True

    @classmethod
    def of(cls, index: int, offset: int, shape, strides, itemsize: int, start: int) -> Place:
        """The place of an array whose first row starts `start` bytes after a multiple of 16."""
        rows = list(zip(strides[:-1], shape))
        aligned = start == 0 and all(step % 16 == 0 or n == 1 for step, n in rows)
        return cls(index, offset, itemsize, tuple(np.int64(step // itemsize) for step, _ in rows), aligned)

    def __getitem__(self, slices: tuple[slice, ...]) -> Place:
        """A part of it, by a slice with a start for each axis."""
        first = sum(int(step) * part.start for step, part in zip((*self.strides, 1), slices, strict=True))
        return replace(self, offset=self.offset + first * self.itemsize)


@dataclass(frozen=True)
class Room:
    """Memory that a run needs for itself: zeroed at its start, or with whatever is there."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    zeroed: bool

    @property
    def nbytes(self) -> int:
        """Its bytes, up to where another room may start."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


class Tape:
    """Launches in steps. `keep`, `room`, `launch` and `end_step` record, `pack` ends the recording, `run` launches.

    Rooms lie end to end in one workspace; `top` is where the next starts: set back, it gives rooms away. Zeroed rooms
    lie before all others and stay.
    """

    def __init__(self, given: int):
        self.rooms: list[Room] = []
        self.top = self.zeroed = self._most = 0
        self._given, self._kept, self._steps = given, [], [[]]
        self._lock = threading.Lock()

    def keep(self, array) -> Place:
        """A device array that stays the same."""
        self._kept.append(array)
        return Place.of(-1, array.data.ptr, array.shape, array.strides, array.itemsize, 0)

    def room(self, shape: int | tuple[int, ...], dtype, zeroed: bool = False) -> Place:
        """An array of the workspace."""
        shape = shape if isinstance(shape, tuple) else (shape,)
        room = Room(self.zeroed if zeroed else self.top, shape, np.dtype(dtype), zeroed)
        self.rooms.append(room)
        if zeroed:
            self.zeroed += room.nbytes
        else:
            self.top += room.nbytes
            self._most = max(self._most, self.top)
        return Place(self._given + len(self.rooms) - 1)

    def launch(self, kernel, grid, block: int, arguments, shared_mem: int = 0) -> None:
        """Record a launch of a kernel, as `pack` will look it up. Arguments: places, None for null, NumPy scalars."""
        self._steps[-1].append((kernel, (grid, block, arguments, shared_mem), arguments))

    def end_step(self) -> None:
        """End a step: a run may look up here."""
        self._steps.append([])

    def pack(self, built: Callable[[list], list]) -> None:
        """End the recording: lay out the workspace, the arguments (a place once), and their addresses by launch.

        `built` makes `Kernel`s of all that was to be launched, in its order.
        """
        kernels = built([kernel for step in self._steps for kernel, *_ in step])
        self._kept += kernels
        self.nbytes = self.zeroed + self._most
        self.offsets = [room.offset + (0 if room.zeroed else self.zeroed) for room in self.rooms]
        places: dict[tuple[int, int], int] = {}
        scalars, slots, starts = [], [], []
        for *_, arguments in (launch for step in self._steps for launch in step):
            starts.append(len(slots))
            for x in arguments:
                if type(x) in _FORMS:
                    scalars.append(x)
                    slots.append(-len(scalars))
                else:
                    slots.append(places.setdefault((-1, 0) if x is None else (x.index, x.offset), len(places)))
        packed = struct.pack("=" + "".join([_FORMS[type(x)] for x in scalars]), *scalars)
        self._places = list(places)
        self._write = struct.Struct(f"{len(places)}Q").pack_into
        self._values = np.zeros(len(places) + len(scalars), np.uint64)
        self._values[len(places) :] = np.frombuffer(packed, np.uint64)[::-1]  # the first scalar last
        self._addresses = self._values.ctypes.data + 8 * (np.array(slots, np.int64) % max(len(self._values), 1))
        start = iter((self._addresses.ctypes.data + 8 * np.array(starts, np.int64)).tolist())
        each = iter(kernels)
        launches = [[next(each).prepared(*how) for _, how, _ in step] for step in self._steps]
        self._ready = [[(launch, next(start)) for launch in step] for step in launches if step]
        self._together = [[launch for step in self._ready for launch in step]]

    def run(self, stream: int, addresses: list[int], after: Callable[[int], None] | None = None) -> None:
        """Launch on a stream, given the addresses of arrays, then rooms; call `after` with the number of each step."""
        addresses = [*addresses, 0]  # kept arrays are counted from 0
        for number, launches in enumerate(self._together if after is None else self._ready):
            with self._lock:  # the driver copies arguments at each launch
                self._write(self._values, 0, *[addresses[index] + offset for index, offset in self._places])
                for launch, arguments in launches:
                    launch(stream, arguments, 0)
            if after is not None:
                after(number)
