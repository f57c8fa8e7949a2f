"""evaluate(): what calibrated sparse attention does to a model's predictions, beside dense attention."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache

import numpy as np

import s2o_cupy as s2o
from examples.lm.model import dense, logits, prefill
from examples.lm.weights import Model
from s2o_cupy.arrays import namespace, on_host
from s2o_cupy.progress import Bar

_ROWS = 512  # rows whose logits are held at a time
_CHUNK = 1024  # keys that the last rows walk in one go
PARTS = 4  # of the text, that the loss is also given for
TAU_ALONE = ({},)


@dataclass
class Calibration:
    """An `attend` for `prefill` that answers densely and keeps, for every layer, settings that meet an error."""

    error: float
    base: s2o.Settings
    variants: tuple = TAU_ALONE
    per_head: bool = False
    dense_from: float = np.inf
    of_layer: dict[int, float] = field(default_factory=dict)
    settings: dict[int, s2o.Settings] = field(default_factory=dict)

    def __call__(self, layer: int, q, k, v):
        choices = {"per_head": self.per_head, "settings": self.base, "variants": self.variants}
        try:
            found = s2o.calibrate(q, k, v, self.of_layer.get(layer, self.error), **choices)
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}") from None
        if np.isfinite(self.dense_from):
            tau = [0.0 if d >= self.dense_from else t for d, t in zip(found.evidence[0].density, found.tau)]
            found = found.replace(tau=tuple(tau))
        self.settings[layer] = found
        return dense(layer, q, k, v)


@dataclass
class Attention:
    """An `attend` for `prefill`, sparse where it has settings, that keeps each layer's time and stats.

    Nothing waits for the device: on a GPU a layer's time lies between two events of the stream that the whole pass is
    queued on, as in any prefill; on a CPU it is the host's clock.

    The last `dense_rows` rows are dense: of a prompt, those that the answer is read from, at a cost of N a row.
    So are heads whose tau is 0, of which a walk would gather every key, where as many are left of every K/V head.
    """

    settings: dict[int, s2o.Settings] | None = None
    dense_rows: int = 0
    spans: dict[int, tuple] = field(default_factory=dict)
    stats: dict[int, s2o.Stats] = field(default_factory=dict)
    walked: dict[int, list[int]] = field(default_factory=dict)
    heads: int = 0

    def __call__(self, layer: int, q, k, v):
        start = _moment(q)
        out = dense(layer, q, k, v) if self.settings is None else self._sparse(layer, q, k, v)
        self.spans[layer] = start, _moment(q)
        return out

    def _sparse(self, layer: int, q, k, v):
        check_dense_rows(self.dense_rows, q.shape[1])
        rows, out = q.shape[1] - self.dense_rows, namespace(q).empty_like(q)
        settings, few = self.settings[layer], (k[:, :rows], v[:, :rows])
        heads = self.walked[layer] = walked_heads(settings.tau, len(q), len(k))
        self.heads = len(q)
        with beside(q) as stream:
            with stream:
                if self.dense_rows:
                    last_rows(q[:, rows:], k, v, out[:, rows:])
                for head in set(range(len(q))).difference(heads):
                    kv = slice(head * len(k) // len(q), head * len(k) // len(q) + 1)
                    own = slice(head, head + 1), slice(rows)
                    s2o.dense_attention(q[own], *(x[kv] for x in few), out=out[own])
            if len(heads) == len(q):
                answer = s2o.attention(q[:, :rows], *few, settings, out=out[:, :rows], full_output=True)
            elif heads:
                settings = settings.replace(tau=tuple(settings.tau[head] for head in heads))
                some = namespace(q).stack([q[head, :rows] for head in heads])
                answer = s2o.attention(some, *few, settings, full_output=True)
                for head, own in zip(heads, answer.out):
                    out[head, :rows] = own
            if heads:
                self.stats[layer] = answer.stats
        return out

    @property
    def seconds(self) -> dict[int, float]:
        """Of each layer; waits for the device."""
        return {layer: _between(*span) for layer, span in self.spans.items()}

    @property
    def density(self) -> dict[int, list[float]]:
        """Of each layer's heads, over all pairs; waits for the device."""
        answer = {}
        for layer, heads in self.walked.items():
            density = np.ones(self.heads)
            if heads:
                stats = self.stats[layer]
                pairs, n = stats.problem.allowed_pairs, stats.problem.n_q + self.dense_rows
                density[heads] -= pairs * (1 - stats.head_density.reshape(-1)) / (n * (n + 1) // 2)
            answer[layer] = density.tolist()
        return answer


def walked_heads(tau, heads: int, heads_kv: int) -> list[int]:
    """Query heads that walk a ranking: all, or those whose tau is above 0 if they are as many of every K/V head."""
    every = list(range(heads))
    if not isinstance(tau, tuple):
        return every
    some = [head for head in every if tau[head] > 0]
    of_each = {sum(head * heads_kv // heads == kv for head in some) for kv in range(heads_kv)}
    return some if len(of_each) == 1 else every


def check_dense_rows(dense_rows: int, tokens: int) -> None:
    """Refuse what is no number of rows below all."""
    if not 0 <= dense_rows < tokens:
        raise ValueError(f"dense_rows is {dense_rows}; allowed: 0 to {tokens - 1}")


@contextmanager
def beside(x) -> Iterator[AbstractContextManager]:
    """What is queued within the answer may run at the same time as the rest of this block, and is done at its end.

    On a GPU a stream of its own, joined to the current one by events, so that no host waits and a graph captures both.
    Arrays that live longer than the block are for both sides to read; memory taken within the answer stays its own.
    """
    if namespace(x) is np:
        yield nullcontext()
        return
    import cupy

    own, other = cupy.cuda.get_current_stream(), _second_stream(cupy.cuda.get_device_id())
    other.wait_event(own.record())
    try:
        yield other
    finally:
        own.wait_event(other.record())


@cache
def _second_stream(device: int):
    import cupy

    return cupy.cuda.Stream(non_blocking=True)


def last_rows(q, k, v, out) -> None:
    """Exact causal attention of the last rows of a text into `out`: q and out (Hq, R, D), k and v (Hkv, N, D).

    A row tile walks its keys one after the other, so that few rows would leave a GPU empty: the keys before the first
    row are walked in chunks, as a batch, and joined by their log-sum-exps.
    """
    xp, rows = namespace(q), q.shape[1]
    chunks = (k.shape[1] - rows) // _CHUNK
    if chunks < 2:
        s2o.dense_attention(q, k, v, out=out)
        return
    cut = chunks * _CHUNK
    before = (x[:, :cut].reshape(len(x), chunks, _CHUNK, -1).swapaxes(0, 1) for x in (k, v))
    parts = s2o.dense_attention(xp.broadcast_to(q, (chunks, *q.shape)), *before, causal=False, full_output=True)
    rest = s2o.dense_attention(q, k[:, cut:], v[:, cut:], full_output=True)
    lse = xp.concatenate([parts.lse, rest.lse[None]])
    weight = xp.exp(lse - lse.max(axis=0))
    weight = (weight / weight.sum(axis=0))[..., None]
    out[...] = (parts.out * weight[:-1]).sum(axis=0) + rest.out * weight[-1]


def calibrate_layers(
    model: Model,
    ids,
    error: float,
    variants=TAU_ALONE,
    base: s2o.Settings | None = None,
    per_head: bool = False,
    dense_from: float = np.inf,
    of_layer: dict[int, float] | None = None,
) -> dict[int, s2o.Settings]:
    """Settings of each global layer, from `base` on, whose relative error here is at most `error` in every head.

    `of_layer` has other errors for some layers. With `per_head`, a head that walks a share `dense_from` of its pairs or
    more gets tau 0, and will be dense.
    """
    of_layer = of_layer or {}
    for layer in of_layer:
        if not (0 <= layer < model.layers and model.is_global(layer)):
            allowed = [layer for layer in range(model.layers) if model.is_global(layer)]
            raise ValueError(f"layer {layer} has an error of its own; allowed: {', '.join(map(str, allowed))}")
    calibration = Calibration(error, base or s2o.Settings(), tuple(variants), per_head, dense_from, of_layer)
    with Bar("calibrate", model.layers) as bar:
        prefill(model, ids, calibration, step=bar.step)
    return calibration.settings


def evaluate(model: Model, ids, settings: dict[int, s2o.Settings], repeats: int = 1, dense_rows: int = 0) -> dict:
    """Prefill a text densely and sparsely, and compare every prediction.

    Parameters
    ----------
    model : Model
    ids : int array (N,)
    settings : dict
        Settings of every global layer.
    repeats : int
        Passes of each kind, in turn; the least time counts.
    dense_rows : int
        Rows at the text's end whose attention is dense in the sparse pass too.

    Returns
    -------
    dict
        Of plain numbers: losses in nats a token, whole and by position; the greatest change of a logit; the share of
        positions whose likeliest token is the same; the density of each global layer's heads; seconds.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; allowed: 1 or more")
    hidden, attends, passes = {}, {}, {"dense": [], "sparse": []}
    with Bar("dense and sparse", 2 * repeats * model.layers) as bar:
        for _ in range(repeats):
            for name, times in passes.items():
                attends[name] = Attention(None if name == "dense" else settings, dense_rows)
                start = time.perf_counter()
                hidden[name] = prefill(model, ids, attends[name], step=bar.step)
                _wait(hidden[name])
                times.append((time.perf_counter() - start, attends[name].seconds))
    seconds = {name: min(t[0] for t in times) for name, times in passes.items()}
    by_layer = {
        name: {str(layer): min(t[1][layer] for t in times) for layer in times[0][1]} for name, times in passes.items()
    }
    losses, change, agree = compare(model, ids, hidden["dense"], hidden["sparse"])
    report = {"tokens": len(ids), "predictions": len(ids) - 1, "dense_rows": dense_rows}
    for name, loss in losses.items():
        report[f"{name}_nats"] = float(loss.mean())
    report["rise_nats"] = report["sparse_nats"] - report["dense_nats"]
    parts = {name: [float(p.mean()) for p in np.array_split(loss, PARTS) if len(p)] for name, loss in losses.items()}
    density = attends["sparse"].density
    return report | {
        "nats_by_position": parts,
        "greatest_logit_change": change,
        "top1_agreement": agree,
        "mean_density": float(np.mean(list(density.values()))) if density else None,
        "density": {str(layer): heads for layer, heads in density.items()},
        "tau": {str(layer): settings[layer].tau for layer in density},
        "path": "ranked" if any(x.path == "ranked" for x in attends["sparse"].stats.values()) else "dense",
        "repeats": repeats,
        "prefill_s": seconds,
        "global_attention_s": {name: sum(layers.values()) for name, layers in by_layer.items()},
        "layer_attention_s": by_layer,
    }


def compare(model: Model, ids, dense_hidden, sparse_hidden) -> tuple[dict[str, np.ndarray], float, float]:
    """Losses of both passes at each position (float64), the greatest logit change, and the top-1 agreement."""
    xp, last = namespace(ids), len(ids) - 1
    losses, change, same = {"dense": [], "sparse": []}, 0.0, 0
    for i in range(0, last, _ROWS):
        rows, target = slice(i, min(i + _ROWS, last)), ids[i + 1 : min(i + _ROWS, last) + 1]
        both = {"dense": logits(model, dense_hidden[rows]), "sparse": logits(model, sparse_hidden[rows])}
        for name, y in both.items():
            top = y.max(axis=1)
            total = xp.exp(y - top[:, None]).sum(axis=1, dtype=np.float64)
            losses[name].append(on_host(xp.log(total) + top - y[xp.arange(len(target)), target]))
        change = max(change, float(xp.abs(both["sparse"] - both["dense"]).max()))
        same += int((both["sparse"].argmax(axis=1) == both["dense"].argmax(axis=1)).sum())
    return {name: np.concatenate(parts) for name, parts in losses.items()}, change, same / last


def _wait(x) -> None:
    """Until the device is done with x: its first number is read."""
    on_host(x.reshape(-1)[:1])


def _moment(x):
    """Now, where x is: on a GPU an event on its current stream, which the host does not wait for."""
    xp = namespace(x)
    if xp is np:
        return time.perf_counter()
    event = xp.cuda.Event()
    event.record()
    return event


def _between(start, stop) -> float:
    """Seconds from one `_moment` to another."""
    if isinstance(start, float):
        return stop - start
    import cupy

    stop.synchronize()
    return cupy.cuda.get_elapsed_time(start, stop) / 1e3
