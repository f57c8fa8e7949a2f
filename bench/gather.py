"""Triton kernels of the peers, written from the paper's description: gathering attention, and a rank that is no sort.

PyTorch tensors in and out. ``N`` and the segments are multiples of the tiles, so that no edge needs a mask: these are
rivals to be timed at their best, not a library.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bench.baselines import BLOCK

BLOCK_M = BLOCK_N = BLOCK
TIERS, BINS = 16, 512


@triton.jit
def _tile(q, keys, values, acc, high, mass, seen, scale, MASKED: tl.constexpr):
    """One key tile into the online softmax: accumulator (rows, D), greatest logit and mass of each row, base 2."""
    logit = tl.dot(q, tl.trans(tl.load(keys)))
    if MASKED:
        logit = tl.where(seen, logit, float("-inf"))
    above = tl.maximum(high, tl.max(logit, 1) * scale)
    weight = tl.math.exp2(logit * scale - above[:, None])
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


def attend(q, k, v, lists, starts, depths, scale, *, segment, tau=None, chunk=0, own=None, blocks=False):
    """Causal attention of q (Hq, N, D) over its own segment and, in the order of its list, earlier keys.

    ``chunk`` key tiles lie between two looks at the gain against ``tau``; 0 walks ``depths`` tiles of each row tile.
    With ``blocks`` lists hold blocks of k and v, which may then be permuted and one a query head, and ``own`` holds
    the keys and values of the own segment in order. Returns out, and the key tiles each row tile walked.
    """
    heads, n, dim = q.shape
    if segment % (max(chunk, 1) * BLOCK_N):  # a walk would go on past the end of its list
        raise ValueError(f"chunk is {chunk} at segment {segment}; allowed: whole chunks of {BLOCK_N} keys in a segment")
    own_k, own_v = own or (k, v)
    launch = {"num_warps": 8, "num_stages": 2 if dim <= 128 else 1}  # shared memory holds one stage of 256
    out = torch.empty_like(q)
    walked = torch.empty(heads, n // BLOCK_M, dtype=torch.int32, device=q.device)
    _attend[(n // BLOCK_M, heads)](
        q, k, v, own_k, own_v, out, lists, starts, depths, walked, n, scale * 1.4426950408889634, tau or 0.0,
        GROUP=heads // len(k), OWN_GROUP=heads // len(own_k), SEGMENT=segment, LIST=n // starts.shape[1],
        BLOCKS=blocks, CHUNK=chunk, D=dim, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, **launch,
    )  # fmt: skip
    return out, walked


@triton.jit
def _tier_cuts(
    score, edges, cuts, begins, n, SEGMENT: tl.constexpr, C: tl.constexpr, BINS: tl.constexpr, TIERS: tl.constexpr
):
    """Parts each list into tiers by a histogram between its greatest and its least score.

    edges gets the greatest score and a bin's width, cuts each tier's last bin, begins how many keys come before it.
    """
    segments = tl.num_programs(0)
    segment = segments - 1 - tl.program_id(0)  # the longest first
    row = tl.program_id(1).to(tl.int64) * segments + segment
    history = segment * SEGMENT
    score += row * n
    keys = tl.arange(0, C)
    low, high = tl.full([C], float("inf"), tl.float32), tl.full([C], float("-inf"), tl.float32)
    for start in range(0, history, C):
        seen = start + keys < history
        x = tl.load(score + start + keys, mask=seen).to(tl.float32)
        low, high = tl.minimum(low, tl.where(seen, x, float("inf"))), tl.maximum(high, tl.where(seen, x, float("-inf")))
    least, most = tl.min(low, 0), tl.max(high, 0)
    width = tl.maximum((most - least) / BINS, 1e-20)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, history, C):
        seen = start + keys < history
        x = tl.load(score + start + keys, mask=seen).to(tl.float32)
        place = tl.minimum(((most - x) / width).to(tl.int32), BINS - 1)
        counts += tl.histogram(tl.where(seen, place, BINS - 1), BINS)
    past = (history + C - 1) // C * C - history  # counted in the last bin
    counts -= tl.where(tl.arange(0, BINS) == BINS - 1, past, 0)
    reached = tl.cumsum(counts, 0)
    tiers = tl.arange(0, TIERS)
    wanted = history * tl.math.exp2((tiers - (TIERS - 1)) * 0.5849625)  # log2(1.5)
    last = tl.sum((reached[:, None] < wanted[None, :]).to(tl.int32), 0)  # the bin that reaches what a tier wants
    last = tl.where(tiers < TIERS - 1, last, BINS)
    before = tl.sum(tl.where(tl.arange(0, BINS)[:, None] <= last[None, :], counts[:, None], 0), 0)  # with its own
    tl.store(edges + row * 2, most)
    tl.store(edges + row * 2 + 1, width)
    tl.store(cuts + row * TIERS + tiers, last)
    tl.store(begins + row * TIERS + tiers + 1, before, mask=tiers < TIERS - 1)
    tl.store(begins + row * TIERS, 0)


@triton.jit
def _tier_deal(
    score,
    edges,
    cuts,
    begins,
    order,
    starts,
    n,
    SEGMENT: tl.constexpr,
    C: tl.constexpr,
    BINS: tl.constexpr,
    TIERS: tl.constexpr,
    FIELDS: tl.constexpr,  # counters of 10 bits in a word: C is at most 512
):
    """Writes each list tier by tier, by position inside a tier: a scan of packed words counts the keys of a chunk."""
    segments = tl.num_programs(0)
    segment = segments - 1 - tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * segments + segment
    score += row * n
    order += tl.load(starts + row)
    most, width = tl.load(edges + row * 2), tl.load(edges + row * 2 + 1)
    tiers, keys = tl.arange(0, TIERS), tl.arange(0, C)
    place = tl.load(begins + row * TIERS + tiers)
    history = segment * SEGMENT
    for start in range(0, history, C):
        seen = start + keys < history
        x = tl.load(score + start + keys, mask=seen).to(tl.float32)
        at = tl.where(seen, tl.minimum(((most - x) / width).to(tl.int32), BINS - 1), BINS)  # past the end: last of all
        tier = tl.zeros([C], tl.int32)
        for t in tl.static_range(TIERS - 1):
            tier += (at > tl.load(cuts + row * TIERS + t)).to(tl.int32)
        upto = tl.zeros([C], tl.int64)
        for word in tl.static_range((TIERS + FIELDS - 1) // FIELDS):
            field = (tier - word * FIELDS).to(tl.int64)
            inside = (field >= 0) & (field < FIELDS)
            shift = tl.where(inside, field, 0) * 10
            scanned = tl.cumsum(tl.where(inside, tl.full([C], 1, tl.int64) << shift, 0), 0)
            upto = tl.where(inside, (scanned >> shift) & 1023, upto)
        tl.store(order + tl.gather(place, tier, 0) + upto - 1, start + keys, mask=seen)
        place += tl.histogram(tier, TIERS)


def rank_in_tiers(score, starts, segment: int, order) -> None:
    """Keys of each history in tiers of falling score, into int32 `order` at `starts`; no order inside a tier.

    Each tier and those before it hold 1.5 times what those before it hold. score (Hq, segments, N) of any float type,
    read up to each segment's first key; starts int64 (Hq, segments).
    """
    heads, segments, n = score.shape
    edges = torch.empty(heads, segments, 2, device=score.device)
    cuts, begins = (torch.empty(heads, segments, TIERS, dtype=torch.int32, device=score.device) for _ in range(2))
    sizes, grid = {"SEGMENT": segment, "BINS": BINS, "TIERS": TIERS, "num_warps": 4}, (segments, heads)
    _tier_cuts[grid](score, edges, cuts, begins, n, C=1024, **sizes)
    _tier_deal[grid](score, edges, cuts, begins, order, starts, n, C=512, FIELDS=6, **sizes)
