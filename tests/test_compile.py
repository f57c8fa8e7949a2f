"""Kernels compile without a GPU or a driver, within budget, and errors say where."""

import importlib.util
from types import SimpleNamespace

import pytest

from s2o_cupy import cli, specialisations
from s2o_cupy import compile as kernels

needs_compiler = pytest.mark.skipif(
    not importlib.util.find_spec("cuda") or not importlib.util.find_spec("cuda.core"),
    reason="needs cuda-core and NVRTC",
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("S2O_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90a", "sm_100"])
def test_at_most_forty_specialisations(arch):
    shipped = kernels.shipped(arch)
    assert 0 < len(shipped) <= 40
    assert len(set(shipped)) == len(shipped)


def test_target_refuses_old_devices():
    assert specialisations.target(90) == "sm_90a"
    assert specialisations.target(86) == "sm_86"
    with pytest.raises(RuntimeError, match=r"compute capability 7\.5; the CUDA backend supports 8\.0"):
        specialisations.target(75)


def test_row_tiles_that_do_not_fit_are_refused():
    assert specialisations.attend_macros("float16", 256, 256, 64, "sm_86")["BLOCK_M"] == 64
    with pytest.raises(ValueError, match="bytes of shared memory; sm_86 allows"):
        specialisations.attend_macros("float16", 256, 256, 128, "sm_86")


@needs_compiler
def test_report_and_cache():
    few = [s for s in kernels.shipped("sm_90a") if s.name in ("pool", "remap")]
    original, kernels.shipped = kernels.shipped, lambda arch: few
    try:
        seen = []
        rows, failures = kernels.compile_report(["sm_90a"], check=True, progress=seen.append)
        again, _ = kernels.compile_report(["sm_90a"], check=True)
    finally:
        kernels.shipped = original
    assert failures == []
    assert len(seen) == len(few)
    assert {row.kernel for row in rows} == {
        "pool", "running_sums", "lifts", "remap", "remap_narrow", "remap_digits",
    }  # fmt: skip
    assert all(row.registers > 0 and row.cubin_bytes > 0 and not row.cached for row in rows)
    assert all(row.cached for row in again)


@pytest.mark.parametrize("arch", ["", "banana", "sm_75", "sm_9", "sm_90b", "90"])
def test_an_architecture_that_nothing_is_compiled_for_is_refused(arch, capsys):
    with pytest.raises(ValueError, match=f"^arch is '{arch}'; allowed: sm_ and one of 80, 86, .*, as sm_90a$"):
        kernels.compile_report(["sm_80", arch])
    assert cli.main(["compile", "--arch", f"sm_80,{arch}"]) == 2
    assert capsys.readouterr().err.startswith(f"s2o: error: arch is '{arch}'; allowed")


@pytest.mark.parametrize(("promised", "check", "failed"), [(True, True, 1), (True, False, 0), (False, True, 0)])
def test_spills_fail_the_check_of_a_kernel_that_promises_none(monkeypatch, capsys, promised, check, failed):
    numbers = {"registers": 255, "spill_bytes": 8, "stack_bytes": 8, "shared_bytes": 0, "cubin_bytes": 9}
    spec = specialisations.Specialisation("pool", (("IS_BF16", 0),), no_spills=promised)
    monkeypatch.setattr(kernels, "shipped", lambda arch: [spec])
    monkeypatch.setattr(kernels, "resources", lambda arch, spec: ({"pool": numbers}, False))
    monkeypatch.setattr(kernels, "_compiler_classes", lambda: None)
    rows, failures = kernels.compile_report(["sm_90a"], check)
    assert ([row.spill_bytes for row in rows], len(failures)) == ([8], failed)
    assert cli.main(["compile", "--arch", "sm_90a", *["--check"] * check]) == failed
    assert ("pool IS_BF16=0: spills 8 bytes" in capsys.readouterr().err) == bool(failed)


@needs_compiler
def test_an_error_names_file_and_line():
    with pytest.raises(kernels.KernelCompileError, match=r"kernels/pool\.cu\(\d+\): error"):
        kernels.compile_cubin("sm_90a", "pool", {"REAL": "no_such_type"})


