"""step2_tiles.py: the same, with key tiles in shared memory and a row in registers.

A block reads each key from global memory once for all of its rows, and the head dim is a constant, so that the
compiler unrolls every loop over it and keeps the query and the sum of values in registers.
Arrays, grid and block are those of step1_naive.py   shared memory 2 * STEP * DIM float32
"""

from functools import cache
from math import exp, inf

from numba import cuda, float32, int32

STEP = 32  # keys staged at a time


@cache
def attend_kernel(dim):
    """The kernel for one head dim."""

    @cuda.jit(device=True)
    def stage(keys, values, order, first, count, tile):
        """Copy `count` keys and values, at order[first:] or without an order from `first` on."""
        cuda.syncthreads()
        for i in range(cuda.threadIdx.x, count * dim, cuda.blockDim.x):
            key = order[first + i // dim] if len(order) else first + i // dim
            tile[0, i // dim, i % dim] = keys[key, i % dim]
            tile[1, i // dim, i % dim] = values[key, i % dim]
        cuda.syncthreads()

    @cuda.jit(device=True)
    def add_key(query, tile, i, acc, softmax, scale):
        top, closed, opened = softmax
        logit = float32(0)
        for d in range(dim):
            logit += query[d] * tile[0, i, d]
        logit *= scale
        if logit > top:
            shrink = exp(top - logit)
            closed, opened, top = closed * shrink, opened * shrink, logit
            for d in range(dim):
                acc[d] *= shrink
        weight = exp(logit - top)
        for d in range(dim):
            acc[d] += weight * tile[1, i, d]
        return top, closed, opened + weight

    @cuda.jit(device=True)
    def add_keys(keys, values, order, first, stop, my_stop, tile, query, acc, softmax, scale):
        """Stage keys [first, stop) of the order; add those before `my_stop` to this thread's row."""
        for start in range(first, stop, STEP):
            count = min(STEP, stop - start)
            stage(keys, values, order, start, count, tile)
            for i in range(min(count, my_stop - start)):
                softmax = add_key(query, tile, i, acc, softmax, scale)
        return softmax

    @cuda.jit(cache=True)
    def attend(q, k, v, order, starts, out, tiles, segment, block_k, tau, scale):
        tile = cuda.shared.array((2, STEP, dim), float32)
        query = cuda.local.array(dim, float32)
        acc = cuda.local.array(dim, float32)
        head, first = cuda.blockIdx.y, cuda.blockIdx.x * cuda.blockDim.x
        row, history, n = first + cuda.threadIdx.x, first // segment * segment, q.shape[1]
        kv, active = head // (q.shape[0] // k.shape[0]), row < n
        for d in range(dim):
            query[d], acc[d] = q[head, row if active else first, d], 0
        softmax, keys, values, unordered = (float32(-inf), float32(0), float32(0)), k[kv], v[kv], order[:0]
        softmax = add_keys(keys, values, unordered, history, first, first, tile, query, acc, softmax, scale)
        softmax = softmax[0], softmax[1] + softmax[2], float32(0)
        start, walked = starts[head, history // segment], 0
        while walked * block_k < history:
            a, b = start + walked * block_k, start + min((walked + 1) * block_k, history)
            softmax = add_keys(keys, values, order, a, b, b, tile, query, acc, softmax, scale)
            walked += 1
            top, closed, opened = softmax
            wanted = active and (closed == 0 or opened >= tau * closed)
            softmax = top, closed + opened, float32(0)
            if not cuda.syncthreads_or(int32(1 if wanted else 0)):
                break
        last = min(first + cuda.blockDim.x, n)
        softmax = add_keys(keys, values, unordered, first, last, row + 1, tile, query, acc, softmax, scale)
        if active:
            for d in range(dim):
                out[head, row, d] = acc[d] / (softmax[1] + softmax[2])
        if cuda.threadIdx.x == 0:
            tiles[head, cuda.blockIdx.x] = walked

    return attend
