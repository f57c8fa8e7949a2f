"""What each command of `s2o` does: demo, run, info."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import numba
import numpy as np

import s2o_cupy as s2o
from s2o_cupy import backends, plots
from s2o_cupy import compile as compiling
from s2o_cupy.arrays import as_four_axes, namespace, on_host
from s2o_cupy.exact import relative_error, tile_mass
from s2o_cupy.files import load_array, load_arrays, save_arrays, writable
from s2o_cupy.progress import Bar
from s2o_cupy.samples import NAMES, load_sample

BACKENDS = tuple(backends.NAMES)
_STEP = 2**26  # bytes of ranking between two moves of a progress bar


def demo(options) -> None:
    """Run the sample heads dense and sparse, on the GPU where there is one; print the table and draw the picture."""
    settings, backend = options.settings, options.backend or ("cuda" if backends.status()["cuda"][0] else "cpu")
    plots.require()
    writable(options.png)
    names = options.sample or list(NAMES)
    samples = {name: placed(backend, *load_sample(name)[:3]) for name in names}
    rows = []
    with Bar("demo", 1 + sum(len(q) for q, _, _ in samples.values()) + 1) as bar:
        q, k, v = samples[names[0]]
        compare(q[:1], k, v, settings, backend, repeats=1)  # compiles what the timed calls need
        bar.step()
        for name, (q, k, v) in samples.items():
            for head in range(len(q)):
                rows.append({"head": f"{name}:{head}", **compare(q[head : head + 1], k, v, settings, backend)})
                bar.step()
        q, k, v = samples[names[0]]
        drawn = _picture(options.png, q[:1], k, v, settings, backend, f"{names[0]} head 0, N={q.shape[1]}")
        bar.step()
    picture = options.png if drawn else "none: at these settings nothing is ranked"
    _report(options, rows, backend=backend, picture=picture)


def run(options) -> None:
    """Attention over the user's files, with or without exact attention beside it."""
    settings = options.settings
    q, k, v = placed(options.backend, *load_qkv(options.files))
    if options.out is not None:
        writable(options.out)
    with Bar("attention", 1) as bar:
        start = time.perf_counter()
        result = s2o.attention(
            q,
            k,
            v,
            settings,
            backend=options.backend,
            workspace=_STEP,
            full_output=True,
            check_finite=options.check_finite,
            progress=bar.show,
        )
        _wait(result.out)
        seconds = time.perf_counter() - start
    exact_seconds = error = None
    if options.dense:
        start = time.perf_counter()
        exact = _dense(q, k, v, settings, options.backend)
        exact_seconds = time.perf_counter() - start
        error = relative_error(result.out, exact).reshape(-1)
    if options.out is not None:
        save_arrays(options.out, out=on_host(result.out), lse=on_host(result.lse))
    density = result.stats.head_density.reshape(-1)
    tail = result.stats.tail_mass.reshape(len(density), q.shape[-2]).sum(axis=1) / max(q.shape[-2], 1)
    rows = [
        {
            "head": str(head),
            "density": float(density[head]),
            "error": None if error is None else float(error[head]),
            "tail_mass": float(tail[head]),
            "dense_s": None if exact_seconds is None else exact_seconds / len(density),
            "sparse_s": seconds / len(density),
        }
        for head in range(len(density))
    ]
    _report(options, rows, path=result.stats.path, out=options.out)


