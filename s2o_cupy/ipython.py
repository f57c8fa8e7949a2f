"""IPython: ``%load_ext s2o_cupy`` gives %s2o, %%s2o_cuda and %%s2o_numba, to try kernel variants at the prompt."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class
from IPython.display import Code, display
from pygments import highlight
from pygments.formatters import TerminalFormatter
from pygments.lexers import get_lexer_by_name

from s2o_cupy import compile as compiling
from s2o_cupy.files import replacing
from s2o_cupy.iterate.cases import focus
from s2o_cupy.iterate.report import History, Verdict
from s2o_cupy.iterate.session import AGAINST, SANITIZERS, Session
from s2o_cupy.iterate.worker import default_macros, has_gpu
from s2o_cupy.sources import current, kernel_folder, kernel_names
from s2o_cupy.specialisations import shipped
from s2o_cupy.twins import TWINS
from s2o_cupy.variants import check_macros, closure, entries

HELP = """%s2o kernels [NAME]         every kernel, its headers, specialisations and what is known of their resources;
                            NAME: of that one kernel, compiled where it was not
%s2o show NAME [--variant]   a kernel's source (NAME, a header such as walk.cuh, or NAME_numba); or your last variant
%s2o ptx NAME | sass NAME    its PTX or machine code, of your last variant if there is one (--shipped: of the file)
%s2o keep NAME FILE          write your last variant of NAME to FILE (--force: over a file that is there)
%s2o history                 the variants tried in this shell, with their numbers
%%s2o_cuda NAME [options]    try the cell as kernel NAME: a whole file, or functions in place of its own (%%s2o_cuda -h)
%%s2o_numba NAME [options]   the same for a Numba twin (%%s2o_numba -h)

