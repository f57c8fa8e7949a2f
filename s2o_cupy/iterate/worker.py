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

import numpy as np

from s2o_cupy import specialisations
from s2o_cupy.compile import KernelCompileError, compile_cubin, parse_report
from s2o_cupy.iterate import bench, emulation
from s2o_cupy.iterate.cases import EMULATED, ON_GPU, SIMULATED, STAGES, cases, focus, worst_of
from s2o_cupy.iterate.recording import recorded
from s2o_cupy.sources import SHAPE_MACROS, Source, in_use
from s2o_cupy.specialisations import launch_macros

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
        from s2o_cupy.iterate import engines

        guards = engines.Guards(cupy)  # the context, and CuPy's own kernels for what every check does
        guards.empty(1, np.float32)
        guards.broken()
    say("ready", gpu=gpu)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            (serve_twin if job["kind"] == "numba" else serve)(job, gpu, say)
            say("done")
        except KernelCompileError as error:
            say("error", what="compile", message=str(error))
        except Exception as error:
            lost = type(error).__name__ in ("CUDARuntimeError", "CUDADriverError", "CudaAPIError")
            message = f"{type(error).__name__}: {error}"
            if job["kind"] == "numba" and not lost:
                say("error", what="compile", message=_numba_message(job["name"], error))
                continue
            if not lost and not isinstance(error, (ValueError, TypeError, ImportError)):
                message = traceback.format_exc()
            say("error", what="device" if lost else "refused", message=message)
            if lost:
                os._exit(3)  # nothing on this context can be freed any more


def watch(cupy) -> None:
    """Give every array an allocation of its own, and kernels their lines, so that a sanitizer can name both."""
    from s2o_cupy import compile as compiling
    from s2o_cupy.iterate import engines

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
    from s2o_cupy.iterate import engines

    name = job["name"]
    source = Source(name, job["text"], tuple((n, v) for n, v in job["macros"]))
    at, stage = focus(name, dict(source.macros)), STAGES[name]
    own_arch = device_arch() if gpu else None
    arch = job["arch"] or own_arch or "sm_90a"
    macros = source.applied(default_macros(name, at, arch))
    on_gpu = gpu and arch == own_arch
    engine = engines.Raw() if on_gpu else None
    if on_gpu:  # attend.cu runs where Hopper's kernel would take its calls
        specialisations.sm90_serves = _nowhere if name == "attend" else _SM90_SERVES
        engine.backend._recorded.cache_clear()
    if on_gpu:
        start = time.perf_counter()
        made = compiled_here(source, macros)
        say("compiled", seconds=time.perf_counter() - start, arch=arch, macros=macros, kernels=made)
    else:
        _compile_there(source, macros, arch, say)
    if job["check"]:
        if own_arch and arch != own_arch:
            say("note", message=f"not checked: {arch} code does not run on this GPU ({own_arch})")
        elif on_gpu:
            check(engine, stage, at, ON_GPU, source, say)
        else:
            _check_emulated(engines, name, stage, at, source, say)
    if job["bench"]:
        if not on_gpu:
            why = f"{arch} code does not run on this GPU ({own_arch})" if own_arch else "that needs a GPU"
            say("note", message=f"not timed: {why}")
        else:
            other = Source(name, job["other"], tuple((n, v) for n, v in job["macros"] if n in SHAPE_MACROS))
            time_both(engine, stage, name, at, source, other, say)


def default_macros(name: str, at, arch: str) -> dict:
    """The macro set that a kernel is compiled as for the arrays of a focus."""
    return launch_macros(name, at.dtype, at.dim, at.dim_v, at.block_k if name == "attend_sm90" else at.block_q, arch)


def _nowhere(*_) -> bool:
    return False


def device_arch() -> str:
    from s2o_cupy.compile import device_target

    return device_target()


def compiled_here(source: Source, macros: dict) -> list[dict]:
    """Compiles for the current GPU; registers, spills and shared memory of every kernel of the file."""
    from s2o_cupy.compile import get_kernel
    from s2o_cupy.variants import entries

    found = []
    for entry in entries(source.text):
        kernel = get_kernel(source.name, entry, source, **macros)
        found.append(
            {
                "kernel": entry,
                "registers": kernel.num_regs,
                "local_bytes": kernel.local_size_bytes,
                "shared_bytes": kernel.shared_size_bytes,
            }
        )
    return found


