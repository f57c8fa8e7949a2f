"""The Numba CUDA twins beside the raw kernels, stage by stage, on one plan: what readable Python costs on a device.

A stage is timed as called, and with its launches queued behind a kernel that spins, which leaves out what the host
takes to launch them. A ratio is the raw kernel's queued time over the twin's.
"""

from __future__ import annotations

from functools import partial

from bench import ours, workloads
from bench.record import Record
from bench.timing import on_device, queued
from s2o_cupy import backends
from s2o_cupy.problem import make_problem
from s2o_cupy.settings import Settings


def measure(record: Record, n: int = 8192, heads_q: int = 8, heads_kv: int = 2, dim: int = 64) -> None:
    """Every stage in float32 by both backends; one line that says why where numba-cuda is missing."""
    shape, dtype = ours.shape_text(n, heads_q, heads_kv, dim), "float32"
    works, why = backends.status()["numba"]
    if not works:
        record.case("Numba twins", shape, dtype, note=f"not measured: {why}")
        return
    import cupy

    from s2o_cupy.backends import cuda, numba_cuda

    made = workloads.make("diffuse", n, heads_q=heads_q, heads_kv=heads_kv, dim=dim, dtype=dtype, xp=cupy)
    arrays = [x[None] for x in made]
    p = make_problem(*arrays, Settings())
    offsets, order = ours.lists(p)
    cuda.rank(p, *arrays[:2], p.whole, offsets, order)
    raw, twin = (stages(backend, p, arrays, offsets, order) for backend in (cuda, numba_cuda))
    for stage in raw:
        before = None
        for name, call in (("raw", raw[stage]), ("Numba", twin[stage])):
            alone = queued(call)
            ratio = before / alone.median if before else None
            record.case(
                f"{name} {stage}", shape, dtype, time=on_device([call]), ratio=ratio,
                note=f"{alone.median:.3f} ms without the host's time", queued=alone,
            )  # fmt: skip
            before = alone.median


def stages(backend, p, arrays, offsets, order) -> dict:
    """A call of each stage, by name; stage 2 writes an order of its own, stage 3 walks the one given."""
    q, k, v = arrays
    scores, pooled, answer = backend.score(p, q, k, p.whole), backend.pool(p, k, v), ours.answer(p, q)
    return {
        "score": partial(backend.score, p, q, k, p.whole),
        "remap": partial(backend.remap, p, scores, p.whole, offsets, ours.lists(p)[1]),
        "pool": partial(backend.pool, p, k, v),
        "attend": partial(backend.attend, p, q, k, v, p.whole, order, offsets, None, pooled, answer),
        "dense": partial(backend.dense, p, q, k, v, answer),
    }
