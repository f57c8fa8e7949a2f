"""`python -m bench scaling`: one error, from 1K to 1M tokens: time, density, shares of the stages, memory, crossover.

A whole call of ours at each length and error, its `tau` found by a sweep on sampled rows; beside it our dense attention
and cuDNN's through PyTorch, as far as the time allowed (``--seconds``) goes. A ratio is our dense time over the call's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

import s2o_cupy as s2o
from bench import building, ours
from bench.faster import crossings_of, fastest
from bench.record import Record
from bench.sweep import Sweep
from bench.timing import on_device
from s2o_cupy import planning
from s2o_cupy.exact import exact_rows, sample_rows
from s2o_cupy.problem import make_problem
from s2o_cupy.settings import Settings

LENGTHS = tuple(2**power for power in range(10, 21))
ERRORS = (0.05, 0.02)
STAGES = ("rank", "pool", "attend", "dense")
ROWS = 256
CUDNN = "cuDNN (PyTorch SDPA)"
SETTINGS = {
    "attention()": Settings(),
    "attention(), S=128 shared, spread tail": ours.SHARED.replace(tail="spread"),
    "attention(), S=64 shared, spread tail": ours.S64.replace(tail="spread"),
}
ALL_UPTO = 2**16  # keys; beyond, only the settings that were the fastest at the length before
PART_FROM = 2**18  # keys from which the sweep begins on the heads of two K/V heads
CALLS = 8  # whole calls that one error takes, about
ENOUGH = 150.0  # ms of repeats of one case


def arguments(parser) -> None:
    """Adds the options that `main` reads."""
    building.argument(parser)
    parser.add_argument("--length", type=int, nargs="+", default=list(LENGTHS), metavar="N", help="sequence lengths")
    parser.add_argument("--preset", default="diffuse", choices=("sparse", "diffuse"), help="synthetic heads")
    parser.add_argument("--dense", type=int, default=2**18, metavar="N", help="dense attention is timed up to here")
    parser.add_argument("--seconds", type=float, default=150, metavar="S", help="begin nothing that would end later")


def main(options, record: Record) -> None:
    """Every length that the time allows, shortest first, then where sparse beats dense."""
    ends, taus = time.perf_counter() + options.seconds, {}
    building.before(options, record, building.of_ours(SETTINGS.values()))
    for n in sorted(options.length):
        with record.section(f"N={n}"), record.attempt("scaling", ours.shape_text(n)):
            one_length(options, n, taus, ends, record)
    crossings = crossings_of(record.report["cases"])
    record.put(crossings=crossings)
    print("\nlength from which the whole call is faster, interpolated between measured ones")
    for name, n in crossings.items():
        print(f"  than {name}: {'not reached' if n is None else f'{n:.0f}'}")


def expected(cases: list[dict], wanted: float, n: int) -> float:
    """Seconds for an error at a length, from the calls at the length before: time goes with its square at most."""
    calls = fastest(cases, wanted)
    return CALLS * 1e-3 * calls[-1]["time"]["median"] * (n / calls[-1]["n"]) ** 2 if calls else 0.0


def one_length(options, n: int, taus: dict, ends: float, record: Record) -> None:
    """Both errors at one length, as far as the time goes; `taus` has the last length's knobs, then this one's."""
    arrays = ours.inputs(options.preset, n)
    p = make_problem(*arrays, Settings())
    where = (ours.shape_text(n), p.dtype)
    rows = sample_rows(n, ROWS, 0)
    exact = exact_rows(p, *arrays, rows).out[0].astype(np.float64)
    rivals, dense = {"dense": None, "cudnn": None}, partial(s2o.dense_attention, *arrays, backend="cuda")
    if n <= options.dense:
        rivals["dense"] = dense_time("s2o_cupy dense_attention", n, record, where, lambda: dense)
        rivals["cudnn"] = dense_time(CUDNN, n, record, where, partial(cudnn, arrays, p.scale))

    earlier = record.report["cases"]
    for wanted in ERRORS:
        needed, left = expected(earlier, wanted, n), ends - time.perf_counter()
        if needed > left:
            note = f"about {needed:.0f} s, {left:.0f} of --seconds {options.seconds:g} left"
            record.case("scaling", *where, note=f"not measured at error {wanted}: {note}", n=n)
            continue
        best = fastest(earlier, wanted)[-1:] if n > ALL_UPTO else ()
        for name in [case["name"] for case in best] or SETTINGS:
            attention = partial(s2o.attention, settings=SETTINGS[name], backend="cuda")
            met, least = meet(attention, arrays, rows, exact, wanted, taus.get((name, wanted)), n >= PART_FROM)
            if met is None:
                record.case(name, *where, note=f"cannot reach error {wanted}: {least:.4f}", n=n)
                continue
            tau, error, (density, path) = met
            taus[name, wanted] = tau
            call = partial(attention, *arrays, tau=tau)
            timed = on_device([call], 10, 0, least=2, enough=ENOUGH)
            shares, memory = stage_shares(call)
            note = f"error {wanted}: {path}, " + ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
            note += f", {memory / 2**30:.2f} GiB"
            if rivals["cudnn"]:
                note += f", cuDNN takes {rivals['cudnn'] / timed.median:.2f} times as long"
            record.case(
                name, *where, time=timed, note=note, density=density, error=error, n=n, wanted=wanted, tau=tau,
                tflops=timed.rate(4 * p.dim_qk * density * ours.causal_pairs(n)), shares=shares, bytes=memory,
                path=path, settings=SETTINGS[name].as_dict(), **rivals,
                ratio=rivals["dense"] / timed.median if rivals["dense"] else None,
            )  # fmt: skip


def meet(attention, arrays, rows, exact, wanted: float, start: float | None, part_first: bool):
    """What `Sweep.meet` found for a whole call's tau, and the least error seen.

    With `part_first` a sweep over a few heads says where the one over all heads begins.
    """

    def over(heads_kv: int, start: float | None) -> Sweep:
        q, k, v = arrays
        heads = heads_kv * (q.shape[1] // k.shape[1])
        some = (q[:, :heads], k[:, :heads_kv], v[:, :heads_kv])

        def measure(tau):
            found = attention(*some, tau=tau, full_output=True)
            return ours.rows_error(found.out, rows, exact[:heads]), (found.stats.density, found.stats.path)

        return Sweep(measure, 1e-5, 10.0, start=start or 3e-3)

    if part_first:
        found = over(2, start).meet(wanted)
        start = found[0] if found else start
    sweep = over(arrays[1].shape[1], start)
    return sweep.meet(wanted), sweep.least_error


def dense_time(name: str, n: int, record: Record, where: tuple, make) -> float | None:
    """Milliseconds of a dense call; None, and a line, where it is missing or fails."""
    with record.attempt(name, *where, catch=(Exception,)):
        timed = on_device([make()], 10, 1, least=2, enough=ENOUGH)
        record.case(name, *where, time=timed, density=1.0, tflops=timed.rate(4 * ours.DIM * ours.causal_pairs(n)), n=n)
        return timed.median
    return None


def cudnn(arrays, scale: float):
    """cuDNN's attention through PyTorch."""
    import torch

    from bench import rivals

    return rivals.dense_peers(*(torch.from_dlpack(x[0]) for x in arrays), scale)[CUDNN]()


