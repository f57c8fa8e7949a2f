"""step1_naive.py: the attend stage as one writes it down. A thread walks the keys of one query row, in global memory.

q      [heads_q, n, dim]              float16
k, v   [heads_kv, n, dim]             float16
order  [keys]                         int32     ranked lists end to end
starts [heads_q, segments + 1]        int64     where the lists of a head start in it
out    [heads_q, n, dim]              float16   answer
tiles  [heads_q, row tiles]           int32     answer: key tiles that a row tile walked
A row tile is the rows of a block; it stops when a key tile adds less than `tau` to each of its rows.
grid (row tiles, heads_q)   block rows of a tile
"""

from math import exp, inf

from numba import cuda, float32, int32

MAX_DIM = 256


@cuda.jit(device=True)
def add_key(query, key, value, acc, softmax, scale):
    """Add one key to a row; `softmax` is (greatest logit, mass before this key tile, mass of this key tile)."""
    top, closed, opened = softmax
    logit = float32(0)
    for d in range(query.shape[0]):
        logit += float32(query[d]) * float32(key[d])
    logit *= scale
    if logit > top:
        shrink = exp(top - logit)
        closed, opened, top = closed * shrink, opened * shrink, logit
        for d in range(query.shape[0]):
            acc[d] *= shrink
    weight = exp(logit - top)
    for d in range(query.shape[0]):
        acc[d] += weight * float32(value[d])
    return top, closed, opened + weight


@cuda.jit(cache=True)
def attend(q, k, v, order, starts, out, tiles, segment, block_k, tau, scale):
    head, tile = cuda.blockIdx.y, cuda.blockIdx.x
    first = tile * cuda.blockDim.x
    row, history = first + cuda.threadIdx.x, first // segment * segment
    kv, active = head // (q.shape[0] // k.shape[0]), row < q.shape[1]
    query, keys, values = q[head, row if active else first], k[kv], v[kv]
    acc = cuda.local.array(MAX_DIM, float32)
    for d in range(q.shape[2]):
        acc[d] = 0
    softmax = float32(-inf), float32(0), float32(0)
    # 1. The segment's own keys that every row of the tile sees.
    for key in range(history, first):
        softmax = add_key(query, keys[key], values[key], acc, softmax, scale)
    softmax = softmax[0], softmax[1] + softmax[2], float32(0)
    # 2. The keys before the segment by rank, until a tile of them adds too little.
    start, walked = starts[head, history // segment], 0
    while walked * block_k < history:
        for i in range(walked * block_k, min((walked + 1) * block_k, history)):
            key = order[start + i]
            softmax = add_key(query, keys[key], values[key], acc, softmax, scale)
        walked += 1
        top, closed, opened = softmax
        wanted = active and (closed == 0 or opened >= tau * closed)
        softmax = top, closed + opened, float32(0)
        if not cuda.syncthreads_or(int32(1 if wanted else 0)):
            break
    # 3. The segment's own keys that only later rows of the tile see.
    if active:
        for key in range(first, row + 1):
            softmax = add_key(query, keys[key], values[key], acc, softmax, scale)
        for d in range(q.shape[2]):
            out[head, row, d] = acc[d] / (softmax[1] + softmax[2])
    if cuda.threadIdx.x == 0:
        tiles[head, tile] = walked
