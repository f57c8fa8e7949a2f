"""Plan: save and load, validation of every index, plans of the user's own, and what attend refuses."""

import dataclasses
import json

import numpy as np
import properties
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases

import s2o_cupy as s2o
from s2o_cupy import Plan, Settings, reference
from s2o_cupy.problem import make_problem

SMALL = Settings(segment=32, block_q=16, block_k=8, pool=8, rank_levels=None)


def heads(n_q=80, n_k=100, heads_q=2, heads_kv=1, dim=4, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((1, heads_q, n_q, dim), np.float32)
    k, v = rng.standard_normal((2, 1, heads_kv, n_k, dim), np.float32)
    return q, k, v


def made(settings=SMALL, **sizes):
    q, k, _ = heads(**sizes)
    return s2o.plan(q, k, settings)


def test_plan_arrays_have_the_documented_shapes():
    plan = made(SMALL.replace(query_order="guide"))
    # Nk - Nq = 20: segments start at positions 20, 52, 84; histories 16, 48, 80 with pool blocks of 8.
    assert plan.kv_offsets.tolist() == [[[0, 16, 64, 144], [144, 160, 208, 288]]]
    assert plan.kv_order.dtype == np.int32
    assert plan.kv_order.shape == (288,)
    assert plan.kv_offsets.dtype == np.int64
    assert plan.query_order.shape == (1, 2, 80)
    assert plan.nbytes == 288 * 4 + 8 * 8 + 160 * 4


def test_shared_order_and_cap_shrink_the_plan():
    assert made(SMALL.replace(share_order=True)).kv_offsets.tolist() == [[[0, 16, 64, 144]]]
    assert made(SMALL.replace(cap=0.3)).kv_offsets[0, 0].tolist() == [0, 5, 20, 44]  # ceil of 4.8, 14.4, 24


# --- files -----------------------------------------------------------------------------------
@given(cases(rank="mean"))
def test_save_and_load_round_trip(tmp_path_factory, case):
    path = tmp_path_factory.mktemp("plan") / "plan.npz"
    plan = s2o.plan(case.q, case.k, case.settings)
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded.problem == plan.problem
    for name in ("kv_order", "kv_offsets", "query_order"):
        mine, read = getattr(plan, name), getattr(loaded, name)
        assert (mine is None) == (read is None)
        if mine is not None:
            np.testing.assert_array_equal(mine, read)
            assert mine.dtype == read.dtype
    np.testing.assert_array_equal(s2o.attend(*case.arrays, loaded), s2o.attend(*case.arrays, plan))


def rewritten(path, change):
    """Save a plan, change its arrays and metadata, save again."""
    made(SMALL.replace(query_order="guide")).save(path)
    with np.load(path) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays["meta"]))
    change(arrays, meta)
    np.savez(path, **(arrays | {"meta": np.array(json.dumps(meta))}))
    return path


def test_load_refuses_another_format(tmp_path):
    path = rewritten(tmp_path / "plan.npz", lambda arrays, meta: meta.update(format=99))
    with pytest.raises(ValueError, match=r"plan\.npz' has format 99; supported: 1"):
        Plan.load(path)


def test_load_checks_every_index(tmp_path):
    path = rewritten(tmp_path / "plan.npz", lambda arrays, meta: arrays["kv_order"].__setitem__(3, 16))
    with pytest.raises(ValueError, match="kv_order has key 16 at place 3 of list 0, order head 0; allowed: 0 to 15"):
        Plan.load(path)


def test_load_refuses_unknown_settings(tmp_path):
    path = rewritten(tmp_path / "plan.npz", lambda arrays, meta: meta["settings"].update(colour="red"))
    with pytest.raises(TypeError, match="unknown setting 'colour'"):
        Plan.load(path)


@pytest.mark.parametrize("name", ["batch", "heads_q", "heads_kv", "n_q", "n_k", "dim_qk"])
@pytest.mark.parametrize("value", ["2", 2.0, None])
def test_load_refuses_sizes_that_are_no_integers(tmp_path, name, value):
    path = rewritten(tmp_path / "plan.npz", lambda arrays, meta: meta.update({name: value}))
    with pytest.raises(TypeError, match=f"{name} is {value!r}; allowed: an integer"):
        Plan.load(path)


