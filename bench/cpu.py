"""`python -m bench cpu`: the CPU backend's speed, each answer checked against float64 before it is timed."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numba
import numpy as np

import s2o_cupy as s2o

ROOT = Path(__file__).resolve().parents[1]
REPEATS = 7
ROWS = 48  # query rows of a head that the float64 check looks at
# (name, settings): the published defaults, then what is fastest at a relative error of .02 and of .05.
CASES = (
    ("defaults", {}),
    ("error .02", {"segment": 256, "block_q": 64, "block_k": 64, "rank_terms": 7, "tau": 0.007}),
    ("error .05", {"segment": 512, "block_q": 64, "block_k": 64, "rank_terms": 7, "tau": 0.02}),
)
FIRST_CALL = """
import time
start = time.perf_counter()
import numpy as np, s2o_cupy as s2o
q, k, v = np.random.default_rng(0).standard_normal((3, 2, 2048, 64), np.float32)
imported = time.perf_counter()
s2o.dense_attention(q, k, v)
dense = time.perf_counter()
s2o.attention(q, k, v)
print(imported - start, dense - imported, time.perf_counter() - dense)
"""
# Peak resident memory of one call after a small one has loaded the code.
PEAK = """
import json, sys
import s2o_cupy as s2o
def kib(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
settings = s2o.Settings(**json.loads(sys.argv[1]))
q, k, v, _ = s2o.load_sample("smollm2_code_l14")
s2o.attention(*(x[:, :2048] for x in (q, k, v)), settings)
open("/proc/self/clear_refs", "w").write("5")  # restart the peak
before = kib("VmRSS")
out = s2o.attention(q, k, v, settings)
print((kib("VmHWM") - before - out.nbytes / 1024) / 1024)
"""


def main(options) -> dict:
    """Measure, print as it goes, and return what JSON holds."""
    if options.threads:
        numba.config.NUMBA_NUM_THREADS = options.threads
    report = {"machine": machine(), "repeats": REPEATS}
    print("\n".join(f"{key}: {value}" for key, value in report["machine"].items()), flush=True)
    report["dense"] = dense()
    report["sparse"] = sparse()
    report["first_call"] = first_call()
    return report


def machine() -> dict:
    """What the numbers belong to."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": f"{cpu}, LLVM target {numba.core.codegen.ll.get_host_cpu_name()}",
        "cores": cores,
        "threads": numba.config.NUMBA_NUM_THREADS,
        "versions": f"Python {platform.python_version()}, NumPy {np.__version__}, Numba {numba.__version__}",
        "commit": git.stdout.strip() or "unknown",
    }


