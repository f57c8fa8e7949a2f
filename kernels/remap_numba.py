"""remap_numba.py: stage 2, the keys of every list by descending score, the twin of remap.cu in Numba CUDA.

scores     [lists, longest history]             float32
patterns   the same memory                      uint32
history    [segments of the slab]               int32    scores of a list
kv_offsets [lists' heads, segments + 1]         int64    where a list goes
kv_order   [keys]                               int32    answer: the first offsets[s+1] - offsets[s] keys of a list
scratch    [2, lists, places]                   ITEM     items between passes (items_numba.py); places: whole chunks
A stable sort by counting, a pass for each digit of the items' codes, so that ties go to the smaller key. A pass takes
a list chunk by chunk: its threads count the digits of their runs of items, a scan over (digit, thread) turns counts
into places, the threads deal their runs out inside shared memory, and the chunk goes out digit by digit.
grid (segments, lists' heads)   block THREADS, or what the kernel is made for   all arrays contiguous
shared memory run * THREADS ITEM, 1 + DIGITS * THREADS uint16, 2 * (MOST_PASSES * DIGITS + THREADS) int32,
2 * THREADS float32
ITEM: int32 or int64   run: items that a thread sorts of a chunk, an odd number, for runs in banks of their own
"""

from functools import cache

from numba import cuda, float32, int32, uint16
from s2o_cupy.kernels.items_numba import (
    DIGIT_BITS,
    DIGITS,
    LAST_MASK,
    MASK,
    MOST_PASSES,
    digit_of,
    item_functions,
    thread,
)

THREADS = 256


def run_of(item):
    """Items that a thread sorts of a chunk."""
    return 17 if item.bitwidth == 32 else 9


@cache
def remap_kernel(item, threads):
    """The kernel for items of type `item` (numba.int32 or numba.int64) and blocks of so many threads."""
    run = run_of(item)
    chunk_size, counters, digits = run * threads, 1 + DIGITS * threads, MOST_PASSES * DIGITS
    scale_of, write_items = item_functions(run, threads)

    @cuda.jit(device=True)
    def find_starts(counts, starts, passes):
        """Where each pass puts the first item of each digit."""
        for i in range(passes):
            for digit in range(thread(), DIGITS, threads):
                total = 0
                for lower in range(digit):
                    total += counts[i * DIGITS + lower]
                starts[i * DIGITS + digit] = total

    @cuda.jit(device=True)
    def scan_counts(places, totals):
        """Counts, from places[1] on, to first places, in the order of (digit, thread)."""
        me, total, now, step = thread(), 0, 0, 1
        cuda.syncthreads()
        for j in range(DIGITS):
            total += places[1 + me * DIGITS + j]
        totals[0, me] = total
        cuda.syncthreads()
        while step < threads:  # each total becomes that of itself and all before it
            totals[1 - now, me] = totals[now, me] + (totals[now, me - step] if me >= step else 0)
            cuda.syncthreads()
            now, step = 1 - now, 2 * step
        place = totals[now, me] - total
        for j in range(DIGITS):
            count = places[1 + me * DIGITS + j]
            places[1 + me * DIGITS + j] = place
            place += count
        cuda.syncthreads()

    @cuda.jit(device=True)
    def sort_chunk(chunk, shift, mask, held, places, totals):
        """A chunk by one digit; places[digit * threads] is then where a digit starts in it."""
        me = thread()
        for digit in range(DIGITS):
            places[1 + digit * threads + me] = 0
        for j in range(run):
            held[j] = chunk[me * run + j]
        for j in range(run):
            places[1 + digit_of(held[j], shift, mask) * threads + me] += 1
        scan_counts(places, totals)
        for j in range(run):
            mine = 1 + digit_of(held[j], shift, mask) * threads + me
            place = places[mine]
            chunk[place] = held[j]
            places[mine] = place + 1
        cuda.syncthreads()

    @cuda.jit
    def remap(scores, patterns, history, kv_offsets, kv_order, scratch, levels, passes, key_bits):
        chunk = cuda.shared.array(chunk_size, item)
        places = cuda.shared.array(counters, uint16)
        totals = cuda.shared.array((2, threads), int32)
        counts = cuda.shared.array(digits, int32)
        starts = cuda.shared.array(digits, int32)
        least = cuda.shared.array(threads, float32)
        greatest = cuda.shared.array(threads, float32)
        held, held_scores = cuda.local.array(run, item), cuda.local.array(run, float32)
        s, head, me = cuda.blockIdx.x, cuda.blockIdx.y, thread()
        index, n = head * cuda.gridDim.x + s, history[s]
        start, room = kv_offsets[head, s], kv_offsets[head, s + 1] - kv_offsets[head, s]
        for k in range(me, digits, threads):
            counts[k] = 0
        places[0] = 0
        scale = scale_of(scores[index], n, levels, held_scores, least, greatest)
        given = scores[index], patterns[index], n, levels, passes, key_bits
        write_items(given, scale, held_scores, counts, scratch[0, index])
        cuda.syncthreads()
        find_starts(counts, starts, passes)
        for i in range(passes):
            items, sorted_items = scratch[i % 2, index], scratch[1 - i % 2, index]
            shift, mask = key_bits + DIGIT_BITS * i, MASK if i + 1 < passes else LAST_MASK
            for first in range(0, n, chunk_size):
                for j in range(run):
                    held[j] = items[first + j * threads + me]
                for j in range(run):
                    chunk[j * threads + me] = held[j]
                cuda.syncthreads()
                sort_chunk(chunk, shift, mask, held, places, totals)
                for digit in range(me, DIGITS, threads):
                    starts[i * DIGITS + digit] -= places[digit * threads]
                cuda.syncthreads()
                for j in range(run):
                    x = chunk[j * threads + me]
                    place = starts[i * DIGITS + digit_of(x, shift, mask)] + j * threads + me
                    if i + 1 < passes:
                        sorted_items[place] = x
                    elif place < room:
                        kv_order[start + place] = x & ((1 << key_bits) - 1)
                cuda.syncthreads()
                for digit in range(me, DIGITS, threads):
                    starts[i * DIGITS + digit] += places[(digit + 1) * threads]

    return remap
