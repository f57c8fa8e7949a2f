"""Calls from several threads at once are right, and leave no thread setting behind."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

import s2o_cupy as s2o


def call(seed):
    rng = np.random.default_rng(seed)
    q, k, v = rng.standard_normal((3, 2, 1300 + 8 * seed, 16), np.float32)
    settings = {"segment": 128, "block_q": 32, "pool": 64, "query_order": ("position", "guide")[seed % 2]}
    result = s2o.attention(q, k, v, tau=0.1, full_output=True, **settings)
    return result.out, result.lse, result.stats.tiles, s2o.dense_attention(q, k, v)


def test_threads_agree_with_serial_calls_bitwise():
    serial = [call(seed) for seed in range(8)]
    assert serial[0][2].any()
    with ThreadPoolExecutor(4) as executor:
        for _ in range(2):
            for mine, theirs in zip(serial, executor.map(call, range(8))):
                for a, b in zip(mine, theirs):
                    np.testing.assert_array_equal(a, b)


def blas_threads():
    return [(library["filepath"], library["num_threads"]) for library in threadpool_info()]


@pytest.mark.parametrize("limit", [1, 2])
def test_blas_threads_are_restored(limit):
    with threadpool_limits(limit):
        before = blas_threads()
        with ThreadPoolExecutor(3) as executor:
            list(executor.map(call, range(3)))
        assert blas_threads() == before


def test_blas_threads_are_restored_after_an_error():
    before = blas_threads()
    with pytest.raises(ValueError, match="allowed: finite numbers"):
        s2o.attention(*np.full((3, 1, 8, 4), np.nan, np.float32), check_finite=True)
    assert blas_threads() == before
