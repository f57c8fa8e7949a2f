"""The ladder's raw kernels without tensor cores from their own source on the CPU, in two thread orders."""

import re

import pytest

from examples.ladder import rungs
from examples.ladder.work import check, small_work
from s2o_cupy.iterate import emulation as run

pytestmark = pytest.mark.skipif(run.compiler() is None, reason="needs g++")


def emulate(name, work, **options):
    answer, p = work.answer(), work.problem
    arguments = rungs.raw_arguments(work, answer)
    dim, block_q = p.dim_qk, p.settings.block_q
    run.launch(
        name, (work.row_tiles, p.heads_q), rungs.RAW[name] * block_q, arguments, entry="attend",
        source=rungs.raw_source(name), shared=rungs.shared_bytes(name, dim, block_q),
        **rungs.raw_macros(name, dim, block_q), **options,
    )  # fmt: skip
    return answer


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("tau", [0.15, 0.0])
@pytest.mark.parametrize("name", ["step3_tiles", "step4_registers"])
def test_raw_steps_are_the_reference(name, tau, reverse):
    work = small_work(n=100, tau=tau, block_q=16, segment=32)
    check(work, emulate(name, work, reverse=reverse))


@pytest.mark.parametrize("name", ["step3_tiles", "step4_registers"])
def test_a_missing_barrier_is_found(name):
    work = small_work(n=100, block_q=16, segment=32)

    def without_the_barrier_after_copying(source):
        return re.sub(r"(        \}\n\s+)__syncthreads\(\);", r"\1", source, count=1)

    wrong = []
    for reverse in (False, True):
        answer = emulate(name, work, reverse=reverse, edit=without_the_barrier_after_copying)
        try:
            check(work, answer)
        except AssertionError as error:
            wrong.append(error)
    assert wrong
