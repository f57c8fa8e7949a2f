"""remap_numba.py: stage 2, the keys of every list by descending score, the twin of remap.cu in Numba CUDA.

score      [lists, longest history]             float32
bits       the same memory                      uint32
history    [segments of the slab]               int32    scores of a list
kv_offsets [lists' heads, segments + 1]         int64    where a list goes
kv_order   [keys]                               int32    answer: the first offsets[s+1] - offsets[s] keys of a list
scratch    [2, lists, longest history]          int32    keys on their way from pass to pass
codes      [lists, longest history]             uint32   what a list is sorted by, ascending
levels > 0: finite scores are cut into that many equal steps between the list's least and greatest, in float32;
0: exact. +inf leads, -inf and NaN close, ties go to the smaller key. A stable counting sort, 4 bits a pass: a thread
counts the digits of its own run of keys, a scan over (digit, thread) gives places, and the thread deals its run out.
grid (segments, lists' heads)   block at most 128   shared memory 16 * 128 int32 and 2 * 128 float32
"""

from math import inf, isfinite

from numba import cuda, float32, int32, int64, uint32

THREADS = 128
DIGITS = 16
PLUS_ZERO, LAST = 0x7FFFFFFF, 0xFFFFFFFF


@cuda.jit(device=True)
def run_of_thread(n):
    """The run of a list's places that this thread counts and deals out."""
    share = (n + cuda.blockDim.x - 1) // cuda.blockDim.x
    first = min(n, cuda.threadIdx.x * share)
    return first, min(n, first + share)


@cuda.jit(device=True)
def finite_range(scores, index, n, least, greatest):
    """The least and the greatest finite score of a list; least > greatest where none is finite."""
    first, stop = run_of_thread(n)
    low, high = float32(inf), float32(-inf)
    for i in range(first, stop):
        x = scores[index, i]
        if isfinite(x):
            low, high = min(low, x), max(high, x)
    least[cuda.threadIdx.x], greatest[cuda.threadIdx.x] = low, high
    cuda.syncthreads()
    for t in range(cuda.blockDim.x):
        low, high = min(low, least[t]), max(high, greatest[t])
    return low, high


@cuda.jit(device=True)
def level_code(x, high, factor, levels):
    """0 for +inf, 1 to `levels` for the steps from the greatest score down, then the rest."""
    if x == inf:
        return int64(0)
    if not isfinite(x):
        return int64(levels + 1)
    return int64(min(int64((high - x) * factor), int64(levels - 1)) + 1)


@cuda.jit(device=True)
def exact_code(x, bits):
    """A number that grows as the score falls; both zeros give one, as do -inf and NaN."""
    if x == 0:
        return int64(PLUS_ZERO)
    if x != x or x == -inf:
        return int64(LAST)
    return int64(PLUS_ZERO) - int64(bits) if x > 0 else int64(bits)


@cuda.jit(device=True)
def write_codes(scores, bits, codes, keys, index, n, levels, low, high):
    """The codes of a list's scores, and its keys in their own order."""
    factor = float32(0)
    if high > low:
        factor = float32(levels) / float32(high - low)
        if not isfinite(factor):
            factor = float32(0)
    first, stop = run_of_thread(n)
    for i in range(first, stop):
        x = scores[index, i]
        code = level_code(x, high, factor, levels) if levels else exact_code(x, bits[index, i])
        codes[index, i] = uint32(code)
        keys[index, i] = i


@cuda.jit(device=True)
def digit_of(codes, index, key, shift):
    return (int64(codes[index, key]) >> shift) & (DIGITS - 1)


@cuda.jit(device=True)
def count_digits(codes, keys, index, n, shift, places):
    """How many keys of its run this thread has of each digit."""
    for digit in range(DIGITS):
        places[digit, cuda.threadIdx.x] = 0
    first, stop = run_of_thread(n)
    for i in range(first, stop):
        places[digit_of(codes, index, keys[index, i], shift), cuda.threadIdx.x] += 1


@cuda.jit(device=True)
def scan_counts(places):
    """Counts to first places, over the digits and within one over the threads; one thread's work."""
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        place = 0
        for digit in range(DIGITS):
            for thread in range(cuda.blockDim.x):
                count = places[digit, thread]
                places[digit, thread] = place
                place += count
    cuda.syncthreads()


@cuda.jit(device=True)
def deal_keys(codes, keys, index, n, shift, places, to, start, room):
    """Write this thread's run in order, each key at its digit's next place, `room` places at most."""
    first, stop = run_of_thread(n)
    for i in range(first, stop):
        digit = digit_of(codes, index, keys[index, i], shift)
        place = places[digit, cuda.threadIdx.x]
        places[digit, cuda.threadIdx.x] = place + 1
        if place < room:
            to[start + place] = keys[index, i]
    cuda.syncthreads()


@cuda.jit
def remap(scores, bits, history, kv_offsets, kv_order, scratch, codes, levels, passes):
    least = cuda.shared.array(THREADS, float32)
    greatest = cuda.shared.array(THREADS, float32)
    places = cuda.shared.array((DIGITS, THREADS), int32)
    s, head = cuda.blockIdx.x, cuda.blockIdx.y
    index, n = head * cuda.gridDim.x + s, history[s]
    low, high = finite_range(scores, index, n, least, greatest)
    write_codes(scores, bits, codes, scratch[0], index, n, levels, low, high)
    cuda.syncthreads()
    for i in range(passes):
        keys = scratch[i % 2]
        count_digits(codes, keys, index, n, 4 * i, places)
        scan_counts(places)
        if i + 1 < passes:
            deal_keys(codes, keys, index, n, 4 * i, places, scratch[(i + 1) % 2, index], 0, n)
        else:
            start = kv_offsets[head, s]
            deal_keys(codes, keys, index, n, 4 * i, places, kv_order, start, kv_offsets[head, s + 1] - start)
