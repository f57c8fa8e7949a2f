"""Kernels built by parallel processes before anything is timed: a run then finds them in its compilers' disk caches.

``python -m bench.building JSON`` is one such process: it runs the task that the JSON names on arrays of its own.
``python -m bench.building`` builds what every benchmark launches on a GPU; they then take ``--no-build``.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bench import ours
from s2o_cupy.exact import exact_rows, sample_rows
from s2o_cupy.problem import make_problem
from s2o_cupy.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 90  # after which a process is ended: what it would have built is built where it is used
LENGTH = 8192  # of arrays, where kernels do not depend on it


class Building:
    """Processes at work, one a task: {'task': a name of `TASKS`, ...its arguments}. Leaving the block ends them."""

    def __init__(self, seconds: float = SECONDS):
        self._seconds = seconds

    def __enter__(self) -> Building:
        self._start, self._running = time.perf_counter(), []
        return self

    def __exit__(self, *_) -> None:
        for _, process in self._running:
            process.kill()
            process.communicate()

    def start(self, tasks: list[dict]) -> None:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
        for task in tasks:
            command = [sys.executable, "-m", "bench.building", json.dumps(task)]
            self._running.append((task, subprocess.Popen(command, **pipes)))

    def wait(self) -> None:
        """Until all are done; prints a line a task: how long it took, or the last it said before it failed."""
        for task, process in self._running:
            left = self._seconds - (time.perf_counter() - self._start)
            try:
                text = process.communicate(timeout=max(left, 0.1))[0].strip()
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                text = f"not done after {self._seconds:g} s"
            what = ", ".join(str(_changed(value)) for value in task.values())
            print(f"built {what}: {text.splitlines()[-1][:200] if text else 'no word'}", flush=True)
        self._running.clear()


def rank(settings: dict) -> None:
    """Stages 1 and 2."""
    from s2o_cupy.backends import cuda

    p, q, k, _ = _problem(settings)
    offsets, order = ours.lists(p)
    cuda.rank(p, q, k, p.whole, offsets, order)


def walk(settings: dict) -> None:
    """Pooling and stage 3, over lists that hold key 0 alone."""
    from s2o_cupy.backends import cuda

    p, *made = _problem(settings)
    offsets, order = ours.lists(p)
    order.fill(0)
    pooled, result = cuda.pool(p, *made[1:]), ours.answer(p, made[0])
    cuda.attend(p, *made, p.whole, order, offsets, None, pooled, result)


def dense() -> None:
    """Dense attention."""
    import s2o_cupy as s2o

    s2o.dense_attention(*ours.inputs("diffuse", LENGTH), backend="cuda")


def arrays() -> None:
    """What CuPy compiles for a run's inputs, exact rows and errors."""
    made = ours.inputs("diffuse", LENGTH)
    rows = sample_rows(LENGTH, 1024, 0)
    wanted = exact_rows(make_problem(*made, Settings()), *made, rows).out[0].astype(np.float64)
    ours.rows_error(made[0], rows, wanted)
    ours.gap(made[0], made[0])
    half = ours.inputs("randn", LENGTH)[0][0, 0].astype(np.float32).astype(np.float16)
    half @ half.T


def peer(name: str, n: int = LENGTH) -> None:
    """A sparse peer of `bench peers`."""
    from bench import rivals

    _exercise(dict(rivals.sparse_peers())[name](), n)


def loop(chunk: int) -> None:
    """A Triton gather loop of `bench gpu`."""
    from bench import rivals

    _exercise(rivals.Gather("loop", 512, True, chunk), LENGTH)


def _exercise(method, n: int) -> None:
    """A method's ranking, its walk at a middling knob, and its walk at full density."""
    import torch

    heads = (ours.HEADS_Q, ours.HEADS_KV, ours.HEADS_KV)
    made = [torch.randn(h, n, ours.DIM, device="cuda", dtype=torch.bfloat16) for h in heads]
    ranked = method.rank(*made, ours.DIM**-0.5)
    method.walk(method.choose(ranked, math.sqrt(math.prod(method.span))))
    method.walk(method.everything(ranked))
    torch.cuda.synchronize()


TASKS = {task.__name__: task for task in (arrays, rank, walk, dense, peer, loop)}


def of_ours(chosen: Iterable[Settings]) -> list[dict]:
    """Tasks that build what these settings launch, each kernel once, and dense attention."""
    tasks: dict[tuple, dict] = {}
    for settings in chosen:
        changed = settings.as_dict()
        tasks.setdefault(("rank", settings.rank, settings.rank_terms), {"task": "rank", "settings": changed})
        tasks.setdefault(("walk", settings.block_k), {"task": "walk", "settings": changed})
    return [{"task": "dense"}, *tasks.values()]


def of_peers(rivals, lengths: Iterable[int], quick: bool = False) -> list[dict]:
    """The same for the sparse peers; FlexAttention is compiled for each length."""
    found: list[dict] = []
    for name, _ in rivals.sparse_peers(quick):
        at = [{"n": n} for n in lengths] if name == rivals.Flex.name else [{}]
        found += [{"task": "peer", "name": name} | where for where in at]
    return found


def argument(parser) -> None:
    """Adds the option by which a benchmark leaves this out."""
    parser.add_argument("--no-build", dest="build", action="store_false", help="kernels are built: `bench.building`")


def before(options, record, tasks: list[dict]) -> None:
    """Build for a run, unless its options say that it is done."""
    if options.build:
        with record.section("kernels built"), Building() as built:
            built.start(tasks)
            built.wait()


def everything() -> None:
    """Build what every benchmark launches on a GPU, of PyTorch's and Triton's too where they are there."""
    from bench import gpu, peers

    ranks = [ours.S512.replace(**change) for change in gpu.RANKS.values()]
    with Building(240) as built:
        built.start([{"task": "arrays"}, *of_ours([*ours.VARIANTS.values(), *ranks])])
        if rivals := peers.rivals_or_none():
            built.start(of_peers(rivals, peers.LENGTHS))
            built.start([{"task": "loop", "chunk": chunk} for chunk, _ in gpu.LOOPS.values()])
        built.wait()


def _changed(value):
    """Settings in short: those that kernels depend on."""
    return {name: value[name] for name in ("rank", "rank_terms", "block_k")} if isinstance(value, dict) else value


def _problem(settings: dict):
    made = ours.inputs("diffuse", LENGTH)
    return make_problem(*made, Settings(**settings)), *made


def main(text: str) -> None:
    start, task = time.perf_counter(), json.loads(text)
    TASKS[task.pop("task")](**task)
    print(f"{time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1]) if sys.argv[1:] else everything()
