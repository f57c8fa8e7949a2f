"""`python -m bench peers`: us against every peer on the same GPU, in the same run, at the same error.

Each sparse method's knob is swept until its error on sampled rows of every head meets the wanted one; the time is that
of a whole call, ranking and selection included. PyTorch and Triton are imported here alone (extra: pip install torch).
The first two errors are taken first, each at every length and by every method, then the others, from the shortest
length on: what comes first is there if the run is cut off.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

import s2o_cupy as s2o
from bench import building, ours
from bench.faster import SLOW, faster, heads_of
from bench.record import Record
from bench.sweep import Sweep
from bench.timing import Timing, on_device
from s2o_cupy.exact import exact_rows, sample_rows
from s2o_cupy.problem import make_problem
from s2o_cupy.settings import Settings

LENGTHS = (131072, 32768)
ERRORS = (0.05, 0.02, 0.10, 0.01)
ENOUGH = 150.0  # ms of repeats of one case
OURS = ours.VARIANTS


def arguments(parser) -> None:
    """Adds the options that `main` reads."""
    parser.add_argument("files", nargs="*", metavar="FILE.npz", help="real heads in place of synthetic ones: q, k, v")
    parser.add_argument("--length", type=_lengths, default=LENGTHS, metavar="N,N", help="sequence lengths")
    parser.add_argument("--preset", default="diffuse", choices=("sparse", "diffuse"), help="synthetic heads")
    parser.add_argument("--rows", type=int, default=1024, metavar="N", help="query rows a head, for errors")
    parser.add_argument("--errors", type=_errors, default=ERRORS, metavar="E,E", help="relative errors, in this order")
    parser.add_argument(
        "--patience",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds for one error; slower methods are left out then",
    )
    building.argument(parser)
    parser.add_argument("--only", metavar="TEXT,TEXT", help="only methods whose name holds one of these")
    parser.add_argument("--quick", action="store_true", help="the first length, the first two errors, the main peers")


def main(options, record: Record) -> None:
    """Dense kernels of every set of heads, then error by error every method, and who is how much faster."""
    errors = options.errors
    sets = {path: partial(real_heads, path) for path in options.files}
    sets = sets or {f"all of N={n}": partial(synthetic_heads, options.preset, n) for n in options.length}
    if options.quick:
        sets, errors = dict(list(sets.items())[:1]), errors[:2]
    chosen = {name: settings for name, settings in OURS.items() if _wanted(options, name)}
    if options.quick:
        chosen = dict(list(chosen.items())[:2])
    for name, settings in chosen.items():
        print(f"{name}: {_changes(settings)}")
    knobs: dict[tuple, float] = {}
    runs = []
    with building.Building() as built:
        with record.section("imports, arrays, exact rows"):
            built.start(building.of_ours(chosen.values()) if options.build else [])
            rivals = rivals_or_none()
            lengths = [] if options.files else options.length
            built.start(_peers_tasks(rivals, lengths, options) if options.build else [])
            for name, make in sets.items():
                with record.attempt(name):
                    runs.append(Run(options, *make(), rivals, chosen, knobs, record))
        with record.section("waiting for kernels to be built"):
            built.wait()
    for run in runs:
        with record.section(f"{run}, dense"), record.attempt(f"dense, {run}"):
            run.dense_kernels()
    turns = [(wanted, run) for wanted in errors[:2] for run in runs]
    turns += [(wanted, run) for run in sorted(runs, key=lambda run: run.n) for wanted in errors[2:]]
    for wanted, run in turns:
        with record.section(f"{run}, error {wanted}"):
            run.meet(wanted)
    for run in runs:
        print_faster(run, faster(record.report["cases"], heads_of(run.same)))


def synthetic_heads(preset: str, n: int) -> tuple:
    """A preset's name and its q, k, v."""
    return preset, ours.inputs(preset, n)


def real_heads(path: str) -> tuple:
    """A file's name and its q, k, v, of a shape that every peer takes."""
    q, k, v = ours.read(path)
    n = q.shape[2]
    if len(q) != 1 or k.shape[2] != n or n < 2048 or n % 1024:
        raise ValueError(
            f"{path} has q {q.shape}, k {k.shape}; allowed: one batch entry and as many queries as keys, "
            "a multiple of 1024 from 2048 on"
        )
    return Path(path).stem, [q, k, v]