In code: with s2o_cupy.use_kernel("pool", cell_or_path_or_verdict.variant): s2o_cupy.attention(q, k, v)
Files under kernels/, or a copy of them named by S2O_KERNELS, are read again when they change."""


class _Parser(argparse.ArgumentParser):
    """Raises instead of ending the shell; -h prints."""

    def exit(self, status=0, message=None):
        raise _Said(message or "")

    def error(self, message):
        raise UsageError(f"{self.prog}: {message}\n{self.format_usage()}")


class _Said(Exception):
    """Help was printed; nothing is left to do."""


@magics_class
class KernelMagics(Magics):
    """%s2o, %%s2o_cuda and %%s2o_numba; `session` holds the workers and the history."""

    def __init__(self, shell):
        super().__init__(shell)
        self.session = Session()
        self.session.history = History()

    @line_magic
    def s2o(self, line):
        """Kernels: what there is, their source and code, what was tried. ``%s2o`` alone says what it takes."""
        words = _split(line, "%s2o")
        commands = {
            "kernels": self._kernels, "show": self._show, "ptx": self._ptx, "sass": self._sass, "keep": self._keep,
            "history": self._history,
        }  # fmt: skip
        if not words or words[0] in ("help", "-h", "--help"):
            print(HELP)
            return None
        if words[0] not in commands:
            raise UsageError(f"%s2o {words[0]}: allowed: {', '.join(commands)}")
        return _told(lambda: commands[words[0]](words[1:]))

    @cell_magic
    def s2o_cuda(self, line, cell):
        """Compile the cell as a raw kernel, check it and time it, in a process of its own."""
        return _told(lambda: self._cuda(line, cell))

    @cell_magic
    def s2o_numba(self, line, cell):
        """Compile the cell as a Numba twin, check it and time it, in a process of its own."""
        return _told(lambda: self._numba(line, cell))

    # --- cells ------------------------------------------------------------------------------------
    def _cuda(self, line: str, cell: str) -> Verdict:
        parser = _parser("%%s2o_cuda", "a kernel file without its ending (%%s2o kernels lists them)", 20.0)
        parser.add_argument("-D", dest="macros", metavar="MACRO=VALUE", action="append", default=[], help="a macro")
        parser.add_argument("--arch", help="such as sm_80; default: this GPU's, sm_90a without one")
        parser.add_argument(
            "--sanitize", nargs="?", const="memcheck", choices=SANITIZERS, help="the check under compute-sanitizer too"
        )
        chosen = parser.parse_args(_split(line, "%%s2o_cuda"))
        if chosen.arch and not (
            re.fullmatch(r"sm_\d{2,3}[af]?", chosen.arch) and int(chosen.arch[3:].strip("af")) >= 80
        ):
            raise UsageError(f"--arch {chosen.arch}: allowed: sm_80 or above, such as sm_80, sm_90a, sm_100")
        macros = {}
        for macro in chosen.macros:
            name, _, value = macro.partition("=")
            if not name.isidentifier():
                raise UsageError(f"-D {macro}: allowed: MACRO=VALUE")
            macros[name] = value or "1"
        return self.session.try_cuda(
            chosen.name,
            cell,
            macros=check_macros(macros),
            arch=chosen.arch,
            check=chosen.check,
            bench=chosen.bench,
            against=chosen.against,
            sanitize=chosen.sanitize,
            limit=chosen.limit,
        )

    def _numba(self, line: str, cell: str) -> Verdict:
        parser = _parser("%%s2o_numba", f"one of {', '.join(TWINS)}", 60.0)
        chosen = parser.parse_args(_split(line, "%%s2o_numba"))
        return self.session.try_numba(
            chosen.name, cell, check=chosen.check, bench=chosen.bench, against=chosen.against, limit=chosen.limit
        )

    # --- lines ------------------------------------------------------------------------------------
    def _kernels(self, words) -> None:
        if len(words) > 1 or (words and words[0] not in kernel_names()):
            raise UsageError(f"%s2o kernels {' '.join(words)}: allowed: one of {', '.join(kernel_names())}, or nothing")
        if words:
            self.session.resources(words[0])
        arch, here = _arch(), {}
        for one in compiling.kernel_resources():
            here.setdefault(one["kernel"].split(":")[0], []).append(one)
        for name in words or kernel_names():
            print(f"{name:12s} kernels {', '.join(entries(current(name).text))}; {', '.join(closure_of(name))}")
            worker = {tuple(map(tuple, x["macros"])): x["kernels"] for x in self.session.known.get(name, ())}
            for spec in shipped(arch):
                if spec.name == name:
                    known = worker.get(spec.macros) or compiling.known_resources(arch, spec) or ()
                    _print_resources(_defined(dict(spec.macros)), known)
            for one in here.get(name, ()):
                told = {**one, "kernel": one["kernel"].split(":")[1], "shared_bytes": one["static_shared_bytes"]}
                used = [{"kernel": told["kernel"], **launch} for launch in one["launches"]]
                _print_resources(f"{_defined(one['macros'])} (this process)", [told], used)
            for tried in self.session.history:
                if tried.name == name and tried.kind == "cuda" and tried.compiled:
                    title = f"variant #{tried.number}, {tried.compiled['arch']} {_defined(tried.compiled['macros'])}"
                    _print_resources(title, tried.compiled["kernels"], tried.used)
        if not words:
            print(f"Numba twins: {', '.join(TWINS)}. Files: {kernel_folder()}")
            print("Resources are of what was compiled; %s2o kernels NAME compiles every specialisation of a kernel")

    def _show(self, words) -> None:
        own = "--variant" in words
        (name,) = _words([w for w in words if w != "--variant"], "show NAME [--variant]")
        if own:
            tried = self._latest(name)
            display(_code(tried.variant.text, tried.variant.file))
            return
        folder = kernel_folder()
        for file in (name, f"{name}.cu", f"{name}.py"):
            if (folder / file).is_file() and Path(file).name == file:
                display(_code((folder / file).read_text(), file))
                return
        raise UsageError(f"%s2o show {name}: allowed: {', '.join(sorted(p.name for p in folder.glob('*.*')))}")

    def _ptx(self, words) -> None:
        display(_code(compiling.compile_ptx(*self._chosen(words, "ptx")), "ptx.s"))

    def _sass(self, words) -> None:
        program = _program("nvdisasm")
        cubin, _ = compiling.compile_cubin(*self._chosen(words, "sass"))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            done = subprocess.run([program, "-c", file.name], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvdisasm: {done.stderr.strip()}")
        display(_code(done.stdout, "sass.s"))

    def _chosen(self, words, kind: str) -> tuple:
        """Architecture, name, macros and source of what is asked for."""
        of_file = "--shipped" in words
        (name,) = _words([w for w in words if w != "--shipped"], f"{kind} NAME [--shipped]")
        if name not in kernel_names():
            raise UsageError(f"%s2o {kind} {name}: allowed: {', '.join(kernel_names())}")
        tried = None if of_file else self.session.latest(name)
        source = tried.variant.source if tried else current(name)
        at = focus(name, dict(source.macros))
        arch = tried.compiled["arch"] if tried and tried.compiled else _arch()
        macros = source.applied(default_macros(name, at, arch))
        print(f"{name}, {f'variant #{tried.number}' if tried else 'the file'}, {arch}, {_defined(macros)}")
        return arch, name, macros, source

    def _keep(self, words) -> None:
        force = "--force" in words
        name, path = _words([w for w in words if w != "--force"], "keep NAME FILE [--force]", 2)
        tried, path = self._latest(name), Path(path).expanduser()
        if path.exists() and not force:
            raise UsageError(f"%s2o keep: {path} is there; --force writes over it")
        with replacing(path) as file:
            file.write(tried.variant.text.encode())
        print(f"{path}: variant #{tried.number} of {name} as {tried.variant.file} ({tried.status})")

    def _history(self, words) -> History:
        _no_more(words)
        return self.session.history

    def _latest(self, name: str) -> Verdict:
        kind = "numba" if name.endswith("_numba") else "cuda"
        tried = self.session.latest(name.removesuffix("_numba"), kind)
        if tried is None:
            raise UsageError(f"no variant of {name} compiled in this shell; %s2o history lists what was tried")
        return tried


def load_ipython_extension(shell) -> None:
    """Register the magics and start the worker, so that the first variant finds it warm."""
    if "KernelMagics" in shell.magics_manager.registry:  # by its other name
        return
    magics = KernelMagics(shell)
    shell.register_magics(magics)
    magics.session.cuda.start()
    print("s2o_cupy: %s2o, %%s2o_cuda and %%s2o_numba are here; %s2o alone says what they do")


def unload_ipython_extension(shell) -> None:
    """End the workers and take the magics away."""
    magics = shell.magics_manager.registry.pop("KernelMagics", None)
    if magics is not None:
        magics.session.close()
        for kind, known in magics.magics.items():
            for name in known:
                shell.magics_manager.magics[kind].pop(name, None)


def _split(line: str, magic: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise UsageError(f"{magic} {line}: {error}") from None


def _told(call):
    """The call's answer; an error that says what is wrong is told in its own words, without a traceback."""
    try:
        return call()
    except _Said as said:
        print(said, end="")
    except (ValueError, TypeError, ImportError, RuntimeError, OSError, SyntaxError) as error:
        told = "" if isinstance(error, (ValueError, TypeError, RuntimeError)) else f"{type(error).__name__}: "
        raise UsageError(f"{told}{error}") from None


