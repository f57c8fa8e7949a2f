"""Hypothesis profiles, and the backends that the property tests run on."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy loads: threads only cost on products this small

import pytest
from hypothesis import HealthCheck, settings
from properties import CPU, CUDA, NUMBA

settings.register_profile("quick", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("quick"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "quick")


ON_DEVICES = [pytest.param(backend, marks=pytest.mark.gpu) for backend in (CUDA, NUMBA)]


@pytest.fixture(scope="session", params=[CPU, *ON_DEVICES], ids=str)
def backend(request):
    """A `properties.Backend`; one that cannot run here is skipped, with the reason."""
    chosen = request.param
    if missing := chosen.missing():
        pytest.skip(missing)
    if chosen.on_host and chosen is NUMBA:
        pytest.skip("the simulator has small cases of its own, in test_numba_cuda.py")
    return chosen
