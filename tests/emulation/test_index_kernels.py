"""The index kernels from their own `.cu` source on the CPU, in two thread orders, against the reference."""

import itertools

import numpy as np
import pytest

from s2o_cupy import reference
from s2o_cupy.iterate import emulation as run
from s2o_cupy.specialisations import remap_fit, remap_shared_bytes

pytestmark = pytest.mark.skipif(run.compiler() is None, reason="needs g++")
ORDERS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def remap(
    lists, listed, levels, *,
    half=True, warps=4, window=4096, planes=0, kernel="remap", part_keys=None, reverse=False, edit=None,
):  # fmt: skip
    """Orders `lists` (one head, a list a segment), keeping the first `listed` of each; `part_keys`: with ranges."""
    starts = np.concatenate([[0], np.cumsum([-(-len(x) // 8) * 8 for x in lists])]).astype(np.int64)
    scores = np.full(starts[-1], np.nan, np.float16 if half else np.float32)
    for x, start in zip(lists, starts):
        scores[start : start + len(x)] = x
    history = np.array([len(x) for x in lists], np.int32)
    offsets = np.concatenate([[0], np.cumsum(listed)]).astype(np.int64)
    order = np.full(offsets[-1] + 4, -7, np.int32)
    arguments = (scores, starts, history, offsets, len(offsets), order)
    if levels and levels < 3000:
        shared = remap_shared_bytes(kernel, levels, warps, window, planes)
        entry, arguments = kernel, (*arguments, len(lists), levels, window, planes, *ranges(lists, part_keys))
    else:
        bins, passes = 256, 3 if levels else 4
        entry, shared = "remap_digits", 4 * warps * bins
        scratch = np.full(2 * starts[-1], -9, np.int32)
        arguments = (*arguments, scratch, len(lists), levels or 0, bins, passes)
    run.launch(
        "remap", (len(lists), 1), 32 * warps, arguments,
        entry=entry, shared=shared, reverse=reverse, edit=edit, SCORE_HALF=int(half),
    )  # fmt: skip
    assert (order[offsets[-1] :] == -7).all(), "wrote past the lists"
    return [order[a:b] for a, b in itertools.pairwise(offsets)]


def ranges(lists, part_keys):
    """What score_means leaves of each part of a list: its least and greatest, the least past NaN, the greatest NaN."""
    if part_keys is None:
        return None, 1, 1
    parts = max(-(-len(x) // part_keys) for x in lists)
    found = np.full((len(lists), parts, 2), 7, np.float16)  # of no list where not written
    for mine, x in zip(found, lists):
        for i, start in enumerate(range(0, len(x), part_keys)):
            part = x[start : start + part_keys]
            mine[i] = np.fmin.reduce(part, initial=np.inf), part.max()
    return found.view(np.uint32), part_keys, parts


def check(got, lists, listed, levels):
    for mine, x, n in zip(got, lists, listed, strict=True):
        np.testing.assert_array_equal(mine, reference.remap(x, n, levels))


def awkward_lists(half):
    rng = np.random.default_rng(5)
    kind = np.float16 if half else np.float32
    lists = [rng.standard_normal(n).astype(kind) for n in (1, 31, 32, 33, 700, 1300)]
    lists.append(np.zeros(100, kind))
    lists.append(np.round(rng.standard_normal(500) * 2).astype(kind))
    special = rng.standard_normal(300).astype(kind)
    special[[3, 50, 299]], special[[7, 8]], special[[0, 20]] = np.inf, -np.inf, np.nan
    special[[100, 101]] = -0.0, 0.0
    lists.append(special)
    lists.append(np.full(40, np.nan, kind))
    return lists


@ORDERS
@pytest.mark.parametrize("half", [True, False], ids=["half", "float"])
@pytest.mark.parametrize("levels", [2, 1024, 60000, None])
def test_remap_is_the_reference_order(levels, half, reverse):
    lists = awkward_lists(half)
    listed = [len(x) if i % 2 else -(-len(x) // 3) for i, x in enumerate(lists)]
    check(remap(lists, listed, levels, half=half, reverse=reverse), lists, listed, levels)


@ORDERS
@pytest.mark.parametrize("share", [0.02, 0.25, 1])
@pytest.mark.parametrize("window", [128, 512, 4096])
def test_remap_by_any_windows(window, share, reverse):
    lists = awkward_lists(True)
    listed = [max(int(len(x) * share), 1) for x in lists]
    check(remap(lists, listed, 300, window=window, planes=1, reverse=reverse), lists, listed, 300)


@ORDERS
@pytest.mark.parametrize("count", [70_000, 140_000])
def test_remap_of_long_lists(count, reverse):
    """Keys beyond 2^16 keep their upper bits in planes; a bin goes on from window to window."""
    x = np.random.default_rng(9).standard_normal(count).astype(np.float16)
    listed = [count, count // 3]
    for levels, window in ((1024, 65536), (3, 4096)):
        check(remap([x, x], listed, levels, window=window, planes=2, reverse=reverse), [x, x], listed, levels)


@ORDERS
@pytest.mark.parametrize("part_keys", [32, 1024])
def test_remap_with_known_ranges(part_keys, reverse):
    lists = awkward_lists(True)
    listed = [len(x) for x in lists]
    check(remap(lists, listed, 300, part_keys=part_keys, reverse=reverse), lists, listed, 300)


@ORDERS
@pytest.mark.parametrize("levels", [2, 300, 1024])
@pytest.mark.parametrize("share", [0.02, 0.25, 1])
def test_remap_with_narrow_places(share, levels, reverse):
    lists = awkward_lists(True)
    listed = [max(int(len(x) * share), 1) for x in lists]
    window = -(-max(listed) // 128) * 128
    for warps in (4, 16):
        got = remap(lists, listed, levels, warps=warps, window=window, kernel="remap_narrow", reverse=reverse)
        check(got, lists, listed, levels)


@ORDERS
@pytest.mark.parametrize("levels", [1, 3, 1024])
def test_narrow_places_of_long_lists(levels, reverse):
    """As `remap_fit` gives them out: the last bin holds far more keys than 16 bits count."""
    x = np.random.default_rng(9).standard_normal(120_000).astype(np.float16)
    listed = [30_000, 100]
    kernel, warps, window, planes, _ = remap_fit(levels, len(x), max(listed), "sm_90a")
    assert kernel == "remap_narrow"
    got = remap([x, x], listed, levels, warps=warps, window=window, planes=planes, kernel=kernel, reverse=reverse)
    for mine, n in zip(got, listed):
        np.testing.assert_array_equal(mine, reference.remap(x, n, levels))


def test_a_missing_barrier_shows():
    """The emulation is worth something only if it notices: without a barrier, places are wrong."""

    def without(source):
        return source.replace("    __syncthreads();\n\n    int place", "\n    int place")

    x = [np.round(np.random.default_rng(1).standard_normal(3000) * 4).astype(np.float16)]
    wrong = [
        not np.array_equal(remap(x, [3000], 64, reverse=reverse, edit=without)[0], reference.remap(x[0], 3000, 64))
        for reverse in (False, True)
    ]
    assert any(wrong)


@ORDERS
@pytest.mark.parametrize("dim", [8, 33, 128])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_pool_is_the_mean_of_each_block(dtype, dim, reverse):
    """K and V, V wider by a column."""
    keys, size, heads, rng = 150, 64, 2, np.random.default_rng(2)
    blocks, arguments, made = -(-keys // size), [], []
    for columns in (dim, dim + 1):
        x = rng.standard_normal((1, heads, keys, columns)).astype(dtype)
        mean = np.full((heads, blocks, -(-columns // 8) * 8), np.nan, dtype)
        arguments += [x, heads * keys * columns, keys * columns, columns, mean]
        made.append((x, columns, mean))
    macros = {"IS_BF16": 0} if dtype == np.float16 else {"REAL": {4: "float", 8: "double"}[np.dtype(dtype).itemsize]}
    arguments += [None, heads, keys, dim, dim + 1, blocks, size]
    run.launch("pool", (blocks, heads, 2), 256, arguments, reverse=reverse, **macros)
    tolerance = {2: 2e-3, 4: 1e-6, 8: 1e-14}[np.dtype(dtype).itemsize]
    for x, columns, mean in made:
        want = [x[0, :, b * size : (b + 1) * size].astype(np.float64).mean(axis=1) for b in range(blocks)]
        np.testing.assert_allclose(mean[..., :columns], np.stack(want, axis=1), atol=tolerance)
        assert (mean[..., columns:] == 0).all()
