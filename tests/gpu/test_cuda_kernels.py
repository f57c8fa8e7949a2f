"""The CUDA stages on a GPU: shapes, ranks, streams, repeats, odd views and long inputs, against the reference.

The properties of docs/design.md run on this backend too, by the `backend` fixture (``pytest -m gpu``).
"""

import types

import numpy as np
import pytest
import rounding
from devices import DEVICES, ON_DEVICE, cupy

import s2o_cupy as s2o
from s2o_cupy import reference
from s2o_cupy.compile import device_target
from s2o_cupy.problem import Problem
from s2o_cupy.settings import Settings

pytestmark = ON_DEVICE

APART = rounding.TOLERANCE["rounded twice"]


def arrays(p, seed=0):
    rng, kind = np.random.default_rng(seed), rounding.DTYPES[p.dtype]
    mix = rng.standard_normal((p.dim_qk, p.dim_qk)) / np.sqrt(p.dim_qk) * np.exp(rng.standard_normal(p.dim_qk))
    q = rng.standard_normal((p.batch, p.heads_q, p.n_q, p.dim_qk)) @ mix
    q += rng.standard_normal((p.batch, p.heads_q, 1, p.dim_qk))
    k = rng.standard_normal((p.batch, p.heads_kv, p.n_k, p.dim_qk))
    return q.astype(kind), k.astype(kind), rng.standard_normal((*k.shape[:3], p.dim_v)).astype(kind)


def wide(x):
    x = x.get() if isinstance(x, cupy.ndarray) else x
    return x.astype(np.float64)


def on_host(result):
    return types.SimpleNamespace(**{name: x.get() for name, x in vars(result).items()})


def empty(p):
    rows = (p.batch, p.heads_q, p.n_q)
    tiles = (*rows[:2], len(p.tile_start))
    return types.SimpleNamespace(
        out=cupy.full((*rows, p.dim_v), np.nan, np.float32).astype(rounding.DTYPES[p.dtype]),
        lse=cupy.full(rows, np.nan, p.compute_dtype),
        tiles=cupy.full(tiles, -1, np.int32),
        tail_blocks=cupy.full(tiles, -1, np.int32),
        tail_mass=cupy.full(rows, np.nan, np.float32),
    )


def tile_of_row(p):
    return np.repeat(np.arange(len(p.tile_start)), p.tile_rows)


def check_stages(p, seed=0):
    """Scores to rounding, lists bitwise given the scores, stage 3 given the lists."""
    from s2o_cupy.backends import cuda

    host = arrays(p, seed)
    q, k, v = map(cupy.asarray, host)
    scores = cuda.score(p, q, k, p.whole)
    starts = scores.starts.get()
    values = scores.data.get().reshape(-1, starts[-1])
    offsets = p.offsets(p.whole)
    order = cupy.full(int(offsets[-1, -1]), -7, np.int32)
    cuda.remap(p, scores, p.whole, cupy.asarray(offsets), order)
    lists, found, wanted = order.get(), [], []
    for b, o, s in np.ndindex(p.batch, p.heads_order, p.segments):
        row = b * p.heads_order + o
        found.append(values[row, starts[s] : starts[s] + p.history[s]])
        wanted.append(rounding.score(p, *host[:2], b, o, s))
        expected = reference.remap(found[-1], p.listed[s], p.settings.rank_levels)
        np.testing.assert_array_equal(lists[offsets[row, s] : offsets[row, s + 1]], expected)
    rounding.check_scores(p, found, wanted)
    result = empty(p)
    cuda.attend(p, q, k, v, p.whole, order, cupy.asarray(offsets), None, cuda.pool(p, k, v), result)
    steps = rounding.steps_of(p, device_target())
    want, got = rounding.attend(p, *host, lists, offsets, **steps), on_host(result)
    same = (got.tiles == want.tiles) & (got.tail_blocks == want.tail_blocks)
    assert same.mean() > 0.97
    rows = same[..., tile_of_row(p)]  # a tile that stops elsewhere, its gain within rounding of tau, is another answer
    want.out[~rows], got.out[~rows], want.lse[~rows], got.lse[~rows] = 0, 0, 0, 0
    want.tail_mass[~rows] = got.tail_mass[~rows] = 0
    rounding.check_answer(p, got, want)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("dims", "settings"),
    [
        ((128, 128), {}),
        ((128, 128), {"rank": "mean", "tail": None}),
        ((128, 128), {"rank_terms": 7, "share_order": True}),
        ((128, 64), {"rank_terms": 31, "rank_levels": None}),
        ((64, 64), {"rank_terms": 50, "rank_levels": 60000}),
        ((64, 64), {"rank_terms": None, "block_q": 64, "block_k": 32}),
        ((32, 32), {"causal": False, "cap": 0.4}),
        ((96, 80), {"block_q": 32, "block_k": 96}),
        ((192, 128), {"tau": 0.0}),
        ((256, 256), {"causal": False}),
        ((256, 200), {"rank_terms": None}),
        ((40, 17), {"rank_levels": 4096}),
        ((128, 128), {"rank": "mixture", "rank_terms": 31, "segment": 128}),
        ((64, 64), {"rank": "mixture", "rank_terms": 7, "share_order": True, "causal": False}),
        ((256, 256), {"rank": "mixture", "rank_terms": None, "segment": 100}),
        ((256, 256), {"tail": "spread", "tau": 0.02}),
        ((128, 128), {"tail": "spread", "cap": 0.5}),
        ((96, 80), {"tail": "spread", "causal": False, "block_q": 32}),
    ],
)
def test_stages(dtype, dims, settings):
    chosen = Settings(**{"segment": 256, "pool": 64, "block_k": 64, "tau": 0.2, **settings})
    check_stages(Problem(1, 4, 2, 600, 800, *dims, dtype, chosen))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("dims", "heads"), [((64, 64), 4), ((128, 128), 6), ((192, 128), 4), ((256, 256), 4)])
