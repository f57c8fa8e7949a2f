"""attend_numba.py: stage 3, the twin of attend_simt.cu in Numba CUDA. One block walks one row tile of one query head,
a thread a row: seen window, ranked history until a key tile adds too little, pooled tail, masked window. Dense
attention is the same walk with no history and no tail.

q, k, v        [batch, heads, rows, dim]               any float   any strides
k_pool, v_pool [batch, heads_kv, blocks, dim]          REAL        block means; `blocks` 0: no tail
k_spread       [batch, heads_kv, blocks, dim]          REAL        running sums of pool_numba.py
kv_order       [keys]                                  int32       ranked lists end to end
kv_offsets     [order heads of the slab, segments + 1] int64
query_order    [batch, heads_q, n_q]                   int32       rows in walking order; heads_q 0: position order
taus           [heads_q]                               REAL        a gain under it stops
out            [batch, heads_q, n_q, dim_v]            q's type    answer
lse            [batch, heads_q, n_q]                   REAL        answer, natural log
tiles, tail_blocks [batch, heads_q, row tiles]         int32       answer
tail_mass      [batch, heads_q, n_q]                   float32     answer, share of the softmax sum
`slab` is (first K/V head, first row tile, first segment); `sizes` (causal, dense, segment, block_q, tiles of a segment,
block_k, pool, shift, window); a causal row of dense attention sees its last `window` keys. Logits are natural:
scale * q . k.
grid (row tiles of the slab, K/V heads of the slab * group)   block block_q at least, MAX_ROWS at most
shared memory 2 * STEP * WIDTH REAL, MAX_ROWS + MAX_BLOCKS int32
REAL: float32 or float64   WIDTH: columns that a thread keeps, dim and dim_v at least   STEP: keys staged at a time
"""

from functools import cache
from math import inf, isfinite

from numba import cuda, int32
from s2o_cupy.kernels.copy_numba import IN_FLIGHT, stage_function
from s2o_cupy.kernels.softmax_numba import CLOSED, OPEN, TAIL, softmax_functions
from s2o_cupy.kernels.spread_numba import spread_functions

MAX_ROWS, MAX_BLOCKS = 256, 2048


