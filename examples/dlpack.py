# %% [markdown]
# # PyTorch and JAX arrays
# Arrays with DLPack are viewed without a copy and answered in kind: PyTorch in, PyTorch out.

# %%
import importlib.util

import numpy as np

import s2o_cupy as s2o

rng = np.random.default_rng(0)
host = [rng.standard_normal((heads, 2048, 64), dtype=np.float32) for heads in (4, 2, 2)]
wanted = s2o.attention(*host)

# %% PyTorch, also in bfloat16 on a GPU; no gradient flows through. CI runs this
# file with JAX alone, since PyTorch from PyPI brings all of CUDA; tests/test_examples.py runs both where they are.
if importlib.util.find_spec("torch"):
    import torch

    q, k, v = map(torch.from_numpy, host)
    out = s2o.attention(q, k, v)
    print(type(out).__name__, tuple(out.shape), "equal to NumPy's:", bool((out.numpy() == wanted).all()))
    into = torch.empty_like(q)
    assert s2o.attention(q, k, v, out=into) is into
else:
    print("PyTorch is not installed: skipped")

# %% JAX. On the CPU its arrays are read-only, which is all that attention needs.
if importlib.util.find_spec("jax"):
    import jax.numpy as jnp

    out = s2o.attention(*map(jnp.asarray, host))
    print(type(out).__name__, out.shape, "equal to NumPy's:", bool((np.asarray(out) == wanted).all()))
else:
    print("JAX is not installed: skipped")
