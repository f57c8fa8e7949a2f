"""Timing on a GPU: CUDA events, a cold L2 by rotating inputs, warm-up, medians with p10 and p90, and the machine."""

from __future__ import annotations

import itertools
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one case."""

    median: float
    p10: float
    p90: float
    repeats: int

    def __str__(self) -> str:
        return f"{self.median:.3f} ms ({self.p10:.3f} to {self.p90:.3f})"

    def rate(self, flop: float) -> float:
        """TFLOP/s at the median."""
        return flop / self.median / 1e9


def on_device(calls: Sequence[Callable[[], object]], repeats: int = 10, warmup: int = 2) -> Timing:
    """Device time of a case, given as calls on inputs of their own: in turn, so that no call finds its own in L2."""
    import cupy

    turn = itertools.cycle(calls)
    for _ in range(max(warmup, len(calls))):
        next(turn)()
    times = []
    for _ in range(repeats):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        next(turn)()
        stop.record()
        stop.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, stop))
    return Timing(*np.percentile(times, [50, 10, 90]).tolist(), repeats)


def on_host(call: Callable[[], object], repeats: int = 30, warmup: int = 5) -> Timing:
    """Host time until a call returns, with the device idle before it: what launching costs."""
    import cupy

    times = []
    for i in range(warmup + repeats):
        cupy.cuda.runtime.deviceSynchronize()
        start = time.perf_counter()
        call()
        if i >= warmup:
            times.append(1e3 * (time.perf_counter() - start))
    cupy.cuda.runtime.deviceSynchronize()
    return Timing(*np.percentile(times, [50, 10, 90]).tolist(), repeats)


def noise(calls: Sequence[Callable[[], object]], repeats: int = 10) -> float:
    """Relative difference of one case timed twice."""
    first, second = (on_device(calls, repeats).median for _ in range(2))
    return abs(first - second) / min(first, second)


def machine() -> dict:
    """What was measured on, and which commit."""
    import cupy

    device = cupy.cuda.Device()
    properties = cupy.cuda.runtime.getDeviceProperties(device.id)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    commit = os.environ.get("S2O_COMMIT") or _output(["git", "rev-parse", "--short", "HEAD"])
    return {
        "gpu": properties["name"].decode(),
        "driver": _output(query).splitlines()[0] if _output(query) else "unknown",
        "multiprocessors": properties["multiProcessorCount"],
        "l2_mib": properties["l2CacheSize"] / 2**20,
        "memory_gib": round(properties["totalGlobalMem"] / 2**30, 1),
        "cupy": cupy.__version__,
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def as_json(x):
    """Timings inside dicts and lists, as plain numbers."""
    if isinstance(x, Timing):
        return asdict(x)
    if isinstance(x, dict):
        return {key: as_json(value) for key, value in x.items()}
    return [as_json(value) for value in x] if isinstance(x, list) else x
