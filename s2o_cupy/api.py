"""attention(), dense_attention(), plan(), attend(): intake, problem, stages, answer."""

from __future__ import annotations

import functools
from collections.abc import Callable

from s2o_cupy import arrays, backends, planning
from s2o_cupy.arrays import namespace, natives
from s2o_cupy.call import Call
from s2o_cupy.planning import Plan
from s2o_cupy.problem import make_problem
from s2o_cupy.settings import Settings, as_settings, integer

WORKSPACE = 2**30


def _explaining_memory(call):
    """Tells a `MemoryError` of NumPy or CuPy what it was for and what takes less."""

    @functools.wraps(call)
    def explained(q, k, *others, **named):
        try:
            return call(q, k, *others, **named)
        except MemoryError as error:
            what = f"{call.__name__}() of q {tuple(q.shape)} and k {tuple(k.shape)}, {q.dtype}"
            ranked = "" if call.__name__ == "dense_attention" else "a smaller cap or workspace, "
            error.add_note(f"{what}: {ranked}a smaller batch, or fewer heads at a time take less")
            raise

    return explained


@_explaining_memory
def attention(
    q,
    k,
    v,
    settings: Settings | None = None,
    *,
    backend: str | None = None,
    out=None,
    workspace: int = WORKSPACE,
    full_output: bool = False,
    check_finite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **changes,
):
    """Sparse attention: keys ranked for each segment of queries, walked until they add too little.

    S2O (arXiv 2602.22575) with a second-order ranking and a pooled tail; ``Settings.paper()`` is S2O as published.

    Parameters
    ----------
    q : array (B, Hq, Nq, D)
        Queries; float16, bfloat16, float32 or float64. B, or B and the heads, may be missing. Any strides, but for
        backend "cuda" no gaps in the last axis and less than 2 GiB from row to row: a copy would be needed.
    k : array (B, Hkv, Nk, D)
        Keys, of q's dtype, number of axes and device; Hq is a multiple of Hkv.
    v : array (B, Hkv, Nk, Dv)
        Values. D and Dv lie between 1 and 256.
    settings : Settings, optional
        Every choice of the method; default ``Settings()``.
    backend : {"cpu", "cuda", "numba"}, optional
        Default: "cpu" for NumPy arrays, "cuda" for CuPy arrays.
    out : array, optional
        Written in place and returned: q's shape with Dv for D, q's dtype, strides as those of q may be.
    workspace : int
        Bytes for rankings held at a time; less means more, smaller steps and the same answer.
    full_output : bool
        Return an `AttentionResult` with the log-sum-exp and the stats.
    check_finite : bool
        Refuse NaN and infinity, naming the place. Otherwise a non-finite query gives NaN in its own row, and a
        non-finite key or value may give NaN in the rows that see it.
    progress : callable, optional
        Called with the number of lists done and of all lists, after each step that `workspace` allows.
    **changes
        Any field of `Settings`, in place of what `settings` holds.

    Returns
    -------
    array or AttentionResult
        Arrays of the kind that q is.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, its value and what is allowed.

    Examples
    --------
    >>> import numpy as np, s2o_cupy as s2o
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 2048, 64), np.float32)
    >>> s2o.attention(q, k, v).shape
    (2, 2048, 64)
    >>> res = s2o.attention(q, k, v, tau=0, full_output=True)
    >>> res.stats.density
    1.0
    """
    settings = as_settings(settings, **changes)
    workspace = integer("workspace", workspace, 1, 2**62)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress is {progress!r}; allowed: a callable, or None")
    call = Call.take(q, k, v, settings, backend, out, full_output, check_finite)
    problem, engine = call.problem, call.engine
    if call.empty:
        return call.answer("ranked", settings)
    if problem.longest < engine.RANKING_PAYS_FROM:
        engine.dense(problem, *call.arrays, call.result)
        return call.answer("dense", settings)
    query_order = planning.query_order(problem, *call.arrays[:2])
    after = progress and (lambda done: progress(done, problem.whole.size))
    engine.ranked(problem, *call.arrays, query_order, call.result, workspace, after)
    return call.answer("ranked", settings)


