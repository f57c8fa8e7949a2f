"""capture(): queries, keys and values of chosen layers, as files that `s2o run` takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from examples.lm.model import dense, prefill
from examples.lm.weights import Model
from s2o_cupy.arrays import on_host
from s2o_cupy.files import save_arrays, writable
from s2o_cupy.progress import Bar

_LARGEST = float(np.finfo(np.float16).max)


def capture(model: Model, ids, layers: list[int], prefix: str, text: str) -> list[Path]:
    """Write PREFIX_lNN.npz for each layer: q, k, v (float16, after rotary embedding) and meta, a JSON string.

    Parameters
    ----------
    model : Model
    ids : int array (N,)
    layers : list of int
    prefix : str
        Start of the files' names.
    text : str
        What the text is, for meta.

    Raises
    ------
    ValueError
        There is no such layer, or a number lies outside float16.
    """
    for layer in layers:
        if not 0 <= layer < model.layers:
            raise ValueError(f"layer is {layer}; allowed: 0 to {model.layers - 1}")
    paths = {layer: Path(f"{prefix}_l{layer:02d}.npz") for layer in layers}
    for path in paths.values():
        writable(path)

    def watch(layer: int, q, k, v) -> None:
        if layer in paths:
            arrays = {name: on_host(x) for name, x in zip("qkv", (q, k, v))}
            meta = _meta(model, layer, arrays, text)
            if (greatest := max(meta["max_abs"].values())) > _LARGEST:
                raise ValueError(f"layer {layer} holds {greatest:.4g}; float16 goes to {_LARGEST:.0f}")
            halves = {name: np.ascontiguousarray(x, np.float16) for name, x in arrays.items()}
            save_arrays(paths[layer], **halves, meta=json.dumps(meta))

    with Bar("capture", max(layers) + 1) as bar:
        prefill(model, ids, dense, watch=watch, stop=max(layers), step=bar.step)
    return list(paths.values())


def _meta(model: Model, layer: int, arrays: dict[str, np.ndarray], text: str) -> dict:
    """What s2o's samples say about themselves, and the window of a window layer."""
    return {
        "model": f"{model.name} ({model.path.name})",
        "layer": layer,
        "text": text,
        "scale": model.dim**-0.5,
        "N": arrays["q"].shape[1],
        "causal": True,
        "window": None if model.is_global(layer) else model.window,
        "rope_theta": model.rope_base(layer),
        "rope_layout": "half-split (HF/NeoX)",
        "Hq": model.heads,
        "Hkv": model.kv_heads,
        "D": model.dim,
        "max_abs": {name: float(np.abs(x).max()) for name, x in arrays.items()},
    }
