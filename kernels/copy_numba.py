"""copy_numba.py: rows of K or V to a tile in shared memory, for attend_numba.py.

source [rows, dim]       any float   any strides
order  [keys]            int32       which rows; empty: the rows themselves, in order
tile   [STEP, WIDTH]     REAL        answer: rows at order[first : first + count], zeros beside them
walked [MAX_BLOCKS]      int32       of `stage`: keys staged so far, by pool block
held   [IN_FLIGHT]       REAL        a thread's own
A thread's loads go out together, before its first store: a loop of single copies would wait for memory each time.
"""

from functools import cache

from numba import cuda

IN_FLIGHT = 8


@cache
def copy_function(real, width):
    """The device function that writes `real` (numba.float32 or numba.float64) rows of `width` columns."""

    @cuda.jit(device=True)
    def copy_rows(source, order, first, count, tile, held, me, threads):
        for start in range(me, count * width, IN_FLIGHT * threads):
            for j in range(IN_FLIGHT):
                i = start + j * threads
                place, d = first + i // width, i % width
                held[j] = real(0)
                if i < count * width and d < source.shape[1]:
                    held[j] = real(source[order[place] if len(order) else place, d])
            for j in range(IN_FLIGHT):
                i = start + j * threads
                if i < count * width:
                    tile[i // width, i % width] = held[j]

    return copy_rows


@cache
def stage_function(real, width):
    """The device function that stages keys and values, both as `copy_function` does."""
    copy_rows = copy_function(real, width)

    @cuda.jit(device=True)
    def stage(keys, values, order, first, count, tiles, pool):
        """Copy keys and values for the whole block; with `pool`, count the keys by pool block."""
        (k_tile, v_tile, walked, held), me, threads = tiles, cuda.threadIdx.x, cuda.blockDim.x
        cuda.syncthreads()
        copy_rows(keys, order, first, count, k_tile, held, me, threads)
        copy_rows(values, order, first, count, v_tile, held, me, threads)
        if pool:
            for i in range(me, count, threads):
                cuda.atomic.add(walked, order[first + i] // pool, 1)
        cuda.syncthreads()

    return stage
