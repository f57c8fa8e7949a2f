"""Stages 1 and 2 on the CPU: a segment's representatives, the scores of keys, and their order."""

import numpy as np

from s2o_cupy.backends._lanes import (
    BYTES,
    ROWS,
    fetch_lanes,
    fill,
    inner,
    kernel,
    larger,
    load,
    muladd,
    product,
    product_onto_4,
    select_le,
    store,
    subtract,
)
from s2o_cupy.backends._tiles import pack_rows

# Queries, and keys, packed at a time.
CHUNK = 512


@inner
def _pack_queries(pack, q, b, h, first, n, mean, row, chunk):
    """Pack the finite ones of n query rows, less the mean, as ``chunk[column panel, row, column]``; how many."""
    nothing, dim, width = np.empty(0, np.int32), q.shape[3], BYTES // row.itemsize
    kept = 0
    for i in range(first, first + n):
        pack_rows(pack, q, b, h, nothing, i, 1, row, 0, dim)
        total = row.dtype.type(0)
        for d in range(dim):
            total += row[d] * 0
        if total == 0:
            for d in range(0, dim, width):
                at = (d // width * CHUNK + kept) * width
                for c in range(width):
                    chunk[at + c] = row[d + c] - mean[d + c]
            kept += 1
    return kept


@inner
def _moments(pack, q, b, first_head, heads, first, rows, gaussian, mean, cov):
    """Mean (padded D) and covariance (D, D) of the finite rows of some heads; float64, written."""
    dim, width = q.shape[3], BYTES // cov.itemsize
    panels = mean.size // width
    chunk, row = np.zeros(CHUNK * mean.size, cov.dtype), np.zeros(mean.size, cov.dtype)
    sums = np.zeros(panels * mean.size * width, cov.dtype)
    one, total = np.ones(width, cov.dtype), 0
    zero = np.zeros(mean.size)
    for h in range(first_head, first_head + heads):
        for at in range(first, first + rows, CHUNK):
            n = _pack_queries(pack, q, b, h, at, min(CHUNK, first + rows - at), zero, row, chunk)
            total += n
            for p in range(panels):
                for i in range(n):
                    for c in range(width):
                        mean[p * width + c] += chunk[(p * CHUNK + i) * width + c]
    for d in range(dim):
        mean[d] /= max(total, 1)
    if not gaussian:
        return
    for h in range(first_head, first_head + heads):
        for at in range(first, first + rows, CHUNK):
            n = _pack_queries(pack, q, b, h, at, min(CHUNK, first + rows - at), mean, row, chunk)
            # sums[right panel, row d, column]: the rows d of a left panel times a right panel.
            for right in range(panels):
                for d in range(0, mean.size, 4):
                    left = d // width * CHUNK * width + d % width
                    target = (right * mean.size + d) * width
                    product_onto_4(chunk, left, 1, width, n, chunk, right * CHUNK * width, sums, target, one, 0)
    for i in range(dim):
        for j in range(dim):
            cov[i, j] = sums[(j // width * mean.size + i) * width + j % width] / max(total, 1)


@inner
def _root(a, f):
    """Rows f with ``sum of outer(f, f) = a`` for a positive semidefinite a (n, n): Cholesky, greatest pivot first."""
    n = a.shape[0]
    rest, least = np.empty(n), 0.0
    for i in range(n):
        rest[i] = a[i, i]
        least = max(least, 1e-7 * rest[i])
    for j in range(n):
        pivot = 0
        for i in range(n):
            if rest[i] > rest[pivot]:
                pivot = i
        if not rest[pivot] > least:
            f[j:] = 0
            return
        for c in range(n):
            f[j, c] = a[pivot, c]
        for i in range(j):
            for c in range(n):
                f[j, c] -= f[i, pivot] * f[i, c]
        size = np.sqrt(rest[pivot])
        for c in range(n):
            f[j, c] /= size
            rest[c] -= f[j, c] * f[j, c]
        rest[pivot] = 0


@inner
def _dot(a, b):
    """Inner product in eight partial sums."""
    part = np.zeros(8)
    n = a.size // 8 * 8
    for i in range(0, n, 8):
        for c in range(8):
            part[c] += a[i + c] * b[i + c]
    total = part.sum()
    for i in range(n, a.size):
        total += a[i] * b[i]
    return total


@inner
def _subspace(cov, basis):
    """Orthonormal rows (terms, D) spanning the columns of cov at its `terms` largest variances; Gram-Schmidt."""
    dim = cov.shape[0]
    used = np.zeros(dim, np.bool_)
    for j in range(basis.shape[0]):
        axis = -1
        for d in range(dim):
            if not used[d] and (axis < 0 or cov[d, d] > cov[axis, axis]):
                axis = d
        used[axis] = True
        for d in range(dim):
            basis[j, d] = cov[axis, d]
        size = _dot(basis[j], basis[j])
        for i in range(2 * j):  # twice is enough (Kahan, Parlett)
            part = _dot(basis[i % j], basis[j])
            for d in range(dim):
                basis[j, d] -= part * basis[i % j, d]
        rest = _dot(basis[j], basis[j])
        inverse = 1 / np.sqrt(rest) if rest > 1e-18 * size else 0.0
        for d in range(dim):
            basis[j, d] *= inverse


@kernel
def represent(pack, q, rep, b, first_head, heads, first, rows, terms, scale):
    """Mean query and covariance factors of one list.

    q [B, Hq, Nq, D] storage type; rep [whole blocks of 1 + terms, D] compute type, written, rows past it zero.
    """
    dim = rep.shape[1]
    mean = np.zeros(-(-dim * rep.itemsize // BYTES) * (BYTES // rep.itemsize))
    cov = np.zeros((dim, dim), rep.dtype)
    _moments(pack, q, b, first_head, heads, first, rows, terms > 0, mean, cov)
    basis, inner_cov = np.zeros((terms, dim)), np.zeros((terms, terms))
    root = np.zeros((terms, terms))
    if 0 < terms < dim:
        _subspace(cov, basis)
        half = np.zeros((terms, dim))
        for i in range(terms):
            for j in range(dim):
                for d in range(dim):
                    half[i, d] += basis[i, j] * cov[j, d]
            for j in range(terms):
                inner_cov[i, j] = _dot(half[i], basis[j])
    elif terms:
        for i in range(dim):
            basis[i, i] = 1
            for j in range(dim):
                inner_cov[i, j] = cov[i, j]
    _root(inner_cov, root)
    for d in range(dim):
        rep[0, d] = mean[d] * scale
    row = np.empty(dim)
    for i in range(terms):
        row[:] = 0
        for j in range(terms):
            for d in range(dim):
                row[d] += root[i, j] * basis[j, d]
        for d in range(dim):
            rep[1 + i, d] = row[d] * (scale / np.sqrt(2.0))
    rep[1 + terms :] = 0


@kernel
def score_keys(pack, k, rep, history, scores, b, h, list_first, orders, segments, key, n):
    """Scores of keys key .. key + n in every list of one K/V head.

    k [B, Hkv, Nk, D] storage type; rep [lists, rows, D] compute type; history [segments] int64;
    scores [lists, width] float32, written up to each history.
    """
    dim, rows, width = k.shape[3], rep.shape[1], BYTES // rep.itemsize
    flat = rep.reshape(-1)
    row, panels = np.zeros(dim, rep.dtype), np.zeros(-(-n // width) * dim * width, rep.dtype)
    nothing = np.empty(0, np.int32)
    for i in range(n):
        pack_rows(pack, k, b, h, nothing, key + i, 1, row, 0, dim)
        for d in range(dim):
            panels[(i // width * dim + d) * width + i % width] = row[d]
    part = np.zeros(rows * width, rep.dtype)
    for o in range(orders):
        for s in range(segments):
            index = list_first + o * segments + s
            seen = min(n, history[s] - key)
            for at in range(0, seen, width):
                for r in range(0, rows, ROWS):
                    product(flat, (index * rows + r) * dim, dim, 1, dim, panels, at * dim, part, r * width, part, 0)
                total = load(part, 0)
                for r in range(1, rows):
                    x = load(part, r * width)
                    total = muladd(x, x, total)
                store(part, 0, total)
                for i in range(min(width, seen - at)):
                    scores[index, key + at + i] = part[i]


@kernel
def order_levels(scores, index, history, listed, levels, order, start):
    """Counting order of one list by quantised score: order[start : start + listed], int32.

    scores [lists, width] float32; +inf first, levels, then -inf and NaN; ties by index.
    """
    s = scores[index]
    low, high = _finite_range(s, history)
    spread = high - low
    factor = np.float32(levels) / spread
    flat = not (spread > 0 and factor > 0 and factor < np.inf)
    bucket = np.empty(history, np.int32)
    slot = np.zeros(levels + 3, np.int64)
    for j in range(history):
        x = s[j]
        place = levels + 1
        if x <= np.float32(3.4028235e38) and x >= np.float32(-3.4028235e38):
            place = 1 if flat else 1 + min(levels - 1, np.int64((high - x) * factor))
        elif x > 0:
            place = 0
        bucket[j] = place
        slot[place + 1] += 1
    for place in range(levels + 2):
        slot[place + 1] += slot[place]
    for j in range(history):
        at = slot[bucket[j]]
        slot[bucket[j]] = at + 1
        if at < listed:
            order[start + at] = j


@inner
def _finite_range(s, n):
    """Least and greatest finite number of s[:n], float32; (inf, -inf) if there is none."""
    largest, none = fill(s, 3.4028235e38), fill(s, -np.inf)
    high, low, zero = none, none, fill(s, 0.0)
    width = BYTES // s.itemsize
    whole = n // width * width
    for j in range(0, whole, width):
        x = fetch_lanes(s, j * s.itemsize)
        high = larger(select_le(x, largest, x, none), high)
        x = subtract(zero, x)
        low = larger(select_le(x, largest, x, none), low)
    ends = np.empty(2 * width, s.dtype)
    store(ends, 0, high)
    store(ends, width, low)
    top, bottom = ends[:width].max(), -ends[width:].max()
    for j in range(whole, n):
        if np.isfinite(s[j]):
            top, bottom = max(top, s[j]), min(bottom, s[j])
    return bottom, top


@kernel
def order_exactly(scores, index, history, listed, order, start):
    """Descending order of one list by radix: order[start : start + listed], int32; ties by index."""
    bits = scores[index].view(np.uint32)
    keys, ids = np.empty((2, history), np.uint32), np.empty((2, history), np.int32)
    for j in range(history):
        x, word = scores[index, j], np.uint32(bits[j])
        if x == 0:
            word = np.uint32(0)
        if np.isnan(x) or x == -np.inf:
            keys[0, j] = np.uint32(0xFFFFFFFF)
        else:
            keys[0, j] = word if word >> 31 else ~word & np.uint32(0x7FFFFFFF)
        ids[0, j] = j
    side = 0
    for shift in (0, 11, 22):
        slot = np.zeros(2049, np.int64)
        for j in range(history):
            slot[((keys[side, j] >> shift) & 2047) + 1] += 1
        for place in range(2048):
            slot[place + 1] += slot[place]
        for j in range(history):
            place = (keys[side, j] >> shift) & 2047
            at = slot[place]
            slot[place] = at + 1
            keys[1 - side, at] = keys[side, j]
            ids[1 - side, at] = ids[side, j]
        side = 1 - side
    for j in range(listed):
        order[start + j] = ids[side, j]
