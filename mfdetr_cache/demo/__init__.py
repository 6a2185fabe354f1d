"""What comes with the package: a small detector and a mask network, trained on drawn scenes."""

from pathlib import Path

_HERE = Path(__file__).parent


def demo_detector() -> Path:
    """The folder of the detector that comes with the package.

    Returns:
        A Hugging Face folder, made by ``scripts/train_demo_detector.py``.
    """
    return _HERE / "detector"


def demo_head() -> Path:
    """The folder of a mask network for that detector.

    Returns:
        A head folder, made by ``scripts/train_demo_head.py``.
    """
    return _HERE / "head"
