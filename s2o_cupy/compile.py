"""Source to cubin: macros, the kernels' hash, architectures, the cache of compiled kernels and the resource report.

`get_kernel` is the only caller of `cupy.RawModule`. `compile_report` compiles the same sources with the same
options through cuda.core, on machines without a GPU or a driver.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import io
import json
import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

MIN_CAPABILITY = 80
STATIC_SHARED_BYTES = 48 * 1024
DTYPE_MACROS = {
    "float16": {"IS_BF16": 0},
    "bfloat16": {"IS_BF16": 1},
    "float32": {"REAL": "float"},
    "float64": {"REAL": "double"},
}
HEAD_DIMS = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256))
SHARED_LIMIT = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}


class KernelCompileError(RuntimeError):
    """A kernel did not compile; the message holds the compiler's, with the kernel's file and line."""


def kernel_folder() -> Path:
    """The folder of `.cu` and `.cuh` files: beside the package in a checkout, inside it when installed."""
    inside = Path(str(importlib.resources.files("s2o_cupy"))) / "kernels"
    folder = inside if inside.is_dir() else inside.parent.parent / "kernels"
    if not (folder / "attend.cu").is_file():
        raise FileNotFoundError(f"no CUDA sources in {inside} or {folder}")
    return folder


@functools.cache
def kernels_hash() -> str:
    """A hash of every source and header: CuPy's own cache key ignores included files."""
    digest = hashlib.sha256()
    for path in sorted(kernel_folder().glob("*.cu*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def kernel_source(name: str) -> str:
    """The text of ``kernels/NAME.cu``, so numbered that an error names that file and line."""
    return f'#line 1 "kernels/{name}.cu"\n' + (kernel_folder() / f"{name}.cu").read_text()


def target(capability: int) -> str:
    """The architecture a device of compute capability ``capability`` (90 for 9.0) compiles for."""
    if capability < MIN_CAPABILITY:
        raise RuntimeError(
            f"the GPU has compute capability {capability / 10:.1f}; the CUDA backend supports 8.0 and above "
            '(backend="numba" serves older GPUs)'
        )
    return "sm_90a" if capability == 90 else f"sm_{capability}"


def shared_limit(arch: str) -> int:
    """Bytes of shared memory that one block may use on ``arch``."""
    return SHARED_LIMIT.get(int(re.sub(r"\D", "", arch)), 99) * 1024


# --- macro sets: one place, so that what is shipped and what is launched are the same -----------
def attend_macros(dtype: str, dim_qk: int, dim_v: int, block_q: int, arch: str) -> dict:
    """Macros of the `mma.sync` attend kernel that serves these head dims and a row tile of ``block_q``."""
    head_dim, head_dim_v = next(p for p in HEAD_DIMS if dim_qk <= p[0] and dim_v <= p[1])
    block_m = 64 if block_q <= 64 else 128
    for block_n in (64, 32):
        macros = DTYPE_MACROS[dtype] | {
            "HEAD_DIM": head_dim,
            "HEAD_DIM_V": head_dim_v,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
        }
        if attend_shared_bytes(macros) <= shared_limit(arch):
            return macros
    raise ValueError(
        f"head dims ({dim_qk}, {dim_v}) with block_q {block_q} need {attend_shared_bytes(macros)} bytes of shared "
        f"memory; {arch} allows {shared_limit(arch)}: use block_q=64 or less"
    )


def attend_threads(macros: dict) -> int:
    """Threads of a block of the attend kernel: warps of 32 rows while the accumulators fit, else of 16."""
    rows = 32 if macros["BLOCK_M"] == 128 and macros["HEAD_DIM_V"] <= 128 else 16
    return macros["BLOCK_M"] // rows * 32


def attend_shared_bytes(macros: dict, pool_blocks: int = 0) -> int:
    """Dynamic shared memory of the attend kernel, with counters for ``pool_blocks``; attend.cu's own layout."""
    m, n = macros["BLOCK_M"], macros["BLOCK_N"]
    tiles = 2 * (m * macros["HEAD_DIM"] + 2 * n * (macros["HEAD_DIM"] + macros["HEAD_DIM_V"]))
    rows = m * (4 + 4 + 4 + 8) + n * 4 * (4 + 1)
    return tiles + rows + 4 * pool_blocks + 64


def simt_macros(dtype: str, dim_v: int) -> dict:
    """Macros of the plain multiply-add attend kernel, for float32 and float64."""
    return DTYPE_MACROS[dtype] | {"HEAD_DIM_V": 128 if dim_v <= 128 else 256}


def simt_shared_bytes(macros: dict, pool_blocks: int = 0) -> int:
    """Dynamic shared memory of attend_simt.cu: a block of 128 rows by 32 keys."""
    size = 4 if macros["REAL"] == "float" else 8
    staged = max((128 + 32) * 33, 32 * macros["HEAD_DIM_V"])
    return size * (staged + 128 * 33 + 32) + 4 * (128 + 128 + 32) + 4 * pool_blocks


def rank_width(dim: int) -> int:
    """Columns that stage 1's tensor-core kernels pad a head dim to."""
    return next(width for width in (64, 128, 256) if dim <= width)


def moments_macros(dtype: str, dim: int) -> dict:
    """Macros of moments.cu."""
    return DTYPE_MACROS[dtype] | {"WIDTH": rank_width(dim)}


def score_macros(dtype: str, dim: int, arch: str) -> dict:
    """Macros of score.cu: as many warps as its shared memory allows."""
    width = rank_width(dim)
    warps = 8 if width <= 128 else 4 if shared_limit(arch) > 140_000 else 2
    return DTYPE_MACROS[dtype] | {"WIDTH": width, "WARPS": warps}


def score_shared_bytes(macros: dict) -> int:
    """Dynamic shared memory of score.cu: its keys, and two chunks of 64 rows."""
    return (macros["WARPS"] * 32 + 128) * macros["WIDTH"] * 2


def remap_macros(dtype: str) -> dict:
    """Macros of remap.cu: scores of 16-bit inputs are kept in half precision."""
    return {"SCORE_HALF": int(dtype in ("float16", "bfloat16"))}


@dataclass(frozen=True)
class Specialisation:
    """One kernel file under one macro set, as shipped."""

    name: str
    macros: tuple[tuple[str, object], ...]
    no_spills: bool = True


def shipped(arch: str) -> list[Specialisation]:
    """Every specialisation that the defaults of the CUDA backend launch on ``arch``, at most 40."""
    found: dict[Specialisation, None] = {}

    def add(name, macros, no_spills=True):
        found[Specialisation(name, tuple(sorted(macros.items())), no_spills)] = None

    for dtype in ("float16", "bfloat16"):
        for dim, dim_v in HEAD_DIMS:
            rows = largest_block_q(dtype, dim, dim_v, arch)
            full = rows == 128 and 96 <= dim_v <= 128  # 32 rows a warp: registers are full, a few values spill
            add("attend", attend_macros(dtype, dim, dim_v, rows, arch), no_spills=not full)
            add("moments", moments_macros(dtype, dim))
            add("score", score_macros(dtype, dim, arch))
    for dtype in ("float32", "float64"):
        add("score_simt", DTYPE_MACROS[dtype])
        for dim_v in (128, 256):
            add("attend_simt", simt_macros(dtype, dim_v), no_spills=False)
    for dtype in DTYPE_MACROS:
        add("pool", DTYPE_MACROS[dtype])
        add("factor", DTYPE_MACROS[dtype])
        add("remap", remap_macros(dtype))
    return list(found)


def largest_block_q(dtype: str, dim: int, dim_v: int, arch: str) -> int:
    """The largest row tile that the attend kernel of these head dims can hold on ``arch``."""
    try:
        attend_macros(dtype, dim, dim_v, 128, arch)
        return 128
    except ValueError:
        return 64


# --- runtime: RawModule ---------------------------------------------------------------------------
_kernels: dict = {}
_lock = threading.Lock()


def options(arch: str, macros: dict) -> tuple[str, ...]:
    """NVRTC's options for one macro set."""
    defines = [f"-D{name}={value}" for name, value in sorted(macros.items())]
    return (f"-arch={arch}", "-std=c++17", f"-I{kernel_folder()}", f"-DS2O_HASH=0x{kernels_hash()}", *defines)


def get_kernel(name: str, entry: str | None = None, **macros):
    """The kernel ``entry`` (default: ``name``) of ``kernels/NAME.cu`` for the current CuPy device.

    Compiled once for each device and macro set; CuPy keeps the cubin on disk.
    """
    import cupy

    device = cupy.cuda.runtime.getDevice()
    key = (device, name, entry or name, *sorted(macros.items()))
    kernel = _kernels.get(key)
    if kernel is None:
        with _lock:
            kernel = _kernels.get(key) or _kernels.setdefault(key, _build(cupy, device, name, entry or name, macros))
    return kernel


def device_target(device: int | None = None) -> str:
    """The architecture of a CuPy device, the current one by default."""
    import cupy

    return _device_target(cupy.cuda.runtime.getDevice() if device is None else device)


@functools.cache
def _device_target(device: int) -> str:
    import cupy

    return target(int(cupy.cuda.Device(device).compute_capability))


def _build(cupy, device: int, name: str, entry: str, macros: dict):
    arch = _device_target(device)
    module = cupy.RawModule(code=kernel_source(name), options=options(arch, macros), backend="nvrtc")
    try:
        kernel = module.get_function(entry)
    except cupy.cuda.compiler.CompileException as error:
        raise KernelCompileError(f"kernels/{name}.cu {macros} for {arch}:\n{error}") from None
    if shared_limit(arch) > STATIC_SHARED_BYTES:
        kernel.max_dynamic_shared_size_bytes = shared_limit(arch) - kernel.shared_size_bytes
    return kernel


def kernel_resources() -> list[dict]:
    """Registers, local and shared bytes of every kernel built so far in this process."""
    return [
        {
            "kernel": f"{name}:{entry}",
            "device": device,
            "macros": dict(macros),
            "registers": kernel.num_regs,
            "local_bytes": kernel.local_size_bytes,
            "static_shared_bytes": kernel.shared_size_bytes,
            "max_threads": kernel.max_threads_per_block,
        }
        for (device, name, entry, *macros), kernel in sorted(_kernels.items(), key=lambda item: str(item[0]))
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


@dataclass(frozen=True)
class Failure:
    """A specialisation that did not compile, or spilled although it promises not to."""

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

    With ``check``, register spills in a kernel that promises none are failures too.
    """
    rows, failures = [], []
    for arch in arches:
        for spec in shipped(arch):
            macros = " ".join(f"{name}={value}" for name, value in spec.macros)
            try:
                found, cached = _resources(arch, spec)
            except KernelCompileError as error:
                failures.append(Failure(arch, spec.name, macros, str(error)))
                continue
            finally:
                if progress is not None:
                    progress(f"{arch} {spec.name} {macros}")
            for entry, numbers in found.items():
                row = Row(arch, entry, macros, **numbers, cached=cached)
                rows.append(row)
                if check and spec.no_spills and row.spill_bytes:
                    failures.append(Failure(arch, entry, macros, f"spills {row.spill_bytes} bytes"))
    return rows, failures


def cache_folder() -> Path:
    """Where `compile_report` keeps cubins and their numbers: ``$S2O_CACHE_DIR``, else under ``~/.cache``."""
    return Path(os.environ.get("S2O_CACHE_DIR") or Path.home() / ".cache" / "s2o_cupy")


def compile_cubin(arch: str, name: str, macros: dict) -> tuple[bytes, str]:
    """One cubin and the assembler's report, through cuda.core."""
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError:
        raise ImportError("compiling without a GPU needs cuda-core: pip install 's2o-cupy[compile]'") from None
    log = io.StringIO()
    try:
        program = Program(
            kernel_source(name),
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
        cubin = program.compile("cubin", logs=log).code
    except Exception as error:  # cuda.core raises several kinds, with the log in the message
        raise KernelCompileError(f"kernels/{name}.cu for {arch}: {error}\n{log.getvalue()}") from None
    return bytes(cubin), log.getvalue()


def _resources(arch: str, spec: Specialisation) -> tuple[dict, bool]:
    key = hashlib.sha256(json.dumps([arch, spec.name, spec.macros, kernels_hash(), _compiler()]).encode()).hexdigest()
    path = cache_folder() / f"{key[:32]}.json"
    if path.is_file():
        return json.loads(path.read_text()), True
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
    """Kernel name to registers, spills, stack and static shared bytes, from what ``ptxas -v`` prints."""
    found = {}
    for block in re.split(r"Compiling entry function '", log)[1:]:

        def number(pattern, block=block):
            match = re.search(pattern, block)
            return int(match[1]) if match else 0

        found[block.split("'")[0]] = {
            "registers": number(r"Used (\d+) registers"),
            "spill_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            "stack_bytes": number(r"(\d+) bytes stack frame"),
            "shared_bytes": number(r"(\d+) bytes smem"),
        }
    return found


@functools.cache
def _compiler() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("nvidia-cuda-nvrtc")
    except PackageNotFoundError:
        return "unknown"
