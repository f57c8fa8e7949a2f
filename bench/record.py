"""What every benchmark prints and writes: the machine first, one aligned line a case, and JSON after each case."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.timing import Timing, as_json
from s2o_cupy.files import save_json, writable

FORMAT = 1
_HEAD = f"{'case':34} {'dtype':8} {'shape':26} {'density':>7} {'error':>7} {'ms':>9} {'p10':>9} {'p90':>9}"
_HEAD += f" {'TFLOP/s':>7} {'ratio':>6}  note"


class Record:
    """The report of one run; `path` is written again, whole, whenever something is added."""

    def __init__(self, bench: str, machine: dict, path: str | None = None):
        self.path = _file(Path(path), bench, machine) if path else None  # refused now, not after the work
        self.report = {"bench": bench, "format": FORMAT, "arguments": sys.argv[1:], "machine": machine, "cases": []}
        self.report["finished"] = False  # until it is: a run that was killed keeps its cases
        self._headed, self._start = False, time.perf_counter()
        print("\n".join(f"{key}: {value}" for key, value in machine.items()), flush=True)
        self.save()

    def case(self, name: str, shape="", dtype="", *, time: Timing | None = None, note: str = "", **numbers) -> dict:
        """Add one case and print its line. `numbers` goes to JSON; density, error, tflops and ratio are printed too.

        `ratio` is the baseline's time over this one's: above 1 is faster than the baseline.
        """
        if not self._headed:
            print(_HEAD, flush=True)
            self._headed = True
        case = {"name": name, "shape": shape, "dtype": dtype, "time": time, "note": note, **numbers}
        self.report["cases"].append(as_json(case | {"at_s": self.elapsed}))
        print(line(case), flush=True)
        self.save()
        return case

    def put(self, **parts) -> None:
        """Add parts of the report that are no case."""
        self.report.update(as_json(parts))
        self.save()

    def save(self) -> None:
        if self.path:
            save_json(self.path, self.report)

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return round(time.perf_counter() - self._start, 1)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """A part of the run: its seconds go to JSON, whether or not it comes to its end, and to a line of their own."""
        began = time.perf_counter()
        try:
            yield
        finally:
            took = round(time.perf_counter() - began, 1)
            self.report.setdefault("seconds", {})[name] = took
            print(f"-- {name}: {took} s, {self.elapsed} since the start", flush=True)
            self.save()

    @contextmanager
    def attempt(self, name: str, shape="", dtype="", catch: tuple = ()) -> Iterator[None]:
        """Running out of memory in here, or failing in a way of `catch`, becomes this case's line; the rest runs.

        Unless the device was lost: nothing that this process does after that can be measured.
        """
        try:
            yield
        except Exception as error:
            if not (is_out_of_memory(error) or isinstance(error, catch)):
                raise
            what = "out of memory" if is_out_of_memory(error) else type(error).__name__
            text = (str(error).strip() or "no message").splitlines()[0][:100]
            self.case(name, shape, dtype, note=f"not measured: {what}: {text}")
            error.__traceback__ = None  # it holds the arrays
            if fault := device_fault():
                raise RuntimeError(f"{name} made the device unusable ({fault}); what was measured is kept") from None
        free_memory()


def _file(path: Path, bench: str, machine: dict) -> Path:
    """The file to write; in a folder, one named by the benchmark, the day and the commit."""
    if path.is_dir():
        day = machine.get("date", "undated").split()[0]
        path = path / f"{bench}_{day}_{machine.get('commit', 'unknown')}.json"
    return writable(path)


def line(case: dict) -> str:
    """One case, in the columns of the header; what it lacks is a dash."""

    def number(value, width, digits):
        return f"{value:{width}.{digits}f}" if value is not None else f"{'-':>{width}}"

    time = case.get("time")
    columns = [f"{case['name']:34} {case['dtype']:8} {case['shape']:26}"]
    columns += [number(case.get("density"), 7, 4), number(case.get("error"), 7, 4)]
    columns += [number(x, 9, 3) for x in ((time.median, time.p10, time.p90) if time else (None, None, None))]
    columns += [_rate(case.get("tflops")), number(case.get("ratio"), 6, 2)]
    return f"{' '.join(columns)}  {case['note']}".rstrip()


def _rate(tflops: float | None) -> str:
    return f"{'-':>7}" if tflops is None else f"{tflops:7.0f}" if tflops >= 10 else f"{tflops:7.3f}"


def is_out_of_memory(error: BaseException) -> bool:
    """Of the host, of CuPy or of PyTorch."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def device_fault() -> str:
    """What the device says when it is waited for; empty where all is well, or no device is in use."""
    if "cupy" in sys.modules:
        try:
            sys.modules["cupy"].cuda.runtime.deviceSynchronize()
        except Exception as error:
            return str(error).splitlines()[0][:100]
    return ""


def free_memory() -> None:
    """Give the device what CuPy and PyTorch keep of it, where they are in use."""
    gc.collect()
    if "cupy" in sys.modules:
        sys.modules["cupy"].get_default_memory_pool().free_all_blocks()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.empty_cache()
