"""`python -m bench density`: the density that settings need at an error, on long heads, by the CPU backend.

One set of query heads over one K/V head, float32, its error taken on sampled rows: what a GPU would have to walk, known
without one. `tau` is swept (`bench/sweep.py`) until the error lies at most 3 % below the wanted one.
"""

from __future__ import annotations

from functools import partial

import numpy as np

import s2o_cupy as s2o
from bench import ours, workloads
from bench.record import Record
from bench.sweep import Sweep
from s2o_cupy.exact import exact_rows, sample_rows
from s2o_cupy.problem import make_problem
from s2o_cupy.settings import Settings

ERRORS = (0.05, 0.02)
ROWS = 512
SETTINGS = ours.VARIANTS | {
    "s2o_cupy, spread tail": Settings(tail="spread"),
    "s2o_cupy, S=128 shared": ours.SHARED,
    "s2o_cupy, S=128": ours.S128,
    "s2o_cupy, S=512": ours.S512,
    "s2o_cupy precise": Settings.precise(),
    "s2o_cupy, S=64": ours.S128.replace(segment=64, block_q=64),
    "S2O Triton's: S=1024": Settings(segment=1024, block_k=128, rank="mean", tail=None),
    "S2O Triton's: S=256": Settings(segment=256, block_k=128, rank="mean", tail=None),
}


def arguments(parser) -> None:
    """Adds the options that `main` reads."""
    parser.add_argument("files", nargs="*", metavar="FILE.npz", help="real heads in place of synthetic ones: q, k, v")
    parser.add_argument("--length", type=int, nargs="+", default=[32768], metavar="N", help="of synthetic heads")
    parser.add_argument("--preset", default="diffuse", choices=("sparse", "diffuse"), help="synthetic heads")
    parser.add_argument("--heads", type=int, default=4, metavar="N", help="query heads of the one K/V head")
    parser.add_argument("--only", metavar="TEXT;TEXT", help="only settings whose name holds one of these")


def main(options, record: Record) -> None:
    """Every set of heads, and for each every settings at every error."""
    chosen = {
        name: settings
        for name, settings in SETTINGS.items()
        if not options.only or any(text in name for text in options.only.split(";"))
    }
    for path in options.files:
        with np.load(path) as file:
            arrays = [file[name] for name in ("q", "k", "v")]
        measure(path.rsplit("/", 1)[-1].removesuffix(".npz"), arrays, chosen, record)
    for n in () if options.files else options.length:
        arrays = workloads.make(options.preset, n, heads_q=options.heads, heads_kv=1, dim=ours.DIM, dtype="float32")
        measure(options.preset, arrays, chosen, record)


def measure(source: str, arrays, chosen: dict[str, Settings], record: Record) -> None:
    """One set of heads, q (Hq, N, D), k and v (Hkv, N, D)."""
    arrays = [x[None] if x.ndim == 3 else x for x in arrays]
    p = make_problem(*arrays, Settings())
    rows = sample_rows(p.n_q, ROWS, 0)
    exact = exact_rows(p, *arrays, rows).out.astype(np.float64)
    for name, settings in chosen.items():
        sweep = Sweep(partial(point, arrays, s2o.plan(*arrays[:2], settings), rows, exact), 1e-5, 10.0)
        for wanted in ERRORS:
            met, same = sweep.meet(wanted), {"n": p.n_q, "source": source, "wanted": wanted}
            where = (ours.shape_text(p.n_q, p.heads_q, p.heads_kv, p.dim_qk), p.dtype)
            if met is None:
                record.case(name, *where, note=f"{source}: cannot reach error {wanted}", **same)
                continue
            tau, error, density = met
            note = f"{source}, error {wanted}: tau {tau:.3g}"
            same |= {"tau": tau, "settings": settings.as_dict()}
            record.case(name, *where, density=density, error=error, note=note, **same)


def point(arrays, plan, rows, exact, tau: float) -> tuple[float, float]:
    """Relative error on the sampled rows, and density, of one walk along a plan."""
    found = s2o.attend(*arrays, plan, tau=tau, full_output=True)
    out = found.out[:, :, rows].astype(np.float64)
    return float(np.linalg.norm(out - exact) / np.linalg.norm(exact)), found.stats.density