@pytest.mark.parametrize(
    "settings",
    [
        {"tau": 0.2},
        {"tau": 0.05, "block_k": 128, "tail": None},
        {"tau": 0.1, "tail": "spread"},
        {"tau": 0.3, "causal": False, "block_q": 40},
        {"tau": 0.0, "cap": 0.5},
    ],
)
def test_row_tiles_of_one_list_side_by_side(dtype, dims, heads, settings):
    """Row tiles of up to 64 queries, on Hopper those of two query heads in one block; groups of two and of three."""
    chosen = {"segment": 64, "block_q": 64, "pool": 64, "block_k": 64, "rank": "mean", "share_order": True, **settings}
    if settings["tau"] == 0.2:
        chosen["tau"] = tuple(0.05 * 3**h for h in range(heads))  # each head stops at a depth of its own
    check_stages(Problem(1, heads, 2, 600, 2000, *dims, dtype, Settings(**chosen)))


def test_row_tiles_side_by_side_repeat_bitwise():
    q, k, v = call(n=20_000, heads=(6, 2), dim=128)
    settings = s2o.Settings(segment=64, block_q=64, rank="mean", share_order=True, tau=0.02)
    first = s2o.attention(q, k, v, settings, full_output=True, backend="cuda")
    for _ in range(20):
        again = s2o.attention(q, k, v, settings, full_output=True, backend="cuda")
        assert (again.out == first.out).all()
        assert (again.stats.tiles == first.stats.tiles).all()
    guided = s2o.attention(q, k, v, settings.replace(query_order="guide"), backend="cuda")
    assert np.linalg.norm(wide(guided) - wide(first.out)) <= APART["float16"] * np.linalg.norm(wide(first.out))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("dims", "settings"),
    [
        ((64, 64), {}),
        ((100, 36), {"rank_terms": None, "rank_levels": None}),
        ((256, 256), {"causal": False, "cap": 0.5}),
        ((100, 36), {"rank": "mixture", "rank_terms": 31}),
        ((64, 64), {"rank": "mixture", "rank_terms": None, "share_order": True}),
        ((100, 36), {"tail": "spread", "cap": 0.7}),
    ],
)
def test_plain_stages(dtype, dims, settings):
    chosen = Settings(**{"segment": 128, "pool": 32, "block_k": 64, "tau": 0.2, **settings})
    check_stages(Problem(2, 2, 1, 300, 400, *dims, dtype, chosen))


