"""Triton kernels of the peers, written from the paper's description: gathering attention, and a rank that is no sort.

PyTorch tensors in and out. ``N`` and the segments are multiples of the tiles, so that no edge needs a mask: these are
rivals to be timed at their best, not a library.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_M, BLOCK_N = 128, 128
TIERS, BINS, RATIO = 16, 512, 1.5  # a tier holds RATIO times as many keys as all tiers before it
LAUNCH = {"num_warps": 8, "num_stages": 2}


@triton.jit
def _tile(q, keys, values, acc, high, mass, seen, scale, MASKED: tl.constexpr):
    """One key tile into the online softmax: accumulator (rows, D), greatest logit and mass of each row, base 2."""
    logit = tl.dot(q, tl.trans(tl.load(keys))) * scale
    if MASKED:
        logit = tl.where(seen, logit, float("-inf"))
    above = tl.maximum(high, tl.max(logit, 1))
    weight = tl.math.exp2(logit - above[:, None])
    shrink = tl.math.exp2(high - above)
    mass = mass * shrink + tl.sum(weight, 1)
    loaded = tl.load(values)
    acc = tl.dot(weight.to(loaded.dtype), loaded, acc * shrink[:, None])
    return acc, above, mass


@triton.jit
def _attend(
    q,  # (Hq, N, D)
    k,  # (Hkv, N, D), or (Hq, N, D) with GROUP 1
    v,
    own_k,  # the same in position order, for the rows' own segment
    own_v,
    out,  # (Hq, N, D)
    lists,  # int32: ranked keys, or with BLOCKS chosen blocks of BLOCK_N keys
    starts,  # int64 (Hq, N / LIST): where a list begins
    depths,  # int32 (Hq, N / BLOCK_M): key tiles that a row tile may walk
    walked,  # int32 (Hq, N / BLOCK_M): key tiles that it did
    n,
    scale,  # natural scale times log2(e)
    tau,
    GROUP: tl.constexpr,
    OWN_GROUP: tl.constexpr,
    SEGMENT: tl.constexpr,  # the segment that is dense
    LIST: tl.constexpr,  # queries that share a list
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,  # key tiles between two votes; 0 never stops
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles = tl.num_programs(0)
    tile = tiles - 1 - tl.program_id(0)  # the longest first
    head = tl.program_id(1).to(tl.int64)
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    near, dims = tl.arange(0, BLOCK_N), tl.arange(0, D)
    place = head * n * D + rows[:, None] * D + dims[None, :]
    queries = tl.load(q + place)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)

    mine = own_k + (head // OWN_GROUP) * n * D + dims[None, :]
    mine_v = own_v + (head // OWN_GROUP) * n * D + dims[None, :]
    for start in range(first // SEGMENT * SEGMENT, first + BLOCK_M, BLOCK_N):
        keys = start + near
        seen = keys[None, :] <= rows[:, None]
        at = keys[:, None] * D
        acc, high, mass = _tile(queries, mine + at, mine_v + at, acc, high, mass, seen, scale, True)

    k += (head // GROUP) * n * D
    v += (head // GROUP) * n * D
    ranked = lists + tl.load(starts + head * (n // LIST) + first // LIST)
    depth = tl.load(depths + head * tiles + tile)
    done = 0
    if CHUNK == 0:
        for i in range(0, depth):
            if BLOCKS:
                keys = tl.load(ranked + i) * BLOCK_N + near
            else:
                keys = tl.load(ranked + i * BLOCK_N + near)
            at = keys[:, None] * D + dims[None, :]
            acc, high, mass = _tile(queries, k + at, v + at, acc, high, mass, keys, scale, False)
        done = depth
    else:
        go = depth > 0
        while go:
            high_before, mass_before = high, mass
            for i in range(done, done + CHUNK):
                keys = tl.load(ranked + i * BLOCK_N + near)
                at = keys[:, None] * D + dims[None, :]
                acc, high, mass = _tile(queries, k + at, v + at, acc, high, mass, keys, scale, False)
            mass_before *= tl.math.exp2(high_before - high)
            gain = tl.max((mass - mass_before) / mass_before, 0)
            done += CHUNK
            go = (gain >= tau) & (done < depth)
    tl.store(walked + head * tiles + tile, done)
    tl.store(out + place, (acc / mass[:, None]).to(queries.dtype))


def attend(q, k, v, lists, starts, depths, scale, *, segment, tau=None, chunk=0, own=None, blocks=False, launch=LAUNCH):
    """Causal attention of q (Hq, N, D) over its own segment and, in the order of its list, earlier keys.

    ``chunk`` key tiles lie between two looks at the gain against ``tau``; 0 walks ``depths`` tiles of each row tile.
    With ``blocks`` lists hold blocks of k and v, which may then be permuted and one a query head, and ``own`` holds
    the keys and values of the own segment in order. Returns out, and the key tiles each row tile walked.
    """
    heads, n, dim = q.shape
    own_k, own_v = own or (k, v)
    out = torch.empty_like(q)
    walked = torch.empty(heads, n // BLOCK_M, dtype=torch.int32, device=q.device)
    _attend[(n // BLOCK_M, heads)](
        q, k, v, own_k, own_v, out, lists, starts, depths, walked, n, scale * 1.4426950408889634, tau or 0.0,
        GROUP=heads // len(k), OWN_GROUP=heads // len(own_k), SEGMENT=segment, LIST=n // starts.shape[1],
        BLOCKS=blocks, CHUNK=chunk, D=dim, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, **launch,
    )  # fmt: skip
    return out, walked


@triton.jit
def _tier_cuts(score, cuts, n, SEGMENT: tl.constexpr, C: tl.constexpr, BINS: tl.constexpr, TIERS: tl.constexpr):
    """The scores that part each list into tiers, from a histogram between its least and its greatest."""
    segments = tl.num_programs(0)
    segment = segments - 1 - tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * segments + segment
    history = segment * SEGMENT
    score += row * n
    keys = tl.arange(0, C)
    low, high = tl.full([C], float("inf"), tl.float32), tl.full([C], float("-inf"), tl.float32)
    for start in range(0, history, C):
        x = tl.load(score + start + keys).to(tl.float32)
        low, high = tl.minimum(low, x), tl.maximum(high, x)
    least, most = tl.min(low, 0), tl.max(high, 0)
    width = tl.maximum((most - least) / BINS, 1e-20)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, history, C):
        x = tl.load(score + start + keys).to(tl.float32)
        counts += tl.histogram(tl.minimum(((most - x) / width).to(tl.int32), BINS - 1), BINS)
    reached = tl.cumsum(counts, 0).to(tl.float32)
    tiers = tl.arange(0, TIERS)
    wanted = history * tl.math.exp2((tiers - (TIERS - 1)) * 0.5849625)  # log2(1.5)
    bins = tl.sum((reached[:, None] < wanted[None, :]).to(tl.int32), 0)
    tl.store(cuts + row * TIERS + tiers, tl.where(tiers < TIERS - 1, most - (bins + 1) * width, float("-inf")))


@triton.jit
def _tier_deal(score, cuts, order, starts, n, SEGMENT: tl.constexpr, C: tl.constexpr, TIERS: tl.constexpr):
    """Writes each list tier by tier, by position inside a tier: a counting pass for where tiers begin, then a deal."""
    segments = tl.num_programs(0)
    segment = segments - 1 - tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * segments + segment
    history = segment * SEGMENT
    score += row * n
    order += tl.load(starts + row)
    tiers, keys = tl.arange(0, TIERS), tl.arange(0, C)
    cut = tl.load(cuts + row * TIERS + tiers)
    passed = tl.zeros([TIERS], tl.int32)
    for start in range(0, history, C):
        x = tl.load(score + start + keys).to(tl.float32)
        passed += tl.sum((x[:, None] >= cut[None, :]).to(tl.int32), 0)
    place = tl.sum(tl.where(tiers[:, None] == tiers[None, :] - 1, passed[:, None], 0), 0)  # where each tier goes on
    for start in range(0, history, C):
        x = tl.load(score + start + keys).to(tl.float32)
        tier = tl.sum((x[:, None] < cut[None, :]).to(tl.int32), 1)
        inside = (tier[:, None] == tiers[None, :]).to(tl.int32)
        upto = tl.cumsum(inside, 0)
        at = tl.sum(inside * (upto - 1 + place[None, :]), 1)
        tl.store(order + at, start + keys)
        place += tl.sum(inside, 0)


def rank_in_tiers(score, starts, segment: int, order):
    """Keys of each history in tiers of falling score, into int32 `order` at `starts`; no order inside a tier.

    score (Hq, segments, N) of any float type, read up to each segment's first key; starts int64 (Hq, segments).
    """
    heads, segments, n = score.shape
    cuts = torch.empty(heads, segments, TIERS, device=score.device)
    grid = (segments, heads)
    _tier_cuts[grid](score, cuts, n, SEGMENT=segment, C=min(segment, 1024), BINS=BINS, TIERS=TIERS, num_warps=4)
    _tier_deal[grid](score, cuts, order, starts, n, SEGMENT=segment, C=min(segment, 512), TIERS=TIERS, num_warps=4)
    return order
