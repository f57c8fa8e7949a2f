"""Pictures (matplotlib, the extra `plot`, imported only when one is drawn); legible in grey."""

from __future__ import annotations

import os

import numpy as np

from s2o_cupy.arrays import on_host
from s2o_cupy.planning import Plan
from s2o_cupy.results import Stats


def require() -> None:
    """Refuse, saying what to install, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 's2o-cupy[plot]'") from None


def save_before_after(path: str | os.PathLike, mass: np.ndarray, plan: Plan, stats: Stats, title: str) -> None:
    """A head's attention before and after ranking, where each row tile stopped, and the mass along the ranking.

    Parameters
    ----------
    path : path
        Where the PNG goes.
    mass : array (row tiles, Nk)
        Mean probability of each key over each row tile: `exact.tile_mass`.
    plan, stats
        Of one head (B = Hq = 1), in position order.
    """
    require()
    problem, block = stats.problem, stats.problem.settings.block_k
    tiles = on_host(stats.tiles).reshape(-1)
    if len(mass) != len(tiles):
        raise ValueError(f"mass has {len(mass)} rows and the result {len(tiles)} row tiles; allowed: the same")
    if not problem.history[-1]:
        raise ValueError(f"nothing was ranked over {problem.n_k} keys; allowed: a head with a history")
    figure, (before, after, along) = _figure(1, 3, (15, 5))
    ranked = _in_ranked_order(mass, plan)
    history = ranked.shape[1]
    _map(before, mass, "Before: keys in position order", "key position (tokens)", mass.shape[1])
    before.set_ylabel(f"row tile ({problem.settings.block_q} queries each)")
    image = _map(after, ranked, "After: history keys in ranked order", "rank of key", history)
    figure.colorbar(image, ax=[before, after], label="mean probability of a key (log scale)")
    depth = np.minimum(tiles * block, problem.listed[problem.tile_segment])
    after.step(depth, np.arange(len(depth)) + 0.5, where="mid", color="black", lw=2.5)
    after.step(depth, np.arange(len(depth)) + 0.5, where="mid", color="white", lw=1)
    after.text(0.97, 0.97, "outlined: where each\nrow tile stopped", transform=after.transAxes, ha="right", va="top")

    last = int(problem.history[-1])
    for keys, style, label in ((mass[-1, :last], "--", "position order"), (ranked[-1, :last], "-", "ranked order")):
        missed = 1 - np.cumsum(keys, dtype=np.float64) / max(keys.sum(dtype=np.float64), 1e-30)
        along.plot(np.arange(1, last), missed[:-1], style, color="black", label=label)
    along.axvline(depth[-1], color="grey", ls=":", lw=2, label=f"walk stops at {depth[-1]} keys")
    along.set(xscale="log", yscale="log", xlabel="history keys walked", ylabel="share of the history's mass missed")
    along.set(title="Last row tile: mass along the walk", ylim=(1e-6, 1.5))
    along.legend(loc="lower left")
    figure.suptitle(f"{title}, density {stats.density:.3f}", parse_math=False)
    _save(figure, path)


def save_sweep(path: str | os.PathLike, curves: dict, title: str) -> None:
    """Density against relative error.

    Parameters
    ----------
    path : path
        Where the PNG goes.
    curves : dict of name to (density, error)
        Arrays (points, heads); one line style and marker a line. A point without error is left out.
    """
    figure, axes = _figure(1, 1, (7, 5))
    lines = [
        (name if density.shape[1] == 1 else f"{name}, head {head}", density[:, head], error[:, head])
        for name, (density, error) in curves.items()
        for head in range(density.shape[1])
    ]
    for i, (label, density, error) in enumerate(lines):
        some = error > 0
        look = {
            "marker": "osv^D*"[i % 6],
            "ms": 4,
            "color": str(0.6 * (i % 3) / 2),
            "ls": ("-", "--", "-.", ":")[i % 4],
        }
        axes.plot(density[some], error[some], **look, label=label if len(lines) < 9 else None)
    axes.set(xlabel="density (computed / allowed pairs)", ylabel="relative L2 error", yscale="log")
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    _save(figure, path)


def _in_ranked_order(mass: np.ndarray, plan: Plan) -> np.ndarray:
    """(row tiles, longest history) mass of each tile's history keys, best first; NaN past a history's end."""
    problem, kv_order = plan.problem, on_host(plan.kv_order)
    offsets = on_host(plan.kv_offsets).reshape(-1)
    ranked = np.full((len(mass), int(problem.history[-1])), np.nan, np.float32)
    for tile, s in enumerate(problem.tile_segment):
        order = kv_order[offsets[s] : offsets[s + 1]]
        ranked[tile, : len(order)] = mass[tile, order]
    return ranked


def _map(axes, mass: np.ndarray, title: str, xlabel: str, keys: int):
    """Draw (row tiles, keys) as mean log probability in at most 256 columns."""
    from matplotlib.colors import LogNorm

    edges = np.linspace(0, keys, min(keys, 256) + 1).astype(int)
    with np.errstate(all="ignore"):
        counts = np.add.reduceat(~np.isnan(mass), edges[:-1], axis=1)
        columns = np.add.reduceat(np.nan_to_num(mass), edges[:-1], axis=1) / counts
    extent = (0, keys, len(mass), 0)
    columns = np.where(columns > 0, columns, np.nan)
    image = axes.imshow(columns, aspect="auto", extent=extent, cmap="viridis", norm=LogNorm(1e-7, 1e-2))
    axes.set(title=title, xlabel=xlabel)
    return image


def _figure(rows: int, columns: int, size: tuple[float, float]):
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def _save(figure, path: str | os.PathLike) -> None:
    from s2o_cupy.files import replacing

    with replacing(path) as file:
        figure.savefig(file, format="png")
