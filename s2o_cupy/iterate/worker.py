"""The process that compiles, checks and times variants, so that a hang or a bad write costs the shell nothing.

`python -m s2o_cupy.iterate.worker FD` reads jobs, one JSON object a line, from its input and writes events to the
pipe FD. It stays warm between jobs; after an error of the device it ends, since its context is lost.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
import time
import traceback
from contextlib import nullcontext

import numpy as np

from s2o_cupy import specialisations
from s2o_cupy.compile import KernelCompileError, device_target
from s2o_cupy.iterate import bench, emulation, engines
from s2o_cupy.iterate.building import compile_all, launched, serve_resources
from s2o_cupy.iterate.cases import EMULATED, ON_GPU, SIMULATED, STAGES, cases, focus, worst_of
from s2o_cupy.iterate.recording import distinct, recorded, recorded_twins
from s2o_cupy.sources import SHAPE_MACROS, Source, in_use, look
from s2o_cupy.specialisations import launch_macros
from s2o_cupy.twins import TWINS, twin

_SM90_SERVES = specialisations.sm90_serves


def main(fd: int, watched: bool = False) -> None:
    """Serve jobs until the input ends or the device fails. `watched`: by a sanitizer."""
    pipe = os.fdopen(fd, "w", buffering=1)

    def say(event: str, **fields) -> None:
        pipe.write(json.dumps({"event": event, **fields}) + "\n")

    gpu = has_gpu()
    if gpu:
        import cupy

        if watched:
            watch(cupy)
        guards = engines.Guards(cupy)  # the device's context
        guards.empty(1, np.float32)
        guards.broken()
    say("ready", gpu=gpu)
    for line in sys.stdin:
        job = json.loads(line)
        os.environ["S2O_KERNELS"] = job["kernels"]
        try:
            look()
            SERVE[job["kind"]](job, gpu, say)
            say("done")
        except KernelCompileError as error:
            say("error", what="compile", message=str(error))
        except Exception as error:
            lost = type(error).__name__ in ("CUDARuntimeError", "CUDADriverError", "CudaAPIError")
            message = f"{type(error).__name__}: {error}"
            if job["kind"] == "numba" and not lost:
                say("error", what="compile", message=_numba_message(job["name"], error))
                continue
            if isinstance(error, ValueError):  # it says what is allowed
                message = str(error)
            elif not lost and not isinstance(error, (TypeError, ImportError)):
                message = traceback.format_exc()
            say("error", what="device" if lost else "refused", message=message)
            if lost:
                os._exit(3)  # nothing on this context can be freed any more


def watch(cupy) -> None:
    """Give every array an allocation of its own, and kernels their lines, so that a sanitizer can name both."""
    from s2o_cupy import compile as compiling

    cupy.cuda.set_allocator(None)
    compiling.MORE_OPTIONS, engines.GUARD = ("-lineinfo",), 0


def has_gpu() -> bool:
    """Whether raw kernels can be launched here."""
    if not importlib.util.find_spec("cupy"):
        return False
    from s2o_cupy import backends

    return backends.status()["cuda"][0]


# --- raw CUDA -------------------------------------------------------------------------------------
def serve(job: dict, gpu: bool, say) -> None:
    """One variant: compiled, then checked and timed where asked and where it can be."""
    name = job["name"]
    source = Source(name, job["text"], tuple((n, v) for n, v in job["macros"]))
    other = Source(name, job["other"], tuple((n, v) for n, v in job["macros"] if n in SHAPE_MACROS))
    at, stage = focus(name, dict(source.macros)), STAGES[name]
    own_arch = device_target() if gpu else None
    arch = job["arch"] or own_arch or "sm_90a"
    macros = source.applied(default_macros(name, at, arch))
    on_gpu = arch == own_arch
    if on_gpu:  # attend.cu runs where Hopper's kernel would take its calls
        specialisations.sm90_serves = _nowhere if name == "attend" else _SM90_SERVES
    engine, reason = _engine(name, arch, own_arch)
    todo = cases(stage, at, ON_GPU if on_gpu else EMULATED) if job["check"] and engine is not None else []
    timed = bench.problem(stage, at, name) if job["bench"] and on_gpu else None

    wanted = launched(engine, source, todo, timed, stage)
    if todo and not any(one is source for _, _, one, _ in wanted):
        fixed = "".join(f" -D {n}={v}" for n, v in source.macros)
        raise ValueError(f"{name}{fixed} is launched in no case of the check on {arch}: other kernels serve such calls")
    if timed is not None:
        wanted |= launched(engine, other, [], timed, stage)
    compile_all(engine, source, macros, arch, wanted, todo, on_gpu, say)
    if todo:
        with recorded(engine.backend, name) if on_gpu else nullcontext([]) as launches:
            check(engine, todo, source, say)
        say("launched", kernels=distinct(launches))
    elif job["check"]:
        say("note", message=f"not checked: {reason}")
    if timed is not None:
        time_both(engine, stage, name, at, source, other, say)
    elif job["bench"]:
        say("note", message=f"not timed: {reason if own_arch else 'that needs a GPU'}")


def _engine(name: str, arch: str, own_arch: str | None):
    """What a kernel runs on here; None, and why, where it cannot."""
    if own_arch is not None:
        if arch == own_arch:
            return engines.Raw(), ""
        return None, f"{arch} code does not run on this GPU ({own_arch})"
    if name in ("attend", "attend_sm90"):
        why = "there is no GPU here, and the emulation on the CPU does not know this kernel's instructions"
        return None, f"{why}. Without a GPU, try the idea in attend_simt"
    if emulation.compiler() is None:
        return None, "there is no GPU here, and the emulation on the CPU needs g++"
    return engines.Emulated("sm_90a" if name.endswith("_sm90") else "sm_80"), ""


def default_macros(name: str, at, arch: str) -> dict:
    """The macro set that a kernel is compiled as for the arrays of a focus."""
    return launch_macros(name, at.dtype, at.dim, at.dim_v, at.block_k if name == "attend_sm90" else at.block_q, arch)


def _nowhere(*_) -> bool:
    return False


def check(engine, todo: list, source: Source, say) -> None:
    """Every case of the stage, one event each."""
    for case in todo:
        say("case", label=case.label, where=engine.where)
        start = time.perf_counter()
        with in_use(source):
            worst = worst_of(case.judge(case.ask(engine)))
        engine.wait()
        found = None if worst is None else dataclasses.asdict(worst) | {"text": str(worst)}
        seconds = time.perf_counter() - start
        say("checked", label=case.label, worst=found, past=engine.guards.broken(), seconds=seconds)


def time_both(engine, stage, name, at, source, other, say) -> None:
    """The variant and the other in turn on the long call, registers and occupancy, and the floor."""
    say("case", label="timing", where=engine.where)
    p = bench.problem(stage, at, name)
    made = bench.prepared(engine, stage, p)
    with recorded(engine.backend, name) as launches, in_use(source):
        mine_out = bench.run(engine, stage, p, made)
    with recorded(engine.backend, name) as other_launches, in_use(other):
        other_out = bench.run(engine, stage, p, made)
    engine.wait()
    if not launches or len(launches) != len(other_launches):
        say("note", message=f"not timed: the long call launches {name} {len(launches)} times here")
        return
    times = bench.in_turn(engine.xp, launches, other_launches)
    found = bench.compared(*times)
    what = f"{p.heads_q} query and {p.heads_kv} K/V heads, {p.n_k} keys, {at.dtype}, head dims {at.dim}, {at.dim_v}"
    if stage == "attend":
        what += ", a tenth of each history walked"
    floor = bench.floor(engine.xp, stage, name, p)
    engine.guards.forget()
    del mine_out, other_out
    sides = {"launches": distinct(launches), "other_launches": distinct(other_launches)}
    say("timed", **found, **sides, what=what, floor=floor)


# --- Numba twins ----------------------------------------------------------------------------------
def serve_twin(job: dict, gpu: bool, say) -> None:
    """One Numba twin: its module run with the cell's text, then checked and timed through the backend."""
    (stage, _), start = TWINS[job["name"]], time.perf_counter()
    engine, at = engines.Twins(), focus("attend_simt", {"HEAD_DIM": 64})
    source, other = (Source(f"{job['name']}_numba", job[text]) for text in ("text", "other"))
    with in_use(source):
        twin(job["name"])
    say("compiled", seconds=time.perf_counter() - start, arch="numba", macros={}, kernels=[])
    if job["check"]:
        check(engine, cases(stage, at, SIMULATED if engine.simulated else ON_GPU), source, say)
    if job["bench"]:
        if engine.simulated:
            say("note", message="not timed: that needs a GPU")
        else:
            _time_twins(engine, stage, job["name"], at, (source, other), say)


