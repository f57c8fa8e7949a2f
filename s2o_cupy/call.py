"""Call: one call's arrays, problem, backend, and the arrays that stage 3 fills."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from s2o_cupy import backends
from s2o_cupy.arrays import as_four_axes, check_finite, check_out, in_kind, namespace, native, natives
from s2o_cupy.planning import Plan
from s2o_cupy.problem import Problem, make_problem
from s2o_cupy.results import AttentionResult, Stats
from s2o_cupy.settings import Settings


@dataclass
class Arrays:
    """What stage 3 fills: 4-D out, and lse, tiles, tail_blocks, tail_mass as `Stats` describes them, or None."""

    out: Any
    lse: Any = None
    tiles: Any = None
    tail_blocks: Any = None
    tail_mass: Any = None


_checked: dict[tuple, tuple[Problem, str]] = {}  # problem and backend of GPU arrays that passed the checks, by layout


def _layout(q, k, v, settings: Settings, backend: str | None) -> tuple | None:
    """All that the checks of a call read, where they are CuPy arrays of four axes."""
    cupy = sys.modules.get("cupy")
    if cupy is None or not type(q) is type(k) is type(v) is cupy.ndarray or not q.ndim == k.ndim == v.ndim == 4:
        return None
    each = [(x.shape, x.strides, x.dtype, x.device.id) for x in (q, k, v)]
    return settings, backend, cupy.cuda.runtime.getDevice(), *each


@dataclass
class Call:
    """One call: the user's q and out, out as it is written, native 4-D arrays, problem, backend, what is asked for."""

    original: Any
    given_out: Any
    written: Any
    shape: tuple[int, ...]
    arrays: list
    problem: Problem
    engine: Any
    full_output: bool

    @classmethod
    def take(cls, q, k, v, settings, backend, out, full_output, finite) -> Call:
        layout = None if finite or out is not None else _layout(q, k, v, settings, backend)
        if layout in _checked:
            problem, name = _checked[layout]
            return cls(
                q, None, None, (*q.shape[:-1], problem.dim_v), [q, k, v], problem, backends.module(name), full_output
            )
        named = natives(q=q, k=k, v=v)
        problem = make_problem(*named.values(), settings)
        shape = (*named["q"].shape[:-1], problem.dim_v)
        written = native("out", out) if hasattr(out, "__dlpack__") and not isinstance(out, np.ndarray) else out
        if written is not None:
            check_out(written, shape, named)
        engine = backends.get(backend, named if written is None else named | {"out": written})
        if finite:
            check_finite(named)
        arrays = [as_four_axes(name, x) for name, x in named.items()]
        if layout is not None:
            if len(_checked) >= 1024:
                _checked.clear()
            _checked[layout] = problem, backend or "cuda"
        return cls(q, out, written, shape, arrays, problem, engine, full_output)

    @cached_property
    def result(self) -> Arrays:
        stats = self.full_output or self.engine.NEEDS_STATS
        return _arrays(self.problem, self.arrays[0], self.written, self.empty, stats)

    @property
    def empty(self) -> bool:
        """Nothing to compute: the arrays already hold the answer."""
        p = self.problem
        return not (p.batch and p.n_q and p.n_k)

    def answer(self, path: str, settings: Settings | None, plan: Plan | None = None):
        r = self.result
        if self.empty:  # no backend wrote
            r.out[...] = 0
        if self.given_out is not None:
            out = self.given_out
        else:
            out = in_kind(r.out if r.out.shape == self.shape else r.out.reshape(self.shape), self.original)
        if not self.full_output:
            return out
        lead = self.shape[:-2]
        if path == "dense":
            p = self.problem
            r.tiles[...] = namespace(r.tiles).asarray(-(-p.history[p.tile_segment] // p.settings.block_k))
            r.tail_blocks[...] = r.tail_mass[...] = 0
        stats = Stats(
            self.problem,
            r.tiles.reshape(*lead, r.tiles.shape[2]),
            r.tail_blocks.reshape(*lead, r.tiles.shape[2]),
            r.tail_mass.reshape(self.shape[:-1]),
            path,
            None if plan is None else plan.kv_offsets,
        )
        lse = in_kind(r.lse.reshape(self.shape[:-1]), self.original)
        return AttentionResult(out, lse, stats, settings, plan)


def _arrays(problem: Problem, q, out, empty: bool, stats: bool) -> Arrays:
    """A GPU backend writes every element, so that its arrays start as they are, unless it has nothing to write."""
    xp, heads = namespace(q), (problem.batch, problem.heads_q)
    rows, tiles = (*heads, problem.n_q), (*heads, len(problem.tile_start))
    made = xp.zeros if empty or xp is np else xp.empty
    out = made((*rows, problem.dim_v), q.dtype) if out is None else as_four_axes("out", out)
    if not stats:
        return Arrays(out)
    lse = made(rows, problem.compute_dtype)
    if made is xp.zeros:
        lse[...] = -np.inf
    return Arrays(out, lse, made(tiles, np.int32), made(tiles, np.int32), made(rows, np.float32))
