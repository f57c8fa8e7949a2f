"""Variants of the Numba CUDA twins: a whole module, or some of its functions, at any depth, put in their place."""

from __future__ import annotations

import ast
import linecache
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from s2o_cupy.sources import kernel_folder

# The name that the backend calls each twin's kernel by, and the module's own.
NAMES = {
    "pool": ("pool_kernel", "pool_kernel"),
    "score": ("score_kernel", "score_kernel"),
    "remap": ("remap_kernel", "remap"),
    "attend": ("attend_kernel", "attend_kernel"),
}


def shipped(stage: str) -> str:
    """The text of a twin's module."""
    if stage not in NAMES:
        raise ValueError(f"kernel is {stage!r}; allowed: {', '.join(NAMES)}")
    return (kernel_folder() / f"{stage}_numba.py").read_text()


def make_text(stage: str, cell: str) -> str:
    """The module that a cell makes of a twin: the cell where it imports, else the twin with the cell's functions."""
    text = shipped(stage)
    tree = ast.parse(cell, "cell")
    if any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body):
        own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if NAMES[stage][1] not in own:
            raise ValueError(f"the cell reads as a whole {stage}_numba.py and defines no {NAMES[stage][1]}")
        return cell
    new = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    old = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            old.setdefault(node.name, []).append(node)
    if not any(node.name in old for node in new):
        what = f"{new[0].name} is no function" if new else "it defines no function"
        raise ValueError(f"the cell is no whole {stage}_numba.py and patches nothing: {what} of it")
    lines, places, start = text.split("\n"), [], 0
    for node in new:
        if node.name not in old:
            continue  # a helper: goes along with the function that follows
        if len(old[node.name]) > 1:
            raise ValueError(f"{node.name} is defined more than once in {stage}_numba.py; give the whole module")
        before = old[node.name][0]
        first = min([before.lineno, *(d.lineno for d in before.decorator_list)])
        piece = "\n".join(cell.split("\n")[start : node.end_lineno])
        places.append((first - 1, before.end_lineno, textwrap.indent(piece.strip("\n"), " " * before.col_offset)))
        start = node.end_lineno
    for first, last, piece in sorted(places, reverse=True):
        lines[first:last] = piece.split("\n")
    return "\n".join(lines)


@contextmanager
def in_use(backend, stage: str, text: str) -> Iterator[None]:
    """The backend with a twin's module made from `text`; the shipped one again after the block."""
    name, own = NAMES[stage]
    file = f"<{stage}_numba.py>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    namespace = {"__name__": f"s2o_cupy.kernels.{stage}_numba", "__file__": file}
    exec(compile(text, file, "exec"), namespace)
    if not callable(namespace.get(own)):
        raise ValueError(f"{stage}_numba.py defines no {own}")
    before = getattr(backend, name)
    setattr(backend, name, namespace[own])
    try:
        yield
    finally:
        setattr(backend, name, before)


@contextmanager
def recorded(backend) -> Iterator[list]:
    """The launches that the Numba backend makes inside the block, to be played again; they run too."""
    launches, original = [], backend._launch

    def launch(*arguments):
        launches.append(lambda: original(*arguments))
        original(*arguments)

    backend._launch = launch
    try:
        yield launches
    finally:
        backend._launch = original