def _numba_message(name: str, error: Exception) -> str:
    """What Numba or Python said, and the lines of the variant's module that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"line {f.lineno} of the module: {f.line}" for f in frames if f.filename == f"<{name}_numba.py>"]
    return "\n".join([f"{type(error).__name__}: {error}", *places[-3:]])


def _time_twins(engine, stage, name, at, sources, say) -> None:
    say("case", label="timing", where=engine.where)
    p = bench.problem(stage, at, name, keys=4096)
    made = bench.prepared(engine, stage, p)
    sides = []
    for source in sources:
        with in_use(source), recorded_twins(engine.backend) as launches:
            sides.append((launches, bench.run(engine, stage, p, made)))
    engine.wait()
    # The scores' rows are made by the arrays' own module; only launches of kernels are recorded and timed.
    found = bench.compared(*bench.in_turn(engine.xp, sides[0][0], sides[1][0]))
    what = f"{p.heads_q} query and {p.heads_kv} K/V heads, {p.n_k} keys, {at.dtype}, head dim {at.dim}"
    floor = bench.floor(engine.xp, stage, name, p)
    say("timed", **found, what=what, launches=[], other_launches=[], floor=floor)


SERVE = {"cuda": serve, "numba": serve_twin, "resources": serve_resources}

if __name__ == "__main__":
    main(int(sys.argv[1]), "--watched" in sys.argv)