@needs_compiler
def test_ptx_needs_no_driver():
    text = kernels.compile_ptx("sm_90a", "pool", {"REAL": "float"})
    assert ".target sm_90a" in text
    assert ".entry pool(" in text
    with pytest.raises(kernels.KernelCompileError, match="pool"):
        kernels.compile_ptx("sm_90a", "pool", {"REAL": "no_such_type"})


def test_ptxas_report_is_read():
    log = """ptxas info    : Compiling entry function 'walk' for 'sm_90a'
ptxas info    : Function properties for walk
ptxas         .     64 bytes stack frame, 40 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 256 bytes smem"""
    expected = {"registers": 255, "spill_bytes": 48, "stack_bytes": 64, "shared_bytes": 256, "serialised": 0}
    assert kernels.parse_report(log) == {"walk": expected}
    log += """
ptxas info    : (C7520) Potential Performance Loss: wgmma.mma_async instructions are serialized due to program \
dependence on compiler-inserted WG.AR in divergent path in the function 'walk'"""
    assert kernels.parse_report(log) == {"walk": expected | {"serialised": 1}}


def test_serialised_wgmma_fails_the_check(monkeypatch):
    numbers = {"registers": 168, "spill_bytes": 0, "stack_bytes": 0, "shared_bytes": 0, "cubin_bytes": 9}
    spec = specialisations.Specialisation("pool", (("IS_BF16", 0),))
    monkeypatch.setattr(kernels, "shipped", lambda arch: [spec])
    monkeypatch.setattr(kernels, "resources", lambda arch, spec: ({"pool": numbers | {"serialised": 1}}, False))
    monkeypatch.setattr(kernels, "_compiler_classes", lambda: None)
    assert [x.message for x in kernels.compile_report(["sm_90a"], True)[1]] == ["its wgmma instructions are serialised"]
    assert not kernels.compile_report(["sm_90a"], False)[1]


def test_a_prepared_launch_hands_the_driver_all_that_it_needs():
    launched = []
    driver = SimpleNamespace(launchKernel=lambda *given: launched.append(given))
    raw = SimpleNamespace(kernel=SimpleNamespace(ptr=5), num_regs=40)
    kernel = kernels.Kernel(SimpleNamespace(cuda=SimpleNamespace(driver=driver)), raw)
    kernel.prepared((3, 2), 64, (), 9)(77, 1234, 0)
    kernel.prepared((3,), 32, ())(77, 1234, 0)
    assert launched == [(5, 3, 2, 1, 64, 1, 1, 9, 77, 1234, 0), (5, 3, 1, 1, 32, 1, 1, 0, 77, 1234, 0)]
    assert kernel.num_regs == 40
    assert list(kernel.launched) == [(64, 9), (32, 0)]


def test_resources_are_of_each_way_a_kernel_was_launched(monkeypatch):
    driver = SimpleNamespace(launchKernel=print, occupancyMaxActiveBlocksPerMultiprocessor=lambda at, block, shared: 4)
    runtime = SimpleNamespace(getDevice=lambda: 0, getDeviceProperties=lambda _: {"maxThreadsPerMultiProcessor": 2048})
    held = {"num_regs": 40, "local_size_bytes": 8, "shared_size_bytes": 16, "max_threads_per_block": 1024}
    raw = SimpleNamespace(kernel=SimpleNamespace(ptr=5), **held)
    kernel = kernels.Kernel(SimpleNamespace(cuda=SimpleNamespace(driver=driver, runtime=runtime)), raw)
    kernel.prepared((3,), 64, (), 9)
    monkeypatch.setattr(kernels, "_kernels", {(0, "pool", "pool", None, ("IS_BF16", 1)): kernel})
    (one,) = kernels.kernel_resources()
    assert (one["kernel"], one["macros"], one["registers"]) == ("pool:pool", {"IS_BF16": 1}, 40)
    expected = {"registers": 40, "local_bytes": 8, "shared_bytes": 25, "threads": 64, "blocks": 4, "occupancy": 0.125}
    assert one["launches"] == [expected]
