"""Other methods' selections, from their descriptions, as density against error on one causal head.

Each takes q (N, D), k (N, D), v (N, Dv) of any float dtype and computes in float32; N need be no multiple of a block,
and the last one is then short. Density counts unmasked (query, key) pairs over allowed pairs, as the package does.
A threshold is a share of mass in [0, 1]; 1 takes everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

BLOCK = 128  # queries and keys of a tile
PBS_SEGMENT = 256  # keys that PBS-Attn sorts among themselves
THRESHOLDS = tuple(1 - np.geomspace(0.9, 1e-4, 40))


@dataclass(frozen=True)
class Points:
    """Density and squared error of one head along a method's knob: density and gap (points,), norm a number."""

    density: np.ndarray
    gap: np.ndarray
    norm: float

    @classmethod
    def pooled(cls, heads: list[Points]) -> Points:
        """Several heads as one: mean density, summed squared error, at each value of the knob."""
        density = np.mean([x.density for x in heads], axis=0)
        return cls(density, np.sum([x.gap for x in heads], axis=0), float(sum(x.norm for x in heads)))

    @property
    def curve(self) -> Curve:
        """The points in order of density, kept where more density lowers the error."""
        order = np.lexsort((self.gap, self.density))
        density, error = self.density[order], np.sqrt(self.gap[order] / (self.norm or 1.0))
        keep = (error < np.concatenate([[np.inf], np.minimum.accumulate(error)[:-1]])) & (error > 0)
        return Curve(density[keep], error[keep])


@dataclass(frozen=True)
class Curve:
    """Density and relative L2 error, densest last; between points the logarithm of the error is linear."""

    density: np.ndarray
    error: np.ndarray

    def error_at(self, density):
        """Relative error at a density; NaN outside of the curve."""
        if not len(self.density):
            return np.full(np.shape(density), np.nan)
        return np.exp(np.interp(density, self.density, np.log(self.error), left=np.nan, right=np.nan))

    def density_at(self, error):
        """Density at a relative error; NaN outside of the curve."""
        if not len(self.density):
            return np.full(np.shape(error), np.nan)
        return np.interp(-np.log(error), -np.log(self.error), self.density, left=np.nan, right=np.nan)


def pbs_attention(q, k, v, scale: float | None = None, thresholds=THRESHOLDS) -> Points:
    """PBS-Attn: keys sorted within segments of 256 by the last 128 queries' mean attention, then block top-CDF."""
    q, k, v = _one_head(q, k, v)
    n = len(k)
    received = _softmax_rows(q[-BLOCK:], k, scale, first=n - min(BLOCK, n)).mean(axis=0)
    order = np.arange(n)
    for start in range(0, n, PBS_SEGMENT):
        part = slice(start, start + PBS_SEGMENT)
        order[part] = start + np.argsort(-received[part], kind="stable")
    return _block_top_cdf(q, k, v, order, PBS_SEGMENT, scale, thresholds)


def block_attention(q, k, v, scale: float | None = None, thresholds=THRESHOLDS) -> Points:
    """Block top-CDF over mean-pooled blocks, keys in position order."""
    q, k, v = _one_head(q, k, v)
    return _block_top_cdf(q, k, v, np.arange(len(k)), BLOCK, scale, thresholds)


