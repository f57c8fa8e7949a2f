"""Source to cubin: options, the cache of compiled kernels and the resource report.

`get_kernel` is the only caller of `cupy.RawModule`. `compile_report` compiles the same sources with the same
options through cuda.core, on machines without a GPU or a driver.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from s2o_cupy.sources import Source, current, kernel_folder
from s2o_cupy.specialisations import SHARED_LIMIT, Specialisation, shared_limit, shipped, target

STATIC_SHARED_BYTES = 48 * 1024
ARCHES = f"sm_({'|'.join(map(str, SHARED_LIMIT))})[af]?"
REPORT = 2  # what the cache keeps of a specialisation: another number where that changes


class KernelCompileError(RuntimeError):
    """A kernel did not compile; the message holds the compiler's, with the kernel's file and line."""


# --- runtime: RawModule ---------------------------------------------------------------------------
MORE_OPTIONS: tuple[str, ...] = ()  # for every kernel of this process: line numbers, when a sanitizer watches
_kernels: dict = {}
_locks: dict = {}  # one for each kernel: different ones compile at the same time


def options(arch: str, macros: dict) -> tuple[str, ...]:
    """NVRTC's options for one macro set."""
    defines = [f"-D{name}={value}" for name, value in sorted(macros.items())]
    return (f"-arch={arch}", "-std=c++17", f"-I{kernel_folder()}", *defines, *MORE_OPTIONS)


class Kernel:
    """A compiled kernel on one device."""

    def __init__(self, cupy, raw):
        self.raw, self._cupy = raw, cupy
        self.launched: dict[tuple[int, int], None] = {}  # threads of a block and its dynamic shared bytes

    def __getattr__(self, name):
        """Its resources, as CuPy knows them."""
        return getattr(self.raw, name)

    def usage(self, block: int, shared_mem: int) -> dict:
        """Registers, local and shared bytes of such a launch; how many blocks, and what share of its threads, a
        multiprocessor holds."""
        cuda = self._cupy.cuda
        blocks = cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(self.raw.kernel.ptr, block, shared_mem)
        most = cuda.runtime.getDeviceProperties(cuda.runtime.getDevice())["maxThreadsPerMultiProcessor"]
        return {
            "registers": self.raw.num_regs,
            "local_bytes": self.raw.local_size_bytes,
            "shared_bytes": self.raw.shared_size_bytes + shared_mem,
            "threads": block,
            "blocks": blocks,
            "occupancy": blocks * block / most,
        }

    def prepared(self, grid, block: int, arguments, shared_mem: int = 0):
        """A launch of it, past CuPy: called with a stream, the address of its arguments' addresses, and 0."""
        self.launched[block, shared_mem] = None
        x, y, z = (*grid, 1, 1)[:3]
        launch = self._cupy.cuda.driver.launchKernel
        return functools.partial(launch, self.raw.kernel.ptr, x, y, z, block, 1, 1, shared_mem)


def get_kernel(name: str, entry: str | None = None, source: Source | None = None, **macros) -> Kernel:
    """The kernel ``entry`` (default: ``name``) of ``kernels/NAME.cu`` as it is now, for the current CuPy device.

    Compiled once for each device, source and macro set; CuPy keeps the cubin on disk.
    """
    import cupy

    device, source = cupy.cuda.runtime.getDevice(), source or current(name)
    key = (device, name, entry or name, source, *sorted(macros.items()))
    kernel = _kernels.get(key)
    if kernel is None:
        with _locks.setdefault(key, threading.Lock()):
            kernel = _kernels.get(key) or _kernels.setdefault(key, _build(cupy, device, source, entry or name, macros))
    return kernel


def device_target(device: int | None = None) -> str:
    """The architecture of a CuPy device, the current one by default."""
    import cupy

    return _device_target(cupy.cuda.runtime.getDevice() if device is None else device)


@functools.cache
def _device_target(device: int) -> str:
    import cupy

    return target(int(cupy.cuda.Device(device).compute_capability))


