"""items_numba.py: what a list is sorted by, for remap_numba.py.

scores   [scores of a list]      float32
patterns the same memory         uint32
items    [places]                ITEM      answer: in the order of the keys; behind them, to a whole chunk, of no key
counts   [MOST_PASSES, DIGITS]   int32     answer: for each pass, how many items have which digit
An item is a key in `key_bits` bits, and above them the code that it is sorted by, ascending. levels > 0: finite scores
are cut into that many equal steps between the list's least and greatest, in float32; 0: exact. +inf leads, -inf and NaN
close. A pass looks at DIGIT_BITS bits of the code, from the lowest on, and the last at all that are left.
ITEM: int32 or int64
"""

from math import inf, isfinite, nan

from numba import cuda, float32, int32, int64, uint32

DIGIT_BITS, MOST_PASSES = 5, 7
DIGITS = 2**DIGIT_BITS + 1  # one more, so that 1024 levels and the two codes beside them take two passes
MASK, LAST_MASK = 2**DIGIT_BITS - 1, 2 ** (DIGIT_BITS + 1) - 1
PLUS_ZERO, LAST = 0x7FFFFFFF, 0xFFFFFFFF


def passes_for(levels):
    """Passes that sort by every code."""
    last = levels + 1 if levels else LAST
    return next(i for i in range(1, MOST_PASSES + 1) if last >> DIGIT_BITS * (i - 1) < DIGITS)


def none_of(passes):
    """The code of no key: in each pass the greatest digit."""
    return (DIGITS << DIGIT_BITS * (passes - 1)) - 1


@cuda.jit(device=True)
def digit_of(item, shift, mask):
    return (item >> shift) & mask


@cuda.jit(device=True)
def thread():
    """This thread's number, in a type without sign: Numba then asks of no index whether it is negative."""
    return uint32(cuda.threadIdx.x)


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


def item_functions(run, threads):
    """The device functions for blocks of so many threads, that hold `run` scores each at a time."""

    @cuda.jit(device=True)
    def load(scores, first, n, held):
        """A thread's scores of a chunk; all loads are out before one is needed."""
        me = thread()
        for j in range(run):
            held[j] = float32(nan)
            if first + j * threads + me < n:
                held[j] = scores[first + j * threads + me]

    @cuda.jit(device=True)
    def scale_of(scores, n, levels, held, least, greatest):
        """What level_code needs: the greatest finite score, and the levels over the distance to the least."""
        me, span, low, high = thread(), threads, float32(inf), float32(-inf)
        for first in range(0, n, run * threads):
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
    def write_items(given, scale, held, counts, items):
        """A list's items, and the counts of their digits."""
        (scores, patterns, n, levels, passes, key_bits), (high, factor), me = given, scale, thread()
        none = ((DIGITS << DIGIT_BITS * (passes - 1)) - 1) << key_bits
        for first in range(0, n, run * threads):
            load(scores, first, n, held)
            for j in range(run):
                i, item = first + j * threads + me, none
                if i < n:
                    code = level_code(held[j], high, factor, levels) if levels else exact_code(held[j], patterns[i])
                    item = (int64(code) << key_bits) + i
                items[i] = item
                for p in range(passes):
                    mask = MASK if p + 1 < passes else LAST_MASK
                    cuda.atomic.add(counts, p * DIGITS + digit_of(item, key_bits + DIGIT_BITS * p, mask), 1)

    return scale_of, write_items
