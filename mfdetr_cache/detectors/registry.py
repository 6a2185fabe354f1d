"""Detectors by name: official ones, transformers families, authors' checkpoints and plugins."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from torch import nn

from mfdetr_cache.coco.class_agnostic import as_prompted
from mfdetr_cache.coco.options import CLASS_AGNOSTIC
from mfdetr_cache.config import nearest
from mfdetr_cache.detectors.checkpoint import is_authors_folder, read_checkpoint
from mfdetr_cache.detectors.huggingface.families import ENCODER_MAPS, FAMILIES, EncoderMaps
from mfdetr_cache.detectors.huggingface.loading import load_huggingface_detector
from mfdetr_cache.detectors.official.adapter import DINO_T20, SCHEMES, load_official_detector
from mfdetr_cache.detectors.official.architecture import (
    ARCHITECTURES,
    Architecture,
    read_architecture,
)
from mfdetr_cache.detectors.official.detr import WIDTH
from mfdetr_cache.detectors.official.layouts import layout_of, read_source
from mfdetr_cache.detectors.options import DetectorOptions, options_of
from mfdetr_cache.detectors.other_files import told_of_file, told_of_tensors
from mfdetr_cache.detectors.protocol import Detector
from mfdetr_cache.detectors.torchvision.loading import (
    MODELS,
    PREFIX,
    TORCHVISION_NAMES,
    load_torchvision_detector,
    recognised_torchvision,
)
from mfdetr_cache.detectors.translated.loading import AUTHORS, load_authors_detector, recognised
from mfdetr_cache.detectors.wrapped import AmpDetector, ClassAgnosticDetector
from mfdetr_cache.errors import DetectorError
from mfdetr_cache.identity import Identity, detector_identity, require_same, spec_from_identity
from mfdetr_cache.ops.devices import exact_float32

# The weights say which detector they are.
AUTO = "auto"
_SCHEME_NAMES = {
    "deformable-detr": "Deformable DETR",
    "h-detr": "H-DETR",
    "dino": "DINO",
}
# The same detectors as other code bases write them.
_ELSEWHERE = {
    "deformable-detr": ("Deformable DETR", "detrex, mmdetection"),
    "h-detr": ("H-DETR, Co-Deformable-DETR", "detrex, Co-DETR"),
    "dino": ("DINO, Co-DINO", "detrex, mmdetection, Co-DETR"),
    DINO_T20: ("DINO, position temperature 20", "detrex"),
}
_BOUNDS = "1e-4 in logits, 1e-5 in boxes"
_OFFICIAL_NUMBERS = f"numbers of the official code: {_BOUNDS}"
_CHECKED = {
    "h-detr-r50": _OFFICIAL_NUMBERS,
    "h-detr-swin-t": _OFFICIAL_NUMBERS,
    "deformable-detr-r50": _OFFICIAL_NUMBERS,
    "dino-r50": _OFFICIAL_NUMBERS,
    "dino-focalnet-l": f"a small FocalNet: {_OFFICIAL_NUMBERS}",
}


# Which of the paper's tables a detector stands in.
_PAPER = {
    "h-detr-r50": "1-7, 9-14, 16",
    "h-detr-swin-l": "7, 16",
    "dino-focalnet-l": "7, 8, 15, 16",
}
_FROM_WEIGHTS = "of the model"
_ENCODERS: dict[str, EncoderMaps] = {
    "lw-detr": "projector",
    "rf-detr": "projector",
    "grounding-dino": "layers",
}


@dataclass(frozen=True, slots=True)
class DetectorListing:
    """One line of ``mfdetr detectors``.

    Attributes:
        name: Value for ``--detector``.
        weights: Value for ``--weights``.
        checked: Reference its outputs were verified against.
        levels: Strides of the encoder maps.
        width: Channels of queries and encoder maps.
        c1: Source of the stride-4 map, or its channels.
        paper: Numbers of the paper's tables with this detector; empty for none.
    """

    name: str
    model: str
    weights: str
    encoder_maps: str
    checked: str
    backbone: str = _FROM_WEIGHTS
    levels: str = _FROM_WEIGHTS
    width: str = _FROM_WEIGHTS
    queries: str = _FROM_WEIGHTS
    c1: str = "backbone"
    paper: str = ""


def list_detectors() -> tuple[DetectorListing, ...]:
    """One entry per official detector, transformers family and plugin."""
    transformers = [
        _of_weights("hf", f.label, "folder or hub id", f.encoder_maps, f.checked)
        for f in FAMILIES.values()
    ]
    official = [_official(name, a) for name, a in ARCHITECTURES.items()]
    authors = [
        _of_weights(name, d.label, "authors' checkpoint", _ENCODERS.get(name, "outputs"), d.checked)
        for name, d in AUTHORS.items()
    ]
    torchvision = [
        DetectorListing(
            name=name,
            model=model.label,
            backbone=model.backbone,
            weights="state dict of torchvision",
            levels=model.levels,
            width="256" if model.width == 256 else f"{model.width}, maps 256",
            queries=str(model.queries),
            c1=str(model.c1),
            encoder_maps="feature pyramid",
            checked="torchvision's own detections: equal",
        )
        for name, model in MODELS.items()
    ]
    plugins = [
        DetectorListing(name, f"plugin {p.value}", "see the plugin", "", "by its authors")
        for name, p in _plugins().items()
    ]
    elsewhere = [
        DetectorListing(
            name=name,
            model=model,
            weights=f"checkpoint of {tools}",
            width=str(WIDTH),
            encoder_maps="layer N (default 4)",
            checked=f"their code: {_BOUNDS}",
        )
        for name, (model, tools) in _ELSEWHERE.items()
    ]
    return (*official, *elsewhere, *authors, *transformers, *torchvision, *plugins)


def _of_weights(
    name: str, model: str, weights: str, encoder_maps: EncoderMaps, checked: str
) -> DetectorListing:
    c1 = "none: a plain ViT" if encoder_maps == "projector" else "backbone"
    return DetectorListing(name, model, weights, ENCODER_MAPS[encoder_maps], checked, c1=c1)


def _official(name: str, architecture: Architecture) -> DetectorListing:
    first = 4 << architecture.backbone.first_stage
    last = first << (architecture.num_levels - 1)
    return DetectorListing(
        name=name,
        model=_SCHEME_NAMES[architecture.scheme],
        backbone=architecture.backbone.label,
        weights="official .pth",
        levels=f"{first}-{last}",
        width=str(WIDTH),
        queries=str(architecture.num_queries),
        c1=str(architecture.backbone.width),
        paper=_PAPER.get(name, ""),
        encoder_maps="layer N (default 4)",
        checked=_CHECKED.get(name, "keys and shapes of the official checkpoint"),
    )


def load_detector(
    name: str,
    weights: str | None = None,
    options: DetectorOptions | None = None,
    categories: Sequence[str] = (),
) -> Detector:
    """A frozen detector on the CPU, in evaluation mode; this process computes exact float32 then.

    Args:
        name: Its name in ``mfdetr detectors``. ``deformable-detr``, ``h-detr`` and ``dino`` alone
            infer the backbone from the checkpoint; ``auto`` infers the detector.
        weights: Checkpoint file, folder or hub id, as its listing says. None builds an official
            detector with untrained weights, to look at shapes and speed.
        options: The user's options.
        categories: Names that an open-vocabulary detector looks for where the options have no
            prompt; other detectors have their own.

    Raises:
        DetectorError: If the name is unknown, or the weights are missing or do not fit.
    """
    exact_float32()
    options = options or DetectorOptions()
    detector = _load(name, weights, options, categories)
    _require_finite(detector, weights)
    return detector if options.amp == "off" else AmpDetector(detector)


def _require_finite(detector: Detector, weights: str | None) -> None:
    """Refuse what a training that diverged leaves: nothing would be found, without a word."""
    named = detector.named_parameters() if isinstance(detector, nn.Module) else ()
    if lost := next((name for name, weight in named if not weight.isfinite().all()), None):
        raise DetectorError(
            f"{weights}: {lost} holds numbers that are not finite; did its training diverge? "
            "Give an earlier checkpoint"
        )


def _load(
    name: str, weights: str | None, options: DetectorOptions, categories: Sequence[str]
) -> Detector:
    if name == AUTO:
        name = _detector_of(weights)
    if options.score_threshold is not None and not name.startswith(PREFIX):
        raise DetectorError(f"--score-threshold: all queries of {name} are kept; leave it out")
    if name == "hf":
        folder = _given(weights, name, "a folder or a hub id")
        return load_huggingface_detector(folder, options, categories)
    if name in AUTHORS:
        file = _given(weights, name, "a checkpoint file")
        return load_authors_detector(name, file, options, categories)
    if options.prompt:
        raise DetectorError(f"--prompt: {name} has its own classes; leave it out")
    if name in ARCHITECTURES or name in (*SCHEMES, DINO_T20):
        return load_official_detector(name, None if weights is None else str(weights), options)
    if name.startswith(PREFIX):
        return load_torchvision_detector(name, _given(weights, name, "a state dict"), options)
    plugin = _plugins().get(name)
    if plugin is None:
        known = [AUTO, "hf", *ARCHITECTURES, *SCHEMES, DINO_T20, *AUTHORS, *TORCHVISION_NAMES]
        known += _plugins()
        raise DetectorError(f"unknown detector {name!r}{nearest(name, known)}")
    return plugin.load()(weights, options)  # type: ignore[no-any-return]


def _given(weights: str | None, name: str, what: str) -> str:
    if weights is None:
        raise DetectorError(f"--detector {name} needs --weights: {what}")
    return str(weights)


def _detector_of(weights: str | None) -> str:
    """The one detector that weights can be."""
    if weights is None:
        raise DetectorError("neither --detector nor --weights says which detector")
    path = Path(weights)
    if not path.is_file() and not is_authors_folder(path):
        return "hf"  # a folder or a hub id
    checkpoint = read_checkpoint(path)
    tensors = checkpoint.tensors
    found = recognised(tensors) + recognised_torchvision(checkpoint)
    layout = layout_of(tensors)
    if layout != "official":
        source = read_source(checkpoint)
        found.append(read_architecture(source.tensors, weights, layout).scheme)
        if layout == "detrex" and found[0] == "dino":
            found.append(DINO_T20)
    else:
        with contextlib.suppress(DetectorError):
            found.append(read_architecture(tensors, weights).scheme)
    if not found:
        nothing = "is no checkpoint of a known detector; 'mfdetr detectors' lists them"
        told = told_of_file(path) or told_of_tensors(tensors)
        raise DetectorError(f"{weights} {told or nothing}")
    if len(found) > 1:
        raise DetectorError(
            f"{weights} can be {' or '.join(found)}: the file does not say which, and the numbers "
            f"differ; pass --detector {found[0]}, or the other"
        )
    return found[0]


def load_same_detector(
    name: str, weights: str, identity: Identity, owner: str, prompt: Sequence[str] = ()
) -> Detector:
    """The detector that a cache or a head was made with, with one label if it has one there.

    ``name`` is as for :func:`load_detector`, where ``auto`` is that of the ``identity`` kept with
    the cache or head, the ``owner``. With another ``prompt`` its classes are these words.
    DetectorError if the weights are missing or do not fit, IdentityError if they are those of
    another detector.
    """
    detector = load_with_options_of(identity, weights, name, prompt)
    found = as_prompted(detector.spec, identity) if prompt else detector_identity(detector.spec)
    require_same(identity, owner, found, f"detector {weights}")
    return detector


def load_with_options_of(
    identity: Identity, weights: str, name: str = AUTO, prompt: Sequence[str] = ()
) -> Detector:
    """As :func:`load_same_detector`, whatever the weights are of."""
    options = options_of(identity)
    if name == AUTO:
        name = spec_from_identity(identity).detector
    if prompt:
        return load_detector(name, weights, replace(options, prompt=tuple(prompt)))
    detector = load_detector(name, weights, options)
    agnostic = identity["settings"].get(CLASS_AGNOSTIC)
    return ClassAgnosticDetector(detector) if agnostic else detector


def _plugins() -> dict[str, EntryPoint]:
    """Detectors of other packages: entry points of the group ``mfdetr_cache.detectors``."""
    return {p.name: p for p in entry_points(group="mfdetr_cache.detectors")}
