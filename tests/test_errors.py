"""Bad input at the public calls: each refusal names the argument, its value and what is allowed, and writes nothing."""

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import s2o_cupy as s2o

CALLS = {
    "attention": s2o.attention,
    "dense_attention": s2o.dense_attention,
    "attend": lambda q, k, v, **keywords: s2o.attend(q, k, v, PLAN, **keywords),
}


def good(heads_q=2, heads_kv=1, n_q=64, n_k=96, dim=8, dim_v=8, batch=1, dtype=np.float32):
    shapes = {"q": (batch, heads_q, n_q, dim), "k": (batch, heads_kv, n_k, dim), "v": (batch, heads_kv, n_k, dim_v)}
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


PLAN = s2o.plan(*(good()[x] for x in "qk"), segment=32, pool=8)

BAD_ARRAYS = [
    ({"k": (2, 1, 96, 8)}, ValueError, "k has batch 2 and q 1; allowed: the same"),
    ({"v": (2, 1, 96, 8)}, ValueError, "v has batch 2 and q 1; allowed: the same"),
    ({"k": (1, 1, 96, 9)}, ValueError, "k has head dim 9 and q 8; allowed: the same"),
    ({"v": (1, 1, 95, 8)}, ValueError, "v has 1 heads of 95 rows and k 1 of 96; allowed: the same"),
    ({"v": (1, 2, 96, 8)}, ValueError, "v has 2 heads of 96 rows and k 1 of 96; allowed: the same"),
    (
        {"q": (1, 3, 64, 8), "k": (1, 2, 96, 8), "v": (1, 2, 96, 8)},
        ValueError,
        "q has 3 heads and k has 2; allowed: .* multiple",
    ),
    ({"q": (1, 0, 64, 8)}, ValueError, "q has 0 heads and k has 1"),
    ({"k": (1, 0, 96, 8), "v": (1, 0, 96, 8)}, ValueError, "q has 2 heads and k has 0"),
    ({"q": (1, 2, 64, 257), "k": (1, 1, 96, 257)}, ValueError, "q and k have head dim 257; supported: 1 to 256"),
    ({"q": (1, 2, 64, 0), "k": (1, 1, 96, 0)}, ValueError, "q and k have head dim 0; supported: 1 to 256"),
    ({"v": (1, 1, 96, 300)}, ValueError, "v has head dim 300; supported: 1 to 256"),
    ({"q": (1, 2, 97, 8)}, ValueError, "q has 97 rows and k has 96; causal attention allows at most as many"),
    ({"q": (8,)}, ValueError, r"q has shape \(8,\); allowed: \(N, D\), \(H, N, D\) or \(B, H, N, D\)"),
    ({"v": (1, 1, 1, 96, 8)}, ValueError, r"v has shape \(1, 1, 1, 96, 8\); allowed"),
    (
        {"k": (1, 96, 8)},
        ValueError,
        r"q has shape \(1, 2, 64, 8\) and k \(1, 96, 8\); allowed: the same number of axes",
    ),
    ({"v": np.float64}, TypeError, "q has dtype float32 and v float64; allowed: one dtype"),
    ({"q": np.int64}, TypeError, "q has dtype int64; supported: float16, bfloat16, float32, float64"),
    ({"k": np.complex64}, TypeError, "k has dtype complex64; supported"),
    ({"v": np.bool_}, TypeError, "v has dtype bool; supported"),
    ({"q": object}, TypeError, "q has dtype object; supported"),
    ({"q": "U5"}, TypeError, "q has dtype str.*; supported"),
    ({"q": ">f4"}, TypeError, "q has byte order '>'; supported: this machine's own"),
    ({"q": list}, TypeError, "q is a list; allowed: a NumPy or CuPy array"),
    ({"k": lambda x: None}, TypeError, "k is a NoneType; allowed: a NumPy or CuPy array"),
    ({"v": lambda x: np.ma.masked_array(x)}, TypeError, "v is a masked array; allowed: a plain array"),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARRAYS)
def test_bad_arrays(call, changes, error, message):
    arrays = good()
    for name, change in changes.items():
        if isinstance(change, tuple):
            arrays[name] = np.ones(change, np.float32)
        elif isinstance(change, (str, type)) and change is not list:
            arrays[name] = arrays[name].astype(change)
        else:
            arrays[name] = change(arrays[name])
    refused(CALLS[call], arrays, error, message)
    if call == "attention" and "v" not in changes:
        with pytest.raises(error, match=message):
            s2o.plan(arrays["q"], arrays["k"])


