"""`python -m bench knobs`: what one change of each setting does to the error at equal density."""

from __future__ import annotations

import numpy as np

from bench import quality
from bench.baselines import Points
from bench.quality import HIGH, LOW, ours, read_files
from bench.record import Record
from s2o_cupy.exact import exact_rows, sample_rows
from s2o_cupy.progress import Bar
from s2o_cupy.quality import checked

KNOBS = {
    "segment": (64, 128, 512),
    "block_q": (64,),
    "block_k": (32, 128),
    "pool": (64, 256, 512),
    "rank": ("mean",),
    "rank_terms": (7, 31, None),
    "mixture of": (15, 31, 63),
    "rank_levels": (64, 256, 4096, None),
    "tail": ("spread", None),
    "query_order": ("guide",),
    "share_order": (True,),
    "cap": (0.5, 0.25),
}
TAUS = tuple(float(t) for t in np.geomspace(0.5, 1e-4, 16))
GRID = np.linspace(LOW, HIGH, 15)


def arguments(parser) -> None:
    """Adds the options that `main` reads."""
    quality.arguments(parser, plots=False)


def main(options, record: Record | None = None) -> dict:
    """Measure every change on every file; print and return MSE of the base over MSE with the change."""
    files = read_files(options.files)
    changes = [(name, value) for name, values in KNOBS.items() for value in values]
    report = {"settings": options.settings.as_dict(), "files": [name for name, *_ in files], "mse_ratio": []}
    found = {}
    with Bar("knobs", len(files) * (1 + len(changes))) as bar:
        for file, q, k, v in files:
            problem, arrays = checked(q, k, v, options.settings)
            exact = exact_rows(problem, *arrays, sample_rows(problem.n_q, problem.n_q, 0))
            base = _log_error(q, k, v, options.settings, exact)
            bar.step()
            for change in changes:
                found[change, file] = 2 * (base - _log_error(q, k, v, _changed(options.settings, change), exact))
                bar.step()
    print("MSE of the settings below over MSE with one change, at equal density; heads of a file pooled")
    print(options.settings)
    print(f"{'change':22}" + "".join(f"{name[:20]:>22}" for name, *_ in files) + f"{'all':>8}{'worst':>8}")
    for change in changes:
        logs = [found[change, name] for name, *_ in files]
        means = [float(np.exp(np.nanmean(x))) for x in logs]
        whole, worst = float(np.exp(np.nanmean(np.concatenate(logs)))), float(np.exp(np.nanmin(np.concatenate(logs))))
        label = f"{change[0]} {change[1]}"
        print(f"{label:22}" + "".join(f"{m:22.2f}" for m in means) + f"{whole:8.2f}{worst:8.2f}")
        report["mse_ratio"].append({"change": label, "files": means, "all": whole, "worst": worst})
    if record:
        record.put(**report)
    return report


def _changed(settings, change):
    name, value = change
    if name == "mixture of":
        return settings.replace(rank="mixture", rank_terms=value)
    return settings.replace(**{name: value})


def _log_error(q, k, v, settings, exact) -> np.ndarray:
    """Log of the pooled relative error at the densities of GRID."""
    return np.log(Points.pooled(ours(q, k, v, settings, exact, TAUS)).curve.error_at(GRID))
