"""Problem: one call's sizes, positions, segments, lists and row tiles, all derived here, and the checks of shapes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from s2o_cupy.settings import MAX_HEAD_DIM, HashedOnce, Settings, integer

DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class Slab:
    """A rectangle of work: some flattened K/V heads (``b * Hkv + h``) and some segments."""

    kv_start: int
    kv_stop: int
    segment_start: int
    segment_stop: int

    @property
    def segments(self) -> int:
        return self.segment_stop - self.segment_start

    @property
    def size(self) -> int:
        """Segments of all its K/V heads."""
        return (self.kv_stop - self.kv_start) * self.segments


@dataclasses.dataclass(frozen=True)
class Problem(HashedOnce):
    """One call's numbers, all derived here: sizes, positions, histories, lists and row tiles.

    A *list* is the ranking of one (order head, segment): order heads are flattened ``b * Ho + h``,
    with ``Ho = Hq``, or ``Hkv`` when the order is shared. Row tiles are counted through a head.
    """

    batch: int
    heads_q: int
    heads_kv: int
    n_q: int
    n_k: int
    dim_qk: int
    dim_v: int | None
    dtype: str
    settings: Settings

    __hash__ = HashedOnce.__hash__

    def __post_init__(self):
        s = self.settings
        for name in ("batch", "heads_q", "heads_kv", "n_q", "n_k", "dim_qk"):
            integer(name, getattr(self, name), 0, 2**31 - 1)
        if self.heads_kv < 1 or self.heads_q < 1 or self.heads_q % self.heads_kv:
            raise ValueError(
                f"q has {self.heads_q} heads and k has {self.heads_kv}; "
                "allowed: a positive number of q heads that is a multiple of the k heads"
            )
        for name, dim in (("q and k have", self.dim_qk), ("v has", self.dim_v)):
            if dim is not None and not 1 <= dim <= MAX_HEAD_DIM:
                raise ValueError(f"{name} head dim {dim}; supported: 1 to {MAX_HEAD_DIM}")
        if self.dtype not in DTYPES:
            raise TypeError(f"q has dtype {self.dtype}; supported: {', '.join(DTYPES)}")
        if s.causal and self.n_q > self.n_k:
            raise ValueError(
                f"q has {self.n_q} rows and k has {self.n_k}; "
                "causal attention allows at most as many queries as keys (or causal=False)"
            )
        if isinstance(s.tau, tuple) and len(s.tau) != self.heads_q:
            raise ValueError(f"tau has {len(s.tau)} numbers; allowed: one, or one for each of {self.heads_q} q heads")

    def replace(self, **settings) -> Problem:
        """The same arrays under changed settings."""
        return dataclasses.replace(self, settings=self.settings.replace(**settings))

    # --- heads -------------------------------------------------------------------------------
    @property
    def group(self) -> int:
        """Query heads of a K/V head."""
        return self.heads_q // self.heads_kv

    @property
    def orders(self) -> int:
        """Order heads of a K/V head."""
        return 1 if self.settings.share_order else self.group

    @property
    def heads_order(self) -> int:
        return self.heads_kv * self.orders

    @property
    def scale(self) -> float:
        return self.settings.scale if self.settings.scale is not None else 1.0 / math.sqrt(self.dim_qk)

    @property
    def compute_dtype(self) -> np.dtype:
        """float64 for float64 input, else float32; also the type of the LSE."""
        return np.dtype(np.float64 if self.dtype == "float64" else np.float32)

    @cached_property
    def tau(self) -> np.ndarray:
        """(Hq,) float64."""
        return np.broadcast_to(np.asarray(self.settings.tau, np.float64), (self.heads_q,)).copy()

    @property
    def terms(self) -> int:
        """Covariance factors (gaussian, at most D) or centres (mixture, at most the queries); 0 for the mean."""
        s = self.settings
        most = {"mean": 0, "gaussian": self.dim_qk, "mixture": s.segment * (self.group // self.orders)}[s.rank]
        return most if s.rank_terms is None else min(s.rank_terms, most)

    @property
    def window(self) -> int:
        """Keys, its own the last, that a causal query may see: all of them without a window."""
        return min(self.settings.window or self.n_k, self.n_k)

    @cached_property
    def longest(self) -> int:
        """Keys of the longest history."""
        return int(self.history[-1]) if self.segments else 0

    # --- segments ----------------------------------------------------------------------------
    @property
    def segments(self) -> int:
        return -(-self.n_q // self.settings.segment)

    @property
    def shift(self) -> int:
        """Position of query 0: positions count keys from 0."""
        return self.n_k - self.n_q if self.settings.causal else 0

    @cached_property
    def history(self) -> np.ndarray:
        """(segments,) int64: keys ``[0, w)`` that a segment ranks; none with a window."""
        first = np.arange(self.segments, dtype=np.int64) * self.settings.segment + self.shift
        if not self.settings.causal:
            return np.full(self.segments, self.n_k, np.int64)
        if self.settings.window is not None:
            return np.zeros(self.segments, np.int64)
        return first // self.settings.pool * self.settings.pool

    @cached_property
    def listed(self) -> np.ndarray:
        """(segments,) int64: keys of a list, the share `cap` of the history, rounded up."""
        return np.minimum(self.history, np.ceil(self.settings.cap * self.history).astype(np.int64))

    @property
    def pool_blocks(self) -> int:
        """Pool blocks of a K/V head that any history holds."""
        return -(-self.longest // self.settings.pool)

    # --- row tiles ---------------------------------------------------------------------------
    @property
    def tiles_per_segment(self) -> int:
        s = self.settings
        return -(-min(s.segment, max(self.n_q, 1)) // s.block_q)

    @cached_property
    def tile_start(self) -> np.ndarray:
        """(row tiles,) int64: first row of each tile, in query order; tiles restart at each segment."""
        s = self.settings
        starts = np.arange(self.segments)[:, None] * s.segment + np.arange(self.tiles_per_segment)[None] * s.block_q
        return starts[starts < self.n_q].astype(np.int64)

    @cached_property
    def tile_rows(self) -> np.ndarray:
        """(row tiles,) int64: rows of each tile."""
        s = self.settings
        segment_end = np.minimum((self.tile_start // s.segment + 1) * s.segment, self.n_q)
        return np.minimum(s.block_q, segment_end - self.tile_start)

    @cached_property
    def tile_segment(self) -> np.ndarray:
        """(row tiles,) int64: segment of each tile."""
        return self.tile_start // self.settings.segment

    @cached_property
    def window_pairs(self) -> np.ndarray:
        """(row tiles,) int64: unmasked window pairs of each tile, in position order of the queries."""
        if not self.settings.causal:
            return np.zeros(len(self.tile_start), np.int64)
        first = self.tile_start + self.shift
        seen = self._pairs_before(first + self.tile_rows) - self._pairs_before(first)
        return seen - self.tile_rows * self.history[self.tile_segment]

    @property
    def allowed_pairs(self) -> int:
        """(query, key) pairs that a head may see."""
        if not self.settings.causal:
            return self.n_q * self.n_k
        return int(self._pairs_before(self.n_k) - self._pairs_before(self.shift))

    def _pairs_before(self, position):
        """Pairs that causal queries at all positions before one would see."""
        growing = np.minimum(position, self.window)
        return growing * (growing + 1) // 2 + (position - growing) * self.window

    # --- lists and slabs ---------------------------------------------------------------------
    @cached_property
    def whole(self) -> Slab:
        return Slab(0, self.batch * self.heads_kv, 0, self.segments)

    def offsets(self, slab: Slab) -> np.ndarray:
        """(order heads of the slab, segments of the slab + 1) int64: where its lists start, end to end from 0."""
        lengths = self.listed[slab.segment_start : slab.segment_stop]
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        heads = np.arange((slab.kv_stop - slab.kv_start) * self.orders, dtype=np.int64)
        return heads[:, None] * ends[-1] + ends

    def split(self, slab: Slab, nbytes: int, keys: str, step: int = 1) -> tuple[Slab, ...]:
        """Cut a slab into ones of at most `nbytes`, where a list takes 4 bytes a key that is "listed", or of "history".

        Whole K/V heads while one fits, else runs of segments of one K/V head, `step` or a multiple of it at a time.
        """
        return _split(self, slab, nbytes, keys, step)

    def parts(self, slab: Slab, nbytes: int, kv_offsets, step: int = 1) -> Iterator[tuple[Slab, Any]]:
        """A slab cut into ones whose histories take at most `nbytes`, each with its part of the slab's offsets."""
        for part in self.split(slab, nbytes, "history", step):
            heads = slice(*(self.orders * (kv - slab.kv_start) for kv in (part.kv_start, part.kv_stop)))
            segments = slice(part.segment_start - slab.segment_start, part.segment_stop - slab.segment_start + 1)
            yield part, kv_offsets[heads, segments]

    def _slabs(self, slab: Slab, nbytes: int, keys: np.ndarray, step: int) -> Iterator[Slab]:
        cost = 4 * self.orders * keys[slab.segment_start : slab.segment_stop]
        head = max(int(cost.sum()), 1)
        if head <= nbytes:
            heads = nbytes // head
            for kv in range(slab.kv_start, slab.kv_stop, heads):
                yield dataclasses.replace(slab, kv_start=kv, kv_stop=min(kv + heads, slab.kv_stop))
            return
        for kv in range(slab.kv_start, slab.kv_stop):
            start, used = slab.segment_start, 0
            for segment in range(slab.segment_start, slab.segment_stop, step):
                nb = int(cost[segment - slab.segment_start :][:step].sum())
                if used and used + nb > nbytes:
                    yield Slab(kv, kv + 1, start, segment)
                    start, used = segment, 0
                used += nb
            yield Slab(kv, kv + 1, start, slab.segment_stop)


