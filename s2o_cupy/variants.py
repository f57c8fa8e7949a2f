"""Kernel variants: a whole kernel file, or a patch of some of its functions, in place of the shipped source."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from s2o_cupy import twins
from s2o_cupy.sources import Source, in_use, inlined, kernel_folder, kernel_names, warn_unless_launched

LABEL = "cell"  # what a compiler's message calls a variant's own text


@dataclass(frozen=True)
class Variant:
    """A changed kernel file: what was written, what compiles, and the file that it makes.

    Attributes
    ----------
    name : the kernel file, without its ending
    cell : what the author wrote
    source : what is compiled, headers inlined
    file, text : the file that changes (a header, where a patch is of a header's function), and its new contents
    """

    name: str
    cell: str
    source: Source
    file: str
    text: str


@contextmanager
def use_kernel(stage: str, source, **macros) -> Iterator[Variant]:
    """Run a kernel variant inside the real `attention`, `plan` and `attend`, in this thread, until the block ends.

    A call that cannot launch it says so by a `UserWarning`: one on the CPU backend, which has no such kernels, or one
    whose arrays another kernel serves.

    Parameters
    ----------
    stage : str
        A kernel file without its ending: "attend", "attend_simt", "pool", "remap", "score", ...; of the Numba CUDA
        backend "attend_numba", "pool_numba", ...
    source : str, pathlib.Path or Variant
        A whole kernel file, or functions that take the place of the file's (or its headers') own of the same name.
    **macros
        Defined for every launch of it. One that says which arrays a kernel serves (``HEAD_DIM``, ``IS_BF16``, ...)
        is refused where a call needs another value.

    Raises
    ------
    TypeError, ValueError
        Where the stage is unknown, or the source neither a whole file nor a patch, or its kernels take other
        arguments than the launcher gives.

    Examples
    --------
    >>> import s2o_cupy as s2o
    >>> with s2o.use_kernel("pool", "__device__ __forceinline__ void none() {}"):
    ...     pass
    Traceback (most recent call last):
    ValueError: the cell is no whole pool.cu and patches nothing: none is no function of pool.cu or its headers
    """
    if isinstance(source, Variant):
        if source.name != stage:
            raise ValueError(f"source is a variant of {source.name!r} and stage is {stage!r}; allowed: {source.name!r}")
        variant = source if not macros else make_variant(stage, source.cell, {**dict(source.source.macros), **macros})
    elif isinstance(source, str) and re.fullmatch(r"\S+\.(cu|cuh|py)", source):
        raise ValueError(f"source is {source!r}, which is no source text; for a file give pathlib.Path({source!r})")
    elif isinstance(source, (str, os.PathLike)):
        variant = make_variant(stage, Path(source).read_text() if isinstance(source, os.PathLike) else source, macros)
    else:
        raise TypeError(
            f"source is a {type(source).__name__}; allowed: source text, a path to it, or a verdict's variant"
        )
    with in_use(variant.source):
        yield variant
    warn_unless_launched(variant.source)


def make_variant(name: str, cell: str, macros: dict | None = None, folder: Path | None = None) -> Variant:
    """The variant of ``kernels/NAME.cu`` that a cell makes; refused, saying why, where it cannot be one."""
    if name in twins.names():
        if macros:
            raise ValueError(f"{name} is a Numba twin, which has no macros; given: {', '.join(macros)}")
        text = twins.patched(name, cell)
        return Variant(name, cell, Source(name, text), f"{name}.py", text)
    known = kernel_names()
    if name not in known:
        raise ValueError(f"kernel is {name!r}; allowed: {', '.join([*known, *twins.names()])}")
    folder = folder or kernel_folder()
    base = f"{name}.cu"
    texts = {file: (folder / file).read_text() for file in closure(base, folder)}

    def read(file: str) -> str | None:
        path = folder / file
        return texts.get(file) or (path.read_text() if path.is_file() else None)

    shipped = inlined(base, read)
    fixed = tuple(sorted(check_macros(macros or {}).items()))
    file, marked, plain = spliced(base, cell, texts)
    texts[file] = marked
    text = inlined(base, read, LABEL if marked is cell else None)
    variant = Variant(name, cell, Source(name, text, fixed), file, plain)
    for entry in entries(shipped):
        _same_parameters(name, entry, parameters(shipped, entry), parameters(text, entry))
    return variant


def closure(file: str, folder: Path) -> list[str]:
    """A kernel file and every header that it includes, in turn."""
    found, ahead = [], [file]
    while ahead:
        one = ahead.pop(0)
        if one in found or not (folder / one).is_file():
            continue
        found.append(one)
        ahead += re.findall(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', (folder / one).read_text(), re.MULTILINE)
    return found


# --- whole file or patch --------------------------------------------------------------------------
def spliced(base: str, cell: str, texts: dict[str, str]) -> tuple[str, str, str]:
    """The file that a cell changes; its new text with line marks, and without.

    A cell is a whole file where it has a directive such as ``#include`` outside its functions, or all of the file's
    kernels and more than functions. Else each function that the file or a header has too takes its place; what
    stands before it in the cell goes with it.
    """
    kernels, own = entries(texts[base]), definitions(cell)
    directives = re.search(r"^[ \t]*#[ \t]*(?!pragma)\w", _outside(cell, own), re.MULTILINE)
    more = kernels and set(kernels) <= {d.name for d in own} and _outside(_masked(cell), own).strip()
    if directives or more:
        missing = [entry for entry in kernels if parameters(cell, entry) is None]
        if missing:
            raise ValueError(
                f"the cell reads as a whole {base} and lacks the kernel {missing[0]} "
                f'(extern "C" __global__ void {missing[0]}(...)); a patch is functions only, without directives'
            )
        return base, cell, cell
    found = {d: [(file, o) for file, text in texts.items() for o in definitions(text) if o.name == d.name] for d in own}
    if not any(found.values()):
        what = f"{own[0].name} is no function" if own else "it defines no function"
        raise ValueError(f"the cell is no whole {base} and patches nothing: {what} of {base} or its headers")
    return _patched(cell, own, found, texts)


def _patched(cell: str, own: list, found: dict, texts: dict[str, str]) -> tuple[str, str, str]:
    files, places, start = set(), [], 0
    for d in own:
        candidates = found[d]
        if not candidates:
            continue  # a helper: goes along with the function that follows
        if len(candidates) > 1:
            candidates = [
                (file, o) for file, o in candidates if o.parameters.split() == d.parameters.split()
            ] or candidates
        if len(candidates) > 1:
            where = ", ".join(f"{file} line {o.line}" for file, o in candidates)
            raise ValueError(f"{d.name} is defined more than once ({where}); give the whole file")
        file, old = candidates[0]
        files.add(file)
        places.append((old.start, old.stop, start, d.stop))
        start = d.stop
    if len(files) > 1:
        raise ValueError(f"the cell patches functions of {', '.join(sorted(files))}; allowed: one file at a time")
    file, last = files.pop(), max(places, key=lambda place: place[3])
    places[places.index(last)] = (*last[:3], len(cell))  # what follows the last function goes with it
    text = texts[file]
    marked, plain = text, text
    for old_start, old_stop, new_start, new_stop in sorted(places, reverse=True):
        piece = cell[new_start:new_stop].strip("\n")
        line = cell[: cell.index(piece, new_start)].count("\n") + 1
        back = text[:old_stop].count("\n") + 1
        marked = (
            f'{marked[:old_start]}\n#line {line} "{LABEL}"\n{piece}\n#line {back} "kernels/{file}"\n{marked[old_stop:]}'
        )
        plain = plain[:old_start] + piece + plain[old_stop:]
    return file, marked, plain


def _outside(text: str, own: list) -> str:
    """The text with its functions blanked."""
    for d in own:
        text = text[: d.start] + " " * (d.stop - d.start) + text[d.stop :]
    return text


@dataclass(frozen=True)
class Definition:
    """A function at the top level of a text, [start, stop); `kernel` where a launcher can find it by name."""

    name: str
    parameters: str
    kernel: bool
    start: int
    stop: int
    line: int


def definitions(text: str) -> list[Definition]:
    """Every function that a CUDA text defines at its top level."""
    clear, found, depth, start, name = _masked(text), [], 0, 0, None
    for place, char in enumerate(clear):
        if char == "{":
            if depth == 0:
                head = clear[start:place]
                name = _function_head(head)
                begin = start + len(head) - len(head.lstrip())
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                if name is not None:
                    line = text[:begin].count("\n") + 1
                    found.append(Definition(*name, begin, place + 1, line))
                start = place + 1
        elif char == ";" and depth == 0:
            start = place + 1
    return found


def _function_head(head: str) -> tuple[str, str, bool] | None:
    head = head.rstrip()
    if not head.endswith(")"):
        return None
    depth = 0
    for place in range(len(head) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(head[place], 0)
        if depth == 0:
            name = re.search(r"([A-Za-z_]\w*)\s*$", head[:place])
            kernel = re.search(r"\bextern\b", head) and re.search(r"\b__global__\b", head)
            return (name[1], head[place:], bool(kernel)) if name else None
    return None


def _masked(text: str) -> str:
    """The text with comments, strings and directives blanked, every other character in its place."""

    def blank(match) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    strings = r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\''
    directive = r"^[ \t]*#(?:[^\n\\]|\\\n|\\.)*"
    return re.sub(rf"//[^\n]*|/\*.*?\*/|{strings}|{directive}", blank, text, flags=re.MULTILINE | re.DOTALL)


def only(text: str, entry: str) -> str:
    """The text with one kernel of its kernels, on the lines where it was: it compiles in a part of the time."""
    clear = _masked(text)
    others = [(clear.index("extern", d.start), d.stop) for d in definitions(text) if d.kernel and d.name != entry]
    for macro in _macros(text):
        made = re.finditer(rf"^{macro}\((\w+)[^\n]*", text, re.MULTILINE)
        others += [match.span() for match in made if match[1] != entry]
    for start, stop in sorted(others, reverse=True):
        text = text[:start] + "\n" * text.count("\n", start, stop) + text[stop:]
    return text


# --- signatures -----------------------------------------------------------------------------------
def entries(text: str, macros: dict | None = None) -> list[str]:
    """The kernels that a text defines, by name; score.cu and others make theirs by a macro of NAME.

    With `macros` those alone that it defines under them: where it says ``#if MACRO == NUMBER``.
    """
    text = _under(text, macros or {})
    by_macro = [name for macro in _macros(text) for name in re.findall(rf"^{macro}\((\w+)", text, re.MULTILINE)]
    return [*by_macro, *(d.name for d in definitions(text) if d.kernel)]


def _under(text: str, macros: dict) -> str:
    """The text without the lines that ``#if MACRO == NUMBER`` leaves out under these macros."""
    kept, open_ifs = [], []  # for each #if around a line, whether its lines count: None where that is not known
    for line in text.splitlines(keepends=True):
        word = re.match(r"\s*#\s*(if|else|elif|endif)", line)
        asked = re.match(r"\s*#\s*if\s+(\w+)\s*==\s*(\d+)\s*$", line)
        if word and word[1] == "if":
            open_ifs.append(macros[asked[1]] == int(asked[2]) if asked and asked[1] in macros else None)
        elif word and word[1] == "endif" and open_ifs:
            open_ifs.pop()
        elif word and open_ifs and open_ifs[-1] is not None:
            open_ifs[-1] = None if word[1] == "elif" else not open_ifs[-1]
        kept.append("\n" if not word and False in open_ifs else line)
    return "".join(kept)


