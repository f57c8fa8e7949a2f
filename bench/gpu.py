"""`python -m bench gpu`: the CUDA backend on a GPU: dense, plan, attend and whole calls, beside PyTorch's attention.

Rates are of computed pairs (unmasked pairs walked, plus pooled keys): ``4 D`` operations each. Errors of dense kernels
are against exact attention of sampled rows, those of `attend` against our own dense attention in the same type. A ratio
is our dense attention's time over the case's.
"""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path

import s2o_cupy as s2o
from bench import building, ours, timing, twins, workloads
from bench.record import Record
from bench.timing import noise, on_device, on_host
from s2o_cupy.exact import exact_rows, sample_rows
from s2o_cupy.problem import make_problem
from s2o_cupy.settings import Settings

TAUS = (3e-2, 1e-2, 3e-3)
RANKS = {"gaussian 15": {}, "mean": {"rank": "mean"}, "gaussian 7": {"rank_terms": 7}, "cap .25": {"cap": 0.25}}
CROSSOVER = (2048, 4096, 8192, 16384)
LOOPS = {"fixed depth": (0, 12.0), "stop each tile": (1, 1e-3), "stop each 4 tiles": (4, 4e-3)}  # chunk, knob
ENOUGH = 150.0  # ms of repeats of one case
ALLOWED = 0.02  # relative error of a dense kernel in a 16-bit type
FIRST_CALL = """
import time
import cupy
q, k, v = (cupy.zeros((1, heads, 8192, 128), "float16") for heads in (32, 8, 8))
cupy.cuda.runtime.deviceSynchronize()
start = time.perf_counter()
import s2o_cupy
print(time.perf_counter() - start)
start = time.perf_counter()
s2o_cupy.attention(q, k, v)
cupy.cuda.runtime.deviceSynchronize()
print(time.perf_counter() - start)
"""


def arguments(parser) -> None:
    """Adds the options that `main` reads."""
    building.argument(parser)
    parser.add_argument("files", nargs="*", metavar="FILE.npz", help="real heads: an npz with q, k, v")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072], metavar="N")
    parser.add_argument("--presets", nargs="*", default=list(workloads.PRESETS), choices=list(workloads.PRESETS))
    parser.add_argument("--no-torch", dest="torch", action="store_false", help="leave out PyTorch's kernels")


def main(options, record: Record) -> None:
    """Every preset at every length, files, where ranking pays, host times, first calls, and the Numba twins."""
    base = Settings(**ours.BASE)
    tasks = building.of_ours([base, *(base.replace(**change) for change in RANKS.values())])
    tasks += [{"task": "loop", "chunk": chunk} for chunk, _ in LOOPS.values()] if options.torch else []
    building.before(options, record, tasks)
    for preset in options.presets:
        for n in options.lengths:
            with record.section(f"{preset}, N={n}"), record.attempt(f"all of {preset}", ours.shape_text(n)):
                sets = 1 if n > 40_000 else 2  # two sets of inputs: no call finds its own in L2
                Case(preset, [ours.inputs(preset, n, seed) for seed in range(sets)], record).all(options.torch)
    for path in options.files:
        with record.section(path), record.attempt(path):
            Case(Path(path).stem, [ours.read(path)], record).all(options.torch)
    with record.section("crossover, host times"):
        for n in CROSSOVER:
            for preset in ("diffuse", "randn"):
                crossover(preset, n, record)
        host_times(record)
    with record.section("first calls"), record.attempt("first calls", catch=(subprocess.CalledProcessError,)):
        first_calls(record)
    with record.section("Numba twins"), record.attempt("Numba twins", catch=(Exception,)):
        twins.measure(record)


