# %% [markdown]
# # Reading a head
# How concentrated is a head, which of its keys are walked, and how much work does an error cost?

# %%
import numpy as np

import s2o_cupy as s2o

q, k, v, _ = s2o.load_sample("smollm2_code_l14")
q = q[:1]  # one query head

# %% A plan is the ranking: every segment's history keys, the heaviest first.
plan = s2o.plan(q, k)
print(plan)
last = plan.kv_order[plan.kv_offsets[0, 0, -2] :]
print("the ten keys that the last queries look at first:", last[:10].tolist())

# %% One ranking, many walks.
for tau in (0.1, 0.03, 0.01, 0.003):
    result = s2o.attend(q, k, v, plan, tau=tau, full_output=True)
    tiles = result.stats.tiles[0]
    print(f"tau {tau}: density {result.stats.density:.3f}, {tiles.min()} to {tiles.max()} key tiles a row tile")

# %% Density against error: in Jupyter a table and a curve.
curve = s2o.sweep(q, k, v, tau=np.geomspace(0.1, 1e-3, 5))
print(curve)
print("density for an error of 1 %:", float(curve.density_at(0.01)[0, 0]))

# %% Rows whose softmax leans on the tail lost something: that is where to look closer.
result = s2o.attend(q, k, v, plan, tau=0.03, full_output=True)
rows = np.argsort(-result.stats.tail_mass[0])[:5]
print("rows with the greatest tail mass:", rows.tolist(), result.stats.tail_mass[0, rows].round(3).tolist())
