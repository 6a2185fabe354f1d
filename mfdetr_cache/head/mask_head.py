"""The mask network of Mask Frozen-DETR: its parts in the paper's order."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfdetr_cache.errors import HeadError
from mfdetr_cache.head.batch import HeadBatch, HeadOutput, MapGroup, RegionsByGroup
from mfdetr_cache.head.box_encoder import build_box_encoder
from mfdetr_cache.head.c1_crops import moments_of, neck_affine
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.fusion import FeatureFusion, Projection
from mfdetr_cache.head.image_encoder import DeformableImageEncoder, build_image_encoder
from mfdetr_cache.head.mask_embedding import EmbeddingPredictor, MaskCodec
from mfdetr_cache.head.mask_predictor import DotProductPredictor, FcnPredictor, SegmenterPredictor
from mfdetr_cache.head.mask_scoring import MaskScoring
from mfdetr_cache.head.query_encoder import QueryEncoder
from mfdetr_cache.ops.devices import to_device
from mfdetr_cache.ops.roi_align import roi_align, roi_coverage
from mfdetr_cache.types import DetectorSpec, MapSpec

# Normalised features times a query of plain Xavier scale give logits near +-10 before anything is
# learned; training would spend its first epoch undoing that.
_QUERY_GAIN = 0.1


class MaskHead(nn.Module):
    """Masks for boxes, from frozen queries and frozen maps (Fig. 2).

    Image encoder, fusion with C1, channel mapper, RoIAlign, box encoder, query encoder, dot
    product, mask scoring. Maps come from a cache or from a live detector; this module cannot tell.

    Args:
        config: Architecture.
        spec: The detector whose maps and queries it will get.

    Raises:
        HeadError: If the detector does not give what the configuration needs.
    """

    def __init__(self, config: HeadConfig, spec: DetectorSpec) -> None:
        super().__init__()
        self.config = config
        self.levels = _choose_levels(config, spec)
        self.c1 = next((m for m in spec.maps if m.role == "c1"), None) if config.use_c1 else None
        width = max(m.channels for m in self.levels if m.role == "encoder")
        fused = self._fused = _fused_level(config, self.levels)
        self.fused_stride = self.levels[fused].stride
        if self.c1 is not None or config.upsample_without_c1:
            self.fused_stride = 4
        self.projections = nn.ModuleDict(
            {
                m.name: Projection(m.channels, width)
                for m in self.levels
                if m.role != "encoder" or m.channels != width
            }
        )
        embed = spec.encoder_level_embed
        frozen = torch.tensor(embed) if embed and len(embed) == len(self.levels) else None
        self.image_encoder = build_image_encoder(config, width, len(self.levels), fused, frozen)
        neck: nn.Module | None = None
        if self.c1 is not None and config.neck:
            neck = Projection(self.c1.channels, width)
        elif self.c1 is not None and self.c1.channels != width:
            raise HeadError(
                f"c1 has {self.c1.channels} channels, the encoder {width}: set neck=true"
            )
        self.fusion = FeatureFusion(neck)
        d = config.hidden_dim
        # Paper: Table 4's row at the detector's own width has no mapper.
        self.map_features = nn.Identity() if d == width else nn.Conv2d(width, d, 1)
        same = d == spec.query_dim or config.mask_predictor == "fcn"  # which has no use for it
        self.map_query = nn.Identity() if same else nn.Linear(spec.query_dim, d)
        for mapper, gain in ((self.map_features, 1.0), (self.map_query, _QUERY_GAIN)):
            if isinstance(mapper, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(mapper.weight, gain)
                assert mapper.bias is not None
                nn.init.zeros_(mapper.bias)
        self.box_encoder = build_box_encoder(config)
        self.query_encoder = QueryEncoder(
            spec.query_dim, d, ffn=config.query_ffn, o2o=config.query_o2o, b2o=config.query_b2o
        )
        self.predictor = _predictor(config)
        self.scoring: MaskScoring | None
        self.scoring = (
            MaskScoring(d, config.roi_size, spec.num_labels) if config.mask_scoring else None
        )

    @property
    def map_names(self) -> tuple[str, ...]:
        """The maps this head reads; others in a cache need not be read from disk."""
        names = [m.name for m in self.levels]
        return (*names, self.c1.name) if self.c1 is not None else tuple(names)

    @property
    def codec(self) -> MaskCodec | None:
        """What decodes mask codes, to be fitted before training; None where there are no codes."""
        return self.predictor.codec if isinstance(self.predictor, EmbeddingPredictor) else None

    def forward(self, batch: HeadBatch) -> HeadOutput:
        """Masks of all regions of a batch.

        Args:
            batch: Maps, boxes and queries.

        Returns:
            Mask logits and predicted IoUs.
        """
        if not len(batch.queries):
            return self._nothing(batch.queries)
        if not self.config.roialign:
            if len(batch.groups) != 1 or len(batch.groups[0].members) != 1:
                raise HeadError("a head without RoIAlign takes one image at a time")
            fused = self.fuse(batch.groups[0])
            return HeadOutput(self.compare_with_image(fused, batch.queries), None)
        return self.decode(self.regions(batch), batch.queries, batch.image_index)

    def decode(self, regions: Tensor, queries: Tensor, image_index: Tensor) -> HeadOutput:
        """From region features to masks (Eq. 4, 9-13).

        Args:
            regions: Shape (R, r, r, d).
            queries: Shape (R, query_dim).
            image_index: Image of each region, shape (R,).

        Returns:
            Mask logits and predicted IoUs.
        """
        regions = self.box_encoder(regions)
        queries = self.query_encoder(queries, regions.flatten(1, 2), image_index)
        codes = None
        if isinstance(self.predictor, EmbeddingPredictor):
            codes = self.predictor.codes(self.map_query(queries), regions)
            logits = self.predictor.logits(codes, regions.shape[1])
        else:
            logits = self.predictor(self.map_query(queries), regions)
        iou = self.scoring(logits.sigmoid(), regions) if self.scoring is not None else None
        return HeadOutput(logits, iou, codes)

    def compare_with_image(self, fused: Tensor, queries: Tensor) -> Tensor:
        """Each query with every cell of one image: Table 1 without RoIAlign.

        Args:
            fused: The fused map, shape (1, d, h, w).
            queries: Shape (R, query_dim).

        Returns:
            Mask logits over the whole image, shape (R, h, w).
        """
        queries = self.map_query(self.query_encoder(queries, queries[:, None], queries[:, 0]))
        return torch.einsum("rd,dhw->rhw", queries, fused[0])

    def _nothing(self, queries: Tensor) -> HeadOutput:
        """The output for no region at all."""
        size = self.config.roi_size
        iou = queries.new_zeros(0, self.scoring.num_labels) if self.scoring is not None else None
        return HeadOutput(queries.new_zeros(0, size, size), iou)

    def fuse(self, group: MapGroup) -> Tensor:
        """The fused map F of equal-sized images, after the channel mapper (Eq. 5 and 14).

        Args:
            group: Their maps.

        Returns:
            Shape (B, d, H/s, W/s) at the fused stride s.
        """
        c1 = group.maps[self.c1.name] if self.c1 is not None else None
        size = self._size_without_c1(group)
        fused: Tensor = self.map_features(self.fusion(c1, self._refine(group), size))
        return fused

    def _refine(self, group: MapGroup) -> Tensor:
        """The encoder level that is fused, refined by all levels."""
        refined: Tensor = self.image_encoder(self._levels_of(group))
        return refined

    def _levels_of(self, group: MapGroup) -> list[Tensor]:
        levels = []
        for m in self.levels:
            maps = group.maps[m.name]
            levels.append(self.projections[m.name](maps) if m.name in self.projections else maps)
        return levels

    def _refine_read(self, where: RegionsByGroup) -> list[Tensor]:
        """The fused level of each group after the channel mapper, beside C1 without its bias.

        What no region reads may be anything.
        """
        mapper = self.map_features if isinstance(self.map_features, nn.Conv2d) else None
        # Beside C1 it is not added here: up-sampling keeps a constant, RoIAlign does not.
        bias = mapper.bias if mapper is not None and self.c1 is None else None
        encoder = self.image_encoder
        if not isinstance(encoder, DeformableImageEncoder) or encoder.computes_all:
            refined = [self._refine(group) for group in where.groups]
            if mapper is None:
                return refined
            return [functional.conv2d(maps, mapper.weight, bias) for maps in refined]
        level = self.levels[self._fused]
        levels = [self._levels_of(group) for group in where.groups]
        tokens, read = encoder.refine_read(levels, where.image, where.boxes_xyxy, level.stride)
        if mapper is not None:
            tokens = functional.linear(tokens, mapper.weight[:, :, 0, 0], bias)
        shapes = [m[self._fused].shape for m in levels]
        counts = [b * h * w for b, _, h, w in shapes]
        cells = tokens.new_zeros(sum(counts), tokens.shape[1]).index_copy(0, read.cell, tokens)
        return [
            part.unflatten(0, (b, h, w)).permute(0, 3, 1, 2)
            for part, (b, _, h, w) in zip(cells.split(counts), shapes, strict=True)
        ]

    # Sizes and counts differ from batch to batch: nothing that a compiler could keep.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _align_few(self, where: RegionsByGroup, crops: Tensor | None) -> Tensor:
        """Region features where regions are few: what none of them reads is not computed.

        The channel mapper goes before the up-sampling and C1 is cut before the neck; both are
        linear (see ``head/c1_crops.py``), so nothing changes but the order of roundings.

        Args:
            where: The regions and the images' maps.
            crops: Crops of C1 in place of the map, in the order of the regions.

        Returns:
            Shape (R, r, r, d).
        """
        refined = self._refine_read(where)
        device = where.device
        own = where.rois()
        if self.c1 is None:
            sizes = [self._size_without_c1(group) for group in where.groups]
            maps = [self.fusion(None, r, size) for r, size in zip(refined, sizes, strict=True)]
            return torch.cat([self.align(m, mine) for m, mine in zip(maps, own, strict=True)])
        if crops is None:
            where, crops = self._cut(where, self.c1.name)
        from_encoder, moments = [], []
        for group, maps_of_group, mine in zip(where.groups, refined, own, strict=True):
            assert group.c1_moments is not None
            moments.append(group.c1_moments)
            from_encoder.append(self.align(self.fusion(None, maps_of_group, group.c1_hw), mine))
        matrix, constant = neck_affine(self.fusion.neck, torch.cat(moments))
        mapper = self.map_features
        if isinstance(mapper, nn.Conv2d):
            assert mapper.bias is not None
            weight = mapper.weight[:, :, 0, 0].to(matrix.dtype)
            matrix, constant = weight @ matrix, constant @ weight.T + mapper.bias.to(matrix.dtype)
        image = to_device(torch.from_numpy(where.image), device)
        matrix, constant = (t.to(crops.dtype).index_select(0, image) for t in (matrix, constant))
        from_c1 = torch.einsum("rhwc,rdc->rhwd", crops, matrix)
        config, scale = self.config, 1 / self.fused_stride
        coverage = roi_coverage(
            where.boxes_xyxy, where.c1_hw, config.roi_size, scale, config.roi_sampling_ratio
        )
        down, across = to_device(torch.from_numpy(coverage), device).to(constant.dtype)
        everywhere = (down[:, :, None] * across[:, None])[..., None] * constant[:, None, None]
        found: Tensor = torch.cat(from_encoder) + from_c1 + everywhere
        return found

    # Sizes and counts differ from batch to batch: nothing that a compiler could keep.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def with_c1_cut(self, batch: HeadBatch) -> HeadBatch:
        """A batch to train on, with C1 cut out around the regions where that is less work.

        :meth:`forward` does the same by itself. Nothing learned takes part in it, so it can be done
        for the next batch while the weights are still being changed by this one.

        Args:
            batch: Maps, boxes and queries.

        Returns:
            A batch with the same output and the same gradients.
        """
        if self.c1 is None or batch.c1_crops is not None or not len(batch.queries):
            return batch
        where = batch.by_group()
        if not self.config.roialign or not self._are_few(where):
            return batch
        cut, crops = self._cut(where, self.c1.name)
        # Groups without a region stay as they are; images are counted over all of them.
        by_members = {group.members: group for group in cut.groups}
        return replace(
            batch,
            groups=tuple(by_members.get(group.members, group) for group in batch.groups),
            c1_crops=where.to_batch(crops),
        )

    def _cut(self, where: RegionsByGroup, c1: str) -> tuple[RegionsByGroup, Tensor]:
        """Crops and moments of C1 in place of the map, the crops in the order of the regions."""
        groups, crops = [], []
        for group, mine in zip(where.groups, where.rois(), strict=True):
            maps = group.maps[c1]
            crops.append(self.align(maps, mine))
            others = {name: m for name, m in group.maps.items() if name != c1}
            c1_hw = (int(maps.shape[-2]), int(maps.shape[-1]))
            groups.append(replace(group, maps=others, c1_moments=moments_of(maps), c1_hw=c1_hw))
        return replace(where, groups=tuple(groups)), torch.cat(crops)

    def _are_few(self, where: RegionsByGroup) -> bool:
        """Whether so many regions have fewer cells than the images they are cut out of."""
        cells = 0
        for group in where.groups:
            height, width = group.input_hw
            cells += len(group.members) * height * width // self.fused_stride**2
        return len(where.order) * self.config.roi_size**2 < cells

    def _size_without_c1(self, group: MapGroup) -> tuple[int, int] | None:
        height, width = group.input_hw
        return (-(-height // 4), -(-width // 4)) if self.config.upsample_without_c1 else None

    def align(self, fused: Tensor, rois: Tensor) -> Tensor:
        """RoIAlign of a fused map (Eq. 3).

        Args:
            fused: Shape (B, d, h, w).
            rois: Index of the image, then x0, y0, x1, y1 in network input pixels, shape (R, 5).

        Returns:
            Shape (R, r, r, d).
        """
        config, scale = self.config, 1 / self.fused_stride
        return roi_align(fused, rois, config.roi_size, scale, config.roi_sampling_ratio)

    def regions(self, batch: HeadBatch) -> Tensor:
        """Region features R_i (Eq. 3).

        Args:
            batch: Maps and boxes.

        Returns:
            RoIAlign of the fused map over each box, shape (R, r, r, d).
        """
        where = batch.by_group()
        crops = None
        if batch.c1_crops is not None and self.c1 is not None:
            crops = where.from_batch(batch.c1_crops)
        if crops is not None or (self.training and self._are_few(where)):
            aligned = self._align_few(where, crops)
        else:
            own = zip(where.groups, where.rois(), strict=True)
            aligned = torch.cat([self.align(self.fuse(group), mine) for group, mine in own])
        found: Tensor = where.to_batch(aligned)
        return found


def _predictor(config: HeadConfig) -> nn.Module:
    if config.mask_predictor == "segmenter":
        return SegmenterPredictor(config.hidden_dim)
    if config.mask_predictor == "embedding":
        return EmbeddingPredictor(config.hidden_dim, config.mask_embedding_dim)
    if config.mask_predictor == "fcn":
        return FcnPredictor(config.hidden_dim)
    return DotProductPredictor()


def _choose_levels(config: HeadConfig, spec: DetectorSpec) -> tuple[MapSpec, ...]:
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
