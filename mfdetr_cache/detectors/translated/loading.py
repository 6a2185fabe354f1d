"""Detectors from checkpoints of the authors' own code."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfdetr_cache.detectors.checkpoint import Checkpoint, read_checkpoint
from mfdetr_cache.detectors.huggingface.adapter import HuggingFaceDetector, Origin
from mfdetr_cache.detectors.huggingface.loading import asked_for, into_own_memory, quiet
from mfdetr_cache.detectors.huggingface.prompt import read_prompt
from mfdetr_cache.detectors.labels import SPARE_OUTPUTS, names_of_checkpoint
from mfdetr_cache.detectors.names import Translation, carry, carry_back, translate
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.preprocess import Preprocessing
from mfdetr_cache.detectors.translated.blueprint import Blueprint
from mfdetr_cache.detectors.translated.d_fine import (
    is_d_fine,
    is_deim,
    is_rt_detr_v4,
    read_d_fine,
    read_deim,
)
from mfdetr_cache.detectors.translated.deimv2 import is_deimv2, read_deimv2
from mfdetr_cache.detectors.translated.grounding_dino import (
    is_grounding_dino,
    read_grounding_dino,
    text_splitter,
)
from mfdetr_cache.detectors.translated.lw_detr import is_lw_detr, read_lw_detr
from mfdetr_cache.detectors.translated.rf_detr import is_rf_detr, read_rf_detr
from mfdetr_cache.detectors.translated.rf_detr_masks import PREFIX as MASK_PREFIX
from mfdetr_cache.detectors.translated.rf_detr_masks import MaskBranch, RfDetrWithMasks
from mfdetr_cache.detectors.translated.rt_detr import (
    is_rt_detr,
    is_rt_detr_v2,
    read_rt_detr,
    read_rt_detr_v2,
)
from mfdetr_cache.detectors.translated.ultralytics import is_ultralytics, read_ultralytics
from mfdetr_cache.detectors.weights import require_complete, write_checkpoint
from mfdetr_cache.errors import DetectorError

Read = Callable[[Checkpoint, DetectorOptions], Blueprint]
# Of detectors that keep the shape of an image.
_SHORTEST, _LONGEST = 800, 1333
_MOST_TOKENS = 256
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class AuthorsDetector:
    """A detector whose authors' checkpoints can be read.

    Attributes:
        name: Value for ``--detector``.
        recognises: Whether a state dict may be of this detector.
        checked: Reference its outputs were verified against.
    """

    name: str
    label: str
    recognises: Callable[[Mapping[str, Tensor]], bool]
    read: Read
    checked: str


_GOLDENS = "the authors' code: 5e-4 in logits and queries, 2e-5 in boxes"
_BESIDE = "the authors' code, once, beside it: 1e-4 in logits, 4e-6 in boxes"
_AS_DEIM = "nothing of its own: DEIM's layers, as the authors' configuration says"

AUTHORS: dict[str, AuthorsDetector] = {
    detector.name: detector
    for detector in (
        AuthorsDetector("rt-detr", "RT-DETR", is_rt_detr, read_rt_detr, _GOLDENS),
        AuthorsDetector(
            "rt-detr-ultralytics",
            "RT-DETR of ultralytics",
            is_ultralytics,
            read_ultralytics,
            _BESIDE,
        ),
        AuthorsDetector("rt-detr-v2", "RT-DETRv2", is_rt_detr_v2, read_rt_detr_v2, _BESIDE),
        AuthorsDetector(
            "rt-detr-v2-dsp",
            "RT-DETRv2, discrete sampling",
            is_rt_detr_v2,
            partial(read_rt_detr_v2, sampling="discrete"),
            _BESIDE,
        ),
        AuthorsDetector("d-fine", "D-FINE", is_d_fine, read_d_fine, _GOLDENS),
        AuthorsDetector("deim", "DEIM", is_deim, read_deim, _GOLDENS),
        AuthorsDetector("rt-detr-v4", "RT-DETRv4", is_rt_detr_v4, read_deim, _AS_DEIM),
        AuthorsDetector("deimv2", "DEIMv2", is_deimv2, read_deimv2, _GOLDENS),
        AuthorsDetector("rf-detr", "RF-DETR", is_rf_detr, read_rf_detr, _GOLDENS),
        AuthorsDetector("lw-detr", "LW-DETR", is_lw_detr, read_lw_detr, _GOLDENS),
        AuthorsDetector(
            "grounding-dino", "Grounding DINO", is_grounding_dino, read_grounding_dino, _GOLDENS
        ),
    )
}


def recognised(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names in :data:`AUTHORS` that a state dict may be of; several where it is ambiguous."""
    return [name for name, detector in AUTHORS.items() if detector.recognises(tensors)]


