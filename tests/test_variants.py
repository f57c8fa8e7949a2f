"""Kernel sources that change: read again when saved, replaced by variants, refused where they cannot be one."""

import re
import shutil
import time

import numpy as np
import pytest

import s2o_cupy as s2o
from s2o_cupy import sources, variants
from s2o_cupy.sources import Source, current, kernel_folder, kernel_names
from s2o_cupy.specialisations import launch_macros
from s2o_cupy.twins import TWINS, twin
from s2o_cupy.variants import definitions, entries, make_variant, only, parameters

POOL = (kernel_folder() / "pool.cu").read_text()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of kernels/, named by S2O_KERNELS."""
    copy = tmp_path / "kernels"
    shutil.copytree(kernel_folder(), copy)
    monkeypatch.setenv("S2O_KERNELS", str(copy))
    return copy


def save(path, text):
    """As an editor does: a new file over the old one, later than the last look."""
    time.sleep(2 * sources._SECONDS)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text)
    scratch.replace(path)


# --- live reload ------------------------------------------------------------------------------
def test_a_saved_file_is_read_at_the_next_call(folder):
    before = current("pool")
    assert current("pool") is before
    save(folder / "pool.cu", POOL.replace("total / (sum_t)count", "total / (sum_t)(count + 1)"))
    after = current("pool")
    assert after != before
    assert "(sum_t)(count + 1)" in after.text
    save(folder / "pool.cu", POOL)
    assert current("pool") == before


def test_a_saved_header_changes_the_kernels_that_include_it_and_no_other(folder):
    names = kernel_names()
    before = {name: current(name) for name in names}
    header = folder / "mma.cuh"  # included by gather.cuh, which kernels include
    save(header, header.read_text() + "\n// changed\n")
    changed = {name for name in names if current(name) != before[name]}
    including = {name for name in names if "mma.cuh" in variants.closure(f"{name}.cu", folder)}
    assert changed == including
    assert {"attend", "moments", "score"} <= changed
    assert "pool" not in changed


def test_a_folder_without_kernels_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("S2O_KERNELS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"S2O_KERNELS is '.*', without an attend\.cu; allowed: a copy of"):
        current("pool")


def test_another_folder_is_another_version_and_so_is_the_first_one_later(folder, monkeypatch):
    """What is recorded between the change and the look that sees it is never found again."""
    sources.look()
    first = sources.version()
    assert sources.version() == first
    monkeypatch.delenv("S2O_KERNELS")
    assert sources.version() == first  # not looked at yet
    current("pool")
    second = sources.version()
    monkeypatch.setenv("S2O_KERNELS", str(folder))
    assert sources.version() == second
    time.sleep(2 * sources._SECONDS)
    assert len({first, second, sources.version()}) == 3


@pytest.mark.parametrize("name", kernel_names())
def test_lines_of_inlined_headers_keep_their_file_and_number(name):
    folder, file, number, seen = kernel_folder(), None, 0, set()
    for line in current(name).text.split("\n"):
        mark = re.match(r'#line (\d+) "kernels/(.+)"', line)
        if mark:
            number, file = int(mark[1]) - 1, mark[2]
            continue
        number += 1
        wanted = (folder / file).read_text().split("\n")
        if line and not line.startswith(("#ifndef S2O_HAS", "#define S2O_HAS", "#endif")):
            assert wanted[number - 1] == line, (file, number)
            seen.add(file)
    assert seen == set(variants.closure(f"{name}.cu", folder))


# --- twins ------------------------------------------------------------------------------------
def test_a_saved_twin_is_made_again_at_the_next_call(folder):
    before = twin("pool")
    assert twin("pool") is before
    text = (folder / "pool_numba.py").read_text()
    save(folder / "pool_numba.py", text + "\nMINE = 1\n")
    assert twin("pool").MINE == 1
    assert twin("pool").pool_kernel is not before.pool_kernel


def test_a_saved_twin_changes_those_that_import_it_and_no_other(folder):
    before = {name: twin(name) for name in TWINS}
    text = (folder / "copy_numba.py").read_text()
    assert "IN_FLIGHT = 8" in text
    save(folder / "copy_numba.py", text.replace("IN_FLIGHT = 8", "IN_FLIGHT = 4"))
    assert twin("attend").IN_FLIGHT == 4
    importing = {name for name in TWINS if "copy_numba import" in (folder / f"{name}_numba.py").read_text()}
    assert {name for name in TWINS if twin(name) is not before[name]} == importing == {"attend"}


def test_a_twin_that_lacks_its_kernel_is_told(folder):
    save(folder / "pool_numba.py", "from numba import cuda\n")
    with pytest.raises(ValueError, match=r"pool_numba\.py defines no pool_kernel"):
        twin("pool")
    save(folder / "pool_numba.py", "def pool_kernel(:\n")
    with pytest.raises(SyntaxError, match=r"pool_numba\.py, line 1"):
        twin("pool")


def test_a_variant_of_a_twin_stands_in_its_place(folder):
    before, text = twin("pool"), (folder / "pool_numba.py").read_text()
    with s2o.use_kernel("pool_numba", text.replace("real(0)", "real(1)")) as made:
        assert twin("pool") is not before
        assert "real(1)" in made.text
        with pytest.raises(ValueError, match="source is a variant of 'pool_numba' and stage is 'pool'"):
            s2o.use_kernel("pool", made).__enter__()
    assert twin("pool") is before
    with pytest.raises(ValueError, match=r"pool_numba is a Numba twin, which has no macros; given: UNROLL"):
        s2o.use_kernel("pool_numba", text, UNROLL=4).__enter__()


def test_a_patch_of_a_twin_takes_its_arguments(folder):
    with pytest.raises(ValueError, match=r"exact_code takes 1 arguments; remap_numba\.py calls it with 2: x, pattern"):
        make_variant("remap_numba", "@cuda.jit(device=True)\ndef exact_code(x):\n    return 0\n")


# --- variants ---------------------------------------------------------------------------------
def test_functions_and_kernels_are_found():
    assert [d.name for d in definitions(POOL)] == ["to_sum", "from_sum", "to_sum", "from_sum", "pool"]
    assert set(entries(current("pool").text)) == {"pool", "running_sums", "lifts"}
    assert {"moments", "score"} < set(entries(current("score_simt").text))
    assert {"score_full", "score_1", "normalise"} <= set(entries(current("score").text))
    by_width = [set(entries(current("score_sm90").text, {"WIDEST": widest})) for widest in (128, 256)]
    assert by_width[0] & by_width[1] == {"tile_keys"}
    assert "score_16_128" in by_width[0]
    assert "score_16_256" in by_width[1]
    assert parameters(POOL, "pool")[:5] == ["element_t*", "long long", "long long", "long long", "element_t*"]
    text = (
        '// f(int) {\n"g() {"; struct S { int m() { return 1; } };\ntemplate <int N> int h(int a[N]) { return {}; }\n'
    )
    assert [(d.name, d.line, d.kernel) for d in definitions(text)] == [("h", 3, False)]


def test_a_patch_takes_the_place_of_its_function():
    cell = (
        "\n// mine\n__device__ int twice(int x) { return 2 * x; }\n\n__device__ int scan_block(int x, int* totals) {\n"
    )
    made = make_variant("remap", cell + "    return twice(x);\n}\n")
    assert made.file == "remap.cu"
    assert "return twice(x);" in made.text
    assert made.text.count("int scan_block(") == 1
    assert "#line" not in made.text
    text = made.source.text.split("\n")
    start = text.index('#line 2 "cell"')
    assert text[start + 1] == "// mine"
    after = text[next(i for i in range(start + 1, len(text)) if text[i].startswith("#line")) :]
    number = int(after[0].split()[1])
    assert after[1] == (kernel_folder() / "remap.cu").read_text().split("\n")[number - 1][len("}") :]


def test_a_patch_may_be_of_a_header():
    header = (kernel_folder() / "half.cuh").read_text()
    cell = next(
        header[d.start : d.stop] for d in definitions(header) if sum(o.name == d.name for o in definitions(header)) == 1
    )
    made = make_variant("pool", cell.replace("{", "{ /* mine */", 1))
    assert made.file == "half.cuh"
    assert "/* mine */" in made.source.text
    assert make_variant("pool", cell).text == header


def test_a_whole_file_is_taken_as_it_is():
    made = make_variant("pool", POOL, {"IS_BF16": 0})
    assert made.text == POOL
    assert made.source.macros == (("IS_BF16", 0),)
    assert made.source.text.startswith('#line 1 "cell"')


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("", "the cell is no whole pool.cu and patches nothing: it defines no function"),
        ("__device__ int f() { return 1; }", "patches nothing: f is no function of pool.cu or its headers"),
        ("#include <x>\nint f() { return 1; }", "reads as a whole pool.cu and lacks the kernel pool"),
        ("__device__ float to_sum(int x) { return x; }", r"to_sum is defined more than once \(pool.cu line \d+, pool"),
        (POOL.replace("int blocks, ", ""), "pool takes 16 parameters; the launcher gives it 17: element_t"),
        (POOL.replace("int blocks, ", "float blocks, "), "parameter 15 of pool is float; the launcher gives it int"),
        (POOL.replace('extern "C" ', ""), "lacks the kernel pool"),
    ],
)
def test_what_cannot_be_a_variant_is_refused(cell, message):
    with pytest.raises(ValueError, match=message):
        make_variant("pool", cell)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel is 'frob'; allowed: attend, attend_simt, "):
        make_variant("frob", POOL)


def fails_inside():
    with s2o.use_kernel("remap", made_remap()):
        raise ZeroDivisionError


@pytest.mark.parametrize("name", kernel_names())
def test_one_kernel_of_a_source_stands_alone_on_its_lines(name):
    text = current(name).text
    for entry in entries(text):
        alone = only(text, entry)
        assert entries(alone) == [entry]
        assert alone.count("\n") == text.count("\n")
        assert parameters(alone, entry) == parameters(text, entry)


# --- use_kernel -------------------------------------------------------------------------------
def test_use_kernel_is_undone(tmp_path):
    before = current("pool")
    path = tmp_path / "pool.cu"
    path.write_text(POOL + "// a variant\n")
    with s2o.use_kernel("pool", path) as made, s2o.use_kernel("remap", made_remap()):
        assert current("pool") is made.source
        assert "a variant" in current("remap").text
        with s2o.use_kernel("pool", made, IS_BF16=1):
            assert current("pool").macros == (("IS_BF16", 1),)
        assert current("pool") is made.source
    assert current("pool") == before
    with pytest.raises(ZeroDivisionError):
        fails_inside()
    assert "a variant" not in current("remap").text


def made_remap():
    return make_variant("remap", (kernel_folder() / "remap.cu").read_text() + "// a variant\n")


X = np.ones((2, 300, 16), np.float32)


@pytest.mark.parametrize("name", ["pool", "pool_numba"])
def test_a_call_on_the_cpu_backend_says_that_a_variant_changes_nothing(name):
    suffix = "py" if name.endswith("numba") else "cu"
    text = (kernel_folder() / f"{name}.{suffix}").read_text()
    for call in (s2o.attention, s2o.dense_attention):
        with (
            s2o.use_kernel(name, text),
            pytest.warns(UserWarning, match=rf"use_kernel\('{name}', ...\) changes nothing here: backend 'cpu'") as w,
        ):
            call(X, X, X)
        assert [one.filename for one in w] == [__file__]


def test_a_variant_that_no_call_launches_is_told():
    made = make_variant("remap", (kernel_folder() / "remap.cu").read_text() + "// launched by no other test\n")
    told = r"use_kernel\('remap', ...\) changed nothing: other kernels serve .* so short that they are dense"
    with pytest.warns(UserWarning, match=told), s2o.use_kernel("remap", made):
        sources.called_on("cuda")
    with s2o.use_kernel("remap", made):
        sources.called_on("cuda")
        current("remap")
    with s2o.use_kernel("remap", made):  # launched before: what was recorded then is launched again
        sources.called_on("cuda")


def test_use_kernel_refuses_by_name():
    with pytest.raises(TypeError, match="source is a int; allowed: source text, a path to it, or a verdict's variant"):
        s2o.use_kernel("pool", 3).__enter__()
    with pytest.raises(ValueError, match="source is a variant of 'remap' and stage is 'pool'"):
        s2o.use_kernel("pool", made_remap()).__enter__()


def test_macros_of_a_variant():
    source = Source("attend", "", (("HEAD_DIM", 64), ("UNROLL", 4)))
    assert source.applied({"HEAD_DIM": 64, "BLOCK_N": 64}) == {"HEAD_DIM": 64, "BLOCK_N": 64, "UNROLL": 4}
    with pytest.raises(ValueError, match="the variant of attend fixes HEAD_DIM=64; this call needs 128"):
        source.applied({"HEAD_DIM": 128})
    assert make_variant("pool", POOL, {"HEAD_DIM": "64", "WIDE": True}).source.macros == (("HEAD_DIM", 64), ("WIDE", 1))


def test_a_step_of_more_keys_than_a_tile_is_refused():
    whole = (kernel_folder() / "attend_sm90.cu").read_text()
    wide = make_variant("attend_sm90", whole, {"BLOCK_N": 128}).source
    needed = launch_macros("attend_sm90", "float16", 128, 128, 64, "sm_90a")
    if needed["BLOCK_N"] < 128:
        with pytest.raises(
            ValueError, match=r"fixes BLOCK_N=128; this call's key tiles \(block_k\) and head dims allow at"
        ):
            wide.applied(needed)
    assert wide.applied(needed | {"BLOCK_N": 128})["BLOCK_N"] == 128
    narrow = make_variant("attend_sm90", whole, {"BLOCK_N": 64}).source
    assert narrow.applied(needed | {"BLOCK_N": 128})["BLOCK_N"] == 64


def test_a_path_given_as_text_is_told():
    with pytest.raises(
        ValueError, match=r"source is 'x/pool\.cu', which is no source text; for a file give pathlib\.Path"
    ):
        s2o.use_kernel("pool", "x/pool.cu").__enter__()
