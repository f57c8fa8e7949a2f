"""What the kernels are compiled as: architectures, the macro set that serves a shape, and every set that is shipped."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

MIN_CAPABILITY = 80
DTYPE_MACROS = {
    "float16": {"IS_BF16": 0},
    "bfloat16": {"IS_BF16": 1},
    "float32": {"REAL": "float"},
    "float64": {"REAL": "double"},
}
HEAD_DIMS = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256))
SM90_HEAD_DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
SHARED_LIMIT = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}


def target(capability: int) -> str:
    """The architecture a device of compute capability ``capability`` (90 for 9.0) compiles for."""
    if capability < MIN_CAPABILITY:
        raise RuntimeError(
            f"the GPU has compute capability {capability / 10:.1f}; the CUDA backend supports 8.0 and above "
            '(backend="numba" serves older GPUs)'
        )
    return "sm_90a" if capability == 90 else f"sm_{capability}"


def shared_limit(arch: str) -> int:
    """Bytes of shared memory that one block may use on ``arch``."""
    return SHARED_LIMIT.get(int(re.sub(r"\D", "", arch)), 99) * 1024


def attend_macros(dtype: str, dim_qk: int, dim_v: int, block_q: int, arch: str) -> dict:
    """Macros of the `mma.sync` attend kernel that serves these head dims and a row tile of ``block_q``."""
    head_dim, head_dim_v = next(p for p in HEAD_DIMS if dim_qk <= p[0] and dim_v <= p[1])
    block_m = 64 if block_q <= 64 else 128
    for block_n in (64, 32):
        macros = DTYPE_MACROS[dtype] | {
            "HEAD_DIM": head_dim,
            "HEAD_DIM_V": head_dim_v,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
        }
        if attend_shared_bytes(macros) <= shared_limit(arch):
            return macros
    raise ValueError(
        f"head dims ({dim_qk}, {dim_v}) with block_q {block_q} need {attend_shared_bytes(macros)} bytes of shared "
        f"memory; {arch} allows {shared_limit(arch)}: use block_q=64 or less"
    )


def attend_threads(macros: dict) -> int:
    """Threads of a block of the attend kernel: warps of 32 rows while the accumulators fit, else of 16."""
    rows = 32 if macros["BLOCK_M"] == 128 and macros["HEAD_DIM_V"] <= 128 else 16
    return macros["BLOCK_M"] // rows * 32


def attend_shared_bytes(macros: dict, pool_blocks: int = 0) -> int:
    """Dynamic shared memory of the attend kernel, with counters for ``pool_blocks``; attend.cu's own layout."""
    m, n = macros["BLOCK_M"], macros["BLOCK_N"]
    tiles = 2 * (m * macros["HEAD_DIM"] + 2 * n * (macros["HEAD_DIM"] + macros["HEAD_DIM_V"]))
    rows = m * (4 + 4 + 4 + 8) + n * 4 * (4 + 1)
    return tiles + rows + 4 * pool_blocks + 64


def sm90_serves(arch: str, dtype: str, dim_qk: int, dim_v: int, block_q: int, pool: int, beside: bool = False) -> bool:
    """Whether attend_sm90.cu serves a call whose rows all start on 16 bytes; attend.cu serves the others.

    `beside`: two query heads have row tiles of one list and of the same queries, which go side by side up to 64.
    """
    fits = (dim_qk, dim_v) in SM90_HEAD_DIMS and (1 if beside else 65) <= block_q <= 128 and pool < 2**16
    return arch == "sm_90a" and dtype in ("float16", "bfloat16") and fits


