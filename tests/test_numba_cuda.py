"""The Numba CUDA twins: every fact of docs/design.md section 2 in Numba's simulator, and PTX without a GPU.

The simulator is chosen when Numba is imported, so its tests need a run of their own::

    NUMBA_ENABLE_CUDASIM=1 python -m pytest tests/test_numba_cuda.py
"""

import ast
import importlib.util
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import FunctionType, SimpleNamespace

import numba
import numpy as np
import properties
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import NUMBA
from strategies import DTYPES, Case, cases, laid

import s2o_cupy as s2o
from s2o_cupy import Settings, backends, reference
from s2o_cupy.problem import Problem
from s2o_cupy.sources import kernel_folder
from s2o_cupy.twins import twin

SIMULATED = bool(numba.config.ENABLE_CUDASIM)
simulator = pytest.mark.skipif(not SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM=1, in a run of this file alone")
device = pytest.mark.skipif(SIMULATED, reason="needs Numba without its simulator")
few = settings(max_examples=5)
seeds = st.integers(0, 2**32 - 1)
bad_numbers = st.sampled_from([np.nan, np.inf, -np.inf])


@pytest.fixture(autouse=SIMULATED, scope="module")
def _quick_threads():
    """The simulator polls its threads: let them take over often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def small(rank=None, **fixed):
    """Cases of few keys and small tiles: a simulated thread is a Python thread."""
    sizes = {"dims": st.integers(1, 5), "max_keys": 18, "max_batch": 1, **fixed}
    ranks = st.sampled_from(["mean", "gaussian", "mixture"]) if rank is None else st.just(rank)
    return st.tuples(cases(**sizes), ranks).map(lambda drawn: shrunk(*drawn))


def shrunk(case: Case, rank: str) -> Case:
    s = case.settings
    tiles = {"segment": 4 + s.segment % 7, "block_q": 1 + s.block_q % 4, "block_k": 1 + s.block_k % 6}
    window = None if s.window is None else 1 + s.window % 12
    case.settings = s.replace(**tiles, pool=min(s.pool, 4), rank=rank, window=window)
    return case


@simulator
@few
@given(small())
def test_tau_zero_is_dense(case):
    properties.tau_zero_is_dense(NUMBA, case)


@simulator
@few
@given(small())
def test_work_falls_with_tau(case):
    properties.work_falls_with_tau(NUMBA, case)


windows = st.integers(1, 40).flatmap(lambda window: small(causal=True, window=window, min_keys=8))


@simulator
@few
@given(windows, seeds, bad_numbers)
def test_a_window_is_dense_within_it(case, seed, bad):
    properties.tau_zero_is_dense(NUMBA, case)
    properties.keys_before_the_window_do_not_matter(NUMBA, case, seed, bad)


@simulator
@few
@given(small(causal=True), seeds)
def test_later_keys_do_not_matter(case, seed):
    properties.later_keys_do_not_matter(NUMBA, case, seed)


@simulator
@few
@given(small())
def test_out_lies_within_the_values(case):
    properties.out_lies_within_the_values(NUMBA, case)


@simulator
@few
@given(small(max_batch=2), seeds)
def test_heads_and_batches_are_independent(case, seed):
    properties.heads_and_batches_are_independent(NUMBA, case, seed)


@simulator
@few
@given(small(share_order=False), seeds)
def test_query_heads_are_independent(case, seed):
    properties.query_heads_are_independent(NUMBA, case, seed)


@simulator
@few
@given(small())
def test_runs_agree_bitwise(case):
    properties.runs_agree_bitwise(NUMBA, case)


@simulator
@few
@given(small())
def test_strides_do_not_matter(case):
    properties.strides_do_not_matter(NUMBA, case)


@simulator
@settings(max_examples=15)
@given(small())
def test_reaches_the_reference(case):
    properties.reaches_the_reference(NUMBA, case)


@simulator
@settings(max_examples=10)
@given(small(dtypes=("float64",), tail="pooled", min_keys=12, max_keys=24))
def test_reaches_the_reference_in_float64(case):
    properties.reaches_the_reference(NUMBA, case)


@simulator
@few
@given(small(), seeds, bad_numbers)
def test_a_bad_query_stays_in_its_row(case, seed, bad):
    properties.a_bad_query_stays_in_its_row(NUMBA, case, seed, bad)


@simulator
@few
@given(small(causal=True, min_keys=8), seeds, bad_numbers, st.sampled_from("kv"))
def test_a_bad_key_or_value_stays_with_rows_that_see_it(case, seed, bad, which):
    properties.a_bad_key_or_value_stays_with_rows_that_see_it(NUMBA, case, seed, bad, which)


@simulator
@few
@given(small(contents=("randn",), dtypes=("float32",), tail=None), seeds, st.sampled_from([np.inf, -np.inf]))
def test_rows_that_an_infinite_key_spoils_do_not_vote(case, seed, bad):
    properties.rows_that_an_infinite_key_spoils_do_not_vote(NUMBA, case, seed, bad)


@simulator
@settings(max_examples=15)
@given(small())
def test_ranks_as_the_reference(case):
    properties.ranks_as_the_reference(NUMBA, case)


@simulator
@settings(max_examples=10)
@given(small(rank="mixture", contents=("randn",), dtypes=("float32", "float64"), min_keys=8))
def test_ranks_mixtures_as_the_reference(case):
    properties.ranks_as_the_reference(NUMBA, case)


@simulator
@few
@given(small(query_order="guide"))
def test_guide_orders_as_the_reference(case):
    properties.guide_orders_as_the_reference(NUMBA, case)


values = st.floats(width=16, allow_nan=False, allow_infinity=False) | st.integers(-3, 3)


@simulator
@settings(max_examples=15)
@given(
    st.lists(values, min_size=1, max_size=60),
    st.sampled_from([None, 2, 3, 16, 1024, 65536]),
    st.sampled_from([1.0, 0.3]),
)
def test_exact_scores_order_bitwise(scores, levels, cap):
    properties.exact_scores_order_bitwise(NUMBA, scores, rank_levels=levels, cap=cap)


@simulator
@pytest.mark.parametrize("levels", [None, 3, 1024, 65536])
@pytest.mark.parametrize("cap", [1.0, 0.3])
def test_lists_of_more_than_a_chunk(levels, cap):
    """In the simulator a chunk is 68 items, or 36 of an exact order; the last one of a list is filled up."""
    rng, keys = np.random.default_rng(4), 150
    scores = np.stack([rng.standard_normal(keys), np.round(3 * rng.standard_normal(keys)), np.ones(keys)])
    scores[1, ::11], scores[1, 1::13], scores[1, 2::17] = np.inf, np.nan, -np.inf
    check_remap(scores.astype(np.float32), levels, cap)


@simulator
@pytest.mark.parametrize("levels", [None, 1024])
def test_remap_of_scores_farther_apart_than_a_float(levels):
    check_remap(np.array([[1, 3e38, -2, -3e38, 0]], np.float32), levels)


def check_remap(scores, levels, cap=1.0):
    """One list a head, beside the reference's."""
    heads, keys = scores.shape
    chosen = Settings(causal=False, segment=4, rank_levels=levels, cap=cap)
    problem = Problem(1, heads, heads, 4, keys, 2, 2, "float32", chosen)
    offsets = problem.offsets(problem.whole)
    order = np.full(int(offsets[-1, -1]), -1, np.int32)
    backends.get("numba", {"q": scores}).remap(problem, scores, problem.whole, offsets, order)
    with np.errstate(over="ignore"):
        wanted = [reference.remap(x, int(problem.listed[0]), levels) for x in scores]
    np.testing.assert_array_equal(order, np.concatenate(wanted))


def wide_case(dim, dtype="float32", rows=12, **changes):
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal((1, h, rows, dim)).astype(DTYPES[dtype]) for h in (2, 1, 1))
    chosen = Settings(segment=6, block_q=4, block_k=3, pool=2, tau=0.1, rank_terms=3).replace(**changes)
    return Case(q, k, v, chosen, "randn", ("plain",) * 3)


