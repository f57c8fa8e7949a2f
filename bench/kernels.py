"""`python -m bench kernels`: every CUDA kernel alone, beside the floor that its own operations and bytes set.

One whole call and one dense call are watched launch by launch. A kernel's floor is the larger of its operations at the
rate of a 16-bit GEMM and its bytes at the rate of a device copy, both measured in this run; bytes are those that must
move at least once. The ratio is the floor over the time: 1 is as fast as the machine allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np

import s2o_cupy as s2o
from bench import building, ours
from bench.record import Record
from bench.timing import Timing, on_device
from s2o_cupy import compile as compiling
from s2o_cupy.exact import exact_rows, sample_rows
from s2o_cupy.problem import Problem, make_problem
from s2o_cupy.settings import Settings

REPEATS, TAU = 7, 1e-2
GEMM = 8192
COPY_BYTES = 2**30


def arguments(parser) -> None:
    """Adds the options that `main` reads."""
    building.argument(parser)
    parser.add_argument("--length", type=int, nargs="+", default=[32768, 131072], metavar="N", help="sequence lengths")
    parser.add_argument("--preset", default="diffuse", choices=("sparse", "diffuse"), help="synthetic heads")


def main(options, record: Record) -> None:
    """The machine's own rates, then every kernel at every length."""
    building.before(options, record, building.of_ours([Settings(**ours.BASE)]))
    gemm, copy = machine_rates(record)
    for n in options.length:
        with record.section(f"N={n}"), record.attempt("kernels", ours.shape_text(n)):
            one_length(options.preset, n, gemm, copy, record)


def machine_rates(record: Record) -> tuple[float, float]:
    """Operations and bytes a second of a float16 GEMM and of a copy, each measured and said."""
    import cupy

    a, b = (cupy.random.standard_normal((GEMM, GEMM), dtype=np.float32).astype(np.float16) for _ in range(2))
    time = on_device([partial(cupy.matmul, a, b)], REPEATS)
    gemm = 2 * GEMM**3 / time.median * 1e3
    record.case("GEMM (cuBLAS)", f"{GEMM} x {GEMM} x {GEMM}", "float16", time=time, tflops=gemm / 1e12)
    del a, b
    source, target = (cupy.zeros(COPY_BYTES, np.uint8) for _ in range(2))
    time = on_device([partial(cupy.copyto, target, source)], REPEATS)
    copy = 2 * COPY_BYTES / time.median * 1e3
    note = f"{copy / 1e12:.2f} TB/s, read and written"
    record.case("copy", f"{COPY_BYTES >> 20} MiB", "uint8", time=time, note=note, tbytes=copy / 1e12)
    return gemm, copy


def one_length(preset: str, n: int, gemm: float, copy: float, record: Record) -> None:
    """Watches a ranked and a dense call of one shape, their answers checked first."""
    arrays = ours.inputs(preset, n)
    p = make_problem(*arrays, Settings(tau=TAU, **ours.BASE))
    attention = partial(s2o.attention, *arrays, p.settings, backend="cuda", full_output=True)
    dense = partial(s2o.dense_attention, *arrays, backend="cuda", full_output=True)
    rows = sample_rows(n, 128, 0)
    exact = exact_rows(p, *arrays, rows).out[0].astype(np.float64)
    with watched() as launches:
        found = attention()
        pairs = found.stats.density * p.allowed_pairs * p.heads_q * p.batch
        for name, call, allowed in (("attention", attention, 0.2), ("dense_attention", dense, 0.02)):
            error = ours.rows_error(call().out, rows, exact)
            if not error <= allowed:
                raise RuntimeError(f"{name} is {error:.1e} from exact attention; allowed: {allowed}")
            launches.clear()
            for _ in range(REPEATS):
                call()
            for kernel, launched in by_kernel(launches).items():
                work = costs(kernel, p, pairs if name == "attention" else None)
                say(f"{name}: {kernel}", n, p, launched, work, gemm, copy, record)


@dataclass
class Launch:
    """One launch of a kernel: its name, its resources, and events before and after."""

    kernel: str
    resources: dict
    first: object
    last: object
    ms: float = field(default=0.0)


