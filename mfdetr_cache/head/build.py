"""Builds the mask network of a configuration for a detector: which maps it reads, which parts."""

import torch
from torch import nn

from mfdetr_cache.errors import HeadError
from mfdetr_cache.head.blocks.convnext import ConvNeXtBlock, init_convnext
from mfdetr_cache.head.blocks.deformable import FfnBlock
from mfdetr_cache.head.blocks.swin import SwinBlock
from mfdetr_cache.head.box_encoder import DeformableBoxEncoder
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.fine_mask import FineMask
from mfdetr_cache.head.fusion import FeatureFusion, LevelProjections, Projection
from mfdetr_cache.head.image_encoder import DeformableImageEncoder, SingleLevelImageEncoder
from mfdetr_cache.head.mask_embedding import EmbeddingPredictor, build_codec
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.head.mask_predictor import (
    DotProductPredictor,
    DynamicConvPredictor,
    FcnPredictor,
    SegmenterPredictor,
)
from mfdetr_cache.head.mask_scoring import MaskScoring
from mfdetr_cache.head.point_mask import PointMask
from mfdetr_cache.head.position import DINO_SINE, SineEncoding
from mfdetr_cache.head.query_encoder import QueryEncoder
from mfdetr_cache.head.refinement import Refinement
from mfdetr_cache.head.refining_head import RefiningHead
from mfdetr_cache.head.sampled_cells import SampledCellsHead
from mfdetr_cache.head.whole_image import WholeImageHead
from mfdetr_cache.ops.roi_align import RoIAlign
from mfdetr_cache.types import DetectorSpec, MapSpec

_C1_STRIDE = 4
_IMAGE_WINDOW = 14
_BOX_WINDOW = 8
# Normalised features times a query of plain Xavier scale give logits near +-10 before anything is
# learned; training would spend its first epoch undoing that.
_QUERY_GAIN = 0.1


def build_head(config: HeadConfig, spec: DetectorSpec) -> MaskHead:
    """A mask network with fresh weights on torch's default device.

    HeadError if the detector lacks maps or queries that the configuration needs.
    """
    levels = _choose_levels(config, spec)
    c1 = next((m for m in spec.maps if m.role == "c1"), None) if config.use_c1 else None
    width = max(m.channels for m in levels if m.role == "encoder")
    fused = _fused_level(config, levels)
    fine = c1 is not None or config.upsample_without_c1
    stride = _C1_STRIDE if fine else levels[fused].stride
    # Weights come from torch's random state: another order of these lines gives other ones.
    projections = LevelProjections(levels, width)
    image_encoder = _image_encoder(config, spec, width, len(levels), fused)
    neck = _neck(config, c1, width)
    map_features, map_query = _channel_mappers(config, width, spec.query_dim)
    box_encoder = _box_encoder(config)
    query_encoder = QueryEncoder(
        spec.query_dim,
        config.hidden_dim,
        ffn=config.query_ffn,
        o2o=config.query_o2o,
        b2o=config.query_b2o,
    )
    predictor = _predictor(config)
    scoring = None
    if config.mask_scoring:
        scoring = MaskScoring(config.hidden_dim, config.roi_size, spec.num_labels)
    fine_mask = _fine_mask(config) if config.fine_size else None
    return _head_class(config)(
        config,
        levels,
        c1,
        projections=projections,
        image_encoder=image_encoder,
        fusion=FeatureFusion(neck, upsample=config.upsample_without_c1),
        map_features=map_features,
        align=RoIAlign(config.grid_size, stride, config.roi_sampling_ratio),
        map_query=map_query,
        box_encoder=box_encoder,
        query_encoder=query_encoder,
        predictor=predictor,
        scoring=scoring,
        fine=fine_mask,
    )


def _head_class(config: HeadConfig) -> type[MaskHead]:
    if not config.roialign:
        return WholeImageHead
    return RefiningHead if config.mask_predictor == "refined" else SampledCellsHead


def _choose_levels(config: HeadConfig, spec: DetectorSpec) -> tuple[MapSpec, ...]:
    """The maps of the image encoder, finest first: picked by stride, never by position."""
    roles = {"encoder", "backbone"} if config.use_backbone_levels else {"encoder"}
    levels = tuple(sorted((m for m in spec.maps if m.role in roles), key=lambda m: m.stride))
    if not any(m.role == "encoder" for m in levels):
        raise HeadError(f"{spec.name} gives no encoder map; the mask network needs one")
    return levels


