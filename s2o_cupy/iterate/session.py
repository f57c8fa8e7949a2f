"""A shell's side of trying kernels: the worker processes, what is compared with what, and the history."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import s2o_cupy
from s2o_cupy.iterate.report import Verdict
from s2o_cupy.sources import Source, _folder, from_folder, inlined, kernel_folder, kernel_names
from s2o_cupy.twins import TWINS
from s2o_cupy.variants import make_variant

AGAINST = ("shipped", "HEAD", "previous")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# The reference multiplies small matrices: threads of a BLAS would only wait for each other, and for the compiler's.
_ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1")
_START_S = 120.0  # until a worker is ready, and until a kernel is compiled


class Worker:
    """One process of `s2o_cupy.iterate.worker`, started on demand and killed when it hangs."""

    def __init__(self, environment: dict | None = None, before: tuple[str, ...] = (), more: tuple[str, ...] = ()):
        self.environment, self.before, self.more = environment or {}, before, more
        self.process = None

    def start(self) -> None:
        """Start the process where it does not run; returns before it is ready."""
        if self.process is not None and self.process.poll() is None:
            return
        self.stop()
        root = str(Path(s2o_cupy.__file__).parent.parent)
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, **_ONE_THREAD, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **self.environment}
        reading, writing = os.pipe()
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        command = [*self.before, sys.executable, "-m", "s2o_cupy.iterate.worker", str(writing), *self.more]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self.log, stderr=self.log, text=True, env=environment,
            pass_fds=(writing,), start_new_session=True,
        )  # fmt: skip
        os.close(writing)
        self.events, self.ready, self.read = queue.Queue(), False, 0
        threading.Thread(target=_pump, args=(os.fdopen(reading), self.events), daemon=True).start()

    def run(self, job: dict, limit: float) -> tuple[list[dict], str]:
        """The events of one job, the last of them "done", "error", "hung" or "died"; and what it printed."""
        job = {**job, "kernels": str(kernel_folder())}  # S2O_KERNELS may have changed since the process started
        self.start()
        found, wait = [], _START_S
        if not self.ready:
            event = self._next(wait)
            if event is None or event["event"] == "hung":
                return [{"event": "died", "message": "the worker did not start"}], self._printed()
            self.ready = True
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            while not found or found[-1]["event"] not in ("done", "error", "hung", "died"):
                found.append(self._next(wait))
                if found[-1] is None:
                    found[-1] = {"event": "died", "message": _exit(self.process.wait())}
                wait = _START_S
                if found[-1]["event"] == "case":  # the CPU compiles within a case, and is slow
                    wait = limit if "GPU" in found[-1]["where"] else 3 * limit
        except BaseException:  # Ctrl-C among them: what the job still says must not answer the next one
            self.stop()
            raise
        if found[-1]["event"] == "hung":
            found[-1]["ended"] = self.stop()
        elif found[-1].get("what") == "device":  # it ends by itself: its context is lost
            self.stop()
        return found, self._printed()

    def _next(self, wait: float) -> dict | None:
        try:
            return self.events.get(timeout=wait)
        except queue.Empty:
            return {"event": "hung", "seconds": wait}

    def _printed(self) -> str:
        """What the process wrote since the last job: a kernel's printf among it."""
        if self.process is None:  # stopped
            return self.printed
        size, done = os.fstat(self.log.fileno()).st_size, self.read
        self.read = size
        return os.pread(self.log.fileno(), size - done, done).decode(errors="replace")

    def stop(self) -> bool:
        """Kill the process; whether it ended."""
        if self.process is None:
            return True
        self.process.kill()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            return False
        finally:
            self.printed = self._printed()
            self.log.close()
            self.process = None
        return True


def _exit(status: int) -> str:
    """How a process ended, in words."""
    return f"exit status {status}" if status >= 0 else f"by signal {-status}, {signal.strsignal(-status)}"


def _pump(pipe, events: queue.Queue) -> None:
    with pipe:
        for line in pipe:
            events.put(json.loads(line))
    events.put(None)


