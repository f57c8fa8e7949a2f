"""`python -m bench NAME`: measurements, one module each."""

from __future__ import annotations

import argparse

import s2o_cupy as s2o
from bench import cpu, gpu, knobs, quality
from s2o_cupy import backends
from s2o_cupy.files import save_json


def main() -> None:
    """Run one benchmark; print it, and write JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", metavar="FILE", help="write every number here")
    benches = parser.add_subparsers(dest="bench", required=True)
    sub = benches.add_parser("cpu", parents=[common], help="speed and memory of the CPU backend")
    sub.add_argument("--threads", type=int, metavar="N", help="threads for ours and for torch (default: Numba's)")
    sub.set_defaults(run=cpu.main)
    sub = benches.add_parser("gpu", parents=[common], help="speed of the CUDA backend, beside PyTorch's kernels")
    gpu.arguments(sub)
    sub.set_defaults(run=gpu.main)
    heads = argparse.ArgumentParser(add_help=False)
    heads.add_argument("files", nargs="*", metavar="FILE.npz", help="more heads: an npz with q, k, v")
    heads.add_argument("--settings", metavar="FILE", help="settings to measure (JSON)")
    heads.add_argument("--precise", action="store_true", help="measure Settings.precise()")
    sub = benches.add_parser("quality", parents=[common, heads], help="density against error beside other methods")
    sub.add_argument("--plots", metavar="DIR", help="write one PNG a file there")
    sub.set_defaults(run=quality.main)
    sub = benches.add_parser("knobs", parents=[common, heads], help="what one change of each setting does to the error")
    sub.set_defaults(run=knobs.main)
    options = parser.parse_args()
    if "precise" in options:
        base = s2o.Settings.precise() if options.precise else s2o.Settings()
        options.settings = s2o.Settings.load(options.settings) if options.settings else base
    try:
        if options.bench == "gpu":
            backends.require_cuda()
        report = options.run(options)
    except (ValueError, RuntimeError, OSError) as error:
        raise SystemExit(f"bench: error: {error}") from None
    if options.json:
        save_json(options.json, report)


if __name__ == "__main__":
    main()
