"""Dense attention and pooled keys on the CPU."""

import numpy as np

from s2o_cupy.backends._lanes import BYTES, kernel, lean
from s2o_cupy.backends._storage import pack_rows
from s2o_cupy.backends._tiles import (
    HEAD,
    PLAIN,
    POSITION,
    ROW,
    TILE,
    absorb,
    absorb_masked,
    finish,
    hide_nonfinite,
    load_queries,
    make_work,
)


@kernel
def pool_blocks(pack, x, mean, b, h, size):
    """mean[b, h, block]: the mean key of a block. x [B, H, N, D] storage type, mean [B, H, blocks, D] compute type."""
    lean()
    nothing, dim = np.empty(0, np.int32), x.shape[3]
    row, total = np.zeros(dim, mean.dtype), np.zeros(dim)
    for block in range(mean.shape[2]):
        stop = min((block + 1) * size, x.shape[2])
        total[:] = 0
        for key in range(block * size, stop):
            pack_rows(pack, x, b, h, nothing, key, 1, row, 0, dim)
            for d in range(dim):
                total[d] += row[d]
        for d in range(dim):
            mean[b, h, block, d] = total[d] / (stop - block * size)


@kernel
def pool_spread(pack, x, mean, spread, b, h, size):
    """spread[b, h, block]: the variance of the keys around their own block's `mean`, over all blocks up to this one.

    x [B, H, N, D] storage type; mean, spread [B, H, blocks, D] compute type.
    """
    lean()
    nothing, dim = np.empty(0, np.int32), x.shape[3]
    row, total = np.zeros(dim, mean.dtype), np.zeros(dim)
    for block in range(mean.shape[2]):
        stop = min((block + 1) * size, x.shape[2])
        for key in range(block * size, stop):
            pack_rows(pack, x, b, h, nothing, key, 1, row, 0, dim)
            for d in range(dim):
                away = np.float64(row[d]) - mean[b, h, block, d]
                total[d] += away * away
        for d in range(dim):
            spread[b, h, block, d] = total[d] / stop


@kernel
def dense_rows(step, pack, q, k, v, out, lse, b, h, first, n, shift, causal, window, factor):
    """Exact attention of rows first .. first + n of all the query heads of one K/V head; arrays as above.

    A causal row sees the last `window` keys up to its own position.
    """
    lean()
    group, like, nothing = q.shape[1] // k.shape[1], np.empty(0, lse.dtype), np.empty(0, np.int32)
    panels = -(-n * like.itemsize // BYTES)
    work = make_work(step, group * panels, q.shape[3], v.shape[3], like)
    for g in range(group):
        for i in range(n):
            seat = work.seat[g * panels * work.width + i]
            seat[HEAD], seat[ROW] = h * group + g, first + i
            seat[POSITION] = first + i + shift if causal else k.shape[2] - 1
    load_queries(work, pack, q, b, factor)
    top = first + n - 1 + shift if causal else k.shape[2] - 1
    start = max(first + shift + 1 - window, 0) if causal else 0
    for key in range(start, top + 1, TILE):
        count = min(TILE, top + 1 - key)
        pack_rows(pack, k, b, h, nothing, key, count, work.x, work.k, work.dim)
        pack_rows(pack, v, b, h, nothing, key, count, work.x, work.v, work.v_row)
        last = key + count - 1
        masks = work.seat[0, POSITION] < last or top + 1 - window > key
        nonfinite = masks and hide_nonfinite(work, count)
        for p in range(group * panels):
            low = work.seat[p * work.width, POSITION]
            if low >= last and min(low + work.width - 1, top) + 1 - window <= key:
                absorb(work, p, 0, count, PLAIN)
            else:
                absorb_masked(work, p, key, np.int64(0), count, window, nonfinite)
    finish(work, out, lse, b)
