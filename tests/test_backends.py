"""What the backends say of GPUs and drivers that they cannot use."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest

from s2o_cupy import backends, commands

OLD_DRIVER = "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"


class CUDARuntimeError(RuntimeError):
    """As CuPy's."""


@pytest.fixture
def machine(monkeypatch):
    """Makes a machine's CuPy: its number of devices, or the error that asking for it raises, and their capability."""

    def make(devices, capability="90"):
        def count():
            if isinstance(devices, Exception):
                raise devices
            return devices

        runtime = SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            getDeviceCount=count,
            getDeviceProperties=lambda device: {"name": b"a GPU"},
        )
        cupy = ModuleType("cupy")
        cupy.cuda = SimpleNamespace(
            runtime=runtime, Device=lambda: SimpleNamespace(id=0, compute_capability=capability)
        )
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "numba_cuda" or found(name))
        monkeypatch.setattr(backends, "_simulator_on", lambda: False)

    caches = (backends._gpu, backends._cuda_status, backends._numba_status)
    for cache in caches:
        cache.cache_clear()
    yield make
    for cache in caches:
        cache.cache_clear()


def test_a_gpu_that_serves(machine):
    machine(2)
    assert backends.status()["cuda"] == (True, "raw CUDA kernels, CuPy arrays, on a GPU (2 devices)")
    assert backends.status()["numba"] == (True, "Numba CUDA kernels, CuPy arrays, on a GPU (2 devices)")
    backends.require("cuda")


def test_an_older_gpu_is_left_to_the_numba_backend(machine):
    machine(1, "75")
    with pytest.raises(
        RuntimeError, match=r"has compute capability 7\.5; the raw kernels need 8\.0; backend='numba' serves"
    ):
        backends.require("cuda")
    assert backends.status()["numba"][0]


@pytest.mark.parametrize(
    ("devices", "why"),
    [(CUDARuntimeError(OLD_DRIVER), f"no usable CUDA device or driver: {OLD_DRIVER}"), (0, "no CUDA device")],
)
def test_no_driver_or_one_too_old_or_no_device(machine, devices, why):
    machine(devices)
    with pytest.raises(RuntimeError, match=f"backend 'cuda' cannot run: {why}"):
        backends.require("cuda")
    assert backends.status()["numba"] == (False, why)


@pytest.mark.parametrize("name", ["cuda", "numba"])
def test_the_commands_move_their_arrays_where_a_backend_reads_them(machine, monkeypatch, name):
    machine(1)
    sys.modules["cupy"].asarray = lambda x: f"{x} on the GPU"
    assert commands.placed(name, "q", "k") == ["q on the GPU", "k on the GPU"]
    assert commands.placed(None, "q") == commands.placed("cpu", "q") == ["q"]
    monkeypatch.setattr(backends, "_simulator_on", lambda: True)
    assert commands.placed("numba", "q") == ["q"]


@pytest.mark.parametrize("name", ["cuda", "numba"])
def test_the_commands_say_why_a_backend_cannot_run(machine, name):
    machine(0)
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run: no CUDA device"):
        commands.placed(name, "q")
