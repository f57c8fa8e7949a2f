"""Files of arrays: npz and npy in, memory-mapped where they can be, and npz out, whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, RuntimeError, ValueError)


def load_arrays(path: str | os.PathLike, names, optional=()) -> dict[str, np.ndarray]:
    """The named arrays of an npz; pickles are refused, stored members are memory-mapped.

    Raises
    ------
    ValueError
        The file is no npz, holds a pickle, or lacks an array.
    OSError
        It cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a directory; allowed: an npz file")
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist")
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is no regular file; allowed: an npz file")
    try:
        with zipfile.ZipFile(path) as archive:
            present = {n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")}
            for name in names:
                if name not in present:
                    held = ", ".join(sorted(present)) or "nothing"
                    raise ValueError(f"{str(path)!r} has no array {name!r}; it holds {held}")
            wanted = [n for n in (*names, *optional) if n in present]
            return {name: _member(path, archive, f"{name}.npy") for name in wanted}
    except zipfile.BadZipFile:
        raise ValueError(f"{str(path)!r} is not an npz file") from None


def load_array(path: str | os.PathLike) -> np.ndarray:
    """One npy file, memory-mapped; a pickle is refused."""
    if Path(path).is_dir():
        raise IsADirectoryError(f"{os.fspath(path)!r} is a directory; allowed: an npy file")
    try:
        return _typed(np.lib.format.open_memmap(path, mode="r"))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} is not an npy file of numbers: {error}") from None


def save_arrays(path: str | os.PathLike, **arrays) -> None:
    """Write an npz, whole or not at all."""
    with replacing(path) as file:
        np.savez(file, **arrays)


def writable(path: str | os.PathLike) -> Path:
    """The file that `path` names, links followed; refused where none can be written: ask before work is done for it."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a directory; allowed: a file to write")
    if path.exists() and not path.is_file():
        raise ValueError(f"{str(path)!r} is no regular file; allowed: a file to write")
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder {str(path.parent)!r} does not exist")
    return path


def save_json(path: str | os.PathLike, value) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file to write, moved to `path` when all went well: no half-written file is ever left."""
    path = writable(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array of an open npz: mapped where its bytes lie plain in the file, else read."""
    try:
        info = archive.getinfo(name)
        with archive.open(name) as file:
            version = np.lib.format.read_magic(file)
            if version not in _HEADERS:
                raise ValueError(f"npy format {version}; supported: {', '.join(map(str, _HEADERS))}")
            shape, fortran, dtype = _HEADERS[version](file)
            header = file.tell()
        if dtype.hasobject:
            array = None
        elif info.compress_type == zipfile.ZIP_STORED and np.prod(shape, dtype=np.int64) and shape:
            with open(path, "rb") as raw:  # the local header's name and extra field have lengths of their own
                raw.seek(info.header_offset + 26)
                lengths = raw.read(4)
            start = info.header_offset + 30 + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
            array = np.memmap(path, dtype, "r", start + header, shape, "F" if fortran else "C")
        else:
            with archive.open(name) as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
    except _DAMAGE as error:
        raise ValueError(f"{str(path)!r}: {name} is not an array: {error}") from None
    if array is None:
        raise ValueError(f"{str(path)!r}: {name} is a pickle of Python objects; allowed: arrays of numbers")
    return _typed(array)


def _typed(array: np.ndarray) -> np.ndarray:
    """npy has no bfloat16: NumPy writes it as two raw bytes."""
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
