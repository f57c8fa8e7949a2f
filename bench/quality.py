"""`python -m bench quality`: density against error, ours beside PBS-Attn, the paper, block top-CDF and the oracle."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import s2o_cupy as s2o
from bench import baselines
from bench.baselines import Points
from bench.record import Record
from s2o_cupy.exact import ExactRows, compare_rows, exact_rows, sample_rows
from s2o_cupy.files import load_arrays
from s2o_cupy.progress import Bar
from s2o_cupy.quality import checked
from s2o_cupy.samples import NAMES

TAUS = tuple(float(t) for t in np.geomspace(0.5, 1e-5, 24))
LOW, HIGH = 0.12, 0.4  # densities that methods are compared at
METHODS = ("ours", "no tail", "paper", "PBS-Attn", "block top-CDF", "oracle")


def arguments(parser, plots: bool = True) -> None:
    """Adds the options that `main` reads."""
    parser.add_argument("files", nargs="*", metavar="FILE.npz", help="more heads: an npz with q, k, v")
    parser.add_argument(
        "--settings", type=_settings, default=s2o.Settings(), metavar="FILE", help="settings to measure (JSON)"
    )
    parser.add_argument(
        "--precise",
        action="store_const",
        dest="settings",
        const=s2o.Settings.precise(),
        help="measure Settings.precise()",
    )
    if plots:
        parser.add_argument("--plots", metavar="DIR", help="write one PNG a file there")


def main(options, record: Record | None = None) -> dict:
    """Measure every file, print the table, and return what JSON holds."""
    files = read_files(options.files)
    if not options.settings.causal:
        raise ValueError("causal is False; allowed: True, for the baselines are causal")
    report = {"settings": options.settings.as_dict(), "files": {}}
    with Bar("quality", sum(len(METHODS) for _ in files)) as bar:
        for name, q, k, v in files:
            report["files"][name] = _file(q, k, v, options.settings, bar)
            if record:
                record.put(**report)
    _summary(report)
    _print(report)
    if record:
        record.put(**report)
    if options.plots:
        _plots(report, Path(options.plots))
    return report


def read_files(paths: list[str]) -> list[tuple]:
    """(name, q, k, v) of the shipped samples and of each npz; a file that bears a sample's name is numbered."""
    files = [(name, *s2o.load_sample(name)[:3]) for name in NAMES]
    for path in paths:
        stem, taken = Path(path).stem, [name for name, *_ in files]
        name = next(name for name in (stem, *(f"{stem}_{i}" for i in range(2, 9999))) if name not in taken)
        files.append((name, *load_arrays(path, ("q", "k", "v")).values()))
    return files


