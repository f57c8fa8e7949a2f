"""The benchmarks' own logic: lines and JSON, sweeps, tables, and whole runs over NumPy in place of CuPy."""

import argparse
import json
import math
import os
import sys
from types import SimpleNamespace

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton loads, where it is there

import fake_cupy
import numpy as np
import pytest

from bench import __main__ as command
from bench import gpu, ours, peers, record, scaling, timing
from bench.record import Record
from bench.sweep import Sweep
from bench.timing import Timing


@pytest.fixture
def small(monkeypatch):
    """No GPU: NumPy as CuPy, float32, few small heads."""
    fake_cupy.install(monkeypatch)
    make = ours.workloads.make
    monkeypatch.setattr(ours, "HEADS_Q", 2)
    monkeypatch.setattr(ours, "HEADS_KV", 1)
    monkeypatch.setattr(ours, "DIM", 64)
    monkeypatch.setattr(ours.workloads, "make", lambda *a, **k: make(*a, **k | {"dtype": "float32", "xp": np}))


class Missing:
    """A peer that cannot be made."""

    name = "FlexAttention"

    def __init__(self):
        raise ImportError("no such peer here")


def run(*arguments):
    """`python -m bench ...` in this process; its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            command.main()
    return done.value.code


def test_peers_says_what_is_missing_and_measures_the_rest(small, monkeypatch, tmp_path, capsys):
    rivals = pytest.importorskip("bench.rivals", reason="the peers need torch")
    monkeypatch.setattr(rivals, "sparse_peers", lambda quick: [(rivals.Blocks.name, rivals.Blocks)])
    monkeypatch.setattr(rivals, "Flex", Missing)
    monkeypatch.setattr(peers, "OURS", {"s2o_cupy": {}})
    monkeypatch.setattr(peers, "ERRORS", (0.3,))
    status = run("peers", "--length", "2048", "--rows", "64", "--json", tmp_path / "x.json")
    print(capsys.readouterr().out)
    assert status == 0
