"""Text to tokens: the tokenizer of a GGUF file's vocabulary, and a text file's first tokens."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np

from examples.lm.weights import Model, require

_SPACE = "▁"
_CHARACTERS = 16  # of a text that are read for one token wanted; the whole text where that is not enough
_MARGIN = 64  # tokens before a cut that may differ from those of the whole text


@functools.lru_cache(maxsize=1)  # Gemma's takes seconds to build
def tokenizer(model: Model):
    """The `tokenizers.Tokenizer` of a model's vocabulary; text is plain, no special token is looked for in it.

    Raises
    ------
    ValueError
        The file's tokenizer is of a kind that would be applied wrongly.
    """
    kind = model.field("tokenizer.ggml.model")
    if kind == "gpt2":
        return _byte_level(model)
    if kind == "llama":
        return _by_rank(model)
    raise ValueError(f"tokenizer.ggml.model is {kind!r}; supported: 'gpt2', 'llama'")


def encode(model: Model, path: str | os.PathLike, length: int | None = None):
    """The first `length` tokens of a text file, a BOS first where the model wants one.

    Parameters
    ----------
    model : Model
    path : path
        UTF-8 text; what is no UTF-8 becomes a replacement character.
    length : int, optional
        Default: the whole text.

    Returns
    -------
    int64 array (length,)

    Raises
    ------
    ValueError
        `length` or the text is longer than the context, or the text shorter than `length`.
    """
    if length is not None and not 2 <= length <= model.context:
        raise ValueError(f"length is {length}; allowed: 2 to {model.context}, the context of {model.name}")
    text, tok = Path(path).read_text(encoding="utf-8", errors="replace"), tokenizer(model)
    bos = [model.field("tokenizer.ggml.bos_token_id")] if model.field("tokenizer.ggml.add_bos_token", False) else []
    cut = len(text) if length is None else _CHARACTERS * (length + _MARGIN)
    ids = bos + tok.encode(text[:cut], add_special_tokens=False).ids
    if length is not None and cut < len(text) and len(ids) < length + _MARGIN:
        ids = bos + tok.encode(text, add_special_tokens=False).ids
    if length is None and len(ids) > model.context:
        raise ValueError(
            f"{os.fspath(path)!r} has {len(ids)} tokens; allowed: {model.context}, the context of {model.name} "
            "(--length takes the first ones)"
        )
    if len(ids) < (length or 2):
        raise ValueError(f"{os.fspath(path)!r} has {len(ids)} tokens; wanted: {length or 2}")
    return np.array(ids[:length], np.int64)


def _byte_level(model: Model):
    """BPE over bytes with stored merges; SmolLM's also splits numbers into digits."""
    tokenizers = require("tokenizers")
    split = model.field("tokenizer.ggml.pre", "default")
    if split != "smollm":
        raise ValueError(f"tokenizer.ggml.pre is {split!r}; supported: 'smollm'")
    vocab = {token: i for i, token in enumerate(model.field("tokenizer.ggml.tokens"))}
    merges = [tuple(merge.split(" ")) for merge in model.field("tokenizer.ggml.merges")]
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    pre = tokenizers.pre_tokenizers
    tok.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    return tok


def _by_rank(model: Model):
    """BPE whose file holds no merges (Gemma's): a token's number is its rank, from every split into two tokens."""
    tokenizers = require("tokenizers")
    if model.field("tokenizer.ggml.add_space_prefix", True):
        raise ValueError("tokenizer.ggml.add_space_prefix is True; supported: False")
    # Runs of spaces are stored as spaces, all others with the mark.
    vocab = {token.replace(" ", _SPACE): i for i, token in enumerate(model.field("tokenizer.ggml.tokens"))}
    merges = [
        (rank, vocab[token[:cut]], vocab[token[cut:]], token[:cut], token[cut:])
        for token, rank in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    merges.sort()
    tok = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, [merge[3:] for merge in merges], byte_fallback=True, fuse_unk=True)
    )
    tok.normalizer = tokenizers.normalizers.Replace(" ", _SPACE)
    return tok