class Session:
    """One shell's workers and the variants that it tried."""

    def __init__(self):
        self.history: list[Verdict] = []
        self.known: dict[str, list[dict]] = {}
        self.cuda, self.numba = Worker(), Worker(_simulator())
        atexit.register(self.close)

    def close(self) -> None:
        """End the workers."""
        for worker in (self.cuda, self.numba):
            worker.stop()

    def latest(self, name: str, kind: str = "cuda") -> Verdict | None:
        """The last variant of a kernel that compiled."""
        tried = (v for v in reversed(self.history) if v.name == name and v.kind == kind and (v.compiled or v.cases))
        return next(tried, None)

    def try_cuda(
        self,
        name: str,
        cell: str,
        *,
        macros: dict | None = None,
        arch: str | None = None,
        check: bool = False,
        bench: bool = False,
        against: str = "shipped",
        sanitize: str | None = None,
        limit: float = 20.0,
    ) -> Verdict:
        """Compile a variant of a raw kernel, then check, time and sanitise it as asked."""
        start = time.perf_counter()
        if name not in kernel_names():
            raise ValueError(f"kernel is {name!r}; allowed: {', '.join(kernel_names())}")
        variant = make_variant(name, cell, macros)
        other, macros = self.other(name, against), variant.source.macros
        job = {"kind": "cuda", "name": name, "text": variant.source.text, "macros": macros, "arch": arch}
        job |= {"check": check, "bench": bench, "other": other.text}
        events, printed = self.cuda.run(job, limit)
        self.cuda.start()  # a new one where this variant was its end: the next finds it warm
        if sanitize and not any(e["event"] == "hung" for e in events):
            events += _sanitized(sanitize, {**job, "check": True, "bench": False}, limit)
        return self._kept(Verdict.made(name, "cuda", variant, against, events, printed, time.perf_counter() - start))

    def try_numba(
        self, name: str, cell: str, *, check=False, bench=False, against: str = "shipped", limit: float = 60.0
    ) -> Verdict:
        """Compile, check and time a variant of a Numba twin; in the simulator where there is no GPU."""
        start = time.perf_counter()
        if name.removesuffix("_numba") not in TWINS:
            raise ValueError(f"kernel is {name!r}; allowed: {', '.join(TWINS)}")
        name = name.removesuffix("_numba")
        variant = make_variant(f"{name}_numba", cell)
        if against == "shipped":
            other = (Path(_folder("")) / f"{name}_numba.py").read_text()
        elif against == "HEAD":
            other = _at_head(f"{name}_numba.py")
        else:
            other = self._previous(name, "numba").variant.text
        job = {"kind": "numba", "name": name, "text": variant.text, "check": check, "bench": bench, "other": other}
        events, printed = self.numba.run(job, limit)
        return self._kept(Verdict.made(name, "numba", variant, against, events, printed, time.perf_counter() - start))

    def resources(self, name: str) -> list[dict]:
        """What the shipped specialisations of a kernel file take: one dict each, with arch, macros and kernels."""
        events, _ = self.cuda.run({"kind": "resources", "name": name}, _START_S)
        if events[-1]["event"] != "done":
            raise RuntimeError(f"{name} was not compiled: {events[-1].get('message', events[-1]['event'])}")
        self.known[name] = [event for event in events if event["event"] == "resources"]
        return self.known[name]

    def _kept(self, verdict: Verdict) -> Verdict:
        verdict.number = len(self.history) + 1
        self.history.append(verdict)
        return verdict

    def other(self, name: str, against: str) -> Source:
        """What a variant is compared with."""
        if against == "shipped":
            return from_folder(name, _folder(""))
        if against == "HEAD":
            return Source(name, inlined(f"{name}.cu", lambda file: _at_head(file, missing_is_none=True)))
        if against == "previous":
            return self._previous(name, "cuda").variant.source
        raise ValueError(f"--against is {against!r}; allowed: {', '.join(AGAINST)}")

    def _previous(self, name: str, kind: str) -> Verdict:
        found = self.latest(name, kind)
        if found is None:
            raise ValueError(f"--against previous: no earlier variant of {name} compiled in this shell")
        return found


def _simulator() -> dict:
    """What the Numba worker's environment needs: the simulator, where twins cannot run on a GPU."""
    from s2o_cupy.backends import _numba_status

    return {} if _numba_status()[0] else {"NUMBA_ENABLE_CUDASIM": "1"}


def _at_head(file: str, missing_is_none: bool = False) -> str | None:
    """A kernel file of the last commit of the checkout that the kernels lie in."""
    command = ["git", "-C", str(kernel_folder()), "show", f"HEAD:./{file}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        raise ValueError("--against HEAD needs git") from None
    if done.returncode:
        if missing_is_none and "not a git repository" not in done.stderr:
            return None
        raise ValueError(f"--against HEAD: {done.stderr.strip()}")
    return done.stdout


def _sanitized(tool: str, job: dict, limit: float) -> list[dict]:
    """The check once more, in a process that compute-sanitizer watches: one event with what it found."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        return [{"event": "note", "message": "not sanitized: compute-sanitizer is not installed (CUDA toolkit)"}]
    worker = Worker(before=(program, "--tool", tool, "--error-exitcode", "9"), more=("--watched",))
    start = time.perf_counter()
    events, printed = worker.run(job, max(limit, 120.0))
    if events[-1]["event"] == "done":
        worker.process.stdin.close()  # the sanitizer says what it found when the process ends
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(60)
    worker.stop()
    if not any("GPU" in event.get("where", "") for event in events):
        why = f" (its process died {events[-1]['message']})" if events[-1]["event"] == "died" else ""
        return [{"event": "note", "message": f"not sanitized: nothing ran on a GPU{why}"}]
    printed += worker.printed
    lines = [line for line in printed.splitlines() if line.startswith("=========")]
    return [
        {
            "event": "sanitized",
            "tool": tool,
            "lines": lines,
            "seconds": time.perf_counter() - start,
            "last": events[-1],
        }
    ]
