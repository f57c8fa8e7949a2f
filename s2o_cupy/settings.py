"""Settings: every choice of the method, with every check and its message."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from pathlib import Path

import numpy as np

from s2o_cupy import reprs
from s2o_cupy.files import save_json

MAX_HEAD_DIM = 256
MAX_SCALE = 1e38  # float32 holds it, times log2(e) too: scores are float32 whatever the inputs are
MOST_LIFT = 64.0  # nats that tail="spread" adds to a row's pooled logits at most
_CHOICES = {
    "rank": ("mean", "gaussian", "mixture"),
    "tail": ("pooled", "spread", None),
    "query_order": ("position", "guide"),
}
# The settings that only stage 3 reads: `attend` may change them after a plan was made.
ATTEND_SETTINGS = ("tau", "tail", "block_q", "block_k")


def _known_fields_only(cls):
    """A dataclass whose constructor refuses an unknown keyword by `_known`'s message."""
    make = cls.__init__

    @functools.wraps(make)
    def init(self, *values, **fields):
        _known(cls, fields)
        make(self, *values, **fields)

    cls.__init__ = init
    return cls


def _known(cls, fields) -> None:
    allowed = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(fields) - set(allowed))
    if unknown:
        raise TypeError(f"unknown setting {unknown[0]!r}; allowed: {', '.join(allowed)}")


class HashedOnce:
    """A frozen dataclass that is the key of caches and keeps its hash: its body says `__hash__` is this one."""

    def __hash__(self):
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple([getattr(self, field.name) for field in dataclasses.fields(self)]))

    def __getstate__(self):  # texts hash otherwise in another process
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}


