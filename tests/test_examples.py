"""Every cell script of examples/ runs as it stands, and the tables and pictures of what they show are well formed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.dom import minidom

import numpy as np
import pytest

import s2o_cupy as s2o
from s2o_cupy import reprs

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs a checkout")
SAYS = {
    "first_call": "captured mass (least)",
    "read_a_head": "rows with the greatest tail mass",
    "kernel_variant": "in use: pool pool.cu",
    "kernel_regression": "of all pairs computed",
    "retrieval": "cluster of the nearest vector found for 1.0000 of the queries",
    "dlpack": "",
}


def test_every_example_is_tried():
    assert {path.stem for path in EXAMPLES.glob("*.py")} - {"__init__"} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_example(name):
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
    if name == "dlpack":
        for module, label in (("torch", "PyTorch"), ("jax", "JAX")):
            missing = f"{label} is not installed: skipped" in done.stdout
            assert missing == (importlib.util.find_spec(module) is None)
        assert "False" not in done.stdout


# --- tables and pictures ------------------------------------------------------------------------
@pytest.fixture(scope="module")
def objects():
    q, k, v, _ = s2o.load_sample("smollm2_prose_l08")
    settings = s2o.Settings(tau=0.03)
    result = s2o.attention(q, k, v, settings, full_output=True)
    return {
        "settings": settings,
        "plan": s2o.plan(q[:1], k, settings),
        "result": result,
        "audit": s2o.audit(q, k, v, result, rows=64),
        "sweep": s2o.sweep(q, k, v, tau=(0.1, 0.01), rows=64),
    }


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("settings", ["<b>0.03</b>", "rank_levels", "default"]),
        ("plan", ["1, 1, 16", "gaussian, 15 terms", "<svg", "key position by rank"]),
        ("result", ["AttentionResult (3, 4096, 64) float16, ranked", "tail mass", "<svg", "row tile"]),
        ("audit", ["Audit of 64 sampled rows", "captured_min", "<svg"]),
        ("sweep", ["captured mass", "<polyline", "log scale"]),
    ],
)
def test_html(objects, name, parts):
    said = objects[name]._repr_html_()
    minidom.parseString(f"<x>{said}</x>")
    for part in parts:
        assert part in said
    assert len(said) < 80_000


def test_text(objects):
    assert repr(objects["sweep"]).count("\n") == 2
    assert repr(objects["audit"]) == str(objects["audit"])
    assert repr(objects["plan"]).startswith("Plan(1 x 1 order heads x 16 segments, 4096 queries, 4096 keys")


def test_html_of_nothing_and_of_dense():
    q = np.zeros((2, 0, 8), np.float32)
    empty = s2o.attention(q, q, q, full_output=True)
    dense = s2o.dense_attention(*np.ones((3, 1, 5, 4), np.float32), full_output=True)
    for one in (empty, dense, s2o.plan(q, q)):
        minidom.parseString(f"<x>{one._repr_html_()}</x>")


def test_tables_escape_and_pictures_survive_odd_numbers():
    assert "&lt;b&gt;" in reprs.table(("<b>",), [("<i>",)])
    assert reprs.columns_picture([], "none") == reprs.dots_picture([], "none") == ""
    assert reprs.curves_picture({"a": ([1.0], [0.0])}, "x", "y") == ""
    for picture in (reprs.columns_picture([np.nan, 0], "x"), reprs.curves_picture({"<": ([1], [1])}, "x", "y")):
        minidom.parseString(picture)
