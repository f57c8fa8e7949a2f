"""Every launch of the CUDA backend, without a GPU: as many arguments as the kernel has parameters, each of its type."""

import importlib
import itertools
import math
import re
import runpy
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest

import s2o_cupy as s2o
from bench.scaling import timed_stages
from s2o_cupy import backends, planning, sources
from s2o_cupy import call as calls
from s2o_cupy.backends._tape import Place
from s2o_cupy.iterate import emulation as run
from s2o_cupy.problem import Problem
from s2o_cupy.settings import Settings
from s2o_cupy.sources import current, kernel_folder

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
SCALARS = {"int": (np.int32,), "long long": (np.int64,), "float": (np.float32,), "real_t": (np.float32, np.float64)}


class Device(int):
    """As CuPy's: a number, and how it is named."""

    id = property(int)
    __str__ = __format__ = lambda self, *_: f"<CUDA Device {int(self)}>"


class Array:
    """The attributes of a device array that a call reads."""

    device = Device(0)

    def __init__(self, shape, dtype=np.float32, strides=None):
        self.shape = (shape,) if isinstance(shape, int) else shape
        self.dtype, self.ndim, self.size = np.dtype(dtype), len(self.shape), math.prod(self.shape)
        self.itemsize = self.dtype.itemsize
        steps = np.cumprod([1, *self.shape[:0:-1]])[::-1] * self.itemsize
        self.strides = strides or tuple(steps.tolist())
        self.data = SimpleNamespace(ptr=4096)


class Kernel:
    """Stands for a compiled kernel and checks what it is launched with."""

    launched: ClassVar[list] = []

    def __init__(self, name, entry):
        self.name, self.entry = name, entry or name

    def prepared(self, grid, block, arguments, shared_mem=0):
        assert all(n > 0 for n in (*grid, block))
        assert 0 <= shared_mem <= 227 * 1024
        wanted = parameters(self.name, self.entry)
        for parameter, argument in zip(wanted, arguments, strict=True):
            if "*" in parameter:
                assert argument is None or isinstance(argument, (Place, Array)), parameter
            else:
                kind = re.sub(r" ?\b\w+$", "", parameter) if parameter != "int" else "int"
                assert type(argument) in SCALARS[kind], (self.entry, parameter, type(argument))
        return lambda stream, addresses, extra: self.launched.append(self.entry)


def parameters(name, entry):
    """A kernel's parameters from its source."""
    return [re.sub(r"\s+", " ", part).strip() for part in run.parameter_list(current(name).text, entry).split(",")]


@pytest.fixture
def cuda(monkeypatch):
    """The backend over a stand-in for CuPy, on an H100."""
    runtime = SimpleNamespace(
        getDevice=lambda: 0,
        setDevice=lambda device: None,
        getDeviceProperties=lambda device: {"multiProcessorCount": 132},
        memsetAsync=lambda address, value, nbytes, stream: None,
    )
    stream = SimpleNamespace(ptr=0, synchronize=lambda: None)
    stand_in = ModuleType("cupy")
    stand_in.__dict__.update(
        ndarray=Array,
        empty=Array,
        zeros=None,
        asarray=lambda x, dtype=None: Array(np.shape(x), dtype or x.dtype),
        may_share_memory=lambda x, y: False,
        cuda=SimpleNamespace(
            runtime=runtime, get_current_stream=lambda: stream, alloc=lambda nbytes: SimpleNamespace(ptr=4096)
        ),
    )
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.delitem(sys.modules, "s2o_cupy.backends.cuda", raising=False)
    module = importlib.import_module("s2o_cupy.backends.cuda")
    monkeypatch.setattr(module, "device_target", lambda device=None: "sm_90a")
    monkeypatch.setattr(module, "get_kernel", lambda name, entry=None, source=None, **macros: Kernel(name, entry))
    monkeypatch.setattr(backends, "_cuda_status", lambda: (True, ""))
    monkeypatch.setattr(Kernel, "launched", [])
    planning._offsets.cache_clear()
    yield module
    planning._offsets.cache_clear()  # its arrays are not NumPy's
    sys.modules.pop("s2o_cupy.backends.cuda", None)


