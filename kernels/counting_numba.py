"""counting_numba.py: a stable sort by counting in shared memory, for remap_numba.py.

items        [places]                ITEM     sorted by the codes above their `key_bits` lowest bits; whole chunks
sorted_items [places]                ITEM     answer of a pass
kv_order     [keys listed]           int32    answer of the last pass: the first items' keys
counts       [MOST_PASSES, DIGITS]   int32    for each pass, how many items have which digit
starts       [DIGITS] of a pass      int32    where it puts the next item of each digit
chunk        [run * threads]         ITEM     shared memory, as are
places       [1 + DIGITS * threads]  uint16   counts, then places in the chunk, by (digit, thread)
totals       [2, threads]            int32
A pass looks at DIGIT_BITS bits of the codes, from the lowest on, and the last at all that are left. It takes the items
chunk by chunk: each thread counts the digits of its run of items, a scan over (digit, thread) turns counts into places,
the threads deal their runs out inside the chunk, and the chunk goes out digit by digit, neighbours beside neighbours.
ITEM: int32 or int64   run: items that a thread sorts of a chunk, an odd number, for runs in banks of their own
"""

from numba import cuda, uint32

DIGIT_BITS, MOST_PASSES = 5, 7
DIGITS = 2**DIGIT_BITS + 1  # one more, so that 1024 levels and the two codes beside them take two passes
MASK, LAST_MASK = 2**DIGIT_BITS - 1, 2 ** (DIGIT_BITS + 1) - 1


def passes_for(code):
    """Passes that sort by codes up to this one."""
    return next(i for i in range(1, MOST_PASSES + 1) if code >> DIGIT_BITS * (i - 1) < DIGITS)


def none_of(passes):
    """The code of no key, which fills the last chunk up: in each pass the greatest digit."""
    return (DIGITS << DIGIT_BITS * (passes - 1)) - 1


def run_of(item):
    """Items of a chunk for each thread."""
    return 17 if item.bitwidth == 32 else 9


@cuda.jit(device=True)
def thread(first):
    """This thread's place of those from `first` on, without sign: Numba asks of other indices if they are negative."""
    return uint32(first + cuda.threadIdx.x)


@cuda.jit(device=True)
def digit_of(item, i, passes, key_bits):
    return (item >> (key_bits + DIGIT_BITS * i)) & (MASK if i + 1 < passes else LAST_MASK)


def counting_functions(run, threads):
    """The device functions for blocks of so many threads, that sort `run` items each at a time."""
    rounds = -(-DIGITS // threads)  # in which the threads see to every digit

    @cuda.jit(device=True)
    def find_starts(counts, starts, passes):
        for i in range(passes):
            for j in range(rounds):
                digit, total = thread(j * threads), 0
                if digit < DIGITS:
                    for lower in range(digit):
                        total += counts[i, lower]
                    starts[i, digit] = total

    @cuda.jit(device=True)
    def scan_counts(places, totals):
        """Counts, from places[1] on, to first places, in the order of (digit, thread)."""
        me, total, now, step = thread(0), 0, 0, 1
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
    def sort_chunk(chunk, at, held, places, totals):
        """A chunk by one digit; places[digit * threads] is then where a digit starts in it."""
        (i, passes, key_bits), me = at, thread(0)
        for digit in range(DIGITS):
            places[1 + digit * threads + me] = 0
        for j in range(run):
            held[j] = chunk[me * run + j]
        for j in range(run):
            places[1 + digit_of(held[j], i, passes, key_bits) * threads + me] += 1
        scan_counts(places, totals)
        for j in range(run):
            mine = 1 + digit_of(held[j], i, passes, key_bits) * threads + me
            place = places[mine]
            chunk[place] = held[j]
            places[mine] = place + 1
        cuda.syncthreads()

    @cuda.jit(device=True)
    def sort_pass(at, items, n, sorted_items, kv_order, starts, shared, held):
        """Pass i of `passes` over the first n items, `at` being (i, passes, key_bits)."""
        (i, passes, key_bits), (chunk, places, totals), me = at, shared, thread(0)
        places[0] = 0
        for first in range(0, n, run * threads):
            here = thread(first)
            for j in range(run):  # all loads are out before one is needed
                held[j] = items[here + j * threads]
            for j in range(run):
                chunk[j * threads + me] = held[j]
            cuda.syncthreads()
            sort_chunk(chunk, at, held, places, totals)
            for j in range(rounds):
                if j * threads + me < DIGITS:
                    starts[j * threads + me] -= places[(j * threads + me) * threads]
            cuda.syncthreads()
            for j in range(run):
                item = chunk[j * threads + me]
                place = thread(starts[digit_of(item, i, passes, key_bits)] + j * threads)
                if i + 1 < passes:
                    sorted_items[place] = item
                elif place < len(kv_order):
                    kv_order[place] = item & ((1 << key_bits) - 1)
            cuda.syncthreads()
            for j in range(rounds):
                if j * threads + me < DIGITS:
                    starts[j * threads + me] += places[(j * threads + me + 1) * threads]

    return find_starts, sort_pass
