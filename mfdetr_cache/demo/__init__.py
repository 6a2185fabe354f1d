"""What comes with the package: a small detector and a mask network, trained on drawn scenes."""

from pathlib import Path

_HERE = Path(__file__).parent


def demo_detector() -> Path:
    """The detector that comes with the package, a Hugging Face folder.

    ``scripts/train_demo_detector.py`` made it.
    """
    return _HERE / "detector"


def demo_head() -> Path:
    """The folder of a mask network for that detector, made by ``scripts/train_demo_head.py``."""
    return _HERE / "head"
