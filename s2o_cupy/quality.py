"""Error, captured mass and density of a sparse answer, measured against exact attention: audit and sweep."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from s2o_cupy import reprs
from s2o_cupy.api import attend, plan
from s2o_cupy.arrays import as_four_axes, check_finite, natives, on_host
from s2o_cupy.exact import RowErrors, compare_rows, exact_rows, positive, sample_rows
from s2o_cupy.problem import make_problem
from s2o_cupy.results import AttentionResult
from s2o_cupy.settings import Settings, as_settings, real

TAUS = tuple(float(x) for x in np.geomspace(0.3, 1e-4, 12).round(6))


@dataclass(frozen=True)
class Audit:
    """What a sparse answer is worth, estimated on sampled query rows; arrays are (B, Hq) float64.

    Attributes
    ----------
    error : relative L2 error
    low, high : its 95 % confidence interval (bootstrap over the sampled rows)
    error_p99 : 99th percentile over rows of a row's own relative error
    mse : mean squared error of an output element
    cosine : mean cosine between a row and the exact one
    captured_mass : mean share of the exact softmax mass that was walked; `captured_min` the least
    density : computed over allowed pairs
    rows : int64, the rows that were sampled
    """

    error: np.ndarray
    low: np.ndarray
    high: np.ndarray
    error_p99: np.ndarray
    mse: np.ndarray
    cosine: np.ndarray
    captured_mass: np.ndarray
    captured_min: np.ndarray
    density: np.ndarray
    rows: np.ndarray

    def table(self) -> list[dict]:
        """One dict of floats a head."""
        names = ("density", "error", "low", "high", "error_p99", "mse", "cosine", "captured_mass", "captured_min")
        return [{n: float(getattr(self, n)[place]) for n in names} for place in np.ndindex(self.error.shape)]

    def __str__(self) -> str:
        lines = ["head density  rel. error (95 % interval)      p99 row  cosine   captured mass (least)"]
        for head, x in enumerate(self.table()):
            lines.append(
                f"{head:4d} {x['density']:7.3f}  {x['error']:.5f} ({x['low']:.5f} to {x['high']:.5f})  "
                f"{x['error_p99']:.5f}  {x['cosine']:.5f}  {x['captured_mass']:.4f} ({x['captured_min']:.4f})"
            )
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return reprs.audit_html(self)


def audit(q, k, v, result: AttentionResult, rows: int = 256, seed: int = 0) -> Audit:
    """Sampled query rows of an answer against exact attention, in bounded memory, where the arrays are.

    Parameters
    ----------
    q, k, v : arrays
        What `attention` was given.
    result : AttentionResult
        Of ``attention(q, k, v, ..., full_output=True)``.
    rows : int
        Rows to sample, one from each of as many equal runs of rows; all rows where there are no more.
    seed : int
        Of the sample and of the bootstrap.

    Examples
    --------
    >>> import numpy as np, s2o_cupy as s2o
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2048, 64), np.float32)
    >>> report = s2o.audit(q, k, v, s2o.attention(q, k, v, tau=0.05, full_output=True))
    >>> bool(report.low <= report.error <= report.high)
    True
    """
    if not isinstance(result, AttentionResult):
        raise TypeError(f"result is a {type(result).__name__}; allowed: the AttentionResult of full_output=True")
    problem = result.stats.problem
    given, arrays = checked(q, k, v, problem.settings)
    for name in ("batch", "heads_q", "heads_kv", "n_q", "n_k", "dim_qk", "dim_v", "dtype"):
        mine, theirs = getattr(given, name), getattr(problem, name)
        if mine != theirs:
            raise ValueError(
                f"q, k, v have {name} {mine} and the result {theirs}; allowed: the arrays it was made from"
            )
    found = compare_rows(problem, result, exact_rows(problem, *arrays, sample_rows(problem.n_q, rows, seed)))
    low, high = np.quantile(_resampled(found, np.random.default_rng(seed)), (0.025, 0.975), axis=0)
    return Audit(
        error=found.relative,
        low=np.minimum(low, found.relative),
        high=np.maximum(high, found.relative),
        error_p99=np.quantile(found.relative_rows, 0.99, axis=-1),
        mse=found.gap.mean(axis=-1) / problem.dim_v,
        cosine=found.cosine_rows.mean(axis=-1),
        captured_mass=found.captured.mean(axis=-1),
        captured_min=found.captured.min(axis=-1),
        density=result.stats.head_density,
        rows=found.rows,
    )


def _resampled(found: RowErrors, rng, draws: int = 500) -> np.ndarray:
    """(draws, B, Hq) relative errors of rows drawn again with replacement, one draw held at a time."""
    n = len(found.rows)
    answer = np.empty((draws, *found.gap.shape[:-1]))
    for draw in range(draws):
        times = np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64)
        answer[draw] = np.sqrt(found.gap @ times / positive(found.norm @ times))
    return answer


@dataclass(frozen=True)
class Sweep:
    """Density against error along `tau`, under one ranking; arrays are (taus, B, Hq) float64."""

    settings: Settings
    tau: np.ndarray
    density: np.ndarray
    error: np.ndarray
    captured_mass: np.ndarray
    tail_mass: np.ndarray

    def __repr__(self) -> str:
        lines = ["     tau  density  rel. error  captured  tail mass   (means over heads)"]
        lines += ["{:8.5f} {:8.4f}  {:10.5f}  {:8.4f}  {:9.5f}".format(*row) for row in reprs.sweep_rows(self)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return reprs.sweep_html(self)

    def error_at(self, density: float) -> np.ndarray:
        """(B, Hq) relative error at a density, interpolated in its logarithm; NaN outside of what was swept."""
        density = real("density", density, "a finite number")
        return self._interpolated(self.density, np.log(positive(self.error)), density, np.exp)

    def density_at(self, error: float) -> np.ndarray:
        """(B, Hq) density at a relative error, interpolated in its logarithm; NaN outside of what was swept."""
        if real("error", error, "a finite number above 0") <= 0:
            raise ValueError(f"error is {error}; allowed: a finite number above 0")
        return self._interpolated(np.log(positive(self.error)), self.density, math.log(error), np.asarray)

    def _interpolated(self, x, y, at, back):
        answer = np.empty(x.shape[1:])
        for place in np.ndindex(answer.shape):
            one = (slice(None), *place)
            order = np.argsort(x[one], kind="stable")
            answer[place] = np.interp(at, x[one][order], y[one][order], left=np.nan, right=np.nan)
        return back(answer)


def sweep(
    q,
    k,
    v,
    settings: Settings | None = None,
    tau=TAUS,
    *,
    backend: str | None = None,
    rows: int = 1024,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **changes,
) -> Sweep:
    """Density against error for each head: one ranking, attended with each `tau`.

    Parameters
    ----------
    q, k, v, settings, backend, **changes
        As in `attention`; q, k and v finite.
    tau : sequence of float
        What to try, each for all heads.
    rows, seed
        Query rows compared with exact attention, as in `audit`.
    progress : callable, optional
        Called with the number of points done and of all points.

    Examples
    --------
    >>> import s2o_cupy as s2o
    >>> q, k, v, _ = s2o.load_sample("smollm2_prose_l08")
    >>> curve = s2o.sweep(q[:1], k, v, tau=(0.1, 0.01), rows=256)
    >>> bool(curve.density[1, 0, 0] > curve.density[0, 0, 0] and curve.error[1, 0, 0] < curve.error[0, 0, 0])
    True
    """
    settings = as_settings(settings).replace(**changes)
    taus = _taus(tau)
    problem, arrays = checked(q, k, v, settings)
    ranking = plan(q, k, settings, backend=backend)
    exact = exact_rows(problem, *arrays, sample_rows(problem.n_q, rows, seed))
    points = []
    for t in taus:
        result = attend(q, k, v, ranking, backend=backend, tau=float(t), full_output=True)
        found = compare_rows(problem, result, exact)
        tail = result.stats.tail_mass.reshape(problem.batch, problem.heads_q, -1).mean(axis=-1)
        points.append((result.stats.head_density, found.relative, found.captured.mean(axis=-1), on_host(tail)))
        if progress is not None:
            progress(len(points), len(taus))
    return Sweep(settings, taus, *(np.stack(x) for x in zip(*points, strict=True)))


def _taus(tau) -> np.ndarray:
    allowed = "a sequence of finite numbers, 0 or above"
    if isinstance(tau, np.ndarray) and tau.ndim > 1:
        raise TypeError(f"tau is an array of shape {tau.shape}; allowed: {allowed}")
    if not isinstance(tau, (list, tuple, np.ndarray)) or (isinstance(tau, np.ndarray) and tau.ndim == 0):
        raise TypeError(f"tau is {tau!r}; allowed: {allowed}")
    taus = np.array([real("tau", t, allowed) for t in tau])
    if not len(taus):
        raise ValueError(f"tau is empty; allowed: {allowed}")
    if (taus < 0).any():
        raise ValueError(f"tau is {taus[taus < 0][0]}; allowed: {allowed}")
    return taus


def checked(q, k, v, settings: Settings):
    """The problem and the 4-D arrays of q, k, v, refused where they are empty or not finite."""
    named = natives(q=q, k=k, v=v)
    problem = make_problem(*named.values(), settings)
    if not (problem.batch and problem.n_q and problem.n_k):
        raise ValueError(f"q has shape {q.shape} and k {k.shape}; allowed: at least one query and one key")
    check_finite(named)
    return problem, [as_four_axes(name, x) for name, x in named.items()]
