# %% [markdown]
# # First call
# Three real query heads of SmolLM2-135M over one K/V head, 4096 tokens. Run the cells in an IDE or Jupyter (jupytext),
# or the whole file: `python examples/first_call.py`.

# %%
import s2o_cupy as s2o

q, k, v, meta = s2o.load_sample("smollm2_prose_l08")
print(meta["model"], q.shape, k.shape, v.shape, q.dtype)

# %% Sparse attention, and exact attention on the same backend.
result = s2o.attention(q, k, v, full_output=True)
exact = s2o.dense_attention(q, k, v)
print(result)

# %% What it is worth: sampled rows against exact attention, with an interval.
report = s2o.audit(q, k, v, result)
print(report)

# %% The settings that meet an error, and what they cost.
settings = s2o.calibrate(q, k, v, error=0.02)
print(settings)
cheaper = s2o.attention(q, k, v, settings, full_output=True)
print(f"computed {cheaper.stats.density:.2f} of all pairs")