def _compile_there(source: Source, macros: dict, arch: str, say) -> None:
    start = time.perf_counter()
    try:
        _, log = compile_cubin(arch, source.name, macros, source)
    except ImportError as error:
        say("note", message=f"not compiled for {arch}: {error}")
        return
    found = [
        {
            "kernel": kernel,
            "registers": x["registers"],
            "local_bytes": x["stack_bytes"],
            "shared_bytes": x["shared_bytes"],
        }
        for kernel, x in parse_report(log).items()
    ]
    say("compiled", seconds=time.perf_counter() - start, arch=arch, macros=macros, kernels=found)


def _check_emulated(engines, name, stage, at, source, say) -> None:
    if name in ("attend", "attend_sm90"):
        why = "there is no GPU here, and the emulation on the CPU does not know this kernel's instructions"
        say("note", message=f"not checked: {why}. Without a GPU, try the idea in attend_simt")
    elif emulation.compiler() is None:
        say("note", message="not checked: there is no GPU here, and the emulation on the CPU needs g++")
    else:
        engine = engines.Emulated("sm_90a" if name.endswith("_sm90") else "sm_80")
        check(engine, stage, at, EMULATED, source, say)


def check(engine, stage: str, at, sizes, source: Source | None, say) -> None:
    """Every case of the stage, one event each."""
    for case in cases(stage, at, sizes):
        say("case", label=case.label, where=engine.where)
        start = time.perf_counter()
        if source is None:
            worst = worst_of(case.run(engine))
        else:
            with in_use(source):
                worst = worst_of(case.run(engine))
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
    usage = [launch.usage() for launch in launches]
    floor = bench.floor(engine.xp, stage, name, p)
    engine.guards.forget()
    del mine_out, other_out
    say("timed", **found, what=what, launches=usage, other_launches=[x.usage() for x in other_launches], floor=floor)


# --- Numba twins ----------------------------------------------------------------------------------
def serve_twin(job: dict, gpu: bool, say) -> None:
    """One Numba twin: its module run with the cell's text, then checked and timed through the backend."""
    from s2o_cupy.iterate import engines, twins

    stage = job["name"]
    start = time.perf_counter()
    engine = engines.Twins()
    with twins.in_use(engine.backend, stage, job["text"]):
        say("compiled", seconds=time.perf_counter() - start, arch="numba", macros={}, kernels=[])
        at = focus("attend_simt", {"HEAD_DIM": 64})
        if job["check"]:
            check(engine, stage, at, SIMULATED if engine.simulated else ON_GPU, None, say)
    if job["bench"]:
        if engine.simulated:
            say("note", message="not timed: that needs a GPU")
        else:
            _time_twins(engine, twins, stage, at, job, say)


def _numba_message(name: str, error: Exception) -> str:
    """What Numba or Python said, and the lines of the variant's module that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"line {f.lineno} of the module: {f.line}" for f in frames if f.filename == f"<{name}_numba.py>"]
    return "\n".join([f"{type(error).__name__}: {error}", *places[-3:]])


def _time_twins(engine, twins, stage, at, job, say) -> None:
    say("case", label="timing", where=engine.where)
    p = bench.problem(stage, at, keys=4096)
    made = bench.prepared(engine, stage, p)
    sides = []
    for text in (job["text"], job["other"]):
        with twins.in_use(engine.backend, stage, text), twins.recorded(engine.backend) as launches:
            sides.append((launches, bench.run(engine, stage, p, made)))
    engine.wait()
    # The scores' rows are made by the arrays' own module; only launches of kernels are recorded and timed.
    found = bench.compared(*bench.in_turn(engine.xp, sides[0][0], sides[1][0]))
    what = f"{p.heads_q} query and {p.heads_kv} K/V heads, {p.n_k} keys, {at.dtype}, head dim {at.dim}"
    floor = bench.floor(engine.xp, stage, stage, p)
    say("timed", **found, what=what, launches=[], other_launches=[], floor=floor)


if __name__ == "__main__":
    main(int(sys.argv[1]), "--watched" in sys.argv)
