"""Export: a mask network, with or without its detector, as an ONNX graph."""

import importlib
import json
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mfdetr_cache.detectors.protocol import Detector, fixed_input_hw
from mfdetr_cache.detectors.registry import load_same_detector
from mfdetr_cache.detectors.wrapped import AMP
from mfdetr_cache.errors import ConfigError, DetectorError
from mfdetr_cache.evaluation.detections import class_probabilities
from mfdetr_cache.files import WRITTEN_BY, make_folder, require_free, whole_file
from mfdetr_cache.head.batch import MapGroup
from mfdetr_cache.head.folder import HeadFolder, load_head
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.identity import spec_from_identity
from mfdetr_cache.ops.boxes import cxcywh_to_xyxy
from mfdetr_cache.reporter import Reporter
from mfdetr_pipelines.config.export import ExportConfig

# Has grid_sample with border handling as torch has it, and RoIAlign with half-pixel offsets.
_OPSET = 17
# The producer's name as protobuf has it: one of plain text is no file of ours.
_MARK = bytes([0x12, len(WRITTEN_BY)]) + WRITTEN_BY.encode()
# float32 graphs of this depth agree to 1e-5.
_NOTEWORTHY, _TIE = 0.01, 1e-4
# The first run of a check uses the sizes the graph was traced with, the others do not.
_CHECKED_REGIONS = (20, 7, 1, 0)


@dataclass(frozen=True, slots=True)
class ExportSummary:
    """The ONNX file.

    Attributes:
        inputs: Their shapes by name, as ``outputs``; a word is a dynamic size.
        largest_difference: Between outputs of onnxruntime and torch, relative to the largest value.
    """

    out: Path
    num_bytes: int
    inputs: dict[str, list[str]]
    outputs: dict[str, list[str]]
    largest_difference: float


class _HeadGraph(nn.Module):
    """The mask network for one image: a dynamic number of boxes, maps of fixed size."""

    def __init__(self, head: MaskHead, input_hw: tuple[int, int]) -> None:
        super().__init__()
        self.head = head
        self.input_hw = input_hw

    def forward(self, boxes_xyxy: Tensor, queries: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.head.map_names, maps, strict=True))
        group = MapGroup(named, self.input_hw, (0,))
        # Graphs cannot reshape nothing: a region that nobody asked for stands in front, as that of
        # another image, so that no query sees it.
        height, width = self.input_hw
        boxes = torch.cat((boxes_xyxy.new_tensor([[0, 0, width, height]]), boxes_xyxy))
        rois = torch.cat((boxes[:, :1] * 0, boxes), dim=1)
        regions = self.head.align(self.head.fuse(group), rois)
        queries = torch.cat((queries.new_zeros(1, queries.shape[1]), queries))
        other = torch.cat((queries.new_ones(1), boxes_xyxy[:, 0] * 0)).long()
        output = self.head.decode(regions, queries, other)
        if output.mask_iou is None:
            return (output.mask_logits[1:],)
        return output.mask_logits[1:], output.mask_iou[1:]


class _FullGraph(nn.Module):
    """Detector and mask network: from pixels to detections and masks of the best queries."""

    size: Tensor

    def __init__(
        self, detector: Detector, head: MaskHead, input_hw: tuple[int, int], top_k: int
    ) -> None:
        super().__init__()
        # Registered where it is a module, so that the exporter sees its weights.
        self.detector: Any = detector
        self.head = _HeadGraph(head, input_hw)
        self.top_k = min(top_k, detector.spec.num_queries)
        height, width = input_hw
        self.register_buffer("size", torch.tensor([width, height, width, height]).float())

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        output = self.detector.forward(pixel_values)
        scores = class_probabilities(output.class_logits[0], self.detector.spec)
        best = scores.amax(-1).topk(self.top_k).indices
        boxes = cxcywh_to_xyxy(output.boxes_cxcywh_norm[0][best])
        maps = [output.maps[name] for name in self.head.head.map_names]
        masks = self.head(boxes * self.size, output.queries[0][best], *maps)
        return scores[best], boxes, *masks


