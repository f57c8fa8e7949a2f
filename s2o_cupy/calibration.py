"""calibrate(): the settings that cost least among those that meet an error, found on sampled query rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from s2o_cupy.api import attend, plan
from s2o_cupy.exact import compare_rows, exact_rows, sample_rows
from s2o_cupy.problem import Problem
from s2o_cupy.quality import checked
from s2o_cupy.settings import Settings, as_settings, real

METRICS = ("relative", "captured_mass")
# What is tried beside the settings given: finer rankings cost more to build and need fewer keys.
VARIANTS = ({}, {"segment": 128}, {"segment": 512}, {"rank": "mixture", "rank_terms": 31})
_LOOSEST = 1.0  # tau: a walk that stops at its first tile, but where a row gains more than it had
_CLOSE = 0.8  # a search ends once the error lies between this share of the target and the target
_STEPS = 8
# What putting one key of a list in order costs, and one exponential of the mixture, in floating-point operations.
_ORDER_FLOPS, _EXP_FLOPS = 300.0, 60.0


@dataclass(frozen=True)
class Trial:
    """One ranking tried: the loosest `tau` found to meet the target, and what it gave on the sampled rows.

    Attributes
    ----------
    settings : Settings
    error, density : float64 (Hq,), the worst and the mean over the batch
    work : float
        Floating-point operations of the three stages.
    """

    settings: Settings
    error: np.ndarray
    density: np.ndarray
    work: float


class Calibrated(Settings):
    """Settings that `calibrate` chose.

    Attributes
    ----------
    evidence : tuple of Trial
        What met the error, the chosen one first; a variant is left as soon as it must cost more than another.
    rows : int
        Query rows that were compared.
    """

    evidence: tuple[Trial, ...]
    rows: int

    def __eq__(self, other) -> bool:
        return isinstance(other, Settings) and self.as_dict() == other.as_dict()

    __hash__ = Settings.__hash__


def calibrate(
    q,
    k,
    v,
    error: float = 1e-2,
    metric: str = "relative",
    per_head: bool = False,
    settings: Settings | None = None,
    *,
    rows: int = 8192,
    seed: int = 0,
    variants=VARIANTS,
    backend: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    **changes,
) -> Calibrated:
    """Settings that meet an error at the least work, judged on sampled query rows.

    Parameters
    ----------
    q, k, v : arrays
        As in `attention`, finite.
    error : float
        Greatest error accepted, above 0, of every head: relative L2 error, or with ``metric="captured_mass"`` the mean
        share of the exact softmax mass that is not walked.
    metric : {"relative", "captured_mass"}
    per_head : bool
        A `tau` for each query head, so that every head comes near to `error`; else one for all.
    settings, **changes
        Where to start; default ``Settings()``. `tau` is searched.
    rows, seed : int
        Rows compared with exact attention.
    variants : sequence of dict
        Changes of settings to try; ``({},)`` searches `tau` alone. None may change `causal` or `scale`.
    backend : str, optional
        As in `attention`.
    progress : callable, optional
        Called with the number of variants done and of all variants.

    Returns
    -------
    Settings
        With the attributes `evidence` and `rows`.

    Raises
    ------
    ValueError
        No `tau` meets `error`; the message says what can be met.

    Examples
    --------
    >>> import s2o_cupy as s2o
    >>> q, k, v, _ = s2o.load_sample("smollm2_prose_l08")
    >>> settings = s2o.calibrate(q[:1], k, v, error=0.05, variants=({},))
    >>> bool(0 < settings.evidence[0].error[0] <= 0.05)
    True
    """
    error = real("error", error, "a finite number above 0")
    if error <= 0:
        raise ValueError(f"error is {error}; allowed: a finite number above 0")
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; allowed: {', '.join(map(repr, METRICS))}")
    base = as_settings(settings).replace(**changes)
    if not isinstance(variants, (list, tuple)) or not all(isinstance(x, dict) for x in variants):
        raise TypeError(f"variants is {variants!r}; allowed: a sequence of dicts of settings, ({{}},) for tau alone")
    tried = list(dict.fromkeys(base.replace(**{**x, "tau": 0.0}) for x in variants))
    if not tried:
        raise ValueError("variants is empty; allowed: one dict of settings or more, ({},) for tau alone")
    for variant in tried:
        if (variant.causal, variant.scale) != (base.causal, base.scale):
            raise ValueError("variants change causal or scale, and so what is exact; allowed: every other setting")
    problem, arrays = checked(q, k, v, base.replace(tau=0.0))
    exact = exact_rows(problem, *arrays, sample_rows(problem.n_q, rows, seed))
    trials, least, start = [], np.inf, np.full(problem.heads_q, min(error, _LOOSEST))
    for done, variant in enumerate(tried):
        if progress is not None:
            progress(done, len(tried))
        shape = problem.replace(**dataclasses.asdict(variant))

        def costs_more(density, shape=shape):
            return any(_work(shape, density) >= trial.work for trial in trials)

        if costs_more(np.zeros(1)):
            continue
        ranking = plan(q, k, variant, backend=backend)

        def measure(tau, ranking=ranking):
            result = attend(q, k, v, ranking, backend=backend, tau=tau, full_output=True)
            found = compare_rows(result.stats.problem, result, exact)
            worst = found.relative if metric == "relative" else 1 - found.captured.mean(axis=-1)
            return worst.max(axis=0), result.stats.head_density.mean(axis=0)

        found = _search(measure, error, start, per_head, costs_more)
        if found.meets:
            chosen = tuple(found.tau.tolist()) if per_head else float(found.tau[0])
            trials.append(Trial(variant.replace(tau=chosen), found.error, found.density, _work(shape, found.density)))
            start = np.maximum(found.tau, 1e-6)
        else:
            least = min(least, float(found.error.max()))
    if progress is not None:
        progress(len(tried), len(tried))
    if not trials:
        raise ValueError(f"error is {error}; the least that these settings reach is {least:.3g}, at tau=0")
    trials.sort(key=lambda trial: trial.work)
    chosen = Calibrated(**dataclasses.asdict(trials[0].settings))
    object.__setattr__(chosen, "evidence", tuple(trials))
    object.__setattr__(chosen, "rows", len(exact.rows))
    return chosen


@dataclass
class _Found:
    tau: np.ndarray
    error: np.ndarray
    density: np.ndarray
    meets: bool


def _search(measure, target: float, start: np.ndarray, per_head: bool, costs_more) -> _Found:
    """The loosest tau found that meets the target: a bracketed search along log tau, for all heads in step.

    It is given up where a tau that is still too loose costs more than what was found before.
    """
    tau, heads = start, len(start)
    low, high = np.full(heads, -np.inf), np.full(heads, np.inf)
    best = _Found(np.zeros(heads), np.full(heads, np.inf), np.ones(heads), False)
    before = None
    for _ in range(_STEPS):
        error, density = measure(tuple(tau) if per_head else float(tau[0]))
        judged = error if per_head else np.full(heads, error.max())
        meets = judged <= target
        if not meets.any() and costs_more(density):
            return best
        looser = meets & (tau > best.tau)
        for name, value in (("tau", tau), ("error", error), ("density", density)):
            setattr(best, name, np.where(looser, value, getattr(best, name)))
        at = np.log(tau)
        low, high = np.where(meets, np.maximum(low, at), low), np.where(meets, high, np.minimum(high, at))
        if (meets & ((judged >= _CLOSE * target) | (tau >= _LOOSEST))).all():
            break
        at, before = _next(at, np.log(np.maximum(judged, 1e-12)), before, np.log(0.92 * target), low, high, meets)
        tau = np.exp(at)
    if not np.isfinite(best.error).all():
        error, density = measure(0.0)
        fill = ~np.isfinite(best.error) if per_head else np.full(heads, True)
        best = _Found(np.where(fill, 0, best.tau), np.where(fill, error, best.error), density, False)
    best.meets = bool((best.error <= target).all())
    return best


def _next(at, log_error, before, log_target, low, high, meets):
    """The next log tau of each head: along the line through the last two points, kept inside its bracket.

    A bracket is halved where a second point in turn falls on the same side: one row can make the error jump.
    """
    slope = np.full(at.shape, 0.7)
    if before is not None:
        with np.errstate(all="ignore"):
            line = (log_error - before[1]) / (at - before[0])
        slope = np.where(np.isfinite(line), np.clip(line, 0.3, 3.0), slope)
    step = np.minimum(at + np.clip((log_target - log_error) / slope, -3.0, 3.0), np.log(_LOOSEST))
    inside = (step > low) & (step < high)
    if before is not None:
        inside &= (meets != before[2]) | ~np.isfinite(high - low)
    middle = np.where(np.isfinite(low), (low + high) / 2, high - 2.0)
    return np.where(inside, step, np.where(np.isinf(high), np.log(_LOOSEST), middle)), (at, log_error, meets)


def _work(problem: Problem, density: np.ndarray) -> float:
    """Floating-point operations of stages 1 to 3 at these densities of the heads."""
    pairs = float(density.mean()) * problem.allowed_pairs * problem.heads_q
    keys = float(problem.history.sum()) * problem.heads_order
    product = 2 * (1 + problem.terms) * problem.dim_qk
    mixture = problem.settings.rank == "mixture"
    a_key = _ORDER_FLOPS + (2 * (product + problem.terms * _EXP_FLOPS) if mixture else product)
    return problem.batch * (pairs * 2 * (problem.dim_qk + problem.dim_v) + keys * a_key)
