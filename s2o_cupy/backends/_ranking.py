"""Stages 1 and 2 on the CPU: a segment's representatives, the scores of keys, and their order."""

import numpy as np

from ._lanes import (
    BYTES,
    fetch_lanes,
    fill,
    inner,
    kernel,
    larger,
    load,
    muladd,
    product,
    product_onto,
    select_le,
    store,
    subtract,
)
from ._tiles import fetch_row, load_rows

# Queries, and keys, packed at a time.
CHUNK = 512


@inner
def _load_panels(x, b, h, first, n, target, rows, row):
    """Pack rows first .. first + n of ``x[b, h]`` as ``target[column panel, row, column]``, `rows` a panel."""
    width, dim = BYTES // target.itemsize, x.shape[3]
    start = b * x.strides[0] + h * x.strides[1] + first * x.strides[2]
    for i in range(n):
        fetch_row(x, start + i * x.strides[2], x.strides[3], dim, row, 0)
        for d in range(0, dim, width):
            store(target, (d // width * rows + i) * width, load(row, d))


@inner
def _finite_rows(chunk, n, rows, panels):
    """Move the finite rows of a packed chunk to its front, in order; how many."""
    width, kept = BYTES // chunk.itemsize, 0
    for i in range(n):
        finite = True
        for p in range(panels):
            for c in range((p * rows + i) * width, (p * rows + i + 1) * width):
                finite &= np.isfinite(chunk[c])
        if finite:
            for p in range(panels):
                store(chunk, (p * rows + kept) * width, load(chunk, (p * rows + i) * width))
            kept += 1
    return kept


@inner
def _moments(q, b, heads, first, rows, gaussian, like):
    """Mean (panels * width) float64 and covariance (D, panels * width), compute type, of the finite rows."""
    dim, width = q.shape[3], BYTES // like.itemsize
    panels = -(-dim // width)
    padded = panels * width
    chunk, row = np.zeros(CHUNK * padded, like.dtype), np.zeros(padded, like.dtype)
    mean, total, one = np.zeros(padded), 0, np.ones(width, like.dtype)
    cov = np.zeros((panels * dim, width), like.dtype)
    flat = cov.reshape(-1)
    for sweep in range(2 if gaussian else 1):
        for h in heads:
            for at in range(0, rows, CHUNK):
                n = min(CHUNK, rows - at)
                _load_panels(q, b, h, first + at, n, chunk, CHUNK, row)
                n = _finite_rows(chunk, n, CHUNK, panels)
                for p in range(panels):
                    for i in range(p * CHUNK * width, (p * CHUNK + n) * width):
                        if sweep:
                            chunk[i] -= mean[p * width + i % width]
                        else:
                            mean[p * width + i % width] += chunk[i]
                if not sweep:
                    total += n
                    continue
                for left in range(panels):
                    for right in range(panels):
                        count = min(width, dim - left * width)
                        product_onto(
                            count, chunk, left * CHUNK * width, 1, width, n, chunk, right * CHUNK * width,
                            flat, (right * dim + left * width) * width, one, 0, width,
                        )  # fmt: skip
        if not sweep:
            mean /= max(total, 1)
    square = np.zeros((dim, dim))
    for p in range(panels):
        n = min(width, dim - p * width)
        square[:, p * width : p * width + n] = cov[p * dim : (p + 1) * dim, :n] / like.dtype.type(max(total, 1))
    return mean[:dim], square


@inner(fastmath={"reassoc", "contract"})
def _root(a, scale):
    """Rows f with sum of outer products ``scale**2 * a`` for a positive semidefinite a: pivoted Cholesky."""
    n = a.shape[0]
    f = np.zeros((n, n))
    rest = np.diag(a).copy()
    least = 1e-7 * max(rest.max(), 0.0)
    for j in range(n):
        pivot = np.argmax(rest)
        if not rest[pivot] > least:
            break
        row = a[pivot].copy()
        for i in range(j):
            row -= f[i, pivot] * f[i]
        row /= np.sqrt(rest[pivot])
        f[j] = row
        rest -= row * row
        rest[pivot] = 0.0
    return f * scale


@inner(fastmath={"reassoc", "contract"})
def _subspace(cov, terms):
    """Orthonormal rows (terms, D) spanning the columns of cov at its `terms` largest variances."""
    variance = np.diag(cov).copy()
    basis = np.zeros((terms, cov.shape[0]))
    for j in range(terms):
        axis = np.argmax(variance)
        variance[axis] = -1.0
        row = cov[axis].copy()
        size = np.sqrt(np.sum(row * row))
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            for i in range(j):
                row -= np.sum(basis[i] * row) * basis[i]
        rest = np.sqrt(np.sum(row * row))
        if rest > 1e-9 * size:
            basis[j] = row / rest
    return basis


@inner
def _matmul(a, b):
    """a @ b for small matrices."""
    c = np.zeros((a.shape[0], b.shape[1]))
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            c[i] += a[i, j] * b[j]
    return c


@kernel
def represent(q, rep, b, first_head, heads, first, rows, scale):
    """Mean query and covariance factors of one list.

    q [B, Hq, Nq, D] storage type; rep [1 + terms, D] compute type, written.
    """
    terms = rep.shape[0] - 1
    mean, cov = _moments(q, b, range(first_head, first_head + heads), first, rows, terms > 0, rep.reshape(-1))
    rep[0] = mean * scale
    if terms == 0:
        return
    factor = scale / np.sqrt(2.0)
    if terms == rep.shape[1]:
        rep[1:] = _root(cov, factor)
    else:
        basis = _subspace(cov, terms)
        inner = _matmul(_matmul(basis, cov), basis.T.copy())
        rep[1:] = _matmul(_root(inner, factor), basis)


@kernel
def score_keys(k, rep, history, scores, b, h, list_first, orders, segments, key, n):
    """Scores of keys key .. key + n in every list of one K/V head.

    k [B, Hkv, Nk, D] storage type; rep [lists, 1 + terms, D] compute type; history [segments] int64;
    scores [lists, width] float32, written up to each history.
    """
    dim, rows, width = k.shape[3], rep.shape[1], BYTES // rep.itemsize
    flat = rep.reshape(-1)
    packed, row = np.zeros(n * dim, rep.dtype), np.zeros(dim + width, rep.dtype)
    panels = np.zeros((-(-n // width)) * dim * width, rep.dtype)
    load_rows(k, b, h, key, n, packed, dim)
    for i in range(n):
        for d in range(dim):
            panels[(i // width * dim + d) * width + i % width] = packed[i * dim + d]
    part, result = np.zeros(rows * width, rep.dtype), row[:width]
    for o in range(orders):
        for s in range(segments):
            index = list_first + o * segments + s
            seen = min(n, history[s] - key)
            for at in range(0, seen, width):
                product(rows, flat, index * rows * dim, dim, 1, dim, panels, at * dim, part, 0, width)
                total = load(part, 0)
                for r in range(1, rows):
                    x = load(part, r * width)
                    total = muladd(x, x, total)
                store(result, 0, total)
                for i in range(min(width, seen - at)):
                    scores[index, key + at + i] = result[i]


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
