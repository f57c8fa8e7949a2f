"""`python -m examples.ladder`: every step checked against the reference, then timed at one shape; a table and JSON."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from bench import workloads
from bench.timing import as_json, machine, on_device
from examples.ladder.rungs import RUNGS
from examples.ladder.work import Work, check, settings_of, small_work
from s2o_cupy import backends
from s2o_cupy.files import save_json
from s2o_cupy.problem import make_problem


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.ladder", description=__doc__)
    parser.add_argument("--length", type=int, default=8192, metavar="N", help="queries and keys (8192)")
    parser.add_argument("--dim", type=int, default=128, help="head dim: 64 or 128 (128)")
    parser.add_argument("--tau", type=float, default=1e-2, help="gain below which a row tile stops (0.01)")
    parser.add_argument("--json", default="bench/results/ladder.json", metavar="FILE", help="where the numbers go")
    options = parser.parse_args(arguments)
    works, why = backends.status()["cuda"]
    if not works:
        print(f"the ladder needs a CUDA device: {why}", file=sys.stderr)
        return 1
    report = measure(options)
    Path(options.json).parent.mkdir(parents=True, exist_ok=True)
    save_json(options.json, report)
    return 0


def measure(options) -> dict:
    """Checks and times every rung that works here; prints the table as it grows."""
    import cupy

    work = ranked_work(options)
    shipped = work.answer(cupy)
    RUNGS[-1].prepare(work, shipped)()
    pairs = computed_pairs(work, shipped)
    p = work.problem
    report = {
        "machine": machine(),
        "shape": {"heads_q": p.heads_q, "heads_kv": p.heads_kv, "n": p.n_q, "dim": p.dim_qk},
    }
    report |= {"dtype": p.dtype, "tau": p.settings.tau, "density": pairs / p.heads_q / p.allowed_pairs, "rungs": []}
    print(f"{report['machine']['gpu']}: N={p.n_q}, D={p.dim_qk}, Hq={p.heads_q}, Hkv={p.heads_kv}, "
          f"float16, density {report['density']:.3f}")  # fmt: skip
    print(f"{'step':20}{'ms':>10}{'TFLOP/s':>10}{'times':>8}{'error':>10}{'stops':>8}  change")
    before = None
    for rung in RUNGS:
        if missing := rung.missing():
            print(f"{rung.name:20}{missing}")
            continue
        small = small_work(n=600, dim=options.dim, segment=256, block_q=128, block_k=64, pool=64).on_device()
        answer = small.answer(cupy)
        rung.prepare(small, answer)()
        on_host = Work(small.problem, *(getattr(small, name).get() for name in ("q", "k", "v", "order", "starts")))
        check(on_host, type(answer)(out=answer.out.get(), tiles=answer.tiles.get()))

        answer = work.answer(cupy)
        call = rung.prepare(work, answer)
        timing = on_device([call], repeats=5, warmup=2)
        found = {"name": rung.name, "change": rung.change, "time": timing, "tflops": timing.rate(4 * p.dim_qk * pairs)}
        found["error"] = relative_error(answer.out, shipped.out)
        found["same_stops"] = float((answer.tiles == shipped.tiles).mean())
        found["times_as_fast"] = before / timing.median if before else 1.0
        before = timing.median
        report["rungs"].append(found)
        print(f"{rung.name:20}{timing.median:10.3f}{found['tflops']:10.2f}{found['times_as_fast']:8.1f}"
              f"{found['error']:10.1e}{found['same_stops']:8.4f}  {rung.change}", flush=True)  # fmt: skip
    return as_json(report)


def ranked_work(options) -> Work:
    """The `diffuse` preset of the benchmarks at the measured shape, ranked by the package."""
    import cupy

    from s2o_cupy import planning
    from s2o_cupy.backends import cuda

    q, k, v = workloads.make("diffuse", options.length, dim=options.dim, dtype="float16", xp=cupy)
    problem = make_problem(q[None], k[None], v[None], settings_of(tau=options.tau))
    starts = cupy.asarray(problem.offsets(problem.whole))
    order = cupy.empty(int(starts[-1, -1]), np.int32)
    planning.rank(problem, q[None], k[None], problem.whole, starts, order, cuda)
    return Work(problem, q, k, v, order, starts)


def computed_pairs(work: Work, answer) -> float:
    """Unmasked pairs that the walk computes, over all heads."""
    p = work.problem
    tiles = answer.tiles.get().astype(np.int64)
    walked = np.minimum(tiles * p.settings.block_k, p.history[p.tile_segment])
    return float(p.heads_q * p.window_pairs.sum() + (walked * p.tile_rows).sum())


def relative_error(out, exact) -> float:
    import cupy

    gap = cupy.linalg.norm((out.astype(np.float32) - exact.astype(np.float32)).ravel())
    return float(gap / cupy.linalg.norm(exact.astype(np.float32).ravel()))


if __name__ == "__main__":
    sys.exit(main())