def info(options) -> None:
    """Versions, devices, and for each backend whether it works here and, where it does not, what to install."""
    versions = {"python": platform.python_version(), "s2o_cupy": s2o.__version__}
    for package in ("numpy", "numba", "ml_dtypes", "matplotlib", "cupy-cuda12x", "cupy-cuda13x", "numba-cuda"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    state = {
        "versions": versions,
        "cpu": {"machine": platform.machine(), "threads": numba.config.NUMBA_NUM_THREADS},
        "numba_cache": numba.config.CACHE_DIR or "__pycache__ beside the package's files, or the user's cache folder",
        "backends": backends.status(),
    }
    if options.json:
        print(json.dumps(state, indent=2))
        return
    print("versions   " + ", ".join(f"{name} {value or '(missing)'}" for name, value in versions.items()))
    print(f"cpu        {state['cpu']['machine']}, {state['cpu']['threads']} threads (NUMBA_NUM_THREADS)")
    print(f"cache      compiled CPU code: {state['numba_cache']} (NUMBA_CACHE_DIR)")
    for name, (works, why) in state["backends"].items():
        print(f"backend    {name:<6} {'available' if works else 'not available'}: {why}")


def compare(q, k, v, settings, backend, repeats: int = 3) -> dict:
    """Dense and sparse attention over one head, timed in turn: density, error, tail mass and median seconds."""
    dense, sparse = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        exact = s2o.dense_attention(q, k, v, **_mask(settings), backend=backend)
        _wait(exact)
        dense.append(time.perf_counter() - start)
        start = time.perf_counter()
        result = s2o.attention(q, k, v, settings, backend=backend, full_output=True)
        _wait(result.out)
        sparse.append(time.perf_counter() - start)
    return {
        "density": result.stats.density,
        "error": float(relative_error(result.out, exact).max()),
        "tail_mass": float(result.stats.tail_mass.mean()),
        "dense_s": statistics.median(dense),
        "sparse_s": statistics.median(sparse),
    }


def compile_kernels(options) -> None:
    """Compile every shipped kernel for some architectures, without a GPU; print what each one takes."""
    rows, failures = compiling.compile_report(options.arch.split(","), options.check, _note)
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    else:
        print(f"{'arch':8} {'kernel':24} {'registers':>9} {'spilled':>8} {'shared':>8} {'cached':>6}  macros")
        for row in rows:
            print(
                f"{row.arch:8} {row.kernel:24} {row.registers:9d} {row.spill_bytes:8d} {row.shared_bytes:8d} "
                f"{'yes' if row.cached else 'no':>6}  {row.macros}"
            )
    if failures:
        for failure in failures:
            print(f"{failure.arch} {failure.kernel} {failure.macros}: {failure.message}", file=sys.stderr)
        raise RuntimeError(f"{len(failures)} failed, {len(rows)} kernels compiled")


def _note(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text[:100]:<100}", end="", file=sys.stderr, flush=True)


def _dense(q, k, v, settings, backend):
    """Exact attention, a K/V head at a time for the progress bar's sake."""
    four = [as_four_axes(name, x) for name, x in (("q", q), ("k", k), ("v", v))]
    (batch, heads_q), heads_kv = four[0].shape[:2], four[1].shape[1]
    out = namespace(q).empty((*four[0].shape[:-1], v.shape[-1]), q.dtype)
    with Bar("dense attention", batch * heads_kv) as bar:
        for b, kv in np.ndindex(batch, heads_kv):
            heads = slice(kv * (heads_q // heads_kv), (kv + 1) * (heads_q // heads_kv))
            one = four[0][b, heads], *(x[b, kv : kv + 1] for x in four[1:])
            out[b, heads] = s2o.dense_attention(*one, **_mask(settings), backend=backend)
            bar.step()
    _wait(out)
    return out.reshape(*q.shape[:-1], v.shape[-1])


def _mask(settings) -> dict:
    """What `dense_attention` takes of some settings."""
    return {"causal": settings.causal, "window": settings.window, "scale": settings.scale}


def placed(backend: str | None, *arrays) -> list:
    """NumPy arrays where a backend reads them: on the GPU for "cuda", and for "numba" outside of its simulator."""
    if backends.takes_numpy(backend):
        return list(arrays)
    backends.require(backend)
    import cupy

    return [cupy.asarray(x) for x in arrays]


def _wait(x) -> None:
    """Until the device has computed `x`."""
    if not isinstance(x, np.ndarray):
        namespace(x).cuda.get_current_stream().synchronize()


def _picture(path, q, k, v, settings, backend, title) -> bool:
    """Draw one head before and after ranking, where something is ranked; whether it was drawn."""
    positions = settings.replace(query_order="position")
    plan = s2o.plan(q, k, positions, backend=backend)
    if not len(plan.kv_order):
        return False
    stats = s2o.attend(q, k, v, plan, backend=backend, full_output=True).stats
    shape = {"causal": settings.causal, "scale": settings.scale, "segment": settings.segment}
    mass = tile_mass(on_host(q[0]), on_host(k[0]), settings.block_q, **shape)
    plots.save_before_after(path, mass, plan, stats, title)
    return True


def load_qkv(paths: list[str]):
    """q, k and v of one npz, or of three npy files."""
    if len(paths) == 3:
        return [load_array(path) for path in paths]
    if len(paths) != 1:
        raise ValueError(f"{len(paths)} files given; allowed: one npz with q, k and v, or three npy files")
    return list(load_arrays(paths[0], ("q", "k", "v")).values())


def _report(options, rows: list[dict], **more) -> None:
    """The table on standard output, or with --json everything as JSON."""
    more = {key: value for key, value in more.items() if value is not None}
    if options.json:
        rows = [{key: None if _undefined(value) else value for key, value in row.items()} for row in rows]
        print(json.dumps({"settings": options.settings.as_dict(), "heads": rows, **more}, indent=2))
        return
    print(
        f"{'head':<22} {'density':>8} {'rel. error':>10} {'tail mass':>10} {'dense':>10} {'sparse':>10} {'speed-up':>9}"
    )
    for row in rows:
        dense, sparse = row["dense_s"], row["sparse_s"]
        print(
            f"{row['head']:<22} {row['density']:8.3f} {_number(row['error'], '.4f'):>10} {row['tail_mass']:10.4f} "
            f"{_milliseconds(dense):>10} {_milliseconds(sparse):>10} "
            f"{_number(dense / sparse if dense else None, '.2f'):>8}x"
        )
    for key, value in more.items():
        print(f"{key}: {value}")
    sys.stdout.flush()


def _undefined(value) -> bool:
    """A number that JSON cannot hold: heads with NaN have an error of NaN."""
    return isinstance(value, float) and not math.isfinite(value)


def _number(value, form: str) -> str:
    return "-" if value is None else format(value, form)


def _milliseconds(seconds) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"


COMMANDS = {"demo": demo, "run": run, "info": info, "compile": compile_kernels}
