"""Random calls: small shapes, every setting, awkward contents and strides, all built from a drawn seed."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from s2o_cupy import Settings
from s2o_cupy.problem import Problem, make_problem

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
LAYOUTS = ("plain", "transposed", "strided", "negative", "offset")
CONTENTS = ("randn", "ties", "dominant", "equal", "huge", "constant", "outliers")


_few = st.integers(1, 20)
DIMS = _few | _few | st.sampled_from([31, 32, 33, 64, 65, 128, 255, 256])


@dataclass
class Case:
    """One call's NumPy arrays (4-D) and settings; the repr rebuilds nothing, but says all that matters."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    settings: Settings
    contents: str
    layouts: tuple

    @property
    def problem(self) -> Problem:
        return make_problem(self.q, self.k, self.v, self.settings)

    @property
    def arrays(self) -> tuple:
        return self.q, self.k, self.v

    def copy(self) -> "Case":
        """The same values in contiguous arrays that may be changed."""
        q, k, v = (np.ascontiguousarray(x).copy() for x in self.arrays)
        return Case(q, k, v, self.settings, self.contents, ("plain",) * 3)

    def _repr_pretty_(self, printer, cycle) -> None:
        printer.text(repr(self))

    def __repr__(self) -> str:
        shapes = f"q{self.q.shape} k{self.k.shape} v{self.v.shape} {self.q.dtype.name}"
        return f"Case({shapes}, {self.contents}, {self.layouts}, {self.settings})"


@st.composite
def cases(draw, dtypes=tuple(DTYPES), contents=CONTENTS, dims=DIMS, min_keys=1, max_keys=150, max_batch=2, **fixed):
    """A `Case`; keywords fix settings, or what is drawn."""
    group, heads_kv = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    settings = draw(all_settings(group * heads_kv, **fixed))
    n_k = draw(st.integers(min_keys, max_keys))
    n_q = draw(st.one_of(st.just(n_k), st.integers(1, n_k if settings.causal else max_keys), st.just(1)))
    batch, dim_qk, dim_v = draw(st.integers(1, max_batch)), draw(dims), draw(dims)
    kind, dtype = draw(st.sampled_from(contents)), DTYPES[draw(st.sampled_from(dtypes))]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = (batch, group * heads_kv, n_q, dim_qk), (batch, heads_kv, n_k, dim_qk), (batch, heads_kv, n_k, dim_v)
    layouts = tuple(draw(st.sampled_from(LAYOUTS)) for _ in shapes)
    q, k, v = (laid(fill(kind, rng, s).astype(dtype), layout) for s, layout in zip(shapes, layouts))
    return Case(q, k, v, settings, kind, layouts)


@st.composite
def all_settings(draw, heads_q: int, **fixed) -> Settings:
    """Any `Settings` that small shapes can exercise."""
    tau = st.sampled_from([0.0, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0])
    choices = {
        "causal": st.booleans(),
        "window": st.none() | st.none() | st.none() | st.integers(1, 80),
        "scale": st.sampled_from([None, 0.05, 1.0]),
        "segment": st.integers(8, 64),
        "block_q": st.integers(1, 40),
        "block_k": st.integers(1, 32),
        "pool": st.sampled_from([1, 2, 4, 8, 16, 32]),
        "rank": st.sampled_from(["mean", "gaussian", "mixture"]),
        "rank_terms": st.one_of(st.none(), st.integers(1, 32)),
        "rank_levels": st.one_of(st.none(), st.sampled_from([2, 3, 16, 256, 1024, 65536])),
        "tail": st.sampled_from(["pooled", "spread", None]),
        "tau": st.one_of(tau, st.tuples(*[tau] * heads_q)),
        "query_order": st.sampled_from(["position", "guide"]),
        "share_order": st.booleans(),
        "cap": st.sampled_from([1.0, 1.0, 0.5, 0.1, 1e-4]),
    }
    chosen = {name: fixed[name] if name in fixed else draw(choice) for name, choice in choices.items()}
    return Settings(**chosen | {"window": chosen["window"] if chosen["causal"] else None})


def fill(kind: str, rng, shape) -> np.ndarray:
    """float64 contents of a kind of `CONTENTS`."""
    x = rng.standard_normal(shape)
    if kind == "ties":
        x = rng.integers(-1, 2, shape).astype(np.float64)
    elif kind == "dominant":
        x[..., rng.integers(shape[-2]), :] *= 8
    elif kind == "equal":
        x[...] = x[..., :1, :]
    elif kind == "huge":
        x *= 20
    elif kind == "constant":
        x[...] = 0.5
    elif kind == "outliers":
        x[..., rng.integers(shape[-1])] *= 15
    return x


def laid(x: np.ndarray, layout: str) -> np.ndarray:
    """The same values as a view of other strides."""
    b, h, n, d = x.shape
    if layout == "transposed":
        view = np.empty((b, n, h, d), x.dtype).transpose(0, 2, 1, 3)
    elif layout == "strided":
        view = np.empty((b, h, 2 * n, 3 * d), x.dtype)[:, :, ::2, ::3]
    elif layout == "negative":
        view = np.empty(x.shape, x.dtype)[:, ::-1, ::-1, ::-1]
    elif layout == "offset":
        view = np.empty((b, h, n, d + 2), x.dtype)[..., 1 : d + 1]
    else:
        return x
    view[...] = x
    return view
