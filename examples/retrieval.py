# %% [markdown]
# # Retrieval with a softmax
# 40,000 unit vectors, each with a record (two numbers); 4,096 queries, each near one of them. A sharp softmax over
# `q·k` answers with the records of the nearest vectors, weighted: attention without a mask, at a large scale.

# %%
import numpy as np

import s2o_cupy as s2o

VECTORS, QUERIES, DIM, SCALE = 40_000, 4_096, 32, 200.0


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


rng = np.random.default_rng(0)
centres = rng.standard_normal((60, DIM))
cluster = np.sort(rng.integers(60, size=VECTORS))
vectors = unit(centres[cluster] + 0.7 * rng.standard_normal((VECTORS, DIM)))
records = np.column_stack([cluster, rng.standard_normal(VECTORS)]).astype(np.float32)
asked = np.sort(rng.integers(VECTORS, size=QUERIES))  # queries of a segment are of few clusters: sort yours as well
queries = unit(vectors[asked] + 0.05 * rng.standard_normal((QUERIES, DIM)))

# %% A segment's queries look for different vectors, so no one mean or covariance ranks for them all: `rank="mixture"`
# with every query a centre of its own does. No pooled tail: a mean of far vectors is no record.
settings = s2o.Settings(
    causal=False, scale=SCALE, rank="mixture", rank_terms=None, segment=128, cap=0.2, tau=1e-2, tail=None
)
result = s2o.attention(queries, vectors, records, settings, full_output=True)
report = s2o.audit(queries, vectors, records, result)
print(f"{result.stats.density:.4f} of all pairs computed")
print(report)
assert report.error.item() < 1e-2

# %% The cluster of the nearest vector, read off the answer.
nearest = (queries @ vectors.T).argmax(axis=1)
found = np.rint(result.out[:, 0])
print(f"cluster of the nearest vector found for {np.mean(found == cluster[nearest]):.4f} of the queries")

# %% A ranking that does not fit costs both work and error.
mean = s2o.attention(queries, vectors, records, settings.replace(rank="mean"), full_output=True)
print(f"rank='mean': density {mean.stats.density:.4f}")
print(s2o.audit(queries, vectors, records, mean))
