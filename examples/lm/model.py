"""prefill(): one pass of a decoder over a text, its attention given by the caller; arrays of the kind that ids is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import s2o_cupy as s2o
from examples.lm.weights import Model
from s2o_cupy.arrays import namespace

_ROWS = {"numpy": 1024, "cupy": 4096}  # of a block of the feed-forward: bounds memory, and a GPU's launches


def dense(layer: int, q, k, v):
    """Exact causal attention: the `attend` that `prefill` uses by default."""
    return s2o.dense_attention(q, k, v)


def prefill(
    model: Model,
    ids,
    attend: Callable = dense,
    *,
    watch: Callable | None = None,
    stop: int | None = None,
    step: Callable[[], None] | None = None,
):
    """The last hidden states of a text, normalised: `logits` turns rows of them into logits.

    Parameters
    ----------
    model : Model
    ids : int array (N,)
        Tokens; the array module of the whole pass is theirs.
    attend : callable
        ``attend(layer, q, k, v)`` answers attention of a global layer: q (Hq, N, D), k and v (Hkv, N, D) of the model's
        `dtype`, after rotary embedding; scale 1/sqrt(D), causal. Window layers are exact.
    watch : callable, optional
        ``watch(layer, q, k, v)`` sees the same arrays in every layer.
    stop : int, optional
        Leave after the attention's inputs of this layer were seen, and answer None.
    step : callable, optional
        Called after each layer.

    Returns
    -------
    float32 array (N, hidden), or None
    """
    if len(ids) > model.context:
        raise ValueError(f"the text has {len(ids)} tokens; allowed: {model.context}, the context of {model.name}")
    xp, m, greatest = namespace(ids), model, []
    x = m.embed[ids]
    if m.gemma:
        x = x * np.float32(np.sqrt(m.hidden))
    for layer, w in enumerate(m.blocks):
        h = rms(x, w["attn_norm"], m.eps)
        q, k, v = (_heads(h @ w[f"attn_{name}"].T, m.dim) for name in "qkv")
        if m.gemma:
            q, k = rms(q, w["attn_q_norm"], m.eps), rms(k, w["attn_k_norm"], m.eps)
        q, k = rotate(q, m.rope_base(layer)), rotate(k, m.rope_base(layer))
        if m.dtype == np.float16:
            greatest.append([xp.abs(x).max() for x in (q, k, v)])
        if xp is np:
            _check_range(greatest)
        q, k, v = (xp.ascontiguousarray(x, m.dtype) for x in (q, k, v))
        if watch is not None:
            watch(layer, q, k, v)
        if layer == stop:
            _check_range(greatest)
            return None
        o = attend(layer, q, k, v) if m.is_global(layer) else s2o.dense_attention(q, k, v, window=m.window)
        o = xp.swapaxes(o, 0, 1).reshape(len(ids), -1).astype(np.float32, copy=False) @ w["attn_output"].T
        x = x + (rms(o, w["post_attention_norm"], m.eps) if m.gemma else o)
        rows = _ROWS[xp.__name__]
        for i in range(0, len(ids), rows):
            x[i : i + rows] += _feed_forward(m, w, x[i : i + rows])
        if step is not None:
            step()
    _check_range(greatest)
    return rms(x, m.norm, m.eps)


def logits(model: Model, hidden):
    """Logits of rows of what `prefill` answers."""
    return hidden @ model.head.T


def rms(x, weight, eps: float):
    """x over its root mean square along the last axis, times `weight` (Gemma's files hold 1 + its weight)."""
    xp = namespace(x)
    return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight


def rotate(x, base: float):
    """Half-split (NeoX) rotary embedding of x (heads, N, D), positions from 0."""
    xp, half = namespace(x), x.shape[-1] // 2
    angle = xp.arange(x.shape[-2])[:, None] * base ** (-xp.arange(half) / half)  # float64: exact at any position
    cos, sin = xp.cos(angle).astype(np.float32), xp.sin(angle).astype(np.float32)
    a, b = x[..., :half], x[..., half:]
    return xp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _check_range(greatest: list) -> None:
    """Refuse a pass whose q, k or v float16 could not hold: of a GPU at its end only, so that no layer waits."""
    for layer, arrays in enumerate(greatest):
        for x in map(float, arrays):
            if not x <= float(np.finfo(np.float16).max):
                raise ValueError(f"layer {layer} holds {x:.4g}, beyond float16; allowed: bfloat16, float32")


def _heads(x, dim: int):
    """(N, heads * dim) as (heads, N, dim)."""
    return x.reshape(len(x), -1, dim).swapaxes(0, 1)


def _feed_forward(m: Model, w: dict, x):
    h = rms(x, w["ffn_norm"], m.eps)
    o = (_activation(h @ w["ffn_gate"].T, m.gemma) * (h @ w["ffn_up"].T)) @ w["ffn_down"].T
    return rms(o, w["post_ffw_norm"], m.eps) if m.gemma else o


def _activation(x, gelu: bool):
    """Gemma's GELU (its tanh form), else SiLU, written with tanh so that nothing overflows."""
    xp, half = namespace(x), np.float32(0.5)
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x) if gelu else half * x
    return half * x * (1 + xp.tanh(inner))
