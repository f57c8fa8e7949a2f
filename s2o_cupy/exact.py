"""Exact attention of sampled query rows and row tiles, and a sparse answer beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from s2o_cupy.arrays import namespace, native, on_host
from s2o_cupy.problem import Problem
from s2o_cupy.results import AttentionResult
from s2o_cupy.settings import integer

_ROWS, _LOGITS = 512, 2**22  # query rows, and logits, held at a time


def relative_error(out, exact):
    """``|out - exact|_F / |exact|_F`` of each head.

    Parameters
    ----------
    out, exact : array (..., N, Dv)
        Any float dtype, same shape and device; compared in float64.

    Returns
    -------
    float64 array (...)
        The leading axes' shape; 0 where both are zero.

    Examples
    --------
    >>> import numpy as np
    >>> float(relative_error(np.array([[3.0, 4.4]]), np.array([[3.0, 4.0]])).round(3))
    0.08
    """
    xp = namespace(out)
    if out.shape != exact.shape:
        raise ValueError(f"out has shape {out.shape} and exact {exact.shape}; allowed: the same")
    gap, norm = xp.empty(out.shape[:-2]), xp.empty(out.shape[:-2])
    for lead in np.ndindex(out.shape[:-2]):
        wanted = exact[lead].astype(np.float64)
        gap[lead] = ((out[lead].astype(np.float64) - wanted) ** 2).sum()
        norm[lead] = (wanted**2).sum()
    return xp.sqrt(gap / xp.where(norm > 0, norm, 1))


def sample_rows(n_q: int, rows: int, seed: int) -> np.ndarray:
    """Sorted row indices, one drawn from each of `rows` equal runs; all rows where there are no more."""
    rows, seed = integer("rows", rows, 1, 2**31), integer("seed", seed, 0, 2**63)
    if rows >= n_q:
        return np.arange(n_q)
    edges = np.linspace(0, n_q, rows + 1).astype(np.int64)
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:])


@dataclass(frozen=True)
class ExactRows:
    """Exact attention of some query rows: out (B, Hq, rows, Dv) and lse (B, Hq, rows), in the compute dtype."""

    rows: np.ndarray
    out: Any
    lse: Any


def exact_rows(problem: Problem, q, k, v, rows: np.ndarray) -> ExactRows:
    """Exact attention of the query rows `rows` (ascending), a tile of logits at a time, where the arrays are."""
    xp, dtype = namespace(q), problem.compute_dtype
    out = xp.empty((problem.batch, problem.heads_q, len(rows), problem.dim_v), dtype)
    lse = xp.empty(out.shape[:-1], dtype)
    for b, kv in np.ndindex(problem.batch, problem.heads_kv):
        heads = slice(kv * problem.group, (kv + 1) * problem.group)
        for start in range(0, len(rows), _ROWS):
            part = slice(start, start + _ROWS)
            queries = q[b, heads][:, xp.asarray(rows[part])].astype(dtype) * dtype.type(problem.scale)
            seen, position = slice(None), None
            if problem.settings.causal:
                first = max(int(rows[part][0]) + problem.shift + 1 - problem.window, 0)
                seen = slice(first, int(rows[part][-1]) + problem.shift + 1)
                position = xp.asarray(rows[part] + problem.shift - first)[:, None]
            out[b, heads, part], lse[b, heads, part] = _online_softmax(
                queries, k[b, kv, seen], v[b, kv, seen], position, problem.window
            )
    return ExactRows(rows, out, lse)


def _online_softmax(queries, k, v, position, window):
    """out and lse of scaled queries (G, rows, D) over k and v, a run of keys at a time.

    `position`, where it is not None, hides later keys and those `window` or more before.
    """
    xp, dtype = namespace(queries), queries.dtype
    high, mass, total = -np.inf, dtype.type(0), dtype.type(0)
    run = max(_LOGITS // (queries.shape[0] * queries.shape[1]), 256)
    for start in range(0, len(k), run):
        logit = queries @ k[start : start + run].astype(dtype).T
        if position is not None:
            age = position - xp.arange(start, start + logit.shape[-1])
            xp.copyto(logit, dtype.type(-np.inf), where=(age < 0) | (age >= window))
        frame = xp.maximum(high, logit.max(axis=-1, keepdims=True))
        finite = xp.where(frame == -np.inf, dtype.type(0), frame)  # a row may see no key of its first runs
        shrink = xp.exp(high - finite)
        logit -= finite
        weight = xp.exp(logit, out=logit)
        mass = mass * shrink + weight.sum(axis=-1, keepdims=True)
        total = total * shrink + weight @ v[start : start + run].astype(dtype)
        high = frame
    return total / mass, (high + xp.log(mass))[..., 0]


def compare_rows(problem: Problem, result: AttentionResult, exact: ExactRows) -> RowErrors:
    """The sampled rows of an answer beside the exact ones."""
    heads, picked = (problem.batch, problem.heads_q), namespace(exact.out).asarray(exact.rows)
    out = native("out", result.out).reshape(*heads, problem.n_q, -1)[:, :, picked].astype(np.float64)
    lse = native("lse", result.lse).reshape(*heads, -1)[:, :, picked].astype(np.float64)
    tail = result.stats.tail_mass.reshape(*heads, -1)[:, :, picked].astype(np.float64)
    wanted, xp = exact.out.astype(np.float64), namespace(exact.out)
    captured = (1 - tail) * xp.exp(lse - exact.lse)
    sums = (((out - wanted) ** 2).sum(-1), (wanted**2).sum(-1), (out * wanted).sum(-1), (out**2).sum(-1), captured)
    return RowErrors(*map(on_host, sums), exact.rows)


@dataclass(frozen=True)
class RowErrors:
    """Sampled query rows of a sparse answer beside the exact ones, all NumPy float64 of shape (B, Hq, rows).

    Attributes
    ----------
    gap, norm : squared L2 norm of (out - exact), and of exact
    dot, length : inner product of out and exact, squared norm of out
    captured : share of the exact softmax mass that was walked
    rows : int64 (rows,), the sampled rows
    """

    gap: np.ndarray
    norm: np.ndarray
    dot: np.ndarray
    length: np.ndarray
    captured: np.ndarray
    rows: np.ndarray

    @property
    def relative(self) -> np.ndarray:
        """(B, Hq) relative L2 error."""
        return np.sqrt(self.gap.sum(axis=-1) / positive(self.norm.sum(axis=-1)))

    @property
    def relative_rows(self) -> np.ndarray:
        """(B, Hq, rows) relative L2 error of each row."""
        return np.sqrt(self.gap / positive(self.norm))

    @property
    def cosine_rows(self) -> np.ndarray:
        """(B, Hq, rows) cosine of each row; 1 where it and the exact one are both zero."""
        both = np.sqrt(self.norm) * np.sqrt(self.length)
        return np.where((self.norm == 0) & (self.length == 0), 1, self.dot / positive(both))


def tile_mass(
    q, k, rows: int, *, causal: bool = True, scale: float | None = None, segment: int | None = None
) -> np.ndarray:
    """Mean softmax probability of every key, over each run of `rows` queries of one head.

    Parameters
    ----------
    q : array (Nq, D)
    k : array (Nk, D)
    rows : int
        Queries averaged over: a row tile.
    segment : int, optional
        Queries after which runs start anew, as row tiles do; matters where `rows` does not divide it.

    Returns
    -------
    float32 array (runs, Nk)
        Each row sums to 1.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    n_q, n_k = len(q), len(k)
    keys = np.asarray(k, np.float32).T * np.float32(scale)
    segment = segment or max(n_q, 1)
    starts = [start for s in range(0, n_q, segment) for start in range(s, min(s + segment, n_q), rows)]
    mass = np.zeros((len(starts), n_k), np.float32)
    for tile, (start, stop) in enumerate(zip(starts, [*starts[1:], n_q], strict=True)):
        block = np.asarray(q[start:stop], np.float32)
        seen = stop + n_k - n_q if causal else n_k
        logit = block @ keys[:, :seen]
        if causal:
            position = np.arange(start, start + len(block))[:, None] + n_k - n_q
            logit[np.arange(seen) > position] = -np.inf
        np.exp(logit - logit.max(axis=1, keepdims=True), out=logit)
        mass[tile, :seen] = (logit / logit.sum(axis=1, keepdims=True)).mean(axis=0)
    return mass


def positive(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, np.finfo(np.float64).tiny)
