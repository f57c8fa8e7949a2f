"""pool_numba.py: the mean of every pool block of K or V, the twin of pool.cu in Numba CUDA.

x     [batch, heads, n_keys, dim]        any float   any strides
mean  [batch, heads, blocks, dim]        REAL        answer
A partial last block is the mean of the keys it has. A thread sums one column in key order: two runs agree bitwise.
grid (blocks, batch * heads)   block any   shared memory none   REAL: float32 or float64
"""

from functools import cache

from numba import cuda


@cache
def pool_kernel(real):
    """The kernel that sums in `real` (numba.float32 or numba.float64)."""

    @cuda.jit
    def pool(x, mean, pool_size):
        block, heads = cuda.blockIdx.x, x.shape[1]
        batch, head = cuda.blockIdx.y // heads, cuda.blockIdx.y % heads
        first = block * pool_size
        stop = min(first + pool_size, x.shape[2])
        for d in range(cuda.threadIdx.x, x.shape[3], cuda.blockDim.x):
            total = real(0)
            for key in range(first, stop):
                total += real(x[batch, head, key, d])
            mean[batch, head, block, d] = total / real(stop - first)

    return pool
