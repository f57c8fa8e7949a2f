"""`python -m bench.gpu`: the CUDA backend on a GPU: dense, plan, attend and whole calls, beside PyTorch's attention.

Rates are of computed pairs (unmasked pairs walked, plus pooled keys): ``4 D`` operations each. Errors are relative to
our own dense attention in the same type.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np

import s2o_cupy as s2o
from bench import workloads
from bench.timing import as_json, machine, noise, on_device, on_host
from s2o_cupy import planning
from s2o_cupy.problem import make_problem
from s2o_cupy.settings import Settings

HEADS_Q, HEADS_KV, DIM = 32, 8, 128
TAUS = (3e-2, 1e-2, 3e-3)
BASE = {"segment": 512, "block_k": 128, "pool": 256}  # fixed here, whatever the package's defaults are
RANKS = {"gaussian15": {}, "mean": {"rank": "mean"}, "gaussian7": {"rank_terms": 7}, "cap.25": {"cap": 0.25}}


def main(options) -> dict:
    """Run every case asked for; returns the report."""
    report = {"machine": machine(), "cases": []}
    print(json.dumps(report["machine"]), flush=True)
    for preset in options.presets:
        for n in options.lengths:
            sets = 1 if n > 40_000 else 2
            inputs = [
                [
                    x[None]
                    for x in workloads.make(preset, n, heads_q=HEADS_Q, heads_kv=HEADS_KV, dim=DIM, seed=s, xp=_cupy())
                ]
                for s in range(sets)
            ]
            report["cases"].append(case(preset, inputs, options))
            _cupy().get_default_memory_pool().free_all_blocks()
    for path in options.files:
        with np.load(path) as file:
            arrays = [_cupy().asarray(file[name][None]) for name in ("q", "k", "v")]
        report["cases"].append(case(path.rsplit("/", 1)[-1], [arrays], options))
    report["crossover"] = [crossover(n) for n in (2048, 4096, 8192, 16384)]
    report["host"] = host_times()
    return as_json(report)


def case(name: str, inputs: list, options) -> dict:
    """One set of shapes: dense, PyTorch's kernels, plan by rank, attend by tau, a whole call, memory."""
    cp, backend = _cupy(), _backend()
    q, k, v = inputs[0]
    p = make_problem(q, k, v, Settings(**BASE))
    exact = _empty(p, q)
    pairs = p.allowed_pairs * p.batch * p.heads_q
    found = {"name": name, "shape": [list(x.shape) for x in (q, k, v)], "dtype": p.dtype}
    dense = [lambda x=x: backend.dense(p, *x, exact) for x in inputs]
    repeats = 5 if p.n_q > 40_000 else 10
    found["dense"] = on_device(dense, repeats, 1)
    found["dense_tflops"] = found["dense"].rate(4 * p.dim_qk * pairs)
    found["noise"] = noise(dense, 3)
    _say(name, p.n_q, "dense", found["dense"], f"{found['dense_tflops']:.0f} TFLOP/s, noise {found['noise']:.3f}")
    if options.torch and p.n_q <= 40_000:
        found["torch"] = torch_times(inputs, pairs, p)
    backend.dense(p, *inputs[0], exact)

    found["plan"] = {}
    for rank, change in RANKS.items():
        found["plan"][rank] = plan_time(p.replace(**change), inputs, repeats)
        _say(name, p.n_q, "plan", rank, found["plan"][rank])
    found["pool"] = on_device([partial(backend.pool, p, *x[1:]) for x in inputs], repeats)
    found["attend"] = attend_times(name, p, inputs[0], exact.out, repeats)

    pool = cp.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    found["call"] = on_device(
        [lambda x=x: s2o.attention(*x, tau=1e-2, backend="cuda", **BASE) for x in inputs], repeats, 1
    )
    found["call_bytes"] = pool.total_bytes() - before
    _say(name, p.n_q, "attention()", found["call"], f"{found['call_bytes'] / 2**30:.2f} GiB above its inputs")
    return found


def plan_time(problem, inputs, repeats):
    """Stages 1 and 2 for the whole problem."""
    offsets, order = _lists(problem)
    ranked = [partial(planning.rank, problem, *x[:2], problem.whole, offsets, order, _backend()) for x in inputs]
    return on_device(ranked, repeats, 1)


def attend_times(name, p, arrays, exact, repeats) -> list[dict]:
    """Stage 3 over one plan: time, density, rate and error at each tau."""
    backend, found = _backend(), []
    offsets, order = _lists(p)
    planning.rank(p, *arrays[:2], p.whole, offsets, order, backend)
    pooled, result = backend.pool(p, *arrays[1:]), _empty(p, arrays[0])
    for tau in TAUS:
        problem = p.replace(tau=tau)
        call = partial(backend.attend, problem, *arrays, p.whole, order, offsets, None, pooled, result)
        timing = on_device([call], repeats, 1)
        density, computed = _pairs(problem, result)
        error, rate = _error(result.out, exact), timing.rate(4 * p.dim_qk * computed)
        found.append({"tau": tau, "time": timing, "density": density, "tflops": rate, "error": error})
        _say(name, p.n_q, f"attend tau {tau}", timing, f"density {density:.4f}, {rate:.0f} TFLOP/s, error {error:.4f}")
    return found


def _lists(problem):
    """Offsets of a whole plan's lists, and room for their keys."""
    cp = _cupy()
    offsets = cp.asarray(problem.offsets(problem.whole))
    return offsets, cp.empty(int(offsets[-1, -1]), np.int32)


