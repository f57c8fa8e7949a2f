"""`python -m bench report`: one page with plots from JSON, which needs no other file; the headline figure; tables.

``--update`` makes every table between ``<!-- bench JSON TABLE [N] -->`` and ``<!-- /bench -->`` anew from the JSON it
names, so that no number of it is typed; TABLE is one of `TABLES`. A JSON with a star, as in ``peers_*.json``, is the
newest one, and the table then says which. Without files it updates all documents of the checkout, and `FIGURES`.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shlex
from pathlib import Path

from bench.faster import SLOW, crossings_of, faster, fastest, heads_of, heads_text
from s2o_cupy.files import replacing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
FIGURES = {"docs/speed.png": "peers_*.json", "docs/scaling.png": "scaling_*.json"}
WHAT = {
    "density": "density that settings need at an error on long heads, by the CPU backend",
    "cpu": "speed, memory and first calls of the CPU backend",
    "gpu": "dense, plan, attend and whole calls of the CUDA backend, beside PyTorch's kernels and Triton loops",
    "peers": "every method at the same error, dense kernels beside",
    "scaling": "one error from 1K tokens on: time, density, stages, memory",
    "kernels": "every kernel alone beside its floor",
}
COLUMNS = ("case", "dtype", "shape", "density", "error", "ms", "p10", "p90", "TFLOP/s", "ratio", "note")
_MARKED = re.compile(r"(<!-- bench (\S+) (\w+)(?: (\w+))? -->\n).*?(<!-- /bench -->)", re.DOTALL)
_STYLE = "body{font:15px sans-serif;margin:2em;max-width:80em}table{border-collapse:collapse;font-size:13px}"
_STYLE += "td,th{padding:2px 8px;text-align:right;border-bottom:1px solid #ddd}"
_STYLE += "td:first-child,td:last-child{text-align:left}"


def arguments(parser) -> None:
    """Adds the options that `main` reads."""
    parser.add_argument("files", nargs="*", metavar="FILE.json", help="reports (default: all of bench/results)")
    parser.add_argument("--out", default="bench_report.html", metavar="FILE.html", help="the page")
    parser.add_argument("--figure", metavar="FILE.png", help="only the figure of one `peers` or `scaling` report")
    parser.add_argument("--update", nargs="*", metavar="FILE.md", help="only rewrite marked tables (default: all)")


def main(options) -> None:
    """Write the page, or the figure, or the tables."""
    if options.update is not None:
        for path in map(Path, options.update or documents()):
            text = path.read_text()
            new = updated(text)
            if new != text:
                path.write_text(new)
            print(f"{path}: {len(_MARKED.findall(text))} tables{'' if new == text else ', rewritten'}")
        for name, pattern in () if options.update else FIGURES.items():
            if source := newest(pattern):
                figure(ROOT / name, load(source), source)
        return
    paths = [Path(path) for path in options.files] or sorted(RESULTS.glob("*.json"))
    reports = {path: load(path) for path in paths}
    readable = {path: report for path, report in reports.items() if report}
    for path in reports:
        if path not in readable:
            print(f"{path}: written by an older bench, or by another command; left out")
    if options.figure:
        named = [path for path, report in readable.items() if report["bench"] in ("peers", "scaling")]
        if len(named) != 1:
            raise ValueError(f"{len(named)} of the files are `peers` or `scaling` reports; allowed: one for --figure")
        figure(Path(options.figure), readable[named[0]], named[0])
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


def documents() -> list[Path]:
    """The checkout's documents that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), RESULTS / "README.md"]


def newest(pattern: str) -> Path | None:
    """The report under bench/results whose name fits and whose machine has the last date; None without one."""
    dated = [(report["machine"].get("date", ""), path) for path in RESULTS.glob(pattern) if (report := load(path))]
    return max(dated)[1] if dated else None


def figure(path: Path, report: dict, source: Path) -> None:
    """A report's first figure as a PNG that names its source."""
    from bench import figures

    figures.save(path, report, source)
    print(path)


def command(report: dict) -> str:
    """The command that made a report, without where it wrote."""
    words = iter(report["arguments"])
    kept = [word for word in words if not (word == "--json" and next(words, None))]
    return shlex.join(["python", "-m", "bench", *kept])