@_known_fields_only
@dataclasses.dataclass(frozen=True)
class Settings(HashedOnce):
    """How attention is computed: every choice of the method, validated, immutable.

    Parameters
    ----------
    causal : bool
        Query ``i`` sees keys ``j <= i + Nk - Nq`` (bottom-right aligned); else every key.
    window : int or None
        A causal query sees the last `window` of its keys only. Within a window attention is dense: nothing is ranked.
    scale : float or None
        Positive factor on ``q . k``, at most 1e38; ``None`` is ``1 / sqrt(D)``.
    segment : int
        Queries that share one ranking of the keys (paper section 3).
    block_q, block_k : int
        Queries of a row tile and ranked keys of a key tile: the granularity of the stop.
    pool : int
        Keys of a pool block, a power of two; a causal history ends on a block's edge.
    rank : {"gaussian", "mean", "mixture"}
        Score of a key: by the segment's mean query (paper), with its covariance added, or by centres of its queries
        (the best order, at twice the cost of a gaussian of as many terms).
    rank_terms : int or None
        Gaussian: rank of the covariance factor, ``None`` the full covariance. Mixture: number of centres (31 or more
        are wanted), ``None`` every query. 7, 15, 31 or 63 fit tensor cores; the mean rank does not read it.
    rank_levels : int or None
        Equal steps a list's scores are quantised to before ordering; ``None`` orders exactly.
    tail : {"pooled", "spread", None}
        Keys never walked enter as one pooled key a block, or not at all (paper). A block's mean key is lighter than
        its keys are on average; ``"spread"`` makes up for it row by row.
    tau : float or sequence of float
        Stop after the first key tile that adds less than this share to every row's softmax sum;
        0 never stops. One number, or one for each query head.
    query_order : {"position", "guide"}
        Order of the queries inside a segment; ``"guide"`` is the paper's.
    share_order : bool
        One ranking for all the query heads of a K/V head.
    cap : float
        Share of a history, in (0, 1], that is ordered and can be walked.

    Raises
    ------
    TypeError, ValueError
        Naming the setting, its value and what is allowed.

    Examples
    --------
    >>> from s2o_cupy import Settings
    >>> Settings(tau=3e-3).replace(segment=512).segment
    512
    """

    causal: bool = True
    window: int | None = None
    scale: float | None = None
    segment: int = 256
    block_q: int = 128
    block_k: int = 64
    pool: int = 128
    rank: str = "gaussian"
    rank_terms: int | None = 15
    rank_levels: int | None = 1024
    tail: str | None = "pooled"
    tau: float | tuple[float, ...] = 1e-2
    query_order: str = "position"
    share_order: bool = False
    cap: float = 1.0

    __hash__ = HashedOnce.__hash__

    def __post_init__(self):
        for name in ("causal", "share_order"):
            value = getattr(self, name)
            if not isinstance(value, (bool, np.bool_)):
                raise TypeError(f"{name} is {value!r}; allowed: True or False")
            object.__setattr__(self, name, bool(value))
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if not any(value is a or (isinstance(value, str) and value == a) for a in allowed):
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
        for name in ("segment", "block_q", "block_k", "pool"):
            object.__setattr__(self, name, integer(name, getattr(self, name), 1, 2**30))
        if self.pool & (self.pool - 1):
            raise ValueError(f"pool is {self.pool}; allowed: a power of two")
        for name, low, high in (("window", 1, 2**31 - 1), ("rank_terms", 1, MAX_HEAD_DIM), ("rank_levels", 2, 2**16)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, integer(name, getattr(self, name), low, high, " or None"))
        if self.window is not None and not self.causal:
            raise ValueError(f"window is {self.window} and causal False; allowed: a window with causal=True, or None")
        if self.scale is not None:
            allowed = f"a number above 0, at most {MAX_SCALE:g}, or None"
            object.__setattr__(self, "scale", real("scale", self.scale, allowed))
            if not 0 < self.scale <= MAX_SCALE:
                raise ValueError(f"scale is {self.scale}; allowed: {allowed}")
        object.__setattr__(self, "cap", real("cap", self.cap, "a number in (0, 1]"))
        if not 0 < self.cap <= 1:
            raise ValueError(f"cap is {self.cap}; allowed: a number in (0, 1]")
        object.__setattr__(self, "tau", _tau(self.tau))

    @classmethod
    def paper(cls, **changes) -> Settings:
        """S2O as published (arXiv 2602.22575): mean rank, no tail, guide order of the queries."""
        return cls().replace(**{"rank": "mean", "tail": None, "query_order": "guide", **changes})

    @classmethod
    def precise(cls, **changes) -> Settings:
        """The best order known, a mixture of 31 centres over segments of 128: least error at a density."""
        return cls().replace(**{"segment": 128, "rank": "mixture", "rank_terms": 31, **changes})

    def replace(self, **changes) -> Settings:
        """A copy with some settings changed; an unknown name is refused."""
        return dataclasses.replace(self, **changes) if changes else self

    def _repr_html_(self) -> str:
        return reprs.settings_html(self)

    def as_dict(self) -> dict:
        """The fields by name, as JSON can hold them."""
        return dataclasses.asdict(self)

    def save(self, path: str | os.PathLike) -> None:
        """Write the settings as JSON, whole or not at all."""
        save_json(path, self.as_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Settings:
        """Read settings written by `save`; a missing field takes its default, an unknown one is refused."""
        where = f"settings file {os.fspath(path)!r}"
        try:
            fields = json.loads(Path(path).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{where} holds a {type(fields).__name__}; allowed: an object")
        try:
            return cls().replace(**fields)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from None


def as_settings(settings, **changes) -> Settings:
    """`settings`, the defaults where it is None, with changed fields; anything else is refused."""
    if settings is None:
        settings = _DEFAULTS
    if not isinstance(settings, Settings):
        raise TypeError(f"settings is a {type(settings).__name__}; allowed: Settings, or its fields as keywords")
    if not changes:
        return settings
    if _PLAIN.issuperset(map(type, changes.values())):  # checks cost more than launches: once is enough
        return _changed(settings, **changes)
    return settings.replace(**changes)


@functools.lru_cache(maxsize=256, typed=True)  # True equals 1
def _changed(settings: Settings, **changes) -> Settings:
    return settings.replace(**changes)


def integer(name: str, value, low: int, high: int, also: str = "") -> int:
    allowed = f"an integer from {low} to {high}{also}"
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is {value!r}; allowed: {allowed}")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; allowed: {allowed}")
    return int(value)


def real(name: str, value, allowed: str) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} is {value!r}; allowed: {allowed}")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; allowed: {allowed}")
    return float(value)


def _tau(value) -> float | tuple[float, ...]:
    allowed = "a finite number, 0 or above, or one for each q head"
    if isinstance(value, np.ndarray) and value.ndim > 1:
        raise TypeError(f"tau is an array of shape {value.shape}; allowed: {allowed}")
    if isinstance(value, (list, tuple, np.ndarray)) and np.ndim(value) == 1 and len(value):
        numbers = tuple(real("tau", t, allowed) for t in value)
    else:
        numbers = (real("tau", value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value, allowed),)
    for number in numbers:
        if number < 0:
            raise ValueError(f"tau is {number}; allowed: {allowed}")
    return numbers if isinstance(value, (list, tuple)) or np.ndim(value) else numbers[0]


_DEFAULTS = Settings()
_PLAIN = frozenset((bool, int, float, str, type(None)))
