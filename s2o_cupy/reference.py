"""The specification (docs/design.md section 2) in float64 NumPy: readable, slow, the judge of every backend."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from s2o_cupy.problem import Problem
from s2o_cupy.settings import MOST_LIFT


def dense(problem: Problem, q, k, v):
    """Exact attention. Returns out (B, Hq, Nq, Dv) and lse (B, Hq, Nq), float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((problem.batch, problem.heads_q, problem.n_q, v.shape[-1]))
    lse = np.full(out.shape[:-1], -np.inf)
    keys = np.arange(problem.n_k)
    for b, h in np.ndindex(problem.batch, problem.heads_q):
        kv = h // problem.group
        for i in range(problem.n_q):
            age = i + problem.shift - keys
            seen = (age >= 0) & (age < problem.window) if problem.settings.causal else keys >= 0
            softmax = Softmax(problem, q[b, h, i : i + 1], v.shape[-1])
            softmax.add(k[b, kv][seen], v[b, kv][seen])
            out[b, h, i], lse[b, h, i] = softmax.out[0], softmax.lse[0]
    return out, lse


def plan(problem: Problem, q, k):
    """Stages 1 and 2: kv_order (1-D int32), kv_offsets (B, Ho, segments + 1), query_order (B, Hq, Nq) or None."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    lists = []
    for b, order_head, s in np.ndindex(problem.batch, problem.heads_order, problem.segments):
        scores = score(problem, q, k, b, order_head, s)
        lists.append(remap(scores, problem.listed[s], problem.settings.rank_levels))
    offsets = problem.offsets(problem.whole).reshape(problem.batch, problem.heads_order, problem.segments + 1)
    order = np.concatenate([np.zeros(0, np.int32), *lists]).astype(np.int32)
    return order, offsets, guide(problem, q, k) if problem.settings.query_order == "guide" else None


def score(problem: Problem, q, k, b: int, order_head: int, s: int) -> np.ndarray:
    """Stage 1: the score of each history key of one list, in natural-log units.

    ``rank="mean"`` (paper section 3.2) takes the first cumulant of ``log E_q exp(scale q . k)`` over the segment's
    queries, ``"gaussian"`` the first two; ``"mixture"`` is `mixture_score`.
    """
    queries, keys = list_rows(problem, q, k, b, order_head, s)
    with np.errstate(all="ignore"):
        if problem.settings.rank == "mixture":
            return mixture_score(queries, keys, problem.terms, problem.scale)
        mean = queries.mean(axis=0)
        scores = problem.scale * (keys @ mean)
        if problem.terms:
            factors = covariance_factors(queries - mean, problem.terms)
            scores += problem.scale**2 / 2 * ((keys @ factors) ** 2).sum(axis=1)
    return scores


def list_rows(problem: Problem, q, k, b: int, order_head: int, s: int) -> tuple[np.ndarray, np.ndarray]:
    """What a list is ranked by and of: its finite queries (one of zeros where there is none), its history's keys."""
    heads = problem.group // problem.orders
    queries = q[b, order_head * heads : (order_head + 1) * heads][:, _rows(problem, s)].reshape(-1, problem.dim_qk)
    queries = queries[np.isfinite(queries).all(axis=1)]
    if not len(queries):
        queries = np.zeros((1, problem.dim_qk))
    return queries, k[b, order_head // problem.orders, : problem.history[s]]


def covariance_factors(centred: np.ndarray, terms: int) -> np.ndarray:
    """F (D, terms) with ``F Fᵀ`` the covariance of the rows, or near to it by one subspace-iteration step."""
    covariance = centred.T @ centred / len(centred)
    axes = np.argsort(-np.diag(covariance), kind="stable")[:terms]
    basis, _ = np.linalg.qr(covariance[:, axes])
    values, vectors = np.linalg.eigh(basis.T @ covariance @ basis)
    return basis @ vectors * np.sqrt(np.maximum(values, 0))


def mixture_score(queries: np.ndarray, keys: np.ndarray, terms: int, scale: float) -> np.ndarray:
    """Log of the root mean square over the queries of a key's probability, the queries grouped around centres.

    Each of `terms` centres gives a key the logit of a Gaussian around it, with one diagonal variance for all, and
    the logits are normalised over the history before their squares are averaged.
    """
    centres, group = query_centres(queries, terms)
    variance = ((queries - centres[group]) ** 2).mean(axis=0)
    logits = scale * keys @ centres.T + (scale**2 / 2 * keys**2 @ variance)[:, None]
    share = np.log(np.bincount(group, minlength=len(centres)) / len(queries))
    return np.logaddexp.reduce(2 * (logits - np.logaddexp.reduce(logits, axis=0)) + share, axis=1) / 2


def query_centres(queries: np.ndarray, terms: int) -> tuple[np.ndarray, np.ndarray]:
    """One k-means step from evenly spaced queries: centres (terms, D), and the group of each query before it.

    Ties go to the smaller group; an empty group keeps its centre.
    """
    terms, n = min(terms, len(queries)), len(queries)
    centres = queries[np.arange(terms) * n // terms + n // (2 * terms)].copy()
    group = (queries @ centres.T - (centres**2).sum(axis=1) / 2).argmax(axis=1)
    for g in np.unique(group):
        centres[g] = queries[group == g].mean(axis=0)
    return centres, group


def remap(scores: np.ndarray, listed: int, levels: int | None) -> np.ndarray:
    """Stage 2: the first `listed` keys by descending score, ties by smaller index.

    With `levels`, finite scores are first quantised, in float32, to equal steps between the list's
    least and greatest. +inf leads, -inf and NaN close.
    """
    scores = np.asarray(scores, np.float32)
    finite = np.isfinite(scores)
    rank = np.where(finite, -scores, np.where(scores == np.inf, -np.inf, np.inf))
    if levels is not None and finite.any():
        high, low = scores[finite].max(), scores[finite].min()
        with np.errstate(all="ignore"):
            factor = np.float32(levels) / np.float32(high - low)
        if np.isfinite(factor) and factor > 0:
            level = ((high - scores[finite]) * factor).astype(np.int64)
            rank[finite] = np.minimum(level, levels - 1)
        else:
            rank[finite] = 0
    return np.argsort(rank, kind="stable")[:listed].astype(np.int32)


def guide(problem: Problem, q, k) -> np.ndarray:
    """The paper's order of the queries inside a segment: descending ``q . g``, g the mean history key."""
    order = np.empty((problem.batch, problem.heads_q, problem.n_q), np.int32)
    for b, h, s in np.ndindex(problem.batch, problem.heads_q, problem.segments):
        rows, history = _rows(problem, s), k[b, h // problem.group, : problem.history[s]]
        with np.errstate(all="ignore"):
            g = history.mean(axis=0) if len(history) else np.zeros(problem.dim_qk)
            order[b, h, rows] = rows[remap(q[b, h, rows] @ g, len(rows), None)]
    return order


def pool(problem: Problem, x) -> np.ndarray:
    """Means (B, Hkv, blocks, D) of whole pool blocks; a history's partial last block over the keys it has."""
    x, size = np.asarray(x, np.float64), problem.settings.pool
    out = np.zeros((*x.shape[:2], problem.pool_blocks, x.shape[-1]))
    for block in range(problem.pool_blocks):
        with np.errstate(all="ignore"):
            out[:, :, block] = x[:, :, block * size : (block + 1) * size].mean(axis=2)
    return out


def pool_spread(problem: Problem, k) -> np.ndarray:
    """Variances (B, Hkv, blocks, D) of the keys around their own pool block's mean, over all blocks up to each."""
    size, out = problem.settings.pool, np.zeros((*k.shape[:2], problem.pool_blocks, k.shape[-1]))
    total = np.zeros((*k.shape[:2], k.shape[-1]))
    for block in range(problem.pool_blocks):
        with np.errstate(all="ignore"):
            keys = k[:, :, block * size : (block + 1) * size]
            total = total + ((keys - keys.mean(axis=2, keepdims=True)) ** 2).sum(axis=2)
            out[:, :, block] = total / min((block + 1) * size, k.shape[2])
    return out


def row_lift(q: np.ndarray, variance: np.ndarray, scale: float) -> np.ndarray:
    """What `tail="spread"` adds to the pooled logits of one row tile, q (rows, D), variance (D,): at most MOST_LIFT.

    For a key k around its block's mean, with `variance`, it is the second cumulant of ``scale (q - q̄)·k``; q̄ is the
    mean of the finite rows. A row that is not finite has 0, as all have behind a key that is not.
    """
    finite = np.isfinite(q).all(axis=1)
    lift = np.zeros(len(q))
    if not finite.any():
        return lift
    with np.errstate(all="ignore"):
        away = q[finite] - q[finite].mean(axis=0)
        lift[finite] = np.minimum(scale**2 / 2 * (away**2 * variance).sum(axis=1), MOST_LIFT)
    return np.where(np.isnan(lift), 0, lift)


def attend(problem: Problem, q, k, v, kv_order, kv_offsets, query_order=None, softmax=None):
    """Stage 3 over a plan. Returns out, lse, tiles, tail_blocks and tail_mass.

    `softmax` makes a row tile's `Softmax`; tests put one in its place that rounds as a kernel does.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    heads = (problem.batch, problem.heads_q)
    answer = SimpleNamespace(
        out=np.zeros((*heads, problem.n_q, v.shape[-1])),
        lse=np.full((*heads, problem.n_q), -np.inf),
        tiles=np.zeros((*heads, len(problem.tile_start)), np.int32),
        tail_blocks=np.zeros((*heads, len(problem.tile_start)), np.int32),
        tail_mass=np.zeros((*heads, problem.n_q)),
    )
    pooled = pool(problem, k), pool(problem, v)
    spread = pool_spread(problem, k) if problem.settings.tail == "spread" else None
    for b, h, tile in np.ndindex(answer.tiles.shape):
        s, kv = problem.tile_segment[tile], h // problem.group
        start, stop = kv_offsets[b, h // (problem.group // problem.orders), s : s + 2]
        rows = problem.tile_start[tile] + np.arange(problem.tile_rows[tile])
        if query_order is not None:
            rows = query_order[b, h, rows]
        head = SimpleNamespace(k=k[b, kv], v=v[b, kv], k_pool=pooled[0][b, kv], v_pool=pooled[1][b, kv])
        head.spread = None if spread is None else spread[b, kv]
        sums = (softmax or Softmax)(problem, q[b, h, rows], v.shape[-1])
        tiles, blocks, tail = _row_tile(problem, sums, head, rows, s, kv_order[start:stop], problem.tau[h])
        answer.out[b, h, rows], answer.lse[b, h, rows] = sums.out, sums.lse
        answer.tiles[b, h, tile], answer.tail_blocks[b, h, tile] = tiles, blocks
        answer.tail_mass[b, h, rows] = tail
    return answer


def _row_tile(problem, softmax, head, rows, s, ranked, tau):
    """One row tile's walk: seen window, ranked history with the stop, tail, masked window."""
    settings, history = problem.settings, int(problem.history[s])
    position = rows + problem.shift

    # 1. Window keys that every row sees: the mask lets all of them through.
    first = int(position.min()) if settings.causal else history
    if settings.window is None:
        softmax.add(head.k[history:first], head.v[history:first])
    else:  # none is sought: a window's keys are all masked, in step 4
        first = max(first + 1 - settings.window, 0)

    # 2. Ranked history, key tile by key tile, until one adds too little to every row.
    tiles, ceiling = 0, None
    while tiles * settings.block_k < len(ranked):
        keys = ranked[tiles * settings.block_k : (tiles + 1) * settings.block_k]
        gain = softmax.add(head.k[keys], head.v[keys])
        ceiling = softmax.mean_logit(len(keys))
        tiles += 1
        if gain < tau:
            break

    # 3. Tail: every block that still has a quarter of its keys enters as one pooled key, each of its keys at
    #    most as heavy as the mean key of the last tile walked: the ranking put them behind it.
    size = np.bincount(np.arange(history) // settings.pool, minlength=len(head.k_pool))
    left = size - np.bincount(ranked[: tiles * settings.block_k] // settings.pool, minlength=len(size))
    blocks = np.flatnonzero((4 * left >= size) & (size > 0)) if settings.tail else np.zeros(0, np.int64)
    before = softmax.mass.copy()
    frame = softmax.max.copy()
    lift = None
    if settings.tail == "spread" and tiles:
        lift = row_lift(softmax.q, head.spread[-(-history // settings.pool) - 1], problem.scale)
        lift *= (left.sum() / history) ** 2
    softmax.add(head.k_pool[blocks], head.v_pool[blocks], bias=np.log(left[blocks]), ceiling=ceiling, lift=lift)
    with np.errstate(all="ignore"):
        tail = np.where(softmax.mass > 0, softmax.mass - before * np.exp(frame - softmax.safe_max), 0)

    # 4. The remaining window keys, masked: a row's future, and with a window its past. Last, so that no vote has seen
    #    a hidden key.
    at_tail = softmax.max.copy()
    last = int(position.max()) + 1 if settings.causal else history
    age = position[:, None] - np.arange(first, last)
    softmax.add(head.k[first:last], head.v[first:last], seen=(age >= 0) & (age < problem.window))
    with np.errstate(all="ignore"):
        tail = tail * np.exp(at_tail - softmax.safe_max) / softmax.mass
    return tiles, len(blocks), np.where(tail > 0, tail, 0) if len(blocks) else np.zeros(len(rows))


class Softmax:
    """Online softmax of a few query rows: running max, mass and weighted sum of values."""

    def __init__(self, problem: Problem, q, dim_v: int):
        self.q, self.scale = q, problem.scale
        self.max = np.full(len(q), -np.inf)
        self.mass = np.zeros(len(q))
        self.sum = np.zeros((len(q), dim_v))
        self.poison = ~np.isfinite(q).all(axis=1)

    @property
    def safe_max(self):
        """A frame that can be subtracted from -inf."""
        return np.where(self.max == -np.inf, 0, self.max)

    def add(self, k, v, bias=None, ceiling=None, lift=None, seen=None) -> float:
        """Add keys; returns the gain: the greatest share that they add to a voting row's mass."""
        if not len(k):
            return 0.0
        with np.errstate(all="ignore"):
            logit = self.scale * (self.q @ k.T)
            if lift is not None:
                logit = logit + lift[:, None]
            if ceiling is not None:
                logit = np.minimum(logit, ceiling[:, None])
            if bias is not None:
                logit = logit + bias
            if seen is not None:
                logit = np.where(seen, logit, -np.inf)
            old, frame = self.max, np.maximum(self.max, logit.max(axis=1))
            self.max = frame
            weight = np.exp(logit - self.safe_max[:, None])
            shrink = np.where(old == -np.inf, 0, np.exp(old - self.safe_max))
            before, added = self.mass * shrink, weight.sum(axis=1)
            self.mass, self.added = before + added, added
            self.collect(logit, weight, shrink, v, seen)
            gain = np.where(before > 0, added / before, np.inf)
        votes = ~self.poison & np.isfinite(self.mass) & np.isfinite(frame)
        return float(gain[votes].max()) if votes.any() else 0.0

    def collect(self, logit, weight, shrink, v, seen) -> None:
        """Add the values; what was summed before shrinks."""
        if seen is None or np.isfinite(v).all():
            values = weight @ v
        else:  # a hidden NaN must not reach a row through 0 * NaN
            values = (weight[..., None] * np.where(seen[..., None], v, 0)).sum(axis=1)
        self.sum = self.sum * shrink[:, None] + values

    def mean_logit(self, keys: int):
        """The log of the mean weight of the `keys` keys added last."""
        with np.errstate(all="ignore"):
            return self.safe_max + np.log(self.added / keys)

    @property
    def out(self):
        with np.errstate(all="ignore"):
            out = np.where(self.mass[:, None] == 0, 0, self.sum / self.mass[:, None])
        out[self.poison] = np.nan
        return out

    @property
    def lse(self):
        with np.errstate(all="ignore"):
            lse = np.where(self.mass == 0, -np.inf, self.max + np.log(self.mass))
        lse[self.poison] = np.nan
        return lse


def _rows(problem: Problem, s: int) -> np.ndarray:
    return np.arange(s * problem.settings.segment, min((s + 1) * problem.settings.segment, problem.n_q))
