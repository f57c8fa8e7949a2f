"""What follows from the cases of a report: how many times faster ours is at the same error, which settings are."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench.workloads import PRESETS

SLOW = 0.85  # a walk below this share of its kernel's own dense rate is said to be


def heads_of(case: dict) -> int | str | None:
    """What heads a case of `peers` is of: the length of synthetic ones, the file's name of real ones."""
    return case.get("n") if case.get("preset") in (None, *PRESETS) else case["preset"]


def heads_text(heads: int | str | None) -> str:
    """Such heads in a heading."""
    return f"N={heads}" if isinstance(heads, int) else str(heads)


def faster(cases: list[dict], heads: int | str) -> dict[str, dict[float, float]]:
    """For each method and wanted error on some heads (`heads_of`): its time over that of our fastest variant there.

    Block methods stand a second time with their selection as measured and their walk at cuDNN's dense rate.
    """
    timed = [case for case in cases if heads_of(case) == heads and case.get("time")]
    best: dict[float, float] = {}
    for case in timed:
        if case["kind"] == "ours":
            best[case["wanted"]] = min(case["time"]["median"], best.get(case["wanted"], math.inf))
    found: dict[str, dict[float, float]] = {}
    for case in timed:
        for wanted, ours in best.items():
            if case["kind"] == "dense" or case.get("wanted") == wanted:
                found.setdefault(case["name"], {})[wanted] = case["time"]["median"] / ours
                if case["kind"] == "sparse" and "PBS" in case["name"] and case.get("at_cudnn_rate_ms"):
                    at = found.setdefault("PBS-Attn's selection at cuDNN's dense rate", {})
                    at[wanted] = case["at_cudnn_rate_ms"] / ours
    return found


def fastest(cases: list[dict], wanted: float) -> list[dict]:
    """The faster of the settings at each length, by length."""
    found: dict[int, dict] = {}
    for case in cases:
        if case.get("wanted") == wanted and case.get("time"):
            best = found.setdefault(case["n"], case)
            if case["time"]["median"] < best["time"]["median"]:
                found[case["n"]] = case
    return [found[n] for n in sorted(found)]


def crossings_of(cases: list[dict]) -> dict[str, float | None]:
    """Of the cases of `scaling`: the length from which the fastest settings beat each dense kernel, at each error."""
    found = {}
    for wanted in sorted({case["wanted"] for case in cases if "wanted" in case}, reverse=True):
        calls = fastest(cases, wanted)
        for rival in ("dense", "cudnn"):
            pairs = [(call["n"], call[rival] / call["time"]["median"]) for call in calls if call.get(rival)]
            found[f"{rival}, error {wanted}"] = crossing(pairs)
    return found


def crossing(points: Sequence[tuple[int, float]]) -> float | None:
    """The length from which the ratio stays above 1, log-linear between the lengths measured; None: it never does."""
    points = sorted(points)
    if not points or points[-1][1] <= 1:
        return None
    last = next((i for i in reversed(range(len(points))) if points[i][1] <= 1), None)
    if last is None:
        return float(points[0][0])
    (a, low), (b, high) = points[last], points[last + 1]
    share = math.log(1 / low) / math.log(high / low)
    return a * (b / a) ** share