@pytest.mark.parametrize("meta", ["not json", "[1, 2]", "{}", '{"format": 1}'])
def test_load_refuses_a_file_that_is_no_plan(tmp_path, meta):
    plan, path = made(), tmp_path / "plan.npz"
    np.savez(path, meta=np.array(meta), kv_order=plan.kv_order, kv_offsets=plan.kv_offsets)
    with pytest.raises(ValueError, match=r"plan file .*plan\.npz'"):
        Plan.load(path)


def test_load_names_a_missing_array(tmp_path):
    np.savez(tmp_path / "plan.npz", kv_order=np.zeros(1, np.int32))
    with pytest.raises(ValueError, match=r"has no array 'meta'; it holds kv_order"):
        Plan.load(tmp_path / "plan.npz")


# --- validate --------------------------------------------------------------------------------
def broken(plan, **changes):
    arrays = {name: getattr(plan, name) for name in ("kv_order", "kv_offsets", "query_order")}
    return dataclasses.replace(plan, **{name: change(arrays[name].copy()) for name, change in changes.items()})


def put(place, value):
    def change(x):
        x[place] = value
        return x

    return change


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"kv_order": put(0, -1)}, ValueError, "kv_order has key -1 at place 0 of list 0, order head 0"),
        ({"kv_order": put(20, 48)}, ValueError, "key 48 at place 4 of list 1, order head 0; allowed: 0 to 47"),
        (
            {"kv_order": put(slice(144, 146), 7)},
            ValueError,
            "repeats key 7 in list 0, order head 1; allowed: each once",
        ),
        ({"kv_order": lambda x: x[:-1]}, ValueError, "end to end from 0 to kv_order's length 287"),
        ({"kv_order": lambda x: x.astype(np.int64)}, TypeError, "kv_order is ndarray of int64; allowed: numpy int32"),
        ({"kv_order": lambda x: x[None]}, ValueError, r"kv_order has shape \(1, 288\)"),
        ({"kv_order": lambda x: x.tolist()}, TypeError, "kv_order is list"),
        ({"kv_offsets": put((0, 0, 1), 17)}, ValueError, "list 0 of order head 0 17 keys; allowed: 0 to 16"),
        ({"kv_offsets": put((0, 0, 1), -3)}, ValueError, "list 0 of order head 0 -3 keys"),
        ({"kv_offsets": lambda x: x + 1}, ValueError, "end to end from 0"),
        ({"kv_offsets": lambda x: x[:, :, :-1]}, ValueError, r"kv_offsets has shape \(1, 2, 3\); allowed: \(1, 2, 4\)"),
        ({"kv_offsets": lambda x: x.astype(np.int32)}, TypeError, "kv_offsets is ndarray of int32"),
        (
            {"query_order": put((0, 1, 40), 5)},
            ValueError,
            "query_order of head 1 does not permute the rows of segment 1",
        ),
        ({"query_order": lambda x: x[:, :1]}, ValueError, r"query_order has shape \(1, 1, 80\)"),
        ({"query_order": lambda x: x.astype(np.int64)}, TypeError, "query_order is ndarray of int64"),
        ({"query_order": lambda x: x[..., ::-1].copy()}, ValueError, "query_order of head 0 does not permute"),
        ({"kv_order": lambda x: x[None]}, ValueError, r"kv_order has shape \(1, \d+\); allowed: \(any length,\)"),
        ({"kv_order": lambda x: np.repeat(x, 2)[::2]}, ValueError, r"kv_order has strides \(8,\); allowed: a C-contig"),
        ({"kv_offsets": lambda x: np.repeat(x, 2, -1)[..., ::2]}, ValueError, "kv_offsets has strides"),
        ({"query_order": lambda x: np.repeat(x, 2, -1)[..., ::2]}, ValueError, "query_order has strides"),
    ],
)
def test_validate_finds(changes, error, message):
    plan = broken(made(SMALL.replace(query_order="guide")), **changes)
    with pytest.raises(error, match=message):
        plan.validate()
    q, k, _ = heads()
    arrays = {name: getattr(plan, name) for name in ("kv_order", "kv_offsets", "query_order")}
    with pytest.raises(error, match=message):
        Plan.from_arrays(q, k, plan.settings, **arrays)
    assert Plan.from_arrays(q, k, plan.settings, **arrays, validate=False).settings is plan.settings


