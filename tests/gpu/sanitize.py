"""`python tests/gpu/sanitize.py [--twins] [FILE]`: compute-sanitizer over the CUDA kernels or Numba twins, to a file.

memcheck over a small run of every stage, racecheck over the kernels that share memory between warps. The kernels
are called on small shapes: the sanitizer slows them a hundredfold.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

TOOLS = {"memcheck": [], "racecheck": ["--racecheck-report", "all"]}


def small_run(twins: bool) -> None:
    """Every stage once, in each dtype, on ragged shapes."""
    import cupy
    import ml_dtypes
    import numpy as np

    from s2o_cupy.problem import Problem
    from s2o_cupy.settings import Settings

    sys.path.insert(0, str(Path(__file__).parent))
    from test_cuda_kernels import arrays, empty

    assert ml_dtypes
    backend = importlib.import_module(f"s2o_cupy.backends.{'numba_cuda' if twins else 'cuda'}")
    base = Settings(segment=128, pool=32, block_k=64, tau=0.2)
    for dtype, dims, settings in (
        ("bfloat16", (128, 128), base),
        ("float16", (64, 64), base.replace(rank="mean", tail=None, causal=False)),
        ("float16", (40, 33), base.replace(rank_terms=None, rank_levels=None)),
        ("bfloat16", (256, 256), base.replace(rank_terms=7)),
        ("bfloat16", (64, 64), base.replace(rank="mixture")),
        ("float32", (20, 12), base),
        ("float32", (20, 12), base.replace(rank="mixture")),
        ("float64", (20, 12), base.replace(rank_levels=None)),
    ):
        p = Problem(1, 2, 1, 250, 330, *dims, dtype, settings)
        q, k, v = map(cupy.asarray, arrays(p))
        offsets = cupy.asarray(p.offsets(p.whole))
        order, result = cupy.full(int(offsets[-1, -1]), 0, np.int32), empty(p)
        backend.remap(p, backend.score(p, q, k, p.whole), p.whole, offsets, order)
        backend.attend(p, q, k, v, p.whole, order, offsets, None, backend.pool(p, k, v), result)
        backend.dense(p, q, k, v, result)
        cupy.cuda.runtime.deviceSynchronize()
        print(dtype, dims, "ran", flush=True)


def main(twins: bool, path: str | None) -> int:
    """Run every tool; returns the number that found something."""
    failed, lines, run = 0, [], [__file__, "--small-run", *["--twins"] * twins]
    for tool, options in TOOLS.items():
        command = ["compute-sanitizer", "--tool", tool, *options, "--error-exitcode", "9"]
        done = subprocess.run([*command, sys.executable, *run], capture_output=True, text=True)
        failed += done.returncode != 0
        lines += [f"$ {' '.join(command)} python {' '.join(run)}", done.stdout, done.stderr]
        print(tool, "clean" if done.returncode == 0 else f"exit {done.returncode}", flush=True)
    if path:
        Path(path).write_text("\n".join(lines))
    return failed


if __name__ == "__main__":
    given = [x for x in sys.argv[1:] if not x.startswith("--")]
    if "--small-run" in sys.argv:
        sys.path.insert(0, str(Path(__file__).parents[2]))
        small_run("--twins" in sys.argv)
    else:
        sys.exit(main("--twins" in sys.argv, given[0] if given else None))
