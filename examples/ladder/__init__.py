"""The attend stage in steps, from a naive Numba kernel to the shipped tensor-core one: `python -m examples.ladder`."""
