"""Arrays of other libraries: viewed through DLPack without a copy, answered in kind."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

import s2o_cupy as s2o
from s2o_cupy.arrays import native


class Foreign:
    """An array of a library that is not NumPy: DLPack is all it speaks."""

    def __init__(self, array):
        self.array, self.dtype, self.shape = array, array.dtype, array.shape

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def from_dlpack(array):
    """What `in_kind` finds in the module of `Foreign`."""
    return Foreign(array)


@pytest.fixture
def arrays():
    return np.random.default_rng(0).standard_normal((3, 1, 300, 8), np.float32)


def test_a_foreign_array_is_viewed_not_copied(arrays):
    assert np.shares_memory(native("q", Foreign(arrays[0])), arrays[0])


def test_the_answer_is_of_the_kind_of_q(arrays):
    expected = s2o.attention(*arrays, full_output=True)
    result = s2o.attention(*map(Foreign, arrays), full_output=True)
    assert type(result.out) is type(result.lse) is Foreign
    np.testing.assert_array_equal(result.out.array, expected.out)
    np.testing.assert_array_equal(result.lse.array, expected.lse)
    plan = s2o.plan(Foreign(arrays[0]), Foreign(arrays[1]))
    assert type(s2o.attend(*map(Foreign, arrays), plan)) is Foreign
    assert type(s2o.dense_attention(*map(Foreign, arrays))) is Foreign


def test_a_foreign_out_is_written_in_place_and_returned(arrays):
    out = Foreign(np.full(arrays[0].shape, np.nan, np.float32))
    assert s2o.attention(*map(Foreign, arrays), out=out) is out
    np.testing.assert_array_equal(out.array, s2o.attention(*arrays))


def test_an_answer_of_unknown_kind_is_numpy(arrays, monkeypatch):
    monkeypatch.delitem(globals(), "from_dlpack")
    assert type(s2o.attention(*map(Foreign, arrays))) is np.ndarray


def test_arrays_of_jaxlib_are_answered_by_jax(arrays, monkeypatch):
    monkeypatch.setattr(Foreign, "__module__", "jaxlib._jax")
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(dlpack=SimpleNamespace(from_dlpack=Foreign)))
    assert type(s2o.attention(*map(Foreign, arrays))) is Foreign


def test_what_dlpack_cannot_share_is_refused_by_name(arrays):
    class Broken(Foreign):
        def __dlpack__(self, **options):
            raise BufferError("needs a copy")

    with pytest.raises(TypeError, match=r"k \(.*Broken.* cannot be viewed without a copy: needs a copy"):
        s2o.attention(arrays[0], Broken(arrays[1]), arrays[2])
