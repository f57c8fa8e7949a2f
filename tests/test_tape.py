"""Recorded launches: every argument where the driver looks for it, at each run the addresses of that run."""

import ctypes
import functools
from types import SimpleNamespace

import numpy as np

from s2o_cupy.backends._tape import Place, Tape

FORMS = {"*": ctypes.c_uint64, "i": ctypes.c_int32, "q": ctypes.c_int64, "f": ctypes.c_float, "d": ctypes.c_double}


class Kernel:
    """Reads its arguments as the driver does, and notes them."""

    def __init__(self, forms):
        self.forms, self.seen = forms, []

    def prepared(self, grid, block, arguments, shared_mem=0):
        assert len(arguments) == len(self.forms)
        return functools.partial(self.launch, (grid, block, shared_mem))

    def launch(self, shape, stream, addresses, extra):
        places = (ctypes.c_uint64 * len(self.forms)).from_address(addresses)
        self.seen.append((shape, stream, *(FORMS[f].from_address(at).value for f, at in zip(self.forms, places))))


def test_arguments_and_addresses():
    tape, first, second = Tape(2), Kernel("*i*dq*"), Kernel("f**i")
    x = Place.of(0, 0, (2, 3, 4), (96, 32, 8), 8, 0)
    kept = SimpleNamespace(data=SimpleNamespace(ptr=5000), shape=(2, 3), strides=(24, 8), itemsize=8)
    room, zeros = tape.room((3, 5), np.float32), tape.room(1, np.int32, zeroed=True)
    tape.launch(first, (1, 2), 64, (x, np.int32(-7), None, np.float64(0.1), np.int64(-(2**40)), room), 128)
    tape.end_step()
    tape.launch(second, (3,), 32, [np.float32(0.5), tape.keep(kept)[1:2, 2:3], zeros, np.int32(-7)])
    tape.pack(list)
    assert (tape.zeroed, tape.offsets, tape.nbytes) == (256, [256, 0], 512)
    for base, stream in ((1000, 1), (2**47, 2)):
        steps = []
        tape.run(stream, [base, 0, base + 1, base + 2], steps.append)
        assert steps == [0, 1]
        assert first.seen[-1] == (((1, 2), 64, 128), stream, base, -7, 0, 0.1, -(2**40), base + 1)
        assert second.seen[-1] == (((3,), 32, 0), stream, 0.5, 5000 + 24 + 16, base + 2, -7)
    assert len(first.seen) == len(second.seen) == 2


def test_rooms_given_away_are_used_again():
    tape = Tape(0)
    tape.room(300, np.uint8)
    before = tape.top
    tape.room((10, 100), np.float32)
    tape.top = before
    tape.room(64, np.int64)
    tape.pack(list)
    assert tape.offsets == [0, 512, 512]
    assert tape.nbytes == 512 + 4096


def test_places_know_their_rows():
    assert Place.of(0, 0, (2, 8, 64), (1024, 128, 2), 2, 0).aligned
    assert not Place.of(0, 0, (2, 8, 64), (1024, 128, 2), 2, 2).aligned
    assert not Place.of(0, 0, (2, 8, 64), (1032, 129 * 2, 2), 2, 0).aligned
    assert Place.of(0, 0, (1, 8, 64), (1030, 128, 2), 2, 0).aligned
    assert Place.of(3, 0, (2, 8, 64), (-1024, 128, 2), 2, 0).strides == (-512, 64)
