"""Timing on a GPU: CUDA events, a cold L2 by rotating inputs, warm-up, medians with p10 and p90, and the machine."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one case."""

    median: float
    p10: float
    p90: float
    repeats: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Timing:
        """The median and the deciles of some times."""
        return cls(*np.percentile(times, [50, 10, 90]).tolist(), len(times))

    def __str__(self) -> str:
        return f"{self.median:.3f} ms ({self.p10:.3f} to {self.p90:.3f})"

    def rate(self, flop: float) -> float:
        """TFLOP/s at the median."""
        return flop / self.median / 1e9


def on_device(
    calls: Sequence[Callable[[], object]], repeats: int = 10, warmup: int = 2, least: int = 3, enough: float = math.inf
) -> Timing:
    """Device time of a case, given as calls on inputs of their own: in turn, so that no call finds its own in L2.

    After `least` repeats no more are made once they took `enough` ms together: long calls scatter little.
    """
    import cupy

    turn = itertools.cycle(calls)
    for _ in range(max(warmup, len(calls)) if warmup else 0):
        next(turn)()
    times: list[float] = []
    while len(times) < min(repeats, least) or (len(times) < repeats and sum(times) < enough):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        next(turn)()
        stop.record()
        stop.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, stop))
    return Timing.of(times)


def queued(call: Callable[[], object], repeats: int = 10, behind: float = 5.0) -> Timing:
    """Device time of a call whose launches wait behind a kernel that spins for `behind` ms: without the host's time.

    A call whose host side takes longer than that, or waits for the device, is timed with some of it.
    """
    import cupy

    source = 'extern "C" __global__ void spin(long long n) { for (long long t = clock64(); clock64() - t < n;) {} }'
    spin, kilohertz = cupy.RawKernel(source, "spin"), cupy.cuda.Device().attributes["ClockRate"]
    call()
    times = []
    for _ in range(repeats):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        cupy.cuda.runtime.deviceSynchronize()
        spin((1,), (1,), (np.int64(behind * kilohertz),))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, stop))
    return Timing.of(times)


def on_host(call: Callable[[], object], repeats: int = 30, warmup: int = 5, idle: bool = True) -> Timing:
    """Host time until a call returns: what launching costs. `idle`: the device is before it, else calls queue up.

    After a long wait for the device what a call needs is no longer in the processor's caches.
    """
    import cupy

    times = []
    for i in range(warmup + repeats):
        if idle or not i:
            cupy.cuda.runtime.deviceSynchronize()
        start = time.perf_counter()
        call()
        if i >= warmup:
            times.append(1e3 * (time.perf_counter() - start))
    cupy.cuda.runtime.deviceSynchronize()
    return Timing.of(times)


def first_calls(source: str, variable: str, parts: Sequence[str]) -> Iterator[tuple[str, dict[str, float]]]:
    """Seconds that a program prints of its parts, in new processes whose cache folder is empty, then as they left it.

    `variable` names the folder in the environment.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {variable: folder, "PYTHONPATH": str(ROOT)}
        for name in ("empty", "filled"):
            command = [sys.executable, "-c", source]
            done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
            yield name, dict(zip(parts, map(float, done.stdout.split()), strict=True))


def noise(calls: Sequence[Callable[[], object]], repeats: int = 10) -> float:
    """Relative difference of one case timed twice."""
    first, second = (on_device(calls, repeats).median for _ in range(2))
    return abs(first - second) / min(first, second)


def machine() -> dict:
    """What was measured on, and which commit."""
    import cupy

    device = cupy.cuda.Device()
    properties = cupy.cuda.runtime.getDeviceProperties(device.id)
    cuda = cupy.cuda.runtime.driverGetVersion()
    query = "--query-gpu=driver_version,clocks.max.sm,utilization.gpu,memory.used"
    state = _output(["nvidia-smi", query, f"--id={device.pci_bus_id}", "--format=csv,noheader,nounits"])
    driver, clock, *load = [x.strip() for x in state.split(",")] if state.count(",") == 3 else ["unknown"] * 2
    found = {
        "gpu": properties["name"].decode(),
        "driver": f"{driver}, CUDA {cuda // 1000}.{cuda % 1000 // 10}",
        "multiprocessors": properties["multiProcessorCount"],
        "clock_mhz": clock,
        "l2_mib": properties["l2CacheSize"] / 2**20,
        "memory_gib": round(properties["totalGlobalMem"] / 2**30, 1),
        "cupy": cupy.__version__,
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }
    for name in ("torch", "triton"):  # the peers are as fast as theirs
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    if note := busy(*load):
        found["busy"] = note
    return found


def busy(utilisation: str = "", used_mib: str = "") -> str:
    """What nvidia-smi's two numbers say against timing now; empty where nothing does, or they are not known."""
    notes = []
    if utilisation.isdigit() and int(utilisation) > 5:
        notes.append(f"{utilisation} % utilisation")
    if used_mib.isdigit() and int(used_mib) > 2048:
        notes.append(f"{used_mib} MiB in use")
    return f"the GPU is busy ({', '.join(notes)} before this run): its timings are not to be relied on" if notes else ""


def commit() -> str:
    """The checkout's commit; ``S2O_COMMIT`` names it where the sources travelled without their history."""
    return (
        os.environ.get("S2O_COMMIT")
        or _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"])
        or "unknown"
    )


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
