"""Sparse attention with a known error over NumPy and CuPy arrays: S2O with early stopping, better rankings, a tail."""

from pathlib import Path

if not (Path(__file__).parent / "kernels").is_dir():  # a checkout or editable install: kernels/ lies beside us
    __path__.append(str(Path(__file__).parent.parent))

from s2o_cupy._version import __version__
from s2o_cupy.api import attend, attention, dense_attention, plan
from s2o_cupy.calibration import calibrate
from s2o_cupy.planning import Plan
from s2o_cupy.quality import audit, sweep
from s2o_cupy.results import AttentionResult, Stats
from s2o_cupy.samples import load_sample
from s2o_cupy.settings import Settings
from s2o_cupy.variants import use_kernel

__all__ = [
    "AttentionResult",
    "Plan",
    "Settings",
    "Stats",
    "__version__",
    "attend",
    "attention",
    "audit",
    "calibrate",
    "dense_attention",
    "load_sample",
    "plan",
    "sweep",
    "use_kernel",
]


def load_ipython_extension(shell) -> None:
    """``%load_ext s2o_cupy``: the magics of `s2o_cupy.ipython`."""
    from s2o_cupy import ipython

    ipython.load_ipython_extension(shell)


def unload_ipython_extension(shell) -> None:
    """``%unload_ext s2o_cupy``."""
    from s2o_cupy import ipython

    ipython.unload_ipython_extension(shell)
