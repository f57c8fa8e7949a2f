"""Hypothesis profiles, and the backends that the property tests run on."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy loads: threads only cost on products this small

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from properties import CPU, CUDA, NUMBA

from s2o_cupy import backends
from s2o_cupy.backends import cpu

settings.register_profile("quick", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("quick"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "quick")


LIKE_CPU = "RANKING_PAYS_FROM", cpu.RANKING_PAYS_FROM
ON_DEVICES = [pytest.param(backend, marks=pytest.mark.gpu) for backend in (CUDA, NUMBA)]


@pytest.fixture(scope="session", params=[CPU, *ON_DEVICES], ids=str)
def backend(request):
    """A `properties.Backend`; one that cannot run here is skipped, with the reason."""
    chosen = request.param
    if missing := chosen.missing():
        pytest.skip(missing)
    if chosen.on_host and chosen is NUMBA:
        pytest.skip("the simulator has small cases of its own, in test_numba_cuda.py")
    with pytest.MonkeyPatch.context() as patch:  # from where ranking pays on a GPU, calls are too long for these tests
        if chosen is not CPU:
            patch.setattr(backends.get(chosen.name, {"q": chosen.to_device(np.ones(1))}), *LIKE_CPU)
        yield chosen
