"""HTML for Jupyter: tables, and pictures as inline SVG, drawn without any package and legible in grey."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

_CELL = 'style="text-align:left;padding:2px 10px"'


def table(columns: Sequence[str], rows: Sequence[Sequence], title: str = "", strong: Sequence[int] = ()) -> str:
    """An HTML table; rows numbered in `strong` are bold."""
    head = "".join(f"<th {_CELL}>{html.escape(str(name))}</th>" for name in columns)
    lines = []
    for number, row in enumerate(rows):
        tag = "b" if number in strong else "span"
        lines.append("".join(f"<td {_CELL}><{tag}>{html.escape(shown(x))}</{tag}></td>" for x in row))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    caption = f"<div><b>{html.escape(title)}</b></div>" if title else ""
    return f"{caption}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def shown(x) -> str:
    """A value as a table shows it: numbers to four digits."""
    if isinstance(x, (bool, np.bool_)) or x is None or isinstance(x, str):
        return str(x)
    return f"{x:.4g}" if isinstance(x, (float, np.floating)) else str(x)


def columns_picture(values, label: str, width: int = 420, height: int = 110) -> str:
    """A column for each value, from 0 to the greatest; at most one a pixel (the greatest of each run is shown)."""
    values = np.nan_to_num(np.asarray(values, np.float64).reshape(-1))
    if not values.size:
        return ""
    runs = np.array_split(values, min(len(values), width))
    heights = np.array([run.max() for run in runs])
    most = heights.max() or 1.0
    step, floor = width / len(heights), height - 16
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{floor - floor * h / most:.1f}" width="{max(step - 0.5, 0.5):.1f}" '
        f'height="{floor * h / most:.1f}"/>'
        for i, h in enumerate(heights)
    )
    text = f'<text x="0" y="{height - 3}" font-size="11">{html.escape(f"{label}; greatest {shown(most)}")}</text>'
    return _svg(width, height, f'<g fill="#666">{bars}</g>{text}')


def dots_picture(values, label: str, width: int = 420, height: int = 130) -> str:
    """A dot for each value over its place, at most 1000 of them, evenly picked."""
    values = np.asarray(values, np.float64).reshape(-1)
    if not values.size:
        return ""
    picked = np.unique(np.linspace(0, len(values) - 1, 1000).astype(np.int64))
    across = picked * ((width - 4) / max(len(values) - 1, 1)) + 2
    along = (height - 18) * (1 - values[picked] / (values.max() or 1)) + 2
    dots = "".join(f'<rect x="{x:.1f}" y="{y:.1f}" width="1.5" height="1.5"/>' for x, y in zip(across, along))
    text = f'<text x="0" y="{height - 3}" font-size="11">{html.escape(f"{label}; 0 to {shown(values.max())}")}</text>'
    return _svg(width, height, f'<g fill="#444">{dots}</g>{text}')


def curves_picture(lines: dict, x_label: str, y_label: str, width: int = 420, height: int = 230) -> str:
    """A line for each name's (x, y), y in a logarithmic scale; points that are not above 0 are left out."""
    kept = {}
    for name, (x, y) in lines.items():
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        some = np.isfinite(x) & (y > 0) & np.isfinite(y)
        if some.any():
            kept[name] = x[some], np.log10(y[some])
    if not kept:
        return ""
    xs, ys = (np.concatenate([pair[i] for pair in kept.values()]) for i in (0, 1))
    low, high, down, up = xs.min(), xs.max(), ys.min(), ys.max()

    def place(x, y):
        across = 40 + (width - 100) * (x - low) / ((high - low) or 1)
        return across, 10 + (height - 50) * (up - y) / ((up - down) or 1)

    parts = []
    for i, (name, (x, y)) in enumerate(kept.items()):
        points = " ".join("{:.1f},{:.1f}".format(*place(*pair)) for pair in zip(x, y))
        dash = ("", "6,3", "2,2", "8,3,2,3")[i % 4]
        parts.append(f'<polyline points="{points}" fill="none" stroke="#444" stroke-dasharray="{dash}"/>')
        parts += ['<circle cx="{:.1f}" cy="{:.1f}" r="2.5"/>'.format(*place(*pair)) for pair in zip(x, y)]
        if len(kept) < 9:
            across, along = place(x[-1], y[-1])
            parts.append(f'<text x="{across + 4:.1f}" y="{along:.1f}" font-size="10">{html.escape(str(name))}</text>')
    texts = [
        (40, height - 6, f"{x_label}: {shown(low)} to {shown(high)}"),
        (40, height - 22, f"{y_label}: {shown(10.0**down)} to {shown(10.0**up)} (log scale)"),
    ]
    parts += [f'<text x="{x}" y="{y}" font-size="11">{html.escape(text)}</text>' for x, y, text in texts]
    return _svg(width, height, "".join(parts))


