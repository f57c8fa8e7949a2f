"""Runs of a tape that repeat, on the same addresses, as CUDA graphs: one launch in place of each kernel's.

A loop, or a model whose buffers stay, calls with the same arrays, and CuPy's pool hands the same memory out again. Such
a run is captured when it comes a second time, and is one launch from the third on.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from s2o_cupy.backends._tape import Tape

KEPT = 64  # graphs of a process; some 10 kB of device memory for each kernel of one
SEEN = 4 * KEPT  # runs that are remembered, and launches without it after which a graph makes room


@dataclass
class _Graph:
    captured: Any  # a cupy.cuda.Graph
    last: int  # number of its last launch


_lock = threading.Lock()
_graphs: OrderedDict[tuple, _Graph] = OrderedDict()  # by tape and addresses, the one launched last at the end
_seen: OrderedDict[tuple, None] = OrderedDict()
_number = 0


def launched(cuda, tape: Tape, stream: int, addresses: list[int]) -> bool:
    """Launch a run as a graph if it repeats; False where it is to be launched kernel by kernel. `cuda`: cupy.cuda."""
    global _number
    if not tape.bare or (stream and cuda.runtime.streamIsCapturing(stream)):
        return False
    run = (tape, *addresses)
    with _lock:
        _number += 1
        graph = _graphs.get(run)
        if graph is None:
            if run not in _seen:
                _remember(run)
                return False
            if len(_graphs) >= KEPT and _number - next(iter(_graphs.values())).last < SEEN:
                return False  # all are in use: to capture this one would cost more than it saves
            graph = _graphs[run] = _Graph(_captured(cuda, tape, addresses), 0)
            if len(_graphs) > KEPT:
                _graphs.popitem(last=False)
        _graphs.move_to_end(run)
        graph.last = _number
        cuda.runtime.graphLaunch(graph.captured.graphExec, stream)
    return True


def _remember(run: tuple) -> None:
    _seen[run] = None
    if len(_seen) > SEEN:
        _seen.popitem(last=False)


def _captured(cuda, tape: Tape, addresses: list[int]):
    """Nothing runs: the stream only takes note."""
    stream = cuda.Stream(non_blocking=True)
    stream.begin_capture()
    try:
        tape.run(stream.ptr, addresses)
    finally:
        graph = stream.end_capture()
    return graph
