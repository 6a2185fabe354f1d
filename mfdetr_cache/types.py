"""Dataclasses that cross a folder boundary; shapes are checked, nothing is computed."""

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from mfdetr_cache.ops.quantisation import StoredMap

if TYPE_CHECKING:
    from torch import Tensor

MapRole = Literal["encoder", "backbone", "c1", "c1_roi"]
# The logit of every label that a query does not have where queries are detections, and of all its
# labels where it is absent. The sigmoid of it is 0 in float32, and a detection of score 0 is none.
ABSENT_LOGIT = -200.0


@dataclass(frozen=True, slots=True)
class ImageGeometry:
    """How one image became the network's input.

    Attributes:
        original_hw: Height and width of the image as the annotations see it, in pixels.
        resized_hw: Height and width after the resize, in network input pixels.
        input_hw: Height and width of the network input; padding is on the right and the bottom.
    """

    original_hw: tuple[int, int]
    resized_hw: tuple[int, int]
    input_hw: tuple[int, int]

    def __post_init__(self) -> None:
        if any(r > i for r, i in zip(self.resized_hw, self.input_hw, strict=True)):
            raise ValueError(f"resized image {self.resized_hw} does not fit input {self.input_hw}")

    @property
    def input_xyxy_norm(self) -> tuple[float, float, float, float]:
        """The network input as a box relative to the image; larger than it where it is padded."""
        (height, width), (all_height, all_width) = self.resized_hw, self.input_hw
        return 0.0, 0.0, all_width / width, all_height / height


@dataclass(frozen=True, slots=True)
class MapSpec:
    """A feature map that a detector computes for every image.

    Attributes:
        name: Its name in a cache, such as ``encoder16`` or ``c1``.
        role: ``encoder`` for the detector's own multi-scale encoder, ``backbone`` for a backbone
            map added because the encoder has none at that stride, ``c1`` for the first stage,
            ``c1_roi`` for crops of it in a cache.
        stride: Network input pixels per cell, along both axes.
        channels: Number of channels.
        source: Layer of the detector it is the output of, in words.
    """

    name: str
    role: MapRole
    stride: int
    channels: int
    source: str


@dataclass(frozen=True, slots=True)
class DetectorSpec:
    """A frozen detector and its outputs; all of it is part of a cache's identity.

    Attributes:
        name: Detector family and variant, such as ``hf:deimv2``.
        weights_sha256: Hash over names, shapes, types and bytes of all weights, sorted by name.
        num_queries: Number Q of decoder queries kept per image.
        query_dim: Width of the decoder queries.
        num_labels: Number K of class outputs.
        score_function: ``sigmoid`` or ``softmax`` (the last class is then "no object").
        label_names: The detector's own name of every label, length K.
        maps: Its feature maps, finest first.
        encoder_level_embed: The encoder's frozen embedding of each of its levels, one row per
            ``encoder`` map in order; None where the detector has none.
        preprocessing: Everything that decides the network input, as plain JSON values.
        settings: Further settings that change the outputs, as plain JSON values.
    """

    name: str
    weights_sha256: str
    num_queries: int
    query_dim: int
    num_labels: int
    score_function: Literal["sigmoid", "softmax"]
    label_names: tuple[str, ...]
    maps: tuple[MapSpec, ...]
    encoder_level_embed: tuple[tuple[float, ...], ...] | None = None
    preprocessing: dict[str, object] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)

    @property
    def detector(self) -> str:
        """What ``--detector`` calls it: the name without its variant; of torchvision with it."""
        family = self.name.partition(":")[0]
        return self.name if family == "torchvision" else family


