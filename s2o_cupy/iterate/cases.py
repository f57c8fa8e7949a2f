"""What a stage's kernel is judged by: small awkward calls, the float64 reference's answers, and what rounding allows.

A case runs one stage of a backend module (score, remap, pool, attend or dense) on arrays of its kind. Every element
of every answer is compared; the worst is the one that uses the most of what it is allowed. The reference is asked once
in a process: its answers are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from s2o_cupy import reference
from s2o_cupy.problem import Problem
from s2o_cupy.settings import Settings

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
HALVES = ("float16", "bfloat16")
# Twice the greatest relative error of one rounding to the input's type, and of the arithmetic in between.
UNIT = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
ARITHMETIC = {"float16": 2.0**-23, "bfloat16": 2.0**-23, "float32": 2.0**-23, "float64": 2.0**-51}
MIXTURE_ERROR = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 2e-5, "float64": 2e-6}
STAGES = {
    "moments": "score", "score": "score", "score_sm90": "score", "score_simt": "score",
    "remap": "remap", "pool": "pool", "attend": "attend", "attend_sm90": "attend",
    "attend_simt": "attend",
}  # fmt: skip


@dataclass(frozen=True)
class Focus:
    """Which arrays a specialisation serves."""

    dtype: str
    dim: int
    dim_v: int
    block_q: int
    block_k: int = 64
    dense: bool = True  # whether it is what dense attention is compiled as


def focus(name: str, macros: dict) -> Focus:
    """The arrays that a kernel under these ``-D`` macros is for; bfloat16 and head dim 128 where they do not say."""
    for macro in ("HEAD_DIM", "HEAD_DIM_V", "WIDTH", "WIDEST", "BLOCK_M", "BLOCK_N"):
        if macro in macros and not (isinstance(macros[macro], int) and 1 <= macros[macro] <= 256):
            raise ValueError(f"-D {macro}={macros[macro]}: allowed: 1 to 256")
    dtype = "float32" if name.endswith("_simt") else "bfloat16"
    if "REAL" in macros:
        dtype = "float64" if macros["REAL"] == "double" else "float32"
    elif "IS_BF16" in macros:
        dtype = "bfloat16" if macros["IS_BF16"] else "float16"
    elif not macros.get("SCORE_HALF", 1):
        dtype = "float32"
    dim = macros.get("HEAD_DIM", macros.get("WIDTH", macros.get("WIDEST", 128)))
    block_k = macros.get("BLOCK_N", 64) // macros.get("PARTS", 1) if name == "attend_sm90" else 64
    block_q = min(macros.get("BLOCK_M", 128), 128)
    dense = name != "attend_sm90" or block_k == 128
    return Focus(dtype, dim, min(macros.get("HEAD_DIM_V", dim), 256), block_q, block_k, dense)


@dataclass(frozen=True)
class Worst:
    """The element of an answer that uses the most of its allowance."""

    array: str
    index: tuple[int, ...]
    got: float
    wanted: float
    allowed: float
    share: float

    def __str__(self) -> str:
        place = f"{self.array}[{', '.join(map(str, self.index))}]"
        return f"{place}: got {self.got:.6g}, wanted {self.wanted:.6g}, allowed off by {self.allowed:.2g}"


@dataclass(frozen=True)
class Sizes:
    """How large the cases are: a GPU takes more than an emulated one, and Numba's simulator least."""

    heads_q: int
    heads_kv: int
    n_q: int
    n_k: int
    segment: int
    block_q: int
    block_k: int
    pool: int
    dim: int  # at most


ON_GPU = Sizes(4, 2, 300, 400, 128, 128, 64, 32, 256)
EMULATED = Sizes(2, 1, 90, 130, 48, 32, 16, 16, 24)
SIMULATED = Sizes(2, 1, 10, 14, 6, 4, 3, 2, 4)