@contextmanager
def watched() -> Iterator[list[Launch]]:
    """Within, each launch of our kernels is noted. Kernels built earlier are forgotten, so that all are watched."""
    import cupy

    from s2o_cupy.backends import cuda

    launches, plain = [], compiling.Kernel

    class Watched(plain):
        """A kernel that leaves a `Launch` in the list whenever it is launched."""

        def prepared(self, grid, block, arguments, shared_mem=0):
            launch, held = super().prepared(grid, block, arguments, shared_mem), self.usage(block, shared_mem)

            def timed(*where):
                first, last = cupy.cuda.Event(), cupy.cuda.Event()
                first.record()
                launch(*where)
                last.record()
                launches.append(Launch(self.raw.name, held, first, last))

            return timed

    def forget():
        compiling._kernels.clear()
        for cached in vars(cuda).values():
            if hasattr(cached, "cache_clear"):
                cached.cache_clear()

    forget()
    compiling.Kernel = Watched
    try:
        yield launches
    finally:
        compiling.Kernel = plain
        forget()


def by_kernel(launches: list[Launch]) -> dict[str, tuple[Timing, dict, int]]:
    """For each kernel the time of its launches in one call, its resources, and launches a call."""
    import cupy

    cupy.cuda.runtime.deviceSynchronize()
    grouped: dict[str, list[Launch]] = {}
    for launch in launches:
        launch.ms = cupy.cuda.get_elapsed_time(launch.first, launch.last)
        grouped.setdefault(launch.kernel, []).append(launch)
    found = {}
    for kernel, group in grouped.items():
        calls = np.array([launch.ms for launch in group]).reshape(REPEATS, -1).sum(axis=1)
        found[kernel] = Timing.of(calls), group[-1].resources, len(group) // REPEATS
    return found


def costs(kernel: str, p: Problem, pairs: float | None) -> tuple[float, float] | None:
    """Operations and bytes that a kernel needs for a whole call: of dense attention where `pairs` is None.

    None for a kernel that nothing is known of.
    """
    size, heads_kv = np.dtype(np.uint16).itemsize, p.batch * p.heads_kv
    heads = p.batch * p.heads_q
    q, k, v = heads * p.n_q * p.dim_qk, heads_kv * p.n_k * p.dim_qk, heads_kv * p.n_k * p.dim_v
    lists, scores = p.batch * p.heads_order, float(p.history.sum()) * p.batch * p.heads_order
    rows, stage = 1 + p.terms, kernel.split("_")[0]
    moments = 4 * lists * p.segments * p.dim_qk**2
    out = heads * p.n_q * p.dim_v
    if "mixture" in kernel:
        return None
    if stage == "attend":
        walked = 0 if pairs is None else pairs / p.settings.block_q
        allowed = p.allowed_pairs * heads if pairs is None else pairs
        return 2 * (p.dim_qk + p.dim_v) * allowed, size * (q + k + v + out) + 4 * walked
    return {
        "moments": (2.0 * q * p.dim_qk, size * q + moments),
        "means": (0.0, size * (q + lists * p.segments * p.dim_qk)),
        "factors": (2.0 * q * p.dim_qk, size * (q + lists * p.segments * rows * p.dim_qk)),
        "factor": (0.0, moments + size * lists * p.segments * rows * p.dim_qk),
        "score": (2.0 * scores * rows * p.dim_qk, size * (k + scores)),
        "remap": (0.0, size * scores + 4.0 * float(p.listed.sum()) * lists),
        "pool": (0.0, size * (k + v) * (1 + 1 / p.settings.pool)),
    }.get(stage)


def say(name: str, n: int, p: Problem, launched, work, gemm: float, copy: float, record: Record) -> None:
    """One kernel's line."""
    time, held, launches = launched
    numbers, parts = {"n": n, "launches": launches, **held}, []
    if work:
        operations, moved = work
        floors = {"operations": 1e3 * operations / gemm, "bytes": 1e3 * moved / copy}
        limit = max(floors, key=floors.get)
        numbers |= {"tflops": time.rate(operations) if operations else None, "tbytes": moved / time.median / 1e9}
        numbers |= {"operations": operations, "bytes": moved, "floor_ms": floors[limit], "floor": limit}
        numbers["ratio"] = floors[limit] / time.median
        parts.append(f"{numbers['tbytes']:.2f} TB/s, floor {floors[limit]:.3f} ms ({limit})")
    parts.append(f"{held['registers']} registers")
    parts.append(f"{held['blocks']} x {held['threads']} threads a multiprocessor ({held['occupancy']:.0%})")
    parts += [f"{held['local_bytes']} B local"] if held["local_bytes"] else []
    parts += [f"{launches} launches"] if launches > 1 else []
    record.case(name, ours.shape_text(n), p.dtype, time=time, note=", ".join(parts), **numbers)
