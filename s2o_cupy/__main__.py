"""`python -m s2o_cupy` is the command `s2o`."""

import sys

from s2o_cupy.cli import main

sys.exit(main())