@dataclass(frozen=True)
class Case:
    """One call of a stage.

    Attributes
    ----------
    label : its name
    ask : runs it on an engine; the answer, on the host
    judge : compares an answer: (array, got, wanted, allowed), one array after the other
    prepare : asks the reference, which `judge` otherwise does
    """

    label: str
    ask: Callable[[Any], Any]
    judge: Callable[[Any], Iterator[tuple[str, np.ndarray, np.ndarray, Any]]]
    prepare: Callable[[], Any]


@functools.cache
def cases(stage: str, at: Focus, sizes: Sizes) -> list[Case]:
    """The cases of a stage: "score", "remap", "pool" or "attend"."""
    makers = {"score": _score_cases, "remap": _remap_cases, "pool": _pool_cases, "attend": _attend_cases}
    return makers[stage](at, sizes)


def worst_of(compared) -> Worst | None:
    """The worst element; `share` above 1 where it is off by more than allowed. None where nothing was compared."""
    worst = None
    for array, got, wanted, allowed in compared:
        if got.shape != wanted.shape:
            raise ValueError(f"{array} has shape {got.shape}; wanted {wanted.shape}")
        if not got.size:
            continue
        got, wanted = got.astype(np.float64), wanted.astype(np.float64)
        allowed = np.broadcast_to(np.asarray(allowed, np.float64), wanted.shape)
        with np.errstate(all="ignore"):
            off = np.where((got == wanted) | (np.isnan(got) & np.isnan(wanted)), 0, np.abs(got - wanted))
            share = np.where(off == 0, 0, off / allowed)
            share = np.where(np.isnan(share), np.inf, share)
        place = np.unravel_index(int(share.argmax()), share.shape)
        if worst is None or share[place] > worst.share:
            numbers = (float(x[place]) for x in (got, wanted, allowed, share))
            worst = Worst(array, tuple(map(int, place)), *numbers)
    return worst


# --- inputs ---------------------------------------------------------------------------------------
def _problem(at: Focus, sizes: Sizes, dims=None, **settings) -> Problem:
    s = {
        "segment": sizes.segment,
        "block_k": max(sizes.block_k, at.block_k if sizes is ON_GPU else 0),
        "pool": sizes.pool,
        "tau": 0.2,
        "rank_terms": 7,
    }
    s |= {"block_q": min(at.block_q, sizes.block_q), **settings}
    dim, dim_v = dims or (min(at.dim, sizes.dim), min(at.dim_v, sizes.dim))
    return Problem(1, sizes.heads_q, sizes.heads_kv, sizes.n_q, sizes.n_k, dim, dim_v, at.dtype, Settings(**s))


def _arrays(p: Problem, seed: int = 0, gain: float = 1.0):
    """q, k and v with structure: some directions stronger, each head's queries around a mean of their own."""
    rng, kind = np.random.default_rng(seed), DTYPES[p.dtype]
    mix = rng.standard_normal((p.dim_qk, p.dim_qk)) / np.sqrt(p.dim_qk) * np.exp(rng.standard_normal(p.dim_qk) / 2)
    q = rng.standard_normal((p.batch, p.heads_q, p.n_q, p.dim_qk)) @ mix
    q = gain * (q + rng.standard_normal((p.batch, p.heads_q, 1, p.dim_qk)))
    k = rng.standard_normal((p.batch, p.heads_kv, p.n_k, p.dim_qk))
    return [x.astype(kind) for x in (q, k, rng.standard_normal((*k.shape[:3], p.dim_v)))]


def _wide(*arrays):
    return [x.astype(np.float64) for x in arrays]


def _placed(engine, x: np.ndarray):
    return engine.place(x)


def _beside(engine, x: np.ndarray):
    """`x` as a view inside a wider array of sevens: rows that do not start on 16 bytes, gaps between them."""
    wider = np.full((*x.shape[:3], x.shape[3] + 5), 7, x.dtype)
    wider[..., 1 : 1 + x.shape[3]] = x
    return engine.place(wider)[..., 1 : 1 + x.shape[3]]


