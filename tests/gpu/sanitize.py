"""`python tests/gpu/sanitize.py [--twins] [FILE]`: compute-sanitizer over the CUDA kernels or Numba twins, to a file.

memcheck and racecheck over a small run of every stage. The kernels are called on small shapes, since the sanitizer
slows them a hundredfold, and each case runs in a process of its own, several at once. racecheck leaves out
attend_sm90: it takes a hand-over of a whole warp, whose lane 0 alone arrives at a barrier in shared memory, for a race
of the other lanes. tests/emulation runs that protocol in two thread orders.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TOOLS = {
    "memcheck": [],
    "racecheck": ["--racecheck-report", "all", "--kernel-regex-exclude", "kns=attend_sm90"],
}
CASES = (
    ("bfloat16", (128, 128), {}),
    ("bfloat16", (128, 128), {"rank": "mean", "segment": 64, "block_q": 64, "share_order": True}),
    ("bfloat16", (128, 128), {"block_q": 64}),  # attend.cu
    ("float16", (64, 64), {"rank": "mean", "tail": None, "causal": False}),
    ("float16", (40, 33), {"rank_terms": None, "rank_levels": None}),
    ("bfloat16", (256, 256), {"rank_terms": 7}),
    ("bfloat16", (64, 64), {"rank": "mixture"}),
    ("float16", (256, 256), {"rank": "mixture"}),
    ("float32", (20, 12), {}),
    ("bfloat16", (128, 128), {"rank_levels": 4096, "tail": "spread", "cap": 0.5, "tau": (0.2, 0.1)}),  # `remap`
    ("float16", (64, 64), {"window": 100, "rank": "mean", "block_q": 64}),
    ("float32", (20, 12), {"tail": "spread"}),
    ("float32", (20, 12), {"rank": "mixture"}),
    ("float64", (20, 12), {"rank_levels": None}),
)


def problem(case: int):
    """The ragged shapes of a case."""
    from s2o_cupy.problem import Problem
    from s2o_cupy.settings import Settings

    dtype, dims, settings = CASES[case]
    settings = Settings(**{"segment": 128, "pool": 32, "block_k": 64, "tau": 0.2, **settings})
    return Problem(1, 2, 1, 250, 330, *dims, dtype, settings)


def long_list(case: int):
    """One list of 5000 scores, ordered as a case orders."""
    from s2o_cupy.problem import Problem

    p = problem(case)
    settings = p.settings.replace(causal=False, window=None, tau=0.2)
    return Problem(1, 1, 1, 4, 5000, p.dim_qk, p.dim_v, p.dtype, settings)


def small_run(case: int, twins: bool) -> None:
    """Every stage once."""
    import cupy
    import ml_dtypes
    import numpy as np

    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    from test_cuda_kernels import arrays, empty

    assert ml_dtypes
    backend = importlib.import_module(f"s2o_cupy.backends.{'numba_cuda' if twins else 'cuda'}")
    p = problem(case)
    q, k, v = map(cupy.asarray, arrays(p))
    offsets = cupy.asarray(p.offsets(p.whole))
    order, result = cupy.full(int(offsets[-1, -1]), 0, np.int32), empty(p)
    backend.remap(p, backend.score(p, q, k, p.whole), p.whole, offsets, order)
    backend.attend(p, q, k, v, p.whole, order, offsets, None, backend.pool(p, k, v), result)
    backend.dense(p, q, k, v, result)
    if twins:  # the twin sorts a list chunk by chunk
        p = long_list(case)
        scores, offsets = cupy.sin(cupy.arange(p.n_k, dtype=np.float32))[None], cupy.asarray(p.offsets(p.whole))
        backend.remap(p, scores, p.whole, offsets, cupy.empty(p.n_k, np.int32))
    cupy.cuda.runtime.deviceSynchronize()
    print(*CASES[case], "ran", flush=True)


def sanitize(tool: str, case: int, twins: bool) -> tuple[bool, str]:
    """Whether the tool found nothing, and what it printed."""
    run = [__file__, f"--case={case}", *["--twins"] * twins]
    quiet = ["--report-api-errors", "no"] * (twins and tool == "memcheck")  # Numba looks for what a driver may lack
    command = ["compute-sanitizer", "--tool", tool, *TOOLS[tool], *quiet, "--error-exitcode", "9"]
    done = subprocess.run([*command, sys.executable, *run], capture_output=True, text=True)
    clean = done.returncode == 0
    print(tool, *CASES[case], "clean" if clean else f"exit {done.returncode}", flush=True)
    return clean, "\n".join([f"$ {' '.join(command)} python {' '.join(run)}", done.stdout, done.stderr])


def main(twins: bool, path: str | None) -> int:
    """Run every tool over every case; returns the number of runs that found something."""
    with ThreadPoolExecutor(10) as pool:
        runs = list(pool.map(lambda run: sanitize(*run, twins), [(t, c) for t in TOOLS for c in range(len(CASES))]))
    if path:
        Path(path).write_text("\n".join(text for _, text in runs))
    return sum(not clean for clean, _ in runs)


if __name__ == "__main__":
    given = [x for x in sys.argv[1:] if not x.startswith("--")]
    case = [int(x.removeprefix("--case=")) for x in sys.argv[1:] if x.startswith("--case=")]
    if case:
        sys.path.insert(0, str(Path(__file__).parents[2]))
        small_run(case[0], "--twins" in sys.argv)
    else:
        sys.exit(main("--twins" in sys.argv, given[0] if given else None))
