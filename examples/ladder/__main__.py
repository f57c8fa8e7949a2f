"""`python -m examples.ladder`: every step checked against the reference, then timed at one shape; a table and JSON."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from bench.timing import as_json, machine, on_device
from examples.ladder.checks import checked_rungs
from examples.ladder.rungs import RUNGS
from examples.ladder.work import Work, ranked_work
from s2o_cupy import backends
from s2o_cupy.files import save_json, writable


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.ladder", description=__doc__)
    parser.add_argument("--length", type=int, default=8192, metavar="N", help="queries and keys (8192)")
    parser.add_argument("--dim", type=int, default=128, help="head dim: 64 or 128 (128)")
    parser.add_argument("--tau", type=float, default=1e-2, help="gain below which a row tile stops (0.01)")
    parser.add_argument(
        "--json", default="bench/results", metavar="PATH", help="where the numbers go; in a folder, by date and commit"
    )
    options = parser.parse_args(arguments)
    works, why = backends.status()["cuda"]
    if not works:
        print(f"the ladder needs a CUDA device: {why}", file=sys.stderr)
        return 1
    report = {"machine": machine()}
    path = json_file(Path(options.json), report["machine"])
    checked = checked_rungs(options.dim)
    work = ranked_work(options.length, options.dim, options.tau)
    report |= {"shape": shape_of(work), "rungs": []}
    print(f"{report['machine']['gpu']}: {report['shape']}")
    print(f"{'step':20}{'ms':>10}{'TFLOP/s':>10}{'times':>8}{'error':>10}{'stops':>8}  change")
    for found in measured(work, checked):
        report["rungs"].append(as_json(found))
        save_json(path, report)
        print(line(found), flush=True)
    return int(any("failed" in found for found in report["rungs"]))


def json_file(path: Path, machine: dict) -> Path:
    """The file to write; in a folder, one named by the day and the commit."""
    return path / f"ladder_{machine['date'].split()[0]}_{machine['commit']}.json" if path.is_dir() else writable(path)


def shape_of(work: Work) -> dict:
    p, s = work.problem, work.problem.settings
    numbers = {"heads_q": p.heads_q, "heads_kv": p.heads_kv, "n": p.n_q, "dim": p.dim_qk, "dtype": p.dtype}
    return numbers | {"tau": s.tau, "segment": s.segment, "block_q": s.block_q, "block_k": s.block_k}


def measured(work: Work, checked: dict[str, str]):
    """What each rung that runs here took, and how far it is from the last one; one that failed says so."""
    import cupy

    p, before = work.problem, None
    last = work.answer(cupy)
    RUNGS[-1].prepare(work, last)()
    pairs = computed_pairs(work, last)
    for rung in RUNGS:
        found = {"name": rung.name, "change": rung.change, "density": pairs / p.heads_q / p.allowed_pairs}
        if missing := rung.missing():
            yield found | {"missing": missing}
            continue
        if checked[rung.name]:
            yield found | {"failed": checked[rung.name]}
            continue
        try:
            answer = work.answer(cupy)
            timing = on_device([rung.prepare(work, answer)], repeats=5, warmup=1)
        except Exception as error:  # the steps after it can still be measured
            yield found | {"failed": f"{type(error).__name__}: {error}"[:300]}
            continue
        found |= {"time": timing, "tflops": timing.rate(4 * p.dim_qk * pairs)}
        found |= {
            "error": relative_error(answer.out, last.out),
            "same_stops": float((answer.tiles == last.tiles).mean()),
        }
        found["times_as_fast"] = before / timing.median if before else 1.0
        before = timing.median
        yield found


def line(found: dict) -> str:
    if "time" not in found:
        return f"{found['name']:20}{found.get('missing') or found['failed']}"
    numbers = f"{found['time'].median:10.3f}{found['tflops']:10.2f}{found['times_as_fast']:8.1f}"
    return f"{found['name']:20}{numbers}{found['error']:10.1e}{found['same_stops']:8.4f}  {found['change']}"


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