def run_export(config: ExportConfig, reporter: Reporter) -> ExportSummary:
    """Write an ONNX file and compare its output in onnxruntime with torch's.

    ConfigError if a package or size is missing or the graph cannot be traced, HeadError if there is
    no trained head, IdentityError if head and detector do not belong together.
    """
    require_free(config.out, "--out", _MARK)
    runtime = _packages()
    folder = load_head(config.head)
    if not folder.head.config.roialign or folder.head.config.mask_predictor == "refined":
        raise ConfigError("export needs a head with RoIAlign that leaves the boxes as they are")
    if config.weights is None:
        graph, inputs = _head_graph(config, folder)
        outputs = ["mask_logits", "mask_iou"]
    else:
        graph, inputs = _full_graph(config, folder)
        outputs = ["scores", "boxes_xyxy_norm", "mask_logits", "mask_iou"]
    if folder.head.scoring is None:
        outputs.remove("mask_iou")
    per_region = {"boxes_xyxy", "queries", *outputs} if config.weights is None else set()
    reporter.say(f"tracing {'head' if config.weights is None else 'detector and head'}")
    make_folder(config.out.parent)
    with whole_file(config.out) as partial:
        _trace(graph, inputs, outputs, per_region, partial)
        _describe(partial, folder)
        session = runtime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
    difference = _largest_difference(graph, session, inputs, per_region)
    if difference > _NOTEWORTHY:
        reporter.warn(
            f"onnxruntime's outputs differ from torch's by {difference:.1e} of the largest value; "
            "look at its masks before you use it"
        )
    return ExportSummary(
        out=config.out,
        num_bytes=config.out.stat().st_size,
        inputs={i.name: [str(s) for s in i.shape] for i in session.get_inputs()},
        outputs={o.name: [str(s) for s in o.shape] for o in session.get_outputs()},
        largest_difference=difference,
    )


def _packages() -> Any:  # noqa: ANN401  a module
    try:
        importlib.import_module("onnx")
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ConfigError(f"export: {error}; pip install 'mfdetr-cache[onnx]'") from None