class Ours:
    """Our method at some settings, in the steps of a sparse peer (`bench/rivals.py`)."""

    knob, span = "tau", (1e-5, 10.0)

    def __init__(self, name: str, settings: Settings):
        from s2o_cupy.backends import cuda

        self.name, self.settings, self.backend = name, settings, cuda
        self.complete = self.settings.cap == 1  # all of it is exact attention
        self.kernel = ("ours", settings.block_q, settings.block_k)  # methods of one kernel share its dense rate

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
    """One set of heads: the exact rows, the dense time that ratios are against, and the methods' sweeps."""

    def __init__(self, options, preset: str, arrays, rivals, chosen: dict[str, Settings], knobs: dict, record: Record):
        self.record, self.rivals, self.knobs, self.options = record, rivals, knobs, options
        self.preset, self.arrays = preset, arrays
        problem = make_problem(*self.arrays, Settings())
        self.n, self.scale, self.flop = problem.n_q, problem.scale, 2 * (problem.dim_qk + problem.dim_v)
        self.pairs = ours.causal_pairs(self.n, problem.heads_q)
        self.rows = sample_rows(self.n, options.rows, 0)
        self.exact = exact_rows(problem, *self.arrays, self.rows).out[0].astype(np.float64)
        self.where = (ours.shape_text(self.n, problem.heads_q, problem.heads_kv, problem.dim_qk), problem.dtype)
        self.same = {"n": self.n, "preset": preset}
        self.baseline = self.cudnn_rate = self.tensors = None
        self.makers = {name: partial(Ours, name, settings) for name, settings in chosen.items()}
        self.entries: dict[str, Entry] = {}
        self.rates: dict[tuple, float] = {}  # of each kernel at full density
        if rivals:
            import torch

            self.tensors = [torch.from_dlpack(x[0]) for x in self.arrays]
            self.makers |= {name: make for name, make in rivals.sparse_peers(options.quick) if _wanted(options, name)}

    def __str__(self) -> str:
        return f"{self.preset}, N={self.n}"

    def dense_kernels(self) -> None:
        """Each dense kernel there is, checked and timed; the first is what ratios are against."""
        if self.rivals is None:
            self.record.case("every peer", *self.where, note="not measured: pip install torch", **self.same)
        else:
            for name, make in self.rivals.dense_peers(*self.tensors, self.scale).items():
                if _wanted(self.options, name):
                    with self.record.attempt(name, *self.where, catch=(Exception,)):
                        self.dense(name, make())
        self.dense("s2o_cupy dense_attention", partial(s2o.dense_attention, *self.arrays, backend="cuda"))

    def dense(self, name: str, call: Callable[[], object]) -> None:
        """One dense kernel, its error checked before it is timed."""
        error = self.error(call())
        _allow(name, error)
        took = on_device([call], 10, 0, least=2, enough=4 * ENOUGH)
        rate = took.rate(self.flop * self.pairs)
        self.baseline = self.baseline or (name, took.median)
        if name.startswith("cuDNN"):
            self.cudnn_rate = rate
        self.say(name, took, 1.0, error, rate, "" if name != self.baseline[0] else "ratios are to this", kind="dense")

    def meet(self, wanted: float) -> None:
        """Every method at one error, ours first; one that fails, or is slow, says so and is left out from then on."""
        densities = []
        for name, make in list(self.makers.items()):
            took = 0.0
            with self.record.attempt(name, *self.where, catch=(Exception,)):
                entry = self.entries.pop(name, None) or self.enter(make())
                before = time.perf_counter()
                density = self.sparse(entry, wanted)
                took = time.perf_counter() - before
                self.entries[name] = entry
                if density and entry.kind == "ours":
                    densities.append(density)
            if took > self.options.patience:
                del self.entries[name]
                self.say(name, note=f"no more errors: this one took {took:.0f} s, --patience {self.options.patience:g}")
            if name not in self.entries:
                del self.makers[name]
        flex = self.entries.get(self.rivals.Flex.name) if self.rivals else None
        if flex and densities:
            with self.record.attempt(flex.method.name, *self.where, catch=(Exception,)):
                self.equal_density(flex, wanted, min(densities))

    def enter(self, method) -> Entry:
        """A method, its kernel checked, and timed, at full density, unless another method's is the same."""
        entry = Entry(method, "ours" if isinstance(method, Ours) else "sparse", self)
        if method.kernel not in self.rates:
            full = method.everything(entry.rank())
            out, pairs = method.walk(full)
            if getattr(method, "complete", True):
                _allow(f"{method.name} at full density", self.error(out))
            del out
            took = on_device([partial(method.walk, full)], 5, 0, least=2, enough=ENOUGH)
            self.rates[method.kernel] = took.rate(self.flop * pairs())
        entry.dense_rate = self.rates[method.kernel]
        return entry

    def sparse(self, entry: Entry, wanted: float) -> float | None:
        """One method at one error: the knob, then the walk's time, then the whole call's. Its density."""
        method, key = entry.method, (entry.method.name, wanted)
        ranked = entry.rank()
        entry.sweep.measure = partial(entry.measure, ranked)
        entry.sweep.start = self.knobs.get(key)
        met = entry.sweep.meet(wanted)
        if not met:
            note = f"cannot reach error {wanted}: {entry.sweep.least_error:.4f} with {method.knob} {method.span[0]:g}"
            self.say(method.name, note=note, kind=entry.kind, wanted=wanted)
            return None
        x, error, pairs = met
        self.knobs[key] = x
        chosen = method.choose(ranked, x)
        kernel = on_device([partial(method.walk, chosen)], 5, 0, least=2, enough=ENOUGH)
        del chosen, ranked
        self.timed(entry, x, kernel, pairs / self.pairs, error, wanted=wanted)
        return pairs / self.pairs

    def equal_density(self, entry: Entry, wanted: float, density: float) -> None:
        """The method at the density that ours has at an error; its own error as it comes."""
        method, ranked = entry.method, entry.rank()

        def measure(x):
            out, pairs = method.walk(method.choose(ranked, x))
            return self.pairs / pairs(), self.error(out)

        met = Sweep(measure, *method.span, start=self.knobs.get((method.name, "density"))).meet(1 / density)
        if met:
            x, sparsity, error = met
            self.knobs[method.name, "density"] = x
            took = on_device([whole_call(method, entry.arrays, self.scale, x)], 10, 0, enough=ENOUGH)
            rate, note = took.rate(self.flop * self.pairs / sparsity), f"at our density for error {wanted}"
            self.say(method.name, took, 1 / sparsity, error, rate, note, kind="equal density", our_error=wanted)

    def timed(self, entry: Entry, x, kernel: Timing, density, error, **more) -> None:
        """Time the whole call at a knob and say it, with what its kernel alone would take at better rates."""
        method, dense_rate = entry.method, entry.dense_rate
        took = on_device([whole_call(method, entry.arrays, self.scale, x)], 10, 0, enough=ENOUGH)
        flop = self.flop * density * self.pairs
        selecting, share = took.median - kernel.median, kernel.rate(flop) / dense_rate
        note = f"{method.knob} {x:.3g}, all but the walk {selecting / took.median:.0%}"
        more |= {"kind": entry.kind, "knob": x, "kernel": kernel}
        more |= {"kernel_tflops": kernel.rate(flop), "dense_tflops": dense_rate}
        more["at_dense_rate_ms"] = selecting + flop / dense_rate / 1e9
        if self.cudnn_rate:
            more["at_cudnn_rate_ms"] = selecting + flop / self.cudnn_rate / 1e9
        if share < SLOW:
            at_that = f"{more['at_dense_rate_ms']:.2f} ms at that rate"
            note += f"; walks at {share:.2f} of its own dense {dense_rate:.0f} TFLOP/s: {at_that}"
        if entry.kind == "ours":
            more["settings"] = method.settings.as_dict()
        self.say(method.name, took, density, error, took.rate(flop), note, **more)

    def say(self, name, took=None, density=None, error=None, tflops=None, note="", **more) -> None:
        ratio = self.baseline[1] / took.median if took and self.baseline else None
        numbers = {"density": density, "error": error, "tflops": tflops, "ratio": ratio}
        self.record.case(name, *self.where, time=took, note=note, **numbers, **self.same, **more)

    def error(self, out) -> float:
        return ours.rows_error(out, self.rows, self.exact)