def dense(heads_q: int = 8, heads_kv: int = 2, n: int = 4096, dim: int = 64) -> dict:
    """`dense_attention` and torch's SDPA in turn, float32 causal; torch gets K and V expanded before the clock runs."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, heads_q, n, dim), np.float32)
    k, v = rng.standard_normal((2, 1, heads_kv, n, dim), np.float32)
    error = relative_error(s2o.dense_attention(q, k, v)[0], q[0], k[0], v[0])
    if error > 1e-5:
        raise RuntimeError(f"dense_attention is {error:.1e} from float64; allowed: 1e-5")
    runs, name = {"ours": lambda: s2o.dense_attention(q, k, v)}, "torch"
    try:
        import torch
    except ImportError:
        print("torch is not installed: no comparison (pip install torch)")
    else:
        torch.set_num_threads(numba.config.NUMBA_NUM_THREADS)
        name = f"torch {torch.__version__} SDPA"
        expanded = (q, *(np.repeat(x, heads_q // heads_kv, axis=1) for x in (k, v)))
        tensors = [torch.from_numpy(x) for x in expanded]
        runs[name] = lambda: torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True)
    seconds = in_turn(runs)
    work = gigaflop(heads_q, n, dim)
    print(f"\ndense, float32, Hq={heads_q} Hkv={heads_kv} N={n} D={dim}, causal; error against float64 {error:.1e}")
    for key, t in seconds.items():
        print(f"  {key:24} {1e3 * t:8.1f} ms  {work / t:6.1f} GFLOP/s  {seconds['ours'] / t:5.2f} of ours", flush=True)
    return {"error": error, "seconds": seconds, "gigaflops": {key: work / t for key, t in seconds.items()}}


def sparse() -> dict:
    """`attention` on the shipped code sample against `dense_attention`, ranking included."""
    q, k, v, _ = s2o.load_sample("smollm2_code_l14")
    heads, n, dim = q.shape
    exact = s2o.dense_attention(*(x.astype(np.float32) for x in (q, k, v))).astype(np.float64)
    error = relative_error(exact, q, k, v)
    if error > 1e-5:
        raise RuntimeError(f"dense_attention is {error:.1e} from float64; allowed: 1e-5")
    shape = f"Hq={heads} Hkv={len(k)} N={n} D={dim}"
    print(f"\nsparse, smollm2_code_l14: {q.dtype}, {shape}; errors against exact attention", flush=True)
    print(
        "  case        density  error  worst head     ms  GFLOP/s  times faster  ranking  MiB beyond inputs and answer"
    )
    return {name: _case(name, s2o.Settings(**changes), q, k, v, exact) for name, changes in CASES}


def _case(name: str, settings: s2o.Settings, q, k, v, exact) -> dict:
    result = s2o.attention(q, k, v, settings, full_output=True)
    gap = np.linalg.norm(result.out - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
    seconds = in_turn(
        {
            "dense": lambda: s2o.dense_attention(q, k, v),
            "sparse": lambda: s2o.attention(q, k, v, settings),
            "ranking": lambda: s2o.plan(q, k, settings),
        }
    )
    row = {
        "settings": settings.as_dict(),
        "density": result.stats.density,
        "error": float(np.linalg.norm(result.out - exact) / np.linalg.norm(exact)),
        "worst_head": float(gap.max()),
        "seconds": seconds,
        "gigaflops": gigaflop(len(q), q.shape[1], q.shape[2]) / seconds["sparse"],
        "faster": seconds["dense"] / seconds["sparse"],
        "ranking": seconds["ranking"] / seconds["sparse"],
        "peak_mib": peak_mib(settings),
    }
    peak = "?" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}"
    speed = f"{1e3 * seconds['sparse']:6.0f} {row['gigaflops']:8.1f} {row['faster']:13.2f} {row['ranking']:8.0%}"
    print(
        f"  {name:10} {row['density']:8.3f} {row['error']:6.4f} {row['worst_head']:11.4f} {speed} {peak:>6}",
        flush=True,
    )
    return row


def first_call() -> dict:
    """Import, first dense and first sparse call in new processes: an empty Numba cache, then a filled one."""
    report = {}
    print("\nfirst calls in a new process, float32 (cache: NUMBA_CACHE_DIR, else __pycache__ beside the sources)")
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"NUMBA_CACHE_DIR": folder, "PYTHONPATH": str(ROOT)}
        for name in ("fresh cache", "warm cache"):
            command = [sys.executable, "-c", FIRST_CALL]
            done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
            parts = [float(x) for x in done.stdout.split()]
            report[name] = dict(zip(("import", "dense_attention", "attention"), parts, strict=True))
            print(f"  {name}: {sum(parts):.1f} s (" + ", ".join(f"{k} {t:.1f}" for k, t in report[name].items()) + ")")
    return report


def relative_error(out: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> float:
    """Relative L2 error of sampled rows of causal attention, (Hq, N, D) arrays, against float64."""
    rng, worst = np.random.default_rng(1), 0.0
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    for h in range(q.shape[0]):
        kv = h // (q.shape[0] // k.shape[0])
        rows = rng.choice(q.shape[1], ROWS, replace=False)
        logits = k[kv] @ q[h, rows].T / np.sqrt(q.shape[2])
        logits[np.arange(k.shape[1])[:, None] > rows] = -np.inf
        weight = np.exp(logits - logits.max(axis=0))
        exact = weight.T @ v[kv] / weight.sum(axis=0)[:, None]
        worst = max(worst, float(np.linalg.norm(out[h, rows] - exact) / np.linalg.norm(exact)))
    return worst


def in_turn(runs: dict, repeats: int = REPEATS) -> dict:
    """Median seconds of each function, run one after the other, `repeats` times after a first that does not count."""
    seconds = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(times[1:])) for name, times in seconds.items()}


def gigaflop(heads: int, n: int, dim: int) -> float:
    """Causal-useful work: 2 D for the logit and 2 D for the value of every pair that a head may see, in 1e9."""
    return 4 * dim * heads * n * (n + 1) / 2 / 1e9


def peak_mib(settings: s2o.Settings) -> float | None:
    """Most memory that `attention` on the sample holds beyond its inputs and answer, in a new process."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-c", PEAK, json.dumps(settings.as_dict())]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
