"""The kernels' source as it is now: which folder, headers inlined, and read again when a file changes.

`current` is what every launch asks. A file of `kernels/` (or of the folder that ``S2O_KERNELS`` names) that was saved
since the last call, headers too, is compiled at the next; inside ``use_kernel`` a variant stands in its place.
"""

from __future__ import annotations

import functools
import importlib.resources
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

# Macros that say which arrays a kernel is for: a variant that fixes one serves no call that needs another.
SHAPE_MACROS = ("IS_BF16", "REAL", "SCORE_HALF", "HEAD_DIM", "HEAD_DIM_V", "BLOCK_M", "WIDTH")
# Macros of which a kernel serves no more than what the arrays allow: key tiles end where a step or a part of it does.
_AT_MOST = (("attend_sm90", "BLOCK_N"), ("attend_sm90", "PARTS"))
# Files and S2O_KERNELS are not looked at again within this time: twenty files take 40 to 180 us, as much as a call
# otherwise, and a variable that is not set a fifth of a call.
_SECONDS = 0.1
_INCLUDE = re.compile(r'[ \t]*#[ \t]*include[ \t]+"([^"]+)"')
_LINE = re.compile(r'#line (\d+) "([^"]+)"')


@dataclass(frozen=True)
class Source:
    """One kernel file with its headers inlined, and the macros that it fixes."""

    name: str
    text: str
    macros: tuple[tuple[str, object], ...] = ()

    def applied(self, macros: dict) -> dict:
        """The macros of a launch, with the ones that this source fixes; refused where the arrays need others."""
        for name, value in self.macros:
            needed = macros.get(name, value)
            if name in SHAPE_MACROS and needed != value:
                raise ValueError(f"the variant of {self.name} fixes {name}={value}; this call needs {needed}")
            if (self.name, name) in _AT_MOST and value > needed:
                raise ValueError(
                    f"the variant of {self.name} fixes {name}={value}; this call's key tiles (block_k) and head dims "
                    f"allow at most {needed}"
                )
        return macros | dict(self.macros)


_variants: ContextVar[dict[str, Source]] = ContextVar("s2o_variants", default={})  # noqa: B039 - never written to
_called: set[Source] = set()  # variants in use at a call of a backend that has such a kernel
_launched: set[Source] = set()


@dataclass(eq=False)
class _Folder:
    """A folder's files as they were read, each with its stamp, and the kernels made of them."""

    path: str
    looked: float = 0.0
    stamps: dict[str, tuple | None] = field(default_factory=dict)
    texts: dict[str, str | None] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)


_folders: dict[str, _Folder] = {}
_last: _Folder | None = None  # that was looked at


def current(name: str) -> Source:
    """What ``kernels/NAME.cu`` compiles from now: a variant in use, else the files as they are on disk."""
    variant = variant_of(name)
    return from_folder(name, look().path) if variant is None else variant


def variant_of(name: str) -> Source | None:
    """The variant of a kernel file that is in use in this thread; from now on it has been launched."""
    variant = _variants.get().get(name)
    if variant is not None:
        _launched.add(variant)
    return variant


def version() -> tuple[Hashable, ...]:
    """Equal for as long as `current` answers the same for every kernel; up to a tenth of a second longer."""
    known = _last
    if known is None or time.monotonic() - known.looked >= _SECONDS:
        known = look()
    return known, *_variants.get().values()


def look() -> _Folder:
    """The folder that is named now. After another one it is read anew: what was made meanwhile may be the other's."""
    global _last
    folder = _folder(os.environ.get("S2O_KERNELS", ""))
    if _last is not None and _last.path != folder:
        _folders.pop(folder, None)
    _last = _as_it_is(folder)
    return _last


def from_folder(name: str, folder: str) -> Source:
    """``NAME.cu`` of a folder, read again only where a file changed."""
    known = _as_it_is(folder)
    if name not in known.sources:

        def read(file: str) -> str | None:
            path = os.path.join(folder, file)
            if path not in known.texts:
                known.stamps[path] = stamp_of(path)  # before the file is read: a later save is seen
                known.texts[path] = Path(path).read_text() if known.stamps[path] else None
            return known.texts[path]

        known.sources[name] = Source(name, inlined(f"{name}.cu", read))
    return known.sources[name]