def refused(call, arrays, error, message, **keywords):
    """The call raises, and `out` is left as it was."""
    out = np.full((1, 2, 64, 8), 7, np.float32)
    with pytest.raises(error, match=message):
        call(**arrays, **({"out": out} | keywords))
    assert (out == 7).all()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_check_finite_names_the_place(call, name, bad):
    arrays = good()
    arrays[name][0, 0, 41, 3] = bad
    refused(
        CALLS[call],
        arrays,
        ValueError,
        rf"{name} has {bad} at \[0, 0, 41, 3\]; allowed: finite numbers",
        check_finite=True,
    )


def test_check_finite_looks_past_its_first_block():
    arrays = good(n_k=70_000, heads_q=1, n_q=1, dim=1, dim_v=1)
    arrays["k"][0, 0, 69_999, 0] = np.nan
    with pytest.raises(ValueError, match=r"k has nan at \[0, 0, 69999, 0\]"):
        s2o.plan(arrays["q"], arrays["k"], check_finite=True)


def test_check_finite_passes_good_arrays():
    s2o.attention(**good(), check_finite=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda out: out[:, :1], ValueError, r"out has shape \(1, 1, 64, 8\); allowed: \(1, 2, 64, 8\)"),
        (lambda out: out[0], ValueError, r"out has shape \(2, 64, 8\); allowed: \(1, 2, 64, 8\)"),
        (lambda out: out.astype(np.float64), TypeError, "out has dtype float64; allowed: float32, that of q"),
        (lambda out: np.broadcast_to(out, out.shape), ValueError, "out is read-only; allowed: a writable array"),
        (lambda out: out.tolist(), TypeError, "out is a list; allowed: a numpy array as the inputs are"),
        (np.ma.masked_array, TypeError, "out is a MaskedArray; allowed: a numpy array as the inputs are"),
        (lambda out: out.astype(">f4"), TypeError, "out has dtype float32 of byte order '>'; allowed: float32, that"),
        (lambda out: as_strided(out, out.shape, (0, 4, 4, 4)), ValueError, r"out has strides \(0, 4, 4, 4\), so"),
        (lambda out: as_strided(out, out.shape, (0, 256, 0, 4)), ValueError, r"out has strides \(0, 256, 0, 4\), so"),
    ],
)
@pytest.mark.parametrize("call", CALLS)
def test_bad_out(call, change, error, message):
    out = np.full((1, 2, 64, 8), 7, np.float32)
    with pytest.raises(error, match=message):
        CALLS[call](**good(), out=change(out))
    assert (out == 7).all()


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("call", CALLS)
def test_out_may_not_share_memory_with_an_input(call, name):
    arrays = good()
    memory = np.zeros(1 * 2 * 96 * 8, np.float32)
    arrays[name] = memory[: arrays[name].size].reshape(arrays[name].shape)
    with pytest.raises(ValueError, match=f"out shares memory with {name}; allowed: memory of its own"):
        CALLS[call](**arrays, out=memory[: 2 * 64 * 8].reshape(1, 2, 64, 8))
    assert not memory.any()


def test_out_is_written_through_any_strides():
    arrays = good()
    for call in CALLS.values():
        out = np.empty((1, 64, 2, 16), np.float32).transpose(0, 2, 1, 3)[..., ::-2]
        assert call(**arrays, out=out) is out
        np.testing.assert_array_equal(out, call(**arrays))


def test_out_may_be_mapped_to_a_file(tmp_path):
    arrays = good()
    out = np.memmap(tmp_path / "out", np.float32, "w+", shape=(1, 2, 64, 8))
    assert s2o.attention(**arrays, out=out) is out
    np.testing.assert_array_equal(out, s2o.attention(**arrays))


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"backend": "tpu"}, ValueError, "backend is 'tpu'; allowed: .*'cpu'.*, or None"),
        ({"colour": 1}, TypeError, "unknown setting 'colour'; allowed: causal, window, scale, segment"),
        ({"settings": {"tau": 0}}, TypeError, "settings is a dict; allowed: Settings, or its fields as keywords"),
        ({"workspace": 0}, ValueError, "workspace is 0; allowed: an integer from 1"),
        ({"workspace": 1e9}, TypeError, "workspace is 1000000000.0; allowed: an integer"),
        ({"tau": -0.1}, ValueError, "tau is -0.1; allowed: a finite number, 0 or above"),
        ({"tau": np.nan}, ValueError, "tau is nan; allowed"),
        ({"tau": [0.1, 0.2, 0.3]}, ValueError, "tau has 3 numbers; allowed: one, or one for each of 2 q heads"),
        ({"tau": np.ones((2, 2))}, TypeError, r"tau is an array of shape \(2, 2\); allowed: a finite number"),
        ({"progress": 3}, TypeError, "progress is 3; allowed: a callable, or None"),
        ({"scale": 0}, ValueError, r"scale is 0.0; allowed: a number above 0, at most 1e\+38, or None"),
        ({"scale": 1e308}, ValueError, r"scale is 1e\+308; allowed: a number above 0, at most 1e\+38, or None"),
        ({"pool": 24}, ValueError, "pool is 24; allowed: a power of two"),
        ({"window": 0}, ValueError, "window is 0; allowed: an integer from 1 to 2147483647 or None"),
        ({"window": 2.5}, TypeError, "window is 2.5; allowed: an integer from 1"),
        (
            {"window": 8, "causal": False},
            ValueError,
            "window is 8 and causal False; allowed: a window with causal=True",
        ),
    ],
)
def test_bad_keywords(keywords, error, message):
    refused(s2o.attention, good(), error, message, **keywords)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"window": -3}, ValueError, "window is -3; allowed: an integer from 1"),
        ({"window": True}, TypeError, "window is True; allowed: an integer from 1"),
        (
            {"window": 8, "causal": False},
            ValueError,
            "window is 8 and causal False; allowed: a window with causal=True",
        ),
    ],
)
def test_bad_windows_of_dense_attention(keywords, error, message):
    refused(s2o.dense_attention, good(), error, message, **keywords)


