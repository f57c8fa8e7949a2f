"""Builds a kernel for the CPU by emulation.h and calls it: the same `.cu` source, fibers for threads."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from s2o_cupy.compile import KernelCompileError
from s2o_cupy.sources import current, kernel_folder

HERE = Path(__file__).parent
_BUILDS = tempfile.TemporaryDirectory(prefix="s2o_emulation_")
_SCALARS = {"int": ctypes.c_int, "long long": ctypes.c_longlong, "float": ctypes.c_float, "double": ctypes.c_double}


def compiler() -> str | None:
    return shutil.which("g++")


def launch(name, grid, block, arguments, *, entry=None, shared=0, reverse=False, edit=None, source=None, **macros):
    """Runs ``kernels/NAME.cu``'s kernel on NumPy arrays, in place. `edit` may change the source (to break it).

    `source` is another text than that file's.
    """
    source = source or current(name).text
    if edit is not None:
        changed = edit(source)
        assert changed != source, "the edit changes nothing"
        source = changed
    call(*built(source, entry or name, tuple(sorted(macros.items()))), grid, block, arguments, shared, reverse)


def read(types, addresses: int) -> list:
    """A launch's arguments as the driver finds them: by the addresses that lie at an address."""
    kinds = [ctypes.c_void_p if kind == "*" else _SCALARS[kind] for kind in types]
    places = (ctypes.c_uint64 * len(types)).from_address(addresses)
    return [kind.from_address(place).value for kind, place in zip(kinds, places)]


def call(function, types, grid, block, arguments, shared=0, reverse=False) -> None:
    """Run what `built` made, on arrays or addresses, None for null; `reverse`: a block's threads in opposite order."""
    grid = (*grid, *(1,) * (3 - len(grid)))
    values = []
    for argument, kind in zip(arguments, types, strict=True):
        if kind == "*":
            values.append(ctypes.c_void_p(argument.ctypes.data if isinstance(argument, np.ndarray) else argument))
        else:
            values.append(_SCALARS[kind](argument))
    function(*map(ctypes.c_int, (*grid, block, shared, int(reverse))), *values)


def parameter_list(source: str, entry: str) -> str:
    """A kernel's parameters, from its declaration or from that of the macro that declares it."""
    source = re.sub(r"//[^\n]*", "", source).replace("\\\n", " ")
    macro = re.search(rf"^([A-Z]+)\({entry},", source, re.MULTILINE)
    if macro:
        found = re.search(rf"#define {macro[1]}\(.*?\bNAME\(\s*(const[^{{]*)\) \{{", source, re.DOTALL)
    else:
        found = re.search(rf'extern "C" __global__ void [^;{{]*?\b{entry}\(([^{{]*)\) \{{', source)
    return found[1].replace("\n", " ")


@functools.cache
def built(source: str, entry: str, macros: tuple):
    """A kernel compiled for the CPU, and the kinds of its arguments: "*" or a scalar's C type."""
    real = dict(macros).get("REAL", "float")  # of 16-bit inputs, too
    source = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];",
        r"\1* const \2 = (\1*)s2o_emulation::dynamic_shared.data();",
        source,
    )
    declared = parameter_list(source, entry)
    types, parameters = [], []
    for i, parameter in enumerate(declared.split(",")):
        parameter = re.sub(r"\s+", " ", parameter).strip()
        kind = "*" if "*" in parameter else re.sub(r" \w+$", "", parameter) if " " in parameter else parameter
        kind = re.sub(r"^long long.*", "long long", kind)
        types.append(real if kind in ("real_t", "element_t") else kind)
        parameters.append(("void*" if kind == "*" else types[-1]) + f" a{i}")
    casts = ", ".join(_cast(p, i) for i, p in enumerate(declared.split(",")))
    source = '#include "emulation.h"\n' + source
    source += f"""
extern "C" void emulate(int x, int y, int z, int block, int shared, int reversed, {", ".join(parameters)}) {{
    s2o_emulation::run({{(unsigned)x, (unsigned)y, (unsigned)z}}, block, shared, reversed, [=] {{ {entry}({casts}); }});
}}
"""
    key = hashlib.sha256((source + repr(macros)).encode()).hexdigest()[:16]
    cpp, library = Path(_BUILDS.name) / f"{key}.cpp", Path(_BUILDS.name) / f"{key}.so"
    cpp.write_text(source)
    defines = [f"-D{n}={v}" for n, v in macros]
    command = [
        "g++",
        "-std=c++20",
        "-O1",
        "-w",
        "-ffp-contract=off",
        "-U_FORTIFY_SOURCE",  # whose longjmp refuses another stack
        "-shared",
        "-fPIC",
        f"-I{HERE}",
        f"-I{kernel_folder()}",
    ]
    done = subprocess.run([*command, *defines, str(cpp), "-o", str(library)], capture_output=True, text=True)
    if done.returncode:
        raise KernelCompileError(f"{entry} for the CPU's emulation:\n{done.stderr[:4000]}")
    return ctypes.CDLL(str(library)).emulate, types


def _cast(parameter: str, i: int) -> str:
    if "*" not in parameter:
        return f"a{i}"
    kind = re.sub(r"__restrict__|const", "", parameter).split("*")[0].strip()
    return f"({kind}*)a{i}"


def half_bits(x) -> np.ndarray:
    """A 16-bit array as the kernels see it."""
    return x.view(np.uint16)
