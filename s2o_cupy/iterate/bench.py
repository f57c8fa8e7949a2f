"""A kernel timed in turn with the one it is compared against, on one long call of its stage, by CUDA events.

The launches of each are recorded from the real backend once and played again, so no host work is timed. Before every
one the L2 cache is overwritten. What the device could do at best, its floor, is measured beside: a copy for bytes, a
matrix product for arithmetic.
"""

from __future__ import annotations

import functools
import time
from types import SimpleNamespace

import numpy as np

from s2o_cupy.iterate.cases import DTYPES, HALVES, Focus
from s2o_cupy.problem import Problem
from s2o_cupy.settings import Settings

KEYS = 32768
SECONDS = 1.2  # of timed and untimed launches, about
_SLOWEST = 200  # milliseconds: above, a turn is timed 3 times only


def problem(stage: str, at: Focus, name: str = "", keys: int = KEYS) -> Problem:
    """The call that is timed: 32 query heads, 8 K/V heads, causal, 32768 keys (a quarter of the heads in float32)."""
    heads = (32, 8) if at.dtype in HALVES else (8, 2)
    s = Settings(rank_terms=15, block_q=at.block_q, block_k=at.block_k, segment=512, pool=256)
    if stage == "attend":  # every row tile walks a tenth of its history: the same work for every variant
        s = s.replace(tau=0.0, cap=0.1)
    if name == "score" and at.dim <= 128:  # Hopper's own kernel serves the other ranks
        s = s.replace(rank="mean")
    if name == "mixture":
        s = s.replace(rank="mixture")
    return Problem(1, *heads, keys, keys, at.dim, at.dim_v, at.dtype, s)


def prepared(engine, stage: str, p: Problem) -> SimpleNamespace:
    """What the stage of a call needs, on the device: arrays, and scores or a plan where it comes later."""
    xp = engine.xp
    made = SimpleNamespace(**_inputs(xp, p))
    offsets = p.offsets(p.whole)
    if stage in ("remap", "attend"):
        made.offsets = xp.asarray(offsets)
        made.order = xp.empty(int(offsets[-1, -1]), np.int32)
        made.scores = engine.backend.score(p, made.q, made.k, p.whole)
    if stage == "attend":
        engine.backend.remap(p, made.scores, p.whole, made.offsets, made.order)
        made.scores, made.pooled = None, engine.backend.pool(p, made.k, made.v)
    return made


@functools.lru_cache(maxsize=1)
def _inputs(xp, p: Problem) -> dict:
    """q, k and v of standard normal numbers, kept for the next variant."""
    rng = xp.random.default_rng(0)

    def normal(heads, rows, dim):
        return rng.standard_normal((1, heads, rows, dim), dtype=np.float32).astype(DTYPES[p.dtype])

    of_keys = {name: normal(p.heads_kv, p.n_k, dim) for name, dim in (("k", p.dim_qk), ("v", p.dim_v))}
    return {"q": normal(p.heads_q, p.n_q, p.dim_qk), **of_keys}


def run(engine, stage: str, p: Problem, made) -> object:
    """The stage once, through the backend; what it answers."""
    if stage == "pool":
        return engine.backend.pool(p, made.k, made.v)
    if stage == "score":
        return engine.backend.score(p, made.q, made.k, p.whole)
    if stage == "remap":
        return engine.backend.remap(p, made.scores, p.whole, made.offsets, made.order)
    answer = engine.answer(p)
    arrays = (p, made.q, made.k, made.v, p.whole, made.order, made.offsets, None, made.pooled, answer)
    return engine.backend.attend(*arrays) or answer


