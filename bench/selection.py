"""What the peers walk: the paper's ranking, PBS-Attn's permutation and blocks, and pooled blocks, in PyTorch.

All are causal over q (Hq, N, D) and k (Hkv, N, D); a segment's history is every key before it. `bench/baselines.py`
states the block rules in NumPy, and the tests hold these to it.
"""

from __future__ import annotations

import itertools

import torch

from bench.baselines import BLOCK, PBS_SEGMENT

SORT_GROUPS = 8  # runs of segments that are sorted together, each up to its own longest history


class Lists:
    """Room for the ranked keys of every (query head, segment), and where each list begins.

    Segments of like history lie together in rectangles, so that one batched sort fills a rectangle.
    """

    def __init__(self, heads: int, n: int, segment: int, device):
        self.segment, count = segment, n // segment
        bounds = [count * i // SORT_GROUPS for i in range(SORT_GROUPS + 1)]
        runs = [(a, b, (b - 1) * segment) for a, b in itertools.pairwise(bounds) if b > max(a, 1)]
        self.starts = torch.zeros(heads, count, dtype=torch.int64, device=device)
        self.runs, total = [], 0
        for first, last, longest in runs:
            places = torch.arange(heads * (last - first), device=device).view(heads, -1)
            self.starts[:, first:last] = total + places * longest
            self.runs.append((first, last, longest, total))
            total += heads * (last - first) * longest
        self.order = torch.empty(total, dtype=torch.int32, device=device)

    def sort(self, score) -> None:
        """Fill every history in full order by torch.sort, a rectangle at a time; score (Hq, segments, N)."""
        for first, last, longest, start in self.runs:
            ends = torch.arange(first, last, device=score.device)[:, None] * self.segment
            past = torch.arange(longest, device=score.device) >= ends
            part = score[:, first:last, :longest].masked_fill(past, float("-inf"))
            ranked = part.sort(dim=-1, descending=True).indices
            self.order[start : start + ranked.numel()].view_as(ranked).copy_(ranked)


def tile_depths(heads: int, n: int, segment: int, block: int, device, share: float = 1.0):
    """Key tiles of each row tile's history, int32 (heads, N / block): a share of it, rounded up."""
    history = torch.arange(0, n, block, device=device) // segment * segment / block
    return torch.ceil(history * share).to(torch.int32).expand(heads, -1).contiguous()


def mean_scores(q, k, segment: int) -> torch.Tensor:
    """The paper's score, each segment's mean query times every key: (Hq, segments, N) in q's type."""
    heads, n, dim = q.shape
    means = q.view(heads, n // segment, segment, dim).mean(2)
    return torch.matmul(means.view(len(k), -1, dim), k.transpose(1, 2)).view(heads, -1, n)


def permute_keys(q, k, v, scale: float):
    """PBS-Attn's keys and values, (Hq, N, D) each: by the last queries' mean attention, inside segments of 256 keys.

    Also the place of the first token in the permuted order, int64 (Hq,).
    """
    heads, n, dim = q.shape
    group = heads // len(k)
    future = torch.arange(BLOCK, device=q.device) > torch.arange(BLOCK, device=q.device)[:, None]
    starts = torch.arange(0, n, PBS_SEGMENT, device=q.device)[:, None]
    moved_k, moved_v = torch.empty_like(q), torch.empty(heads, n, v.shape[2], dtype=v.dtype, device=v.device)
    first = torch.empty(heads, dtype=torch.int64, device=q.device)
    for kv in range(len(k)):  # a K/V head at a time: its logits are what takes memory
        part = slice(kv * group, (kv + 1) * group)
        logit = torch.baddbmm(q.new_empty(()), q[part, -BLOCK:], k[kv].T.expand(group, -1, -1), beta=0, alpha=scale)
        logit[..., -BLOCK:].masked_fill_(future, float("-inf"))
        received = logit.softmax(-1, dtype=torch.float32).mean(1)
        within = received.view(group, -1, PBS_SEGMENT).argsort(dim=-1, descending=True, stable=True)
        first[part] = (within[:, 0] == 0).int().argmax(1)
        order = (within + starts).view(-1)
        torch.index_select(k[kv], 0, order, out=moved_k[part].view(-1, dim))
        torch.index_select(v[kv], 0, order, out=moved_v[part].view(-1, v.shape[2]))
    return moved_k, moved_v, first


def top_cdf_blocks(q, k, segment: int, scale: float, first, share: float):
    """Key blocks that each query block takes, best first: int32 (Hq, blocks, blocks), and how many, int32 (Hq, blocks).

    The greatest pooled probabilities up to `share`, of blocks before the query block's segment, and always the block
    that holds the first token (at place `first` of each head's order). k is (Hkv, N, D), or permuted (Hq, N, D).
    """
    heads, n, dim = q.shape
    blocks = n // BLOCK
    pooled_q, pooled_k = (x.view(len(x), blocks, BLOCK, dim).float().mean(2) for x in (q, k))
    logit = torch.matmul(pooled_q.view(len(k), -1, dim), pooled_k.transpose(1, 2)).view(heads, blocks, blocks) * scale
    block = torch.arange(blocks, device=q.device)
    before = block * BLOCK // segment * segment // BLOCK
    logit.masked_fill_(block >= before[:, None], float("-inf"))
    weight, ranked = torch.softmax(logit, -1).nan_to_num_(0.0).sort(dim=-1, descending=True, stable=True)
    if share >= 1:
        count = before.expand(heads, -1).clone()
    else:
        count = torch.minimum((weight.cumsum(-1) < share).sum(-1) + 1, before)
    sink = (first // BLOCK)[:, None, None]
    found = (ranked == sink) & (block < count[..., None])
    missing = ~found.any(-1) & (before > sink[..., 0])
    ranked = ranked.to(torch.int32)
    last = count.clamp(max=blocks - 1)[..., None]
    ranked.scatter_(-1, last, torch.where(missing[..., None], sink.to(torch.int32), ranked.gather(-1, last)))
    return ranked, (count + missing).to(torch.int32)