@pytest.mark.parametrize("dtype", rounding.DTYPES)
@pytest.mark.parametrize("window", [1, 63, 128, 129, 500, 799, 800, 5000])
def test_windows(dtype, window):
    """Dense within the window, and no key or value before it is looked at, NaN and infinities among them."""
    from s2o_cupy.backends import cuda

    for dim, n_k in ((64, 800), (256, 1100)):
        p = Problem(1, 4, 2, 600, n_k, dim, dim, dtype, Settings(window=window))
        host = arrays(p)
        before = max(p.shift + 1 - window, 0)  # hidden from every query
        host[1][:, :, :before], host[2][:, :, :before] = np.nan, np.inf
        chosen = p.replace(block_q=cuda._dense_block_q(device_target(), dtype, dim, dim), block_k=128)
        want = rounding.dense(p, *host, chosen.settings.block_q, **rounding.steps_of(chosen, device_target()))
        q, k, v = map(cupy.asarray, host)
        for found in (
            s2o.dense_attention(q, k, v, window=window, full_output=True),
            s2o.attention(q, k, v, window=window, full_output=True),
            s2o.attend(q, k, v, s2o.plan(q, k, window=window), full_output=True),
        ):
            assert found.stats.path == "dense"
            got = types.SimpleNamespace(out=found.out.get(), lse=found.lse.get())
            rounding.check_answer(p, got, want)


def call(n=3000, dtype="float16", heads=(4, 2), dim=64, seed=3):
    p = Problem(1, *heads, n, n, dim, dim, dtype, Settings())
    return [cupy.asarray(x) for x in arrays(p, seed)]


CALL = {"segment": 256, "tau": 0.05, "backend": "cuda"}


@pytest.mark.parametrize("settings", [s2o.Settings(), s2o.Settings.precise()], ids=["default", "precise"])
def test_twenty_repeats_agree_bitwise(settings):
    q, k, v = call(n=5000)
    settings = settings.replace(tau=0.05)
    first = s2o.attention(q, k, v, settings, full_output=True, backend="cuda")
    assert first.stats.path == "ranked"
    for _ in range(20):
        again = s2o.attention(q, k, v, settings, full_output=True, backend="cuda")
        assert (again.out == first.out).all()
        assert (again.lse == first.lse).all()
        assert (again.stats.tiles == first.stats.tiles).all()


def test_two_streams_at_once():
    inputs = [call(seed=s) for s in (1, 2)]
    alone = [s2o.attention(*x, **CALL) for x in inputs]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in inputs]
    cupy.cuda.runtime.deviceSynchronize()
    together = []
    for _ in range(3):
        for stream, x in zip(streams, inputs):
            with stream:
                together.append(s2o.attention(*x, **CALL))
    for stream in streams:
        stream.synchronize()
    for i, out in enumerate(together):
        assert (out == alone[i % 2]).all()


@pytest.mark.skipif(DEVICES < 2, reason="needs two CUDA devices")
def test_another_device():
    host = [x.get() for x in call()]
    here = s2o.attention(*map(cupy.asarray, host), **CALL).get()
    with cupy.cuda.Device(1):
        there = s2o.attention(*map(cupy.asarray, host), **CALL)
        assert there.device.id == 1
        np.testing.assert_array_equal(there.get(), here)
        there = call()
    for refused in (s2o.attention, s2o.dense_attention):
        with pytest.raises(ValueError, match="q is on device 1 and the current device is 0"):
            refused(*there)
    with pytest.raises(ValueError, match="out is on <CUDA Device 1> and q on <CUDA Device 0>"):
        s2o.attention(*call(), out=there[0])


def test_odd_views_and_out():
    """Rows off 16 bytes, reversed and transposed views: bitwise what contiguous copies give; out in place.

    On Hopper rows that all start on 16 bytes have a kernel of their own, so the copies' answer goes off 16 bytes, too.
    """
    wider = [cupy.concatenate([x, x], axis=-1) for x in call()]
    odd = wider[0][..., 1:65], wider[1][..., 2:66], wider[2][:, :, ::-1, 3:67]
    copies = [cupy.ascontiguousarray(x) for x in odd]
    room = cupy.full((1, 3000, 4, 130), 7, odd[0].dtype)
    views = [out.transpose(0, 2, 1, 3) for out in (room[..., 1:65], room[..., 64:128])]
    plain = s2o.attention(*copies, out=views[0], **CALL).copy()
    for out in (None, *views):
        found = s2o.attention(*odd, out=out, **CALL)
        assert (found == plain).all()
        assert out is None or found is out
    assert (room[..., 128:] == 7).all()
    aligned = wide(s2o.attention(*copies, **CALL))
    assert np.linalg.norm(aligned - wide(plain)) <= 2 * APART[plain.dtype.name] * np.linalg.norm(aligned)
    flipped = copies[0], copies[1][:, :, ::-1], copies[2]
    assert (s2o.attention(*flipped, **CALL) == s2o.attention(*map(cupy.ascontiguousarray, flipped), **CALL)).all()


