"""A transformers detector behind the Detector protocol."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfdetr_cache.detectors.huggingface.families import (
    Family,
    backbone_stages,
    first_tensor,
    stage_map,
)
from mfdetr_cache.detectors.huggingface.prompt import Prompt
from mfdetr_cache.detectors.labels import output_names
from mfdetr_cache.detectors.options import NO_OBJECT, DetectorOptions
from mfdetr_cache.detectors.preprocess import (
    PreprocessedDetector,
    Preprocessing,
    scale_to_image,
    with_enough_cells,
)
from mfdetr_cache.detectors.weights import TunedPart, freeze, parameters_of_part, weights_sha256
from mfdetr_cache.errors import DetectorError
from mfdetr_cache.ops.packed_levels import SizesHw, tokens_to_maps
from mfdetr_cache.types import DetectorOutput, DetectorSpec, MapSpec


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a model was loaded from, and how its weights are saved.

    Attributes:
        name: Detector name in the identity of its caches.
        where: The weights, for messages.
        known_names: Class names stored with the weights, by output.
        settings: Settings beside the weights that change the outputs.
        save: Writes the current weights into a folder; returns the value for ``--weights``.
        spare_outputs: Maximum number of class outputs without a class.
        num_classes: What its training counted as classes, where the weights tell.
        prompt: What it looks for, where it takes that.
    """

    name: str
    where: str
    known_names: Mapping[int, str]
    settings: Mapping[str, object]
    save: Callable[[Path], str]
    spare_outputs: int = 0
    num_classes: int | None = None
    prompt: Prompt | None = None