class Entry:
    """A method in the run of one length: on which arrays, its sweep, and its kernel's rate at full density."""

    def __init__(self, method, kind: str, run: Run):
        self.method, self.kind, self.scale, self.error = method, kind, run.scale, run.error
        self.arrays = run.arrays if kind == "ours" else run.tensors
        self.sweep, self.dense_rate = Sweep(None, *method.span), None

    def rank(self):
        """What does not depend on the knob; made anew for each error, as all of them would fill the device."""
        return self.method.rank(*self.arrays, self.scale)

    def measure(self, ranked, x: float) -> tuple[float, float]:
        """Error and computed pairs at a knob."""
        out, pairs = self.method.walk(self.method.choose(ranked, x))
        return self.error(out), pairs()


def print_faster(run: Run, found: dict) -> None:
    errors = sorted({wanted for row in found.values() for wanted in row}, reverse=True)
    if errors:
        print(f"\n{run}: time of each over that of our fastest variant at the same error")
        print(f"{'error':42}" + "".join(f"{wanted:8.2f}" for wanted in errors))
    for name, row in found.items():
        print(f"{name:42}" + "".join(f"{row[w]:8.2f}" if w in row else f"{'-':>8}" for w in errors))


def _allow(name: str, error: float, most: float = 0.02) -> None:
    """Refuse a dense answer that is not exact attention up to the type's rounding."""
    if not error <= most:
        raise RuntimeError(f"{name} is {error:.1e} from exact attention; allowed: {most}")


def rivals_or_none():
    """The peers' module; None, and a line, where PyTorch is missing."""
    try:
        from bench import rivals
    except ImportError as error:
        print(f"no peers: {error} (pip install torch)")
        return None
    return rivals


def _wanted(options, name: str) -> bool:
    """Whether `--only` leaves a method in."""
    return not options.only or any(text in name for text in options.only.split(","))


def _changes(settings: Settings) -> str:
    """Settings that are not the defaults."""
    plain = Settings().as_dict()
    changed = [f"{name}={value}" for name, value in settings.as_dict().items() if value != plain[name]]
    return ", ".join(changed) or "the defaults"


def _peers_tasks(rivals, lengths, options) -> list[dict]:
    """What `bench.building` is to build of the sparse peers that are wanted."""
    tasks = building.of_peers(rivals, lengths, options.quick) if rivals else []
    return [task for task in tasks if _wanted(options, task["name"])]


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