def _as_it_is(folder: str) -> _Folder:
    """What is known of a folder: nothing yet where one of its files changed."""
    known, now = _folders.get(folder), time.monotonic()
    if known is None or now - known.looked >= _SECONDS:
        if known is None or known.stamps != {path: stamp_of(path) for path in list(known.stamps)}:
            known = _folders[folder] = _Folder(folder)
        known.looked = now
    return known


def stamp_of(path: str | Path) -> tuple | None:
    """What changes with a file: its time, size and inode; None where there is none."""
    try:
        now = os.stat(path)
        return now.st_mtime_ns, now.st_size, now.st_ino
    except OSError:
        return None


@contextmanager
def in_use(source: Source) -> Iterator[None]:
    """Compile and launch `source` in place of its kernel, in this thread (and context) alone."""
    token = _variants.set({**_variants.get(), source.name: source})
    try:
        yield
    finally:
        _variants.reset(token)


def called_on(backend: str) -> None:
    """Note a call: warns of variants in use that are no kernels of its backend."""
    for name, variant in _variants.get().items():
        home = "numba" if name.endswith("_numba") else "cuda"
        if home == backend:
            _called.add(variant)
        else:
            _warn(f"use_kernel({name!r}, ...) changes nothing here: backend {backend!r} runs; {name} is of {home!r}")


def warn_unless_launched(source: Source) -> None:
    """Warn where calls were made with a variant in use, and none launched it."""
    if source in _called and source not in _launched:
        why = "other kernels serve these calls (docs/kernels.md), or they are so short that they are dense"
        _warn(f"use_kernel({source.name!r}, ...) changed nothing: {why}")


def _warn(message: str) -> None:
    """A warning at the line outside this package that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("s2o_cupy", "contextlib")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def kernel_folder() -> Path:
    """The folder of `.cu` and `.cuh` files: ``$S2O_KERNELS``, else the shipped one."""
    return Path(_folder(os.environ.get("S2O_KERNELS", "")))


@functools.cache
def _folder(chosen: str) -> str:
    if chosen:
        folder = Path(chosen).absolute()
        if not (folder / "attend.cu").is_file():
            raise FileNotFoundError(f"S2O_KERNELS is {chosen!r}, without an attend.cu; allowed: a copy of kernels/")
        return str(folder)
    inside = Path(str(importlib.resources.files("s2o_cupy"))) / "kernels"
    folder = inside if inside.is_dir() else inside.parent.parent / "kernels"
    if not (folder / "attend.cu").is_file():
        raise FileNotFoundError(f"no CUDA sources in {inside} or {folder}")
    return str(folder)


def kernel_names() -> list[str]:
    """Every kernel file, without its ending."""
    return sorted(path.stem for path in kernel_folder().glob("*.cu"))


def inlined(file: str, read: Callable[[str], str | None], label: str | None = None) -> str:
    """A file's text with its quoted headers inlined, numbered so that an error names the file and line it is in.

    A header that `read` does not know stays an include, for the compiler to complain of.
    """
    return "\n".join(_inlined(file, read, label or f"kernels/{file}", ()))


def _inlined(file: str, read, label: str, within: tuple) -> list[str]:
    text = read(file)
    if text is None:
        raise FileNotFoundError(f"{label} is missing from {kernel_folder()}")
    lines, number = [f'#line 1 "{label}"'], 0
    for line in text.split("\n"):
        number += 1
        moved, include = _LINE.match(line), _INCLUDE.match(line)
        if moved:
            number, label = int(moved[1]) - 1, moved[2]
        header = include and include[1]
        if not header or (header not in within and read(header) is None):
            lines.append("" if line.strip() == "#pragma once" else line)
            continue
        if header not in (*within, file):
            guard = "S2O_HAS_" + re.sub(r"\W", "_", header)
            lines += [f"#ifndef {guard}", f"#define {guard}"]
            lines += _inlined(header, read, f"kernels/{header}", (*within, file))
            lines += ["#endif", f'#line {number + 1} "{label}"']
    return lines