@cache
def attend_kernel(real, width, spread):
    """The kernel that computes in `real` (numba.float32 or numba.float64) on rows of `width` columns at most.

    `spread`: the tail is lifted by what `k_spread` says; else it is not read.
    """
    start_row, logit_of, pooled_logit, add_key, mean_logit, close_tile, finish_row = softmax_functions(real, width)
    describe_tile, row_lift = spread_functions(real, width)
    stage = stage_function(real, width)
    step = min(32, 2**17 // (width * real.bitwidth))

    @cuda.jit(device=True)
    def add_keys(keys, values, order, first, stop, my_first, my_stop, kind, mine, tiles, pool, scale):
        """Stage keys [first, stop) of the order; add those in [my_first, my_stop) to this thread's row."""
        query, state, acc = mine
        for start in range(first, stop, step):
            count = min(step, stop - start)
            stage(keys, values, order, start, count, tiles, pool)
            for i in range(max(my_first - start, 0), min(count, my_stop - start)):
                add_key(logit_of(query, tiles[0], i, scale), kind, tiles[1], i, state, acc)

    @cuda.jit
    def attend(
        q, k, v, k_pool, v_pool, k_spread, kv_order, kv_offsets, query_order, taus, out, lse, tiles, tail_blocks,
        tail_mass, slab, sizes, scale,
    ):  # fmt: skip
        k_tile = cuda.shared.array((step, width), real)
        v_tile = cuda.shared.array((step, width), real)
        row_of = cuda.shared.array(MAX_ROWS, int32)
        walked = cuda.shared.array(MAX_BLOCKS, int32)
        query, acc = cuda.local.array(width, real), cuda.local.array(width, real)
        state, held = cuda.local.array(4, real), cuda.local.array(IN_FLIGHT, real)
        causal, dense, segment, block_q, tiles_per_segment, block_k, pool, shift, window = sizes
        (heads_q, n_q, dim), (heads_kv, n_k, dim_v) = q.shape[1:], v.shape[1:]
        group = heads_q // heads_kv
        kv, member = slab[0] + cuda.blockIdx.y // group, cuda.blockIdx.y % group
        batch, head_kv, me = kv // heads_kv, kv % heads_kv, cuda.threadIdx.x
        head, tile = head_kv * group + member, slab[1] + cuda.blockIdx.x
        s = tile // tiles_per_segment
        first_row = s * segment + tile % tiles_per_segment * block_q
        rows = min(block_q, (s + 1) * segment - first_row, n_q - first_row)
        keys, values, tau = k[batch, head_kv], v[batch, head_kv], taus[head]
        history = 0 if dense else (s * segment + shift) // pool * pool if causal else n_k
        blocks = (history + pool - 1) // pool if k_pool.shape[2] else 0

        # This thread's row and its query, and the rows of the whole tile.
        active, row, sound = me < rows, first_row + me, True
        if active:
            row = query_order[batch, head, row] if query_order.shape[1] else row
            row_of[me] = row
        for b in range(me, blocks, cuda.blockDim.x):
            walked[b] = 0
        for d in range(width):
            query[d] = real(q[batch, head, row, d]) if active and d < dim else real(0)
            sound = sound and isfinite(query[d])
        start_row(state, acc)
        cuda.syncthreads()
        lowest, highest = row_of[0], row_of[0]
        for r in range(rows):
            lowest, highest = min(lowest, row_of[r]), max(highest, row_of[r])
        unordered, mine, staged = kv_order[:0], (query, state, acc), (k_tile, v_tile, walked, held)
        # 1. Window keys that every row sees; where some row does not see key 0, all are masked.
        first = max(history, lowest + shift + 1 - window) if causal else history
        cut = causal and highest + shift + 1 > window
        seen = first if cut else lowest + shift if causal else n_k if dense else history
        add_keys(keys, values, unordered, first, seen, first, seen if active else 0, CLOSED, mine, staged, 0, scale)

        # 2. Ranked history, until a key tile adds too little to every row.
        order, tiles_walked, found, ceiling = unordered, 0, 0, real(inf)
        if not dense:
            orders = kv_offsets.shape[0] // (cuda.gridDim.y // group)
            lists = kv_offsets[(kv - slab[0]) * orders + (member if orders > 1 else 0)]
            order = kv_order[lists[s - slab[2]] : lists[s - slab[2] + 1]]
        for tile_start in range(0, len(order), block_k):
            tile_stop = min(tile_start + block_k, len(order))
            my_stop, counted = tile_stop if active else 0, pool if blocks else 0  # by pool block, for the tail
            add_keys(keys, values, order, tile_start, tile_stop, 0, my_stop, OPEN, mine, staged, counted, scale)
            ceiling = mean_logit(state, tile_stop - tile_start)
            tiles_walked += 1
            wanted = close_tile(state, tau) and active and sound
            if not cuda.syncthreads_or(int32(1 if wanted else 0)) and tau > 0:
                break

        # 3. Tail: a block that has a quarter of its keys left enters as one, no heavier than the last tile's mean key.
        lift = real(0)
        if spread and tiles_walked:
            running = k_spread[batch, head_kv, blocks - 1]
            describe_tile(q[batch, head], running, history, row_of, rows, sound, v_tile)
            share = real(history - min(tiles_walked * block_k, len(order))) / real(history)
            lift = share * share * row_lift(query, dim, v_tile, scale)
        for start in range(0, blocks, step):
            count = min(step, blocks - start)
            stage(k_pool[batch, head_kv], v_pool[batch, head_kv], unordered, start, count, staged, 0)
            for i in range(count):
                size = min(pool, history - (start + i) * pool)
                left = size - walked[start + i]
                if 4 * left >= size:
                    found += 1
                    logit = pooled_logit(logit_of(query, k_tile, i, scale) + lift, ceiling, left)
                    add_key(logit, TAIL, v_tile, i, state, acc)

        # 4. Window keys that some row does not see.
        last = highest + shift + 1 if causal else seen
        my_stop = row + shift + 1 if active else 0
        add_keys(keys, values, unordered, seen, last, my_stop - window, my_stop, CLOSED, mine, staged, 0, scale)

        if active:
            inverse, lse[batch, head, row], tail_mass[batch, head, row] = finish_row(state, sound)
            for d in range(width):  # a constant, or `acc` would not stay in registers
                if d < dim_v:
                    out[batch, head, row, d] = acc[d] * inverse
        if me == 0 and not dense:
            tiles[batch, head, tile], tail_blocks[batch, head, tile] = tiles_walked, found

    return attend