def test_inputs_of_more_than_2_to_the_31_elements():
    batch, heads, n, dim = 70, 16, 16384, 128
    assert batch * heads * n * dim > 2**31
    needed = 4 * 2 * batch * heads * n * dim
    if cupy.cuda.runtime.memGetInfo()[0] < needed + 2**32:
        pytest.skip("needs 20 GiB of free GPU memory")
    q = cupy.random.default_rng(0).integers(-4, 5, (batch, heads, n, dim), dtype=np.int8).astype(np.float16)
    k, v = q[:, ::-1], q[:, :, ::-1]
    last = [x[-1:, -2:] for x in (q, k, v)]
    out = s2o.attention(q, k, v, segment=1024, rank="mean", cap=0.05, tau=0.1, backend="cuda")
    assert (out[-1:, -2:] == s2o.attention(*last, segment=1024, rank="mean", cap=0.05, tau=0.1, backend="cuda")).all()
    del q, k, v, last, out
    cupy.get_default_memory_pool().free_all_blocks()


def test_a_whole_call_in_a_graph():
    """Captured once, then replayed over changed inputs: bitwise what a call gives."""
    shapes = ((1, 4, 5000, 64), (1, 2, 5000, 64), (1, 2, 5000, 64))
    draws = [
        [cupy.random.default_rng(s).standard_normal(x, np.float32).astype(np.float16) for x in shapes] for s in (1, 2)
    ]
    wanted = [s2o.attention(*x, backend="cuda") for x in draws]
    q, k, v = (x.copy() for x in draws[0])
    out, memory = cupy.empty_like(q), cupy.cuda.MemoryPool()
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream, cupy.cuda.using_allocator(memory.malloc):
        s2o.attention(q, k, v, out=out, backend="cuda")
        stream.synchronize()
        stream.begin_capture()
        s2o.attention(q, k, v, out=out, backend="cuda")
        graph = stream.end_capture()
        for drawn, expected in zip((*draws, draws[0]), (*wanted, wanted[0])):
            for x, y in zip((q, k, v), drawn):
                x[...] = y
            out.fill(7)
            graph.launch(stream)
            stream.synchronize()
            assert (out == expected).all()


@pytest.mark.parametrize("cap", [1.0, 0.2])
@pytest.mark.parametrize("n", [70_000, 140_000])
def test_long_lists_in_several_windows(n, cap):
    """Lists beyond 2^16 and 2^17 keys."""
    from s2o_cupy.backends import cuda

    for levels in (1024, 5000):
        chosen = Settings(rank="mean", causal=False, segment=512, cap=cap, rank_levels=levels)
        p = Problem(1, 1, 1, 512, n, 64, 64, "float16", chosen)
        q, k, _ = map(cupy.asarray, arrays(p))
        scores, offsets = cuda.score(p, q, k, p.whole), p.offsets(p.whole)
        order = cupy.full(int(offsets[-1, -1]), -7, np.int32)
        cuda.remap(p, scores, p.whole, cupy.asarray(offsets), order)
        expected = reference.remap(scores.data.get()[:n], int(p.listed[0]), p.settings.rank_levels)
        np.testing.assert_array_equal(order.get(), expected)


def test_refusals():
    q, k, v = call(n=1500)
    with pytest.raises(ValueError, match=r"v has strides \(.*, 4\), gaps in its last axis; backend 'cuda' takes 2"):
        s2o.attention(q, k, cupy.concatenate([v, v], axis=-1)[..., ::2])
    with pytest.raises(ValueError, match="block_q is 256; the CUDA backend supports 1 to 128"):
        s2o.attend(q, k, v, s2o.plan(q, k, backend="cuda"), block_q=256, backend="cuda")
    with pytest.raises(ValueError, match="rank_terms is 64; the CUDA backend supports 1 to 63, or None"):
        s2o.plan(*(cupy.concatenate([x, x], axis=-1) for x in (q, k)), rank_terms=64, backend="cuda")
