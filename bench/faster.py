"""What follows from the cases of a report: how many times faster ours is at the same error, which settings are."""

from __future__ import annotations

import math

from bench.workloads import PRESETS

SLOW = 0.85  # a walk below this share of its kernel's own dense rate is said to be


def heads_of(case: dict) -> int | str | None:
    """What heads a case of `peers` is of: the length of synthetic ones, the file's name of real ones."""
    return case.get("n") if case.get("preset") in (None, *PRESETS) else case["preset"]


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