def load_authors_detector(
    name: str, weights: str, options: DetectorOptions, categories: Sequence[str] = ()
) -> HuggingFaceDetector:
    """A detector from its authors' checkpoint, frozen, on the CPU.

    ``name`` is one of :data:`AUTHORS`; ``categories`` are what an open-vocabulary detector looks
    for where the options have no prompt. DetectorError if the checkpoint is of another detector, or
    its tensors do not fit.
    """
    checkpoint = read_checkpoint(Path(weights))
    blueprint = read_blueprint(name, checkpoint, options)
    prompt = None
    if blueprint.family.takes_prompt:
        phrases = asked_for(options, categories, weights)
        prompt = read_prompt(phrases, text_splitter(checkpoint.path), _MOST_TOKENS)
    elif options.prompt:
        raise DetectorError(f"--prompt: {name} has its own classes; leave it out")
    with quiet():
        model, names = build(blueprint, weights)
    into_own_memory(model)
    by_id = name in ("rf-detr", "lw-detr")
    num_classes = checkpoint.settings.get("num_classes") if by_id else None
    origin = Origin(
        name=name,
        where=weights,
        known_names=dict(enumerate(prompt.phrases))
        if prompt
        else _known_names(checkpoint, num_classes),
        settings={"layout": "authors", **blueprint.choices},
        save=partial(_save_checkpoint, model, names, checkpoint),
        spare_outputs=SPARE_OUTPUTS if by_id else 0,
        num_classes=num_classes,
        prompt=prompt,
    )
    height, width = blueprint.input_hw or (None, None)
    preprocessing = Preprocessing(
        height=height,
        width=width,
        shortest_edge=None if height else _SHORTEST,
        longest_edge=None if height else _LONGEST,
        resample=2,
        rescale=1 / 255,
        mean=_IMAGENET_MEAN if blueprint.normalise else None,
        std=_IMAGENET_STD if blueprint.normalise else None,
        resize=blueprint.resize,
    ).with_size(options.input_size)
    _require_divisible(preprocessing, blueprint.side_multiple)
    made = (model, blueprint.family, origin, preprocessing, options)
    if not any(key.startswith(MASK_PREFIX) for key in checkpoint.tensors):
        return HuggingFaceDetector(*made)
    detector = RfDetrWithMasks(*made)
    downsample = int(checkpoint.settings.get("mask_downsample_ratio") or 4)
    detector.branch = MaskBranch(checkpoint.tensors, downsample, weights)
    return detector


def _require_divisible(preprocessing: Preprocessing, multiple: int) -> None:
    height, width = preprocessing.height, preprocessing.width
    if height and width and (height % multiple or width % multiple):
        raise DetectorError(
            f"--input-size {height}x{width}: the sides must be multiples of {multiple}"
        )


def read_blueprint(name: str, checkpoint: Checkpoint, options: DetectorOptions) -> Blueprint:
    """Blueprint of a checkpoint; DetectorError if it is of another detector or incomplete."""
    detector = AUTHORS[name]
    if not detector.recognises(checkpoint.tensors):
        others = recognised(checkpoint.tensors)
        other = f"; it can be {' or '.join(others)}" if others else ""
        raise DetectorError(
            f"{checkpoint.path} is no checkpoint of {detector.label} as its authors write it{other}"
        )
    try:
        return detector.read(checkpoint, options)
    except KeyError as error:
        raise DetectorError(
            f"{checkpoint.path} is no checkpoint of {detector.label} as its authors write it: "
            f"it has no {error.args[0]}"
        ) from None


def build(blueprint: Blueprint, where: str) -> tuple[Any, Translation]:
    """The model of a checkpoint with its weights, and the renaming of each tensor of the file.

    DetectorError if a tensor or a parameter is left over, or a shape does not fit.
    """
    model = blueprint.build()
    names = translate(blueprint.keys(), blueprint.rules)
    expected = _places(model)
    carried = carry(blueprint.tensors, names)
    places: dict[str, str] = {}
    for key, targets in names.items():
        first = places.setdefault(targets[0], key)
        tensor, other = blueprint.tensors[key], blueprint.tensors[first]
        if first != key and not (other.is_meta or torch.equal(other, tensor)):
            raise DetectorError(
                f"{where}: {key} and {first} are shared in this detector, but differ here"
            )
        places |= dict.fromkeys(targets[1:], key)
    require_complete(
        where,
        expected.keys() - carried.keys(),
        {places[name] for name in carried.keys() - expected.keys()},
    )
    for target, value in carried.items():
        if value.shape != expected[target].shape:
            raise DetectorError(
                f"{where}: {places[target]} is {tuple(value.shape)}, expected "
                f"{tuple(expected[target].shape)}"
            )
    # Scales of D-FINE are whole numbers in its files; averaged weights may be of half precision.
    floats = {k: v.to(expected[k].dtype) for k, v in carried.items()}
    model.load_state_dict(floats, strict=False, assign=True)
    _count_no_batches(model)
    return model, names


def _places(model: nn.Module) -> dict[str, Tensor]:
    """What a model has to get: every tensor once, counters of batch norms not at all."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not name.endswith("num_batches_tracked"):
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _count_no_batches(model: nn.Module) -> None:
    """Counters of batch norms, which nobody reads, out of the device without memory."""
    for module in model.modules():
        counter = getattr(module, "num_batches_tracked", None)
        if isinstance(counter, Tensor) and counter.is_meta:
            module.num_batches_tracked = torch.zeros((), dtype=torch.int64)


def _known_names(checkpoint: Checkpoint, num_classes: int | None) -> dict[int, str]:
    tensors = checkpoint.tensors
    bias = tensors.get("class_embed.bias")
    if bias is None:
        bias = next(v for key, v in tensors.items() if key.endswith(".enc_score_head.bias"))
    return names_of_checkpoint(len(bias), checkpoint.class_names, num_classes)


def _save_checkpoint(
    model: nn.Module, names: Translation, checkpoint: Checkpoint, folder: Path
) -> str:
    """Write a checkpoint in the authors' layout, beside it the names of its classes."""
    state = carry_back(model.state_dict(), names, checkpoint.tensors)
    # What the architecture is read off beside tensors comes back too.
    document = {
        "model": state,
        "class_names": list(checkpoint.class_names),
        "args": dict(checkpoint.settings),
    }
    return write_checkpoint(folder, document)
