"""Files of arrays: what is read, mapped, refused, and that no half-written file is ever left."""

import os
import pickle
import resource
import zipfile

import ml_dtypes
import numpy as np
import pytest

from s2o_cupy.files import load_array, load_arrays, save_arrays

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_round_trip(tmp_path, dtype):
    save_arrays(tmp_path / "x.npz", q=X.astype(dtype), empty=np.zeros((0, 4), dtype), one=np.array(3, dtype))
    read = load_arrays(tmp_path / "x.npz", ("q", "empty", "one"))
    assert {name: x.dtype for name, x in read.items()} == dict.fromkeys(("q", "empty", "one"), np.dtype(dtype))
    np.testing.assert_array_equal(read["q"].astype(np.float32), X)
    assert read["empty"].shape == (0, 4)
    assert read["one"] == 3


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_npy_round_trip(tmp_path, dtype):
    np.save(tmp_path / "x.npy", X.astype(dtype))
    read = load_array(tmp_path / "x.npy")
    assert isinstance(read, np.memmap)
    assert read.dtype == dtype
    np.testing.assert_array_equal(read.astype(np.float32), X)


def test_stored_members_are_mapped_and_compressed_ones_read(tmp_path):
    np.savez(tmp_path / "plain.npz", a=np.zeros(7), x=X)
    np.savez_compressed(tmp_path / "small.npz", a=np.zeros(7), x=X)
    plain, small = (load_arrays(tmp_path / f"{name}.npz", ("x",))["x"] for name in ("plain", "small"))
    assert isinstance(plain, np.memmap)
    assert not isinstance(small, np.memmap)
    for x in (plain, small):
        np.testing.assert_array_equal(x, X)


def test_fortran_order(tmp_path):
    x = np.asfortranarray(X)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", x=x)
        np.testing.assert_array_equal(load_arrays(tmp_path / "x.npz", ("x",))["x"], X)


def test_mapped_arrays_are_read_only(tmp_path):
    np.savez(tmp_path / "x.npz", x=X)
    x = load_arrays(tmp_path / "x.npz", ("x",))["x"]
    with pytest.raises(ValueError, match="read-only"):
        x[0] = 1


def test_optional_arrays(tmp_path):
    np.savez(tmp_path / "x.npz", x=X)
    assert list(load_arrays(tmp_path / "x.npz", ("x",), optional=("y",))) == ["x"]
    np.savez(tmp_path / "x.npz", x=X, y=X)
    assert list(load_arrays(tmp_path / "x.npz", ("x",), optional=("y",))) == ["x", "y"]


# --- refused ---------------------------------------------------------------------------------
class Bomb:
    """Unpickling it would raise."""

    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_pickles_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.array([Bomb()], object))
    with pytest.raises(ValueError, match=r"x\.npz': x\.npy is a pickle of Python objects; allowed: arrays of numbers"):
        load_arrays(tmp_path / "x.npz", ("x",))
    np.save(tmp_path / "x.npy", np.array([Bomb()], object))
    with pytest.raises(ValueError, match=r"x\.npy' is not an npy file of numbers"):
        load_array(tmp_path / "x.npy")
    (tmp_path / "p.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"p\.npz' is not an npz file"):
        load_arrays(tmp_path / "p.npz", ("x",))
    with pytest.raises(ValueError, match=r"p\.npz' is not an npy file of numbers"):
        load_array(tmp_path / "p.npz")


def test_missing_array_is_named_with_what_is_there(tmp_path):
    np.savez(tmp_path / "x.npz", q=X, k=X)
    with pytest.raises(ValueError, match=r"x\.npz' has no array 'v'; it holds k, q"):
        load_arrays(tmp_path / "x.npz", ("q", "k", "v"))


@pytest.mark.parametrize(("load", "kind"), [(lambda p: load_arrays(p, ("x",)), "npz"), (load_array, "npy")])
def test_a_directory_or_nothing(tmp_path, load, kind):
    with pytest.raises(IsADirectoryError, match=f"is a directory; allowed: an {kind} file"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut"])
def test_garbage(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=r"x' is not an npz file"):
        load_arrays(tmp_path / "x", ("x",))
    with pytest.raises(ValueError, match=r"x' is not an npy file"):
        load_array(tmp_path / "x")


def test_one_kind_for_the_other(tmp_path):
    np.save(tmp_path / "x.npy", X)
    np.savez(tmp_path / "x.npz", x=X)
    with pytest.raises(ValueError, match=r"x\.npy' is not an npz file"):
        load_arrays(tmp_path / "x.npy", ("x",))
    with pytest.raises(ValueError, match=r"x\.npz' is not an npy file"):
        load_array(tmp_path / "x.npz")


def test_a_member_that_is_no_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", "text")
        archive.writestr("y", "text")
    with pytest.raises(ValueError, match=r"x\.npz': x\.npy is not an array"):
        load_arrays(tmp_path / "x.npz", ("x",))
    with pytest.raises(ValueError, match=r"x\.npz' has no array 'y'"):
        load_arrays(tmp_path / "x.npz", ("y",))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_member(tmp_path, save):
    path = tmp_path / "x.npz"
    save(path, x=np.random.default_rng(0).standard_normal(1000))
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + whole[-200:])
    with pytest.raises(ValueError, match=r"x\.npz'"):
        load_arrays(path, ("x",))


# --- written whole or not at all -------------------------------------------------------------
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    save_arrays(tmp_path / "x.npz", x=X)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            save_arrays(tmp_path / "x.npz", x=np.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]
    np.testing.assert_array_equal(load_arrays(tmp_path / "x.npz", ("x",))["x"], X)


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_arrays(tmp_path / "x.npz", x=X)
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a directory; allowed: a file to write"):
        save_arrays(tmp_path, x=X)
    with pytest.raises(FileNotFoundError, match=r"folder '.*nowhere' does not exist"):
        save_arrays(tmp_path / "nowhere" / "x.npz", x=X)


def test_a_device_or_a_pipe_is_neither_replaced_nor_read(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="pipe' is no regular file; allowed: a file to write"):
        save_arrays(pipe, x=X)
    with pytest.raises(ValueError, match="pipe' is no regular file; allowed: an npz file"):
        load_arrays(pipe, ("x",))
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.npz").symlink_to(tmp_path / "folder" / "x.npz")
    for _ in range(2):
        save_arrays(tmp_path / "link.npz", x=X)
        assert (tmp_path / "link.npz").is_symlink()
        np.testing.assert_array_equal(load_arrays(tmp_path / "folder" / "x.npz", ("x",))["x"], X)
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["x.npz"]


def test_an_npy_version_that_is_not_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive, archive.open("x.npy", "w") as file:
        np.lib.format.write_array(file, X, version=(3, 0))
    with pytest.raises(ValueError, match=r"x\.npy is not an array: npy format \(3, 0\); supported: \(1, 0\), \(2, 0\)"):
        load_arrays(tmp_path / "x.npz", ("x",))


def test_written_files_have_ordinary_permissions(tmp_path):
    save_arrays(tmp_path / "x.npz", x=X)
    (tmp_path / "y").touch()
    assert (tmp_path / "x.npz").stat().st_mode == (tmp_path / "y").stat().st_mode