def _svg(width: int, height: int, inside: str) -> str:
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" '
        f'style="background:#fff">{inside}</svg>'
    )


# --- the package's own objects ---------------------------------------------------------------------
def settings_html(settings) -> str:
    """Every setting beside its default; those that differ in bold."""
    from s2o_cupy.settings import Settings

    default, fields = Settings().as_dict(), settings.as_dict()
    rows = [(name, _plain(value), _plain(default[name]) if name in default else "") for name, value in fields.items()]
    changed = [i for i, name in enumerate(fields) if name in default and fields[name] != default[name]]
    return table(("setting", "value", "default"), rows, type(settings).__name__, strong=changed)


def plan_html(plan) -> str:
    """Sizes of a plan, and where the keys of its longest list lie by rank."""
    from s2o_cupy.arrays import on_host

    p, offsets = plan.problem, on_host(plan.kv_offsets)
    lengths = np.diff(offsets, axis=-1)
    rows = [
        ("batch, order heads, segments", f"{p.batch}, {p.heads_order}, {p.segments}"),
        ("queries and keys", f"{p.n_q} and {p.n_k}, {p.dtype}, head dim {p.dim_qk}"),
        ("keys of a list", f"{lengths.min(initial=lengths.max(initial=0))} to {lengths.max(initial=0)}"),
        ("ranking", f"{plan.settings.rank}, {plan.settings.rank_terms} terms, segment {plan.settings.segment}"),
        ("bytes", f"{plan.nbytes:,}"),
    ]
    picture = ""
    if lengths.size and lengths.max():
        start = int(offsets[0, 0, -2])
        last = on_host(plan.kv_order[start : int(offsets[0, 0, -1])])
        picture = dots_picture(last, "key position by rank, last segment of the first head")
    return table(("plan", ""), rows) + picture


def result_html(result) -> str:
    """Density and tail mass of every head, and how many key tiles each row tile walked."""
    from s2o_cupy.arrays import on_host

    stats, p = result.stats, result.stats.problem
    density = stats.head_density.reshape(-1)
    tail = on_host(stats.tail_mass).reshape(len(density), -1)
    tiles = on_host(stats.tiles).reshape(len(density), -1)
    rows = [
        (head, float(density[head]), float(t.mean()) if t.size else 0.0, float(t.max(initial=0)), float(w.mean()))
        for head, (t, w) in enumerate(zip(tail, tiles))
        if w.size
    ]
    title = f"AttentionResult {tuple(result.out.shape)} {result.out.dtype}, {stats.path}, density {stats.density:.4f}"
    columns = ("head", "density", "tail mass", "greatest", "tiles walked, mean")
    picture = columns_picture(tiles.mean(axis=0), "history key tiles walked by each row tile") if tiles.size else ""
    shown_rows = rows if len(rows) <= 64 else rows[:64]
    more = "" if len(rows) <= 64 else f"<div>and {len(rows) - 64} heads more; keys: {p.n_k}</div>"
    return table(columns, shown_rows, title) + more + picture


def audit_html(audit) -> str:
    """One row a head, and the heads' errors."""
    found = audit.table()
    columns = ("head", *found[0]) if found else ("head",)
    title = f"Audit of {len(audit.rows)} sampled rows"
    picture = columns_picture(audit.error, "relative error of each head")
    return table(columns, [(i, *x.values()) for i, x in enumerate(found)], title) + picture


def sweep_html(sweep) -> str:
    """Density against error of every head, and their means along tau."""
    lines = {
        f"head {head}": (density, error)
        for head, (density, error) in enumerate(zip(_by_head(sweep.density), _by_head(sweep.error)))
    }
    picture = curves_picture(lines, "density", "relative error")
    columns = ("tau", "density", "relative error", "captured mass", "tail mass")
    return table(columns, sweep_rows(sweep), "Sweep, means over heads") + picture


def sweep_rows(sweep) -> list[tuple[float, ...]]:
    """tau, and the heads' mean density, error, captured mass and tail mass."""
    means = (x.reshape(len(sweep.tau), -1).mean(axis=1) for x in (sweep.density, sweep.error))
    more = (x.reshape(len(sweep.tau), -1).mean(axis=1) for x in (sweep.captured_mass, sweep.tail_mass))
    return [tuple(map(float, row)) for row in zip(sweep.tau, *means, *more)]


def _by_head(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1).T


def _plain(value) -> str:
    return value if isinstance(value, str) else repr(value)
