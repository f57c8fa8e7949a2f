"""Synthetic Q, K, V with the structure of real heads: sink, stripes, local, topics and noise; bit-equal on CPU and GPU.

Numbers come from a counter hash and a handful of separately rounded float32 operations, so NumPy and CuPy make the
same arrays at any length. `PRESETS` bracket three layers of language models by the keys that hold 95 % of the
mass (.018 to .094 of the causal prefix at N=8192, the means of their heads, as `coverage` measures them; single heads
among them have .002 to .14); `FROZEN` hashes what they produce.

Run ``python -m bench.workloads`` for the coverage of every preset and the check of the hashes.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Workload:
    """Knobs of the generator, as logits (natural-log units) where they are strengths."""

    sink: float = 4.0  # logit of the first keys for every query
    sinks: int = 4
    stripe: float = 3.0  # logit of keys that every query of the head likes
    stripe_rate: float = 0.01
    local: float = 4.0  # logit of the nearest keys, falling with distance
    topic: float = 5.0  # logit of keys of the query's own topic
    topics: int = 48
    topic_run: int = 96  # positions of a run of one topic
    noise: float = 1.0  # spread of the logit that nothing explains


PRESETS = {
    "sparse": Workload(sink=11.5, stripe=6.0, local=5.0, topic=7.0, topics=96, noise=1.0),
    "diffuse": Workload(sink=7.0, stripe=4.5, local=3.5, topic=5.0, topics=32, noise=0.85),
}
FROZEN = {"sparse": "f39701c6ebe80ffd", "diffuse": "769754dbecbb5231"}
_LOCAL_WAVES = 16
_TOPIC_COLUMNS = 24


def make(preset, n, *, heads_q=32, heads_kv=8, dim=128, dim_v=None, seed=0, dtype="bfloat16", xp=np):
    """q (Hq, N, D), k (Hkv, N, D), v (Hkv, N, Dv) of a preset's name or a `Workload`."""
    work = PRESETS[preset] if isinstance(preset, str) else preset
    dtype, dim_v = _dtype(dtype), dim_v or dim
    q, k = xp.empty((heads_q, n, dim), dtype), xp.empty((heads_kv, n, dim), dtype)
    v = xp.empty((heads_kv, n, dim_v), dtype)
    for h in range(heads_kv):
        key_seed = 1000 * seed + h + 1
        topic = _topic_vectors(work, n, key_seed, xp)
        k[h] = _rows(work, n, dim, key_seed, 17, topic, xp, keys=True).astype(dtype)
        v[h] = (_normal(xp, n, dim_v, key_seed * 7919 + 5) + _pad(xp, topic, dim_v) * np.float32(0.5)).astype(dtype)
        for g in range(heads_q // heads_kv):
            rows = _rows(work, n, dim, key_seed, 10007 + g, topic, xp, keys=False)
            q[h * (heads_q // heads_kv) + g] = rows.astype(dtype)
    return q, k, v


def coverage(q, k, causal: bool = True, rows: int = 128) -> dict[str, float]:
    """How concentrated a head's softmax is, over sampled late rows: shares of the prefix, and of the mass."""
    xp, n = (np if isinstance(q, np.ndarray) else __import__("cupy")), q.shape[-2]
    group, found = q.shape[0] // k.shape[0], []
    picks = np.linspace(n // 2, n - 1, rows).astype(np.int64)
    for h in range(q.shape[0]):
        logits = (
            q[h, picks].astype(np.float32) @ k[h // group].astype(np.float32).T / np.float32(math.sqrt(q.shape[-1]))
        )
        seen = xp.arange(n)[None] <= xp.asarray(picks)[:, None] if causal else xp.ones((1, n), bool)
        weight = xp.where(seen, xp.exp(logits - xp.where(seen, logits, -np.inf).max(axis=1, keepdims=True)), 0)
        weight = weight / weight.sum(axis=1, keepdims=True)
        total = xp.cumsum(-xp.sort(-weight, axis=1), axis=1)
        prefix = xp.asarray(picks + 1 if causal else np.full(rows, n))
        numbers = [((total < share).sum(axis=1) + 1) / prefix for share in (0.9, 0.95, 0.99)]
        numbers.append(weight[:, :4].sum(axis=1))
        away = xp.asarray(picks)[:, None] - xp.arange(n)[None]
        numbers += [xp.where(away < near, weight, 0).sum(axis=1) for near in (256, 1024)]
        found.append([float(x.mean()) for x in numbers])
    names = ("keys_90", "keys_95", "keys_99", "sink_mass", "last_256_mass", "last_1024_mass")
    return dict(zip(names, np.mean(found, axis=0).tolist()))


def digest(preset: str) -> str:
    """A hash of what a preset produces at one small size."""
    made = make(preset, 1024, heads_q=2, heads_kv=1, dtype="float16")
    return hashlib.sha256(b"".join(x.tobytes() for x in made)).hexdigest()[:16]


def _rows(work: Workload, n, dim, key_seed, salt, topic, xp, keys: bool):
    """One head's queries or keys: structured columns plus noise, then mixed so that no column is special."""
    root = math.sqrt(math.sqrt(dim))  # q and k each carry the root of a logit's sqrt(dim)
    position = xp.arange(n, dtype=np.uint32)
    x = _normal(xp, n, dim, key_seed * 31 + salt) * np.float32(math.sqrt(work.noise) * root / math.sqrt(math.sqrt(dim)))
    if keys:
        stripe = (_hash(xp, position, key_seed * 131 + 3) % np.uint32(10000)) < np.uint32(10000 * work.stripe_rate)
        liked = (position < np.uint32(work.sinks)) * np.float32(work.sink)
        liked = liked + stripe * np.float32(work.stripe)
        x[:, 0] = liked * np.float32(root)
    else:
        x[:, 0] = np.float32(root)
    first = 1 + 2 * _LOCAL_WAVES
    x[:, 1:first] = _waves(n, math.sqrt(work.local / _LOCAL_WAVES) * root, xp)
    columns = min(_TOPIC_COLUMNS, dim - first)
    x[:, first : first + columns] = topic[:, :columns] * np.float32(math.sqrt(work.topic / columns) * root)
    return _mix(xp, x, key_seed)


@functools.lru_cache(maxsize=1)
def _waves(n: int, strength: float, xp):
    """(n, 2 waves) cosines and sines of position, from the host's doubles; every head of a set has the same ones."""
    rates = 0.7 / 2.0 ** np.arange(_LOCAL_WAVES)[None] * 1.3
    angle = np.arange(n, dtype=np.float64)[:, None] * rates
    both = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    return xp.asarray((both * strength).astype(np.float32))


def _topic_vectors(work: Workload, n, key_seed, xp):
    """(n, columns) of +-1: the signs of each position's topic."""
    run = xp.arange(n, dtype=np.uint32) // np.uint32(work.topic_run)
    topic = _hash(xp, run, key_seed * 71 + 9) % np.uint32(work.topics)
    bits = _hash(xp, topic, key_seed * 53 + 1)
    shifted = bits[:, None] >> xp.arange(_TOPIC_COLUMNS, dtype=np.uint32)[None]
    return (shifted & np.uint32(1)).astype(np.float32) * np.float32(2) - np.float32(1)


def _mix(xp, x, key_seed):
    """Random signs, then a Walsh-Hadamard transform over blocks of a power of two: an orthogonal change of basis."""
    dim = x.shape[1]
    block = dim & -dim
    signs = (_hash(xp, xp.arange(dim, dtype=np.uint32), key_seed * 17 + 2) & np.uint32(1)).astype(np.float32)
    x = (x * (signs * np.float32(2) - np.float32(1))).reshape(len(x), dim // block, block)
    half = 1
    while half < block:
        pairs = x.reshape(len(x), dim // block, block // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = xp.stack([a + b, a - b], axis=-2).reshape(x.shape)
        half *= 2
    return (x * np.float32(1 / math.sqrt(block))).reshape(len(x), dim)


def _normal(xp, n, columns, seed):
    """(n, columns) of nearly normal float32, unit variance: a sum of four uniforms, no operation rounded twice."""
    place = xp.arange(n * columns, dtype=np.uint32)
    a, b = _hash(xp, place, 2 * seed + 1), _hash(xp, place, 2 * seed + 2)
    low = np.uint32(0xFFFF)
    total = (a & low) + (a >> np.uint32(16)) + (b & low) + (b >> np.uint32(16))
    return ((total.astype(np.float32) - np.float32(131070)) * np.float32(math.sqrt(3) / 65536)).reshape(n, columns)


def _hash(xp, x, seed: int):
    x = x ^ np.uint32(seed * 0x9E3779B9 & 0xFFFFFFFF)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _pad(xp, x, columns):
    out = xp.zeros((len(x), columns), np.float32)
    out[:, : min(columns, x.shape[1])] = x[:, :columns]
    return out


def _dtype(name: str):
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def main() -> None:
    for name in PRESETS:
        state = "frozen" if FROZEN.get(name) == digest(name) else f"CHANGED: {digest(name)}"
        q, k, _ = make(name, 8192, heads_q=4, heads_kv=2, dtype="float32")
        print(name, state, {key: round(value, 4) for key, value in coverage(q, k).items()})


if __name__ == "__main__":
    main()