@simulator
@pytest.mark.parametrize("levels", [None, 3, 1024])
def test_remap_of_zeros_of_both_signs_infinities_and_nan(levels):
    scores = np.array([[-0.0, 0.0, np.nan, 1, np.inf, -0.0, -1, -np.inf, np.nan, 1, -np.inf, np.inf]], np.float32)
    check_remap(scores, levels)


@simulator
def test_a_block_with_less_than_a_quarter_left_stays_out():
    # Row tiles that see window keys stop after one tile of 7: of history 8 one key is left, less than 8 / 4.
    changes = {"segment": 8, "block_q": 4, "block_k": 7, "pool": 8, "tau": 100.0}
    properties.reaches_the_reference(NUMBA, wide_case(4, "float64", rows=24, **changes))


def spread_case(dtype="float64", dim=4, **changes):
    """Two query heads a K/V head; row tiles of 4, 3 and, at the end, 1 row that walk 1 key of their history."""
    rng = np.random.default_rng(7)
    q, k, v = ((1.5 * rng.standard_normal((1, h, 19, dim))).astype(DTYPES[dtype]) for h in (4, 2, 2))
    chosen = Settings(segment=7, block_q=4, block_k=1, pool=4, tau=100.0, rank="mean", tail="spread")
    return Case(q, k, v, chosen.replace(**changes), "randn", ("plain",) * 3)


