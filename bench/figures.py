"""Plots of a report (matplotlib, the extra `plot`); legible in grey."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from bench.faster import fastest, heads_of, heads_text
from s2o_cupy import plots

MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")


def save(path: str | os.PathLike, report: dict, source: Path) -> None:
    """A report's figure as a PNG that names the JSON it was made from; of a `peers` report the longest length's."""
    stated = {"Source": json.dumps({"file": source.name, "sha256": digest(source)})}
    of(report)[-1].savefig(path, format="png", dpi=130, metadata=stated)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def source(path: Path) -> dict | None:
    """What a PNG says it was made from, {'file', 'sha256'}; None where it says nothing."""
    data, place = path.read_bytes(), 8
    while place + 8 <= len(data):
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        key, _, text = data[place + 8 : place + 8 + size].partition(b"\0")
        if kind == b"tEXt" and key == b"Source":
            return json.loads(text)
        place += size + 12
    return None


def of(report: dict) -> list:
    """The figures that a report's kind has; none for the kinds that are tables."""
    timed = [case for case in report["cases"] if case.get("time")]
    if report["bench"] == "peers" and timed:
        return [matched(report, heads) for heads in dict.fromkeys(map(heads_of, sorted(timed, key=lambda x: x["n"])))]
    if report["bench"] == "scaling" and any("wanted" in case for case in timed):
        return [scaling(report)]
    if report["bench"] == "kernels" and any(case.get("floor_ms") for case in timed):
        return [floors(report, n) for n in sorted({case["n"] for case in timed if "n" in case})]
    return []


def matched(report: dict, heads: int | str):
    """Time of every method against the error it meets, on some heads (`heads_of`); dense kernels are lines across.

    Of a report with one error it is bars.
    """
    figure, axes = _figure()
    cases = [case for case in report["cases"] if case.get("time") and heads_of(case) == heads]
    title = f"{heads_text(heads)}, {_heads(cases)}, causal, on {report['machine'].get('gpu', '?')}"
    wanted = {case["wanted"] for case in cases if "wanted" in case}
    if len(wanted) == 1:
        axes.set_title(f"{title}; relative error {wanted.pop():g}", loc="right")
        _bars(axes, [case for case in cases if case["kind"] == "dense" or "wanted" in case])
        return figure
    dense = [case for case in cases if case["kind"] == "dense"]
    for i, case in enumerate(dense):
        axes.axhline(case["time"]["median"], color="grey", ls=LINES[i % 4], lw=1, label=case["name"])
    for i, name in enumerate(dict.fromkeys(case["name"] for case in cases if "wanted" in case)):
        points = sorted((c["wanted"], c["time"]["median"]) for c in cases if c["name"] == name and "wanted" in c)
        ours = name.startswith("s2o_cupy")
        style = {"color": "black", "lw": 2.2, "ls": LINES[i % len(LINES)]} if ours else {"lw": 1.2}
        axes.plot(*zip(*points, strict=True), marker=MARKS[i % len(MARKS)], label=name, **style)
    axes.set(xscale="log", yscale="log", xlabel="relative error of attention", ylabel="ms, ranking included")
    axes.set_title(title)
    errors = sorted({case["wanted"] for case in cases if "wanted" in case})
    axes.set_xticks(errors, [f"{error:g}" for error in errors])
    axes.xaxis.set_minor_formatter("")
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted("{x:g}")
    axes.invert_xaxis()
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _bars(axes, cases: list[dict]) -> None:
    """Milliseconds of each case; ours black, dense kernels pale."""
    for place, case in enumerate(cases):
        ms = case["time"]["median"]
        shade = {"ours": "black", "dense": "0.75"}.get(case["kind"], "0.45")
        axes.barh(case["name"], ms, color=shade)
        axes.annotate(f"{ms:.3g}", (ms, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set(xlabel="ms of a whole call, ranking included")
    axes.margins(x=0.08)
    axes.invert_yaxis()


def scaling(report: dict):
    """Time against length, ours at each error and the dense kernels; and the shares of the stages."""
    figure, axes = _figure(2)
    cases = [case for case in report["cases"] if case.get("time") and "wanted" in case]
    errors = sorted({case["wanted"] for case in cases}, reverse=True)
    for i, wanted in enumerate(errors):
        mine = fastest(cases, wanted)
        lengths = [case["n"] for case in mine]
        axes[0].plot(
            lengths, [c["time"]["median"] for c in mine], marker=MARKS[i], color="black", ls=LINES[i],
            label=f"s2o_cupy at error {wanted:g}",
        )  # fmt: skip
    for i, rival in enumerate(("dense", "cudnn")):
        points = sorted({(case["n"], case[rival]) for case in cases if case.get(rival)})
        if points:
            label = {"dense": "s2o_cupy dense", "cudnn": "cuDNN"}[rival]
            axes[0].plot(*zip(*points, strict=True), color="grey", marker=MARKS[4 + i], ls=LINES[i], label=label)
    axes[0].set(xscale="log", yscale="log", xlabel="N", ylabel="ms, ranking included")
    axes[0].legend(fontsize=8)
    last = fastest(cases, errors[-1])
    floor = [0.0] * len(last)
    for i, stage in enumerate(dict.fromkeys(name for case in last for name in case["shares"])):
        share = [case["shares"].get(stage, 0.0) for case in last]
        axes[1].bar(range(len(last)), share, bottom=floor, label=stage, color=str(0.15 + 0.13 * i), edgecolor="white")
        floor = [a + b for a, b in zip(floor, share, strict=True)]
    axes[1].set_xticks(range(len(last)), [_thousands(case["n"]) for case in last])
    axes[1].set(xlabel="N", ylabel="share of the call", title=f"stages at error {last[0]['wanted']:g}")
    axes[1].legend(fontsize=8)
    return figure


def floors(report: dict, n: int):
    """How near each kernel is to the floor that its operations and bytes set."""
    figure, axes = _figure()
    cases = [case for case in report["cases"] if case.get("floor_ms") and case.get("n") == n]
    names = [f"{case['name']} ({case['floor']})" for case in cases]
    axes.barh(names, [case["ratio"] for case in cases], color="0.4")
    for place, case in enumerate(cases):
        axes.text(case["ratio"] + 0.01, place, f"{case['time']['median']:.3g} ms", va="center", fontsize=8)
    axes.set(xlim=(0, 1.15), xlabel="floor over time", title=f"N={n}, on {report['machine'].get('gpu', '?')}")
    axes.invert_yaxis()
    return figure


def _figure(columns: int = 1):
    plots.require()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5 if columns == 1 else 13, 5), layout="constrained")
    return figure, figure.subplots(1, columns)


def _heads(cases: list[dict]) -> str:
    shape = cases[0]["shape"].split()
    return ", ".join(part for part in shape if not part.startswith("N")) + f", {cases[0]['dtype']}"


def _thousands(n: int) -> str:
    return f"{n >> 20}M" if n >= 2**20 else f"{n >> 10}K"
