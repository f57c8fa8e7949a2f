"""What a verdict needs compiled: found by a rehearsal, then compiled kernel by kernel, all at the same time.

A file's kernels compile one by one in a part of the time that the file takes (`variants.only`), and the compilers leave
Python free, so that the reference answers in the meantime.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

from s2o_cupy import specialisations
from s2o_cupy.compile import compile_cubin, device_target, get_kernel, parse_report, resources
from s2o_cupy.iterate import bench, engines
from s2o_cupy.iterate.recording import rehearsed
from s2o_cupy.sources import Source, current, in_use
from s2o_cupy.variants import entries


def launched(engine, source: Source, todo: list, timed, stage: str) -> dict[tuple, None]:
    """The kernels that cases, and the call that is timed, ask for with `source` in use: found without running any."""
    if engine is None:
        return {}
    with in_use(source), rehearsed(engine.backend) as wanted:
        for case in todo:
            case.ask(engine)
        if timed is not None:
            bench.run(engine, stage, timed, bench.prepared(engine, stage, timed))
    engine.guards.forget()
    return wanted


def compile_all(engine, source: Source, macros: dict, arch: str, wanted: dict, todo: list, on_gpu: bool, say) -> None:
    """Compile what is wanted and every kernel of the variant, at the same time, and meanwhile ask the reference."""
    own = [(source.name, entry, source, tuple(sorted(macros.items()))) for entry in entries(source.text, macros)]

    def build(file, entry, one, defined):
        return engine.kernel(file, entry, one, **dict(defined))

    if on_gpu:
        wanted = {**wanted, **dict.fromkeys(own)}
        seconds, made = at_once(build, wanted, todo)
        kernels = [_resources(one[1], made[one]) for one in own]
    else:
        try:
            seconds, made = at_once(lambda file, entry, one, _: _assembled(arch, entry, one, macros), own, [])
            kernels = [numbers for one in own for numbers in made[one]]
        except ImportError as error:
            kernels = None
            say("note", message=f"not compiled for {arch}: {error}")
        at_once(build, wanted, todo)
    if kernels is not None:
        say("compiled", seconds=seconds, arch=arch, macros=macros, kernels=kernels)


def at_once(build, wanted, todo: list) -> tuple[float, dict]:
    """Seconds until everything wanted was built, and what was; the reference answers the cases in the meantime."""
    start = time.perf_counter()

    def timed(one):
        return build(*one), time.perf_counter()

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        made = {one: pool.submit(timed, one) for one in wanted}
        try:
            for case in todo:
                if not any(x.done() and x.exception() for x in made.values()):
                    case.prepare()
            found = {one: x.result() for one, x in made.items()}
        finally:
            pool.shutdown(cancel_futures=True)
    return max((stop - start for _, stop in found.values()), default=0.0), {one: x for one, (x, _) in found.items()}


def _resources(entry: str, kernel) -> dict:
    """Registers, local and shared memory of a kernel on this GPU."""
    return {
        "kernel": entry,
        "registers": kernel.num_regs,
        "local_bytes": kernel.local_size_bytes,
        "shared_bytes": kernel.shared_size_bytes,
    }


def _assembled(arch: str, entry: str, source: Source, macros: dict) -> list[dict]:
    """The same of a kernel compiled for a GPU that is not here."""
    _, log = compile_cubin(arch, source.name, macros, engines.part(source, entry))
    return [
        {
            "kernel": kernel,
            "registers": x["registers"],
            "local_bytes": x["stack_bytes"],
            "shared_bytes": x["shared_bytes"],
        }
        for kernel, x in parse_report(log).items()
    ]


def serve_resources(job: dict, gpu: bool, say) -> None:
    """What every shipped specialisation of a kernel file takes, one event each."""
    arch = device_target() if gpu else "sm_90a"
    specs = [spec for spec in specialisations.shipped(arch) if spec.name == job["name"]]
    source = current(job["name"])

    def names(spec):
        return entries(source.text, dict(spec.macros))

    def there(spec):
        found, _ = resources(arch, spec)
        return [{**found[name], "kernel": name, "local_bytes": found[name]["stack_bytes"]} for name in names(spec)]

    def here(spec, name):
        return _resources(name, get_kernel(spec.name, name, engines.part(source, name), **dict(spec.macros)))

    if gpu:
        _, made = at_once(here, [(spec, name) for spec in specs for name in names(spec)], [])
        found = {spec: [made[spec, name] for name in names(spec)] for spec in specs}
    else:
        _, made = at_once(there, [(spec,) for spec in specs], [])
        found = {spec: made[spec,] for spec in specs}
    for spec, kernels in found.items():
        say("resources", arch=arch, macros=spec.macros, kernels=kernels)