def _block_top_cdf(q, k, v, order, segment: int, scale, thresholds) -> Points:
    """Each query block takes the key blocks of greatest pooled probability up to a share; its own segment is dense.

    The block that holds the first token is always taken. `order` permutes keys inside segments only.
    """
    blocks = -(-len(k) // BLOCK)
    pooled = np.stack([k[order[i * BLOCK : (i + 1) * BLOCK]].mean(axis=0) for i in range(blocks)])
    sink = int(np.flatnonzero(order == 0)[0]) // BLOCK

    def choose(start: int, stop: int):
        """Taken key blocks of the query block for each threshold, (thresholds, blocks before its segment)."""
        before = start // segment * segment // BLOCK
        logit = (pooled[:before] @ q[start:stop].mean(axis=0)) * _scale(scale, q)
        weight = np.exp(logit - logit.max(initial=-np.inf))
        ranked = np.argsort(-weight, kind="stable")
        reached = np.cumsum(weight[ranked]) / max(weight.sum(), 1e-30)
        taken = np.zeros((len(thresholds), before), bool)
        for i, threshold in enumerate(thresholds):
            count = before if threshold >= 1 else np.searchsorted(reached, threshold) + 1
            taken[i, ranked[:count]] = True
        if before:
            taken[:, sink] |= sink < before
        return taken

    return _walk_blocks(q, k, v, order, segment, scale, choose)


def _walk_blocks(q, k, v, order, segment: int, scale, choose: Callable) -> Points:
    """Error and density of attending only the chosen blocks of permuted keys, for every choice at once."""
    n, pairs, gap, norm = len(k), 0, 0.0, 0.0
    for start in range(0, n, BLOCK):
        stop, dense_from = min(start + BLOCK, n), start // segment * segment
        taken = choose(start, stop)
        weight = _softmax_rows(q[start:stop], k[:stop], scale, first=start)
        exact = weight @ v[:stop]
        keys = order[:dense_from]
        parts = weight[:, keys].reshape(stop - start, -1, BLOCK)
        mass = parts.sum(axis=2) @ taken.T + weight[:, dense_from:].sum(axis=1, keepdims=True)
        values = np.einsum("rbk,bkd->brd", parts, v[keys].reshape(-1, BLOCK, v.shape[1]), optimize=True)
        total = np.einsum("tb,brd->trd", taken.astype(np.float32), values, optimize=True)
        out = (total + weight[:, dense_from:] @ v[dense_from:stop]) / mass.T[..., None]
        gap = gap + ((out - exact) ** 2).sum(axis=(1, 2), dtype=np.float64)
        norm += float((exact.astype(np.float64) ** 2).sum())
        rows = stop - start
        pairs = pairs + taken.sum(axis=1) * BLOCK * rows + rows * (start - dense_from) + rows * (rows + 1) // 2
    return Points(pairs / (n * (n + 1) / 2), gap, norm)


def oracle(q, k, v, segment: int, block_q: int, block_k: int, pool: int, scale=None, thresholds=THRESHOLDS) -> Points:
    """Keys by the true mean probability of each segment, stopped at the true share of every row's mass; no tail."""
    q, k, v = _one_head(q, k, v)
    thresholds = np.asarray(thresholds)
    n, pairs, gap, norm = len(k), 0, 0.0, 0.0
    for start in range(0, n, segment):
        history = start // pool * pool
        end = min(start + segment, n)
        weights = _softmax_rows(q[start:end], k[:end], scale, first=start)
        order = np.argsort(-weights[:, :history].mean(axis=0), kind="stable")
        for row in range(0, end - start, block_q):
            tile = weights[row : row + block_q]
            rows, first = len(tile), start + row
            exact = tile @ v[:end]
            window = tile[:, history:]
            ranked = tile[:, order]
            edges = np.minimum(np.arange(block_k, history + block_k, block_k), history)
            mass = np.concatenate(
                [np.zeros((rows, 1)), np.cumsum(ranked, axis=1, dtype=np.float64)[:, edges - 1]], axis=1
            )
            mass += window.sum(axis=1, keepdims=True)
            depth = np.searchsorted(mass.min(axis=0), np.minimum(thresholds, mass[:, -1].min()))
            depth = np.where(thresholds >= 1, len(edges), depth)
            walked = np.minimum(depth * block_k, history)
            before = window @ v[history:end]
            outs = [
                (before + ranked[:, :count] @ v[order[:count]]) / mass[:, i, None]
                for i, count in zip(depth, walked, strict=True)
            ]
            gap = gap + ((np.stack(outs) - exact) ** 2).sum(axis=(1, 2), dtype=np.float64)
            norm += float((exact.astype(np.float64) ** 2).sum())
            pairs = pairs + walked * rows + rows * (first - history) + rows * (rows + 1) // 2
    return Points(pairs / (n * (n + 1) / 2), gap, norm)


def _softmax_rows(q, k, scale, first: int) -> np.ndarray:
    """(rows, keys) causal probabilities of the queries at positions `first` and on."""
    logit = (q @ k.T) * np.float32(_scale(scale, q))
    logit[np.arange(len(k)) > first + np.arange(len(q))[:, None]] = -np.inf
    np.exp(logit - logit.max(axis=1, keepdims=True), out=logit)
    logit /= logit.sum(axis=1, keepdims=True)
    return logit


def _one_head(q, k, v):
    """The arrays in float32, refused where they are not one causal head's."""
    if not (q.ndim == k.ndim == v.ndim == 2 and q.shape == k.shape and len(v) == len(k) and len(k)):
        raise ValueError(f"q has shape {q.shape}, k {k.shape}, v {v.shape}; allowed: (N, D), (N, D), (N, Dv), one N")
    return [np.asarray(x, np.float32) for x in (q, k, v)]


def _scale(scale, q) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale
