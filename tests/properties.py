"""The facts every backend must keep (docs/design.md section 2), as functions of a backend and a case.

Each function takes a `Backend` and a `strategies.Case`, runs the public API, and asserts one fact.
`test_properties.py` runs all of them on every backend of the `backend` fixture (conftest.py). To reuse
one elsewhere, in ``tests/gpu`` for example (its conftest and modules import from here by plain name, and
need file names that ``tests/`` does not have)::

    from properties import CUDA, reaches_the_reference
    from strategies import cases

    @given(cases(dtypes=("float16",), causal=True))
    def test_something(case):
        reaches_the_reference(CUDA, case)

A new backend is one `Backend`: how arrays reach it, and its unit of rounding by input dtype.
"""

from dataclasses import dataclass, replace

import numba
import numpy as np
import rounding
from hypothesis import assume

import s2o_cupy as s2o
from s2o_cupy import backends, reference
from s2o_cupy.specialisations import SM90_HEAD_DIMS

# Unit of rounding of what a backend computes from inputs of a dtype. The CPU computes float16 and bfloat16 in
# float32 and rounds the output once at the end (OUTPUT); tensor cores read P in the input's own type.
CPU_UNIT = {"float16": 2.0**-23, "bfloat16": 2.0**-23, "float32": 2.0**-23, "float64": 2.0**-51}
CUDA_UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-23, "float64": 2.0**-51}
OUTPUT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


@dataclass(frozen=True)
class Backend:
    """A backend's name, its units of rounding, and how arrays get there and back."""

    name: str
    unit: dict

    def __str__(self) -> str:
        return self.name

    def missing(self) -> str:
        """Why it cannot run here; empty when it can."""
        works, why = backends.status().get(self.name, (False, f"s2o_cupy has no backend {self.name!r} yet"))
        if works and self.name == "numba" and not self.on_host and np.lib.NumpyVersion(np.__version__) >= "2.5.0":
            return f"NumPy is {np.__version__}, whose warnings numba-cuda sets off: pip install 'numpy<2.5'"
        return "" if works else why

    @property
    def on_host(self) -> bool:
        """Whether it takes NumPy arrays: the Numba CUDA kernels do so in Numba's simulator."""
        return self.name == "cpu" or (self.name == "numba" and bool(numba.config.ENABLE_CUDASIM))

    def to_device(self, x):
        """A NumPy array's values where the backend wants them, strides kept."""
        if self.on_host or x is None:
            return x
        import cupy

        x = self.readable(x)
        base = x if x.base is None else x.base
        moved = cupy.asarray(base)
        start = x.__array_interface__["data"][0] - base.__array_interface__["data"][0]
        return cupy.ndarray(x.shape, x.dtype, moved.data + start, strides=x.strides)

    def readable(self, x):
        """An array's values in a view that the backend takes: where the last axis has gaps, one without."""
        if self.name != "cuda" or x.ndim < 4 or x.shape[-1] == 1 or x.strides[-1] == x.itemsize:
            return x
        view = np.empty((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1]), x.dtype)[..., ::-2, :]
        view[...] = x
        return view

    def to_host(self, x):
        return x if x is None or isinstance(x, np.ndarray) else x.get()

    # --- calls: NumPy in, NumPy out, whatever lies between ------------------------------------
    def plan(self, case, **changes):
        q, k = map(self.to_device, case.arrays[:2])
        return s2o.plan(q, k, case.settings, backend=self.name, **changes)

    def attend(self, case, plan, **changes):
        q, k, v = map(self.to_device, case.arrays)
        return self._host(s2o.attend(q, k, v, plan, backend=self.name, full_output=True, **changes))

    def ranked(self, case, **changes):
        """The ranked path, which `attention` does not take at small shapes."""
        return self.attend(case, self.plan(case, **changes))

    def attention(self, case, **keywords):
        q, k, v = map(self.to_device, case.arrays)
        return self._host(s2o.attention(q, k, v, case.settings, backend=self.name, full_output=True, **keywords))

    def dense(self, case):
        q, k, v = map(self.to_device, case.arrays)
        mask = {name: getattr(case.settings, name) for name in ("causal", "window", "scale")}
        return self._host(s2o.dense_attention(q, k, v, **mask, backend=self.name, full_output=True))

    def _host(self, result):
        numbers = {name: self.to_host(getattr(result.stats, name)) for name in ("tiles", "tail_blocks", "tail_mass")}
        stats = replace(result.stats, **numbers)
        return replace(result, out=self.to_host(result.out), lse=self.to_host(result.lse), stats=stats)