# --- the page -----------------------------------------------------------------------------------
def page(reports: dict[Path, dict]) -> str:
    """HTML that needs no other file."""
    from bench import figures

    parts = [f"<!doctype html><meta charset=utf-8><title>s2o_cupy: benchmarks</title><style>{_STYLE}</style>"]
    parts.append("<h1>s2o_cupy: benchmarks</h1>")
    for path, report in reports.items():
        machine = "; ".join(f"{key} {value}" for key, value in report["machine"].items())
        parts.append(f"<h2>{html.escape(path.name)}</h2><p><code>{html.escape(command(report))}</code></p>")
        parts.append(f"<p>{html.escape(machine)}</p>")
        for plot in figures.of(report):
            data = io.BytesIO()
            plot.savefig(data, format="png", dpi=110)
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
        if kind not in TABLES:
            raise ValueError(f"table {kind!r} of {name!r}; allowed: {', '.join(TABLES)}")
        if name == "*":
            return head + "\n".join(TABLES[kind](None, None)) + "\n" + foot
        path = newest(name) if "*" in name else RESULTS / name
        report = load(path) if path and path.is_file() else None
        if report is None and "*" not in name:
            raise ValueError(f"table {kind!r} of {name!r}; allowed: a report under {RESULTS}")
        if report is None:
            return head + f"Not measured yet: no `{name}`.\n" + foot
        lines = TABLES[kind](report, int(n) if n and n.isdigit() else n or None)
        if "*" in name:
            lines = [*lines, "", f"From `bench/results/{path.name}`: {origin(report)}."]
        return head + "\n".join(lines) + "\n" + foot

    return _MARKED.sub(table, text)


def origin(report: dict) -> str:
    """The command and the machine of a report, and whether it was cut off."""
    machine = report["machine"]
    whole = report.get("finished", True) and not report.get("interrupted")
    cut = "" if whole else ", cut off before its end"
    where = machine.get("gpu") or machine.get("cpu", "?")
    return f"`{command(report)}`, {where}, commit {machine.get('commit', '?')}, {machine.get('date', '?')}{cut}"


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table; a line that says so where it has no row."""
    if not rows:
        return [f"{head[0]}: not measured."]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def table_faster(report: dict, n: int | str | None) -> list[str]:
    """Each method's time over ours at each error, at one length or of one file's heads."""
    found = faster(report["cases"], n)
    errors = sorted({wanted for row in found.values() for wanted in row}, reverse=True)
    ours = {case["wanted"]: case for case in sorted(_ours(report, n), key=lambda case: -case["time"]["median"])}
    rows = [["our fastest, ms", *(_ms(ours[e]) for e in errors)]] if errors else []
    rows += [[name, *(_number(row.get(e), 2) for e in errors)] for name, row in found.items()]
    return markdown([f"{heads_text(n)}, time over ours at error", *(f"{e:g}" for e in errors)], rows)


def _ours(report: dict, n: int | str | None) -> list[dict]:
    """Our timed cases at one length, or of one file's heads."""
    cases = report["cases"]
    return [case for case in cases if case.get("kind") == "ours" and case.get("time") and heads_of(case) == n]


def table_cases(report: dict, n: int | None) -> list[str]:
    """Every case that was timed, at one length or all."""
    rows = [cells(case) for case in report["cases"] if case.get("time") and n in (None, case.get("n"))]
    keep = [i for i, name in enumerate(COLUMNS) if name not in ("dtype", "p10", "p90")]
    return markdown([COLUMNS[i] for i in keep], [[row[i] for i in keep] for row in rows])


def table_matched(report: dict, n: int | str | None) -> list[str]:
    """Milliseconds and density of each sparse method at each error, dense kernels in the first rows.

    In brackets: milliseconds at the kernel's own dense rate, where its walk is slower than `SLOW` of that.
    """
    cases = [case for case in report["cases"] if case.get("time") and heads_of(case) == n]
    errors = sorted({case["wanted"] for case in cases if "wanted" in case}, reverse=True)
    dense = [case for case in cases if case.get("kind") == "dense"]
    rows = [[case["name"], _ms(case), *([""] * len(errors))] for case in dense]

    def cell(case: dict) -> str:
        slow = case.get("kernel_tflops", 1) < SLOW * case.get("dense_tflops", 0)
        own = f" [{_digits(case['at_dense_rate_ms'])}]" if slow else ""
        return f"{_ms(case)}{own}, {case['density']:.3f}"

    for name in dict.fromkeys(case["name"] for case in cases if "wanted" in case):
        by_error = {case["wanted"]: case for case in cases if case["name"] == name and "wanted" in case}
        rows.append([name, "", *(cell(by_error[e]) if e in by_error else "-" for e in errors)])
    return markdown([heads_text(n), "dense, ms", *(f"error {e:g}: ms, density" for e in errors)], rows)


