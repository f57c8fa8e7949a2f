"""Stage 1 on the CPU for the mixture rank: centres of a segment's queries, their normalisers, the scores of keys."""

import numpy as np

from s2o_cupy.backends._lanes import (
    BYTES,
    add,
    exp2,
    fill,
    inner,
    kernel,
    larger,
    load,
    muladd,
    multiply,
    product_4,
    select_le,
    spread,
    store,
    subtract,
)
from s2o_cupy.backends._ranking import ROWS
from s2o_cupy.backends._storage import pack_rows

_LOG2E = np.log2(np.e)


@kernel
def centre_queries(pack, q, rep, variance, share, b, first_head, heads, first, rows, terms, scale):
    """Centres and variance of one list's queries, in log2 units; docs/design.md section 2.1.

    q [B, Hq, Nq, D] storage type; written: rep [whole blocks of `terms`, D], variance [D] and share [rows of rep]
    (log2 of a centre's part of the queries, -inf where it has none), compute type.
    """
    dim, found = rep.shape[1], 0
    row, x = np.zeros(dim, rep.dtype), np.zeros((heads * rows, dim))
    nothing = np.empty(0, np.int32)
    for h in range(first_head, first_head + heads):
        for i in range(first, first + rows):
            pack_rows(pack, q, b, h, nothing, i, 1, row, 0, dim)
            if np.isfinite(row).all():
                x[found] = row
                found += 1
    rep[:], variance[:], share[:] = 0, 0, -np.inf
    if not found:
        share[0] = 0
        return
    terms = min(terms, found)
    centre = np.empty((terms, dim))
    for c in range(terms):
        centre[c] = x[c * found // terms + found // (2 * terms)]
    group = _nearest(x[:found], centre)
    count = np.zeros(terms, np.int64)
    for i in range(found):
        if not count[group[i]]:
            centre[group[i]] = 0
        count[group[i]] += 1
        centre[group[i]] += x[i]
    for c in range(terms):
        centre[c] /= max(count[c], 1)
        rep[c] = centre[c] * (scale * _LOG2E)
        share[c] = np.log2(count[c] / found)
    around = np.zeros(dim)
    for i in range(found):
        around += (x[i] - centre[group[i]]) ** 2
    variance[:] = around * (scale * scale / 2 * _LOG2E / found)


@inner
def _nearest(x, centre):
    """For each row of x (n, D) the nearest row of centre (terms, D), ties to the smaller index."""
    columns, half = np.ascontiguousarray(centre.T), (centre**2).sum(axis=1) / 2
    group, near = np.empty(x.shape[0], np.int64), np.empty(centre.shape[0])
    for i in range(x.shape[0]):
        near[:] = -half
        for d in range(x.shape[1]):
            for c in range(near.size):
                near[c] += x[i, d] * columns[d, c]
        group[i] = near.argmax()
    return group


@inner
def _pack_panels(pack, k, b, h, key, n, like):
    """n keys as ``panels[panel, D, width]``, a flat array of the type of `like`."""
    dim, width, nothing = k.shape[3], BYTES // like.itemsize, np.empty(0, np.int32)
    rows, panels = np.zeros(n * dim, like.dtype), np.zeros(-(-n // width) * dim * width, like.dtype)
    pack_rows(pack, k, b, h, nothing, key, n, rows, 0, dim)
    for i in range(n):
        for d in range(dim):
            panels[(i // width * dim + d) * width + i % width] = rows[i * dim + d]
    return panels


@inner
def _logits(flat, row, rows, dim, variance, index, panels, at, part, to):
    """part[to + r * width] = the logits of the panel at `at` by the centres from `row` on, rows of them."""
    width = BYTES // flat.itemsize
    square = fill(flat, 0.0)
    for d in range(dim):
        number = load(panels, at + d * width)
        square = muladd(multiply(number, number), spread(variance, index * dim + d), square)
    for r in range(0, rows, ROWS):
        product_4(flat, (row + r) * dim, dim, 1, dim, panels, at, part, to + r * width, part, 0)
    for r in range(rows):
        store(part, to + r * width, add(load(part, to + r * width), square))


@kernel
def sum_keys(pack, k, rep, variance, history, sums, chunk, b, h, list_first, lists, segments, key, n):
    """log2 of each centre's sum over keys key .. key + n, in every list of one K/V head.

    rep [lists, rows, D], variance [lists, D]; sums [chunks, lists, rows] written at `chunk`, -inf past a history.
    """
    dim, rows, width = k.shape[3], rep.shape[1], BYTES // rep.itemsize
    flat, weights = rep.reshape(-1), variance.reshape(-1)
    panels = _pack_panels(pack, k, b, h, key, n, flat)
    part, ends = np.zeros(-(-n // width) * rows * width, rep.dtype), np.zeros(width, rep.dtype)
    for index in range(list_first, list_first + lists):
        seen = min(n, history[(index - list_first) % segments] - key)
        sums[chunk, index] = -np.inf
        if seen <= 0:
            continue
        for at in range(0, seen, width):
            _logits(flat, index * rows, rows, dim, weights, index, panels, at * dim, part, at * rows)
        for i in range(seen, -(-seen // width) * width):
            for r in range(rows):
                part[i // width * rows * width + r * width + i % width] = -np.inf
        for r in range(rows):
            most, total = fill(flat, -np.inf), fill(flat, 0.0)
            for at in range(0, seen, width):
                most = larger(load(part, at * rows + r * width), most)
            store(ends, 0, most)
            top = ends.max()
            frame = top if np.isfinite(top) else 0.0
            most = fill(flat, frame)
            for at in range(0, seen, width):
                total = add(total, exp2(subtract(load(part, at * rows + r * width), most)))
            store(ends, 0, total)
            sums[chunk, index, r] = frame + np.log2(ends.sum())


@kernel
def score_keys(pack, k, rep, variance, history, offset, scores, b, h, list_first, lists, segments, key, n):
    """Scores of keys key .. key + n in every list of one K/V head.

    offset [lists, rows]: share - 2 * normaliser, log2; scores [lists, width] float32, natural log, written up to
    each history.
    """
    dim, rows, width = k.shape[3], rep.shape[1], BYTES // rep.itemsize
    flat, weights, offsets = rep.reshape(-1), variance.reshape(-1), offset.reshape(-1)
    panels = _pack_panels(pack, k, b, h, key, n, flat)
    part, ends = np.zeros(rows * width, rep.dtype), np.zeros(2 * width, rep.dtype)
    two, none = fill(flat, 2.0), fill(flat, -np.inf)
    for index in range(list_first, list_first + lists):
        seen = min(n, history[(index - list_first) % segments] - key)
        for at in range(0, seen, width):
            _logits(flat, index * rows, rows, dim, weights, index, panels, at * dim, part, 0)
            most, total = none, fill(flat, 0.0)
            for r in range(rows):
                x = muladd(load(part, r * width), two, spread(offsets, index * rows + r))
                store(part, r * width, x)
                most = larger(x, most)
            safe = select_le(most, none, fill(flat, 0.0), most)
            for r in range(rows):
                total = add(total, exp2(subtract(load(part, r * width), safe)))
            store(ends, 0, safe)
            store(ends, width, total)
            for i in range(min(width, seen - at)):
                scores[index, key + at + i] = (ends[i] + np.log2(ends[width + i])) * np.float32(0.5 / _LOG2E)