CPU = Backend("cpu", CPU_UNIT)
CUDA = Backend("cuda", CUDA_UNIT)
NUMBA = Backend("numba", CPU_UNIT)


# --- tolerances ------------------------------------------------------------------------------
def wide(*arrays):
    return tuple(np.asarray(x, np.float64) for x in arrays)


def logit_size(case) -> float:
    """The greatest logit with the sizes of its terms added up, finite ones alone."""
    q, k = map(np.abs, wide(*case.arrays[:2]))
    greatest, group = 0.0, case.problem.group
    with np.errstate(all="ignore"):
        for b, h in np.ndindex(q.shape[:2]):  # one head at a time: all of them can take gigabytes
            sizes = q[b, h] @ k[b, h // group].T
            greatest = max(greatest, sizes.max(initial=0, where=np.isfinite(sizes)))
    return case.problem.scale * greatest


def logit_error(backend, case, size=None) -> float:
    """Bound on the error of a logit, of a row's log mass and of the relative error of a weight.

    A product of D terms, added in turn, is right to a few units of the sum of the terms' sizes, times the square
    root of D; a sum of exponentials, an exponential and a logarithm to a few units of 1. `size` is `logit_size`.
    """
    steps = max(1, np.sqrt(case.problem.dim_qk) / 2)
    return 4 * backend.unit[case.q.dtype.name] * (8 + steps * (logit_size(case) if size is None else size))


def out_error(backend, case, expected, size=None):
    """Bound on the error of out: that of the weights on the greatest value, and one rounding to the output type."""
    (v,) = wide(case.v)
    greatest = np.abs(v[np.isfinite(v)]).max(initial=0)
    unit = OUTPUT[case.q.dtype.name]
    return 2 * logit_error(backend, case, size) * greatest + unit * np.abs(expected) + 1e-7 * unit


def assert_near(got, expected, error):
    """Within `error`, with NaN and infinities in the same places."""
    got, expected = wide(got, expected)
    assert got.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    with np.errstate(invalid="ignore"):
        off = np.where((got == expected) | np.isnan(expected), 0, np.abs(got - expected))
    excess = off - np.nan_to_num(error, nan=0, posinf=0)
    assert (excess <= 0).all(), f"off by {off.max()}, {excess.max()} too much"


def assert_same(one, other):
    """Two results bitwise equal."""
    for a, b in ((one.out, other.out), (one.lse, other.lse)):
        np.testing.assert_array_equal(a.astype(np.float64), b.astype(np.float64))
    for name in ("tiles", "tail_blocks", "tail_mass"):
        np.testing.assert_array_equal(getattr(one.stats, name), getattr(other.stats, name))


def rows_of(result, index):
    """out and lse of some rows, as float64."""
    return result.out[index].astype(np.float64), result.lse[index].astype(np.float64)


# --- facts -----------------------------------------------------------------------------------
def tau_zero_is_dense(backend, case):
    result, exact = backend.ranked(case, tau=0, cap=1), backend.dense(case)
    out, lse = reference.dense(case.problem, *case.arrays)
    for answer in (result, exact):
        assert_near(answer.out, out, out_error(backend, case, out))
        assert_near(answer.lse, lse, logit_error(backend, case) + OUTPUT["float32"] * np.abs(lse))
        assert answer.stats.density == 1
        assert not answer.stats.tail_mass.any()


def work_falls_with_tau(backend, case):
    plan = backend.plan(case)
    results = [backend.attend(case, plan, tau=tau) for tau in (0, 1e-3, 0.03, 0.3, 2)]
    for less, more in zip(results[1:], results):
        assert (less.stats.tiles <= more.stats.tiles).all()
        assert (less.stats.head_density <= more.stats.head_density).all()


def workspace_does_not_matter(backend, case):
    """`attention` in many slabs, in one, and `plan` then `attend`: bitwise the same."""
    whole = backend.attention(case)
    assert whole.stats.path == "ranked"
    assert_same(backend.ranked(case), whole)
    for workspace in (1, 20_000, 150_000):
        assert_same(backend.attention(case, workspace=workspace), whole)


def later_keys_do_not_matter(backend, case, seed):
    """Causal: rows up to a position are bitwise the same after every later key and value changed."""
    rng = np.random.default_rng(seed)
    row = int(rng.integers(case.problem.n_q))
    case, changed = compared(backend, case)
    for x in (changed.k, changed.v):
        later = x[:, :, row + case.problem.shift + 1 :]
        later[...] = (rng.choice([1.0, 30.0]) * rng.standard_normal(later.shape)).astype(x.dtype)
    seen = np.s_[:, :, : row + 1]
    before, after = backend.ranked(case), backend.ranked(changed)
    for a, b in zip(rows_of(before, seen), rows_of(after, seen)):
        np.testing.assert_array_equal(a, b)


def keys_before_the_window_do_not_matter(backend, case, seed, bad):
    """Rows from one on are bitwise the same after every key and value that lies before its window became `bad`."""
    row = int(np.random.default_rng(seed).integers(case.problem.n_q))
    case, changed = compared(backend, case)
    for x in (changed.k, changed.v):
        x[:, :, : max(row + case.problem.shift + 1 - case.settings.window, 0)] = bad
    seen = np.s_[:, :, row:]
    for call in (backend.ranked, backend.dense):
        for a, b in zip(rows_of(call(case), seen), rows_of(call(changed), seen)):
            np.testing.assert_array_equal(a, b)


def out_lies_within_the_values(backend, case):
    out = backend.ranked(case).out.astype(np.float64)
    p = case.problem
    v = np.repeat(case.v.astype(np.float64), p.group, axis=1)
    last = np.arange(p.n_q) + p.shift if case.settings.causal else np.full(p.n_q, p.n_k - 1)
    seen = [v[:, :, max(i + 1 - p.window, 0) : i + 1] for i in last]
    low, high = (np.stack([extreme(x, axis=2) for x in seen], axis=2) for extreme in (np.min, np.max))
    name = case.q.dtype.name
    slack = (32 * backend.unit[name] + OUTPUT[name]) * np.abs(v).max()
    assert (out >= low - slack).all()
    assert (out <= high + slack).all()


def heads_and_batches_are_independent(backend, case, seed):
    """Bitwise the same after everything in one other K/V head (and its group) or batch entry changed."""
    rng, p = np.random.default_rng(seed), case.problem
    b, kv = int(rng.integers(p.batch)), int(rng.integers(p.heads_kv))
    case, changed = compared(backend, case)
    for x, heads in zip((changed.q, changed.k, changed.v), (p.group, 1, 1)):
        mine = x[b, kv * heads : (kv + 1) * heads]
        mine[...] = (2 * rng.standard_normal(mine.shape)).astype(x.dtype)
    others = np.ones((p.batch, p.heads_q), bool)
    others[b, kv * p.group : (kv + 1) * p.group] = False
    assert_others_same(backend, case, changed, others)


def query_heads_are_independent(backend, case, seed):
    """Without a shared order, a query head does not read the others of its group."""
    rng, p = np.random.default_rng(seed), case.problem
    head = int(rng.integers(p.heads_q))
    case, changed = compared(backend, case)
    changed.q[:, head] = (2 * rng.standard_normal(changed.q[:, head].shape)).astype(changed.q.dtype)
    others = np.ones((p.batch, p.heads_q), bool)
    others[:, head] = False
    assert_others_same(backend, case, changed, others)


def assert_others_same(backend, case, changed, others):
    before, after = backend.ranked(case), backend.ranked(changed)
    for a, b in zip(rows_of(before, others), rows_of(after, others)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(before.stats.tiles[others], after.stats.tiles[others])


def runs_agree_bitwise(backend, case):
    assert_same(backend.ranked(case), backend.ranked(case))


def strides_do_not_matter(backend, case):
    """Bitwise; but on Hopper one kernel serves rows that start on 16 bytes and another the rest: there, to rounding."""
    if copy_has_another_kernel(backend, case):
        return reaches_the_reference(backend, case)
    plain = case.copy()
    assert_same(backend.ranked(case), backend.ranked(plain))
    assert_same(backend.dense(case), backend.dense(plain))


def copy_has_another_kernel(backend, case) -> bool:
    """Whether rows lie off 16 bytes that, copied, would be the Hopper kernel's: the answers then differ by rounding."""
    dims = case.problem.dim_qk, case.problem.dim_v
    odd = not all(on_16_bytes(backend.readable(x)) for x in case.arrays)
    return backend.name == "cuda" and dims in SM90_HEAD_DIMS and odd


def compared(backend, case):
    """The case, and a copy to change that is bitwise comparable with it."""
    return case.copy() if copy_has_another_kernel(backend, case) else case, case.copy()


def on_16_bytes(x) -> bool:
    """Whether every row of four axes starts on 16 bytes, counted from where its base starts."""
    base = x if x.base is None else x.base
    start = x.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    return start % 16 == 0 and all(s % 16 == 0 or n == 1 for s, n in zip(x.strides[:3], x.shape[:3]))


def reaches_the_reference(backend, case):
    """Given one plan: out, lse, tiles, tail_blocks and tail_mass of the reference, to rounding."""
    ranked = case.problem.replace(rank="mean")  # any order will do, and this one is cheap
    order, offsets, rows = reference.plan(ranked, *case.arrays[:2])
    given = dict(zip(("kv_order", "kv_offsets", "query_order"), map(backend.to_device, (order, offsets, rows))))
    q, k = map(backend.to_device, case.arrays[:2])
    result = backend.attend(case, s2o.Plan.from_arrays(q, k, case.settings, **given))
    judge_against_reference(backend, case, result, order, offsets, rows)


def judge_against_reference(backend, case, result, order, offsets, rows):
    """Compare row tile by row tile; a stop may differ only where the reference's is undecided to rounding of tau."""
    p, tiles, error = case.problem, result.stats.tiles, logit_error(backend, case)
    open_tiles = np.ones(tiles.shape, bool)
    for nudge in (0, 4 * error, -min(4 * error, 1)):
        nudged = p.replace(tau=(p.tau * (1 + nudge)).tolist())
        answer = reference.attend(nudged, *case.arrays, order, offsets, rows)
        for b, h, tile in np.argwhere((answer.tiles == tiles) & open_tiles):
            open_tiles[b, h, tile] = False
            at = p.tile_start[tile] + np.arange(p.tile_rows[tile])
            place = b, h, at if rows is None else rows[b, h, at]
            assert_near(result.out[place], answer.out[place], out_error(backend, case, answer.out[place]))
            assert_near(result.lse[place], answer.lse[place], error + OUTPUT["float32"] * np.abs(answer.lse[place]))
            sound = np.isfinite(answer.lse[place])  # a NaN row's tail mass means nothing
            tail = result.stats.tail_mass[place][sound], answer.tail_mass[place][sound]
            assert_near(*tail, 2 * error + OUTPUT["float32"])
            assert result.stats.tail_blocks[b, h, tile] == answer.tail_blocks[b, h, tile]
        if not open_tiles.any():
            return
    raise AssertionError(f"row tiles {np.argwhere(open_tiles).tolist()} stopped elsewhere, far from tau")


def backends_agree(some, case, same_stops=0.999):
    """On one plan: nearly all row tiles stop at the same tile, and those agree to rounding."""
    plan = CPU.plan(case)
    results = []
    for backend in some:
        given = {name: getattr(plan, name) for name in ("kv_order", "kv_offsets", "query_order")}
        q, k = map(backend.to_device, case.arrays[:2])
        moved = {name: backend.to_device(x) for name, x in given.items()}
        results.append(backend.attend(case, s2o.Plan.from_arrays(q, k, case.settings, **moved)))
    p, first, size = case.problem, results[0], logit_size(case)
    tile_of_row = np.repeat(np.arange(len(p.tile_start)), p.tile_rows)
    for backend, result in zip(some[1:], results[1:]):
        same = result.stats.tiles == first.stats.tiles
        assert same.mean() >= same_stops, f"{backend}: {1 - same.mean():.5f} of the row tiles stop elsewhere"
        rows = np.take_along_axis(same, np.broadcast_to(tile_of_row, first.lse.shape), axis=2)
        if plan.query_order is not None:
            placed = np.empty_like(rows)
            np.put_along_axis(placed, plan.query_order, rows, axis=2)
            rows = placed
        error = logit_error(backend, case, size) + logit_error(some[0], case, size)
        assert_near(result.lse[rows], first.lse[rows], error + 2 * OUTPUT["float32"] * np.abs(first.lse[rows]))
        bound = sum(out_error(b, case, first.out.astype(np.float64), size) for b in (backend, some[0]))
        assert_near(result.out[rows], first.out[rows], bound[rows])
        together = rounding.miss(result.out[rows], first.out[rows], case.q.dtype.name)
        assert together <= rounding.TOLERANCE["rounded twice"][case.q.dtype.name], together
        np.testing.assert_array_equal(result.stats.tail_blocks[same], first.stats.tail_blocks[same])


def a_bad_query_stays_in_its_row(backend, case, seed, bad):
    """A non-finite query gives NaN in its own row; the others are what they are without its vote and its ranking."""
    rng, p = np.random.default_rng(seed), case.problem
    b, h, row = (int(rng.integers(n)) for n in (p.batch, p.heads_q, p.n_q))
    changed = case.copy()
    changed.q[b, h, row, rng.integers(p.dim_qk)] = bad
    result = backend.ranked(changed)
    nan_rows = np.zeros(result.lse.shape, bool)
    nan_rows[b, h, row] = True
    np.testing.assert_array_equal(np.isnan(result.out.astype(np.float64)).all(axis=-1), nan_rows)
    np.testing.assert_array_equal(np.isnan(result.out.astype(np.float64)).any(axis=-1), nan_rows)
    np.testing.assert_array_equal(np.isnan(result.lse), nan_rows)
    reaches_the_reference(backend, changed)


def a_bad_key_or_value_stays_with_rows_that_see_it(backend, case, seed, bad, which):
    rng, p = np.random.default_rng(seed), case.problem
    b, kv, key = (int(rng.integers(n)) for n in (p.batch, p.heads_kv, p.n_k))
    case, changed = compared(backend, case)
    x = getattr(changed, which)
    x[b, kv, key, rng.integers(x.shape[-1])] = bad
    may = np.zeros((p.batch, p.heads_q, p.n_q), bool)
    rows = slice(max(key - p.shift, 0), max(key - p.shift + p.window, 0)) if p.settings.causal else slice(None)
    may[b, kv * p.group : (kv + 1) * p.group, rows] = True
    for before, after in (
        (backend.ranked(case), backend.ranked(changed)),
        (backend.dense(case), backend.dense(changed)),
    ):
        for a, c in zip(rows_of(before, ~may), rows_of(after, ~may)):
            np.testing.assert_array_equal(a, c)


def rows_that_an_infinite_key_spoils_do_not_vote(backend, case, seed, bad):
    """An infinite key spoils rows of one sign and weighs nothing in the others, which stop as if alone."""
    rng, p = np.random.default_rng(seed), case.problem
    changed = case.copy()
    changed.k[0, 0, rng.integers(p.n_k), rng.integers(p.dim_qk)] = bad
    reaches_the_reference(backend, changed)


def ranks_as_the_reference(backend, case):
    """A plan's lists descend in the reference's score, to the scores' rounding and one quantised level."""
    p = case.problem
    # A query as near to one centre as to another joins either, by rounding; its group's scores then differ.
    ties = case.contents in ("ties", "equal", "constant") or p.dtype not in ("float32", "float64")
    assume(p.settings.rank != "mixture" or not ties)
    plan = backend.plan(case)
    order, offsets = backend.to_host(plan.kv_order), backend.to_host(plan.kv_offsets)
    q, k = wide(*case.arrays[:2])
    error = score_error(backend, case)
    for b, h, s in np.ndindex(p.batch, p.heads_order, p.segments):
        keys = order[slice(*offsets[b, h, s : s + 2])]
        assert len(keys) == p.listed[s] == len(np.unique(keys))
        if not len(keys):
            continue
        scores = reference.score(p, q, k, b, h, s)
        level = np.ptp(scores) / p.settings.rank_levels if p.settings.rank_levels else 0
        lowest = np.minimum.accumulate(scores[keys])
        best_left = np.append(np.maximum.accumulate(scores[keys][::-1])[::-1][1:], -np.inf)
        left_out = np.delete(scores, keys).max(initial=-np.inf)
        assert (np.maximum(best_left, left_out) - lowest).max() <= level + 2 * error


def score_error(backend, case) -> float:
    """Bound on the rounding of a score: its mean term, and its quadratic term when there is one."""
    q, k = wide(*case.arrays[:2])
    longest = np.sqrt((q**2).sum(-1).max() * (k**2).sum(-1).max()) * case.problem.scale
    unit = max(backend.unit["float32"], backend.unit[case.q.dtype.name])
    return 8 * unit * (1 + longest + (longest**2 if case.problem.terms else 0))


def guide_orders_as_the_reference(backend, case):
    """Queries of a segment descend in q . g, to rounding; a permutation of the segment's rows."""
    p = case.problem
    rows = backend.to_host(backend.plan(case).query_order)
    q, k = wide(*case.arrays[:2])
    size = p.settings.segment
    for b, h, s in np.ndindex(p.batch, p.heads_q, p.segments):
        part = rows[b, h, s * size : (s + 1) * size]
        np.testing.assert_array_equal(np.sort(part), np.arange(s * size, s * size + len(part)))
        history = k[b, h // p.group, : p.history[s]]
        key = q[b, h, part] @ history.mean(axis=0) if len(history) else np.zeros(len(part))
        sizes = (np.abs(q[b, h, part]) @ np.abs(history).sum(axis=0)).max() / max(len(history), 1)
        assert (np.diff(key) <= 64 * backend.unit["float32"] * sizes).all()


def exact_scores_order_bitwise(backend, scores, **settings):
    """With D = 1, queries of 1 and scale 1 the mean rank's scores are the keys: the order must be remap's, bitwise."""
    k = np.asarray(scores, np.float32)[None, None, :, None]
    settings = s2o.Settings(causal=False, scale=1.0, rank="mean", **settings)
    plan = s2o.plan(backend.to_device(np.ones_like(k[:, :, :1])), backend.to_device(k), settings, backend=backend.name)
    expected = reference.remap(k[0, 0, :, 0], plan.problem.listed[0], settings.rank_levels)
    np.testing.assert_array_equal(backend.to_host(plan.kv_order), expected)
