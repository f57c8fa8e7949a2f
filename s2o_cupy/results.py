"""What a call answers: AttentionResult and Stats, whose numbers stay on the device until they are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from s2o_cupy import reprs
from s2o_cupy.arrays import on_host
from s2o_cupy.problem import Problem
from s2o_cupy.settings import Settings


@dataclass(frozen=True)
class Stats:
    """How much work a call did, and what it left to the tail.

    Attributes
    ----------
    tiles : int32 array (B, Hq, row tiles)
        History key tiles walked by each row tile.
    tail_blocks : int32 array (B, Hq, row tiles)
        Pooled keys that entered each row tile's softmax.
    tail_mass : float32 array (B, Hq, Nq)
        The tail's share of each query's softmax sum: a pointer to rows that lost something, no bound.
    path : {"ranked", "dense"}
        Whether the ranked history was walked, or attention was dense because ranking cannot pay at this shape.

    Leading axes that the inputs lacked are missing here too.
    """

    problem: Problem
    tiles: Any
    tail_blocks: Any
    tail_mass: Any
    path: str
    kv_offsets: Any = field(default=None, repr=False)  # a plan's own lists; else those of `problem`

    @cached_property
    def head_density(self) -> np.ndarray:
        """Computed pairs over allowed pairs of each head, (B, Hq) float64; tail blocks count as one key each."""
        p = self.problem
        shape = (p.batch, p.heads_q)
        if not (p.batch and p.allowed_pairs) or self.path == "dense":
            return np.ones(shape)
        tiles, blocks = (on_host(x).reshape(*shape, -1).astype(np.int64) for x in (self.tiles, self.tail_blocks))
        listed = p.listed[None, None]
        if self.kv_offsets is not None:
            listed = np.diff(on_host(self.kv_offsets), axis=2).repeat(p.heads_q // p.heads_order, axis=1)
        walked = np.minimum(tiles * p.settings.block_k, listed[..., p.tile_segment])
        pairs = p.window_pairs.sum() + ((walked + blocks) * p.tile_rows).sum(axis=-1)
        return pairs / p.allowed_pairs

    @property
    def density(self) -> float:
        """Computed pairs over allowed pairs of the whole call; exactly 1 at ``tau=0, cap=1``."""
        return float(self.head_density.mean()) if self.head_density.size else 1.0

    def __repr__(self) -> str:
        return f"Stats(density={self.density:.4f}, path={self.path!r})"


@dataclass(frozen=True)
class AttentionResult:
    """The answer of a call with ``full_output=True``.

    Attributes
    ----------
    out : array, q's leading axes and rows by Dv, q's dtype
    lse : array, q's shape without its last axis
        Natural log of each query's softmax sum; float32 (float64 for float64 input), ``-inf`` where no key is seen.
    stats : Stats
    settings : Settings or None
        What was used; None for dense attention.
    plan : Plan or None
        The plan that `attend` was given.
    """

    out: Any
    lse: Any
    stats: Stats
    settings: Settings | None = None
    plan: Any = None

    def __repr__(self) -> str:
        return f"AttentionResult(out={tuple(self.out.shape)} {self.out.dtype}, {self.stats!r})"

    def _repr_html_(self) -> str:
        return reprs.result_html(self)
