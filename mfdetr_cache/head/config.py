"""The choices the paper's tables study, as one frozen dataclass."""

from dataclasses import dataclass
from typing import Literal

# "ffn" is a deformable layer without its attention: what is left when no cell sees another.
BlockKind = Literal["deformable", "swin", "convnext", "ffn"]


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """Architecture of the mask network. The defaults are the paper's final model (Table 6, row 4).

    Attributes:
        image_block: Block of the image feature encoder (Eq. 6-8, Table 2).
        image_layers: Its number of layers.
        box_block: Block of the box feature encoder (Eq. 9, Table 3).
        box_layers: Its number of layers.
        hidden_dim: Channels after the channel mapper (Table 4).
        roialign: Cut regions out of the fused map (Eq. 3). Without it the query is compared with
            every cell of the image, as in two training-free rows of Table 1.
        roi_size: Output size of RoIAlign (Table 9); 8 or a larger multiple of 8.
        roi_sampling_ratio: Samples per RoIAlign bin along an axis; 0 adapts to the box.
        use_c1: Fuse the backbone's stride-4 map (Eq. 1, Table 1) where the cache has it.
        upsample_without_c1: Without C1, bring the fused level to stride 4 all the same (Table 1).
        use_backbone_levels: Give backbone maps that stand in for missing encoder levels to the
            image encoder.
        fuse_stride: Stride of the level that is fused; 0 takes the finest. The paper's text has
            stride 8.
        neck: Project C1 by a 1x1 convolution and group norm (Eq. 14, Table 6). Needed wherever C1
            and the encoder differ in width.
        query_ffn: FFN of the query encoder (Table 5).
        query_o2o: Object-to-object attention (Eq. 10, Table 5).
        query_b2o: Box-to-object attention (Eq. 11, Table 5).
        mask_predictor: Dot product (Eq. 4), the segmenter head (Table 12), or a baseline: ``fcn``,
            Mask R-CNN's convolutions, which do not see the query; ``dynamic``, the same after two
            convolutions whose weights the query makes, as in QueryInst; or ``embedding``, a short
            code of the mask as in ISTR, decoded with a basis learned from the annotated masks; or
            ``refined``, ISTR's stages, which refine the box too.
        mask_embedding_dim: Length of that code.
        mask_codec: What encodes masks: principal components of the annotated ones, a cosine
            transform, or a small autoencoder that has learned from them.
        refinement_stages: Stages T of ``refined``.
        mask_scoring: Predict each mask's IoU (Eq. 12-13, Table 6).
        fine_size: Cells of a finer grid on which the mask is corrected, a multiple of ``roi_size``;
            0 for none. RoIAlign then cuts this grid, and its means are the cells of ``roi_size``.
        fine_block: ``convolution`` in all its cells, or ``points``: PointRend's, which predicts the
            least certain ones of them from their features and the coarse mask.
        fine_dim: Channels there.
        fine_layers: Depth-wise convolutions there, or hidden layers of PointRend's MLP.
        fine_points: Points that PointRend predicts, each time the grid's side is doubled.
    """

    image_block: BlockKind = "deformable"
    image_layers: int = 2
    box_block: BlockKind = "deformable"
    box_layers: int = 2
    hidden_dim: int = 128
    roialign: bool = True
    roi_size: int = 32
    roi_sampling_ratio: int = 0
    use_c1: bool = True
    upsample_without_c1: bool = False
    use_backbone_levels: bool = True
    fuse_stride: int = 0
    neck: bool = True
    query_ffn: bool = True
    query_o2o: bool = False
    query_b2o: bool = True
    mask_predictor: Literal["dot", "segmenter", "fcn", "dynamic", "embedding", "refined"] = "dot"
    mask_embedding_dim: int = 64
    mask_codec: Literal["pca", "dct", "learned"] = "pca"
    refinement_stages: int = 6
    mask_scoring: bool = True
    fine_size: int = 0
    fine_block: Literal["convolution", "points"] = "convolution"
    fine_dim: int = 32
    fine_layers: int = 2
    fine_points: int = 784

    @property
    def grid_size(self) -> int:
        """Cells along a side of what RoIAlign cuts out, and of the masks."""
        return self.fine_size or self.roi_size

    def __post_init__(self) -> None:
        for name, most in (("roi_size", 512), ("hidden_dim", 8192)):
            value = getattr(self, name)
            if not 8 <= value <= most or value % 8:
                raise ValueError(f"{name} must be a multiple of 8 from 8 to {most}, not {value}")
        if not 0 <= self.image_layers <= 8 or not 0 <= self.box_layers <= 8:
            raise ValueError("image_layers and box_layers must be 0 to 8")
        if not self.roialign and (self.box_layers or self.query_b2o or self.mask_scoring):
            raise ValueError(
                "roialign=false leaves no regions for box_layers, query_b2o or mask_scoring; "
                "switch them off"
            )
        if not 1 <= self.mask_embedding_dim <= 784:
            raise ValueError("mask_embedding_dim must be 1 to 784, the cells of a 28 x 28 mask")
        if not self.roialign and self.mask_predictor != "dot":
            raise ValueError("roialign=false compares with mask_predictor=dot only")
        own = (self.box_layers, self.query_ffn, self.query_o2o, self.query_b2o, self.mask_scoring)
        if self.mask_predictor == "refined" and any(own):
            raise ValueError(
                "mask_predictor=refined has no place for box_layers, query_ffn, query_o2o, "
                "query_b2o or mask_scoring; switch them off"
            )
        if not 1 <= self.refinement_stages <= 12:
            raise ValueError("refinement_stages must be 1 to 12")
        if self.roi_sampling_ratio < 0:
            raise ValueError("roi_sampling_ratio must be 0 (adaptive) or more")
        self._check_fine_grid()

    def _check_fine_grid(self) -> None:
        if self.fine_size and (self.fine_size % self.roi_size or self.fine_size <= self.roi_size):
            raise ValueError(
                f"fine_size must be 0, or 2 or more times roi_size ({self.roi_size}), "
                f"not {self.fine_size}"
            )
        if min(self.fine_dim, self.fine_points) < 1 or not 0 <= self.fine_layers <= 8:
            raise ValueError("fine_dim and fine_points must be 1 or more, fine_layers 0 to 8")
        if self.fine_size and (
            not self.roialign or self.mask_predictor in ("embedding", "refined")
        ):
            raise ValueError("fine_size needs roialign, and a mask_predictor that is no code")
