"""The package as its users meet it: names, examples, samples, what importing it costs, and Settings."""

import ast
import dataclasses
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from strategies import all_settings

import s2o_cupy as s2o
from s2o_cupy import Settings

ROOT = Path(s2o.__file__).parent


# --- names -----------------------------------------------------------------------------------
def test_public_names():
    for name in ("Plan", "Settings", "attend", "attention", "dense_attention", "load_sample", "plan"):
        assert name in s2o.__all__
        assert getattr(s2o, name).__doc__
    assert all(hasattr(s2o, name) for name in s2o.__all__)


@pytest.mark.parametrize("module", ["api", "planning", "samples", "settings", "results", "arrays"])
def test_examples_run(module):
    tested = doctest.testmod(importlib.import_module(f"s2o_cupy.{module}"), optionflags=doctest.ELLIPSIS)
    assert tested.failed == 0
    assert tested.attempted or module in ("results", "arrays")


# --- imports ---------------------------------------------------------------------------------
def imported(path: Path) -> set[str]:
    """Names of the modules that a source file imports absolutely."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return names


def test_nothing_imports_a_top_level_kernels():
    sources = [*ROOT.rglob("*.py"), *(ROOT.parent / "kernels").glob("*.py"), *Path(__file__).parent.rglob("*.py")]
    assert len(sources) > 15
    for path in sources:
        assert not {name for name in imported(path) if name.split(".")[0] == "kernels"}, path


def test_import_is_light():
    heavy = ("cupy", "torch", "matplotlib", "numba", "scipy", "IPython")
    code = f"import sys, s2o_cupy; print([m for m in {heavy!r} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_a_call_on_numpy_arrays_imports_no_framework():
    code = (
        "import sys, numpy as np, s2o_cupy; s2o_cupy.dense_attention(*np.ones((3, 4, 2), np.float32)); "
        "print([m for m in ('cupy', 'torch', 'matplotlib', 'IPython') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_kernels_are_found_beside_the_package():
    kernels = importlib.import_module("s2o_cupy.kernels")
    assert {Path(p).name for p in kernels.__path__} == {"kernels"}


# --- samples ---------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "rows"), [("smollm2_code_l14", 8192), ("smollm2_prose_l08", 4096)])
def test_load_sample(name, rows):
    sample = s2o.load_sample(name)
    assert sample.q.shape == (3, rows, 64)
    assert sample.k.shape == sample.v.shape == (1, rows, 64)
    for x in (sample.q, sample.k, sample.v):
        assert x.dtype == np.float16
        assert x.flags.writeable
        assert np.isfinite(x).all()
        assert 0.1 < x.astype(np.float32).std() < 10
    assert isinstance(sample.meta, dict)


def test_load_sample_names_what_there_is():
    with pytest.raises(ValueError, match="sample is 'x'; allowed: 'smollm2_code_l14', 'smollm2_prose_l08'"):
        s2o.load_sample("x")


def test_samples_are_small():
    assert sum(path.stat().st_size for path in (ROOT / "data").iterdir()) < 9e6


# --- settings --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("causal", 1, TypeError, "causal is 1; allowed: True or False"),
        ("share_order", "no", TypeError, "share_order is 'no'; allowed: True or False"),
        ("rank", "median", ValueError, "rank is 'median'; allowed: 'mean', 'gaussian'"),
        ("rank", None, ValueError, "rank is None; allowed"),
        ("tail", "mean", ValueError, "tail is 'mean'; allowed: 'pooled', 'spread', None"),
        ("query_order", ["guide"], ValueError, r"query_order is \['guide'\]; allowed: 'position', 'guide'"),
        ("segment", 0, ValueError, "segment is 0; allowed: an integer from 1 to"),
        ("block_q", -4, ValueError, "block_q is -4; allowed"),
        ("block_k", 64.0, TypeError, "block_k is 64.0; allowed: an integer"),
        ("block_k", True, TypeError, "block_k is True; allowed: an integer"),
        ("pool", 2**31, ValueError, "pool is 2147483648; allowed"),
        ("pool", 96, ValueError, "pool is 96; allowed: a power of two"),
        ("rank_terms", 0, ValueError, "rank_terms is 0; allowed: an integer from 1 to 256 or None"),
        ("rank_terms", 257, ValueError, "rank_terms is 257; allowed"),
        ("rank_levels", 1, ValueError, "rank_levels is 1; allowed: an integer from 2 to 65536 or None"),
        ("rank_levels", "many", TypeError, "rank_levels is 'many'; allowed"),
        ("scale", 0, ValueError, "scale is 0.0; allowed: a number above 0, at most 1e.38, or None"),
        ("scale", -1.0, ValueError, "scale is -1.0; allowed"),
        ("scale", np.inf, ValueError, "scale is inf; allowed"),
        ("scale", 1j, TypeError, "scale is 1j; allowed"),
        ("cap", 0, ValueError, r"cap is 0.0; allowed: a number in \(0, 1\]"),
        ("cap", 1.01, ValueError, "cap is 1.01; allowed"),
        ("cap", np.nan, ValueError, "cap is nan; allowed"),
        ("cap", None, TypeError, "cap is None; allowed"),
        ("tau", -1e-9, ValueError, "tau is -1e-09; allowed: a finite number, 0 or above"),
        ("tau", np.nan, ValueError, "tau is nan; allowed"),
        ("tau", np.inf, ValueError, "tau is inf; allowed"),
        ("tau", "0.1", TypeError, "tau is '0.1'; allowed"),
        ("tau", [], TypeError, r"tau is \[\]; allowed"),
        ("tau", [0.1, -0.1], ValueError, "tau is -0.1; allowed"),
        ("tau", [[0.1]], TypeError, "tau is .*; allowed"),
        ("tau", True, TypeError, "tau is True; allowed"),
    ],
)
def test_bad_settings(name, value, error, message):
    with pytest.raises(error, match=message):
        Settings(**{name: value})
    with pytest.raises(error, match=message):
        Settings().replace(**{name: value})


def test_settings_are_normalised_and_frozen():
    settings = Settings(segment=np.int64(64), tau=np.array([0.1, 0.2]), scale=np.float32(0.5), causal=np.bool_(False))
    assert settings == Settings(segment=64, tau=(0.1, 0.2), scale=0.5, causal=False)
    assert type(settings.segment) is int
    assert type(settings.scale) is float
    assert settings.causal is False
    assert Settings(tau=np.array(0.25)).tau == 0.25
    assert hash(settings) == hash(settings.replace())
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.tau = 0


def test_replace_leaves_the_original_and_refuses_unknown_names():
    settings = Settings()
    assert settings.replace(tau=0.5).tau == 0.5
    assert settings.tau == 1e-2
    with pytest.raises(TypeError, match="unknown setting 'block'; allowed: causal, window, scale, segment"):
        settings.replace(tau=0.5, block=1)
    with pytest.raises(TypeError, match="unknown setting 'block'; allowed: causal, window, scale, segment"):
        Settings(tau=0.5, block=1)


def test_paper_settings():
    paper = Settings.paper(tau=0.1)
    assert (paper.rank, paper.tail, paper.query_order, paper.tau) == ("mean", None, "guide", 0.1)
    assert Settings.paper(tail="pooled").tail == "pooled"


@given(all_settings(3))
def test_settings_save_and_load(tmp_path_factory, settings):
    path = tmp_path_factory.mktemp("settings") / "settings.json"
    settings.save(path)
    assert Settings.load(path) == settings


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", ValueError, r"settings file '.*s\.json' is not JSON"),
        ("[]", ValueError, r"settings file '.*s\.json' holds a list; allowed: an object"),
        ("[" * 100_000, ValueError, r"settings file '.*s\.json' is not JSON"),
        ('{"tau": -1}', ValueError, r"settings file '.*s\.json': tau is -1\.0; allowed"),
        ('{"tua": 0.1}', TypeError, "unknown setting 'tua'"),
        ('{"tau": NaN}', ValueError, "tau is nan"),
        ('{"pool": 3}', ValueError, "pool is 3"),
    ],
)
def test_settings_load_refuses(tmp_path, text, error, message):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(error, match=message):
        Settings.load(tmp_path / "s.json")


def test_settings_load_fills_in_defaults(tmp_path):
    (tmp_path / "s.json").write_text('{"tau": [0.1, 0.2]}')
    assert Settings.load(tmp_path / "s.json") == Settings(tau=(0.1, 0.2))