class HuggingFaceDetector(PreprocessedDetector):
    """A frozen transformers detector; forward hooks collect queries and maps for the mask network.

    ``model`` is of the ``family``, its weights loaded and corrected. DetectorError if an option
    does not fit it.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        origin: Origin,
        preprocessing: Preprocessing,
        options: DetectorOptions,
    ) -> None:
        super().__init__(preprocessing)
        self.model: Any = freeze(model)
        self._origin = origin
        self.eval()
        self._family = family
        self._options = options
        self._stage_maps: dict[int, Tensor] = {}
        self._layer_tokens: Tensor | None = None
        self._level_sizes: SizesHw = ()
        self._projected: list[Tensor] = []
        self._encoder_layer = self._hook_encoder()
        self._hook_backbone()
        _keep_position_tables(self.model)
        self._map_keys: list[tuple[MapSpec, str, int]] = []
        self.spec = self._probe()

    def forward(self, pixel_values: Tensor, padding_mask: Tensor | None = None) -> DetectorOutput:
        """See :meth:`Detector.forward`; ValueError for padding that the model ignores."""
        pixel_values, padding = self._filled(pixel_values)
        if padding is not None:
            padding_mask = padding if self._family.takes_mask else None
        with with_enough_cells(pixel_values):
            outputs, encoder_maps = self._run(pixel_values, padding_mask)
        maps = {
            spec.name: encoder_maps[index] if role == "encoder" else self._stage_maps[index]
            for spec, role, index in self._map_keys
        }
        logits, boxes = self._class_logits(outputs), outputs.pred_boxes
        if padding is not None:  # transformers trains them to the padded input
            boxes = boxes * scale_to_image(padding)
        queries = outputs.last_hidden_state
        if self.spec.num_queries < logits.shape[1]:
            best = logits.max(-1).values.topk(self.spec.num_queries, dim=1).indices
            # The original order is kept, so that a cache of all queries and one of the best
            # differ in what is missing and in nothing else.
            best = best.sort(dim=1).values
            logits, boxes, queries = (
                t.gather(1, best[..., None].expand(-1, -1, t.shape[-1]))
                for t in (logits, boxes, queries)
            )
        self._stage_maps = {}
        self._layer_tokens = None
        self._projected = []
        return DetectorOutput(logits, boxes, queries, maps)

    def tunable_parameters(self, part: TunedPart) -> list[nn.Parameter]:
        """Parameters of a part; see :class:`~mfdetr_cache.detectors.protocol.TunableDetector`."""
        return parameters_of_part(self.model, self._family.backbone(self.model), part)

    def save_weights(self, folder: Path) -> str:
        """Write weights that the same ``--detector`` takes."""
        return self._origin.save(folder)

    def _run(self, pixel_values: Tensor, padding_mask: Tensor | None) -> tuple[Any, list[Tensor]]:
        arguments: dict[str, Tensor] = {}
        if self._family.takes_mask:
            valid = torch.ones_like(pixel_values[:, 0], dtype=torch.long)
            if padding_mask is not None:
                valid = (~padding_mask).long()
            arguments["pixel_mask"] = valid
        elif padding_mask is not None and bool(padding_mask.any()):
            raise ValueError(f"{self._family.label} cannot respect padding; give equal sizes")
        if self._origin.prompt is not None:
            ids = torch.tensor(self._origin.prompt.token_ids, device=pixel_values.device)
            arguments["input_ids"] = ids.expand(len(pixel_values), -1)
        outputs = self.model(pixel_values, **arguments)
        if self._family.encoder_maps == "outputs":
            return outputs, list(outputs.encoder_last_hidden_state)
        if self._family.encoder_maps == "projector":
            return outputs, self._projected
        assert self._layer_tokens is not None
        if self._family.encoder_maps == "tokens":
            last = self._stage_maps[max(self._stage_maps)]
            self._level_sizes = ((int(last.shape[-2]), int(last.shape[-1])),)
        return outputs, tokens_to_maps(self._layer_tokens, self._level_sizes)

    def _class_logits(self, outputs: Any) -> Tensor:  # noqa: ANN401
        logits: Tensor = outputs.logits
        return logits if self._origin.prompt is None else self._origin.prompt.class_logits(logits)

    def _hook_backbone(self) -> None:
        def keep(index: int) -> Any:  # noqa: ANN401
            def hook(_module: nn.Module, _args: object, output: object) -> None:
                self._stage_maps[index] = stage_map(output)

            return hook

        for index, stage in enumerate(backbone_stages(self._family.backbone(self.model))):
            stage.register_forward_hook(keep(index))

    def _hook_encoder(self) -> int | None:
        """Collect what stands for the encoder; the layer, where it has layers."""
        inner: Any = self.model.model
        if self._family.encoder_maps == "projector":

            def keep_projected(_module: nn.Module, _args: object, output: object) -> None:
                several = isinstance(output, (tuple, list))
                self._projected = list(output) if several else [first_tensor(output)]  # type: ignore[call-overload]

            inner.backbone.projector.register_forward_hook(keep_projected)
        if self._family.encoder_maps in ("outputs", "projector"):
            if self._options.encoder_layer is not None:
                raise DetectorError(
                    f"--encoder-layer {self._options.encoder_layer}: the encoder of "
                    f"{self._family.label} is no stack of layers over all levels; leave it out"
                )
            return None
        encoder = inner.encoder
        count = len(encoder.layers)
        layer = self._options.encoder_layer or min(4, count)
        if not 1 <= layer <= count:
            raise DetectorError(f"--encoder-layer {layer}: {self._family.label} has 1 to {count}")

        def keep_sizes(_module: nn.Module, _args: object, kwargs: dict[str, Any]) -> None:
            self._level_sizes = tuple((int(h), int(w)) for h, w in kwargs["spatial_shapes_list"])

        def keep_tokens(_module: nn.Module, _args: object, output: object) -> None:
            self._layer_tokens = first_tensor(output)

        if self._family.encoder_maps == "layers":
            encoder.register_forward_pre_hook(keep_sizes, with_kwargs=True)
        encoder.layers[layer - 1].register_forward_hook(keep_tokens)
        return layer

    def _probe(self) -> DetectorSpec:
        """Run once on a blank image: channels and strides are read off the real maps."""
        height, width = self.input_geometry((480, 640)).input_hw
        blank = torch.zeros(1, 3, height, width)
        try:
            with torch.no_grad():
                outputs, encoder_maps = self._run(blank, None)
        except (RuntimeError, IndexError) as error:  # also of class heads without an output
            said = str(error).partition("\n")[0]
            if "selected index k" in said:
                said = "it has more queries than cells in its maps"
            raise DetectorError(
                f"{self._origin.where} does not run at {height} x {width}: {said}; is its "
                "--input-size large enough, and are its weights whole?"
            ) from error
        self._map_keys = self._choose_maps(encoder_maps, height)
        num_queries = int(outputs.logits.shape[1])
        kept = self._options.num_queries or num_queries
        if not 1 <= kept <= num_queries:
            raise DetectorError(f"--num-queries {kept}: this detector has 1 to {num_queries}")
        num_labels = int(self._class_logits(outputs).shape[-1])
        nothing = (NO_OBJECT,) if self._family.score_function == "softmax" else ()
        given = self._options.labels
        names = output_names(
            num_labels - len(nothing),
            self._origin.known_names,
            given,
            self._origin.where,
            self._origin.spare_outputs,
            self._origin.num_classes,
        )
        embed = getattr(self.model.model, "level_embed", None)
        settings: dict[str, object] = {
            "transformers_class": type(self.model).__name__,
            **self._origin.settings,
            "precision": "float32",
            "batch_size": 1,
        }
        if given:
            settings["labels"] = "given"
        if self._origin.prompt is not None:
            settings["prompt"] = list(self._origin.prompt.phrases)
            # The vocabulary is no part of the weights.
            settings["token_ids"] = list(self._origin.prompt.token_ids)
        if self._encoder_layer is not None:
            settings["encoder_layer"] = self._encoder_layer
        return DetectorSpec(
            name=self._origin.name,
            weights_sha256=weights_sha256(self.model),
            num_queries=kept,
            query_dim=int(outputs.last_hidden_state.shape[-1]),
            num_labels=num_labels,
            score_function=self._family.score_function,
            label_names=(*names, *nothing),
            maps=tuple(spec for spec, _, _ in self._map_keys),
            encoder_level_embed=tuple(map(tuple, embed.tolist())) if embed is not None else None,
            preprocessing=self._preprocessing.to_dict(),
            settings=settings,
        )

    def _choose_maps(
        self, encoder_maps: list[Tensor], height: int
    ) -> list[tuple[MapSpec, str, int]]:
        def stride_of(feature: Tensor) -> int:
            ratio = height / feature.shape[-2]
            # A ViT's patches divide its input; strided convolutions round, but halve each time.
            if self._family.encoder_maps == "projector":
                return round(ratio)
            return 1 << round(math.log2(ratio))

        layer = f"encoder layer {self._encoder_layer}" if self._encoder_layer else "encoder output"
        if self._family.encoder_maps == "projector":
            layer = "projector"
        chosen: list[tuple[MapSpec, str, int]] = []
        for index, feature in enumerate(encoder_maps):
            stride = stride_of(feature)
            spec = MapSpec(f"encoder{stride}", "encoder", stride, feature.shape[1], layer)
            chosen.append((spec, "encoder", index))
        strides = {spec.stride for spec, _, _ in chosen}
        for index, feature in sorted(self._stage_maps.items()):
            stride, source = stride_of(feature), f"backbone stage {index + 1}"
            if stride == 4:
                spec = MapSpec("c1", "c1", stride, feature.shape[1], source)
                chosen.append((spec, "stage", index))
            elif stride == 8 and 8 not in strides and self._options.backbone_stride8:
                spec = MapSpec("backbone8", "backbone", stride, feature.shape[1], source)
                chosen.append((spec, "stage", index))
        return sorted(chosen, key=lambda item: (item[0].stride, item[0].role))


def _keep_position_tables(model: Any) -> None:  # noqa: ANN401
    """Trace the position table of a ViT as the constant that it is at one input size.

    transformers interpolates it in every trace, with a filter that ONNX does not have.
    """
    for module in model.modules():
        interpolate = getattr(module, "interpolate_pos_encoding", None)
        if callable(interpolate):
            module.interpolate_pos_encoding = _PositionTable(interpolate)


class _PositionTable:
    """The position table of an input size; that of the last size is a constant in a trace."""

    def __init__(self, interpolate: Callable[..., Tensor]) -> None:
        self._interpolate = interpolate
        self._last: tuple[tuple[int, int], Tensor] | None = None

    def __call__(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        size = (int(height), int(width))
        if torch.onnx.is_in_onnx_export() and self._last is not None and self._last[0] == size:
            return self._last[1]
        table = self._interpolate(embeddings, height, width)
        self._last = size, table.detach()
        return table