def _build(cupy, device: int, source: Source, entry: str, macros: dict):
    arch, name = _device_target(device), source.name
    module = cupy.RawModule(code=source.text, options=options(arch, macros), backend="nvrtc")
    try:
        kernel = module.get_function(entry)
    except cupy.cuda.compiler.CompileException as error:
        raise KernelCompileError(f"kernels/{name}.cu {macros} for {arch}:\n{error}") from None
    if shared_limit(arch) > STATIC_SHARED_BYTES:
        kernel.max_dynamic_shared_size_bytes = shared_limit(arch) - kernel.shared_size_bytes
    return Kernel(cupy, kernel)


def kernel_resources() -> list[dict]:
    """Registers, local and shared bytes of every kernel built so far in this process, and of how it was launched."""
    return [
        {
            "kernel": f"{name}:{entry}",
            "device": device,
            "macros": dict(macros),
            "registers": kernel.num_regs,
            "local_bytes": kernel.local_size_bytes,
            "static_shared_bytes": kernel.shared_size_bytes,
            "max_threads": kernel.max_threads_per_block,
            "launches": [kernel.usage(*launch) for launch in kernel.launched],
        }
        for (device, name, entry, _, *macros), kernel in sorted(_kernels.items(), key=lambda item: str(item[0]))
    ]


# --- no GPU: cuda.core ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Row:
    """One kernel's resources on one architecture."""

    arch: str
    kernel: str
    macros: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    cubin_bytes: int
    cached: bool
    serialised: int = 0  # whether ptxas made its wgmma instructions wait for each other


@dataclass(frozen=True)
class Failure:
    """A specialisation that did not compile, whose wgmma is serialised, or that spilled although it promises not to."""

    arch: str
    kernel: str
    macros: str
    message: str


def compile_report(
    arches: Iterable[str] = ("sm_80", "sm_90a", "sm_100"),
    check: bool = False,
    progress: Callable[[str], None] | None = None,
) -> tuple[list[Row], list[Failure]]:
    """Compile every shipped specialisation for each architecture, without a GPU or a driver.

    With ``check``, register spills in a kernel that promises none are failures too, and wgmma instructions that the
    assembler serialises.
    """
    arches = list(arches)
    for arch in arches:
        if not re.fullmatch(ARCHES, arch):
            raise ValueError(
                f"arch is {arch!r}; allowed: sm_ and one of {', '.join(map(str, SHARED_LIMIT))}, as sm_90a"
            )
    _compiler_classes()  # imported here, not in every thread at once
    jobs = [(arch, spec) for arch in arches for spec in shipped(arch)]
    rows, failures = [], []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for (arch, spec), (found, cached, error) in zip(jobs, pool.map(_compiled, *zip(*jobs)), strict=True):
            macros = " ".join(f"{name}={value}" for name, value in spec.macros)
            if progress is not None:
                progress(f"{arch} {spec.name} {macros}")
            if error:
                failures.append(Failure(arch, spec.name, macros, error))
            for entry, numbers in found.items():
                row = Row(arch, entry, macros, **numbers, cached=cached)
                rows.append(row)
                if check and spec.no_spills and row.spill_bytes:
                    failures.append(Failure(arch, entry, macros, f"spills {row.spill_bytes} bytes"))
                if check and row.serialised:
                    failures.append(Failure(arch, entry, macros, "its wgmma instructions are serialised"))
    return rows, failures


def _compiled(arch: str, spec: Specialisation) -> tuple[dict, bool, str]:
    """Resources by kernel, whether they came from the cache, and the error if there was one."""
    try:
        return *resources(arch, spec), ""
    except KernelCompileError as error:
        return {}, False, str(error)


def cache_folder() -> Path:
    """Where `compile_report` keeps cubins and their numbers: ``$S2O_CACHE_DIR``, else under ``~/.cache``."""
    return Path(os.environ.get("S2O_CACHE_DIR") or Path.home() / ".cache" / "s2o_cupy")