def _head_graph(config: ExportConfig, folder: HeadFolder) -> tuple[nn.Module, dict[str, Tensor]]:
    """The graph and an example of its inputs, in order."""
    if config.input_hw is None:
        raise ConfigError("give --input-size HxW, or --weights of a detector with one input size")
    head, spec = folder.head, spec_from_identity(folder.detector)
    random = torch.Generator().manual_seed(0)
    height, width = config.input_hw
    corners = torch.rand(_CHECKED_REGIONS[0], 2, 2, generator=random).sort(dim=1).values
    boxes = (corners * torch.tensor([width, height])).flatten(1)
    queries = torch.randn(len(boxes), spec.query_dim, generator=random)
    inputs = {"boxes_xyxy": boxes, "queries": queries}
    by_name = {m.name: m for m in spec.maps}
    for name in head.map_names:
        channels, stride = by_name[name].channels, by_name[name].stride
        hw = (-(-height // stride), -(-width // stride))
        inputs[name] = torch.randn(1, channels, *hw, generator=random)
    return _HeadGraph(head, config.input_hw).eval(), inputs


def _full_graph(config: ExportConfig, folder: HeadFolder) -> tuple[nn.Module, dict[str, Tensor]]:
    assert config.weights is not None
    detector = load_same_detector(
        config.detector, config.weights, folder.detector, f"head {config.head}"
    )
    if AMP in detector.spec.settings:
        raise ConfigError(
            f"{config.head} was trained on a cache of --amp bf16, which ONNX cannot be told: "
            "export the head alone, without --weights"
        )
    input_hw = config.input_hw or fixed_input_hw(detector)
    if input_hw is None:
        raise ConfigError("this detector's input size follows the image: give --input-size HxW")
    pixels = torch.rand(1, 3, *input_hw, generator=torch.Generator().manual_seed(0))
    graph = _FullGraph(detector, folder.head, input_hw, config.top_k).eval()
    return graph, {"pixel_values": pixels}


def _trace(
    graph: nn.Module,
    inputs: dict[str, Tensor],
    outputs: Sequence[str],
    per_region: Collection[str],
    path: Path,
) -> None:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # Tracing warns about every size that becomes a constant; that is what is wanted.
            warnings.simplefilter("ignore")
            graph(*inputs.values())  # tables of this input size are constants from now on
            torch.onnx.export(
                graph,
                tuple(inputs.values()),
                str(path),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes={name: {0: "regions"} for name in per_region},
                opset_version=_OPSET,
                dynamo=False,
            )
    except (RuntimeError, torch.onnx.OnnxExporterError) as error:
        reason = str(error).splitlines()[0][:200]
        raise DetectorError(
            f"this cannot be traced to ONNX ({reason}); without --weights the head alone can"
        ) from error


def _describe(path: Path, folder: HeadFolder) -> None:
    """Write metadata into the file: categories, detector, meaning of the outputs."""
    onnx = importlib.import_module("onnx")
    model = onnx.load(str(path))
    model.producer_name = WRITTEN_BY
    notes = {
        "detector": str(folder.detector["name"]),
        "weights_sha256": str(folder.detector["weights_sha256"]),
        "label_categories": json.dumps(list(folder.run.label_categories)),
        "categories": json.dumps(list(folder.run.categories)),
        "mask_logits": "over each box; sigmoid, resize to the box, threshold 0.5",
    }
    for key, value in notes.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    _sample_in_float32(onnx, model)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _sample_in_float32(onnx: Any, model: Any) -> None:  # noqa: ANN401  modules and their objects
    """Cast the grids of GridSample, which onnxruntime has in single precision only.

    Tracing turns sizes that torch keeps as integers into float64 constants; detectors that divide
    coordinates by them (transformers' Deformable DETR) get float64 grids.
    """
    for index, node in reversed(list(enumerate(model.graph.node))):
        if node.op_type == "GridSample":
            grid = f"{node.output[0]}_grid_float32"
            cast = onnx.helper.make_node(
                "Cast", [node.input[1]], [grid], name=grid, to=onnx.TensorProto.FLOAT
            )
            node.input[1] = grid
            model.graph.node.insert(index, cast)


def _largest_difference(
    graph: nn.Module,
    session: Any,  # noqa: ANN401  onnxruntime ships no types
    inputs: dict[str, Tensor],
    per_region: Collection[str],
) -> float:
    """Relative to the largest value, over all outputs and several numbers of regions."""
    wanted = {i.name for i in session.get_inputs()}
    worst = 0.0
    for count in _CHECKED_REGIONS if per_region else (None,):
        some = {name: v[:count] if name in per_region else v for name, v in inputs.items()}
        found = session.run(None, {name: v.numpy() for name, v in some.items() if name in wanted})
        with torch.no_grad():
            expected = [output.numpy() for output in graph(*some.values())]
        if not per_region:
            expected, found = _paired(expected, found)
        for ours, theirs in zip(expected, found, strict=True):
            scale = max(float(np.abs(ours).max(initial=0)), 1e-12)
            worst = max(worst, float(np.abs(ours - theirs).max(initial=0)) / scale)
    return worst


def _paired(
    ours: list[NDArray[np.float32]], theirs: list[NDArray[np.float32]]
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
    """Outputs for queries, each beside that of the other side with the nearest scores and box.

    Queries with nearly equal scores change places by rounding, or leave the best ones.
    """
    best = ours[0].max(axis=1)
    sure = best > best.min() + _TIE
    ours = [output[sure] for output in ours] if sure.any() else ours
    rows, others = (np.concatenate(outputs[:2], axis=1) for outputs in (ours, theirs))
    nearest = np.array([np.abs(others - row).max(axis=1).argmin() for row in rows])
    return ours, [output[nearest] for output in theirs]