def make_problem(q, k, v, settings: Settings) -> Problem:
    """The `Problem` of some arrays (v may be None), or an error that names the shape at fault."""
    return _problem(q.shape, k.shape, None if v is None else v.shape, q.dtype, settings)


@functools.lru_cache(maxsize=128)
def _problem(q, k, v, dtype, settings: Settings) -> Problem:
    shapes = {name: (1,) * (4 - len(x)) + x for name, x in (("q", q), ("k", k), ("v", v)) if x is not None}
    for name, shape in shapes.items():
        if shape[0] != shapes["q"][0]:
            raise ValueError(f"{name} has batch {shape[0]} and q {shapes['q'][0]}; allowed: the same")
    if shapes["k"][3] != shapes["q"][3]:
        raise ValueError(f"k has head dim {shapes['k'][3]} and q {shapes['q'][3]}; allowed: the same")
    if "v" in shapes and shapes["v"][1:3] != shapes["k"][1:3]:
        raise ValueError(
            f"v has {shapes['v'][1]} heads of {shapes['v'][2]} rows and k {shapes['k'][1]} of {shapes['k'][2]}; "
            "allowed: the same"
        )
    batch, heads_q, n_q, dim_qk = shapes["q"]
    _, heads_kv, n_k, _ = shapes["k"]
    dim_v = shapes["v"][3] if "v" in shapes else None
    return Problem(batch, heads_q, heads_kv, n_q, n_k, dim_qk, dim_v, dtype.name, settings)


@functools.lru_cache(maxsize=256)
def _split(problem: Problem, slab: Slab, nbytes: int, keys: str, step: int) -> tuple[Slab, ...]:
    return tuple(problem._slabs(slab, nbytes, getattr(problem, keys), step))