def sm90_macros(dtype: str, dim_qk: int, dim_v: int, block_k: int) -> dict:
    """Macros of attend_sm90.cu: steps of 128 keys where key tiles and registers allow, and as many units as fit."""
    block_n = 64 if block_k % 64 or max(dim_qk, dim_v) > 128 else 128
    room = shared_limit("sm_90a") - 1024 - 256 * dim_qk - 20 * 1024
    units = min(room // (2 * block_n * max(dim_qk, dim_v)), 4 if block_n * dim_qk > 2**13 else 8)
    parts = 2 if block_k % block_n and block_n == 128 else 1
    sizes = {"HEAD_DIM": dim_qk, "HEAD_DIM_V": dim_v, "BLOCK_N": block_n, "PARTS": parts, "UNITS": units}
    return DTYPE_MACROS[dtype] | sizes


def sm90_shared_bytes(macros: dict, pool_blocks: int = 0) -> int:
    """Dynamic shared memory of attend_sm90.cu, with two sets of counters for ``pool_blocks``; its own layout."""
    units, n, dim, dim_v = (macros[name] for name in ("UNITS", "BLOCK_N", "HEAD_DIM", "HEAD_DIM_V"))
    ring = units * (32 + 4 * n) + 9 * n + 5632
    return 1024 + 256 * dim + 2 * units * n * max(dim, dim_v) + ring + 8 * (pool_blocks + 3)


def simt_macros(dtype: str, dim_v: int) -> dict:
    """Macros of the plain multiply-add attend kernel, for float32 and float64."""
    return DTYPE_MACROS[dtype] | {"HEAD_DIM_V": 128 if dim_v <= 128 else 256}


def simt_shared_bytes(macros: dict, pool_blocks: int = 0) -> int:
    """Dynamic shared memory of attend_simt.cu: a block of 128 rows by 32 keys."""
    size = 4 if macros["REAL"] == "float" else 8
    staged = max((128 + 32) * 33, 32 * macros["HEAD_DIM_V"])
    return size * (staged + 128 * 33 + 32) + 4 * (128 + 128 + 32) + 4 * pool_blocks


def rank_width(dim: int) -> int:
    """Columns that stage 1's tensor-core kernels pad a head dim to."""
    return next(width for width in (64, 128, 256) if dim <= width)


def moments_shared_bytes(width: int) -> int:
    """Dynamic shared memory of moments.cu: its chunks of 64 queries."""
    return (4 if width < 256 else 3) * 64 * width * 2


def factors_shared_bytes(width: int, terms: int) -> int:
    """Dynamic shared memory of moments.cu's factors: chunks of queries, then moment and factors where they were."""
    return max(moments_shared_bytes(width), 4 * width * (width + 8) + factor_shared_bytes(width, terms, False))


def factor_shared_bytes(width: int, terms: int, full: bool) -> int:
    """Dynamic shared memory of factor.cuh: Gram matrix, basis and its image, triangles."""
    if full or not terms:
        return 4 * width
    group, padded, pairs = (8 if terms <= 8 else 16), -(-terms // 8) * 8, terms * (terms + 1) // 2
    columns, all_pairs = -(-terms // group) * group + 4, padded * (padded + 1) // 2
    floats = max(4 * all_pairs, width * (group + 4)) + width * columns + all_pairs + 2 * width + 2 * padded + terms
    return 4 * floats + 2 * pairs


def score_macros(dtype: str, dim: int, arch: str) -> dict:
    """Macros of score.cu: as many warps as its shared memory allows."""
    width = rank_width(dim)
    warps = 8 if width <= 128 else 4 if shared_limit(arch) > 140_000 else 2
    return DTYPE_MACROS[dtype] | {"WIDTH": width, "WARPS": warps}


def score_shared_bytes(macros: dict) -> int:
    """Dynamic shared memory of score.cu: its keys, and two chunks of 64 rows with their offsets."""
    return (macros["WARPS"] * 32 + 128) * macros["WIDTH"] * 2 + 512


def score_sm90_macros(dtype: str, dim: int) -> dict:
    """Macros of score_sm90.cu: its widest kernels take as long to compile as the others together."""
    return DTYPE_MACROS[dtype] | {"WIDEST": max(rank_width(dim), 128), "TILE_KEYS": 128}


def score_sm90_shared_bytes(macros: dict, width: int) -> int:
    """Dynamic shared memory of score_sm90.cu: its keys, and four chunks of 64 rows with their offsets and barriers."""
    return 1024 + (macros["TILE_KEYS"] + 4 * 64) * width * 2 + 4 * (256 + 16)


def remap_macros(dtype: str) -> dict:
    """Macros of remap.cu: scores of 16-bit inputs are kept in half precision."""
    return {"SCORE_HALF": int(dtype in ("float16", "bfloat16"))}


@functools.lru_cache(maxsize=256)
def remap_fit(levels: int, longest: int, listed: int, arch: str) -> tuple[str, int, int, int, int] | None:
    """Kernel by levels of remap.cu, its warps, window, bit planes and shared bytes; None where none fits.

    `longest`: keys of the longest list, `listed`: the most that are kept of one.
    """
    planes, listed = max((longest - 1).bit_length() - 16, 0), -(-listed // 128) * 128
    narrow = (shared_limit(arch) + 1024) // 2 - 2048  # two blocks a multiprocessor
    behind = listed + 2 * 256 + 8
    if levels and behind < 0xC000 and behind + -(-longest // 4096) * 256 < 2**16:
        shared = remap_shared_bytes("remap_narrow", levels, 16, listed, planes)
        if shared <= narrow:
            return "remap_narrow", 16, listed, planes, shared
    for warps in (16, 8):
        room = shared_limit(arch) - 1024 - remap_shared_bytes("remap", levels, warps, 0, planes)
        window = min(room * 8 // (17 + planes) // 128 * 128, 2**16)
        if levels and window >= 2**13 and 2**planes <= warps:
            window = min(window, listed)
            return "remap", warps, window, planes, remap_shared_bytes("remap", levels, warps, window, planes)
    return None


def remap_shared_bytes(kernel: str, levels: int, warps: int, window: int, planes: int) -> int:
    """Dynamic shared memory of remap.cu's kernels by levels: places, bits of places, counters."""
    narrow, counters = kernel == "remap_narrow", 4 * warps * (levels + 2)
    places, words = 2 * (window + 520), window // 32 + 17
    kept = max(places, counters) + counters // 2 if narrow else places + counters
    return kept + 4 * (1 + planes) * words + 4 * 32 * warps


def launch_macros(name: str, dtype: str, dim: int | None, dim_v: int | None, block: int | None, arch: str) -> dict:
    """Macros that ``kernels/NAME.cu`` is compiled with for these arrays; `block`: block_q, or attend_sm90's block_k."""
    if name == "attend":
        return attend_macros(dtype, dim, dim_v, block, arch)
    if name == "attend_simt":
        return simt_macros(dtype, dim_v)
    if name == "attend_sm90":
        return sm90_macros(dtype, dim, dim_v, block)
    if name == "score":
        return score_macros(dtype, dim, arch)
    if name == "score_sm90":
        return score_sm90_macros(dtype, dim)
    return remap_macros(dtype) if name == "remap" else DTYPE_MACROS[dtype]


@dataclass(frozen=True)
class Specialisation:
    """One kernel file under one macro set, as shipped."""

    name: str
    macros: tuple[tuple[str, object], ...]
    no_spills: bool = True


def shipped(arch: str) -> list[Specialisation]:
    """Every specialisation that the defaults of the CUDA backend launch on ``arch``, at most 40."""
    found: dict[Specialisation, None] = {}
    measured = arch == "sm_90a"  # registers were fitted there; elsewhere spills are reported, not promised away

    def add(name, macros, no_spills=True):
        found[Specialisation(name, tuple(sorted(macros.items())), no_spills and measured)] = None

    for dtype in ("float16", "bfloat16"):
        for dim, dim_v in HEAD_DIMS:
            rows = largest_block_q(dtype, dim, dim_v, arch)
            full = rows == 128 and 96 <= dim_v <= 128  # 32 rows a warp: registers are full, a few values spill
            if sm90_serves(arch, dtype, dim, dim_v, 128, 1):
                for block_k in (64, 128):
                    add("attend_sm90", sm90_macros(dtype, dim, dim_v, block_k))
            else:
                add("attend", attend_macros(dtype, dim, dim_v, rows, arch), no_spills=not full)
            add("score", score_macros(dtype, dim, arch))
            if arch == "sm_90a":
                add("score_sm90", score_sm90_macros(dtype, dim))
        add("moments", DTYPE_MACROS[dtype])
    for dtype in ("float32", "float64"):
        add("score_simt", DTYPE_MACROS[dtype])
        for dim_v in (128, 256):
            add("attend_simt", simt_macros(dtype, dim_v), no_spills=False)
    for dtype in DTYPE_MACROS:
        add("pool", DTYPE_MACROS[dtype])
        add("remap", remap_macros(dtype))
    return list(found)


def largest_block_q(dtype: str, dim: int, dim_v: int, arch: str) -> int:
    """The largest row tile that the attend kernel of these head dims can hold on ``arch``."""
    try:
        attend_macros(dtype, dim, dim_v, 128, arch)
        return 128
    except ValueError:
        return 64
