"""A language model in NumPy whose attention is s2o_cupy: `python -m examples.lm --help`."""