def in_turn(xp, mine, other, budget_s: float = SECONDS) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds of two lists of launches, timed in turn: mine, other, other, mine, ..."""
    properties = xp.cuda.runtime.getDeviceProperties(xp.cuda.runtime.getDevice())
    flush = xp.empty(2 * max(properties["l2CacheSize"], 2**24), np.uint8)

    def once(launches):
        flush.fill(0)
        start, stop = xp.cuda.Event(), xp.cuda.Event()
        start.record()
        for launch in launches:
            launch()
        stop.record()
        stop.synchronize()
        return xp.cuda.get_elapsed_time(start, stop)

    pair = [once(mine) + once(other) for _ in range(2)][-1]
    begin, times = time.perf_counter(), ([], [])
    while len(times[0]) < 3 or (pair < _SLOWEST and time.perf_counter() - begin < budget_s and len(times[0]) < 60):
        turn = ((0, mine), (1, other)) if len(times[0]) % 2 == 0 else ((1, other), (0, mine))
        for which, launches in turn:
            times[which].append(once(launches))
    return np.array(times[0]), np.array(times[1])


def compared(mine: np.ndarray, other: np.ndarray) -> dict:
    """Medians, and the ratio other / mine (above 1: mine is faster) turn by turn: median, 10th and 90th percentile."""
    ratio = np.percentile(other / mine, [50, 10, 90])
    return {
        "ms": float(np.median(mine)),
        "other_ms": float(np.median(other)),
        "ratio": ratio[0],
        "low": ratio[1],
        "high": ratio[2],
        "turns": len(mine),
    }


# --- the floor ------------------------------------------------------------------------------------
def floor(xp, stage: str, name: str, p: Problem) -> dict:
    """The least milliseconds that this work takes here: bytes at a copy's rate, or arithmetic at a product's."""
    traffic, flops = _work(stage, name, p)
    by_bytes = traffic / copy_rate(xp) * 1e3
    by_flops = flops / product_rate(xp, p.dtype) * 1e3 if flops else 0.0
    if by_bytes >= by_flops:
        return {"ms": by_bytes, "why": f"{traffic / 1e6:.0f} MB at a copy's {copy_rate(xp) / 1e12:.2f} TB/s"}
    rate = product_rate(xp, p.dtype) / 1e12
    return {"ms": by_flops, "why": f"{flops / 1e9:.0f} GFLOP at a matrix product's {rate:.0f} TFLOP/s"}


def _work(stage: str, name: str, p: Problem) -> tuple[float, float]:
    """Bytes that must move, and operations, of the launches of one kernel file."""
    size = np.dtype(DTYPES[p.dtype]).itemsize
    keys, heads = p.n_k * p.heads_kv, p.heads_order
    scores = int(p.history.sum()) * heads
    score_bytes = 2 if p.dtype in HALVES else 4
    second_moment = 2.0 * p.n_q * p.heads_q * p.dim_qk**2
    if stage == "pool":
        return keys * (p.dim_qk + p.dim_v) * size * (1 + 1 / p.settings.pool), 0
    if name == "moments":
        return p.n_q * p.heads_q * p.dim_qk * size, second_moment
    if stage == "score":
        rows = 2 * p.terms + 1 if p.settings.rank == "mixture" else 1 + p.terms  # the mixture's product is done twice
        flops = 2.0 * scores * rows * p.dim_qk
        return keys * p.dim_qk * size + scores * score_bytes, flops + (second_moment if name == "score_simt" else 0)
    if stage == "remap":
        return scores * (score_bytes + 4), 0
    walked = (p.listed[p.tile_segment] * p.tile_rows).sum() + p.window_pairs.sum()
    traffic = size * (p.n_q * p.heads_q * (p.dim_qk + p.dim_v) + keys * (p.dim_qk + p.dim_v))
    return traffic, 2.0 * p.heads_q * float(walked) * (p.dim_qk + p.dim_v)


@functools.cache
def copy_rate(xp) -> float:
    """Bytes a second that a copy of 1 GiB reads and writes, together."""
    source, to = xp.empty(2**30, np.uint8), xp.empty(2**30, np.uint8)
    return 2 * source.nbytes / _seconds(xp, lambda: xp.copyto(to, source))


@functools.cache
def product_rate(xp, dtype: str) -> float:
    """Operations a second of a square matrix product in this type (float16 stands for bfloat16)."""
    n = 8192 if dtype in HALVES else 4096
    a = xp.ones((n, n), np.float16 if dtype in HALVES else dtype)
    to = xp.empty_like(a)
    return 2 * n**3 / _seconds(xp, lambda: xp.matmul(a, a, out=to))


def _seconds(xp, call) -> float:
    times = []
    for _ in range(6):
        start, stop = xp.cuda.Event(), xp.cuda.Event()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(xp.cuda.get_elapsed_time(start, stop))
    return float(np.median(times[2:])) / 1e3