# --- pool -----------------------------------------------------------------------------------------
def _pool_cases(at: Focus, sizes: Sizes) -> list[Case]:
    def case(what, dims, beside=False, **settings):
        p, label = _problem(at, sizes, dims, causal=False, **settings), f"{what}, head dims {dims[0]} and {dims[1]}"

        @functools.cache
        def known():
            _, k, v = _arrays(p)
            return [(x, reference.pool(p, x), reference.pool(p, np.abs(x))) for x in (k, v)]

        def ask(engine):
            place = _beside if beside else _placed
            return [engine.host(mean) for mean in engine.pool(p, *(place(engine, x) for x in _arrays(p)[1:]))]

        def judge(means):
            if len(means) > 2:
                _, k, _ = _arrays(p)
                keys = np.minimum(np.arange(1, p.pool_blocks + 1) * p.settings.pool, p.n_k)
                wanted = reference.pool_spread(p, *_wide(k)) * keys[:, None]
                yield "k_spread", means[2].reshape(wanted.shape), wanted, 16 * ARITHMETIC[p.dtype] * wanted
            for name, mean, (x, wanted, sizes_of) in zip(("k_pool", "v_pool"), means, known()):
                got = mean.reshape(*wanted.shape[:3], -1)
                allowed = UNIT[p.dtype] * np.abs(wanted) + 4 * ARITHMETIC[p.dtype] * sizes_of
                yield name, got[..., : x.shape[3]], wanted, allowed
                yield f"{name}, columns past the head dim", got[..., x.shape[3] :], 0 * got[..., x.shape[3] :], 0

        return Case(label, ask, judge, known)

    most = min(256, sizes.dim)
    return [
        case("whole blocks", (min(128, most),) * 2),
        case("a partial last block, rows off 16 bytes", (min(33, most), min(17, most)), beside=True, tail="spread"),
        case("one key a block", (min(64, most), 8 if most > 8 else most), pool=1),
        case("one block for all keys", (most, most), pool=512),
    ]


