"""An official detector behind the Detector protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mfdetr_cache.detectors.checkpoint import read_checkpoint
from mfdetr_cache.detectors.labels import names_of_checkpoint, output_names
from mfdetr_cache.detectors.official.architecture import (
    ARCHITECTURES,
    Architecture,
    Scheme,
    read_architecture,
)
from mfdetr_cache.detectors.official.detr import WIDTH, OfficialDetr
from mfdetr_cache.detectors.official.layouts import Source, read_source
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.preprocess import (
    PreprocessedDetector,
    scale_to_image,
    with_enough_cells,
)
from mfdetr_cache.detectors.weights import (
    TunedPart,
    freeze,
    parameters_of_part,
    require_complete,
    weights_sha256,
    write_checkpoint,
)
from mfdetr_cache.errors import DetectorError
from mfdetr_cache.ops.packed_levels import tokens_to_maps
from mfdetr_cache.types import DetectorOutput, DetectorSpec, MapSpec

SCHEMES: tuple[Scheme, ...] = ("deformable-detr", "h-detr", "dino")
# A checkpoint of detrex does not say the temperature of its position encoding: 10,000 but for the
# published dino_r50_4scale_24ep.
DINO_T20 = "dino-t20"


class OfficialDetector(PreprocessedDetector):
    """Deformable DETR, H-DETR or DINO, frozen; without ``source`` its weights are untrained.

    ``name`` stands in the identity of its caches. ``class_names`` are ignored unless there is one
    for every output. DetectorError if an option does not fit the model.
    """

    def __init__(
        self,
        name: str,
        model: OfficialDetr,
        options: DetectorOptions,
        class_names: Sequence[str] = (),
        source: Source | None = None,
    ) -> None:
        source = source or Source("official", {})
        super().__init__(source.preprocessing.with_size(options.input_size))
        self.model = model
        freeze(model)
        architecture = model.architecture
        layer = options.encoder_layer or min(4, architecture.encoder_layers)
        if not 1 <= layer <= architecture.encoder_layers:
            raise DetectorError(
                f"--encoder-layer {layer}: {name} has 1 to {architecture.encoder_layers}"
            )
        queries = options.num_queries or source.num_queries or architecture.num_queries
        most = architecture.table_rows or 900
        if not 1 <= queries <= most:
            raise DetectorError(f"--num-queries {queries}: {name} has 1 to {most}")
        model.num_queries = queries
        self.eval()
        self._layer = layer
        self._source = source
        outputs = architecture.num_labels
        if source.layout == "official":
            # Numbered by category id, in most trainings; that of their names is not told.
            known = dict(enumerate(class_names)) if len(class_names) == outputs else {}
        else:
            known = names_of_checkpoint(outputs, class_names)
        self.spec = DetectorSpec(
            name=name,
            weights_sha256=weights_sha256(model),
            num_queries=queries,
            query_dim=WIDTH,
            num_labels=architecture.num_labels,
            score_function="sigmoid",
            label_names=output_names(outputs, known, options.labels, name),
            maps=_map_specs(architecture, layer),
            encoder_level_embed=tuple(map(tuple, model.transformer.level_embed.tolist())),
            preprocessing=self._preprocessing.to_dict(),
            settings={
                "scheme": architecture.scheme,
                "backbone": architecture.backbone.label,
                "encoder_layer": layer,
                **source.settings(),
                **({"labels": "given"} if options.labels else {}),
                "precision": "float32",
                "batch_size": 1,
            },
        )

    def forward(self, pixel_values: Tensor, padding_mask: Tensor | None = None) -> DetectorOutput:
        """See :meth:`Detector.forward`; maps are ``encoder4`` to ``encoder64`` and ``c1``.

        Pixels of the padding are zero, or NaN as :meth:`preprocess` gives them.
        """
        pixel_values, padding = self._filled(pixel_values)
        attended = self._preprocessing.pad_value is not None
        if padding is not None:
            padding_mask = None if attended else padding
        with with_enough_cells(pixel_values):
            output = self.model(pixel_values, padding_mask, keep_layers=(self._layer,))
        levels = tokens_to_maps(output.encoder_tokens[self._layer], output.sizes_hw)
        encoder = [m.name for m in self.spec.maps if m.role == "encoder"]
        maps = {"c1": output.stages[0], **dict(zip(encoder, levels, strict=True))}
        boxes = output.boxes_cxcywh_norm
        if padding is not None and attended:  # relative to what it attends to
            boxes = boxes * scale_to_image(padding)
        return DetectorOutput(output.class_logits, boxes, output.queries, maps)

    def tunable_parameters(self, part: TunedPart) -> list[nn.Parameter]:
        """Parameters of a part; see :class:`~mfdetr_cache.detectors.protocol.TunableDetector`."""
        return parameters_of_part(self.model, self.model.backbone, part)

    def save_weights(self, folder: Path) -> str:
        """Write a checkpoint in the form of the one that was read."""
        return write_checkpoint(folder, self._source.document(self.model.state_dict()))


def _map_specs(architecture: Architecture, layer: int) -> tuple[MapSpec, ...]:
    backbone = architecture.backbone
    first = 4 << backbone.first_stage
    source = f"encoder layer {layer}"
    levels = [
        MapSpec(f"encoder{first << i}", "encoder", first << i, WIDTH, source)
        for i in range(architecture.num_levels)
    ]
    after = "layer1, after its ReLU" if backbone.kind == "resnet" else "stage 1, without norm"
    return (MapSpec("c1", "c1", 4, backbone.width, f"backbone {after}"), *levels)


def load_official_detector(
    name: str, weights: str | None, options: DetectorOptions
) -> OfficialDetector:
    """A detector of the paper from its published checkpoint, frozen, on the CPU.

    ``name`` is one of ``ARCHITECTURES``, or a scheme alone where the backbone may be any;
    :data:`DINO_T20` is a DINO of detrex with DINO's own position encoding. Without ``weights`` the
    named architecture has untrained ones. DetectorError if the checkpoint is of another detector,
    or its keys do not fit.
    """
    if weights is None:
        if name not in ARCHITECTURES:
            raise DetectorError(f"--detector {name} needs --weights: a checkpoint file")
        torch.manual_seed(0)
        return OfficialDetector(name, OfficialDetr(ARCHITECTURES[name]), options)
    checkpoint = read_checkpoint(Path(weights))
    source = read_source(checkpoint, 20.0 if name == DINO_T20 else 10000.0)
    architecture = read_architecture(
        source.tensors, weights, source.layout, source.arithmetic, by_channel=source.by_channel
    )
    if name == DINO_T20 and source.layout != "detrex":
        raise DetectorError(f"{weights} says its position encoding; pass --detector dino")
    _require_named(name.removesuffix("-t20"), architecture, weights)
    with torch.device("meta"):
        model = OfficialDetr(architecture)
    model = model.to_empty(device="cpu")
    _load(model, source.tensors, weights)
    return OfficialDetector(name, model, options, checkpoint.class_names, source)


def _require_named(name: str, architecture: Architecture, weights: str) -> None:
    """Refuse a checkpoint of another scheme or another family of backbones than was named."""
    wanted = ARCHITECTURES.get(name)
    scheme = wanted.scheme if wanted is not None else name
    same = scheme == architecture.scheme
    if wanted is not None:
        same = same and wanted.backbone.kind == architecture.backbone.kind
    if not same:
        raise DetectorError(
            f"{weights} holds {architecture.scheme} with {architecture.backbone.label}, not "
            f"{name}; pass --detector {architecture.scheme}"
        )


def _load(model: OfficialDetr, tensors: Mapping[str, Tensor], weights: str) -> None:
    expected = model.state_dict()
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    # Computed, not learned; some files leave it out.
    missing = {k for k in missing if not k.endswith("relative_position_index")}
    require_complete(weights, missing, unexpected)
    indices = {k: v for k, v in _window_indices(model.architecture).items() if k in expected}
    merged = {k: v.to(expected[k].dtype) for k, v in tensors.items()} | indices
    wrong = [k for k, v in merged.items() if v.shape != expected[k].shape]
    if wrong:
        key = wrong[0]
        raise DetectorError(
            f"{weights}: {key} is {tuple(merged[key].shape)}, expected {tuple(expected[key].shape)}"
        )
    _require_tied(model, tensors, weights)
    model.load_state_dict(merged)


def _window_indices(architecture: Architecture) -> dict[str, Tensor]:
    """Swin's integer tables, computed: they are not weights, and may be damaged in a file."""
    if architecture.backbone.kind != "swin":
        return {}
    full = OfficialDetr(
        replace(architecture, encoder_layers=0, decoder_layers=0, num_labels=1, table_rows=1)
    )
    return {k: v for k, v in full.state_dict().items() if k.endswith("relative_position_index")}


def _require_tied(model: OfficialDetr, tensors: Mapping[str, Tensor], weights: str) -> None:
    first: dict[int, str] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        canonical = first.setdefault(id(tensor), key)
        if canonical != key and not torch.equal(tensors[key], tensors[canonical]):
            raise DetectorError(
                f"{weights}: {key} and {canonical} are shared in this detector, but differ here"
            )
