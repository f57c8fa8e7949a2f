"""Sample data that the package ships: queries, keys and values of real attention heads."""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from typing import NamedTuple

import numpy as np

from s2o_cupy.files import load_arrays

NAMES = ("smollm2_code_l14", "smollm2_prose_l08")


class Sample(NamedTuple):
    """q (Hq, N, D), k and v (Hkv, N, D), float16, after rotary embedding; meta says where they come from."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    meta: dict


def load_sample(name: str = "smollm2_code_l14") -> Sample:
    """Q, K, V of real heads of SmolLM2-135M-Instruct (Apache-2.0), captured during prefill.

    Parameters
    ----------
    name : {"smollm2_code_l14", "smollm2_prose_l08"}
        Layer 14 on Python source (N=8192), or layer 8 on prose (N=4096); 3 query heads, 1 K/V head, D=64.

    Examples
    --------
    >>> import s2o_cupy as s2o
    >>> q, k, v, meta = s2o.load_sample()
    >>> q.shape, k.shape, q.dtype.name
    ((3, 8192, 64), (1, 8192, 64), 'float16')
    """
    if name not in NAMES:
        raise ValueError(f"sample is {name!r}; allowed: {', '.join(map(repr, NAMES))}")
    with as_file(files("s2o_cupy") / "data" / f"{name}.npz") as path:
        arrays = load_arrays(path, ("q", "k", "v", "meta"))
        q, k, v = (np.array(arrays[x]) for x in "qkv")
    return Sample(q, k, v, json.loads(str(arrays["meta"])))
