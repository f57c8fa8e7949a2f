"""Arrays in and out: NumPy, CuPy, DLPack and __cuda_array_interface__, viewed as 4-D and never silently copied."""

from __future__ import annotations

import functools
import sys

import numpy as np

from s2o_cupy.problem import DTYPES

_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged


def namespace(x):
    """The array module of a native array: numpy or cupy."""
    return sys.modules["cupy"] if _is_cupy(x) else np


def on_host(x) -> np.ndarray:
    """A native array as NumPy; waits for the device."""
    return x if isinstance(x, np.ndarray) else x.get()


def native(name: str, x):
    """`x` as a NumPy or CuPy array over the same memory; anything that would need a copy is refused."""
    if _is_cupy(x):
        view = x
    elif isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array; allowed: a plain array (its mask would be ignored)")
    elif isinstance(x, np.ndarray):
        view = x
    elif hasattr(x, "__dlpack__"):
        try:
            if x.__dlpack_device__()[0] in _DLPACK_CUDA:
                view = _import_cupy(name).from_dlpack(x)
            else:
                view = np.from_dlpack(x)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"{name} ({_described(x)}) cannot be viewed without a copy: {error}") from None
    elif hasattr(x, "__cuda_array_interface__"):
        view = _import_cupy(name).asarray(x)
    else:
        raise TypeError(
            f"{name} is a {type(x).__name__}; allowed: a NumPy or CuPy array, or one with "
            "__dlpack__ or __cuda_array_interface__"
        )
    if _name(view.dtype) not in DTYPES:
        raise TypeError(f"{name} has dtype {view.dtype.name}; supported: {', '.join(DTYPES)}")
    if not view.dtype.isnative:
        raise TypeError(f"{name} has byte order {view.dtype.byteorder!r}; supported: this machine's own")
    return view


def natives(**named) -> dict:
    """The arguments as native arrays, refused one by one and then where they do not go together."""
    views = {name: native(name, x) for name, x in named.items()}
    for name, x in views.items():
        as_four_axes(name, x)
    check_together(views)
    return views


def as_four_axes(name: str, x):
    """A view (B, H, N, D) of an array that may lack leading axes."""
    if not 2 <= x.ndim <= 4:
        raise ValueError(f"{name} has shape {x.shape}; allowed: (N, D), (H, N, D) or (B, H, N, D)")
    return x if x.ndim == 4 else x[(None,) * (4 - x.ndim)]


def check_together(named: dict) -> None:
    """Refuse arrays that differ in number of axes, dtype, or the device that holds them."""
    (first, x), *others = named.items()
    for name, y in others:
        if isinstance(x, np.ndarray) != isinstance(y, np.ndarray):
            places = {True: "the CPU (NumPy)", False: "the GPU (CuPy)"}
            raise ValueError(
                f"{first} is on {places[isinstance(x, np.ndarray)]} and {name} on {places[isinstance(y, np.ndarray)]}; "
                "allowed: all on one device (cupy.asarray, or .get())"
            )
        if not isinstance(x, np.ndarray) and x.device != y.device:
            raise ValueError(f"{first} is on {x.device} and {name} on {y.device}; allowed: all on one device")
        if x.dtype != y.dtype:
            raise TypeError(f"{first} has dtype {x.dtype.name} and {name} {y.dtype.name}; allowed: one dtype")
        if x.ndim != y.ndim:
            raise ValueError(f"{first} has shape {x.shape} and {name} {y.shape}; allowed: the same number of axes")


def check_finite(named: dict) -> None:
    """Refuse a NaN or an infinity, naming its place."""
    for name, x in named.items():
        xp = namespace(x)
        for lead in np.ndindex(x.shape[:-2]):
            for start in range(0, x.shape[-2], 65536):
                rows = x[lead][start : start + 65536]
                bad = ~xp.isfinite(rows)
                if bad.any():
                    row, column = (int(i[0]) for i in xp.nonzero(bad))
                    place = [*lead, start + row, column]
                    raise ValueError(f"{name} has {float(rows[row, column])} at {place}; allowed: finite numbers")


def check_out(out, shape: tuple[int, ...], inputs: dict) -> None:
    """Refuse an `out` of another shape, dtype or device, read-only, or overlapping an input."""
    like = inputs["q"]
    if type(out) not in (namespace(like).ndarray, np.memmap) or namespace(out) is not namespace(like):
        raise TypeError(f"out is a {type(out).__name__}; allowed: a {namespace(like).__name__} array as the inputs are")
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}; allowed: {shape}")
    if out.dtype != like.dtype:
        swapped = "" if out.dtype.isnative else f" of byte order {out.dtype.byteorder!r}"
        raise TypeError(f"out has dtype {out.dtype.name}{swapped}; allowed: {like.dtype.name}, that of q")
    if not isinstance(out, np.ndarray) and out.device != like.device:
        raise ValueError(f"out is on {out.device} and q on {like.device}; allowed: all on one device")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("out is read-only; allowed: a writable array")
    if _overlaps_itself(out):
        raise ValueError(f"out has strides {out.strides}, so elements overlap; allowed: memory for each")
    for name, x in inputs.items():
        if namespace(like).may_share_memory(out, x):
            raise ValueError(f"out shares memory with {name}; allowed: memory of its own")


def _overlaps_itself(x) -> bool:
    """Whether two elements may share memory; false for every view that slicing and transposing can make."""
    reach = x.itemsize
    for step, n in sorted((abs(step), n) for step, n in zip(x.strides, x.shape) if n > 1):
        if step < reach:
            return x.size > 0
        reach += step * (n - 1)
    return False


def in_kind(native_array, original):
    """`native_array` as the kind of array that `original` is, over the same memory, where its library can."""
    if isinstance(original, np.ndarray) or _is_cupy(original):
        return native_array
    root = type(original).__module__.partition(".")[0]
    library = sys.modules.get({"jaxlib": "jax"}.get(root, root))  # JAX's arrays are of jaxlib, its functions of jax
    from_dlpack = getattr(library, "from_dlpack", None) or getattr(
        getattr(library, "dlpack", None), "from_dlpack", None
    )
    return native_array if from_dlpack is None else from_dlpack(native_array)


@functools.lru_cache(maxsize=64)
def _name(dtype: np.dtype) -> str:
    return dtype.name


def _is_cupy(x) -> bool:
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


def _import_cupy(name: str):
    try:
        import cupy
    except ImportError:
        raise ImportError(f"{name} is on a GPU and CuPy is missing: pip install 's2o-cupy[cu13]' (or cu12)") from None
    return cupy


def _described(x) -> str:
    return f"{type(x).__module__.partition('.')[0]} {type(x).__name__} of dtype {getattr(x, 'dtype', '?')}"
