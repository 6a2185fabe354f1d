"""RF-DETR of roboflow/rf-detr, detection and segmentation, in LW-DETR's classes.

transformers' own class has one level, a projector norm of another epsilon and windows that swap
rows and columns on an input that is not square. LW-DETR's has the same decoder and several levels;
backbone and projector are replaced here.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LwDetrConfig, LwDetrForObjectDetection
from transformers.models.lw_detr.modeling_lw_detr import (
    LwDetrC2FLayer,
    LwDetrConvNormLayer,
    LwDetrLayerNorm,
)
from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config
from transformers.models.rf_detr.modeling_rf_detr import RfDetrDinov2Backbone

from mfdetr_cache.detectors.checkpoint import Checkpoint
from mfdetr_cache.detectors.huggingface.families import FAMILIES
from mfdetr_cache.detectors.names import Marks, Rules, count
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.translated.blueprint import Blueprint, no_weights
from mfdetr_cache.detectors.translated.lw_detr import (
    DECODER_RULES,
    VIT_CONFIG,
    decoder_settings,
    scales,
)

# Takes out_indices, which its signature does not say.
_VIT_CONFIG: Any = RfDetrDinov2Config
_VIT = "backbone.0.encoder.encoder."
_HEAD_WIDTH = 64  # of every DINOv2

_VIT_RULES: Rules = (
    (r"^backbone\.0\.encoder\.encoder\.", "model.backbone.backbone."),
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
)


# Grouped queries and a DINOv2 with windows.
is_rf_detr = Marks(("query_feat.weight", f"{_VIT}embeddings.cls_token"))


def read_rf_detr(checkpoint: Checkpoint, options: DetectorOptions) -> Blueprint:
    """Blueprint of an RF-DETR checkpoint; of a segmentation checkpoint the detector alone.

    Its masks are :class:`~mfdetr_cache.detectors.translated.rf_detr_masks.MaskBranch`.
    """
    tensors, settings = checkpoint.tensors, checkpoint.settings
    patch = tensors[f"{_VIT}embeddings.patch_embeddings.projection.weight"].shape[-1]
    width = tensors[f"{_VIT}embeddings.cls_token"].shape[-1]
    cells = round((tensors[f"{_VIT}embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    # Patches of 14 keep DINOv2's own table of 37 x 37 and run at 560; the others fit their input.
    side = int(settings.get("resolution") or (560 if patch == 14 else cells * patch))
    outputs = settings.get("out_feature_indexes") or (
        [2, 5, 8, 11] if patch == 14 else [3, 6, 9, 12]
    )
    backbone = _VIT_CONFIG(
        image_size=cells * patch,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=count(tensors, _VIT.replace(".", r"\.") + r"encoder\.layer\.(\d+)\."),
        num_attention_heads=width // _HEAD_WIDTH,
        num_windows=int(settings.get("num_windows") or _windows(patch, cells)),
        use_mask_token=f"{_VIT}embeddings.mask_token" in tensors,
        out_indices=list(outputs),
    )
    factors = scales(tensors)
    config = LwDetrConfig(
        # Stands for the backbone until it is put in its place.
        backbone_config=VIT_CONFIG(hidden_size=12, num_hidden_layers=1, out_indices=[1]),
        **decoder_settings(checkpoint, factors, options),
    )
    return Blueprint(
        family=FAMILIES["rf_detr"],
        build=partial(_build, config, backbone),
        rules=(*_VIT_RULES, *DECODER_RULES),
        tensors=tensors,
        input_hw=(side, side),
        normalise=True,
        side_multiple=patch * backbone.num_windows,
        unused=r"^segmentation_head\.|^_kp_active_mask$",
        choices={"num_windows": backbone.num_windows, "out_feature_indexes": list(outputs)},
    )


def _windows(patch: int, cells: int) -> int:
    """Windows along each side, of the published size with such patches and so many of them."""
    if patch == 14:
        return 4
    return 1 if (patch, cells) == (12, 26) else 2


class ScaleProjector(nn.Module):
    """One map of RF-DETR's projector: the ViT's maps resampled, concatenated and mixed.

    ``width`` are the channels of the ViT's maps, ``factor`` is the size of the result relative to
    them: 2, 1 or 0.5.
    """

    def __init__(self, config: LwDetrConfig, width: int, num_maps: int, factor: float) -> None:
        super().__init__()
        sampled = width // 2 if factor == 2.0 else width
        self.sampling_layers: Any = nn.ModuleList(
            nn.ModuleDict({"layers": nn.Sequential(*_sampling(config, width, factor))})
            for _ in range(num_maps)
        )
        self.projector_layer = LwDetrC2FLayer(config, sampled * num_maps)
        self.layer_norm = _channel_norm(config.d_model)
        for module in list(self.modules()):
            norm = getattr(module, "norm", None)
            if isinstance(norm, nn.BatchNorm2d):
                module.norm = _channel_norm(norm.num_features)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C, h, w) to (B, C', factor * h, factor * w)."""
        sampled = [
            sampling["layers"](values)
            for sampling, values in zip(self.sampling_layers, maps, strict=True)
        ]
        result: Tensor = self.layer_norm(self.projector_layer(torch.cat(sampled, 1)))
        return result


def _sampling(config: LwDetrConfig, width: int, factor: float) -> list[nn.Module]:
    if factor == 2.0:
        return [nn.ConvTranspose2d(width, width // 2, 2, 2)]
    if factor == 0.5:
        return [LwDetrConvNormLayer(config, width, width, 3, 2, activation="relu")]
    return []


def _channel_norm(channels: int) -> nn.Module:
    norm: nn.Module = LwDetrLayerNorm(channels, eps=1e-6, data_format="channels_first")
    return norm


def _build(config: LwDetrConfig, backbone: RfDetrDinov2Config) -> Any:  # noqa: ANN401
    maps = len(backbone.out_indices)
    with no_weights():
        model = LwDetrForObjectDetection(config)
        vit: Any = RfDetrDinov2Backbone(backbone)
        projector = nn.ModuleList(
            ScaleProjector(config, backbone.hidden_size, maps, factor)
            for factor in config.projector_scale_factors
        )
    vit.embeddings.window_partition = partial(_partition, backbone)
    model.model.backbone.backbone = vit
    model.model.backbone.projector.scale_layers = projector
    return model


def _partition(config: RfDetrDinov2Config, tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, 1 + h * w, C) by window, each with the class token first.

    transformers swaps rows and columns of the windows, which changes results if not square.
    ``height`` and ``width`` are the input's in pixels. Result: (B * windows, 1 + h * w / windows,
    C).
    """
    side, patch = config.num_windows, config.patch_size
    assert isinstance(patch, int)
    rows, columns = height // patch // side, width // patch // side
    batch, _, channels = tokens.shape
    patches = tokens[:, 1:].reshape(batch, side, rows, side, columns, channels).transpose(2, 3)
    patches = patches.reshape(batch * side**2, rows * columns, channels)
    # Windows of one image lie together, as its patches do.
    first = tokens[:, :1].repeat_interleave(side**2, dim=0)
    return torch.cat((first, patches), dim=1)
