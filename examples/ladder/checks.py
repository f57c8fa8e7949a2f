"""checks.py: every rung compiled and checked on a small case, each in a process of its own, all at once.

What they compile stays in the disk caches of CuPy and Numba, so that the process that measures finds it there.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from examples.ladder.rungs import RUNGS
from examples.ladder.work import check, ranked_work, small_work


def checked_rungs(dim: int) -> dict[str, str]:
    """For each rung that runs on the current device, why its answer is not the reference's; "" where it is."""
    names = [rung.name for rung in RUNGS if not rung.missing()]
    with ProcessPoolExecutor(len(names) + 1, multiprocessing.get_context("spawn")) as pool:
        ranking = pool.submit(compile_ranking, dim)
        said = dict(zip(names, pool.map(check_rung, names, [dim] * len(names))))
        ranking.result()
    return said


def check_rung(name: str, dim: int) -> str:
    """Why a rung's answer to a small case is not the reference's; "" where it is."""
    try:
        import cupy

        small = small_work(n=600, dim=dim, segment=256, block_q=128, block_k=128, pool=64)
        on_device = small.on_device()
        answer = on_device.answer(cupy)
        next(rung for rung in RUNGS if rung.name == name).prepare(on_device, answer)()
        check(small, type(answer)(out=answer.out.get(), tiles=answer.tiles.get()))
    except Exception as error:  # the other rungs can still be measured
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def compile_ranking(dim: int) -> None:
    """Rank a little, which compiles what ranks."""
    ranked_work(1024, dim, 1e-2)