@given(cases())
def test_every_plan_is_valid(case):
    plan = s2o.plan(case.q, case.k, case.settings)
    assert plan.validate() is plan


# --- a plan of one's own ---------------------------------------------------------------------
@given(cases(min_keys=40), st.integers(0, 2**32 - 1))
def test_lists_of_any_length_and_order(backend, case, seed):
    """What a list leaves out goes to the tail; density counts what was walked, whatever `cap` says."""
    rng, p = np.random.default_rng(seed), case.problem
    lists = [
        rng.permutation(int(p.history[s]))[: rng.integers(p.history[s] + 1)].astype(np.int32)
        for _, _, s in np.ndindex(p.batch, p.heads_order, p.segments)
    ]
    steps = np.array([len(x) for x in lists]).reshape(p.batch * p.heads_order, p.segments)
    offsets = np.concatenate([[0], np.cumsum(steps)])[: -1 if p.segments else None].reshape(steps.shape)
    ends = offsets[:, -1:] + steps[:, -1:]
    offsets = np.concatenate([offsets, ends], axis=1).reshape(p.batch, p.heads_order, -1)
    order = np.concatenate(lists)
    q, k = map(backend.to_device, case.arrays[:2])
    device = [backend.to_device(x) for x in (order, offsets)]
    plan = Plan.from_arrays(q, k, case.settings, kv_order=device[0], kv_offsets=device[1])
    result = backend.attend(case, plan)
    properties.judge_against_reference(backend, case, result, order, offsets, None)
    walked = np.minimum(
        result.stats.tiles * p.settings.block_k,
        steps.reshape(p.batch, p.heads_order, -1).repeat(p.heads_q // p.heads_order, axis=1)[:, :, p.tile_segment],
    )
    pairs = p.window_pairs.sum() + ((walked + result.stats.tail_blocks) * p.tile_rows).sum(axis=-1)
    np.testing.assert_allclose(result.stats.head_density, pairs / p.allowed_pairs)


def test_attend_may_change_what_stage_three_reads():
    q, k, v = heads()
    plan = made(SMALL.replace(tau=1.0))
    changed = s2o.attend(q, k, v, plan, tau=0.0, tail=None, block_q=8, block_k=4, full_output=True)
    assert (changed.settings.tau, changed.settings.tail, changed.plan) == (0.0, None, plan)
    assert changed.stats.tiles.shape == (1, 2, 10)
    assert changed.stats.density == 1
    assert s2o.attend(q, k, v, plan, full_output=True).settings == plan.settings


@pytest.mark.parametrize("name", ["segment", "pool", "rank", "cap", "causal", "scale", "share_order", "colour"])
def test_attend_refuses_what_a_plan_fixes(name):
    with pytest.raises(TypeError, match=f"attend got {name!r}, which a plan fixes or nobody knows; allowed: tau, tail"):
        s2o.attend(*heads(), made(), **{name: 1})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_q": 79}, "plan was made for n_q 80; the arrays have 79"),
        ({"n_k": 101}, "plan was made for n_k 100; the arrays have 101"),
        ({"heads_q": 3}, "plan was made for heads_q 2; the arrays have 3"),
        ({"heads_kv": 2}, "plan was made for heads_kv 1; the arrays have 2"),
        ({"dim": 5}, "plan was made for dim_qk 4; the arrays have 5"),
    ],
)
def test_attend_refuses_other_shapes(sizes, message):
    with pytest.raises(ValueError, match=message):
        s2o.attend(*heads(**sizes), made())


def test_attend_refuses_what_is_no_plan():
    with pytest.raises(TypeError, match="plan is a dict; allowed: a Plan"):
        s2o.attend(*heads(), {})


def test_plan_is_the_reference_plan_in_float64():
    q, k, _ = (x.astype(np.float64) for x in heads())
    plan = s2o.plan(q, k, SMALL.replace(rank="mean", query_order="guide"))
    order, offsets, rows = reference.plan(make_problem(q, k, None, plan.settings), q, k)
    np.testing.assert_array_equal(plan.kv_order, order)
    np.testing.assert_array_equal(plan.kv_offsets, offsets)
    np.testing.assert_array_equal(plan.query_order, rows)