@dataclass(frozen=True, slots=True)
class DetectorOutput:
    """A frozen detector's outputs for a batch. Q queries, K labels, d query width.

    Detectors whose queries are detections have fewer in some images; the other queries are absent:
    ``ABSENT_LOGIT`` for every label. These are neither matched, nor trained on, nor evaluated.

    Attributes:
        class_logits: Before the score function, shape (B, Q, K).
        boxes_cxcywh_norm: Relative to the resized image without padding, shape (B, Q, 4).
        queries: Last decoder output, the input of the class head, shape (B, Q, d).
        maps: Feature maps by name, each (B, C, h, w), padding included.
    """

    class_logits: "Tensor"
    boxes_cxcywh_norm: "Tensor"
    queries: "Tensor"
    maps: "dict[str, Tensor]"

    def __post_init__(self) -> None:
        # Reading a dataset or describing a cache needs no torch, which takes seconds to import.
        import torch.onnx

        if torch.onnx.is_in_onnx_export():
            return  # sizes are tensors then, and never equal as keys
        heads = {self.class_logits.shape[:2], self.boxes_cxcywh_norm.shape[:2]}
        if heads != {self.queries.shape[:2]}:
            raise ValueError("class_logits, boxes and queries disagree on (B, Q)")

    def of_image(self, index: int) -> "DetectorOutput":
        """The outputs of one image of the batch, as a batch of one; nothing is copied."""
        one = slice(index, index + 1)
        return DetectorOutput(
            self.class_logits[one],
            self.boxes_cxcywh_norm[one],
            self.queries[one],
            {name: values[one] for name, values in self.maps.items()},
        )

    def cpu(self, map_names: Collection[str] | None = None) -> "DetectorOutput":
        """The outputs on the CPU, with ``map_names`` or all maps; waits for the device."""
        return DetectorOutput(
            self.class_logits.cpu(),
            self.boxes_cxcywh_norm.cpu(),
            self.queries.cpu(),
            {k: m.cpu() for k, m in self.maps.items() if map_names is None or k in map_names},
        )


@dataclass(frozen=True, slots=True)
class GroundTruth:
    """The annotated objects of one image; G objects.

    Masks are kept as COCO run lengths (column-major, starting with background), which any reader
    decodes and which answer "is this pixel inside?" without a bitmap.

    Attributes:
        annotation_ids: COCO annotation ids, int64, shape (G,).
        category_ids: COCO category ids as annotated, int64, shape (G,).
        labels: The detector's label for the category, or -1 where it has none; int64, (G,).
        boxes_xyxy: In original image pixels, float32, shape (G, 4).
        areas: COCO ``area`` in original pixels (decides S/M/L), float64, shape (G,).
        is_crowd: bool, shape (G,).
        run_lengths: For each object the run lengths, uint32; they sum to height x width. None of
            them where the object has a box only.
    """

    annotation_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    boxes_xyxy: NDArray[np.float32]
    areas: NDArray[np.float64]
    is_crowd: NDArray[np.bool_]
    run_lengths: tuple[NDArray[np.uint32], ...]

    def __post_init__(self) -> None:
        lengths = {len(getattr(self, column.name)) for column in fields(self)}
        if len(lengths) != 1:
            raise ValueError(f"ground truth columns differ in length: {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.annotation_ids)

    @property
    def has_mask(self) -> NDArray[np.bool_]:
        """Whether each object has more than a box, shape (G,)."""
        return np.array([len(runs) > 0 for runs in self.run_lengths], dtype=np.bool_)


@dataclass(frozen=True, slots=True)
class C1Crops:
    """Crops of C1 that a cache stores in place of the map: enough for the same training, exactly.

    RoIAlign is linear in each channel and commutes with a 1x1 convolution; the group norm of the
    neck needs the map's first two moments only.

    Attributes:
        query_index: Query of each crop, int64, shape (n,).
        crops: RoIAlign of C1 over the predicted boxes, concatenated, shape (n * r, r, C).
        moments: Mean of c c^T over the cells in the first C rows, mean of c in the last; float32,
            shape (C + 1, C).
        c1_hw: Height and width of the map in cells.
    """

    query_index: NDArray[np.int64]
    crops: StoredMap
    moments: NDArray[np.float32]
    c1_hw: tuple[int, int]


@dataclass(frozen=True, slots=True)
class CachedImage:
    """One image read from a cache. Maps are token-major: row-major cells by channels.

    Attributes:
        file_name: Name relative to the image folder.
        class_logits: float32, shape (Q, K).
        boxes_cxcywh_norm: float32, shape (Q, 4).
        queries: As stored, shape (Q, d).
        maps: Map name to the map as stored; ``np.asarray`` gives its values, shape (h, w, C).
        view: Name of the view; sizes, boxes and ground truth are those of the view's image.
        c1_crops: Crops of C1 where the cache keeps these instead of the map.
    """

    row: int
    image_id: int
    file_name: str
    geometry: ImageGeometry
    class_logits: NDArray[np.float32]
    boxes_cxcywh_norm: NDArray[np.float32]
    queries: NDArray[np.generic]
    maps: dict[str, StoredMap]
    ground_truth: GroundTruth
    view: str = "base"
    c1_crops: C1Crops | None = None
