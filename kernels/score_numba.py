"""score_numba.py: stage 1, the score of every history key of every list, the twin of score_simt.cu in Numba CUDA.

k        [batch, heads_kv, n_keys, dim]       any float   any strides
rows     [lists, 1 + terms, dim]              REAL        the mean query, then the factors of the covariance
history  [segments of the slab]               int32       keys that a list scores
score    [lists, longest history]             float32     answer, natural-log units; beyond a history untouched
The score is scale * mean . k + scale^2 / 2 * sum over the terms of (factor . k)^2. The lists of a slab run over K/V
heads, then over the `orders` lists that a K/V head has, then over segments. The backend makes the rows.
grid (runs of blockDim keys, lists)   block at most 1024, a key a thread   shared memory WIDTH REAL
REAL: float32 or float64   WIDTH: columns of a key that a thread keeps, dim at least
"""

from functools import cache

from numba import cuda, float32


@cache
def score_kernel(real, width):
    """The kernel that multiplies in `real` (numba.float32 or numba.float64) keys of `width` columns at most."""

    @cuda.jit(device=True)
    def stage_row(rows, index, term, row):
        """Copy one row of a list to shared memory, zeros beside it, for all threads of the block."""
        cuda.syncthreads()
        for d in range(cuda.threadIdx.x, width, cuda.blockDim.x):
            row[d] = rows[index, term, d] if d < rows.shape[2] else real(0)
        cuda.syncthreads()

    @cuda.jit(device=True)
    def dot(row, key):
        total = real(0)
        for d in range(width):
            total += row[d] * key[d]
        return total

    @cuda.jit
    def score(k, rows, history, scores, kv_start, orders, scale):
        row = cuda.shared.array(width, real)
        key = cuda.local.array(width, real)
        index, j = cuda.blockIdx.y, cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        segments, heads = history.shape[0], k.shape[1]
        kv = kv_start + index // (segments * orders)
        keys, dim = history[index % segments], k.shape[3]
        if cuda.blockIdx.x * cuda.blockDim.x >= keys:
            return
        for d in range(width):
            key[d] = real(k[kv // heads, kv % heads, j, d]) if j < keys and d < dim else real(0)
        total = real(0)
        for term in range(rows.shape[1]):
            stage_row(rows, index, term, row)
            product = dot(row, key) * scale
            total += product if term == 0 else product * product * real(0.5)
        if j < keys:
            scores[index, j] = float32(total)

    return score