def _parser(magic: str, name_help: str, limit: float) -> _Parser:
    parser = _Parser(prog=magic, description="Try the cell as a kernel: compiled, checked, timed. It is a whole "
                     "file, or functions that take the place of the file's own.", allow_abbrev=False)  # fmt: skip
    parser.add_argument("name", metavar="NAME", help=name_help)
    parser.add_argument("--check", action="store_true", help="the stage's cases against the float64 reference")
    parser.add_argument("--bench", action="store_true", help="time it in turn with what it is compared against")
    parser.add_argument("--against", default="shipped", choices=AGAINST, help="default: shipped")
    told = f"for one case ({limit:g}); three times that off the GPU"
    parser.add_argument("--limit", type=_seconds, default=limit, metavar="SECONDS", help=told)
    return parser


def _seconds(text: str) -> float:
    """A time limit from the command line."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text}; allowed: above 0, to 86400 seconds")
    return seconds


def _words(words, usage: str, count: int = 1) -> list[str]:
    if len(words) != count:
        raise UsageError(f"usage: %s2o {usage}")
    return words


def _no_more(words) -> None:
    if words:
        raise UsageError(f"unexpected: {' '.join(words)}")


def closure_of(name: str) -> list[str]:
    """A kernel's file and its headers."""
    return closure(f"{name}.cu", kernel_folder())


class Highlighted(Code):
    """Source with highlighting: in a notebook as IPython does it, in a terminal by colours."""

    def __repr__(self) -> str:
        if not sys.stdout.isatty():
            return self.data
        return highlight(self.data, get_lexer_by_name(self.language), TerminalFormatter())


def _code(text: str, file: str) -> Highlighted:
    language = {"cu": "cuda", "cuh": "cuda", "py": "python"}.get(file.rpartition(".")[2], "text")
    return Highlighted(data=text, language=language)


def _print_resources(title: str, kernels, used=()) -> None:
    """A specialisation, and a line for each of its kernels; `used`: what is known of their launches."""
    print(f"{'':13s}{title}")
    if isinstance(kernels, dict):  # as the compiler's cache keeps them: the last of the file first
        kernels = [{**x, "kernel": name, "local_bytes": x["stack_bytes"]} for name, x in reversed(kernels.items())]
    for x in kernels:
        local = f", {x['spill_bytes']} bytes spilled" if x.get("spill_bytes") else ""
        local = local or (f", {x['local_bytes']} bytes of local memory" if x["local_bytes"] else "")
        line = f"{x['kernel']}: {x['registers']} registers{local}, {x['shared_bytes']} bytes of static shared memory"
        launches = [one for one in used if one["kernel"] == x["kernel"]]
        for one in launches:
            line += f"; launched with {one['shared_bytes']} in all: {one['blocks']} blocks a multiprocessor, "
            line += f"occupancy {one['occupancy']:.2f}"
        print(f"{'':15s}{line}")


def _arch() -> str:
    return compiling.device_target() if has_gpu() else "sm_90a"


def _defined(macros: dict) -> str:
    return " ".join(f"-D {name}={value}" for name, value in macros.items())


def _program(name: str) -> str:
    """A CUDA tool: on the PATH, or from its wheel."""
    found = shutil.which(name)
    if found is None:
        from importlib.metadata import PackageNotFoundError, files

        try:
            inside = [f for f in files(f"nvidia-cuda-{name}") or () if f.name == name]
            found = str(inside[0].locate()) if inside else None
        except PackageNotFoundError:
            found = None
    if found is None:
        raise RuntimeError(f"{name} is not installed: pip install nvidia-cuda-{name}, or the CUDA toolkit")
    return found