class Case:
    """One set of shapes: dense, PyTorch's kernels, plan by rank, attend by tau, a whole call and its memory."""

    def __init__(self, name: str, inputs: list, record: Record):
        self.name, self.inputs, self.record, self.backend = name, inputs, record, _backend()
        self.problem = p = make_problem(*inputs[0], Settings(**ours.BASE))
        self.flop, self.pairs = 2 * (p.dim_qk + p.dim_v), p.allowed_pairs * p.batch * p.heads_q
        self.where = (ours.shape_text(p.n_q, p.heads_q, p.heads_kv, p.dim_qk), p.dtype)
        self.exact, self.dense_ms = ours.answer(p, inputs[0][0]), None

    def all(self, with_torch: bool) -> None:
        self.dense()
        if with_torch and self.problem.batch == 1:
            self.torch()
        self.plan()
        self.attend()
        self.call()

    def say(self, what: str, time=None, **more) -> None:
        ratio = self.dense_ms / time.median if time and self.dense_ms else None
        name = f"{self.name}: {what}"
        self.record.case(name, *self.where, time=time, ratio=ratio, n=self.problem.n_q, preset=self.name, **more)

    def dense(self) -> None:
        p, calls = self.problem, [partial(self.backend.dense, self.problem, *x, self.exact) for x in self.inputs]
        calls[0]()
        rows = sample_rows(p.n_q, 128, 0)
        wanted = exact_rows(p, *self.inputs[0], rows).out
        error = ours.gap(self.exact.out[:, :, _cupy().asarray(rows)], wanted)
        if not error <= ALLOWED:
            raise RuntimeError(f"dense attention is {error:.1e} from exact; allowed: {ALLOWED}")
        time = on_device(calls, 10, 1, enough=ENOUGH)
        self.dense_ms, spread = time.median, noise(calls, 3)
        numbers = {"density": 1.0, "error": error, "tflops": time.rate(self.flop * self.pairs)}
        self.say("dense", time, note=f"timed twice: {spread:.1%} apart", noise=spread, **numbers)
        calls[0]()  # what attend's errors are against

    def torch(self) -> None:
        """Dense kernels through PyTorch, and the walk of the peers' Triton loops."""
        try:
            import torch

            from bench import rivals
        except ImportError as error:
            self.say("PyTorch's kernels", note=f"not measured: {error} (pip install torch)")
            return
        sets = [[torch.from_dlpack(x[0]) for x in arrays] for arrays in self.inputs]
        made = [rivals.dense_peers(*tensors, self.problem.scale) for tensors in sets]
        for name in list(made[0])[:2]:
            with self.record.attempt(f"{self.name}: {name}", *self.where, catch=(Exception,)):
                time = on_device([peers[name]() for peers in made], 10, 1, enough=ENOUGH)
                self.say(name, time, density=1.0, tflops=time.rate(self.flop * self.pairs))
        for label, (chunk, knob) in LOOPS.items():
            with self.record.attempt(f"{self.name}: Triton loop, {label}", *self.where, catch=(Exception,)):
                peer = rivals.Gather(label, 512, True, chunk)
                chosen = peer.choose(peer.rank(*sets[0], self.problem.scale), knob)
                pairs = peer.walk(chosen)[1]()
                time = on_device([partial(peer.walk, chosen)], 10, 1, enough=ENOUGH)
                numbers = {"density": pairs / self.pairs, "tflops": time.rate(self.flop * pairs)}
                self.say(f"Triton loop, {label}", time, note="the walk alone", **numbers)

    def plan(self) -> None:
        for rank, change in RANKS.items():
            p = self.problem.replace(**change)
            offsets, order = ours.lists(p)
            calls = [partial(self.backend.rank, p, *x[:2], p.whole, offsets, order) for x in self.inputs]
            self.say(f"plan, {rank}", on_device(calls, 10, 1, enough=ENOUGH))
        for cap in (1, 0.25):
            held = _held(partial(s2o.plan, *self.inputs[0][:2], backend="cuda", cap=cap, **ours.BASE))
            self.say(f"plan(), cap {cap}", note=f"{held / 2**30:.2f} GiB above its inputs", held=held)
        calls = [partial(self.backend.pool, self.problem, *x[1:]) for x in self.inputs]
        self.say("pool", on_device(calls, 10, enough=ENOUGH))

    def attend(self) -> None:
        p, arrays = self.problem, self.inputs[0]
        offsets, order = ours.lists(p)
        self.backend.rank(p, *arrays[:2], p.whole, offsets, order)
        pooled, result = self.backend.pool(p, *arrays[1:]), ours.answer(p, arrays[0])
        for tau in TAUS:
            q = p.replace(tau=tau)
            call = partial(self.backend.attend, q, *arrays, p.whole, order, offsets, None, pooled, result)
            time = on_device([call], 10, 1, enough=ENOUGH)
            density, pairs = ours.computed(q, result)
            numbers = {"density": density, "error": ours.gap(result.out, self.exact.out)}
            self.say(f"attend, tau {tau:g}", time, tau=tau, tflops=time.rate(self.flop * pairs), **numbers)

    def call(self) -> None:
        calls = [partial(s2o.attention, *x, tau=1e-2, backend="cuda", **ours.BASE) for x in self.inputs]
        held = _held(calls[0])
        time = on_device(calls, 10, 1, enough=ENOUGH)
        host, in_a_row = (on_host(calls[0], 10, 1, idle) for idle in (True, False))
        note = f"{held / 2**30:.2f} GiB above its inputs, host time {1e3 * host.median:.0f} us"
        note += f", in a row {1e3 * in_a_row.median:.0f}"
        self.say("attention(), tau 0.01", time, note=note, call_bytes=held, host=host, host_in_a_row=in_a_row)