SPREAD = [
    {},
    {"causal": False},  # the last pool block has 3 keys
    {"query_order": "guide"},
    {"causal": False, "query_order": "guide", "share_order": True, "cap": 0.4, "pool": 2},
]


@simulator
@pytest.mark.parametrize("changes", SPREAD, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_the_spread_tail_reaches_the_reference(dtype, changes):
    case = spread_case(dtype, **changes)
    properties.reaches_the_reference(NUMBA, case)
    plan = NUMBA.plan(case)
    spread, pooled = (NUMBA.attend(case, plan, tail=tail) for tail in ("spread", "pooled"))
    np.testing.assert_array_equal(spread.stats.tail_blocks, pooled.stats.tail_blocks)
    assert (spread.stats.tail_mass > pooled.stats.tail_mass + 0.01).mean() > 0.3, "the case tells the tails apart"


@simulator
@pytest.mark.parametrize("changes", SPREAD, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_spread_tail_beside_what_is_not_finite(bad, changes):
    """A tile's mean query is that of its finite rows; a bad key takes the spread from the lists that hold it alone."""
    case = spread_case(**changes)
    case.q[0, 2, 9, 1] = case.q[0, 1, 14:18, 0] = bad  # one row of a tile, and all of them
    properties.reaches_the_reference(NUMBA, case)
    clean, engine = NUMBA.ranked(case), backends.get("numba", {"q": case.q})
    case.k[0, 1, 9, 2] = bad
    properties.reaches_the_reference(NUMBA, case)
    block, sums = 9 // case.settings.pool, engine.pool(case.problem, case.k, case.v)[2]
    assert np.isnan(sums[0, 1, block:, 2]).all()
    assert np.isfinite(np.delete(sums, 2, axis=3)).all()
    assert np.isfinite(sums[:, :, :block]).all()
    if case.settings.causal:
        np.testing.assert_array_equal(NUMBA.ranked(case).out[:, :, :9], clean.out[:, :, :9])


@simulator
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_running_sums_of_squared_departures(dtype):
    case = spread_case(dtype, causal=False)
    p, k = case.problem, case.k.astype(np.float64)
    *means, sums = backends.get("numba", {"q": case.q}).pool(p, case.k, case.v)
    assert (len(means), sums.dtype, sums.shape) == (2, p.compute_dtype, (1, 2, 5, 4))
    blocks = [k[:, :, start : start + 4] for start in range(0, 19, 4)]
    departures = [((x - x.mean(axis=2, keepdims=True)) ** 2).sum(axis=2) for x in blocks]
    np.testing.assert_allclose(
        sums, np.cumsum(np.stack(departures, axis=2), axis=2), rtol=16 * np.finfo(sums.dtype).eps
    )


@simulator
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_greatest_head_dim(dtype):
    properties.reaches_the_reference(NUMBA, wide_case(256, dtype))


def require_device():
    if SIMULATED:
        pytest.skip("Numba's simulator is on; unset NUMBA_ENABLE_CUDASIM")
    if missing := NUMBA.missing():
        pytest.skip(missing)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_the_greatest_head_dim_on_a_device(dtype):
    require_device()
    properties.reaches_the_reference(NUMBA, wide_case(256, dtype, rows=70))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_flipped_arrays_on_a_device(dtype):
    """CuPy 14.2 tells wrong strides through DLPack, by which numba-cuda takes arrays, where they are negative."""
    require_device()
    case = wide_case(20, dtype, rows=70)
    flipped = Case(*(laid(x, "negative") for x in case.arrays), case.settings, "randn", ("negative",) * 3)
    assert min(flipped.q.strides) < 0
    properties.strides_do_not_matter(NUMBA, flipped)
    properties.reaches_the_reference(NUMBA, flipped)


def check_parts(monkeypatch):
    """Lists ranked a few at a time, so that their offsets are a part of all."""
    case = wide_case(4, rows=40)
    whole = NUMBA.plan(case)
    monkeypatch.setattr(backends.get("numba", {"q": NUMBA.to_device(case.q)}), "SCORE_BYTES", 300)
    problem = whole.problem
    assert len(list(problem.split(problem.whole, 300, "history"))) > 2
    np.testing.assert_array_equal(NUMBA.to_host(NUMBA.plan(case).kv_order), NUMBA.to_host(whole.kv_order))


@simulator
def test_ranking_in_parts(monkeypatch):
    check_parts(monkeypatch)


@pytest.mark.gpu
def test_ranking_in_parts_on_a_device(monkeypatch):
    require_device()
    check_parts(monkeypatch)


@simulator
def test_workspace_does_not_matter(monkeypatch):
    monkeypatch.setattr(backends.get("numba", {"q": np.ones(1)}), "RANKING_PAYS_FROM", 1)
    case = wide_case(4, share_order=True, query_order="guide", cap=0.7)
    whole = NUMBA.attention(case)
    assert whole.stats.path == "ranked"
    properties.assert_same(NUMBA.ranked(case), whole)
    properties.assert_same(NUMBA.attention(case, workspace=1), whole)


@simulator
def test_what_it_does_not_support_is_refused_by_name():
    case = wide_case(4)
    q, k, v = case.arrays
    plan = s2o.plan(q, k, case.settings, backend="numba")
    with pytest.raises(ValueError, match="block_q is 257; the Numba CUDA backend supports 1 to 256"):
        s2o.attend(q, k, v, plan, block_q=257, backend="numba")
    k = v = np.ones((1, 1, 2049, 4), np.float32)
    problem = Problem(1, 2, 1, 1, 2049, 4, 4, "float32", Settings(causal=False, pool=1))
    engine = backends.get("numba", {"q": q})
    with pytest.raises(ValueError, match=r"pool is 1, which cuts 2049 keys into 2049 blocks; .* supports 2048"):
        engine.attend(problem, q, k, v, problem.whole, None, None, None, (k, v), None)


@simulator
def test_the_simulator_is_named_and_never_the_default():
    works, why = backends.status()["numba"]
    assert works
    assert "simulator" in why
    assert backends.get(None, {"q": np.ones(1)}).__name__ == "s2o_cupy.backends.cpu"
    with pytest.raises(TypeError, match="q is a CuPy array and Numba's simulator is on; unset NUMBA_ENABLE_CUDASIM"):
        backends.get("numba", {"q": SimpleNamespace()})


@simulator
def test_simulated_threads_share_an_array():
    from numba.cuda.simulator.kernelapi import FakeCUDAShared

    from s2o_cupy.backends import _simulator  # noqa: F401, it mends Numba's

    class Eight:
        def __index__(self):
            time.sleep(0.02)  # lets the others in while this thread makes its array
            return 8

    shared = FakeCUDAShared(0)
    with ThreadPoolExecutor(4) as threads:
        arrays = list(threads.map(lambda _: shared.array(Eight(), numba.int32), range(4)))
    assert all(x is arrays[0] for x in arrays)
    assert arrays[0].shape == (8,)


@simulator
def test_simulated_threads_keep_cuda_while_one_of_them_is_in_a_module():
    from numba import cuda
    from numba.cuda.simulator import kernel

    from s2o_cupy.backends import _simulator  # noqa: F401, it mends Numba's

    function, fake = FunctionType((lambda: None).__code__, {"cuda": cuda}), object()
    one, other = (kernel.swapped_cuda_module(function, fake) for _ in range(2))
    with one:
        other.__enter__()
    assert function.__globals__["cuda"] is fake
    other.__exit__(None, None, None)
    assert function.__globals__["cuda"] is cuda


def test_each_specialisation_has_cache_files_of_its_own():
    """Processes that compile kinds of one kernel at once would write each other's files."""
    from s2o_cupy.kernels.score_numba import score_kernel

    from s2o_cupy.backends.numba_cuda import _named

    kinds = [((np.dtype(name), 4),) for name in ("float16", "float32")]
    kernels = [score_kernel(numba.float32, width) for width in (64, 128)]
    names = [_named(kernel.py_func, kind).__qualname__ for kernel in kernels for kind in kinds]
    assert len(set(names)) == 4
    assert names[0] == _named(kernels[0].py_func, kinds[0]).__qualname__


TWINS = sorted(kernel_folder().glob("*_numba.py"))


@pytest.mark.parametrize("path", TWINS, ids=lambda path: path.stem)
def test_a_twin_is_short_and_says_what_it_is(path):
    text = path.read_text()
    assert len(text.splitlines()) < 150
    header = ast.get_docstring(ast.parse(text))
    assert header.startswith(f"{path.name}: ")
    assert re.search("REAL|ITEM", header)
    if path.stem in ("pool_numba", "score_numba", "remap_numba", "attend_numba", "mixture_numba"):
        assert re.search(r"^(norm: )?grid \(.+block .+", header, re.M), "says how it is launched"


@device
def test_numpy_arrays_without_the_simulator_are_refused():
    q = np.ones((4, 2), np.float32)
    with pytest.raises(TypeError, match=r"q is a NumPy array; backend 'numba' takes CuPy.*NUMBA_ENABLE_CUDASIM=1"):
        s2o.attention(q, q, q, backend="numba")


@device
@pytest.mark.parametrize("missing", ["cupy", "numba_cuda"])
def test_what_is_missing_is_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, "cupy", None if missing == "cupy" else SimpleNamespace())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    name = {"cupy": "CuPy", "numba_cuda": "numba-cuda"}[missing]
    works, why = backends._numba_status.__wrapped__()
    assert not works
    assert why.startswith(f"{name} is missing: pip install")
    monkeypatch.setattr(backends, "_numba_status", backends._numba_status.__wrapped__)
    with pytest.raises(RuntimeError) as refusal:
        backends.get("numba", {"q": SimpleNamespace()})
    assert str(refusal.value) == f"backend 'numba' cannot run: {why}"
    assert "\n" not in why


# --- PTX without a GPU -----------------------------------------------------------------------
needs_numba_cuda = pytest.mark.skipif(
    SIMULATED or not importlib.util.find_spec("numba_cuda"), reason="needs the package numba-cuda, and no simulator"
)


def array(dtype, axes, layout="A"):
    return numba.types.Array(dtype, axes, layout)


def signature(kernel: str, x, real):
    """The types that numba_cuda.py launches a kernel with, for inputs of type x."""
    i32, i64, f32, u32 = numba.int32, numba.int64, numba.float32, numba.uint32
    mixture = array(x, 4), array(real, 3), array(real, 2), array(i32, 1)
    tuples = [numba.types.UniTuple(i64, n) for n in (3, 9)]
    plan = [array(i32, 1), array(i64, 2), array(i32, 3)]
    answers = [array(t, n) for t, n in ((x, 4), (real, 3), (i32, 3), (i32, 3), (f32, 3))]
    item = i64 if kernel == "exact" else i32
    order = [array(t, n, "C") for t, n in ((f32, 2), (u32, 2), (i32, 1), (i64, 2), (i32, 1), (item, 3))]
    return {
        "pool": (array(x, 4), array(real, 4), i64),
        "departures": (array(x, 4), *[array(real, 4)] * 2, i64),
        "running": (array(real, 4),),
        "score": (array(x, 4), array(real, 3), array(i32, 1), array(f32, 2), i64, i64, real),
        "norm": (*mixture, array(real, 2), i64, i64, real),
        "mixture": (*mixture, array(real, 2), array(f32, 2), i64, i64, real),
        "remap": (*order, i64, i64, i64),
        "attend": (*[array(x, 4)] * 3, *[array(real, 4)] * 3, *plan, array(real, 1), *answers, *tuples, real),
    }[{"spread": "attend", "exact": "remap"}.get(kernel, kernel)]


@needs_numba_cuda
@pytest.mark.parametrize("cc", [(7, 5), (8, 0), (9, 0)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "kernel", ["pool", "departures", "running", "score", "norm", "mixture", "remap", "exact", "attend", "spread"]
)
def test_kernels_compile_to_ptx(monkeypatch, kernel, dtype, cc):
    from numba import cuda
    from numba.cuda import types as cuda_types

    # Compiling a device function asks for the current device, which is all that would need a driver.
    here = SimpleNamespace(compute_capability=cc)
    monkeypatch.setattr("numba.cuda.dispatcher.get_current_device", lambda: here)
    real = numba.float64 if dtype == "float64" else numba.float32
    file, maker, *sizes = {
        "departures": ("pool", "departures_kernel", real),
        "running": ("pool", "running_kernel", real),
        "pool": ("pool", "pool_kernel", real),
        "norm": ("mixture", "norm_kernel", real, 64),
        "remap": ("remap", "remap_kernel", numba.int32, False, 256),
        "exact": ("remap", "remap_kernel", numba.int64, True, 256),
        "attend": ("attend", "attend_kernel", real, 64, False),
        "spread": ("attend", "attend_kernel", real, 64, True),
    }.get(kernel, (kernel, f"{kernel}_kernel", real, 64))
    made = getattr(twin(file), maker).__wrapped__(*sizes)
    x = getattr(cuda_types, dtype)
    ptx, _ = cuda.compile_ptx(made.py_func, signature(kernel, x, real), cc=cc)
    assert f".target sm_{cc[0]}{cc[1]}" in ptx
    assert (".f64" in ptx) == (dtype == "float64" and file != "remap"), "float32 work must not widen to float64"


@needs_numba_cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_compiled_kernel_is_kept_on_disk(monkeypatch, tmp_path, dtype):
    from numba.cuda import codegen, dispatcher
    from numba.cuda.core import config

    from s2o_cupy.backends.numba_cuda import _compiled
    from s2o_cupy.twins import twin

    here = SimpleNamespace(compute_capability=(9, 0), id=0)
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: here)
    monkeypatch.setattr(codegen, "devices", SimpleNamespace(get_context=lambda: SimpleNamespace(device=here)))
    monkeypatch.setattr(dispatcher._Kernel, "bind", lambda kernel: kernel._codelibrary.get_cubin(cc=(9, 0, "a")))
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    kinds = (np.dtype(DTYPES[dtype]), 4), (np.dtype(np.float32), 4), int
    made, read = (_compiled.__wrapped__(twin("pool").pool_kernel(numba.float32), kinds, 0, "A") for _ in range(2))
    assert list(tmp_path.glob("*/*.nbc"))
    for kernel, hits in ((made, 0), (read, 1)):
        assert sum(kernel.stats.cache_hits.values()) == hits
    cubins = [next(iter(x.overloads.values()))._codelibrary.get_cubin(cc=(9, 0, "a")) for x in (made, read)]
    assert cubins[0].code == cubins[1].code
