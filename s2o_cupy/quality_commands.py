"""What the commands about quality do: sweep, calibrate, audit."""

from __future__ import annotations

import json

import numpy as np

import s2o_cupy as s2o
from s2o_cupy import plots
from s2o_cupy.commands import load_qkv, placed
from s2o_cupy.files import writable
from s2o_cupy.progress import Bar


def sweep(options) -> None:
    """Density against error for each head of a file, as a table and a picture."""
    q, k, v = placed(options.backend, *load_qkv(options.files))
    if options.png is not None:
        plots.require()
        writable(options.png)
    with Bar("sweep", 1) as bar:
        curve = s2o.sweep(
            q,
            k,
            v,
            options.settings,
            options.taus,
            backend=options.backend,
            rows=options.rows,
            seed=options.seed,
            progress=bar.show,
        )
    density, error, captured, tail = (
        x.reshape(len(curve.tau), -1) for x in (curve.density, curve.error, curve.captured_mass, curve.tail_mass)
    )
    if options.png is not None:
        plots.save_sweep(options.png, {"sparse": (density, error)}, f"{options.files[0]}: density against error")
    rows = [
        {
            "tau": float(curve.tau[t]),
            "head": head,
            "density": float(density[t, head]),
            "error": float(error[t, head]),
            "captured_mass": float(captured[t, head]),
            "tail_mass": float(tail[t, head]),
        }
        for head in range(density.shape[1])
        for t in range(len(curve.tau))
    ]
    if options.json:
        compared = min(options.rows, q.shape[-2])
        print(json.dumps({"settings": curve.settings.as_dict(), "rows": compared, "points": rows}, indent=2))
        return
    print(f"{'head':>4} {'tau':>9} {'density':>8} {'rel. error':>10} {'captured':>9} {'tail mass':>9}")
    for row in rows:
        print(
            f"{row['head']:4d} {row['tau']:9.2g} {row['density']:8.3f} {row['error']:10.5f} "
            f"{row['captured_mass']:9.4f} {row['tail_mass']:9.4f}"
        )
    _picture_line(options)


def calibrate(options) -> None:
    """The settings that meet an error at the least work, and what was tried."""
    q, k, v = placed(options.backend, *load_qkv(options.files))
    if options.out is not None:
        writable(options.out)
    with Bar("calibrate", 1) as bar:
        chosen = s2o.calibrate(
            q,
            k,
            v,
            options.error,
            options.metric,
            options.per_head,
            options.settings,
            backend=options.backend,
            rows=options.rows,
            seed=options.seed,
            progress=bar.show,
        )
    if options.out is not None:
        chosen.save(options.out)
    trials = [
        {
            "settings": trial.settings.as_dict(),
            "error": np.atleast_1d(trial.error).tolist(),
            "density": np.atleast_1d(trial.density).tolist(),
            "gflop": trial.work / 1e9,
        }
        for trial in chosen.evidence
    ]
    if options.json:
        print(json.dumps({"settings": chosen.as_dict(), "rows": chosen.rows, "trials": trials}, indent=2))
        return
    print(
        f"{'':7} {'segment':>7} {'block_k':>7} {'rank':>8} {'tau (least)':>11} {'density':>8} {'error':>8} {'GFLOP':>8}"
    )
    for place, trial in enumerate(trials):
        s = trial["settings"]
        print(
            f"{'' if place else 'chosen:':7} {s['segment']:7d} {s['block_k']:7d} {s['rank']:>8} "
            f"{np.min(s['tau']):11.4g} "
            f"{np.mean(trial['density']):8.3f} {max(trial['error']):8.5f} {trial['gflop']:8.2f}"
        )
    print(f"judged on {chosen.rows} query rows")
    if options.out:
        print(f"settings: {options.out}")


def audit(options) -> None:
    """Sparse attention over a file, checked on sampled query rows."""
    q, k, v = placed(options.backend, *load_qkv(options.files))
    with Bar("attention", 1) as bar:
        result = s2o.attention(
            q, k, v, options.settings, backend=options.backend, full_output=True, check_finite=True, progress=bar.show
        )
    report = s2o.audit(q, k, v, result, rows=options.rows, seed=options.seed)
    if options.json:
        print(json.dumps({"settings": options.settings.as_dict(), "heads": report.table()}, indent=2))
    else:
        print(report)


def _picture_line(options) -> None:
    if options.png:
        print(f"picture: {options.png}")


COMMANDS = {"sweep": sweep, "calibrate": calibrate, "audit": audit}
