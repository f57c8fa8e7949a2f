"""The specification with the roundings that the 16-bit kernels make, and how near to it an answer has to lie.

Inputs are exact and so are their products. What a kernel rounds to 16 bits is rounded here, in float64 and at the same
place: weights before they multiply values, in the frame that they are multiplied in; pool means; the rows of stage 1
and its squared keys; scores. The last rounding, of what a kernel writes, is left to `miss`, which takes half a unit
off. What is left is float32: the order of sums, exponentials, and roundings that fall to the other side for it.
"""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace

import ml_dtypes
import numpy as np

from s2o_cupy import reference, specialisations
from s2o_cupy.problem import Problem

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
HALVES = ("float16", "bfloat16")

# How far an answer may lie beyond the rounding of what is written (`miss`; lse and tail mass: differences), and why.
TOLERANCE = {
    # Sums of weights times values in float32, and 1 in some hundred (float16) or thousand (bfloat16) weights that falls
    # to the other side, because its logit is 1e-6 off: one heavy weight of a row in 400 is 6e-6 and 5e-5. Without the
    # rounding of weights it would be 3e-5 and 3e-4.
    "out": {"float16": 1.2e-5, "bfloat16": 1e-4, "float32": 3e-6, "float64": 1e-12},
    # Logits of up to some 20 in float32, and their exponentials by ex2.approx, 2 units off; float64's exp2 and log.
    "lse": {"float16": 2e-5, "bfloat16": 2e-5, "float32": 2e-5, "float64": 1e-11},
    # A difference of two sums in float32, and the share itself is float32 for every dtype.
    "tail_mass": {"float16": 1e-5, "bfloat16": 1e-5, "float32": 1e-5, "float64": 1e-6},
    # Of lists' scores against their spread: mean and factors come of float32, so that 1 in some hundred (float16) of
    # their elements falls to the other side: 1e-6 or less in most lists, 8e-5 in one of 36. Without their rounding
    # 1e-4 (5e-5 in a full covariance) and 8e-4 or more. Scores of float32 and float64 inputs are float32.
    "scores": {"float16": 4e-5, "bfloat16": 1e-4, "float32": 2e-5, "float64": 2e-6},
    # The same, and the quadratic term, rounded to half by itself, falls to the other side in 1 key of some thousand: a
    # thousandth of the spread there. Without the rounding of centres and squares 3e-4 to 2e-3 and 8e-4 to 2e-3.
    "mixture": {"float16": 2e-4, "bfloat16": 4e-4, "float32": 2e-5, "float64": 2e-6},
    # Of whole calls whose roundings are not followed (two answers, or float64 beside an answer): weights and the answer
    # rounded once each; half a unit, uniform, is .29 units root mean square.
    "rounded twice": {"float16": 5e-4, "bfloat16": 4e-3, "float32": 3e-6, "float64": 1e-12},
}
_BITS = {"float16": (11, -24), "bfloat16": (8, -133), "float32": (24, -149), "float64": (53, -1074)}


def narrow(x, dtype: str) -> np.ndarray:
    """Float64 numbers rounded to nearest in a dtype, as float64."""
    return np.asarray(x).astype(DTYPES[dtype]).astype(np.float64)


def unit(x, dtype: str) -> np.ndarray:
    """The distance from numbers to their neighbours in a dtype."""
    digits, least = _BITS[dtype]
    _, exponent = np.frexp(np.asarray(x, np.float64))
    return np.exp2(np.maximum(exponent - digits, least).astype(np.float64))


def miss(got, want, dtype: str, scale=None) -> float:
    """How far an answer of a dtype lies beyond the rounding of `want`, in root mean squares of `scale` (`want`)."""
    got, want = np.asarray(got).astype(np.float64), np.asarray(want, np.float64)
    with np.errstate(invalid="ignore"):
        beyond = np.maximum(np.abs(got - want) - unit(np.maximum(np.abs(got), np.abs(want)), dtype) / 2, 0)
    return float(np.linalg.norm(beyond[got != want]) / max(np.linalg.norm(want if scale is None else scale), 1e-300))


def check_scores(p: Problem, got: list, want: list) -> None:
    """Lists of scores, as the kernels of `p` keep them, are `want` from `score`, all lists taken together."""
    assert [np.shape(x) for x in got] == [x.shape for x in want]
    kept = "float16" if p.dtype in HALVES else "float32"
    spread = np.concatenate([x - x.mean() if np.ptp(x) else x for x in want if x.size] or [np.zeros(0)])
    allowed = TOLERANCE["mixture" if p.settings.rank == "mixture" else "scores"][p.dtype]
    assert miss(np.concatenate(got), np.concatenate(want), kept, spread) <= allowed


