"""How many times faster ours is than each method at the same error, from the cases of a `peers` report."""

from __future__ import annotations

import math


def faster(cases: list[dict], n: int) -> dict[str, dict[float, float]]:
    """For each method and wanted error at length `n`: its time over that of our fastest variant there.

    Block methods stand a second time with their selection as measured and their walk at cuDNN's dense rate.
    """
    timed = [case for case in cases if case.get("n") == n and case.get("time")]
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
