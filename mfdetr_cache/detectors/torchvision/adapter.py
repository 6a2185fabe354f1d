"""A torchvision detector without queries behind the Detector protocol."""

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image

from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.weights import freeze, weights_sha256
from mfdetr_cache.errors import DetectorError
from mfdetr_cache.ops.boxes import xyxy_to_cxcywh
from mfdetr_cache.types import ABSENT_LOGIT, DetectorOutput, DetectorSpec, ImageGeometry, MapSpec

# Where the score is 1 to the last bit of float32; the logit of 1 is infinite.
_SURE = 1e-9
_POOLED_STRIDES = (8, 16, 32)
_PROBE_SIDE = 256


class TorchvisionDetector(nn.Module):
    """A frozen Faster R-CNN, RetinaNet or FCOS; a query is one detection after its NMS.

    An image with fewer detections than queries has absent ones at the end. The query vector is what
    the box head (Faster R-CNN) makes of the detection's proposal, the input of its classifier. The
    others have no box head: the mean of one level of the pyramid over the box, pooled as box heads
    of torchvision do (the level by the box's size, and cells half a cell to the right and below).

    The ``model`` has its weights, and its transform is replaced; Faster R-CNN's background is no
    label. ``settings`` beside the weights change the outputs. DetectorError if an option does not
    fit the model.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        label_names: tuple[str, ...],
        settings: Mapping[str, object],
        options: DetectorOptions,
    ) -> None:
        super().__init__()
        if options.encoder_layer is not None:
            raise DetectorError(f"--encoder-layer: {name} has a feature pyramid and no layers")
        self.model: Any = freeze(model)
        self._transform: Any = self.model.transform
        self.model.transform = _Prepared(self._transform)
        self.eval()
        self._two_stage = isinstance(model, FasterRCNN)
        # What cuts the list of detections.
        self._last_stage = cast(Any, getattr(model, "roi_heads", model))
        if options.num_queries:
            self._last_stage.detections_per_img = options.num_queries
        if options.score_threshold is not None:
            self._last_stage.score_thresh = options.score_threshold
        self._kept: dict[str, Any] = {}
        self._hook()
        self._maps: dict[str, tuple[MapSpec, str]] = {}
        self._pool: Any = None
        self.spec = self._probe(name, label_names, settings, options)

    def input_geometry(self, original_hw: tuple[int, int], shortest_edge: int = 0) -> ImageGeometry:
        """See :meth:`Detector.input_geometry`; sizes are truncated, as torch does it."""
        edge = shortest_edge or self._transform.min_size[-1]
        scale = min(edge / min(original_hw), self._transform.max_size / max(original_hw))
        height, width = (math.floor(float(side) * scale) for side in original_hw)
        return ImageGeometry(original_hw, (height, width), (height, width))

    def preprocess(self, image: Image.Image, shortest_edge: int = 0) -> Tensor:
        """See :meth:`Detector.preprocess`; torchvision normalises first and does not antialias."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
        transform = self._transform
        if shortest_edge:
            transform = GeneralizedRCNNTransform(
                shortest_edge, transform.max_size, transform.image_mean, transform.image_std
            ).eval()
        resized: Tensor = transform.resize(transform.normalize(pixels))[0]
        return resized.contiguous()

    def forward(self, pixel_values: Tensor, padding_mask: Tensor | None = None) -> DetectorOutput:
        """See :meth:`Detector.forward`; ValueError for padding, which these models do not mask."""
        if padding_mask is not None and bool(padding_mask.any()):
            raise ValueError(f"{self.spec.name} cannot respect padding; give equal sizes")
        size_hw = (pixel_values.shape[-2], pixel_values.shape[-1])
        found, features = self._run(pixel_values)
        vectors = self._vectors(found, features, size_hw)
        size = pixel_values.new_tensor([size_hw[1], size_hw[0]] * 2)
        logits, boxes, queries = zip(
            *(self._filled(d, v, size) for d, v in zip(found, vectors, strict=True)), strict=True
        )
        of_model = {**features, **self._kept}
        maps = {
            name: of_model[key][..., : _cells(size_hw[0], spec), : _cells(size_hw[1], spec)]
            for name, (spec, key) in self._maps.items()
        }
        self._kept = {}
        return DetectorOutput(torch.stack(logits), torch.stack(boxes), torch.stack(queries), maps)

    def _run(self, pixel_values: Tensor) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections of each image in input pixels, and the pyramid of the padded images."""
        found = self.model(list(pixel_values))
        return found, dict(self._kept["pyramid"])

    def _vectors(
        self,
        found: list[dict[str, Tensor]],
        features: dict[str, Tensor],
        size_hw: tuple[int, int],
    ) -> list[Tensor]:
        if self._two_stage:
            return self._vectors_of_proposals(found, size_hw)
        boxes = [d["boxes"] for d in found]
        pooled: Tensor = self._pool(features, boxes, [size_hw] * len(found))
        return list(pooled.mean((2, 3)).split([b.shape[0] for b in boxes]))

    def _vectors_of_proposals(
        self, found: list[dict[str, Tensor]], size_hw: tuple[int, int]
    ) -> list[Tensor]:
        """Of the proposal that became the detection, which the model does not tell.

        It is the one whose score and box for the label are those of the detection.
        """
        proposals, (logits, deltas) = self._kept["proposals"][0], self._kept["predicted"]
        counts = [p.shape[0] for p in proposals]
        decoded = self.model.roi_heads.box_coder.decode(deltas, proposals)
        scores = logits.softmax(-1)
        vectors = []
        for detections, box, score, vector in zip(
            found,
            clip_boxes_to_image(decoded, size_hw).split(counts),
            scores.split(counts),
            self._kept["vectors"].split(counts),
            strict=True,
        ):
            labels = detections["labels"]
            gap = (box[:, labels] - detections["boxes"]).abs().sum(-1)
            gap = gap + (score[:, labels] - detections["scores"]).abs()
            # One more row, since there may be no proposals.
            gap = functional.pad(gap, (0, 0, 0, 1), value=float("inf"))
            vectors.append(vector[gap.argmin(0)])
        return vectors

    def _filled(
        self, found: dict[str, Tensor], vectors: Tensor, size: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (Q, K), boxes (Q, 4) and queries (Q, d) of one image, absent ones at the end."""
        labels = found["labels"] - (1 if self._two_stage else 0)
        sure = torch.logit(found["scores"].double(), eps=_SURE).float()
        columns = torch.arange(self.spec.num_labels, device=labels.device)
        logits = torch.where(columns == labels[:, None], sure[:, None], ABSENT_LOGIT)

        # Without a size that a trace to ONNX would keep: other images have other detections.
        def filled(rows: Tensor, value: float = 0.0) -> Tensor:
            count = self.spec.num_queries
            return torch.cat((rows, rows.new_full((count, rows.shape[1]), value)))[:count]

        boxes = xyxy_to_cxcywh(found["boxes"] / size)
        return filled(logits, ABSENT_LOGIT), filled(boxes), filled(vectors)

    def _hook(self) -> None:
        """Collect what the model computes on its way to the detections."""

        def keep(module: nn.Module, name: str) -> None:
            def hook(_module: nn.Module, _args: object, output: object) -> None:
                self._kept[name] = output

            module.register_forward_hook(hook)

        keep(self.model.backbone, "pyramid")
        for name, stage in self.model.backbone.body.named_children():
            keep(stage, f"body.{name}")
        if self._two_stage:
            keep(self.model.rpn, "proposals")
            keep(self.model.roi_heads.box_head, "vectors")
            keep(self.model.roi_heads.box_predictor, "predicted")

    def _probe(
        self,
        name: str,
        label_names: tuple[str, ...],
        settings: Mapping[str, object],
        options: DetectorOptions,
    ) -> DetectorSpec:
        """Run once on a blank square: channels and strides are read off the real maps.

        RoIAlign of torchvision takes the scale of its levels from the first image that it sees,
        which would be wrong for a very flat one.
        """
        with torch.no_grad():
            _, features = self._run(torch.zeros(1, 3, _PROBE_SIDE, _PROBE_SIDE))
        self._maps = self._choose_maps(features, stride8=options.backbone_stride8)
        width = int(next(iter(features.values())).shape[1])
        if self._two_stage:
            width = int(self._kept["vectors"].shape[1])
        else:
            levels = [k for k, v in features.items() if _stride(v) in _POOLED_STRIDES]
            self._pool = MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2).eval()
            self._pool(features, [torch.zeros(1, 4)], [(_PROBE_SIDE, _PROBE_SIDE)])
        return DetectorSpec(
            name=name,
            weights_sha256=weights_sha256(self.model),
            num_queries=self._last_stage.detections_per_img,
            query_dim=width,
            num_labels=len(label_names),
            score_function="sigmoid",
            label_names=label_names,
            maps=tuple(spec for spec, _ in self._maps.values()),
            preprocessing={
                "resize": "torch, bilinear, not antialiased, after normalisation",
                "shortest_edge": self._transform.min_size[-1],
                "longest_edge": self._transform.max_size,
                "mean": list(self._transform.image_mean),
                "std": list(self._transform.image_std),
                "pad_to_multiple": self._transform.size_divisible,
            },
            settings={
                "torchvision_class": type(self.model).__name__,
                "score_thresh": self._last_stage.score_thresh,
                "nms_thresh": self._last_stage.nms_thresh,
                **settings,
                "precision": "float32",
                "batch_size": 1,
            },
        )

    def _choose_maps(
        self, features: dict[str, Tensor], *, stride8: bool
    ) -> dict[str, tuple[MapSpec, str]]:
        """The pyramid from stride 8, and the backbone's last output of stride 4, C1.

        P2 is left out, since C1 has its stride and every head would take it for a level; so is
        "pool", which is every second cell of P5.
        """
        chosen: dict[str, tuple[MapSpec, str]] = {}
        for key, feature in features.items():
            stride = _stride(feature)
            if stride >= 8 and key != "pool":
                name, width = f"encoder{stride}", feature.shape[1]
                spec = MapSpec(name, "encoder", stride, width, f"FPN {key}")
                # Two levels of MobileNet have stride 32.
                chosen.setdefault(spec.name, (spec, key))
        stages = {k: v for k, v in self._kept.items() if k.startswith("body.")}
        for key, feature in stages.items():
            stride, source = _stride(feature), f"backbone {key.removeprefix('body.')}"
            if stride == 4:
                chosen["c1"] = MapSpec("c1", "c1", 4, feature.shape[1], source), key
            elif stride == 8 and stride8 and "encoder8" not in chosen:
                spec = MapSpec("backbone8", "backbone", 8, feature.shape[1], source)
                chosen["backbone8"] = spec, key
        return dict(sorted(chosen.items(), key=lambda item: (item[1][0].stride, item[0])))


class _Prepared(nn.Module):
    """Stands for a model's transform where images are resized already: pads them, and no more."""

    def __init__(self, transform: Any) -> None:  # noqa: ANN401  torchvision has no types
        super().__init__()
        self._transform = transform

    def forward(self, images: list[Tensor], targets: None = None) -> tuple[ImageList, None]:
        """Images of any size, padded on the right and the bottom."""
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        padded = self._transform.batch_images(images, self._transform.size_divisible)
        return ImageList(padded, sizes), targets

    def postprocess(
        self, found: list[dict[str, Tensor]], *_sizes: object
    ) -> list[dict[str, Tensor]]:
        """Detections in pixels of the images given."""
        return found


def _stride(feature: Tensor) -> int:
    return _PROBE_SIDE // int(feature.shape[-2])


def _cells(side: int, spec: MapSpec) -> int:
    """Cells of a map that see the image; the others see padding alone."""
    return (side + spec.stride - 1) // spec.stride
