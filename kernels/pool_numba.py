"""pool_numba.py: the mean of every pool block of K or V, the twin of pool.cu in Numba CUDA; for tail="spread" also how
far keys lie from their block's mean.

x       [batch, heads, n_keys, dim]      any float   any strides
mean    [batch, heads, blocks, dim]      REAL        answer of `pool`
spread  [batch, heads, blocks, dim]      REAL        answer of `departures`: sum of squared departures over a block;
                                                     of `running`, in its place: over it and all before it
A partial last block is the mean of the keys it has. A thread sums one column in key or block order: two runs agree
bitwise, and no sum reads what comes after it.
grid (blocks, batch * heads), of `running` (batch * heads, 1)   block any   shared memory none
REAL: float32 or float64
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


@cache
def departures_kernel(real):
    """The kernel that sums squared departures over each block, in `real`."""

    @cuda.jit
    def departures(x, mean, spread, pool_size):
        block, heads = cuda.blockIdx.x, x.shape[1]
        batch, head = cuda.blockIdx.y // heads, cuda.blockIdx.y % heads
        first = block * pool_size
        stop = min(first + pool_size, x.shape[2])
        for d in range(cuda.threadIdx.x, x.shape[3], cuda.blockDim.x):
            centre, total = mean[batch, head, block, d], real(0)
            for key in range(first, stop):
                departure = real(x[batch, head, key, d]) - centre
                total += departure * departure
            spread[batch, head, block, d] = total

    return departures


@cache
def running_kernel(real):
    """The kernel that turns sums over blocks into sums over all blocks so far, in `real`."""

    @cuda.jit
    def running(spread):
        batch, head = cuda.blockIdx.x // spread.shape[1], cuda.blockIdx.x % spread.shape[1]
        for d in range(cuda.threadIdx.x, spread.shape[3], cuda.blockDim.x):
            total = real(0)
            for block in range(spread.shape[2]):
                total += spread[batch, head, block, d]
                spread[batch, head, block, d] = total

    return running