def test_a_plan_fixes_its_window():
    with pytest.raises(TypeError, match="attend got 'window', which a plan fixes"):
        s2o.attend(**good(), plan=PLAN, window=8)
    arrays = good()
    lists = {"kv_order": np.zeros(1, np.int32), "kv_offsets": np.array([[[0, 0, 1], [1, 1, 1]]], np.int64)}
    with pytest.raises(ValueError, match="kv_offsets gives list 1 of order head 0 1 keys; allowed: 0 to 0"):
        s2o.Plan.from_arrays(arrays["q"], arrays["k"], s2o.Settings(window=8, segment=32), **lists)


def test_a_refusal_for_a_plan_writes_nothing():
    arrays = good(n_q=0) | {"q": good()["q"][:, :, :0]}
    out = np.full((1, 2, 64, 8), 7, np.float32)
    with pytest.raises(ValueError, match="plan was made for n_q 64; the arrays have 0"):
        s2o.attend(**arrays, plan=PLAN, out=out[:, :, :0])
    empty = {name: x if name == "q" else x[:, :, :0] for name, x in good().items()}
    plan = s2o.plan(good()["q"], good()["k"], causal=False)
    with pytest.raises(ValueError, match="plan was made for n_k 96; the arrays have 0"):
        s2o.attend(**empty, plan=plan, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize("call", CALLS)
def test_backend_cpu_refuses_unknown_names_before_work(call):
    refused(CALLS[call], good(), ValueError, "backend is 'gpu'; allowed", backend="gpu")


# --- empty and tiny calls are no errors ------------------------------------------------------
@pytest.mark.parametrize("sizes", [{"n_q": 0}, {"batch": 0}, {"n_q": 0, "n_k": 0}])
def test_nothing_to_do_gives_empty_arrays(sizes):
    arrays = good(**sizes)
    plan = s2o.plan(arrays["q"], arrays["k"])
    for result in (
        s2o.attention(**arrays, full_output=True),
        s2o.dense_attention(**arrays, full_output=True),
        s2o.attend(**arrays, plan=plan, full_output=True),
    ):
        assert result.out.shape == arrays["q"].shape
        assert result.lse.shape == result.stats.tail_mass.shape == arrays["q"].shape[:3]
        assert result.stats.density == 1


def test_no_keys_give_zero_and_minus_infinity():
    arrays = good(n_k=0)
    plan = s2o.plan(arrays["q"], arrays["k"], causal=False)
    for result in (
        s2o.attention(**arrays, causal=False, full_output=True, out=np.ones((1, 2, 64, 8), np.float32)),
        s2o.dense_attention(**arrays, causal=False, full_output=True),
        s2o.attend(**arrays, plan=plan, full_output=True),
    ):
        assert not result.out.any()
        assert (result.lse == -np.inf).all()


@pytest.mark.parametrize("axes", [2, 3, 4])
def test_leading_axes_may_be_missing(axes):
    arrays = good(heads_q=1)
    whole = s2o.attention(**arrays, full_output=True)
    part = s2o.attention(**{name: x[(0,) * (4 - axes)] for name, x in arrays.items()}, full_output=True)
    lead = (1,) * (axes - 2)
    assert part.out.shape == (*lead, 64, 8)
    assert part.lse.shape == part.stats.tail_mass.shape == (*lead, 64)
    assert part.stats.tiles.shape[:-1] == lead
    np.testing.assert_array_equal(part.out.ravel(), whole.out.ravel())