def launch_all(cuda, p) -> None:
    """Every stage once, and dense."""
    kind, rows, tiles = DTYPES[p.dtype], (p.batch, p.heads_q, p.n_q), (p.batch, p.heads_q, len(p.tile_start))
    q = Array((*rows, p.dim_qk), kind)
    k, v = (Array((p.batch, p.heads_kv, p.n_k, dim), kind) for dim in (p.dim_qk, p.dim_v))
    offsets, order = Array(p.offsets(p.whole).shape, np.int64), Array(10, np.int32)
    query_order = Array(rows, np.int32) if p.settings.query_order == "guide" else None
    result = SimpleNamespace(
        out=Array((*rows, p.dim_v), kind),
        lse=Array(rows, p.compute_dtype),
        tiles=Array(tiles, np.int32),
        tail_blocks=Array(tiles, np.int32),
        tail_mass=Array(rows),
    )
    cuda.remap(p, cuda.score(p, q, k, p.whole), p.whole, offsets, order)
    cuda.rank(p, q, k, p.whole, offsets, order)
    cuda.attend(p, q, k, v, p.whole, order, offsets, query_order, cuda.pool(p, k, v), result)
    cuda.dense(p, q, k, v, result)


def test_the_sanitizer_meets_the_kernels_of_every_stage(cuda):
    sanitize = runpy.run_path(str(Path(__file__).parents[1] / "gpu" / "sanitize.py"))
    for case in range(len(sanitize["CASES"])):
        launch_all(cuda, sanitize["problem"](case))
    met = """means_128 factors_128 moments_256 factor score_16_128 score_means_128 moments score
        centres score_square normalise join_parts score_mixture remap remap_narrow remap_digits
        pool running_sums lifts attend attend_sm90 attend_simt"""
    assert set(met.split()) <= set(Kernel.launched)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank": "mean", "query_order": "guide"},
        {"rank_terms": 7, "share_order": True, "cap": 0.3},
        {"rank_terms": 31, "rank_levels": None},
        {"rank_terms": None, "rank_levels": 60000},
        {"rank": "mixture", "rank_terms": 31},
        {"rank": "mixture", "rank_terms": None, "causal": False},
        {"causal": False, "tail": None},
        {"tau": (0.1, 0.2, 0.0, 0.3), "block_q": 32},
        {"tail": "spread", "query_order": "guide", "causal": False},
    ],
)
def test_launches_match_their_kernels(cuda, dtype, settings):
    for dim, dim_v in ((128, 128), (64, 64), (256, 256), (33, 20)):
        p = Problem(1, 4, 2, 700, 900, dim, dim_v, dtype, Settings(**{"segment": 256, "pool": 64, **settings}))
        launch_all(cuda, p)
    if dtype in ("float16", "bfloat16"):
        assert "attend_sm90" in Kernel.launched
    means = p.settings.rank == "mean" and dtype in ("float16", "bfloat16")
    first = "centres" if p.settings.rank == "mixture" else "means_128" if means else "factor"
    assert first in Kernel.launched
    assert {"remap", "remap_narrow", "remap_digits"} & set(Kernel.launched)


def call_arrays(n=8192, dim=128):
    return {name: Array((1, heads, n, dim), ml_dtypes.bfloat16) for name, heads in (("q", 4), ("k", 2), ("v", 2))}


def test_a_whole_call_is_five_launches_and_one_workspace(cuda, monkeypatch):
    taken = []
    monkeypatch.setattr(sys.modules["cupy"].cuda, "alloc", lambda n: taken.append(n) or SimpleNamespace(ptr=4096))
    s2o.attention(**call_arrays())
    assert len(taken) == 1  # beside the answer
    assert Kernel.launched == ["pool", "factors_128", "score_16_128", "remap_narrow", "attend_sm90"]
    for strides in ((2**23, 2**21, 256, 2), (2**23, 256, 1024, 2)):  # the same, then rows of heads in turn
        moved = call_arrays() | {"q": Array((1, 4, 8192, 128), ml_dtypes.bfloat16, strides)}
        s2o.attention(**moved)
    assert len(Kernel.launched) == 15
    assert cuda._recorded.cache_info().misses == 2


@pytest.mark.parametrize(
    ("settings", "launches"),
    [
        ({"segment": 512, "block_k": 128, "pool": 256}, 12),  # two slabs of two parts
        ({"segment": 512, "rank": "mean"}, 12),
        ({"segment": 512, "tail": "spread"}, 15),
        ({}, 30),  # four slabs of a K/V head and two runs of segments
    ],
)
def test_launches_and_memory_of_a_long_call(cuda, monkeypatch, settings, launches):
    taken = []
    monkeypatch.setattr(sys.modules["cupy"].cuda, "alloc", lambda n: taken.append(n) or SimpleNamespace(ptr=4096))
    n = 2**17
    s2o.attention(*[Array((1, heads, n, 128), ml_dtypes.bfloat16) for heads in (32, 8, 8)], **settings)
    assert len(Kernel.launched) == launches
    assert [Kernel.launched.count(name) for name in ("pool", "means_128", "factors_128")] in ([1, 0, 1], [1, 1, 0])
    assert len(taken) == 1
    assert taken[0] <= 1.25 * 2**30


