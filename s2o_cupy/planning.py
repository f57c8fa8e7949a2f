"""Plan, room for lists, and the guide order of the queries."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from s2o_cupy import reprs
from s2o_cupy.arrays import namespace, natives, on_host
from s2o_cupy.files import load_arrays, save_arrays
from s2o_cupy.problem import Problem, Slab, make_problem
from s2o_cupy.settings import ATTEND_SETTINGS, Settings, as_settings

FORMAT = 1
_SIZES = ("batch", "heads_q", "heads_kv", "n_q", "n_k", "dim_qk")


@dataclass(frozen=True)
class Plan:
    """The ranked order of the keys of every (order head, segment), and of the queries inside each segment.

    Attributes
    ----------
    kv_order : int32 array (keys,)
        All lists end to end, each the key indices of one segment's history by descending score.
    kv_offsets : int64 array (B, Ho, segments + 1)
        Where each list starts and ends in `kv_order`; ``Ho = Hq``, or ``Hkv`` with ``share_order``.
    query_order : int32 array (B, Hq, Nq) or None
        Query rows in walking order, permuted only inside segments; None is position order.
    settings : Settings
        What the plan was made with.

    Examples
    --------
    >>> import numpy as np, s2o_cupy as s2o
    >>> x = np.random.default_rng(0).standard_normal((2, 1024, 64), np.float32)
    >>> p = s2o.plan(x, x, segment=256)
    >>> p.kv_offsets.shape
    (1, 2, 5)
    >>> s2o.attend(x, x, x, p, tau=1e-3).shape
    (2, 1024, 64)
    """

    problem: Problem = field(repr=False)
    kv_order: Any
    kv_offsets: Any
    query_order: Any = None

    @property
    def settings(self) -> Settings:
        return self.problem.settings

    @property
    def nbytes(self) -> int:
        """Bytes of the plan's arrays."""
        return sum(x.nbytes for x in (self.kv_order, self.kv_offsets, self.query_order) if x is not None)

    def __repr__(self) -> str:
        p = self.problem
        sizes = f"{p.batch} x {p.heads_order} order heads x {p.segments} segments, {p.n_q} queries, {p.n_k} keys"
        return f"Plan({sizes}, {self.nbytes} bytes, {self.settings!r})"

    def _repr_html_(self) -> str:
        return reprs.plan_html(self)

    @classmethod
    def from_arrays(
        cls, q, k, settings: Settings | None = None, *, kv_order, kv_offsets, query_order=None, validate: bool = True
    ) -> Plan:
        """A plan of your own for these queries and keys.

        Lists may be shorter than a history: what they leave out goes to the tail. With ``validate=False``
        nothing is checked, and a bad index reads out of bounds.

        Raises
        ------
        ValueError, TypeError
            Naming the array, the place and the value that is wrong.
        """
        problem = make_problem(*natives(q=q, k=k).values(), None, as_settings(settings))
        made = cls(problem, kv_order, kv_offsets, query_order)
        return made.validate() if validate else made

    def validate(self) -> Plan:
        """Check every offset and index; returns the plan. An index out of its history would read out of bounds."""
        p, xp = self.problem, namespace(self.kv_order)
        shape = (p.batch, p.heads_order, p.segments + 1)
        _check_array("kv_offsets", self.kv_offsets, xp, np.int64, shape)
        _check_array("kv_order", self.kv_order, xp, np.int32, (None,))
        offsets, order = on_host(self.kv_offsets).reshape(-1, p.segments + 1), on_host(self.kv_order)
        steps = np.diff(offsets, axis=1)
        bad = np.argwhere((steps < 0) | (steps > p.history))
        if len(bad):
            h, s = bad[0]
            raise ValueError(
                f"kv_offsets gives list {s} of order head {h} {steps[h, s]} keys; allowed: 0 to {p.history[s]}"
            )
        ends = np.concatenate([[0], offsets[:, -1]])
        if (offsets[:, 0] != ends[:-1]).any() or ends[-1] != len(order):
            raise ValueError(f"kv_offsets must run end to end from 0 to kv_order's length {len(order)}")
        for h, s in np.ndindex(*steps.shape):
            _check_list(order[offsets[h, s] : offsets[h, s + 1]], int(p.history[s]), h, s)
        if self.query_order is not None:
            _check_array("query_order", self.query_order, xp, np.int32, (p.batch, p.heads_q, p.n_q))
            rows = on_host(self.query_order).reshape(-1, p.n_q)
            for s in range(p.segments):
                part = np.arange(s * p.settings.segment, min((s + 1) * p.settings.segment, p.n_q))
                wrong = (np.sort(rows[:, part], axis=1) != part).any(axis=1)
                if wrong.any():
                    raise ValueError(f"query_order of head {wrong.argmax()} does not permute the rows of segment {s}")
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as an npz (no pickles); a file that is there is replaced at once or not at all."""
        meta = {"format": FORMAT, "settings": dataclasses.asdict(self.settings), "dtype": self.problem.dtype}
        meta |= {name: getattr(self.problem, name) for name in _SIZES}
        arrays = {"kv_order": self.kv_order, "kv_offsets": self.kv_offsets, "query_order": self.query_order}
        arrays = {name: on_host(x) for name, x in arrays.items() if x is not None}
        save_arrays(path, meta=np.array(json.dumps(meta)), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """Read and validate a plan that `save` wrote, as NumPy arrays."""
        arrays = load_arrays(path, ("meta", "kv_order", "kv_offsets"), optional=("query_order",))
        where = f"plan file {os.fspath(path)!r}"
        try:
            meta = json.loads(str(arrays["meta"]))
            if meta["format"] != FORMAT:
                raise ValueError(f"{where} has format {meta['format']}; supported: {FORMAT}")
            sizes, dtype, settings = {name: meta[name] for name in _SIZES}, meta["dtype"], dict(meta["settings"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{where} has no readable metadata: {type(error).__name__} {error}") from None
        problem = Problem(**sizes, dim_v=None, dtype=dtype, settings=Settings().replace(**settings))
        return cls(problem, arrays["kv_order"], arrays["kv_offsets"], arrays.get("query_order")).validate()

    def applied(self, problem: Problem, changes: dict) -> Problem:
        """`problem` (of the arrays given to `attend`) under the plan's settings with stage 3's `changes`."""
        for name in changes:
            if name not in ATTEND_SETTINGS:
                allowed = ", ".join(ATTEND_SETTINGS)
                raise TypeError(f"attend got {name!r}, which a plan fixes or nobody knows; allowed: {allowed}")
        for name in _SIZES:
            mine, yours = getattr(self.problem, name), getattr(problem, name)
            if mine != yours:
                raise ValueError(f"plan was made for {name} {mine}; the arrays have {yours}")
        return dataclasses.replace(problem, settings=self.settings.replace(**changes))


def make_plan(problem: Problem, q, k, backend) -> Plan:
    """Rank everything at once."""
    kv_order, kv_offsets = lists(problem, problem.whole, q)
    kv_offsets = kv_offsets.copy()  # the plan's owner may write to it
    if kv_order.size:
        backend.rank(problem, q, k, problem.whole, kv_offsets, kv_order)
    shape = (problem.batch, problem.heads_order, problem.segments + 1)
    return Plan(problem, kv_order, kv_offsets.reshape(shape), query_order(problem, q, k))


def lists(problem: Problem, slab: Slab, like):
    """Room for a slab's lists, and where each starts (not to be written to), as arrays of the kind that `like` is."""
    xp = namespace(like)
    offsets, keys = _offsets(problem, slab, xp, None if xp is np else xp.cuda.runtime.getDevice())
    return xp.empty(keys, np.int32), offsets


