"""The knob of a method that meets an error: bisection over measured points, each of which is measured once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

NEAR = 0.03  # a point this close below the wanted error meets it
AIM = 0.985  # of the wanted error, where to measure next
GROWTH = 2.5  # a knob goes about as this power of the error, until both sides of the wanted one are known
MOST = 12  # measurements for one wanted error


@dataclass
class Sweep:
    """Points of a knob x > 0; from `low` (most work) to `high` (least) the error does not fall.

    ``measure(x)`` returns the relative error at x, with whatever else belongs to the point.
    """

    measure: Callable[[float], tuple[float, object]]
    low: float
    high: float
    start: float | None = None  # where to begin; the geometric middle
    points: dict[float, tuple[float, object]] = field(default_factory=dict)

    def at(self, x: float) -> float:
        """The error at x, measured if it was not."""
        if x not in self.points:
            self.points[x] = self.measure(x)
        return self.points[x][0]

    def meet(self, error: float) -> tuple[float, float, object] | None:
        """(x, its error, its point) of the greatest x found whose error is at most `error`; None: not even at `low`."""
        for _ in range(MOST):
            good, bad = self._bracket(error)
            if good is not None and (good == self.high or self.at(good) >= (1 - NEAR) * error):
                break
            if bad == self.low:
                return None
            x = self._between(good, bad, error)
            if x is None:
                break
            self.at(x)
        good, _ = self._bracket(error)
        return None if good is None else (good, *self.points[good])

    @property
    def least_error(self) -> float:
        return min(error for error, _ in self.points.values())

    def _bracket(self, error: float) -> tuple[float | None, float | None]:
        """The greatest known x that meets the error, and the least known one beyond it that does not."""
        good = max((x for x, (e, _) in self.points.items() if e <= error), default=None)
        bad = min((x for x, (e, _) in self.points.items() if e > error and (good is None or x > good)), default=None)
        return good, bad

    def _between(self, good: float | None, bad: float | None, error: float) -> float | None:
        """Where to measure next; None where the bracket is closed."""
        if good is None and bad is None:
            return self.start or math.sqrt(self.low * self.high)
        if bad is None or good is None:
            known = good or bad
            step = (AIM * error / max(self.at(known), 1e-12)) ** GROWTH
            step = min(max(step, 1.15), 10.0) if good else max(min(step, 1 / 1.15), 0.1)
            return min(max(known * step, self.low), self.high)
        if bad / good < 1.01:
            return None
        e_good, e_bad = (max(self.at(x), 1e-12) for x in (good, bad))
        share = math.log(AIM * error / e_good) / math.log(e_bad / e_good) if e_bad > e_good else 0.5
        return good * (bad / good) ** min(max(share, 0.1), 0.9)