def _fused_level(config: HeadConfig, levels: tuple[MapSpec, ...]) -> int:
    if config.fuse_stride == 0:
        return 0
    strides = [m.stride for m in levels]
    if config.fuse_stride not in strides:
        raise HeadError(f"fuse_stride {config.fuse_stride}: the levels have strides {strides}")
    return strides.index(config.fuse_stride)


def _image_encoder(
    config: HeadConfig, spec: DetectorSpec, width: int, num_levels: int, fused: int
) -> nn.Module:
    if config.image_block != "deformable":
        blocks = _blocks(config.image_block, width, config.image_layers, _IMAGE_WINDOW)
        return SingleLevelImageEncoder(blocks, fused)
    # The detector's own level embedding, unless a backbone map stands in for a level.
    embed = spec.encoder_level_embed
    frozen = torch.tensor(embed) if embed and len(embed) == num_levels else None
    # DINO's encoder has another sine encoding than Deformable DETR's, H-DETR's and most others.
    sine = DINO_SINE if spec.settings.get("scheme") == "dino" else SineEncoding()
    return DeformableImageEncoder(width, num_levels, config.image_layers, fused, frozen, sine)


def _neck(config: HeadConfig, c1: MapSpec | None, width: int) -> nn.Module | None:
    if c1 is None:
        return None
    if config.neck:
        return Projection(c1.channels, width)
    if c1.channels != width:
        raise HeadError(f"c1 has {c1.channels} channels, the encoder {width}: set neck=true")
    return None


def _channel_mappers(config: HeadConfig, width: int, query_dim: int) -> tuple[nn.Module, nn.Module]:
    """Mappers of the fused map and of the queries to ``hidden_dim`` channels."""
    d = config.hidden_dim
    # Paper: Table 4's row at the detector's own width has no mapper.
    features = nn.Identity() if d == width else nn.Conv2d(width, d, 1)
    # Mask R-CNN's predictor does not look at the query.
    unmapped = d == query_dim or config.mask_predictor == "fcn"
    queries = nn.Identity() if unmapped else nn.Linear(query_dim, d)
    for mapper, gain in ((features, 1.0), (queries, _QUERY_GAIN)):
        if isinstance(mapper, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(mapper.weight, gain)
            assert mapper.bias is not None
            nn.init.zeros_(mapper.bias)
    return features, queries


def _box_encoder(config: HeadConfig) -> nn.Module:
    width, count = config.hidden_dim, config.box_layers
    if count == 0:
        return nn.Identity()
    if config.box_block == "deformable":
        return DeformableBoxEncoder(width, config.roi_size, count)
    return nn.Sequential(*_blocks(config.box_block, width, count, _BOX_WINDOW))


def _fine_mask(config: HeadConfig) -> FineMask | PointMask:
    shape = (config.hidden_dim, config.fine_dim, config.fine_layers)
    if config.fine_block == "points":
        return PointMask(*shape, config.fine_points)
    return FineMask(*shape)


def _blocks(kind: str, width: int, count: int, window: int) -> list[nn.Module]:
    if kind == "swin":
        return [SwinBlock(width, window, shifted=bool(i % 2)) for i in range(count)]
    if kind == "ffn":
        return [FfnBlock(width) for _ in range(count)]
    blocks = [ConvNeXtBlock(width) for _ in range(count)]
    for block in blocks:
        init_convnext(block)
    return list(blocks)


def _predictor(config: HeadConfig) -> nn.Module:
    kind, d = config.mask_predictor, config.hidden_dim
    if kind in ("refined", "embedding"):
        width = config.mask_embedding_dim
        codec = build_codec(config.mask_codec, width)
        if kind == "refined":
            return Refinement(d, width, config.refinement_stages, codec)
        return EmbeddingPredictor(d, width, codec)
    if kind == "segmenter":
        return SegmenterPredictor(d)
    if kind == "fcn":
        return FcnPredictor(d)
    return DynamicConvPredictor(d) if kind == "dynamic" else DotProductPredictor()
