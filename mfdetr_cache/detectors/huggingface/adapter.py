"""A transformers detector behind the Detector protocol."""

import contextlib
import io
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from mfdetr_cache.config import nearest
from mfdetr_cache.detectors.huggingface.families import (
    FAMILIES,
    Family,
    backbone_stages,
    first_tensor,
)
from mfdetr_cache.detectors.maps import tokens_to_maps
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.preprocess import Preprocessing
from mfdetr_cache.detectors.weights import TunedPart, freeze, parameters_of_part, weights_sha256
from mfdetr_cache.errors import DetectorError
from mfdetr_cache.files import write_atomically, writing
from mfdetr_cache.types import DetectorOutput, DetectorSpec, ImageGeometry, MapSpec


class HuggingFaceDetector(nn.Module):
    """A frozen transformers detector: forward hooks collect what the mask network needs.

    Args:
        model: A detection model of a known family, weights loaded and corrected.
        family: How its maps are found.
        named_weights: Its tensors under the names a checkpoint has; the tensors themselves.
        processor: transformers' image processor, which says how images become its input.
        preprocessing: The same as we do it.
        options: What the user chose.

    Raises:
        DetectorError: If an option does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        named_weights: dict[str, Tensor],
        processor: Any,  # noqa: ANN401  transformers has no common type for them
        preprocessing: Preprocessing,
        options: DetectorOptions,
    ) -> None:
        super().__init__()
        self.model: Any = freeze(model)
        self._named_weights = named_weights
        self._processor = processor
        self.eval()
        self._family = family
        self._preprocessing = preprocessing
        self._options = options
        self._stage_maps: dict[int, Tensor] = {}
        self._layer_tokens: Tensor | None = None
        self._level_sizes: list[tuple[int, int]] = []
        self._projected: list[Tensor] = []
        self._encoder_layer = self._hook_encoder()
        self._hook_backbone()
        self._map_keys: list[tuple[MapSpec, str, int]] = []
        self._spec = self._probe()

    @property
    def spec(self) -> DetectorSpec:
        """What this detector is and gives."""
        return self._spec

    def input_geometry(self, original_hw: tuple[int, int], shortest_edge: int = 0) -> ImageGeometry:
        """Sizes an image of the given size gets on its way into the network.

        Args:
            original_hw: Height and width of the image in pixels.
            shortest_edge: Shorter side of the input; 0 for the detector's own.

        Returns:
            The geometry.
        """
        return self._preprocessing.input_geometry(original_hw, shortest_edge)

    def preprocess(self, image: Image.Image, shortest_edge: int = 0) -> Tensor:
        """The network input of one RGB image.

        Args:
            image: An RGB image at its original size.
            shortest_edge: Shorter side of the input; 0 for the detector's own.

        Returns:
            float32, shape (3, H, W).
        """
        return self._preprocessing(image, shortest_edge)

    def forward(self, pixel_values: Tensor, padding_mask: Tensor | None = None) -> DetectorOutput:
        """Run the frozen detector.

        Args:
            pixel_values: Preprocessed images, shape (B, 3, H, W).
            padding_mask: True where a pixel is padding, shape (B, H, W); None for no padding.

        Returns:
            Logits, boxes, queries and maps.

        Raises:
            ValueError: If there is padding and the model cannot respect it.
        """
        outputs, encoder_maps = self._run(pixel_values, padding_mask)
        maps = {
            spec.name: encoder_maps[index] if role == "encoder" else self._stage_maps[index]
            for spec, role, index in self._map_keys
        }
        logits, boxes = outputs.logits, outputs.pred_boxes
        queries = outputs.last_hidden_state
        if self._spec.num_queries < logits.shape[1]:
            best = logits.max(-1).values.topk(self._spec.num_queries, dim=1).indices
            # The original order is kept, so that a cache of all queries and one of the best
            # differ in what is missing and in nothing else.
            best = best.sort(dim=1).values
            logits, boxes, queries = (
                torch.take_along_dim(t, best[..., None], dim=1) for t in (logits, boxes, queries)
            )
        self._stage_maps = {}
        self._layer_tokens = None
        self._projected = []
        return DetectorOutput(logits, boxes, queries, maps)

    def tunable_parameters(self, part: TunedPart) -> list[nn.Parameter]:
        """Parameters of a part; see :class:`~mfdetr_cache.detectors.protocol.TunableDetector`."""
        return parameters_of_part(self.model, self._family.backbone(self.model), part)

    def save_weights(self, folder: Path) -> str:
        """Write a folder that ``--detector hf`` takes."""
        with _quiet(), writing(folder):
            self.model.save_pretrained(folder)
            self._processor.save_pretrained(folder)
        # Under the names of the checkpoint, which a correction may have changed, and every one:
        # transformers leaves out those it believes to be shared.
        weights = {k: v.detach().cpu().clone() for k, v in self._named_weights.items()}
        write_atomically(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))
        return str(folder)

    def _run(self, pixel_values: Tensor, padding_mask: Tensor | None) -> tuple[Any, list[Tensor]]:
        arguments: dict[str, Tensor] = {}
        if self._family.takes_mask:
            valid = torch.ones_like(pixel_values[:, 0], dtype=torch.long)
            if padding_mask is not None:
                valid = (~padding_mask).long()
            arguments["pixel_mask"] = valid
        elif padding_mask is not None and bool(padding_mask.any()):
            raise ValueError(f"{self._family.label} cannot respect padding; give equal sizes")
        outputs = self.model(pixel_values, **arguments)
        if self._family.encoder_maps == "outputs":
            return outputs, list(outputs.encoder_last_hidden_state)
        if self._family.encoder_maps == "projector":
            return outputs, self._projected
        assert self._layer_tokens is not None
        if self._family.encoder_maps == "tokens":
            last = self._stage_maps[max(self._stage_maps)]
            self._level_sizes = [(int(last.shape[-2]), int(last.shape[-1]))]
        return outputs, tokens_to_maps(self._layer_tokens, self._level_sizes)

    def _hook_backbone(self) -> None:
        def keep(index: int) -> Any:  # noqa: ANN401
            def hook(_module: nn.Module, _args: object, output: object) -> None:
                self._stage_maps[index] = first_tensor(output)

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
            self._level_sizes = [(int(h), int(w)) for h, w in kwargs["spatial_shapes_list"]]

        def keep_tokens(_module: nn.Module, _args: object, output: object) -> None:
            self._layer_tokens = first_tensor(output)

        if self._family.encoder_maps == "layers":
            encoder.register_forward_pre_hook(keep_sizes, with_kwargs=True)
        encoder.layers[layer - 1].register_forward_hook(keep_tokens)
        return layer

    def _probe(self) -> DetectorSpec:
        """Run once on a blank image: channels and strides are read off the real maps."""
        config: Any = self.model.config
        height, width = self.input_geometry((480, 640)).input_hw
        blank = torch.zeros(1, 3, height, width)
        with torch.no_grad():
            outputs, encoder_maps = self._run(blank, None)
        self._map_keys = self._choose_maps(encoder_maps, height)
        num_queries = int(outputs.logits.shape[1])
        kept = self._options.num_queries or num_queries
        if not 1 <= kept <= num_queries:
            raise DetectorError(f"--num-queries {kept}: this detector has 1 to {num_queries}")
        names = {int(i): str(name) for i, name in config.id2label.items()}
        num_labels = int(outputs.logits.shape[-1])
        if self._family.score_function == "softmax":
            names[num_labels - 1] = "no object"
        embed = getattr(self.model.model, "level_embed", None)
        settings: dict[str, object] = {
            "transformers_class": type(self.model).__name__,
            "corrected": self._family.correct is not None,
            "precision": "float32",
            "batch_size": 1,
        }
        if self._encoder_layer is not None:
            settings["encoder_layer"] = self._encoder_layer
        return DetectorSpec(
            name=f"hf:{self._family.model_type}",
            weights_sha256=weights_sha256(self.model),
            num_queries=kept,
            query_dim=int(outputs.last_hidden_state.shape[-1]),
            num_labels=num_labels,
            score_function=self._family.score_function,
            label_names=tuple(names.get(i, f"LABEL_{i}") for i in range(num_labels)),
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


def load_huggingface_detector(weights: str, options: DetectorOptions) -> HuggingFaceDetector:
    """A transformers detector from a folder or a hub id, frozen, on the CPU.

    Args:
        weights: Folder with ``config.json``, ``model.safetensors`` and
            ``preprocessor_config.json``, or the id of such a repository on the hub.
        options: What the user chose.

    Returns:
        The detector.

    Raises:
        DetectorError: If this is no detector, is of an unknown family, or its weights do not fit.
    """
    folder = Path(weights)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise DetectorError(f"{weights} is no detector: it has no config.json")
    if folder.is_file():
        raise DetectorError(f"{weights} is a file; --detector hf takes a folder or a hub id")
    if not folder.exists() and (weights.count("/") != 1 or weights.startswith((".", "/"))):
        raise DetectorError(f"{weights} does not exist, and is no hub id (owner/name) either")
    with _quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(weights)
            family = _family_of(config.model_type, weights)
            processor = transformers.AutoImageProcessor.from_pretrained(weights)
            model, info = transformers.AutoModelForObjectDetection.from_pretrained(
                weights, output_loading_info=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise DetectorError(f"cannot load the detector {weights}: {reason}") from error
    _check_loaded(weights, info)
    _into_own_memory(model)
    named_weights = model.state_dict(keep_vars=True)
    if family.correct is not None:
        family.correct(model)
    preprocessing = Preprocessing.from_processor(processor.to_dict(), weights)
    return HuggingFaceDetector(model, family, named_weights, processor, preprocessing, options)


def _into_own_memory(model: nn.Module) -> None:
    """Copy the weights out of the mapped file, to where torch aligns them.

    In the file they begin wherever its header ends, and some kernels for a CPU add up in another
    order then: equal weights in files of another layout would give caches that differ in last bits.
    """
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()


def _family_of(model_type: str, weights: str) -> Family:
    if model_type not in FAMILIES:
        hint = nearest(model_type, list(FAMILIES))
        raise DetectorError(f"{weights}: model type {model_type!r} has no adapter{hint}")
    return FAMILIES[model_type]


def _check_loaded(weights: str, info: dict[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(k) for k in info.get(kind) or ())
        if keys:
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise DetectorError(
                f"{weights}: {kind.replace('_', ' ')} in its weights: {shown}; "
                "the result would be partly random"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and warnings off the user's screen; errors are ours."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Loading writes a bar through tqdm directly in some versions.
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