def crossover(preset: str, n: int, record: Record) -> None:
    """Where ranking pays: a whole ranked call beside dense, and on randn, the worst case, beside dense plus plan."""
    backend, arrays = _backend(), ours.inputs(preset, n)
    p = make_problem(*arrays, Settings(**ours.BASE))
    result, (offsets, order) = ours.answer(p, arrays[0]), ours.lists(p)
    dense = on_device([partial(backend.dense, p, *arrays, result)])
    rank = partial(backend.rank, p, *arrays[:2], p.whole, offsets, order)
    plan = on_device([rank])
    pooled = backend.pool(p, *arrays[1:])
    walk = on_device([partial(backend.attend, p, *arrays, p.whole, order, offsets, None, pooled, result)])
    density, pairs = ours.computed(p, result)
    attention = partial(s2o.attention, *arrays, backend="cuda", **ours.BASE)
    path, call = attention(full_output=True).stats.path, on_device([attention])
    parts = {"dense": dense, "plan": plan, "attend": walk}
    note = f"{path}; " + ", ".join(f"{name} {x.median:.3f}" for name, x in parts.items())
    note += f"; {call.median / (dense.median + plan.median):.2f} of dense plus plan"
    density, pairs = (density, pairs) if path == "ranked" else (1.0, ours.causal_pairs(n))
    record.case(
        f"crossover, {preset}: attention()", ours.shape_text(n), p.dtype, time=call, note=note, n=n, preset=preset,
        density=density, tflops=call.rate(4 * p.dim_qk * pairs), ratio=dense.median / call.median, **parts,
    )  # fmt: skip


def host_times(record: Record) -> None:
    """Host time of a call with its kernels built: at 2048 keys `attention` goes dense, at 8192 it ranks."""
    for n in (2048, 8192):
        q, k, v = (x[None] for x in workloads.make("diffuse", n, heads_q=4, heads_kv=2, xp=_cupy()))
        for name, call in {"attention": s2o.attention, "dense_attention": s2o.dense_attention}.items():
            time = on_host(partial(call, q, k, v, backend="cuda"))
            record.case(f"host time, {name}", ours.shape_text(n, 4, 2), "bfloat16", time=time)


def first_calls(record: Record) -> None:
    """The package's import and first call in new processes that have a context: an empty CuPy cache, then a filled one.

    `attention`'s default settings, all zeros: as long as any call of this shape while kernels are built or loaded.
    """
    for name, parts in timing.first_calls(FIRST_CALL, "CUPY_CACHE_DIR", ("import", "attention")):
        note = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in parts.items())
        record.case(f"first call, {name} CuPy cache", ours.shape_text(8192), "float16", note=note, seconds=parts)


def _held(call) -> int:
    """Bytes that a pool of its own takes for a call and its answer."""
    pool = _cupy().cuda.MemoryPool()
    with _cupy().cuda.using_allocator(pool.malloc):
        call()
    return pool.total_bytes()


def _backend():
    from s2o_cupy.backends import cuda

    return cuda


def _cupy():
    import cupy

    return cupy