def torch_times(inputs, pairs, p) -> dict:
    """FlashAttention-2 and cuDNN through PyTorch, where it is installed."""
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        return {}
    attention, found = torch.nn.functional.scaled_dot_product_attention, {}
    tensors = []
    for q, k, v in inputs:
        q, k, v = map(torch.from_dlpack, (q, k, v))
        tensors.append((q, *(x.repeat_interleave(p.group, 1) for x in (k, v))))
    for label, kind in (("flash2", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        try:
            with sdpa_kernel(kind):
                timing = on_device([lambda x=x: attention(*x, is_causal=True) for x in tensors])
        except RuntimeError as error:
            print(label, "does not run:", str(error).splitlines()[0])
            continue
        found[label] = {"time": timing, "tflops": timing.rate(4 * p.dim_qk * pairs)}
        _say("torch", p.n_q, label, timing, f"{found[label]['tflops']:.0f} TFLOP/s")
    return found


def crossover(n: int) -> dict:
    """Where ranking pays: dense beside plan and attend, on the diffuse preset and on randn, the worst case."""
    cp, backend, found = _cupy(), _backend(), {"n": n}
    for name in ("diffuse", "randn"):
        arrays = [x[None] for x in workloads.make("diffuse", n, heads_q=HEADS_Q, heads_kv=HEADS_KV, dim=DIM, xp=cp)]
        if name == "randn":
            arrays = [cp.random.standard_normal(x.shape, dtype=np.float32).astype(x.dtype) for x in arrays]
        p = make_problem(*arrays, Settings(**BASE))
        result, (offsets, order) = _empty(p, arrays[0]), _lists(p)
        rank = partial(planning.rank, p, *arrays[:2], p.whole, offsets, order, backend)
        found[f"{name} dense"] = on_device([partial(backend.dense, p, *arrays, result)])
        found[f"{name} plan"] = on_device([rank])
        pooled = backend.pool(p, *arrays[1:])
        found[f"{name} attend"] = on_device(
            [partial(backend.attend, p, *arrays, p.whole, order, offsets, None, pooled, result)]
        )
        found[f"{name} density"] = _pairs(p, result)[0]
    found["randn call"] = on_device([partial(s2o.attention, *arrays, backend="cuda", **BASE)])
    found["randn share"] = (found["randn call"].median - found["randn plan"].median) / found["randn dense"].median
    _say("crossover", *(f"{key} {value}" for key, value in found.items()))
    _say(f"randn, {n}: a call costs the plan and {found['randn share']:.2f} times dense (target: at most 1.25)")
    return found


def host_times() -> dict:
    """Host time of a call with its kernels built."""
    q, k, v = (x[None] for x in workloads.make("diffuse", 2048, heads_q=4, heads_kv=2, xp=_cupy()))
    found = {
        "attention": on_host(lambda: s2o.attention(q, k, v, backend="cuda")),
        "dense_attention": on_host(lambda: s2o.dense_attention(q, k, v, backend="cuda")),
    }
    for name, timing in found.items():
        _say("host", 2048, name, timing)
    return found


def _pairs(problem, result) -> tuple[float, float]:
    """Density, and computed pairs of all heads."""
    tiles, blocks = (
        x.get().reshape(-1, len(problem.tile_start)).astype(np.int64) for x in (result.tiles, result.tail_blocks)
    )
    walked = np.minimum(tiles * problem.settings.block_k, problem.listed[problem.tile_segment])
    pairs = len(tiles) * problem.window_pairs.sum() + ((walked + blocks) * problem.tile_rows).sum()
    return float(pairs / len(tiles) / problem.allowed_pairs), float(pairs)


def _error(out, exact) -> float:
    cp = _cupy()
    gap = norm = 0.0
    for h in range(out.shape[1]):
        want = exact[:, h].astype(np.float32)
        gap += float(cp.linalg.norm(out[:, h].astype(np.float32) - want)) ** 2
        norm += float(cp.linalg.norm(want)) ** 2
    return float(np.sqrt(gap / norm))


def _empty(p, q):
    cp, rows = _cupy(), (p.batch, p.heads_q, p.n_q)
    tiles = (*rows[:2], len(p.tile_start))
    return SimpleNamespace(
        out=cp.zeros((*rows, p.dim_v), q.dtype),
        lse=cp.zeros(rows, p.compute_dtype),
        tiles=cp.zeros(tiles, np.int32),
        tail_blocks=cp.zeros(tiles, np.int32),
        tail_mass=cp.zeros(rows, np.float32),
    )


def _backend():
    from s2o_cupy.backends import cuda

    return cuda


def _cupy():
    import cupy

    return cupy


def _say(*parts) -> None:
    print(*parts, sep="  ", flush=True)


def arguments(parser) -> None:
    """Adds the options that `main` reads."""
    parser.add_argument("files", nargs="*", metavar="FILE.npz", help="real heads: an npz with q, k, v")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072], metavar="N")
    parser.add_argument("--presets", nargs="*", default=list(workloads.PRESETS), choices=list(workloads.PRESETS))
    parser.add_argument("--no-torch", dest="torch", action="store_false", help="leave out PyTorch's kernels")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write every number here")
    chosen = parser.parse_args()
    report = main(chosen)
    if chosen.json:
        with open(chosen.json, "w") as file:
            json.dump(report, file, indent=1)
    sys.exit(0)
