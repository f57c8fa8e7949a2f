"""Error, density and mass: what a sparse answer is worth, measured against the exact one."""

from __future__ import annotations

import math

import numpy as np

from s2o_cupy.arrays import namespace


def relative_error(out, exact):
    """``|out - exact|_F / |exact|_F`` of each head.

    Parameters
    ----------
    out, exact : array (..., N, Dv)
        Any float dtype, same shape and device; compared in float64.

    Returns
    -------
    float64 array (...)
        The leading axes' shape; 0 where both are zero.

    Examples
    --------
    >>> import numpy as np
    >>> float(relative_error(np.array([[3.0, 4.4]]), np.array([[3.0, 4.0]])).round(3))
    0.08
    """
    xp = namespace(out)
    if out.shape != exact.shape:
        raise ValueError(f"out has shape {out.shape} and exact {exact.shape}; allowed: the same")
    gap, norm = xp.empty(out.shape[:-2]), xp.empty(out.shape[:-2])
    for lead in np.ndindex(out.shape[:-2]):
        wanted = exact[lead].astype(np.float64)
        gap[lead] = ((out[lead].astype(np.float64) - wanted) ** 2).sum()
        norm[lead] = (wanted**2).sum()
    return xp.sqrt(gap / xp.where(norm > 0, norm, 1))


def tile_mass(q, k, rows: int, *, causal: bool = True, scale: float | None = None) -> np.ndarray:
    """Mean softmax probability of every key, over each run of `rows` queries of one head.

    Parameters
    ----------
    q : array (Nq, D)
    k : array (Nk, D)
    rows : int
        Queries averaged over: a row tile.

    Returns
    -------
    float32 array (ceil(Nq / rows), Nk)
        Each row sums to 1.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    n_q, n_k = len(q), len(k)
    keys = np.asarray(k, np.float32).T * np.float32(scale)
    mass = np.zeros((-(-n_q // rows), n_k), np.float32)
    for tile, start in enumerate(range(0, n_q, rows)):
        block = np.asarray(q[start : start + rows], np.float32)
        seen = min(start + rows + n_k - n_q, n_k) if causal else n_k
        logit = block @ keys[:, :seen]
        if causal:
            position = np.arange(start, start + len(block))[:, None] + n_k - n_q
            logit[np.arange(seen) > position] = -np.inf
        np.exp(logit - logit.max(axis=1, keepdims=True), out=logit)
        mass[tile, :seen] = (logit / logit.sum(axis=1, keepdims=True)).mean(axis=0)
    return mass
