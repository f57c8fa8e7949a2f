"""`python tests/gpu/warm_twins.py`: compiles the Numba twins that the tests launch, a process a core, for the cache.

A process that compiles them one after the other takes minutes; 16 at once take some 25 s.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

DTYPES, DIMS = ("bfloat16", "float64", "float32", "float16"), (256, 128, 64)
STAGES = ("attend", "spread", "gaussian", "mixture", "pool", "remap", "exact")


def compile_one(stage: str, dtype: str, dim: int) -> float:
    """Launch a stage on a few numbers; seconds."""
    start = time.perf_counter()
    import cupy
    import ml_dtypes
    import numpy as np

    from s2o_cupy.backends import numba_cuda
    from s2o_cupy.problem import make_problem
    from s2o_cupy.settings import Settings

    q = np.random.default_rng(0).standard_normal((1, 1, 24, dim)).astype(getattr(ml_dtypes, dtype, dtype))
    q = cupy.asarray(q)
    rank = stage if stage in ("gaussian", "mixture") else "mean"
    levels = None if stage == "exact" else 1024
    chosen = Settings(
        segment=8, block_q=8, block_k=4, pool=4, rank=rank, rank_terms=3, tail="spread", rank_levels=levels
    )
    p = make_problem(q, q, q, chosen)
    if stage == "attend":
        import s2o_cupy as s2o

        s2o.dense_attention(q, q, q, backend="numba")
    elif stage == "spread":
        import s2o_cupy as s2o

        offsets = cupy.zeros((1, 1, p.segments + 1), "int64")
        plan = s2o.Plan.from_arrays(q, q, chosen, kv_order=cupy.empty(0, "int32"), kv_offsets=offsets)
        s2o.attend(q, q, q, plan, backend="numba")
    elif stage == "pool":
        numba_cuda.pool(p, q, q)
    elif stage in ("remap", "exact"):
        offsets = cupy.asarray(p.offsets(p.whole))
        scores = cupy.zeros((p.segments, int(p.history.max())), "float32")
        numba_cuda.remap(p, scores, p.whole, offsets, cupy.empty(int(offsets[-1, -1]), "int32"))
    else:
        numba_cuda.score(p, q, q, p.whole)
    cupy.cuda.runtime.deviceSynchronize()
    return time.perf_counter() - start


def jobs() -> list[tuple[str, str, int]]:
    """(stage, dtype, head dim) of every kernel, the longest to compile first."""
    wide = [(stage, dtype, dim) for stage in STAGES[:4] for dim in DIMS for dtype in DTYPES]
    return [("remap", "float32", 64), ("exact", "float32", 64), *wide, *[("pool", dtype, 64) for dtype in DTYPES]]


def main() -> int:
    start, failed = time.perf_counter(), 0
    with ProcessPoolExecutor(min(os.cpu_count(), len(jobs())), multiprocessing.get_context("spawn")) as pool:
        for job, made in [(job, pool.submit(compile_one, *job)) for job in jobs()]:
            try:
                print(*job, f"{made.result():.1f} s", flush=True)
            except Exception as error:  # the others are worth having
                failed += 1
                print(*job, f"failed: {type(error).__name__}: {error}", flush=True)
    print(f"{len(jobs())} kernels, {time.perf_counter() - start:.1f} s")
    return failed


sys.path.insert(0, str(Path(__file__).parents[2]))
if __name__ == "__main__":
    sys.exit(main())
