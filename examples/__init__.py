"""Programs that use s2o_cupy, run from a checkout; they are not installed with it."""