def check_answer(p: Problem, got, want) -> None:
    """Stage 3's `got` is `want` from `attend` or `dense`, in rows that are finite there."""
    good = np.isfinite(want.out).all(axis=-1)
    np.testing.assert_array_equal(np.isfinite(np.asarray(got.out).astype(np.float32)).all(axis=-1), good)
    assert miss(got.out[good], want.out[good], p.dtype) <= TOLERANCE["out"][p.dtype]
    for name in ("lse", "tail_mass"):
        if hasattr(got, name) and hasattr(want, name):
            allowed, x, y = TOLERANCE[name][p.dtype], getattr(got, name)[good], getattr(want, name)[good]
            np.testing.assert_allclose(x, y, rtol=0, atol=allowed, err_msg=name)


# --- stage 3 ------------------------------------------------------------------------------------------
class Rounding(reference.Softmax):
    """Weights rounded before they multiply values, a step of keys at a time, in the frame at the step's end.

    `step`: keys that a kernel multiplies at once; `across`: a step may hold the end of a key tile and the next's start.
    """

    def __init__(self, problem: Problem, q, dim_v: int, step: int, across: bool, weights=True, means=True):
        super().__init__(problem, q, dim_v)
        self.dtype, self.step, self.across = problem.dtype, step, across
        self.weights, self.means, self.parts = weights, means, []

    def add(self, k, v, bias=None, ceiling=None, lift=None, seen=None) -> float:
        if bias is not None and self.means:
            k, v = narrow(k, self.dtype), narrow(v, self.dtype)
        return super().add(k, v, bias, ceiling, lift, seen)

    def collect(self, logit, weight, shrink, v, seen) -> None:
        self.parts.append(SimpleNamespace(logit=logit, v=v, seen=seen, ranked=False))

    def mean_logit(self, keys: int):
        self.parts[-1].ranked = True  # asked after each tile of the history, of nothing else
        return super().mean_logit(keys)

    def steps(self):
        """Logits, values and masks of each step."""
        for ranked, parts in itertools.groupby(self.parts, lambda part: part.ranked):
            parts = list(parts)
            if ranked and self.across:
                logit = np.concatenate([part.logit for part in parts], axis=1)
                parts = [SimpleNamespace(logit=logit, v=np.concatenate([part.v for part in parts]), seen=None)]
            for part in parts:
                for start in range(0, len(part.v), self.step):
                    here = slice(start, start + self.step)
                    yield part.logit[:, here], part.v[here], None if part.seen is None else part.seen[:, here]

    @property
    def out(self):
        self.max, self.sum = np.full_like(self.max, -np.inf), np.zeros_like(self.sum)
        for logit, v, seen in self.steps():
            with np.errstate(all="ignore"):
                old, self.max = self.max, np.maximum(self.max, logit.max(axis=1))
                weight = np.exp(logit - self.safe_max[:, None])
                shrink = np.where(old == -np.inf, 0, np.exp(old - self.safe_max))
                super().collect(logit, narrow(weight, self.dtype) if self.weights else weight, shrink, v, seen)
        return super().out


def steps_of(p: Problem, arch: str, query_order: bool = False, aligned: bool = True) -> dict:
    """`step` and `across` of the kernel that attends along lists; nothing for dtypes that no weight is rounded for."""
    s, sizes = p.settings, (p.dtype, p.dim_qk, p.dim_v)
    if p.dtype not in HALVES:
        return {}
    beside = p.group > p.orders == 1 and (not query_order or p.tiles_per_segment == 1)
    if aligned and specialisations.sm90_serves(arch, *sizes, s.block_q, s.pool, beside):
        macros = specialisations.sm90_macros(*sizes, s.block_k)
        return {"step": macros["BLOCK_N"], "across": macros["PARTS"] == 2}
    return {"step": specialisations.attend_macros(*sizes, s.block_q, arch)["BLOCK_N"], "across": False}


def attend(p: Problem, q, k, v, order, offsets, query_order=None, **rounding):
    """`reference.attend` with a `Rounding`, out not rounded yet; without arguments for that, float64 throughout."""
    softmax = functools.partial(Rounding, **rounding) if rounding else None
    offsets = offsets.reshape(p.batch, p.heads_order, -1)
    with np.errstate(invalid="ignore"):
        return reference.attend(p, q, k, v, order, offsets, query_order, softmax)


