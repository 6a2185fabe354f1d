"""The one door to every detector: a name and its weights become a frozen Detector."""

from dataclasses import dataclass

from mfdetr_cache.config import nearest
from mfdetr_cache.detectors.huggingface.adapter import (
    HuggingFaceOptions,
    load_huggingface_detector,
)
from mfdetr_cache.detectors.huggingface.families import FAMILIES
from mfdetr_cache.errors import DetectorError
from mfdetr_cache.protocols import Detector


@dataclass(frozen=True, slots=True)
class DetectorListing:
    """One line of ``mfdetr detectors``.

    Attributes:
        name: What to pass as ``--detector``.
        model: The family, for people.
        weights: What to pass as ``--weights``.
        encoder_maps: What it gives as encoder maps.
        c1: Where the stride-4 map comes from.
        checked: Against what its numbers were checked.
    """

    name: str
    model: str
    weights: str
    encoder_maps: str
    c1: str
    checked: str


def list_detectors() -> tuple[DetectorListing, ...]:
    """Every detector that can be loaded.

    Returns:
        One entry per family.
    """
    return tuple(
        DetectorListing(
            name="hf",
            model=family.label,
            weights="folder or hub id",
            encoder_maps="layer N of the encoder (default 4)"
            if family.encoder_maps == "layers"
            else "final maps",
            c1="backbone stage at stride 4",
            checked=family.checked,
        )
        for family in FAMILIES.values()
    )


def load_detector(
    name: str, weights: str | None = None, options: HuggingFaceOptions | None = None
) -> Detector:
    """A frozen detector.

    Args:
        name: Its name; ``mfdetr detectors`` lists them.
        weights: Folder, file or hub id, as its listing says.
        options: What the user chose.

    Returns:
        The detector, on the CPU, in evaluation mode.

    Raises:
        DetectorError: If the name is unknown, or the weights are missing or do not fit.
    """
    if name != "hf":
        raise DetectorError(f"unknown detector {name!r}{nearest(name, ['hf'])}")
    if weights is None:
        raise DetectorError("--detector hf needs --weights: a folder or a hub id")
    return load_huggingface_detector(weights, options or HuggingFaceOptions())
