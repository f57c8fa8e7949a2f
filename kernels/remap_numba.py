"""remap_numba.py: stage 2, the keys of every list by descending score, the twin of remap.cu in Numba CUDA.

score      [lists, longest history]             float32
bits       the same memory                      uint32
history    [segments of the slab]               int32    scores of a list
kv_offsets [lists' heads, segments + 1]         int64    where a list goes
kv_order   [keys]                               int32    answer: the first offsets[s+1] - offsets[s] keys of a list
scratch    [2, lists, longest history]          int64    items on their way from pass to pass
An item is a key, and above its 32 bits the code that it is sorted by, ascending. levels > 0: finite scores are cut into
that many equal steps between the list's least and greatest, in float32; 0: exact. +inf leads, -inf and NaN close, ties
go to the smaller key. A stable counting sort, DIGIT_BITS bits a pass: a thread counts the digits of its own run of
items, a scan over (digit, thread) gives places, and the thread deals its run out.
grid (segments, lists' heads)   block THREADS at most   shared memory DIGITS * (THREADS + 2) int32, 2 * THREADS float32
"""

from math import inf, isfinite

from numba import cuda, float32, int32, int64

THREADS, DIGIT_BITS = 128, 6
DIGITS, STRIDE = 2**DIGIT_BITS, THREADS + 1  # a digit starts on a bank of its own
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
    low, high = float32(inf), float32(-inf)
    for i in range(cuda.threadIdx.x, n, cuda.blockDim.x):
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
def write_items(scores, bits, items, index, n, levels, low, high):
    """A list's items, in the order of its keys."""
    factor = float32(0)
    if high > low:
        factor = float32(levels) / float32(high - low)
        if not isfinite(factor):
            factor = float32(0)
    for i in range(cuda.threadIdx.x, n, cuda.blockDim.x):
        x = scores[index, i]
        code = level_code(x, high, factor, levels) if levels else exact_code(x, bits[index, i])
        items[index, i] = (code << 32) + i
    cuda.syncthreads()


@cuda.jit(device=True)
def digit_of(item, shift):
    return (item >> (32 + shift)) & (DIGITS - 1)


@cuda.jit(device=True)
def count_digits(items, index, n, shift, places):
    """How many items of its run this thread has of each digit."""
    for digit in range(DIGITS):
        places[digit, cuda.threadIdx.x] = 0
    first, stop = run_of_thread(n)
    for i in range(first, stop):
        places[digit_of(items[index, i], shift), cuda.threadIdx.x] += 1
    cuda.syncthreads()


@cuda.jit(device=True)
def scan_counts(places, totals):
    """Counts to first places, over the digits and within one over the threads; a thread does a digit."""
    for digit in range(cuda.threadIdx.x, DIGITS, cuda.blockDim.x):
        total = 0
        for thread in range(cuda.blockDim.x):
            total += places[digit, thread]
        totals[digit] = total
    cuda.syncthreads()
    for digit in range(cuda.threadIdx.x, DIGITS, cuda.blockDim.x):
        place = 0
        for smaller in range(digit):
            place += totals[smaller]
        for thread in range(cuda.blockDim.x):
            count = places[digit, thread]
            places[digit, thread] = place
            place += count
    cuda.syncthreads()


@cuda.jit(device=True)
def next_place(places, digit):
    """The next place of this thread's items of a digit."""
    place = places[digit, cuda.threadIdx.x]
    places[digit, cuda.threadIdx.x] = place + 1
    return place


@cuda.jit
def remap(scores, bits, history, kv_offsets, kv_order, scratch, levels, passes):
    least = cuda.shared.array(THREADS, float32)
    greatest = cuda.shared.array(THREADS, float32)
    places = cuda.shared.array((DIGITS, STRIDE), int32)
    totals = cuda.shared.array(DIGITS, int32)
    s, head = cuda.blockIdx.x, cuda.blockIdx.y
    index, n = head * cuda.gridDim.x + s, history[s]
    start, room = kv_offsets[head, s], kv_offsets[head, s + 1] - kv_offsets[head, s]
    low, high = finite_range(scores, index, n, least, greatest)
    write_items(scores, bits, scratch[0], index, n, levels, low, high)
    first, stop = run_of_thread(n)
    for i in range(passes):
        items, shift = scratch[i % 2], DIGIT_BITS * i
        count_digits(items, index, n, shift, places)
        scan_counts(places, totals)
        for j in range(first, stop):
            item = items[index, j]
            place = next_place(places, digit_of(item, shift))
            if i + 1 < passes:
                scratch[(i + 1) % 2, index, place] = item
            elif place < room:
                kv_order[start + place] = item & 0xFFFFFFFF
        cuda.syncthreads()
