"""The backends on one plan: the same stops for at least 99.9 % of row tiles, the same answers to rounding."""

import numba
import numpy as np
import pytest
from properties import CPU, CUDA, NUMBA, backends_agree
from strategies import DTYPES, Case

from bench import workloads
from s2o_cupy import Settings

SIMULATED = bool(numba.config.ENABLE_CUDASIM)
CHANGES = [
    {},
    {"query_order": "guide", "share_order": True, "rank": "mean"},
    {"causal": False, "tail": None, "cap": 0.5},
    {"tail": "spread", "tau": 0.03},
    {"tau": (0.03, 0.0) * 4},
]


@pytest.mark.gpu
@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_backends_agree_on_a_device(dtype, changes):
    for backend in (CUDA, NUMBA):
        if missing := backend.missing():
            pytest.skip(missing)
    if SIMULATED:
        pytest.skip("Numba's simulator is on; unset NUMBA_ENABLE_CUDASIM")
    # Heads with sinks, stripes and topics, whose 1024 row tiles stop at many places.
    arrays = workloads.make("diffuse", 4096, heads_q=8, heads_kv=2, dim=64, dtype=DTYPES[dtype])
    settings = Settings(**{"block_q": 32, "block_k": 32, **changes})
    backends_agree((CPU, CUDA, NUMBA), Case(*(x[None] for x in arrays), settings, "diffuse", ("plain",) * 3))


@pytest.mark.skipif(not SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM=1")
@pytest.mark.parametrize("changes", CHANGES[:-1], ids=str)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_simulator_agrees_with_the_cpu(dtype, changes):
    rng = np.random.default_rng(3)
    q, k, v = (1.5 * rng.standard_normal((1, h, 36, 4)) for h in (2, 1, 1))
    tiles = {"segment": 12, "block_q": 4, "block_k": 4, "pool": 4, "tau": 0.1, "rank_terms": 3}
    arrays = (x.astype(DTYPES[dtype]) for x in (q, k, v))
    backends_agree((CPU, NUMBA), Case(*arrays, Settings(**{**tiles, **changes}), "randn", ("plain",) * 3))


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_answers_two_per_cent_off_do_not_agree(dtype):
    class Off(type(CPU)):
        def attend(self, case, plan):
            result = super().attend(case, plan)
            result.out[...] *= np.float32(1.02)
            return result

    arrays = workloads.make("diffuse", 512, heads_q=2, heads_kv=1, dim=64, dtype=DTYPES[dtype])
    case = Case(*(x[None] for x in arrays), Settings(block_q=32, block_k=32), "diffuse", ("plain",) * 3)
    backends_agree((CPU, CPU), case)
    with pytest.raises(AssertionError):
        backends_agree((CPU, Off(CPU.name, CPU.unit)), case)
