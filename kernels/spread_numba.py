"""spread_numba.py: what tail="spread" adds to a row's pooled logits, for attend_numba.py.

queries [n_q, dim]       any float   any strides; of one head
running [dim]            REAL        squared departures of all history keys from their block's mean, summed
row_of  [MAX_ROWS]       int32       the tile's rows; afterwards -1 for one that is not finite
about   [2, WIDTH]       REAL        mean of the tile's finite queries, mean squared departure; it may have more rows
The mean of a block's exps exceeds exp of its mean key's logit: were departures normal and columns independent, by a
factor exp(lift), lift = 1/2 * sum of (scale * q * departure)^2. The mean query is taken from q first: the heavy keys
along it were walked. attend_numba.py multiplies by the square of the share of the history that was not walked.
"""

from functools import cache

from numba import cuda

from s2o_cupy.settings import MOST_LIFT

MEAN, DEPARTURE = range(2)


@cache
def spread_functions(real, width):
    """The device functions that compute in `real` (numba.float32 or numba.float64) on rows of `width` columns."""

    @cuda.jit(device=True)
    def describe_tile(queries, running, keys, row_of, rows, sound, about):
        """Fill `about` for the whole block, a thread a column; `sound`: whether this thread's row is finite."""
        me = cuda.threadIdx.x
        cuda.syncthreads()
        if me < rows and not sound:
            row_of[me] = -1
        cuda.syncthreads()
        for d in range(me, running.shape[0], cuda.blockDim.x):
            total, found = real(0), 0
            for r in range(rows):
                if row_of[r] >= 0:
                    total += real(queries[row_of[r], d])
                    found += 1
            about[MEAN, d], about[DEPARTURE, d] = total / real(max(found, 1)), running[d] / real(keys)
        cuda.syncthreads()

    @cuda.jit(device=True)
    def row_lift(query, dim, about, scale):
        """A row's lift, MOST_LIFT at most, and 0 where it is NaN, as behind a key that is not finite."""
        total = real(0)
        for d in range(width):
            if d < dim:
                x = scale * (query[d] - about[MEAN, d])
                total += x * x * about[DEPARTURE, d]
        return min(total * real(0.5), real(MOST_LIFT)) if total >= 0 else real(0)

    return describe_tile, row_lift
