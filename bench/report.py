"""`python -m bench report`: one page with plots from JSON, which needs no other file; the headline figure; tables.

``--update FILE.md`` makes every table between ``<!-- bench JSON TABLE [N] -->`` and ``<!-- /bench -->`` anew from the
JSON it names, so that no number of it is typed; TABLE is one of `TABLES`.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from pathlib import Path

from bench.faster import faster
from s2o_cupy.files import replacing

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = ("case", "dtype", "shape", "density", "error", "ms", "p10", "p90", "TFLOP/s", "ratio", "note")
_MARKED = re.compile(r"(<!-- bench (\S+) (\w+)(?: (\d+))? -->\n).*?(<!-- /bench -->)", re.DOTALL)
_STYLE = "body{font:15px sans-serif;margin:2em;max-width:80em}table{border-collapse:collapse;font-size:13px}"
_STYLE += "td,th{padding:2px 8px;text-align:right;border-bottom:1px solid #ddd}"
_STYLE += "td:first-child,td:last-child{text-align:left}"


def arguments(parser) -> None:
    """Adds the options that `main` reads."""
    parser.add_argument("files", nargs="*", metavar="FILE.json", help="reports (default: all of bench/results)")
    parser.add_argument("--out", default="bench_report.html", metavar="FILE.html", help="the page")
    parser.add_argument("--figure", metavar="FILE.png", help="only the headline figure, of one `peers` report")
    parser.add_argument("--update", nargs="+", metavar="FILE.md", help="only rewrite these files' marked tables")


def main(options) -> None:
    """Write the page, or the figure, or the tables."""
    if options.update:
        for path in map(Path, options.update):
            text = path.read_text()
            new = updated(text)
            if new != text:
                path.write_text(new)
            print(f"{path}: {len(_MARKED.findall(text))} tables{'' if new == text else ', rewritten'}")
        return
    paths = [Path(path) for path in options.files] or sorted(RESULTS.glob("*.json"))
    reports = {path: load(path) for path in paths}
    readable = {path: report for path, report in reports.items() if report}
    for path in reports:
        if path not in readable:
            print(f"{path}: written by an older bench, or by another command; left out")
    if options.figure:
        named = [path for path, report in readable.items() if report["bench"] == "peers"]
        if len(named) != 1:
            raise ValueError(f"{len(named)} of the files are `peers` reports; allowed: name one for --figure")
        from bench import figures

        figures.headline(options.figure, readable[named[0]], named[0])
        print(options.figure)
        return
    with replacing(options.out) as file:
        file.write(page(readable).encode())
    print(options.out)


def load(path: Path) -> dict | None:
    """A report of `bench.record`; None where the JSON is something else."""
    try:
        report = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return report if isinstance(report, dict) and {"bench", "format", "cases"} <= set(report) else None


# --- the page -----------------------------------------------------------------------------------
def page(reports: dict[Path, dict]) -> str:
    """HTML that needs no other file."""
    from bench import figures

    parts = [f"<!doctype html><meta charset=utf-8><title>s2o_cupy: benchmarks</title><style>{_STYLE}</style>"]
    parts.append("<h1>s2o_cupy: benchmarks</h1>")
    for path, report in reports.items():
        machine = "; ".join(f"{key} {value}" for key, value in report["machine"].items())
        command = " ".join(["python -m bench", *report["arguments"]])
        parts.append(f"<h2>{html.escape(path.name)}</h2><p><code>{html.escape(command)}</code></p>")
        parts.append(f"<p>{html.escape(machine)}</p>")
        for figure in figures.of(report):
            data = io.BytesIO()
            figure.savefig(data, format="png", dpi=110)
            parts.append(f'<p><img src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"></p>')
        rows = [cells(case) for case in report["cases"]]
        body = "".join("<tr>" + "".join(f"<td>{html.escape(x)}</td>" for x in row) + "</tr>" for row in rows)
        parts.append("<table><tr>" + "".join(f"<th>{name}</th>" for name in COLUMNS) + f"</tr>{body}</table>")
    return "\n".join(parts)


def cells(case: dict) -> list[str]:
    """One case in the columns of the page."""
    time = case.get("time") or {}
    numbers = [case.get("density"), case.get("error"), *(time.get(key) for key in ("median", "p10", "p90"))]
    digits = (4, 4, 3, 3, 3)
    found = [_number(value, places) for value, places in zip(numbers, digits, strict=True)]
    found += [_number(case.get("tflops"), 0 if (case.get("tflops") or 0) >= 10 else 3), _number(case.get("ratio"), 2)]
    return [case["name"], case["dtype"], case["shape"], *found, case["note"]]


# --- tables in Markdown ----------------------------------------------------------------------------
def updated(text: str) -> str:
    """The text with every marked table made anew from its JSON, named from bench/results."""

    def table(match: re.Match) -> str:
        head, name, kind, n, foot = match.groups()
        report = load(RESULTS / name)
        if report is None or kind not in TABLES:
            raise ValueError(f"table {kind!r} of {name!r}; allowed: {', '.join(TABLES)}, of a report under {RESULTS}")
        return head + "\n".join(TABLES[kind](report, int(n) if n else None)) + "\n" + foot

    return _MARKED.sub(table, text)


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def table_faster(report: dict, n: int | None) -> list[str]:
    """Each method's time over ours at each error, at one length."""
    found = faster(report["cases"], n)
    errors = sorted({wanted for row in found.values() for wanted in row}, reverse=True)
    rows = [[name, *(_number(row.get(e), 2) for e in errors)] for name, row in found.items()]
    return markdown([f"N={n}: time over ours at error", *(f"{e:g}" for e in errors)], rows)


def table_cases(report: dict, n: int | None) -> list[str]:
    """Every case that was timed, at one length or all."""
    rows = [cells(case) for case in report["cases"] if case.get("time") and n in (None, case.get("n"))]
    keep = [i for i, name in enumerate(COLUMNS) if name not in ("dtype", "p10", "p90")]
    return markdown([COLUMNS[i] for i in keep], [[row[i] for i in keep] for row in rows])


def table_matched(report: dict, n: int | None) -> list[str]:
    """Milliseconds and density of each sparse method at each error, dense kernels in the first rows."""
    cases = [case for case in report["cases"] if case.get("time") and case.get("n") == n]
    errors = sorted({case["wanted"] for case in cases if "wanted" in case}, reverse=True)
    dense = [case for case in cases if case.get("kind") == "dense"]
    rows = [[case["name"], _ms(case), *([""] * len(errors))] for case in dense]
    for name in dict.fromkeys(case["name"] for case in cases if "wanted" in case):
        by_error = {case["wanted"]: case for case in cases if case["name"] == name and "wanted" in case}
        at = [by_error.get(e) for e in errors]
        rows.append([name, "", *(f"{_ms(case)}, {case['density']:.3f}" if case else "-" for case in at)])
    return markdown([f"N={n}", "dense, ms", *(f"error {e:g}: ms, density" for e in errors)], rows)


TABLES = {"faster": table_faster, "cases": table_cases, "matched": table_matched}


def _ms(case: dict) -> str:
    ms = case["time"]["median"]
    return f"{ms:.3g}" if ms < 100 else f"{ms:.0f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
