"""Trying kernels: variants checked and timed in a process of their own, for `s2o_cupy.ipython`."""
