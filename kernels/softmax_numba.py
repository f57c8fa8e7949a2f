"""softmax_numba.py: one query row's online softmax, for attend_numba.py: what a thread keeps and does to it.

state  [4]      REAL   running maximum, then three sums of weights in its frame: closed, open (of the key tile being
                       walked) and tail; the weight of a key is exp(logit - maximum)
acc    [dim_v]  REAL   the weighted sum of values, in the same frame
"""

from functools import cache
from math import exp, inf, log, nan

from numba import cuda

MAX, CLOSED, OPEN, TAIL = range(4)


@cache
def softmax_functions(real, width):
    """The device functions that compute in `real` (numba.float32 or numba.float64) on rows of `width` columns."""

    @cuda.jit(device=True)
    def frame_of(state):
        """A maximum that can be subtracted from -inf."""
        return real(0) if state[MAX] == -inf else state[MAX]

    @cuda.jit(device=True)
    def log_of(x):
        return real(log(x)) if x > 0 else real(-inf) if x == 0 else real(nan)

    @cuda.jit(device=True)
    def logit_of(query, k_tile, i, scale):
        total = real(0)
        for d in range(width):
            total += query[d] * k_tile[i, d]
        return total * scale

    @cuda.jit(device=True)
    def start_row(state, acc):
        state[MAX], state[CLOSED], state[OPEN], state[TAIL] = real(-inf), real(0), real(0), real(0)
        for d in range(width):
            acc[d] = real(0)

    @cuda.jit(device=True)
    def pooled_logit(logit, ceiling, left):
        """The logit of a pooled key that stands for `left` keys, none of them above the ceiling."""
        return (ceiling if logit > ceiling else logit) + log_of(real(left))

    @cuda.jit(device=True)
    def add_key(logit, kind, v_tile, i, state, acc):
        """Add one key, whose weight counts as `kind`; a new maximum rescales what is there."""
        if logit > state[MAX]:
            shrink = exp(state[MAX] - logit)
            state[MAX] = logit
            for part in range(CLOSED, TAIL + 1):
                state[part] *= shrink
            for d in range(width):
                acc[d] *= shrink
        weight = exp(logit - frame_of(state))
        state[kind] += weight
        for d in range(width):
            acc[d] += weight * v_tile[i, d]

    @cuda.jit(device=True)
    def mean_logit(state, keys):
        """The log of the mean weight of the `keys` keys of the open tile."""
        return frame_of(state) + log_of(state[OPEN] / real(keys))

    @cuda.jit(device=True)
    def close_tile(state, tau):
        """Count the open tile as walked; whether it gained the row enough to go on. A row gone NaN says no."""
        before, gained = state[CLOSED], state[OPEN]
        state[CLOSED], state[OPEN] = before + gained, real(0)
        if before == 0:
            return state[MAX] > -inf and gained >= 0
        return gained / before >= tau

    @cuda.jit(device=True)
    def finish_row(state, sound):
        """What acc is multiplied by, the log-sum-exp and the tail's share of the mass; NaN for a bad query."""
        mass = state[CLOSED] + state[TAIL]
        if not sound:
            return real(nan), real(nan), real(0)
        if mass == 0:
            return real(0), real(-inf), real(0)
        share = state[TAIL] / mass
        return real(1) / mass, state[MAX] + log_of(mass), share if share > 0 else real(0)

    return start_row, logit_of, pooled_logit, add_key, mean_logit, close_tile, finish_row
