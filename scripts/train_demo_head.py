"""Train the mask network that comes with the package, on drawn scenes.

Rerunnable: ``python scripts/train_demo_head.py``. Runs ``mfdetr demo`` in a temporary folder and
keeps the head, without the paths of the machine it was trained on.
"""

import json
import shutil
import tempfile
from pathlib import Path

from mfdetr_cli.progress import ConsoleReporter
from mfdetr_pipelines.demo import run_demo

from mfdetr_cache.demo import demo_head
from mfdetr_cache.head.folder import CONFIG_FILE, HEAD_FILE


def main() -> None:
    """Train, and write what comes with the package."""
    with tempfile.TemporaryDirectory() as temporary:
        summary = run_demo(Path(temporary) / "demo", ConsoleReporter())
        head = Path(temporary) / "demo" / "head"
        document = json.loads((head / CONFIG_FILE).read_text())
        document["command"] = ["scripts/train_demo_head.py"]
        document["cache"]["path"] = "train.zarr"
        demo_head().mkdir(parents=True, exist_ok=True)
        (demo_head() / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n")
        shutil.copyfile(head / HEAD_FILE, demo_head() / HEAD_FILE)
    print(f"mask AP {100 * summary.evaluation.mask.AP:.1f}, written to {demo_head()}")


if __name__ == "__main__":
    main()
