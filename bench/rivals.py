"""The peers of `bench peers`: PyTorch's and other dense kernels, and sparse methods in three steps each.

A sparse peer ranks (whatever does not depend on its knob), chooses at a knob, and walks what was chosen; `walk` returns
the output and the pairs it computed. A knob is above 0, and more of it is less work.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable
from functools import partial

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # one kernel needs no pool of compilers

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import selection
from bench.baselines import BLOCK, PBS_SEGMENT
from bench.ours import causal_pairs


def dense_peers(q, k, v, scale: float) -> dict[str, Callable[[], Callable]]:
    """By name, a function that returns a dense call over q (Hq, N, D), k and v (Hkv, N, D), or says why not.

    PyTorch's kernels get K and V expanded to the query heads before the clock runs.
    """
    group = len(q) // len(k)

    def sdpa(backend):
        arrays = [x[None] for x in (q, k.repeat_interleave(group, 0), v.repeat_interleave(group, 0))]

        def call():
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(*arrays, is_causal=True, scale=scale)[0]

        return call

    def rows_first(module, **options):
        function = importlib.import_module(module).flash_attn_func
        arrays = [x.transpose(0, 1)[None].contiguous() for x in (q, k, v)]

        def call():
            out = function(*arrays, softmax_scale=scale, causal=True, **options)
            return (out[0] if isinstance(out, tuple) else out)[0].transpose(0, 1)

        return call

    def flashinfer():
        function = importlib.import_module("flashinfer").single_prefill_with_kv_cache
        arrays = [x.transpose(0, 1).contiguous() for x in (q, k, v)]
        return lambda: function(*arrays, causal=True, sm_scale=scale).transpose(0, 1)

    return {
        "cuDNN (PyTorch SDPA)": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
        "FlashAttention-2 (PyTorch SDPA)": partial(sdpa, SDPBackend.FLASH_ATTENTION),
        "memory-efficient (PyTorch SDPA)": partial(sdpa, SDPBackend.EFFICIENT_ATTENTION),
        "FlashAttention-3": partial(rows_first, "flash_attn_interface"),
        "FlashAttention-4": partial(rows_first, "flash_attn.cute"),
        "FlashInfer": flashinfer,
    }


class Gather:
    """S2O in Triton: the mean rank, token by token; stopping after each `chunk` key tiles, or (0) at a fixed depth."""

    def __init__(self, name: str, segment: int, tiers: bool, chunk: int):
        self.name, self.segment, self.tiers, self.chunk = name, segment, tiers, chunk
        self.knob = "tau" if chunk else "1 / share walked"
        self.span = (1e-6, 3.0) if chunk else (1.0, 2e3)
        self.kernels = _kernels()
        self.kernel = ("gather", segment)  # at full density: the loop that never stops
        self.lists = None  # room and places, made once: they follow from the shape alone

    def rank(self, q, k, v, scale):
        lists = self.lists = self.lists or selection.Lists(len(q), q.shape[1], self.segment, q.device)
        score = selection.mean_scores(q, k, self.segment)
        if self.tiers:
            self.kernels.rank_in_tiers(score, lists.starts, self.segment, lists.order)
        else:
            lists.sort(score)
        return q, k, v, scale, lists

    def choose(self, ranked, x: float):
        return ranked, (x if self.chunk else None), self._depths(ranked, 1.0 if self.chunk else 1 / x), self.chunk

    def everything(self, ranked):
        """The fixed-depth loop over the whole history: the kernel's own dense rate."""
        return ranked, None, self._depths(ranked, 1.0), 0

    def walk(self, chosen):
        (q, k, v, scale, lists), tau, depths, chunk = chosen
        out, walked = self.kernels.attend(
            q, k, v, lists.order, lists.starts, depths, scale, segment=self.segment, tau=tau, chunk=chunk
        )
        return out, partial(_pairs, q, walked, self.segment)

    def _depths(self, ranked, share: float):
        q = ranked[0]
        return selection.tile_depths(len(q), q.shape[1], self.segment, BLOCK, q.device, share)