def _settings(path: str):
    try:
        return s2o.Settings.load(path)
    except (OSError, TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def ours(q, k, v, settings, exact: ExactRows, taus=TAUS) -> list[Points]:
    """One `Points` a query head along `tau`, over the rows of `exact`; the heads of a batch follow one another."""
    problem, _ = checked(q, k, v, settings)
    plan = s2o.plan(q, k, settings)
    heads = [([], []) for _ in range(problem.batch * problem.heads_q)]
    for tau in taus:
        result = s2o.attend(q, k, v, plan, tau=tau, full_output=True)
        rows = compare_rows(problem, result, exact)
        for head, (density, gap) in enumerate(heads):
            density.append(result.stats.head_density.flat[head])
            gap.append(rows.gap.reshape(len(heads), -1)[head].sum())
    norm = (exact.out.astype(np.float64) ** 2).sum(axis=(2, 3)).reshape(-1)
    return [Points(np.array(d), np.array(g), float(n)) for (d, g), n in zip(heads, norm, strict=True)]


def _file(q, k, v, settings, bar) -> dict:
    """Every method's points on one file, a list over heads each."""
    problem, arrays = checked(q, k, v, settings)
    exact = exact_rows(problem, *arrays, sample_rows(problem.n_q, problem.n_q, 0))
    same = {name: getattr(settings, name) for name in ("segment", "block_q", "block_k", "pool", "causal", "scale")}
    paper = s2o.Settings.paper(**same)
    found = {}
    for name, variant in (("ours", settings), ("no tail", settings.replace(tail=None)), ("paper", paper)):
        found[name] = ours(q, k, v, variant, exact)
        if name == "paper":
            position = ours(q, k, v, variant.replace(query_order="position"), exact)
            found[name] = min(found[name], position, key=lambda heads: _mean_log_error(Points.pooled(heads)))
        bar.step()
    single = [
        (arrays[0][b, h], *(x[b, h // problem.group] for x in arrays[1:]))
        for b, h in np.ndindex(problem.batch, problem.heads_q)
    ]
    tiles = (settings.segment, settings.block_q, settings.block_k, settings.pool)
    for name, method, more in (
        ("PBS-Attn", baselines.pbs_attention, ()),
        ("block top-CDF", baselines.block_attention, ()),
        ("oracle", baselines.oracle, tiles),
    ):
        found[name] = [method(*x, *more, scale=problem.scale) for x in single]
        bar.step()
    return {
        name: [{"density": x.density.tolist(), "gap": x.gap.tolist(), "norm": x.norm} for x in heads]
        for name, heads in found.items()
    }


def _mean_log_error(points: Points) -> float:
    """Mean log error between LOW and HIGH, as far as the curve reaches there; infinite where it does not."""
    error = points.curve.error_at(np.linspace(LOW, HIGH, 8))
    return float(np.log(error[np.isfinite(error)]).mean()) if np.isfinite(error).any() else np.inf


def _pooled(file: dict, method: str):
    heads = [Points(np.array(x["density"]), np.array(x["gap"]), x["norm"]) for x in file[method]]
    return Points.pooled(heads)


def _summary(report: dict) -> None:
    """For each file and rival: MSE ratio and density ratio at our own points between LOW and HIGH, all heads pooled."""
    for file in report["files"].values():
        points = _pooled(file, "ours")
        inside = (points.density >= LOW) & (points.density <= HIGH)
        density, error = points.density[inside], np.sqrt(points.gap[inside] / points.norm)
        file["summary"] = {"density": density.tolist(), "error": error.tolist()}
        for method in METHODS[1:]:
            rival = _pooled(file, method).curve
            file["summary"][method] = {
                "mse_ratio": ((rival.error_at(density) / error) ** 2).tolist(),
                "density_ratio": (rival.density_at(error) / density).tolist(),
            }
        denser, plain = (points.density > HIGH) & (points.gap > 0), _pooled(file, "no tail").curve
        error = np.sqrt(points.gap[denser] / points.norm)
        file["summary"]["above"] = {
            "density": points.density[denser].tolist(),
            "mse_ratio": ((plain.error_at(points.density[denser]) / error) ** 2).tolist(),
        }


def _print(report: dict) -> None:
    grid = (0.12, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)
    for name, file in report["files"].items():
        print(f"\n{name}: relative error at density, {len(file['ours'])} heads pooled")
        print(f"{'':16}" + "".join(f"{d:9.2f}" for d in grid))
        for method in METHODS:
            curve = _pooled(file, method).curve
            print(f"{method:16}" + "".join(f"{curve.error_at(d):9.4f}" for d in grid))
    print(f"\nOur MSE and density against each method, at our own points of density {LOW} to {HIGH}:")
    print(
        f"{'':16} {'MSE: geometric mean':>20} {'least':>7} {'density: geometric mean':>24} {'least':>7} {'points':>9}"
    )
    report["ratios"] = {}
    for method in METHODS[1:]:
        parts = [file["summary"][method] for file in report["files"].values()]
        mse, density = (np.concatenate([p[key] for p in parts]) for key in ("mse_ratio", "density_ratio"))
        ratios = dict(
            zip(("mse", "mse_least", "density", "density_least"), (*_over(mse), *_over(density)), strict=True)
        )
        ratios |= {"points": len(mse), "compared": int(np.isfinite(mse).sum())}  # a rival's curve may not reach
        report["ratios"][method] = ratios
        print(
            f"{method:16} {ratios['mse']:20.2f} {ratios['mse_least']:7.2f} "
            f"{ratios['density']:24.2f} {ratios['density_least']:7.2f} {ratios['compared']:4d} of {ratios['points']}"
        )
    above = np.concatenate([file["summary"]["above"]["mse_ratio"] for file in report["files"].values()])
    report["ratios"]["no tail, above"] = dict(zip(("mse", "mse_least"), _over(above), strict=True))
    print(f"Above density {HIGH}, MSE without the tail over ours: {_over(above)[0]:.2f}, least {_over(above)[1]:.2f}")


def _over(ratios: np.ndarray) -> tuple[float, float]:
    """Geometric mean and least of what could be compared; NaN where nothing could."""
    ratios = ratios[np.isfinite(ratios)]
    return (float(np.exp(np.log(ratios).mean())), float(ratios.min())) if len(ratios) else (np.nan, np.nan)


def _plots(report: dict, folder: Path) -> None:
    from s2o_cupy import plots

    for name, file in report["files"].items():
        curves = {}
        for method in METHODS:
            curve = _pooled(file, method).curve
            curves[method] = (curve.density[:, None], curve.error[:, None])
        plots.save_sweep(folder / f"quality_{name}.png", curves, f"{name}: all heads pooled")