def parameters(text: str, entry: str) -> list[str] | None:
    """The types of a kernel's parameters, in order; None where the text does not define it."""
    listed = next((d.parameters for d in definitions(text) if d.kernel and d.name == entry), None)
    for macro, given in _macros(text).items():
        if listed is None and re.search(rf"^{macro}\({re.escape(entry)}\b", text, re.MULTILINE):
            listed = given
    if listed is None:
        return None
    parts = [re.sub(r"\s+", " ", part).strip() for part in listed.strip("()").split(",")]
    types = [re.sub(r"(?<=[ *])\w+$", "", re.sub(r"\b(const|__restrict__)\b", "", part)) for part in parts if part]
    return [re.sub(r"\s+", " ", kind).replace(" *", "*").strip() for kind in types]


def _macros(text: str) -> dict[str, str]:
    """The macros that define a kernel called by their first parameter, NAME, and the parameters of that kernel."""
    text = re.sub(r"//[^\n]*", "", text).replace("\\\n", " ")
    found = re.findall(r"^#define (\w+)\(NAME\b[^\n]*?__global__[^\n]*?\bNAME\(([^\n{]*)\)\s*\{", text, re.MULTILINE)
    return dict(found)


def _same_parameters(name: str, entry: str, wanted: list[str] | None, got: list[str] | None) -> None:
    if wanted is None or got == wanted:
        return
    if got is None:
        raise ValueError(f'the cell defines no kernel {entry} (extern "C" __global__ void {entry}(...))')
    if len(got) != len(wanted):
        raise ValueError(
            f"{entry} takes {len(got)} parameters; the launcher gives it {len(wanted)}: {', '.join(wanted)}"
        )
    place = next(i for i, (a, b) in enumerate(zip(got, wanted)) if a != b)
    raise ValueError(f"parameter {place} of {entry} is {got[place]}; the launcher gives it {wanted[place]}")


def check_macros(macros: dict) -> dict:
    """``-D`` macros with their values as integers where they are ones."""

    def plain(value):
        return int(value) if isinstance(value, bool) or re.fullmatch(r"-?\d+", str(value)) else value

    return {name: plain(value) for name, value in macros.items()}
