"""The ``mfdetr`` command."""

import os

# Read once, when torch loads OpenMP: how long its threads spin after their work before they sleep.
# By default it is milliseconds, in which they keep a core from the kernels, readers and writers
# that share the machine. A tenth of a millisecond still spans the gap between two operators.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
