"""`python -m bench peers`: us against every peer on the same GPU, in the same run, at the same error.

Each sparse method's knob is swept until its error on sampled rows of every head meets the wanted one; the time is that
of a whole call, ranking and selection included. PyTorch and Triton are imported here alone (extra: pip install torch).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np

import s2o_cupy as s2o
from bench import ours
from bench.faster import faster
from bench.record import Record
from bench.sweep import Sweep
from bench.timing import Timing, on_device
from s2o_cupy.exact import exact_rows, sample_rows
from s2o_cupy.problem import make_problem
from s2o_cupy.settings import Settings

ERRORS = (0.10, 0.05, 0.02, 0.01)
SLOW = 0.85  # a kernel below this share of its own dense rate is said to be
OURS = {  # the fastest at an error depends on the length: finer tiles stop better, and rank twice as many lists
    "s2o_cupy": {},
    "s2o_cupy, S=512": ours.BASE,
    "s2o_cupy, S=512, 7 terms, cap .25": ours.BASE | {"rank_terms": 7, "cap": 0.25},
}


def arguments(parser) -> None:
    """Adds the options that `main` reads."""
    parser.add_argument("--length", type=_lengths, default=[32768, 131072], metavar="N,N", help="sequence lengths")
    parser.add_argument("--preset", default="diffuse", choices=("sparse", "diffuse"), help="synthetic heads")
    parser.add_argument("--rows", type=int, default=1024, metavar="N", help="query rows a head, for errors")
    parser.add_argument("--errors", type=_errors, default=ERRORS, metavar="E,E", help="relative errors to meet")
    parser.add_argument("--quick", action="store_true", help="the first length, two errors, the main peers")


def main(options, record: Record) -> None:
    """Every length in turn: dense kernels, ours, sparse peers, and who is how much faster."""
    lengths = options.length[:1] if options.quick else options.length
    knobs: dict[str, float] = {}
    for n in lengths:
        with record.attempt(f"all of N={n}"):
            Run(options, n, knobs, record).everything()
    for n in lengths:
        print_faster(n, faster(record.report["cases"], n))


class Ours:
    """Our method at some settings, in the steps of a sparse peer (`bench/rivals.py`)."""

    knob, span = "tau", (1e-5, 1.0)

    def __init__(self, name: str, changes: dict):
        from s2o_cupy.backends import cuda

        self.name, self.settings, self.backend = name, Settings(**changes), cuda
        self.complete = self.settings.cap == 1  # all of it is exact attention

    def rank(self, q, k, v, scale):
        p = make_problem(q, k, v, self.settings)
        offsets, order = ours.lists(p)
        self.backend.rank(p, q, k, p.whole, offsets, order)
        return p, (q, k, v), offsets, order, self.backend.pool(p, k, v), ours.answer(p, q)

    def choose(self, ranked, x: float):
        return ranked, ranked[0].replace(tau=x)

    def everything(self, ranked):
        return self.choose(ranked, 0.0)

    def walk(self, chosen):
        (_, arrays, offsets, order, pooled, result), p = chosen
        self.backend.attend(p, *arrays, p.whole, order, offsets, None, pooled, result)
        return result.out[0], lambda: ours.computed(p, result)[1]

    def call(self, q, k, v, scale, x: float):
        return s2o.attention(q, k, v, self.settings, tau=x, backend="cuda")


def whole_call(method, arrays, scale: float, x: float) -> Callable[[], object]:
    """What is timed: ours is the public call, a peer ranks, chooses and walks."""
    if hasattr(method, "call"):
        return partial(method.call, *arrays, scale, x)
    return lambda: method.walk(method.choose(method.rank(*arrays, scale), x))


class Run:
    """One length: its arrays, the exact rows, and the dense time that ratios are against."""

    def __init__(self, options, n: int, knobs: dict[str, float], record: Record):
        self.record, self.n, self.quick = record, n, options.quick
        self.errors = (0.05, 0.02) if options.quick else sorted(options.errors, reverse=True)
        self.knobs = knobs  # of each method at its first error, where the next length begins
        self.arrays = ours.inputs(options.preset, n)
        problem = make_problem(*self.arrays, Settings())
        self.scale, self.pairs, self.flop = problem.scale, ours.causal_pairs(n), 4 * ours.DIM
        self.rows = sample_rows(n, options.rows, 0)
        self.exact = exact_rows(problem, *self.arrays, self.rows).out[0].astype(np.float64)
        self.where = (ours.shape_text(n), problem.dtype)
        self.same = {"n": n, "preset": options.preset}
        self.baseline = self.cudnn_rate = None
        self.density: dict[float, float] = {}  # of ours, by wanted error

    def everything(self) -> None:
        try:
            from bench import rivals
        except ImportError as error:
            rivals = None
            self.record.case("every peer", *self.where, note=f"not measured: {error} (pip install torch)", **self.same)
        tensors = None
        if rivals:
            import torch

            tensors = [torch.from_dlpack(x[0]) for x in self.arrays]
            for name, make in rivals.dense_peers(*tensors, self.scale).items():
                with self.record.attempt(name, *self.where, catch=(Exception,)):
                    self.dense(name, make())
        self.dense("s2o_cupy dense_attention", partial(s2o.dense_attention, *self.arrays, backend="cuda"))
        for name, changes in list(OURS.items())[: 1 if self.quick else None]:
            with self.record.attempt(name, *self.where):
                self.sparse(Ours(name, changes), self.arrays, "ours")
        for name, make in rivals.sparse_peers(self.quick) if rivals else ():
            with self.record.attempt(name, *self.where, catch=(Exception,)):
                self.sparse(make(), tensors, "sparse")
        if rivals:
            with self.record.attempt(rivals.Flex.name, *self.where, catch=(Exception,)):
                self.equal_density(rivals.Flex(), tensors)

    def dense(self, name: str, call: Callable[[], object]) -> None:
        """One dense kernel, its error checked before it is timed."""
        error = self.error(call())
        _allow(name, error)
        time = on_device([call], 3 if self.quick or self.n > 2**16 else 7, 1)
        rate = time.rate(self.flop * self.pairs)
        self.baseline = self.baseline or (name, time.median)
        if name.startswith("cuDNN"):
            self.cudnn_rate = rate
        self.say(name, time, 1.0, error, rate, "" if name != self.baseline[0] else "ratios are to this", kind="dense")

    def sparse(self, method, arrays, kind: str) -> None:
        """One method at each wanted error: its kernel at full density first, then the knob, then the time."""
        ranked = method.rank(*arrays, self.scale)
        full = method.everything(ranked)
        out, pairs = method.walk(full)
        if getattr(method, "complete", True):
            _allow(f"{method.name} at full density", self.error(out))
        dense_rate = on_device([partial(method.walk, full)], 3, 0).rate(self.flop * pairs())
        del out, full

        def measure(x):
            out, pairs = method.walk(method.choose(ranked, x))
            return self.error(out), pairs()

        sweep = Sweep(measure, *method.span, start=self.knobs.get(method.name))
        for wanted in self.errors:
            met = sweep.meet(wanted)
            if met:
                self.knobs.setdefault(method.name, met[0])
            else:
                note = f"cannot reach error {wanted}: {sweep.least_error:.4f} with {method.knob} {method.span[0]:g}"
                self.say(method.name, note=note, kind=kind, wanted=wanted)
                continue
            x, error, pairs = met
            density = pairs / self.pairs
            if kind == "ours":
                self.density[wanted] = min(density, self.density.get(wanted, 1.0))
            chosen = method.choose(ranked, x)
            kernel = on_device([partial(method.walk, chosen)], 3, 0)
            del chosen
            self.timed(method, arrays, x, kernel, dense_rate, density, error, kind=kind, wanted=wanted)

    def equal_density(self, method, arrays) -> None:
        """The method at the density that ours has at each error; its own error as it comes."""
        ranked = method.rank(*arrays, self.scale)

        def measure(x):
            out, pairs = method.walk(method.choose(ranked, x))
            return self.pairs / pairs(), self.error(out)

        sweep = Sweep(measure, *method.span)
        for wanted, density in self.density.items():
            met = sweep.meet(1 / density)
            if met:
                x, sparsity, error = met
                time = on_device([whole_call(method, arrays, self.scale, x)], 5, 1)
                rate, note = time.rate(self.flop * self.pairs / sparsity), f"at our density for error {wanted}"
                self.say(method.name, time, 1 / sparsity, error, rate, note, kind="equal density", our_error=wanted)

    def timed(self, method, arrays, x, kernel: Timing, dense_rate, density, error, **more) -> None:
        """Time the whole call at a knob and say it, with what its kernel alone would take at better rates."""
        repeats = 3 if self.quick or kernel.median > 100 else 10 if kernel.median < 20 else 5
        time = on_device([whole_call(method, arrays, self.scale, x)], repeats, 1)
        flop = self.flop * density * self.pairs
        selecting, share = time.median - kernel.median, kernel.rate(flop) / dense_rate
        note = f"{method.knob} {x:.3g}, all but the walk {selecting / time.median:.0%}"
        more |= {"knob": x, "kernel": kernel, "kernel_tflops": kernel.rate(flop), "dense_tflops": dense_rate}
        more["at_dense_rate_ms"] = selecting + flop / dense_rate / 1e9
        if self.cudnn_rate:
            more["at_cudnn_rate_ms"] = selecting + flop / self.cudnn_rate / 1e9
        if share < SLOW:
            at_that = f"{more['at_dense_rate_ms']:.2f} ms at that rate"
            note += f"; walks at {share:.2f} of its own dense {dense_rate:.0f} TFLOP/s: {at_that}"
        self.say(method.name, time, density, error, time.rate(flop), note, **more)

    def say(self, name, time=None, density=None, error=None, tflops=None, note="", **more) -> None:
        ratio = self.baseline[1] / time.median if time and self.baseline else None
        numbers = {"density": density, "error": error, "tflops": tflops, "ratio": ratio}
        self.record.case(name, *self.where, time=time, note=note, **numbers, **self.same, **more)

    def error(self, out) -> float:
        return ours.rows_error(out, self.rows, self.exact)


def print_faster(n: int, found: dict) -> None:
    errors = sorted({wanted for row in found.values() for wanted in row}, reverse=True)
    if errors:
        print(f"\nN={n}: time of each over that of our fastest variant at the same error")
        print(f"{'error':42}" + "".join(f"{wanted:8.2f}" for wanted in errors))
    for name, row in found.items():
        print(f"{name:42}" + "".join(f"{row[w]:8.2f}" if w in row else f"{'-':>8}" for w in errors))


def _allow(name: str, error: float, most: float = 0.02) -> None:
    """Refuse a dense answer that is not exact attention up to the type's rounding."""
    if not error <= most:
        raise RuntimeError(f"{name} is {error:.1e} from exact attention; allowed: {most}")


def _errors(text: str) -> list[float]:
    """Comma-separated relative errors."""
    try:
        errors = [float(part) for part in text.split(",")]
    except ValueError:
        errors = []
    if not errors or not all(0 < error < 1 for error in errors):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: numbers above 0 and below 1, with commas between")
    return errors


def _lengths(text: str) -> list[int]:
    """Comma-separated lengths that every peer takes."""
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or any(n < 2048 or n % 1024 for n in lengths):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: multiples of 1024 from 2048 on, with commas between")
    return lengths
