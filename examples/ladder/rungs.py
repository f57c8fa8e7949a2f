"""rungs.py: the steps in order, and how each is launched on a device.

A rung is `Rung(name, change, prepare)`: `prepare(work, answer)` compiles it and returns a call that fills `answer`
(`Work.answer`) on the device and takes no argument.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from s2o_cupy import specialisations
from s2o_cupy.compile import device_target, options

HERE = Path(__file__).parent
RAW = {"step3_tiles": 1, "step4_registers": 2, "step5_tensor_cores": 2}  # threads a row


@dataclass(frozen=True)
class Rung:
    """One step: its name, what it changed, its launcher, and the architecture that it needs ("" for any)."""

    name: str
    change: str
    prepare: Callable
    arch: str = ""

    def missing(self) -> str:
        """Why it cannot run on the current device; empty when it can."""
        return f"needs {self.arch}" if self.arch not in ("", device_target()) else ""


# --- Numba ----------------------------------------------------------------------------------------
def numba_kernel(name: str, dim: int):
    """The Numba kernel of a step."""
    if name == "step1_naive":
        from examples.ladder.step1_naive import attend

        return attend
    from examples.ladder.step2_tiles import attend_kernel

    return attend_kernel(dim)


def numba_rung(name, work, answer):
    from numba import cuda

    arrays = (work.q, work.k, work.v, work.order, work.starts, answer.out, answer.tiles)
    views = [cuda.as_cuda_array(x, sync=False) for x in arrays]
    kernel = numba_kernel(name, work.problem.dim_qk)
    grid = (work.row_tiles, work.problem.heads_q)
    return functools.partial(kernel[grid, work.problem.settings.block_q], *views, *work.numbers())


# --- raw CUDA -------------------------------------------------------------------------------------
def raw_source(name: str) -> str:
    return f'#line 1 "examples/ladder/{name}.cu"\n' + (HERE / f"{name}.cu").read_text()


def raw_macros(name: str, dim: int, block_q: int) -> dict:
    return {"DIM": dim, "IS_BF16": 0} | ({"BLOCK_M": block_q} if RAW[name] > 1 else {})


def shared_bytes(name: str, dim: int, block_q: int) -> int:
    """Dynamic shared memory of a raw step."""
    if name == "step4_registers":
        return 4 * ((block_q + 32) * (dim + 1) + block_q * 33)
    return 2 * dim * (block_q + 2 * 64) + 4 * (block_q + 64) if name == "step5_tensor_cores" else 0


def raw_arguments(work, answer) -> tuple:
    """Arrays, then scalars, in the order that every raw step takes them."""
    p = work.problem
    segment, block_k, tau, scale = work.numbers()
    scalars = (*map(np.int32, (p.heads_kv, p.n_q, segment, block_k)), tau, scale)
    return work.q, work.k, work.v, work.order, work.starts, answer.out, answer.tiles, *scalars


def raw_rung(name, work, answer):
    import cupy

    p = work.problem
    dim, block_q = p.dim_qk, p.settings.block_q
    macros, shared = raw_macros(name, dim, block_q), shared_bytes(name, dim, block_q)
    module = cupy.RawModule(code=raw_source(name), options=options(device_target(), macros), backend="nvrtc")
    kernel = module.get_function("attend")
    if shared > 48 * 1024:
        kernel.max_dynamic_shared_size_bytes = shared
    grid, block = (work.row_tiles, p.heads_q), (RAW[name] * block_q,)
    return functools.partial(kernel, grid, block, raw_arguments(work, answer), shared_mem=shared)


# --- the package's own ------------------------------------------------------------------------------
def shipped_rung(hopper, work, answer):
    """`backends.cuda.attend`; without `hopper` by attend.cu, where a kernel for Hopper alone would serve."""
    import cupy

    from s2o_cupy.backends import cuda

    p, arrays = work.problem, [x[None] for x in (work.q, work.k, work.v)]
    rows = (1, p.heads_q, p.n_q)
    filled = SimpleNamespace(
        out=answer.out[None],
        tiles=answer.tiles[None],
        lse=cupy.empty(rows, np.float32),
        tail_blocks=cupy.empty_like(answer.tiles)[None],
        tail_mass=cupy.empty(rows, np.float32),
    )
    call = functools.partial(cuda.attend, p, *arrays, p.whole, work.order, work.starts, None, None, filled)
    if hopper or not HOPPER:
        return call

    def by_attend_cu():
        serves, specialisations.sm90_serves = specialisations.sm90_serves, lambda *_: False
        try:
            call()
        finally:
            specialisations.sm90_serves = serves

    return by_attend_cu


def _step(launch, name: str, change: str) -> Rung:
    return Rung(name, change, functools.partial(launch, name))


HOPPER = hasattr(specialisations, "sm90_serves")  # whether the package has a kernel for Hopper alone
RUNGS = [
    _step(numba_rung, "step1_naive", "Numba; a thread a query row, all in global memory"),
    _step(numba_rung, "step2_tiles", "Numba; key tiles in shared memory, a row in registers"),
    _step(raw_rung, "step3_tiles", "CUDA C++; the same"),
    _step(raw_rung, "step4_registers", "4 x 4 logits a thread, eight threads a row"),
    _step(raw_rung, "step5_tensor_cores", "mma.sync on 16-bit tiles"),
    Rung("attend.cu", "the next tile in flight, rare rescaling", functools.partial(shipped_rung, False)),
]
if HOPPER:
    change = "wgmma, a warpgroup that gathers for two that multiply"
    RUNGS.append(Rung("attend_sm90.cu", change, functools.partial(shipped_rung, True), "sm_90a"))