@pytest.mark.parametrize(
    ("settings", "kernel"),
    [
        ({"share_order": True}, "attend_sm90"),
        ({"share_order": True, "query_order": "guide"}, "attend_sm90"),
        ({"share_order": True, "block_q": 16}, "attend_sm90"),
        ({"share_order": True, "block_q": 16, "query_order": "guide"}, "attend"),  # tiles of other queries in each head
        ({}, "attend"),
        ({"block_q": 65, "segment": 65}, "attend_sm90"),
    ],
)
def test_small_row_tiles_of_shared_lists_are_hoppers(cuda, monkeypatch, settings, kernel):
    guided = settings.get("query_order") == "guide"
    monkeypatch.setattr(planning, "query_order", lambda p, q, k: Array(q.shape[:3], np.int32) if guided else None)
    for heads, served in ((4, kernel), (2, "attend" if settings.get("block_q") != 65 else kernel)):
        Kernel.launched.clear()
        arrays = call_arrays() | {"q": Array((1, heads, 8192, 128), ml_dtypes.bfloat16)}
        s2o.attention(**arrays, **{"segment": 64, "block_q": 64, **settings})
        assert Kernel.launched[-1] == served


def test_each_call_asks_for_stream_variants_and_saved_files(cuda, tmp_path, monkeypatch):
    seen, stream = [], sys.modules["cupy"].cuda.get_current_stream()

    def get_kernel(name, entry=None, source=None, **macros):
        def prepared(grid, block, arguments, shared_mem=0):
            return lambda stream, addresses, extra: seen.append((name, source.text, stream))

        return SimpleNamespace(prepared=prepared)

    def pool():
        seen.clear()
        s2o.attention(**call_arrays())
        assert len({at for _, _, at in seen}) == 1
        return next((text, at) for name, text, at in seen if name == "pool")

    monkeypatch.setattr(cuda, "get_kernel", get_kernel)
    plain = current("pool").text
    changed = plain.replace("total / (sum_t)count", "total / (sum_t)(2 * count)")
    assert pool() == (plain, 0)
    stream.ptr = 7
    assert pool() == (plain, 7)
    with s2o.use_kernel("pool", changed):
        text, _ = pool()
        assert "(2 * count)" in text
    assert pool() == (plain, 7)
    shutil.copytree(kernel_folder(), tmp_path / "kernels")
    monkeypatch.setenv("S2O_KERNELS", str(tmp_path / "kernels"))
    assert pool() == (plain, 7)
    time.sleep(2 * sources._SECONDS)
    (tmp_path / "kernels" / "pool.cu").write_text((kernel_folder() / "pool.cu").read_text() + "// saved\n")
    assert "// saved" in pool()[0]


def test_arrays_are_checked_once_a_layout(cuda, monkeypatch):
    arrays, seen = call_arrays(), []
    checks = calls.natives
    monkeypatch.setattr(calls, "natives", lambda **named: seen.append(len(seen)) or checks(**named))
    monkeypatch.setattr(calls, "_checked", {})
    for expected, changes in (
        (1, {}),
        (1, {}),
        (1, {"q": Array((1, 4, 8192, 128), ml_dtypes.bfloat16)}),  # another, that lies alike
        (2, {"q": Array((1, 4, 8192, 128), ml_dtypes.bfloat16, (2**23, 256, 1024, 2))}),
        (3, {"tau": 1}),
        (4, {"out": Array((1, 4, 8192, 128), ml_dtypes.bfloat16)}),
        (5, {"k": Array((1, 2, 8193, 128), ml_dtypes.bfloat16), "v": Array((1, 2, 8193, 128), ml_dtypes.bfloat16)}),
        (6, {"q": arrays["q"], "backend": "cuda"}),
    ):
        s2o.attention(**arrays | changes)
        assert len(seen) == expected
    arrays["q"].device = Device(1)
    for _ in range(2):  # what is refused is checked again
        with pytest.raises(ValueError, match="allowed: all on one device"):
            s2o.attention(**arrays)
    assert len(seen) == 8
    monkeypatch.setattr(cuda.cp.cuda.runtime, "getDevice", lambda: 1)
    arrays["q"].device = Device(0)
    with pytest.raises(ValueError, match="q is on device 0 and the current device is 1"):
        s2o.attention(**arrays)


