"""Kernels are compiled where nothing can be kept, too."""

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_compile_where_no_folder_can_be_written(tmp_path: Path) -> None:
    """A module that numba finds no folder for, as in a read-only container without a HOME."""
    code = """
import sys
from numba.core import caching

for locator in caching.CacheImpl._locator_classes:
    locator.from_function = classmethod(lambda cls, *_: None)
from mfdetr_cache.ops.numba_compile import compiled

@compiled()
def twice(x):
    return 2 * x

assert twice(21) == 42
assert not hasattr(twice._cache, "_cache_path") or not twice._cache._cache_path
"""
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
