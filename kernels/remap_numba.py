"""remap_numba.py: stage 2, the keys of every list by descending score, the twin of remap.cu in Numba CUDA.

score      [lists, longest history]             float32
patterns   the same memory                      uint32
history    [segments of the slab]               int32    scores of a list
kv_offsets [lists' heads, segments + 1]         int64    where a list goes
kv_order   [keys]                               int32    answer: the first offsets[s+1] - offsets[s] keys of a list
scratch    [2, lists, places]                   int64    items between passes; places: block * 2^n, at least a history
An item is a key, and above its 32 bits the code that it is sorted by, ascending. levels > 0: finite scores are cut into
that many equal steps between the list's least and greatest, in float32; 0: exact. +inf leads, -inf and NaN close, ties
go to the smaller key. A stable counting sort, DIGIT_BITS bits a pass: a thread counts the digits of its own run of
places, a scan over (digit, thread) turns counts into places, and the thread deals its run out.
grid (segments, lists' heads)   block a power of two, THREADS at most
shared memory DIGITS * (THREADS + 1 + 2 * RUNS) int32, 2 * THREADS float32
"""

from math import inf, isfinite

from numba import cuda, float32, int32, int64

THREADS, RUNS, DIGIT_BITS = 512, 32, 4
DIGITS, STRIDE, SUMS = 2**DIGIT_BITS, THREADS + 1, RUNS * 2**DIGIT_BITS  # a thread's digits lie in banks of their own
PLUS_ZERO, LAST = 0x7FFFFFFF, 0xFFFFFFFF


@cuda.jit(device=True)
def slot(place, bits):
    """Where in scratch a place lies: the threads, each at its own run of 2^bits places, read neighbouring slots."""
    return (place & ((1 << bits) - 1)) * cuda.blockDim.x + (place >> bits)


@cuda.jit(device=True)
def finite_range(scores, index, n, least, greatest):
    """The least and the greatest finite score of a list; least > greatest where none is finite."""
    me, span = cuda.threadIdx.x, cuda.blockDim.x
    low, high = float32(inf), float32(-inf)
    for i in range(me, n, cuda.blockDim.x):
        x = scores[index, i]
        if isfinite(x):
            low, high = min(low, x), max(high, x)
    least[me], greatest[me] = low, high
    cuda.syncthreads()
    while span > 1:
        half = (span + 1) // 2
        if me + half < span:
            least[me], greatest[me] = min(least[me], least[me + half]), max(greatest[me], greatest[me + half])
        cuda.syncthreads()
        span = half
    return least[0], greatest[0]


@cuda.jit(device=True)
def level_code(x, high, factor, levels):
    """0 for +inf, 1 to `levels` for the steps from the greatest score down, then the rest."""
    if not isfinite(x):
        return int64(0) if x == inf else int64(levels + 1)
    return int64(min(int64((high - x) * factor), int64(levels - 1)) + 1)


@cuda.jit(device=True)
def exact_code(x, pattern):
    """A number that grows as the score falls; both zeros give one, as do -inf and NaN."""
    if x == 0:
        return int64(PLUS_ZERO)
    if x != x or x == -inf:
        return int64(LAST)
    return int64(PLUS_ZERO) - int64(pattern) if x > 0 else int64(pattern)


@cuda.jit(device=True)
def write_items(scores, patterns, items, index, n, bits, levels, low, high):
    """A list's items, in the order of its keys."""
    factor = float32(levels) / float32(high - low) if high > low else float32(0)
    if not isfinite(factor):
        factor = float32(0)
    for i in range(cuda.threadIdx.x, n, cuda.blockDim.x):
        x = scores[index, i]
        code = level_code(x, high, factor, levels) if levels else exact_code(x, patterns[index, i])
        items[slot(i, bits)] = (code << 32) + i
    cuda.syncthreads()


@cuda.jit(device=True)
def digit_of(item, shift):
    return (item >> (32 + shift)) & (DIGITS - 1)


@cuda.jit(device=True)
def scan_counts(places, sums):
    """Counts to first places, over the digits and within one over the threads, by runs of threads."""
    me, threads, now, step = cuda.threadIdx.x, cuda.blockDim.x, 0, 1
    runs = min(RUNS, threads)
    share, turns = threads // runs, DIGITS * runs // threads
    cuda.syncthreads()
    for turn in range(turns):
        i, total = turn * threads + me, 0
        for thread in range(i // DIGITS * share, (i // DIGITS + 1) * share):
            total += places[i % DIGITS, thread]
        sums[0, i % DIGITS * runs + i // DIGITS] = total
    cuda.syncthreads()
    while step < DIGITS * runs:  # each sum becomes that of itself and all before it
        for turn in range(turns):
            i = turn * threads + me
            sums[1 - now, i] = sums[now, i] + (sums[now, i - step] if i >= step else 0)
        cuda.syncthreads()
        now, step = 1 - now, 2 * step
    for turn in range(turns):
        i = turn * threads + me
        before = i % DIGITS * runs + i // DIGITS - 1
        place = sums[now, before] if before >= 0 else 0
        for thread in range(i // DIGITS * share, (i // DIGITS + 1) * share):
            count = places[i % DIGITS, thread]
            places[i % DIGITS, thread] = place
            place += count
    cuda.syncthreads()


@cuda.jit
def remap(scores, patterns, history, kv_offsets, kv_order, scratch, levels, passes):
    least = cuda.shared.array(THREADS, float32)
    greatest = cuda.shared.array(THREADS, float32)
    places = cuda.shared.array((DIGITS, STRIDE), int32)
    sums = cuda.shared.array((2, SUMS), int32)
    s, head, me, threads = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x, cuda.blockDim.x
    index, n = head * cuda.gridDim.x + s, history[s]
    start, room = kv_offsets[head, s], kv_offsets[head, s + 1] - kv_offsets[head, s]
    bits = 0
    while threads << bits < n:
        bits += 1
    mine = min(1 << bits, n - (me << bits))
    low, high = finite_range(scores, index, n, least, greatest)
    write_items(scores, patterns, scratch[0, index], index, n, bits, levels, low, high)
    for i in range(passes):
        items, dealt, shift = scratch[i % 2, index], scratch[(i + 1) % 2, index], DIGIT_BITS * i
        for digit in range(DIGITS):
            places[digit, me] = 0
        for j in range(mine):
            places[digit_of(items[j * threads + me], shift), me] += 1
        scan_counts(places, sums)
        for j in range(mine):
            item = items[j * threads + me]
            place = places[digit_of(item, shift), me]
            places[digit_of(item, shift), me] = place + 1
            if i + 1 < passes:
                dealt[slot(place, bits)] = item
            elif place < room:
                kv_order[start + place] = item & 0xFFFFFFFF
        cuda.syncthreads()