def table_lengths(report: dict, n: int | None) -> list[str]:
    """The faster settings at each length and error of a `scaling` report, dense kernels beside."""
    errors = sorted({case["wanted"] for case in report["cases"] if "wanted" in case}, reverse=True)
    found = {(wanted, case["n"]): case for wanted in errors for case in fastest(report["cases"], wanted)}

    def cells(case: dict | None) -> list[str]:
        if case is None:
            return ["-", "-"]
        ranking, how = case["shares"].get("rank"), case["name"].removeprefix("attention()").strip(", ") or "defaults"
        path = f"{ranking:.0%}, {how}" if ranking else "dense"
        return [f"{_ms(case)}, {case['density']:.3f}, {path}", f"{case['bytes'] / 2**30:.2f}"]

    rows = []
    for length in sorted({length for _, length in found}):
        at = [found.get((wanted, length)) for wanted in errors]
        dense = next(case for case in at if case)
        row = [str(length), *(_digits(dense.get(rival)) for rival in ("dense", "cudnn"))]
        rows.append([*row, *(cell for case in at for cell in cells(case))])
    head = ["N", "dense_attention, ms", "cuDNN, ms"]
    for wanted in errors:
        head += [f"error {wanted:g}: ms, density, share of ranking, settings", "GiB"]
    crossed = [
        f"{name} {'not reached' if at is None else f'{at:.0f}'}" for name, at in crossings_of(report["cases"]).items()
    ]
    return [*markdown(head, rows), "", f"Sparse is faster from N on (interpolated): {'; '.join(crossed)}."]


def table_stages(report: dict, n: int | None) -> list[str]:
    """What a `gpu` report has for each preset and length: milliseconds, densities, rates of computed pairs."""
    found = {}
    for case in report["cases"]:
        preset, _, stage = case["name"].partition(": ")
        if case.get("time") and case.get("preset") == preset:
            found.setdefault(stage, {})[preset, case["n"]] = case
    columns = sorted({column for by_column in found.values() for column in by_column})

    def cell(case: dict | None) -> str:
        if not case:
            return "-"
        share = f", density {case['density']:.3f}" if (case.get("density") or 1) < 1 else ""
        rate = f", {case['tflops']:.0f} TFLOP/s" if case.get("tflops") else ""
        return f"{_ms(case)} ms{share}{rate}"

    rows = [[stage, *(cell(by_column.get(column)) for column in columns)] for stage, by_column in found.items()]
    return markdown(["stage", *(f"{preset}, N={length}" for preset, length in columns)], rows)


def table_crossover(report: dict, n: int | None) -> list[str]:
    """Where ranking pays, of a `gpu` report: parts of a call and the whole of it, in milliseconds."""
    rows = []
    for case in report["cases"]:
        head, _, preset = case["name"].partition(":")[0].partition(", ")
        if head == "crossover" and case.get("time"):
            parts = [_digits(case[part]["median"]) for part in ("dense", "plan", "attend")]
            path = case["note"].partition(";")[0]
            rows.append([str(case["n"]), preset, *parts, f"{_ms(case)}, {path}", _number(case["ratio"], 2)])
    return markdown(["N", "heads", "dense", "plan", "attend", "attention()", "dense over attention()"], rows)


def table_density(report: dict, n: int | None) -> list[str]:
    """Density of each settings at each error, a column for each set of heads."""
    cases = [case for case in report["cases"] if case.get("wanted")]
    columns = sorted({(case["source"], case["n"], -case["wanted"]) for case in cases})
    found = {(case["name"], case["source"], case["n"], -case["wanted"]): case.get("density") for case in cases}
    names = dict.fromkeys(case["name"] for case in cases)
    rows = [[name, *(_number(found.get((name, *column)), 3) for column in columns)] for name in names]
    return markdown(["density", *(f"{source}, N={n}, error {-e:g}" for source, n, e in columns)], rows)


def table_files(report: dict | None, n: int | None) -> list[str]:
    """Every report under bench/results."""
    reports = [(path.name, report) for path in sorted(RESULTS.glob("*.json")) if (report := load(path))]
    return markdown(
        ["file", "what", "from"], [[name, WHAT.get(x["bench"], x["bench"]), origin(x)] for name, x in reports]
    )


TABLES = {
    "faster": table_faster,
    "cases": table_cases,
    "matched": table_matched,
    "lengths": table_lengths,
    "stages": table_stages,
    "crossover": table_crossover,
    "density": table_density,
    "files": table_files,
}


def _ms(case: dict) -> str:
    return _digits(case["time"]["median"])


def _digits(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.3g}" if ms < 100 else f"{ms:.0f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