def stage_shares(call) -> tuple[dict[str, float], int]:
    """Share of a call's device time that each of the backend's stages takes, and what lies between them.

    Also the bytes that CuPy's pool takes from the device during that call, its answer included.
    """
    import cupy

    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    with timed_stages() as spans:
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        call()
        stop.record()
        stop.synchronize()
    whole, held = cupy.cuda.get_elapsed_time(start, stop), pool.total_bytes() - before
    parts = dict.fromkeys(STAGES, 0.0)
    for name, first, last in spans:
        parts[name] += cupy.cuda.get_elapsed_time(first, last) / whole
    return {name: part for name, part in parts.items() if part} | {"between": 1 - sum(parts.values())}, held


@contextmanager
def timed_stages() -> Iterator[list]:
    """Within, every stage of the CUDA backend leaves (name, event before, event after) in the list.

    Calls then go stage by stage, where the backend would launch all of one at once.
    """
    import cupy

    from s2o_cupy.backends import cuda

    spans, stages = [], {name: getattr(cuda, name) for name in (*STAGES, "ranked")}

    def timed(name):
        def run(*arguments, **options):
            first, last = cupy.cuda.Event(), cupy.cuda.Event()
            first.record()
            answer = stages[name](*arguments, **options)
            last.record()
            spans.append((name, first, last))
            return answer

        return run

    try:
        for name in STAGES:
            setattr(cuda, name, timed(name))
        cuda.ranked = partial(planning.ranked, cuda)
        yield spans
    finally:
        for name, stage in stages.items():
            setattr(cuda, name, stage)
