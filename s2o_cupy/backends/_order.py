"""Stage 2 on the CPU: the order of a list's keys, by counting quantised scores or by radix."""

import numpy as np

from s2o_cupy.backends._lanes import BYTES, fill, inner, kernel, larger, load, select_le, store, subtract


@kernel
def order_levels(scores, index, history, listed, levels, order, start):
    """Counting order of one list by quantised score: order[start : start + listed], int32.

    scores [lists, width] float32; +inf first, levels, then -inf and NaN; ties by index.
    """
    s = scores[index]
    low, high = _finite_range(s, history)
    spread = high - low
    factor = np.float32(levels) / spread
    flat = not (spread > 0 and factor > 0 and factor < np.inf)
    bucket = np.empty(history, np.int32)
    slot = np.zeros(levels + 3, np.int64)
    for j in range(history):
        x = s[j]
        place = levels + 1
        if x <= np.float32(3.4028235e38) and x >= np.float32(-3.4028235e38):
            place = 1 if flat else 1 + min(levels - 1, np.int64((high - x) * factor))
        elif x > 0:
            place = 0
        bucket[j] = place
        slot[place + 1] += 1
    for place in range(levels + 2):
        slot[place + 1] += slot[place]
    for j in range(history):
        at = slot[bucket[j]]
        slot[bucket[j]] = at + 1
        if at < listed:
            order[start + at] = j


@inner
def _finite_range(s, n):
    """Least and greatest finite number of s[:n], float32; (inf, -inf) if there is none."""
    largest, none = fill(s, 3.4028235e38), fill(s, -np.inf)
    high, low, zero = none, none, fill(s, 0.0)
    width = BYTES // s.itemsize
    whole = n // width * width
    for j in range(0, whole, width):
        x = load(s, j)
        high = larger(select_le(x, largest, x, none), high)
        x = subtract(zero, x)
        low = larger(select_le(x, largest, x, none), low)
    ends = np.empty(2 * width, s.dtype)
    store(ends, 0, high)
    store(ends, width, low)
    top, bottom = s.dtype.type(-np.inf), s.dtype.type(np.inf)
    for c in range(width):
        top, bottom = max(top, ends[c]), min(bottom, -ends[width + c])
    for j in range(whole, n):
        if np.isfinite(s[j]):
            top, bottom = max(top, s[j]), min(bottom, s[j])
    return bottom, top


@kernel
def order_exactly(scores, index, history, listed, order, start):
    """Descending order of one list by radix: order[start : start + listed], int32; ties by index."""
    bits = scores[index].view(np.uint32)
    keys, ids = np.empty((2, history), np.uint32), np.empty((2, history), np.int32)
    for j in range(history):
        x, word = scores[index, j], np.uint32(bits[j])
        if x == 0:
            word = np.uint32(0)
        if np.isnan(x) or x == -np.inf:
            keys[0, j] = np.uint32(0xFFFFFFFF)
        else:
            keys[0, j] = word if word >> 31 else ~word & np.uint32(0x7FFFFFFF)
        ids[0, j] = j
    side = 0
    for shift in (0, 11, 22):
        slot = np.zeros(2049, np.int64)
        for j in range(history):
            slot[((keys[side, j] >> shift) & 2047) + 1] += 1
        for place in range(2048):
            slot[place + 1] += slot[place]
        for j in range(history):
            place = (keys[side, j] >> shift) & 2047
            at = slot[place]
            slot[place] = at + 1
            keys[1 - side, at] = keys[side, j]
            ids[1 - side, at] = ids[side, j]
        side = 1 - side
    for j in range(listed):
        order[start + j] = ids[side, j]
