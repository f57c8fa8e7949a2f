"""mixture_numba.py: stage 1 of rank="mixture" in Numba CUDA: centres' normalisers, then the score of every history key.

k        [batch, heads_kv, n_keys, dim]       any float   any strides
centres  [lists, terms, dim]                  REAL
variance [lists, dim]                         REAL        of the queries around their centres, one for all
history  [segments of the slab]               int32       keys that a list scores
norm     [lists, terms]                       REAL        answer of `norm`: log of the sum of a centre's weights
weights  [lists, terms]                       REAL        log of a centre's share of the queries, less twice its norm
score    [lists, longest history]             float32     answer of `mixture`, natural log; beyond a history untouched
The logit of key k at centre c is scale * c . k + scale^2 / 2 * sum of variance * k^2; a key's score is half the log of
the sum over centres of exp(weight + 2 * logit). Lists lie as in score_numba.py; the backend makes the centres.
norm: grid (terms, lists)   mixture: grid (runs of blockDim keys, lists)   block THREADS at most
shared memory 2 * WIDTH REAL, of norm 2 * THREADS REAL too   REAL, WIDTH: those of score_numba.py
"""

from functools import cache
from math import exp, inf, log

from numba import cuda, float32

THREADS = 128


@cache
def sum_functions(real):
    """Device functions for a sum of exponentials, kept as (greatest, sum in its frame)."""

    @cuda.jit(device=True)
    def add_exp(top, total, x, weight):
        """Add weight * exp(x)."""
        if x > top:
            return x, total * exp(top - x) + weight
        if x > -inf:
            total += weight * exp(x - top)
        return top, total

    @cuda.jit(device=True)
    def log_sum(top, total):
        return top + real(log(total)) if total > 0 else real(-inf)

    return add_exp, log_sum


@cache
def norm_kernel(real, width):
    """The kernel of the normalisers, in `real` (numba.float32 or numba.float64), of `width` columns at most."""
    add_exp, log_sum = sum_functions(real)

    @cuda.jit
    def norm(k, centres, variance, history, norms, kv_start, orders, scale):
        centre = cuda.shared.array(width, real)
        spread = cuda.shared.array(width, real)
        tops = cuda.shared.array(THREADS, real)
        totals = cuda.shared.array(THREADS, real)
        index, c, me = cuda.blockIdx.y, cuda.blockIdx.x, cuda.threadIdx.x
        segments, heads, dim = history.shape[0], k.shape[1], k.shape[3]
        kv = kv_start + index // (segments * orders)
        for d in range(me, dim, cuda.blockDim.x):
            centre[d], spread[d] = centres[index, c, d], variance[index, d] * scale * real(0.5)
        cuda.syncthreads()
        top, total = real(-inf), real(0)
        for j in range(me, history[index % segments], cuda.blockDim.x):
            logit = real(0)
            for d in range(dim):
                x = real(k[kv // heads, kv % heads, j, d])
                logit += x * (centre[d] + spread[d] * x)
            top, total = add_exp(top, total, logit * scale, real(1))
        tops[me], totals[me] = top, total
        cuda.syncthreads()
        if me == 0:
            for t in range(1, cuda.blockDim.x):
                top, total = add_exp(top, total, tops[t], totals[t])
            norms[index, c] = log_sum(top, total)

    return norm


@cache
def mixture_kernel(real, width):
    """The kernel of the scores, in `real` (numba.float32 or numba.float64), of `width` columns at most."""
    add_exp, log_sum = sum_functions(real)

    @cuda.jit(device=True)
    def stage_row(row, dim, to):
        """Copy a row to shared memory, zeros beside it, for all threads of the block."""
        cuda.syncthreads()
        for d in range(cuda.threadIdx.x, width, cuda.blockDim.x):
            to[d] = row[d] if d < dim else real(0)
        cuda.syncthreads()

    @cuda.jit
    def mixture(k, centres, variance, history, weights, scores, kv_start, orders, scale):
        row = cuda.shared.array(width, real)
        key = cuda.local.array(width, real)
        index, j = cuda.blockIdx.y, cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        segments, heads, dim = history.shape[0], k.shape[1], k.shape[3]
        kv, keys = kv_start + index // (segments * orders), history[index % segments]
        if cuda.blockIdx.x * cuda.blockDim.x >= keys:
            return
        for d in range(width):
            key[d] = real(k[kv // heads, kv % heads, j, d]) if j < keys and d < dim else real(0)
        stage_row(variance[index], dim, row)
        square = real(0)
        for d in range(width):
            square += row[d] * key[d] * key[d]
        top, total = real(-inf), real(0)
        for c in range(centres.shape[1]):
            stage_row(centres[index, c], dim, row)
            logit = square * scale * real(0.5)
            for d in range(width):
                logit += row[d] * key[d]
            top, total = add_exp(top, total, weights[index, c] + real(2) * logit * scale, real(1))
        if j < keys:
            scores[index, j] = float32(log_sum(top, total) * real(0.5))

    return mixture