# --- score ----------------------------------------------------------------------------------------
def _score_cases(at: Focus, sizes: Sizes) -> list[Case]:
    def case(label, dims=None, bad_query=False, **settings):
        p = _problem(at, sizes, dims, **settings)

        @functools.cache
        def inputs():
            q, k, _ = _arrays(p)
            if bad_query:
                q[0, 1, p.n_q // 2, 0] = np.nan
            return q, k

        @functools.cache
        def known():
            exact, found = _wide(*inputs()), []
            for b, o, s in np.ndindex(p.batch, p.heads_order, p.segments):
                if p.history[s]:
                    wanted = reference.score(p, *exact, b, o, s)
                    found.append((o, s, wanted, _score_error(p, *exact, b, o, s, wanted)))
            return found

        def ask(engine):
            return engine.scores(p, *map(engine.place, inputs()))

        def judge(scores):
            for o, s, wanted, allowed in known():
                yield f"score of list ({o}, {s})", scores(o, s), wanted, allowed

        return Case(label, ask, judge, known)

    small = min(at.dim, sizes.dim)
    dim = (small - 3 if small > 64 else max(small - 1, 1),) * 2
    found = [
        case("mean rank", rank="mean"),
        case("gaussian of 7 terms, causal", rank_terms=7),
        case("gaussian of 15 terms, not causal, head dim off", dim, rank_terms=15, causal=False),
        case("one order for a group, a query that is NaN", share_order=True, bad_query=True),
    ]
    found.append(case("a mixture of 5 centres", rank="mixture", rank_terms=5))
    found.append(case("a mixture of every query, not causal", rank="mixture", rank_terms=None, causal=False))
    full = small in (64, 128) or at.dtype not in HALVES
    return [*found, case("the full covariance", rank_terms=None)] if full else found


def _score_error(p: Problem, q, k, b, o, s, wanted) -> np.ndarray:
    """What rounding the mean and the factors, and storing the scores, may change in each."""
    if p.settings.rank == "mixture":  # of the scores' spread: squared keys and centres are rounded too
        return MIXTURE_ERROR[p.dtype] * max(float(np.ptp(wanted)), 1e-9)
    kv, size = o // p.orders, p.settings.segment
    heads = p.group // p.orders
    queries = q[b, o * heads : (o + 1) * heads, s * size : (s + 1) * size].reshape(-1, p.dim_qk)
    queries = queries[np.isfinite(queries).all(axis=1)]
    mean, keys = queries.mean(axis=0), k[b, kv, : len(wanted)]
    lengths = np.linalg.norm(keys, axis=1)
    allowed = p.scale * np.linalg.norm(mean) * lengths
    if p.terms:
        spread = np.sqrt(((queries - mean) ** 2).sum(axis=1).mean())
        square = np.maximum(wanted - p.scale * keys @ mean, 0)  # scale^2 / 2 of the factors' squared products
        allowed = allowed + p.scale * np.sqrt(2 * square) * spread * lengths + (p.scale * spread * lengths) ** 2 / 64
    unit = {"float16": 2.0**-10, "bfloat16": 2.0**-8, "float32": 2.0**-18, "float64": 2.0**-18}[p.dtype]
    return unit * allowed + (2.0**-10 if p.dtype in HALVES else 2.0**-22) * np.abs(wanted)


# --- remap ----------------------------------------------------------------------------------------
def _remap_cases(at: Focus, sizes: Sizes) -> list[Case]:
    kind = np.float16 if at.dtype in HALVES else np.float32

    def case(label, keys, make, **settings):
        s = Settings(causal=False, segment=2, rank="mean", **settings)
        p = Problem(1, 2, 2, 2, keys, 2, 2, at.dtype, s)

        @functools.cache
        def scores():
            return np.stack([make(np.random.default_rng(h), keys) for h in range(2)]).astype(kind)

        @functools.cache
        def known():
            return [reference.remap(one, int(p.listed[0]), s.rank_levels) for one in scores()]

        def ask(engine):
            return engine.order(p, scores())

        def judge(got):
            for h, wanted in enumerate(known()):
                yield f"kv_order of list {h}", got[h], wanted, 0

        return Case(label, ask, judge, known)

    def special(rng, n):
        x = np.round(rng.standard_normal(n) * 4)
        x[:: max(n // 7, 1)], x[1 :: max(n // 5, 1)] = np.inf, np.nan
        x[2 :: max(n // 6, 1)], x[3 :: max(n // 9, 1)] = -np.inf, -0.0
        return x

    long = {ON_GPU: 20_000, EMULATED: 700, SIMULATED: 20}[sizes]
    found = [
        case("1024 levels", long, lambda rng, n: rng.standard_normal(n), rank_levels=1024),
        case("exact order", long // 2, lambda rng, n: rng.standard_normal(n), rank_levels=None),
        case("ties, infinities, NaN, both zeros", min(long, 5001), special, rank_levels=64),
        case("the same, exact", min(long, 5001), special, rank_levels=None),
        case("equal scores, cap .3", min(long, 333), lambda rng, n: np.ones(n), rank_levels=1024, cap=0.3),
        case("one key", 1, lambda rng, n: rng.standard_normal(n)),
    ]
    if sizes is ON_GPU:
        found.append(case("a list of 70,000 keys", 70_000, lambda rng, n: rng.standard_normal(n)))
        found.append(case("60,000 levels", 9000, lambda rng, n: rng.standard_normal(n), rank_levels=60_000))
    return found


# --- attend ---------------------------------------------------------------------------------------
def _attend_cases(at: Focus, sizes: Sizes) -> list[Case]:
    def case(label, dims=None, gain=1.0, beside=False, bad=False, twice=False, **settings):
        p = _problem(at, sizes, dims, **settings)

        @functools.cache
        def inputs():
            q, k, v = _arrays(p, gain=gain)
            if bad:
                q[0, 1, p.n_q // 2, 0], v[0, 0, p.n_k - 2, 0] = np.nan, np.inf
            return q, k, v, *reference.plan(p.replace(rank="mean"), q, k)

        @functools.cache
        def known(factor=1.0):
            """The reference's answer, and its answer for the values' sizes, with tau times `factor`."""
            q, k, v, *plan = inputs()
            changed = p if factor == 1 else p.replace(tau=(p.tau * factor).tolist())
            with np.errstate(all="ignore"):
                return tuple(reference.attend(changed, q, k, x, *plan) for x in (v, np.abs(v.astype(np.float64))))

        def ask(engine):
            place, (*arrays, order, offsets, rows) = _beside if beside else _placed, inputs()
            placed = [place(engine, x) for x in arrays]
            return [
                engine.attend(p, *placed, order, offsets, rows, second=again) for again in (False, True)[: 1 + twice]
            ]

        def judge(answers):
            q, k, v, _, _, rows = inputs()
            yield from _judged(p, q, k, v, rows, known, answers[0])
            for again in answers[1:]:
                yield "out, run again (bitwise)", again.out, answers[0].out, 0
                yield "lse, run again (bitwise)", again.lse, answers[0].lse, 0

        return Case(label, ask, judge, known)

    def dense():
        p = _problem(at, sizes)

        @functools.cache
        def known():
            q, k, v = _arrays(p)
            return q, k, v, *reference.dense(p, q, k, v), reference.dense(p, q, k, np.abs(v.astype(np.float64)))[0]

        def ask(engine):
            return engine.dense(p, *map(engine.place, _arrays(p)))

        def judge(got):
            q, k, v, out, lse, among = known()
            error = _logit_error(p, q, k)
            yield "out", got.out, out, _out_error(p, v, out, among, error, 0)
            yield "lse", got.lse, lse, _lse_error(p, error)

        return Case("dense attention", ask, judge, known)

    small = min(at.dim, sizes.dim), min(at.dim_v, sizes.dim)
    off = tuple(n - 3 if n > 32 else max(n - 1, 1) for n in small)
    odd = {128: 72, 64: 37}[at.block_q] if sizes is ON_GPU else min(sizes.block_q, 20)  # the same specialisation
    odd_keys = 11 if at.block_k == 64 else at.block_k
    found = [
        case("causal, pooled tail, twice", twice=True),
        case("not causal", causal=False),
        case("no tail, guide order", tail=None, query_order="guide"),
        case("spread tail, tau 2", tail="spread", tau=2.0),
        case("spread tail, not causal, guide order", tail="spread", tau=2.0, causal=False, query_order="guide"),
        case("tau=0: every key", tau=0.0),
        case(
            "cap .4, odd tiles and head dims, rows off 16 bytes",
            off,
            beside=True,
            cap=0.4,
            block_k=odd_keys,
            block_q=odd,
        ),
        case("a NaN query, an infinite value", bad=True),
        case("large logits, tau a head", gain=6.0, tau=tuple(np.linspace(0.01, 0.5, sizes.heads_q).tolist())),
    ]
    return [*found, dense()] if at.dense else found


def _judged(p: Problem, q, k, v, rows, known, got):
    """An answer beside the reference's; a stop may differ where the reference's own is undecided to rounding."""
    error = _logit_error(p, q, k)
    nudge = max(4 * error, 0.01 if p.dtype in HALVES else 0)
    with np.errstate(all="ignore"):
        want, among = (SimpleNamespace(**{name: x.copy() for name, x in vars(one).items()}) for one in known())
        for factor in (1 + nudge, max(1 - nudge, 0)):
            if (want.tiles == got.tiles).all():
                break
            other = known(factor)
            for b, h, tile in np.argwhere((want.tiles != got.tiles) & (other[0].tiles == got.tiles)):
                at = p.tile_start[tile] + np.arange(p.tile_rows[tile])
                at = at if rows is None else rows[b, h, at]
                for mine, theirs in zip((want, among), other):
                    for name in ("out", "lse", "tail_mass"):
                        getattr(mine, name)[b, h, at] = getattr(theirs, name)[b, h, at]
                    for name in ("tiles", "tail_blocks"):
                        getattr(mine, name)[b, h, tile] = getattr(theirs, name)[b, h, tile]
        tail = np.where(np.isfinite(want.tail_mass), want.tail_mass, 0)
        pooled = tail * _pooled_error(p, q, k)
    yield "tiles", got.tiles, want.tiles, 0
    yield "tail_blocks", got.tail_blocks, want.tail_blocks, 0
    sound = np.isfinite(want.out).all(axis=-1)
    bad_query = ~np.isfinite(q.astype(np.float64)).all(axis=-1)
    yield "isnan(out) of a NaN query", np.isnan(got.out.astype(np.float64)).all(-1)[bad_query], bad_query[bad_query], 0
    keep = np.where(sound, 1.0, np.nan)  # rows that may be NaN are compared nowhere
    out_error = _out_error(p, v, want.out, among.out, error, pooled[..., None])
    yield "out", got.out.astype(np.float64) * keep[..., None], want.out * keep[..., None], out_error
    yield "lse", got.lse * keep, want.lse * keep, _lse_error(p, error) + pooled
    mass_error = 2 * error + UNIT[p.dtype] * tail + 2 * pooled + 1e-6
    yield "tail_mass", got.tail_mass * keep, want.tail_mass * keep, mass_error


def _products(p: Problem, q, k) -> float:
    """The greatest scale * sum |q| |k| over finite pairs."""
    q, k = (np.abs(np.where(np.isfinite(x), x, 0)) for x in _wide(q, k))
    return p.scale * float((q @ np.repeat(k, p.group, axis=1).swapaxes(2, 3)).max(initial=0))


def _logit_error(p: Problem, q, k) -> float:
    """Bound on the error of a logit, and of the relative error of a weight, from arithmetic alone."""
    return 4 * ARITHMETIC[p.dtype] * (8 + max(1, np.sqrt(p.dim_qk) / 2) * _products(p, q, k))


def _pooled_error(p: Problem, q, k) -> float:
    """Bound on the relative error of a pooled key's weight: block means are rounded to the input's type."""
    if p.settings.tail is None:
        return 0.0
    error = _lift_error(p, q, k) if p.settings.tail == "spread" else 0.0
    if p.dtype in HALVES:
        error += UNIT[p.dtype] / 2 * _products(p, q, reference.pool(p, k))
    return float(np.expm1(min(error, 10)))


def _lift_error(p: Problem, q, k) -> float:
    """Bound on the error of what the spread tail adds to a logit: a row lies at most twice the greatest from a mean."""
    q, k = (np.where(np.isfinite(x), x, 0) for x in _wide(q, k))
    farthest = 2 * np.abs(q).max(axis=2, initial=0)
    variance = np.repeat(reference.pool_spread(p, k).max(axis=2, initial=0), p.group, axis=1)
    lift = p.scale**2 / 2 * (farthest**2 * variance).sum(axis=-1).max(initial=0)
    return 4 * ARITHMETIC[p.dtype] * (8 + np.sqrt(p.dim_qk)) * min(lift, reference.MOST_LIFT)


def _out_error(p: Problem, v, out, among, error, pooled):
    """Weights are rounded to the input's type, each times its value; then the output once. `among`: mean |value|."""
    greatest = np.abs(np.where(np.isfinite(v.astype(np.float64)), v.astype(np.float64), 0)).max(initial=0)
    return UNIT[p.dtype] / 2 * (among + np.abs(out)) + 2 * (error + pooled) * greatest + 1e-30


def _lse_error(p: Problem, error) -> float:
    return error + (5e-4 if p.dtype in HALVES else ARITHMETIC[p.dtype] * 64)
