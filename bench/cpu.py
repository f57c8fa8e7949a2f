"""`python -m bench cpu`: the CPU backend's speed, each answer checked against float64 before it is timed."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numba
import numpy as np

import s2o_cupy as s2o
from bench.ours import causal_pairs, shape_text
from bench.record import Record
from bench.timing import ROOT, Timing, commit, first_calls

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


def arguments(parser) -> None:
    """Adds the options that `main` reads."""
    parser.add_argument("--threads", type=int, metavar="N", help="threads for ours and for torch (default: Numba's)")


def main(options, record: Record) -> None:
    """Dense beside PyTorch, sparse beside dense, and first calls."""
    dense(record)
    sparse(record)
    first_call(record)


def machine() -> dict:
    """What the numbers belong to."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": f"{cpu}, LLVM target {numba.core.codegen.ll.get_host_cpu_name()}",
        "cores": cores,
        "threads": numba.config.NUMBA_NUM_THREADS,
        "versions": f"Python {platform.python_version()}, NumPy {np.__version__}, Numba {numba.__version__}",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def dense(record: Record, heads_q: int = 8, heads_kv: int = 2, n: int = 4096, dim: int = 64) -> None:
    """`dense_attention` and torch's SDPA in turn, float32 causal; torch gets K and V expanded before the clock runs."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, heads_q, n, dim), np.float32)
    k, v = rng.standard_normal((2, 1, heads_kv, n, dim), np.float32)
    where = (shape_text(n, heads_q, heads_kv, dim), "float32")
    error = _exact(s2o.dense_attention(q, k, v)[0], q[0], k[0], v[0])
    runs = {"dense_attention": lambda: s2o.dense_attention(q, k, v)}
    try:
        import torch
    except ImportError:
        record.case("torch SDPA", *where, note="not measured: torch is not installed (pip install torch)")
    else:
        torch.set_num_threads(numba.config.NUMBA_NUM_THREADS)
        expanded = (q, *(np.repeat(x, heads_q // heads_kv, axis=1) for x in (k, v)))
        tensors = [torch.from_numpy(x) for x in expanded]
        name = f"torch {torch.__version__} SDPA"
        runs[name] = lambda: torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True)
    times, work = in_turn(runs), flop(heads_q, n, dim)
    for name, t in times.items():
        numbers = {"error": error if name == "dense_attention" else None, "density": 1.0, "tflops": t.rate(work)}
        record.case(name, *where, time=t, ratio=times["dense_attention"].median / t.median, **numbers)


def sparse(record: Record) -> None:
    """`attention` on the shipped code sample against `dense_attention`, ranking included."""
    q, k, v, _ = s2o.load_sample("smollm2_code_l14")
    heads, n, dim = q.shape
    exact = s2o.dense_attention(*(x.astype(np.float32) for x in (q, k, v))).astype(np.float64)
    _exact(exact, q, k, v)
    where = (shape_text(n, heads, len(k), dim), str(q.dtype))
    for name, changes in CASES:
        settings = s2o.Settings(**changes)
        result = s2o.attention(q, k, v, settings, full_output=True)
        gap = np.linalg.norm(result.out - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
        times = in_turn(
            {
                "dense": lambda: s2o.dense_attention(q, k, v),
                "sparse": lambda settings=settings: s2o.attention(q, k, v, settings),
                "ranking": lambda settings=settings: s2o.plan(q, k, settings),
            }
        )
        t, density = times["sparse"], result.stats.density
        numbers = {"ratio": times["dense"].median / t.median, "tflops": t.rate(density * flop(heads, n, dim))}
        numbers |= {"density": density, "error": float(np.linalg.norm(result.out - exact) / np.linalg.norm(exact))}
        more = {"settings": settings.as_dict(), "worst_head": float(gap.max()), "peak_mib": peak_mib(settings)}
        more |= {"ranking": times["ranking"].median / t.median, "dense": times["dense"]}
        peak = "" if more["peak_mib"] is None else f", {more['peak_mib']:.1f} MiB beyond inputs and answer"
        note = f"worst head {gap.max():.4f}, ranking {more['ranking']:.0%}{peak}"
        record.case(f"attention, {name}", *where, time=t, note=note, **numbers, **more)


def first_call(record: Record) -> None:
    """Import, first dense and first sparse call in new processes: an empty Numba cache, then a filled one."""
    for name, parts in first_calls(FIRST_CALL, "NUMBA_CACHE_DIR", ("import", "dense_attention", "attention")):
        note = f"{sum(parts.values()):.1f} s: " + ", ".join(f"{k} {t:.1f}" for k, t in parts.items())
        record.case(f"first calls, {name} Numba cache", note=note, seconds=parts)


def _exact(out, q, k, v) -> float:
    """The relative error of dense attention, refused where it is no rounding."""
    error = relative_error(out, q, k, v)
    if error > 1e-5:
        raise RuntimeError(f"dense_attention is {error:.1e} from float64; allowed: 1e-5")
    return error


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


def in_turn(runs: dict, repeats: int = REPEATS) -> dict[str, Timing]:
    """Times of each function, run one after the other, `repeats` times after a first that does not count."""
    found = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            found[name].append(1e3 * (time.perf_counter() - start))
    return {name: Timing.of(times[1:]) for name, times in found.items()}


def flop(heads: int, n: int, dim: int) -> float:
    """Causal-useful work: 2 D for the logit and 2 D for the value of every pair that a head may see."""
    return 4 * dim * causal_pairs(n, heads)


def peak_mib(settings: s2o.Settings) -> float | None:
    """Most memory that `attention` on the sample holds beyond its inputs and answer, in a new process."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-c", PEAK, json.dumps(settings.as_dict())]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
