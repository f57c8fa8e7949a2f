"""Stage 1 on the CPU, mean and gaussian rank: a segment's representatives and the scores of keys."""

import numpy as np

from s2o_cupy.backends._lanes import (
    BYTES,
    add,
    fill,
    inner,
    kernel,
    lane_sum,
    lean,
    load,
    muladd,
    multiply,
    product_4,
    product_onto_4,
    store,
    subtract,
)
from s2o_cupy.backends._storage import pack_rows

# Queries, and keys, packed at a time.
CHUNK = 512
# Rows of a representative computed at a time: 1 + 7, 15 or 31 are whole blocks.
ROWS = 4


@kernel
def represent(pack, q, rep, b, first_head, heads, first, rows, terms, scale):
    """Mean query and covariance factors of one list.

    q [B, Hq, Nq, D] storage type; rep [whole blocks of 1 + terms rows, D] compute type, written.
    """
    lean()
    dim, width = rep.shape[1], BYTES // rep.itemsize
    padded = -(-dim // width) * width
    mean = np.zeros(padded, rep.dtype)
    # cov [column panel, row, width]: a product's right side.
    cov = np.zeros(padded * padded, rep.dtype)
    _moments(pack, q, b, first_head, heads, first, rows, terms > 0, mean, cov)
    count = rep.shape[0]
    basis, factor = np.zeros(count * padded, rep.dtype), np.zeros(count * padded, rep.dtype)
    if terms < dim:
        _subspace(cov, padded, terms, basis)
    else:
        for d in range(dim):
            basis[d * padded + d] = 1
    root = _root(_project(cov, padded, terms, basis, factor, count), scale * np.sqrt(0.5))
    for c in range(0, padded, width):
        store(factor, c, multiply(load(mean, c), fill(mean, scale)))
        for i in range(1, count):
            total = fill(basis, 0.0)
            for j in range(terms if i <= terms else 0):
                total = muladd(fill(basis, root[i - 1, j]), load(basis, j * padded + c), total)
            store(factor, i * padded + c, total)
    for r in range(count):
        for d in range(dim):
            rep[r, d] = factor[r * padded + d]


@inner
def _moments(pack, q, b, first_head, heads, first, rows, gaussian, mean, cov):
    """Mean and covariance of the finite rows of some heads, written."""
    lean()
    width, padded = BYTES // mean.itemsize, mean.size
    chunk, flat = np.zeros(CHUNK * padded, mean.dtype), np.zeros(CHUNK * padded, mean.dtype)
    exact, one, total, n = np.zeros(padded), np.ones(width, mean.dtype), 0, 0
    for h in range(first_head, first_head + heads):
        for at in range(first, first + rows, CHUNK):
            n = _pack_finite(pack, q, b, h, at, min(CHUNK, first + rows - at), flat, chunk, padded)
            total += n
            for c in range(0, padded, width):
                part = fill(chunk, 0.0)
                for i in range(n):
                    part = add(part, load(chunk, c * CHUNK + i * width))
                store(mean, c, part)
            for d in range(padded):
                exact[d] += mean[d]
    for d in range(padded):
        mean[d] = exact[d] / max(total, 1)
    if not gaussian:
        return
    whole = heads == 1 and rows <= CHUNK
    for h in range(first_head, first_head + heads):
        for at in range(first, first + rows, CHUNK):
            if not whole:
                n = _pack_finite(pack, q, b, h, at, min(CHUNK, first + rows - at), flat, chunk, padded)
            for c in range(0, padded, width):
                for i in range(c * CHUNK, c * CHUNK + n * width, width):
                    store(chunk, i, subtract(load(chunk, i), load(mean, c)))
            for right in range(0, padded, width):
                for d in range(0, padded, ROWS):
                    left = d // width * CHUNK * width + d % width
                    target = right * padded + d * width
                    product_onto_4(chunk, left, 1, width, n, chunk, right * CHUNK, cov, target, one, 0)
    share = fill(cov, 1.0 / max(total, 1))
    for i in range(0, cov.size, width):
        store(cov, i, multiply(load(cov, i), share))


@inner
def _pack_finite(pack, q, b, h, first, n, flat, chunk, padded):
    """Pack the finite ones of n query rows as ``chunk[column panel, row, width]``; how many."""
    lean()
    width, kept = BYTES // flat.itemsize, 0
    pack_rows(pack, q, b, h, np.empty(0, np.int32), first, n, flat, 0, padded)
    zero = fill(flat, 0.0)
    for i in range(0, n * padded, padded):
        nothing = zero
        for c in range(0, padded, width):
            number = load(flat, i + c)
            store(chunk, c * CHUNK + kept * width, number)
            nothing = muladd(number, zero, nothing)
        kept += lane_sum(nothing) == 0
    return kept


@inner
def _subspace(cov, padded, terms, basis):
    """Orthonormal rows basis [terms, padded] spanning the columns of cov of largest variance; Gram-Schmidt."""
    lean()
    width = BYTES // cov.itemsize
    used = np.zeros(padded, np.bool_)
    for row in range(0, terms * padded, padded):
        axis, most = 0, -1.0
        for d in range(padded):
            variance = cov[(d // width * padded + d) * width + d % width]
            if not used[d] and variance > most:
                axis, most = d, variance
        used[axis] = True
        for c in range(0, padded, width):
            store(basis, row + c, load(cov, c * padded + axis * width))
        size = _dot(basis, row, row, padded)
        for before in range(2 * row // padded):  # twice is enough (Kahan, Parlett)
            other = before * padded % max(row, 1)
            part = fill(basis, -_dot(basis, other, row, padded))
            for c in range(0, padded, width):
                store(basis, row + c, muladd(part, load(basis, other + c), load(basis, row + c)))
        rest = _dot(basis, row, row, padded)
        inverse = fill(basis, 1 / np.sqrt(rest) if rest > 1e-12 * size else 0.0)
        for c in range(0, padded, width):
            store(basis, row + c, multiply(inverse, load(basis, row + c)))


@inner
def _dot(x, a, b, n):
    """Inner product of the n numbers from x[a] and from x[b]."""
    lean()
    total = fill(x, 0.0)
    for c in range(0, n, BYTES // x.itemsize):
        total = muladd(load(x, a + c), load(x, b + c), total)
    return lane_sum(total)


@inner
def _project(cov, padded, terms, basis, half, count):
    """basis @ cov @ basis.T (terms, terms) float64; half is room for [count, padded]."""
    lean()
    width, small = BYTES // cov.itemsize, np.empty((terms, terms))
    for c in range(0, padded, width):
        for r in range(0, count, ROWS):
            product_4(basis, r * padded, padded, 1, padded, cov, c * padded, half, c * count + r * width, half, 0)
    for i in range(terms):
        for j in range(terms):
            total = fill(cov, 0.0)
            for c in range(0, padded, width):
                total = muladd(load(half, c * count + i * width), load(basis, j * padded + c), total)
            small[i, j] = lane_sum(total)
    return small


@inner
def _root(a, scale):
    """Rows f with ``sum of outer(f, f) = scale**2 * a``, a (n, n) semidefinite: Cholesky, greatest pivot first."""
    lean()
    n = a.shape[0]
    f, rest, least = np.zeros((n, n)), np.empty(n), 0.0
    for i in range(n):
        rest[i] = a[i, i]
        least = max(least, 1e-7 * rest[i])
    for j in range(n):
        pivot = 0
        for i in range(n):
            if rest[i] > rest[pivot]:
                pivot = i
        if not rest[pivot] > least:
            break
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
    for i in range(n):
        for c in range(n):
            f[i, c] *= scale
    return f


@kernel
def score_keys(pack, k, rep, history, scores, b, h, list_first, lists, segments, key, n):
    """Scores of keys key .. key + n in every list of one K/V head.

    k [B, Hkv, Nk, D] storage type; rep [lists, rows, D] compute type; history [segments] int64;
    scores [lists, width] float32, written up to each history.
    """
    dim, rows, width = k.shape[3], rep.shape[1], BYTES // rep.itemsize
    flat = rep.reshape(-1)
    rows_packed, panels = np.zeros(n * dim, rep.dtype), np.zeros(-(-n // width) * dim * width, rep.dtype)
    pack_rows(pack, k, b, h, np.empty(0, np.int32), key, n, rows_packed, 0, dim)
    for i in range(n):
        for d in range(dim):
            panels[(i // width * dim + d) * width + i % width] = rows_packed[i * dim + d]
    part = np.zeros(rows * width, rep.dtype)
    for index in range(list_first, list_first + lists):
        seen = min(n, history[(index - list_first) % segments] - key)
        for at in range(0, seen, width):
            for r in range(0, rows, ROWS):
                product_4(flat, (index * rows + r) * dim, dim, 1, dim, panels, at * dim, part, r * width, part, 0)
            total = load(part, 0)
            for r in range(1, rows):
                x = load(part, r * width)
                total = muladd(x, x, total)
            store(part, 0, total)
            for i in range(min(width, seen - at)):
                scores[index, key + at + i] = part[i]
