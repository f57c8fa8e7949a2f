"""remap_numba.py: stage 2, the keys of every list by descending score, the twin of remap.cu in Numba CUDA.

scores     [lists, longest history]             float32
patterns   the same memory                      uint32
history    [segments of the slab]               int32    scores of a list
kv_offsets [lists' heads, segments + 1]         int64    where a list goes
kv_order   [keys]                               int32    answer: the first offsets[s+1] - offsets[s] keys of a list
scratch    [2, lists, places]                   ITEM     items between passes; places: whole chunks, at least a history
An item is a key in `key_bits` bits, and above them the code that it is sorted by, ascending. levels > 0: finite scores
are cut into that many equal steps between the list's least and greatest, in float32; 0: exact. +inf leads, -inf and NaN
close. Items start in the order of their keys and are sorted by counting (counting_numba.py): ties go to smaller keys.
grid (segments, lists' heads)   block THREADS, or what the kernel is made for   all arrays contiguous
shared memory run * THREADS ITEM, 1 + DIGITS * THREADS uint16, 2 * (MOST_PASSES * DIGITS + THREADS) int32,
2 * THREADS float32
ITEM: int32 or int64
"""

from functools import cache
from math import inf, isfinite, nan

from numba import cuda, float32, int32, int64, uint16
from s2o_cupy.kernels.counting_numba import (
    DIGIT_BITS,
    DIGITS,
    MOST_PASSES,
    counting_functions,
    digit_of,
    run_of,
    thread,
)

THREADS = 256
PLUS_ZERO, LAST = 0x7FFFFFFF, 0xFFFFFFFF


@cuda.jit(device=True)
def level_code(x, high, factor, levels):
    """0 for +inf, 1 to `levels` for the steps from the greatest score down, then the rest."""
    if not isfinite(x):
        return 0 if x == inf else levels + 1
    return min(int32((high - x) * factor), levels - 1) + 1


@cuda.jit(device=True)
def exact_code(x, pattern):
    """A number that grows as the score falls; both zeros give one, as do -inf and NaN."""
    if x == 0:
        return int64(PLUS_ZERO)
    if x != x or x == -inf:
        return int64(LAST)
    return int64(PLUS_ZERO) - int64(pattern) if x > 0 else int64(pattern)


@cache
def remap_kernel(item, exact, threads):
    """The kernel for items of type `item` (numba.int32 or numba.int64), exact codes or levels, and so many threads."""
    run = run_of(item)
    chunk_size, counters = run * threads, 1 + DIGITS * threads
    find_starts, sort_pass = counting_functions(run, threads)

    @cuda.jit(device=True)
    def load(scores, first, n, held):
        """A thread's scores of a chunk; all loads are out before one is needed."""
        here = thread(first)
        for j in range(run):
            held[j] = float32(nan)
            if here + j * threads < n:
                held[j] = scores[here + j * threads]

    @cuda.jit(device=True)
    def scale_of(scores, n, levels, held, least, greatest):
        """What level_code needs: the greatest finite score, and the levels over the distance to the least."""
        me, span, low, high = thread(0), threads, float32(inf), float32(-inf)
        for first in range(0, n, chunk_size):
            load(scores, first, n, held)
            for j in range(run):
                if isfinite(held[j]):
                    low, high = min(low, held[j]), max(high, held[j])
        least[me], greatest[me] = low, high
        cuda.syncthreads()
        while span > 1:
            half = (span + 1) // 2
            if me + half < span:
                least[me], greatest[me] = min(least[me], least[me + half]), max(greatest[me], greatest[me + half])
            cuda.syncthreads()
            span = half
        factor = float32(levels) / (greatest[0] - least[0]) if greatest[0] > least[0] else float32(0)
        return (greatest[0], factor) if 0 < factor < inf else (float32(0), float32(0))

    @cuda.jit(device=True)
    def write_items(given, scale, held_scores, held, counts, items):
        """A list's items in the order of its keys, no key's behind them, and the counts of all digits."""
        (scores, patterns, n, levels, passes, key_bits), (high, factor) = given, scale
        none = ((DIGITS << DIGIT_BITS * (passes - 1)) - 1) << key_bits
        for first in range(0, n, chunk_size):
            load(scores, first, n, held_scores)
            here = thread(first)
            for j in range(run):
                key = here + j * threads
                if exact:
                    code = exact_code(held_scores[j], patterns[min(key, n - 1)])
                else:
                    code = level_code(held_scores[j], high, factor, levels)
                held[j] = (int64(code) << key_bits) + key if key < n else none
            for j in range(run):
                items[here + j * threads] = held[j]
            for i in range(passes):
                for j in range(run):
                    cuda.atomic.add(counts, (i, digit_of(held[j], i, passes, key_bits)), 1)

    @cuda.jit
    def remap(scores, patterns, history, kv_offsets, kv_order, scratch, levels, passes, key_bits):
        chunk = cuda.shared.array(chunk_size, item)
        places = cuda.shared.array(counters, uint16)
        totals = cuda.shared.array((2, threads), int32)
        counts = cuda.shared.array((MOST_PASSES, DIGITS), int32)
        starts = cuda.shared.array((MOST_PASSES, DIGITS), int32)
        least = cuda.shared.array(threads, float32)
        greatest = cuda.shared.array(threads, float32)
        held, held_scores = cuda.local.array(run, item), cuda.local.array(run, float32)
        s, head = cuda.blockIdx.x, cuda.blockIdx.y
        index, n = head * cuda.gridDim.x + s, history[s]
        order = kv_order[kv_offsets[head, s] : kv_offsets[head, s + 1]]
        for i in range(passes):
            for digit in range(thread(0), DIGITS, threads):
                counts[i, digit] = 0
        scale = scale_of(scores[index], n, levels, held_scores, least, greatest)
        given = scores[index], patterns[index], n, levels, passes, key_bits
        write_items(given, scale, held_scores, held, counts, scratch[0, index])
        cuda.syncthreads()
        find_starts(counts, starts, passes)
        shared = chunk, places, totals
        for i in range(passes):
            items, sorted_items = scratch[i % 2, index], scratch[1 - i % 2, index]
            sort_pass((i, passes, key_bits), items, n, sorted_items, order, starts[i], shared, held)

    return remap
