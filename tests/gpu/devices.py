"""What the tests of this folder need: CuPy, without which its import skips them, and how many devices there are."""

import pytest

cupy = pytest.importorskip("cupy", reason="needs CuPy")
try:
    DEVICES = cupy.cuda.runtime.getDeviceCount()
except cupy.cuda.runtime.CUDARuntimeError:
    DEVICES = 0
ON_DEVICE = [pytest.mark.gpu, pytest.mark.skipif(not DEVICES, reason="needs a CUDA device")]
