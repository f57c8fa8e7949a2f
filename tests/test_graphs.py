"""Runs that repeat become graphs: which do, and that a graph is launched with the run's own addresses."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest

from s2o_cupy import compile
from s2o_cupy.backends import _graphs
from s2o_cupy.backends._tape import Place, Tape


class Driver:
    """Of `cupy.cuda` what graphs take; `done` holds the stream and the arguments of whatever ran."""

    def __init__(self):
        self.done, self.captured, self.capturing, self.graphs = [], None, set(), []
        self.runtime = SimpleNamespace(
            streamIsCapturing=lambda stream: stream in self.capturing,
            graphLaunch=lambda graph, stream: self.done.extend(("graph", stream, x) for x in self.graphs[graph]),
        )

    def launch(self, stream, addresses, extra):
        place = ctypes.c_uint64.from_address(addresses).value
        value = ctypes.c_uint64.from_address(place).value
        if stream == "noted":
            self.captured.append(value)
        else:
            self.done.append(("kernel", stream, value))

    def Stream(self, non_blocking):
        return SimpleNamespace(ptr="noted", begin_capture=self.begin, end_capture=self.end)

    def begin(self):
        self.captured = []

    def end(self):
        self.graphs.append(self.captured)
        return SimpleNamespace(graphExec=len(self.graphs) - 1)


class Kernel(compile.Kernel):
    def __init__(self, driver):
        self.driver = driver

    def prepared(self, grid, block, arguments, shared_mem=0):
        return self.driver.launch


@pytest.fixture
def driver(monkeypatch):
    for name in ("_graphs", "_seen"):
        monkeypatch.setattr(_graphs, name, type(getattr(_graphs, name))())
    return Driver()


def tape_of(kernel, launches=2):
    tape = Tape(1)
    for i in range(launches):
        tape.launch(kernel, (1,), 32, (Place(0, 8 * i), np.int32(i)))
    tape.pack()
    return tape


def run(driver, tape, stream, *addresses):
    """As the backend does it; what ran, and how."""
    driver.done.clear()
    if not _graphs.launched(driver, tape, stream, [*addresses]):
        tape.run(stream, [*addresses])
    how = {kind for kind, *_ in driver.done}
    assert driver.done == [(*how, stream, addresses[0]), (*how, stream, addresses[0] + 8)]
    return how.pop()


def test_the_second_run_on_the_same_addresses_is_a_graph(driver):
    tape = tape_of(Kernel(driver))
    hows = [run(driver, tape, 0, at) for at in (100, 100, 200, 100, 200)]
    assert hows == ["kernel", "graph", "kernel", "graph", "graph"]
    assert run(driver, tape, 7, 100) == "graph"  # on any stream
    assert len(driver.graphs) == 2
    assert [run(driver, tape_of(Kernel(driver)), 0, 100) for _ in range(2)] == [
        "kernel",
        "kernel",
    ]  # tapes of their own


def test_a_stream_that_is_captured_gets_the_kernels_themselves(driver):
    tape = tape_of(Kernel(driver))
    assert [run(driver, tape, 7, 100) for _ in range(2)] == ["kernel", "graph"]
    driver.capturing.add(7)
    assert [run(driver, tape, 7, 100) for _ in range(3)] == ["kernel"] * 3
    assert len(driver.graphs) == 1


def test_what_watches_launches_sees_every_one(driver):
    tape = tape_of(SimpleNamespace(prepared=lambda *launch: driver.launch))
    assert [run(driver, tape, 0, 100) for _ in range(3)] == ["kernel"] * 3


def test_graphs_in_use_stay_and_others_make_room(driver):
    tape, many = tape_of(Kernel(driver)), range(0, 16 * (_graphs.KEPT + 10), 16)
    for _ in range(3):  # more runs in turn than graphs are kept: none is captured again and again
        hows = [run(driver, tape, 0, 1000 + at) for at in many]
    assert hows.count("graph") == len(driver.graphs) == _graphs.KEPT
    for _ in range(_graphs.SEEN):
        assert run(driver, tape, 0, 1000) == "graph"
    assert [run(driver, tape, 0, 9) for _ in range(3)] == ["kernel", "graph", "graph"]
    assert len(_graphs._graphs) == _graphs.KEPT
    assert run(driver, tape, 0, 1000) == "graph"


def test_a_capture_that_fails_ends(driver, monkeypatch):
    tape = tape_of(Kernel(driver))
    run(driver, tape, 0, 100)
    ended = []
    monkeypatch.setattr(driver, "end", lambda: ended.append(1))
    monkeypatch.setattr(tape, "run", lambda *run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _graphs.launched(driver, tape, 0, [100])
    assert ended == [1]
    assert not _graphs._graphs
