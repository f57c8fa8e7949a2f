"""The Numba CUDA twins as they are now: modules made from `kernels/*_numba.py`, and made again when a file changes.

`twin` is what every launch asks, as `sources.current` is for the raw kernels: a file that was saved since, or one that
it imports from, runs at the next call; inside ``use_kernel`` a variant stands in its place.
"""

from __future__ import annotations

import ast
import builtins
import linecache
import textwrap
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from s2o_cupy.sources import Source, kernel_folder, stamp_of, variant_of

# The stage of each twin, and what the backend takes from its module.
TWINS = {
    "pool": ("pool", ("pool_kernel", "departures_kernel", "running_kernel")),
    "score": ("score", ("score_kernel",)),
    "mixture": ("score", ("norm_kernel", "mixture_kernel")),
    "remap": ("remap", ("remap_kernel", "THREADS", "LAST")),
    "attend": ("attend", ("attend_kernel", "MAX_ROWS", "MAX_BLOCKS")),
}
SOURCES = "__sources__"  # of a module: its text and that of the twins that it imports
_PACKAGE = "s2o_cupy.kernels."


@dataclass
class _Made:
    """A module, what it was made from, and the twins that it imported as they were."""

    stamp: object
    module: ModuleType
    imports: dict[str, ModuleType] = field(default_factory=dict)


_made: dict[tuple[str, str, Source | None], _Made] = {}
_lock = threading.RLock()


def twin(name: str) -> ModuleType:
    """The module of ``kernels/NAME_numba.py`` as it is now."""
    return _module(f"{name}_numba")


def _module(name: str) -> ModuleType:
    variant = variant_of(name)
    path = kernel_folder() / f"{name}.py"
    key, stamp = (str(path), name, variant), variant or stamp_of(path)
    if stamp is None:
        raise FileNotFoundError(f"{path} is missing")
    with _lock:
        known = _made.get(key)
        if known is None or known.stamp != stamp or any(_module(n) is not m for n, m in known.imports.items()):
            known = _made[key] = _make(name, path, variant, stamp)
    return known.module


def _make(name: str, path: Path, variant: Source | None, stamp) -> _Made:
    text, file = (path.read_text(), str(path)) if variant is None else (variant.text, f"<{name}.py>")
    if variant is not None:  # Numba and tracebacks show its lines
        linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    made = _Made(stamp, ModuleType(_PACKAGE + name))

    def live_import(module, globals=None, locals=None, fromlist=(), level=0):
        """`import`, with the twins as they are now."""
        other = module.removeprefix(_PACKAGE)
        if other == module or not fromlist:
            return builtins.__import__(module, globals, locals, fromlist, level)
        made.imports[other] = _module(other)
        return made.imports[other]

    space = vars(made.module)
    space |= {"__file__": file, "__builtins__": {**vars(builtins), "__import__": live_import}}
    exec(compile(text, file, "exec"), space)
    space[SOURCES] = text + "".join(getattr(module, SOURCES) for module in made.imports.values())
    _, needed = TWINS.get(name.removesuffix("_numba"), ("", ()))
    for attribute in needed:
        if attribute not in space:
            raise ValueError(f"{name}.py defines no {attribute}")
    return made


def names() -> list[str]:
    """Every twin's file, without its ending: those of the stages, and what they import."""
    return sorted(path.stem for path in kernel_folder().glob("*_numba.py"))


# --- variants -------------------------------------------------------------------------------------
def patched(name: str, cell: str) -> str:
    """The module that a cell makes of ``NAME.py``: the cell where it imports, else the file with the cell's functions.

    Functions at any depth may be replaced; new ones before them go along.
    """
    text = (kernel_folder() / f"{name}.py").read_text()
    tree = ast.parse(cell, "cell")
    if any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body):
        own = {x.id for node in tree.body for x in ast.walk(node) if isinstance(x, ast.Name)}
        own |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        for needed in TWINS.get(name.removesuffix("_numba"), ("", ()))[1]:
            if needed not in own:
                raise ValueError(f"the cell reads as a whole {name}.py and defines no {needed}")
        return cell
    new = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    old: dict[str, list] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            old.setdefault(node.name, []).append(node)
    if not any(node.name in old for node in new):
        what = f"{new[0].name} is no function" if new else "it defines no function"
        raise ValueError(f"the cell is no whole {name}.py and patches nothing: {what} of it")
    lines, places, start = text.split("\n"), [], 0
    for node in new:
        if node.name not in old:
            continue  # a helper: goes along with the function that follows
        if len(old[node.name]) > 1:
            raise ValueError(f"{node.name} is defined more than once in {name}.py; give the whole module")
        before = old[node.name][0]
        _same_arguments(name, before, node)
        first = min([before.lineno, *(d.lineno for d in before.decorator_list)])
        piece = "\n".join(cell.split("\n")[start : node.end_lineno])
        places.append((first - 1, before.end_lineno, textwrap.indent(piece.strip("\n"), " " * before.col_offset)))
        start = node.end_lineno
    for first, last, piece in sorted(places, reverse=True):
        lines[first:last] = piece.split("\n")
    return "\n".join(lines)


def _same_arguments(name: str, old: ast.FunctionDef, new: ast.FunctionDef) -> None:
    """Refuse a function that takes another number of arguments: who calls it gives it the old ones."""
    wanted, got = ([x.arg for x in f.args.posonlyargs + f.args.args] for f in (old, new))
    if len(wanted) != len(got):
        raise ValueError(
            f"{new.name} takes {len(got)} arguments; {name}.py calls it with {len(wanted)}: {', '.join(wanted)}"
        )