@_explaining_memory
def dense_attention(
    q,
    k,
    v,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    backend: str | None = None,
    out=None,
    full_output: bool = False,
    check_finite: bool = False,
):
    """Exact attention on the same backend: no ranking, no stop; with a `window` at a cost of N times it.

    Arguments, answer and errors are those of `attention`; causal, window and scale those of `Settings`.

    Examples
    --------
    >>> import numpy as np, s2o_cupy as s2o
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 100, 32))
    >>> exact = s2o.dense_attention(q, k, v, causal=False)
    >>> p = np.exp(q @ k.T / np.sqrt(32))
    >>> bool(np.allclose(exact, p @ v / p.sum(axis=1, keepdims=True)))
    True
    """
    settings = as_settings(None, causal=causal, window=window, scale=scale)
    call = Call.take(q, k, v, settings, backend, out, full_output, check_finite)
    if not call.empty:
        call.engine.dense(call.problem, *call.arrays, call.result)
    return call.answer("dense", None)


@_explaining_memory
def plan(
    q,
    k,
    settings: Settings | None = None,
    *,
    backend: str | None = None,
    check_finite: bool = False,
    **changes,
) -> Plan:
    """Rank the keys for every segment of queries (stages 1 and 2), to be walked by `attend` any number of times.

    With a `window` there is no history, and every list is empty.

    It holds the whole ranking: about ``4 * cap * Hq * Nq / segment * Nk / 2`` bytes when causal.

    Parameters, errors
        As in `attention`.

    Examples
    --------
    >>> import numpy as np, s2o_cupy as s2o
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2048, 64), np.float32)
    >>> p = s2o.plan(q, k)
    >>> out = s2o.attend(q, k, v, p, tau=3e-3)
    """
    named = natives(q=q, k=k)
    if check_finite:
        arrays.check_finite(named)
    problem = make_problem(*named.values(), None, as_settings(settings, **changes))
    four = [arrays.as_four_axes(name, x) for name, x in named.items()]
    return planning.make_plan(problem, *four, backends.get(backend, named))


@_explaining_memory
def attend(
    q,
    k,
    v,
    plan: Plan,
    *,
    backend: str | None = None,
    out=None,
    full_output: bool = False,
    check_finite: bool = False,
    **changes,
):
    """Attention along a plan's ranking (stage 3), under the plan's settings; with a `window`, dense within it.

    Parameters
    ----------
    q, k, v, backend, out, full_output, check_finite
        As in `attention`; q and k of the shapes that the plan was made for.
    plan : Plan
        From `plan`, `Plan.load` or `Plan.from_arrays`.
    **changes
        ``tau``, ``tail``, ``block_q``, ``block_k``: what stage 3 alone reads.

    Examples
    --------
    >>> import numpy as np, s2o_cupy as s2o
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2048, 64), np.float32)
    >>> p = s2o.plan(q, k)
    >>> res = s2o.attend(q, k, v, p, tau=0, full_output=True)
    >>> bool(np.allclose(res.out, s2o.dense_attention(q, k, v), atol=1e-5))
    True
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan is a {type(plan).__name__}; allowed: a Plan")
    call = Call.take(q, k, v, plan.settings, backend, out, full_output, check_finite)
    problem = call.problem = plan.applied(call.problem, changes)
    if namespace(plan.kv_order) is not namespace(call.arrays[0]):
        raise ValueError(
            f"plan is of {namespace(plan.kv_order).__name__} arrays and q of {namespace(call.arrays[0]).__name__}"
        )
    if problem.settings.window is not None:
        if not call.empty:
            call.engine.dense(problem, *call.arrays, call.result)
        return call.answer("dense", problem.settings, plan)
    if not call.empty:
        pooled = call.engine.pool(problem, *call.arrays[1:])
        kv_offsets = plan.kv_offsets.reshape(-1, problem.segments + 1)
        call.engine.attend(
            problem, *call.arrays, problem.whole, plan.kv_order, kv_offsets, plan.query_order, pooled, call.result
        )
    return call.answer("ranked", problem.settings, plan)