@functools.lru_cache(maxsize=1024)
def _offsets(problem: Problem, slab: Slab, xp, device):
    """Kept, because a copy to the device costs more than a launch and cannot be captured in a graph."""
    offsets = problem.offsets(slab)
    kept = xp.asarray(offsets)
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()  # other streams will read it
    return kept, int(offsets[-1, -1]) if offsets.size else 0


def ranked(backend, problem: Problem, q, k, v, query_order, result, workspace: int, progress=None) -> None:
    """All stages of a backend, as many lists at a time as `workspace` holds; `progress` is called with those done."""
    pooled, done = backend.pool(problem, k, v), 0
    for slab in problem.split(problem.whole, workspace, "listed"):
        kv_order, kv_offsets = lists(problem, slab, q)
        backend.rank(problem, q, k, slab, kv_offsets, kv_order)
        backend.attend(problem, q, k, v, slab, kv_order, kv_offsets, query_order, pooled, result)
        del kv_order  # before the next slab takes its own
        done += slab.size
        if progress is not None:
            progress(done)


def query_order(problem: Problem, q, k):
    """The paper's guide order: descending ``q . g`` in each segment, g the mean history key; None: position order."""
    if problem.settings.query_order == "position":
        return None
    xp, size = namespace(q), problem.settings.segment
    order = xp.empty((problem.batch, problem.heads_q, problem.n_q), np.int32)
    for b, kv in np.ndindex(problem.batch, problem.heads_kv):
        heads = slice(kv * problem.group, (kv + 1) * problem.group)
        total, done = xp.zeros(problem.dim_qk, np.float64), 0
        for s in range(problem.segments):
            history = int(problem.history[s])
            with np.errstate(all="ignore"):
                total = total + k[b, kv, done:history].astype(problem.compute_dtype).sum(axis=0, dtype=np.float64)
                guide = (total / max(history, 1)).astype(problem.compute_dtype)
            done = history
            rows = q[b, heads, s * size : (s + 1) * size].astype(problem.compute_dtype)
            with np.errstate(all="ignore"):  # a non-finite query or key may be anything; NaN goes last
                key = -(rows @ guide)
                key = xp.where(xp.isnan(key), np.inf, key).astype(np.float32)
            order[b, heads, s * size : (s + 1) * size] = xp.argsort(key, axis=-1, kind="stable") + s * size
    return order


def _check_array(name: str, x, xp, dtype, shape) -> None:
    if not isinstance(x, xp.ndarray) or x.dtype != dtype:
        raise TypeError(
            f"{name} is {type(x).__name__} of {getattr(x, 'dtype', '?')}; allowed: {xp.__name__} {np.dtype(dtype)}"
        )
    if x.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, x.shape, strict=True)):
        allowed = str(shape).replace("None", "any length")
        raise ValueError(f"{name} has shape {x.shape}; allowed: {allowed}")
    if not x.flags.c_contiguous:
        raise ValueError(f"{name} has strides {x.strides}; allowed: a C-contiguous array")


def _check_list(keys: np.ndarray, history: int, h: int, s: int) -> None:
    bad = np.flatnonzero((keys < 0) | (keys >= history))
    if len(bad):
        place = f"place {bad[0]} of list {s}, order head {h}"
        raise ValueError(f"kv_order has key {keys[bad[0]]} at {place}; allowed: 0 to {history - 1}")
    counts = np.bincount(keys, minlength=1)
    if counts.max() > 1:
        raise ValueError(f"kv_order repeats key {counts.argmax()} in list {s}, order head {h}; allowed: each once")
