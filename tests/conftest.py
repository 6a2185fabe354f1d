"""Settings and fixtures for all tests."""

import os
from pathlib import Path

# Without a GPU its kernels run step by step on arrays, slowly but as they are written. Triton asks
# when torch imports it.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests that run side by side share the cores; processes that they start inherit this.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.support import detectors, scenes

# A test that asked the hub would pass here and hang there.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile(
    "default", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_report_header() -> list[str]:
    import transformers
    import zarr

    found = "found" if SHARED.is_dir() else "absent: tests on real images are skipped"
    return [
        f"torch {torch.__version__}, zarr {zarr.__version__}, transformers "
        f"{transformers.__version__}; real images and detector {found}"
    ]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent (real COCO images and the COCO-trained detector)")
    return SHARED


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight drawn images with a COCO instances file."""
    folder = tmp_path_factory.mktemp("scenes")
    scenes.write_scenes(folder, count=8, seed=0)
    return folder


@pytest.fixture(scope="session")
def rtdetr_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small RT-DETR with random weights, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("rtdetr")
    detectors.save_rtdetr(folder)
    return folder


@pytest.fixture(scope="session")
def drawn_cache(
    tmp_path_factory: pytest.TempPathFactory, scenes_folder: Path, rtdetr_folder: Path
) -> Path:
    """A complete cache of the drawn images through the small RT-DETR; do not change it."""
    from mfdetr_pipelines.extract import run_extract

    from mfdetr_cache.reporter import SilentReporter

    path = tmp_path_factory.mktemp("caches") / "drawn.zarr"
    config = scenes.extract_config(scenes_folder, str(rtdetr_folder), path)
    run_extract(config, SilentReporter())
    return path
