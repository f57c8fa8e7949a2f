"""`python -m bench NAME`: measurements, one module each; every one prints its machine first and can write JSON."""

from __future__ import annotations

import argparse

import numba

from bench import cpu, density, gpu, kernels, knobs, peers, quality, report, scaling, timing
from bench.record import Record
from s2o_cupy import backends

ON_GPU = {
    "gpu": (gpu, "speed of the CUDA backend, beside PyTorch's kernels"),
    "peers": (peers, "every other method on the same GPU, at the same error"),
    "scaling": (scaling, "time, stages and memory from 1K to 1M tokens, at a fixed error"),
    "kernels": (kernels, "every kernel alone, beside its floor"),
}
ON_CPU = {
    "cpu": (cpu, "speed and memory of the CPU backend"),
    "quality": (quality, "density against error beside other methods"),
    "density": (density, "the density that settings need at an error, on long heads"),
    "knobs": (knobs, "what one change of each setting does to the error"),
}


def main() -> None:
    """Run one benchmark; print it, and write JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--json", metavar="PATH", help="write every number here, again after each case; in a folder, by date and commit"
    )
    benches = parser.add_subparsers(dest="bench", required=True)
    for name, (module, text) in (ON_CPU | ON_GPU).items():
        module.arguments(benches.add_parser(name, parents=[common], help=text, description=module.__doc__))
    report.arguments(benches.add_parser("report", help="a page with plots from JSON", description=report.__doc__))
    options = parser.parse_args()
    try:
        raise SystemExit(run(options))
    except (ValueError, RuntimeError, OSError) as error:
        raise SystemExit(f"bench: error: {error}") from None


def run(options) -> int:
    """The benchmark asked for; 130 where it was interrupted, with what was measured kept."""
    if options.bench == "report":
        report.main(options)
        return 0
    if options.bench in ON_GPU:
        backends.require("cuda")
        machine = timing.machine()
    else:
        if getattr(options, "threads", None):
            numba.config.NUMBA_NUM_THREADS = options.threads
        machine = cpu.machine()
    record = Record(options.bench, machine, options.json)
    module, _ = (ON_CPU | ON_GPU)[options.bench]
    try:
        module.main(options, record)
    except KeyboardInterrupt:
        record.put(interrupted=True)
        kept = f"; {record.path} holds what was measured" if record.path else ""
        print(f"\nbench: interrupted after {len(record.report['cases'])} cases{kept}")
        return 130
    record.put(finished=True)
    return 0


if __name__ == "__main__":
    main()