def test_progress_and_the_workspace_of_several_steps(cuda, monkeypatch):
    taken, said = [], []
    monkeypatch.setattr(sys.modules["cupy"].cuda, "alloc", lambda n: taken.append(n) or SimpleNamespace(ptr=4096))

    def progress(done, lists):
        said.append((done, lists, Kernel.launched.count("attend_sm90")))

    for workspace in (2**30, 2**17):
        s2o.attention(**call_arrays(), workspace=workspace, progress=progress)
    assert said[0] == (64, 64, 1)
    assert len(said) > 9
    assert said[1:] == [(done, 64, i + 2) for i, (done, _, _) in enumerate(said[1:])]
    assert said[1][0] > 0
    assert all(a < b for (a, _, _), (b, _, _) in itertools.pairwise(said[1:]))
    assert said[-1][0] == 64
    assert taken[1] < taken[0] / 4


def test_stages_of_a_call_can_be_timed_one_by_one(cuda, monkeypatch):
    monkeypatch.setattr(backends, "cuda", cuda)  # what an import from the package finds
    monkeypatch.setattr(sys.modules["cupy"].cuda, "Event", lambda: SimpleNamespace(record=lambda: None), raising=False)
    with timed_stages() as spans:
        s2o.attention(**call_arrays())
    assert [name for name, *_ in spans] == ["pool", "rank", "attend"]
    together = list(Kernel.launched)
    s2o.attention(**call_arrays())
    assert Kernel.launched == 2 * together
    assert len(spans) == 3


def test_too_little_memory_names_the_sizes_and_what_takes_less(cuda, monkeypatch):
    class OutOfMemoryError(MemoryError):
        """As CuPy's."""

    def alloc(nbytes):
        raise OutOfMemoryError(f"Out of memory allocating {nbytes} bytes")

    monkeypatch.setattr(sys.modules["cupy"].cuda, "alloc", alloc)
    arrays = call_arrays()
    plan = s2o.Plan.from_arrays(arrays["q"], arrays["k"], kv_order=arrays["q"], kv_offsets=arrays["q"], validate=False)
    plan.kv_offsets.reshape = lambda *shape: Array((4, 33), np.int64)
    for name, call in (("attention", s2o.attention), ("attend", lambda **x: s2o.attend(**x, plan=plan))):
        with pytest.raises(OutOfMemoryError, match="Out of memory allocating") as found:
            call(**arrays)
        (note,) = found.value.__notes__
        assert note.startswith(f"{name}() of q (1, 4, 8192, 128) and k (1, 2, 8192, 128), bfloat16: a smaller cap or")
    assert Kernel.launched.count("attend_sm90") == 0


def test_arrays_in_two_places_are_refused(cuda):
    arrays = call_arrays()
    one, other = "<CUDA Device 0>", "<CUDA Device 1>"
    arrays["v"].device = Device(1)
    with pytest.raises(ValueError, match=f"q is on {one} and v on {other}; allowed: all on one device"):
        s2o.attention(**arrays)
    arrays["q"].device = arrays["k"].device = Device(1)
    for call in (s2o.attention, s2o.dense_attention):
        with pytest.raises(ValueError, match=r"q is on device 1 and the current device is 0; .*cupy.cuda.Device\(1\)"):
            call(**arrays)
    arrays = call_arrays()
    out = Array((1, 4, 8192, 128), arrays["q"].dtype)
    out.device = Device(1)
    with pytest.raises(ValueError, match=f"out is on {other} and q on {one}; allowed: all on one device"):
        s2o.attention(**arrays, out=out)
    arrays["v"] = np.zeros((1, 2, 8192, 128), ml_dtypes.bfloat16)
    with pytest.raises(ValueError, match=r"q is on the GPU \(CuPy\) and v on the CPU \(NumPy\); allowed: all on one"):
        s2o.attention(**arrays)
    with pytest.raises(TypeError, match=r"q is a NumPy array; backend 'cuda' takes CuPy arrays: cupy.asarray\(q\)"):
        s2o.attention(*[arrays["v"]] * 3, backend="cuda")
    assert Kernel.launched == []


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
@pytest.mark.parametrize(
    ("strides", "message"),
    [
        ((2**25, 2**22, 512, 4), "gaps in its last axis; backend 'cuda' takes 2 bytes from each element of a row"),
        ((2**24, 2**21, 256, -2), "gaps in its last axis; backend 'cuda' takes 2 bytes from each element of a row"),
        ((2**45, 2**44, 2**31, 2), r"backend 'cuda' takes less than 2\*\*31 bytes from each row to the next"),
    ],
)
def test_what_would_need_a_copy_is_refused_before_anything_is_launched(cuda, name, strides, message):
    heads = 2 if name in ("k", "v") else 4
    arrays = call_arrays() | {name: Array((1, heads, 8192, 128), ml_dtypes.bfloat16, strides)}
    for call in (s2o.attention, s2o.dense_attention):
        with pytest.raises(ValueError, match=rf"^{name} has strides .*{message}.*: cupy.ascontiguousarray\({name}\)"):
            call(**arrays)
    assert Kernel.launched == []