class Blocks:
    """PBS-Attn by its rule, over the Triton kernel: keys permuted inside segments of 256, blocks up to a share."""

    name, knob, span = "PBS-Attn, Triton block kernel", "1 - threshold", (1e-7, 0.999)
    kernel = ("blocks",)

    def __init__(self):
        self.kernels = _kernels()

    def rank(self, q, k, v, scale):
        return q, k, v, scale, *selection.permute_keys(q, k, v, scale)

    def choose(self, ranked, x: float):
        q, _, _, scale, moved_k, _, first = ranked
        return ranked, selection.top_cdf_blocks(q, moved_k, PBS_SEGMENT, scale, first, 1 - x)

    def everything(self, ranked):
        return self.choose(ranked, 0.0)

    def walk(self, chosen):
        (q, k, v, scale, moved_k, moved_v, _), (blocks, counts) = chosen
        lists = torch.arange(counts.numel(), device=q.device).view(counts.shape) * blocks.shape[-1]
        out, walked = self.kernels.attend(
            q, moved_k, moved_v, blocks, lists, counts, scale, segment=PBS_SEGMENT, own=(k, v), blocks=True
        )
        return out, partial(_pairs, q, walked, PBS_SEGMENT)


class Flex:
    """FlexAttention over a block mask: pooled blocks of keys in position order up to a share of their mass."""

    name, knob, span = "FlexAttention, pooled blocks", "1 - threshold", (1e-7, 0.999)
    kernel = ("flex",)

    def __init__(self):
        from torch.nn.attention.flex_attention import BlockMask

        self.block_mask, self.attend = BlockMask.from_kv_blocks, _flex_attention()
        no_backward = "compute_q_blocks" in inspect.signature(self.block_mask).parameters
        self.options = {"compute_q_blocks": False} if no_backward else {}

    def rank(self, q, k, v, scale):
        return q, k, v, scale

    def choose(self, ranked, x: float):
        q, k, _, scale = ranked
        heads, blocks = len(q), q.shape[1] // BLOCK
        first = torch.zeros(heads, dtype=torch.int64, device=q.device)
        taken, counts = selection.top_cdf_blocks(q, k, BLOCK, scale, first, 1 - x)
        own = torch.arange(blocks, dtype=torch.int32, device=q.device)[:, None].expand(1, heads, -1, blocks)
        one = torch.ones(1, heads, blocks, dtype=torch.int32, device=q.device)
        mask = self.block_mask(
            one, own.contiguous(), counts[None], taken[None], BLOCK_SIZE=BLOCK, mask_mod=_causal, **self.options
        )
        return ranked, mask, counts

    def everything(self, ranked):
        return self.choose(ranked, 0.0)

    def walk(self, chosen):
        (q, k, v, scale), mask, counts = chosen
        out = self.attend(q[None], k[None], v[None], block_mask=mask, scale=scale, enable_gqa=True)[0]
        return out, partial(_pairs, q, counts, BLOCK)


@functools.cache
def _flex_attention() -> Callable:
    """FlexAttention compiled: once for each length that it meets."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def sparse_peers(quick: bool = False) -> list[tuple[str, Callable]]:
    """(name, what makes the peer): making may fail, and then says why."""
    gathers = {
        "S2O Triton: sort, stop": (1024, False, 1),
        "S2O Triton: sort, stop in chunks": (1024, False, 4),
        "S2O Triton: tiers, stop in chunks": (256, True, 2),
        "S2O Triton: tiers, fixed depth": (256, True, 0),
    }
    made = [(name, partial(Gather, name, *how)) for name, how in gathers.items()]
    made.insert(1, (Blocks.name, Blocks))
    return made[:2] if quick else [*made, (Flex.name, Flex)]


def _pairs(q, walked, segment: int) -> float:
    """Computed pairs: walked key tiles of every row tile, and the causal half of the rows' own segments."""
    heads, n, _ = q.shape
    own = n // segment * causal_pairs(segment, heads)
    return own + float(walked.sum(dtype=torch.float64)) * BLOCK**2


def _causal(batch, head, row, key):
    return row >= key


def _kernels():
    """The Triton kernels, of tiles as large as the blocks; an error where Triton is missing."""
    return importlib.import_module("bench.gather")
