"""The ``mfdetr`` command."""

import os

# Read once, when torch loads OpenMP: how long its threads spin after their work before they sleep.
# By default they spin so long that kernels, readers and writers of the same process wait for a
# core; a thirtieth of that still spans the gap between two operators
# (benchmarks/learner_step.py compares the two).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