def compile_cubin(arch: str, name: str, macros: dict, source: Source | None = None) -> tuple[bytes, str]:
    """One cubin and the assembler's report, through cuda.core."""
    Program, ProgramOptions = _compiler_classes()
    log = io.StringIO()
    try:
        program = Program(
            (source or current(name)).text,
            "c++",
            ProgramOptions(
                name=f"kernels/{name}.cu",
                arch=arch,
                std="c++17",
                ftz=True,
                device_as_default_execution_space=True,
                include_path=[str(kernel_folder())],
                define_macro=[(str(n), str(v)) for n, v in sorted(macros.items())],
                ptxas_options=["-v"],
            ),
        )
        code = program.compile("cubin", logs=log).code
    except Exception as error:  # cuda.core raises several kinds, with the log in the message
        raise KernelCompileError(f"kernels/{name}.cu for {arch}: {error}\n{log.getvalue()}") from None
    return bytes(code), log.getvalue()


def compile_ptx(arch: str, name: str, macros: dict, source: Source | None = None) -> str:
    """What a kernel compiles to before it is assembled; by NVRTC itself, since cuda.core asks a driver about PTX."""
    _compiler_classes()
    from cuda.bindings import nvrtc

    def call(function, *arguments):
        status, *answer = function(*arguments)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelCompileError(f"kernels/{name}.cu for {arch}: {status.name}")
        return answer[0] if answer else None

    text = (source or current(name)).text.encode()
    program = call(nvrtc.nvrtcCreateProgram, text, f"kernels/{name}.cu".encode(), 0, [], [])
    flags = [b"--ftz=true", b"-default-device", *(option.encode() for option in options(arch, macros))]
    try:
        call(nvrtc.nvrtcCompileProgram, program, len(flags), flags)
        code = bytearray(call(nvrtc.nvrtcGetPTXSize, program))
        call(nvrtc.nvrtcGetPTX, program, code)
    finally:
        call(nvrtc.nvrtcDestroyProgram, program)
    return code.rstrip(b"\0").decode()


def _compiler_classes():
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError:
        raise ImportError("compiling without a GPU needs cuda-core: pip install 'cuda-core[cu13]'") from None
    return Program, ProgramOptions


def known_resources(arch: str, spec: Specialisation) -> dict | None:
    """What the cache knows of a specialisation, by kernel; None where it was not compiled as it is now."""
    path = _kept_at(arch, spec)
    return json.loads(path.read_text()) if path.is_file() else None


def _kept_at(arch: str, spec: Specialisation) -> Path:
    key = hashlib.sha256(
        json.dumps([REPORT, arch, spec.name, spec.macros, current(spec.name).text, _compiler()]).encode()
    ).hexdigest()
    return cache_folder() / f"{key[:32]}.json"


def resources(arch: str, spec: Specialisation) -> tuple[dict, bool]:
    """Registers, spills, stack, static shared and cubin bytes by kernel, and whether they were in the cache."""
    known, path = known_resources(arch, spec), _kept_at(arch, spec)
    if known is not None:
        return known, True
    cubin, log = compile_cubin(arch, spec.name, dict(spec.macros))
    found = parse_report(log)
    for numbers in found.values():
        numbers["cubin_bytes"] = len(cubin)
    path.parent.mkdir(parents=True, exist_ok=True)
    for target_path, data in ((path.with_suffix(".cubin"), cubin), (path, json.dumps(found).encode())):
        scratch = target_path.with_name(f"{target_path.name}.{os.getpid()}")
        scratch.write_bytes(data)
        scratch.replace(target_path)
    return found, False


def parse_report(log: str) -> dict[str, dict[str, int]]:
    """Kernel name to registers, spills, stack and static shared bytes, and serialised wgmma, from ``ptxas -v``."""
    found, serialised = {}, set(re.findall(r"wgmma\.mma_async instructions are serialized .* function '(\w+)'", log))
    for block in re.split(r"Compiling entry function '", log)[1:]:
        name = block.split("'")[0]

        def number(pattern, block=block):
            match = re.search(pattern, block)
            return int(match[1]) if match else 0

        found[name] = {
            "registers": number(r"Used (\d+) registers"),
            "spill_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            "stack_bytes": number(r"(\d+) bytes stack frame"),
            "shared_bytes": number(r"(\d+) bytes smem"),
            "serialised": int(name in serialised),
        }
    return found


@functools.cache
def _compiler() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("nvidia-cuda-nvrtc")
    except PackageNotFoundError:
        return "unknown"