def dense(p: Problem, q, k, v, block_q: int, **rounding):
    """`reference.dense` with a `Rounding`, for a kernel that walks row tiles of `block_q`; the same without."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    if not rounding:
        with np.errstate(invalid="ignore"):
            out, lse = reference.dense(p, q, k, v)
        return SimpleNamespace(out=out, lse=lse)
    out, lse = np.zeros((p.batch, p.heads_q, p.n_q, v.shape[-1])), np.zeros((p.batch, p.heads_q, p.n_q))
    for b, h, start in itertools.product(range(p.batch), range(p.heads_q), range(0, p.n_q, block_q)):
        rows = slice(start, min(start + block_q, p.n_q))
        age = np.arange(rows.start, rows.stop)[:, None] + p.shift - np.arange(p.n_k)
        seen = (age >= 0) & (age < p.window) if p.settings.causal else age == age
        sums, keys = Rounding(p, q[b, h, rows], v.shape[-1], **rounding), np.flatnonzero(seen.any(axis=0))
        cut = keys[0] if p.settings.causal and age[-1, 0] >= p.window else age[0, 0] if p.settings.causal else p.n_k
        for part, mask in ((slice(keys[0], cut), None), (slice(cut, keys[-1] + 1), seen)):
            sums.add(k[b, h // p.group, part], v[b, h // p.group, part], seen=None if mask is None else mask[:, part])
        with np.errstate(invalid="ignore"):
            out[b, h, rows], lse[b, h, rows] = sums.out, sums.lse
    return SimpleNamespace(out=out, lse=lse)


# --- stage 1 ------------------------------------------------------------------------------------------
def score(p: Problem, q, k, b: int, order_head: int, s: int, rows: bool = True) -> np.ndarray:
    """`reference.score` with the rows that a kernel multiplies keys with rounded, unless not `rows`."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    if p.dtype not in HALVES or not rows:
        return reference.score(p, q, k, b, order_head, s)
    queries, keys = reference.list_rows(p, q, k, b, order_head, s)
    if p.settings.rank == "mixture":
        return _mixture(p, queries, keys)
    mean, covariance = p.scale * queries.mean(axis=0), np.cov(queries.T, bias=True).reshape(p.dim_qk, -1)
    if p.terms == p.dim_qk:
        return ((keys @ narrow(p.scale**2 / 2 * covariance, p.dtype) + mean) * keys).sum(axis=1)
    scores = keys @ narrow(mean, p.dtype)
    if p.terms:
        scores += ((keys @ narrow(_factors(covariance, p.terms) * p.scale / np.sqrt(2), p.dtype)) ** 2).sum(axis=1)
    return scores


def _factors(covariance: np.ndarray, terms: int) -> np.ndarray:
    """`reference.covariance_factors` in the columns that factor.cuh takes: by Gram-Schmidt, then by Cholesky."""
    basis, root = np.zeros((len(covariance), terms)), np.zeros((terms, terms))
    for t, axis in enumerate(np.argsort(-np.diag(covariance), kind="stable")[:terms]):
        x = covariance[:, axis] / max(np.linalg.norm(covariance[:, axis]), 1e-300)
        for _ in range(2):
            x = x - basis @ (basis.T @ x)
        if x @ x > 1e-10:  # else it depends on those before it
            basis[:, t] = x / np.linalg.norm(x)
    ritz = basis.T @ covariance @ basis
    least = 1e-6 * np.diag(ritz).max()
    for t in range(terms):
        if ritz[t, t] > least:
            root[:, t] = ritz[:, t] / np.sqrt(ritz[t, t])
            ritz = ritz - np.outer(root[:, t], root[:, t])
    return basis @ root


def _mixture(p: Problem, queries, keys) -> np.ndarray:
    """`reference.mixture_score`, centres in the inputs' type, squares in bfloat16 and the quadratic term in half."""
    centres, group = reference.query_centres(queries, p.terms)
    variance = p.scale**2 / 2 * ((queries - centres[group]) ** 2).mean(axis=0)
    quadratic = narrow(narrow(keys**2, "bfloat16") @ narrow(variance, "bfloat16"), "float16")
    with np.errstate(divide="ignore"):
        share = np.log(np.bincount(group, minlength=len(centres)) / len(queries))
    linear = p.scale * keys @ narrow(centres, p.dtype).T
    sums = np.logaddexp.reduce(linear + quadratic[:, None], axis=0)
    return quadratic + np.logaddexp.reduce(2 * (linear - sums) + share, axis=1) / 2
