"""Checkpoints of detrex and mmdetection under the names of the official code."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from torch import Tensor

from mfdetr_cache.detectors.checkpoint import Checkpoint
from mfdetr_cache.detectors.names import Rules, Translation, carry, carry_back, count, translate
from mfdetr_cache.detectors.official.architecture import (
    OFFICIAL_ARITHMETIC,
    Arithmetic,
    Layout,
)
from mfdetr_cache.detectors.official.mmdetection import read_configuration
from mfdetr_cache.detectors.preprocess import Preprocessing
from mfdetr_cache.errors import DetectorError

# The same for all of them, training and test; mean and deviation of ImageNet.
OFFICIAL_PREPROCESSING = Preprocessing(
    height=None,
    width=None,
    shortest_edge=800,
    longest_edge=1333,
    resample=2,
    rescale=1 / 255,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
# The others subtract from values of 0 to 255.
_DETREX_PREPROCESSING = replace(
    OFFICIAL_PREPROCESSING,
    resize="detectron2",
    rescale=1.0,
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
)
# What changes numbers and no tensor tells, in the arguments that official trainings keep with their
# weights: what is read, and is meant where an argument is left out.
_ARGUMENTS: dict[str, object] = {
    "nheads": 8,
    "dilation": False,
    "pre_norm": False,
    "transformer_activation": "relu",
    "num_patterns": 0,
    "decoder_sa_type": "sa",
    "decoder_module_seq": ["sa", "ca", "ffn"],
}
# A tensor that only a detector of the code base has.
_MARKS: dict[str, Layout] = {
    "transformer.encoder.layers.0.attentions.0.sampling_offsets.weight": "detrex",
    "encoder.layers.0.self_attn.sampling_offsets.weight": "mmdetection",
    "bbox_head.transformer.encoder.layers.0.attentions.0.sampling_offsets.weight": "mmdetection",
    "query_head.transformer.encoder.layers.0.attentions.0.sampling_offsets.weight": "mmdetection",
}
# Of a training only, or computed.
_UNUSED = (
    r"num_batches_tracked$|^label_enc\.|^dn_query_generator\.|^ema_"
    # Co-DETR's other heads, and what ties them to its decoder.
    r"|^(rpn_head|roi_head|mask_head|mask_iou_head|bbox_head\.\d+)\."
    r"|^query_head\.(downsample|label_embedding|dn_generator)\."
    r"|^query_head\.transformer\.(head_pos_embed|aux_pos_trans|pos_feats)(_\w+)?\."
)

_LAYERS: Rules = (
    (r"^neck\.convs\.(\d+)\.conv\.", r"input_proj.\1.0."),
    (r"^neck\.convs\.(\d+)\.(?:gn|norm)\.", r"input_proj.\1.1."),
    (r"\.ffns?(?:\.0)?\.layers\.0\.0\.", ".linear1."),
    (r"\.ffns?(?:\.0)?\.layers\.1\.", ".linear2."),
    (r"(encoder\.layers\.\d+)\.norms\.0\.", r"\1.norm1."),
    (r"(encoder\.layers\.\d+)\.norms\.1\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.norms\.0\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.norms\.1\.", r"\1.norm1."),
    (r"(decoder\.layers\.\d+)\.norms\.2\.", r"\1.norm3."),
)
_DETREX: Rules = (
    (r"^backbone\.stem\.conv1\.norm\.", "backbone.bn1."),
    (r"^backbone\.stem\.", "backbone."),
    (r"^backbone\.res([2-5])\.(\d+)\.shortcut\.norm\.", r"backbone.res\1.\2.downsample.1."),
    (r"^backbone\.res([2-5])\.(\d+)\.shortcut\.", r"backbone.res\1.\2.downsample.0."),
    (r"^(backbone\.res\d\.\d+)\.conv(\d)\.norm\.", r"\1.bn\2."),
    *((rf"^backbone\.res{i + 1}\.", f"backbone.layer{i}.") for i in range(1, 5)),
    (r"^backbone\.", "backbone.0.body."),
    (r"^transformer\.level_embeds$", "transformer.level_embed"),
    (r"(encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"(decoder\.layers\.\d+)\.attentions\.0\.attn\.", r"\1.self_attn."),
    (r"(decoder\.layers\.\d+)\.attentions\.1\.", r"\1.cross_attn."),
    (r"^query_embedding\.", "query_embed."),
)
_MMDETECTION: Rules = (
    # Version 2 and Co-DETR have all of it below the head.
    (r"^query_head\.transformer\.query_embed\.", "query_embedding."),
    (r"^query_head\.", "bbox_head."),
    (r"^bbox_head\.transformer\.level_embeds$", "level_embed"),
    (r"^bbox_head\.(?:transformer\.|(?=query_embedding\.))", ""),
    (r"^(decoder\.ref_point_head)\.0\.", r"\1.layers.0."),
    (r"^(decoder\.ref_point_head)\.2\.", r"\1.layers.1."),
    (r"^((?:en|de)coder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"^(decoder\.layers\.\d+)\.attentions\.1\.", r"\1.cross_attn."),
    (r"^backbone\.patch_embed\.projection\.", "backbone.patch_embed.proj."),
    (r"^(backbone\.)stages(\..*)\.linear([12])\.", r"\1layers\2.mlp.fc\3."),
    (r"^backbone\.stages\.", "backbone.layers."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"^backbone\.", "backbone.0.body."),
    (r"(decoder\.layers\.\d+\.self_attn)\.attn\.", r"\1."),
    (r"^bbox_head\.cls_branches\.", "class_embed."),
    *(
        (rf"^bbox_head\.reg_branches\.(\d+)\.{2 * i}\.", rf"bbox_embed.\1.layers.{i}.")
        for i in range(3)
    ),
    (r"^memory_trans_fc\.", "enc_output."),
    (r"^memory_trans_norm\.", "enc_output_norm."),
    (r"^pos_trans_fc\.", "pos_trans."),
    (r"^reference_points_fc\.", "reference_points."),
    (r"^(encoder|decoder|level_embed|enc_output|pos_trans|reference_points)", r"transformer.\1"),
)


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint under official names.

    Attributes:
        tensors: Its state dict.
        checkpoint: The file, under the names of its code base; None for untrained weights.
        preprocessing: What its code base does to an image at test time.
        arithmetic: What its code computes; None for that of the official code.
        names: Official name of each name in the file; empty where they are the same.
        num_queries: Queries, where the file tells them beside its tables.
    """

    layout: Layout
    tensors: dict[str, Tensor]
    checkpoint: Checkpoint | None = None
    preprocessing: Preprocessing = OFFICIAL_PREPROCESSING
    arithmetic: Arithmetic | None = None
    names: Translation = field(default_factory=dict)
    num_queries: int | None = None

    @property
    def by_channel(self) -> bool:
        """Whether patches of a Swin are merged channel by channel, as in mmdetection's own."""
        own = any(key.startswith("backbone.stages.") for key in self.names)
        return own and self.layout == "mmdetection"

    def settings(self) -> dict[str, object]:
        """What of this is part of a detector's identity, beside weights and preprocessing."""
        if self.arithmetic is None:
            return {}
        if self.layout == "official":
            return asdict(self.arithmetic)
        return {"layout": self.layout, **asdict(self.arithmetic)}

    def document(self, state: Mapping[str, Tensor]) -> dict[str, object]:
        """A checkpoint as the code base writes it, of a state dict under official names."""
        if self.checkpoint is None:
            return {"model": dict(state)}
        if self.layout == "official":
            return {"model": dict(state), "args": dict(self.checkpoint.settings)}
        written = carry_back(state, self.names, self.checkpoint.tensors)
        if self.layout == "detrex":
            return {"model": written}
        settings, names = self.checkpoint.settings, self.checkpoint.class_names
        meta = {"cfg": settings.get("cfg"), "dataset_meta": {"classes": names}}
        if meta["cfg"] is None:
            meta = {"config": settings["config"], "CLASSES": names}
        return {"state_dict": written, "meta": meta}


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """Whose code wrote a state dict."""
    return next((layout for key, layout in _MARKS.items() if key in tensors), "official")


def read_source(checkpoint: Checkpoint, temperature: float = 10000.0) -> Source:
    """A checkpoint under official names, with what its code computes.

    ``temperature`` is that of detrex's position encoding, which its files do not tell.
    DetectorError if the file is of mmdetection and does not hold a configuration that can be
    followed.
    """
    tensors, layout = checkpoint.tensors, layout_of(checkpoint.tensors)
    if layout == "official":
        return _of_official(checkpoint)
    used = [key for key in tensors if not re.search(_UNUSED, key)]
    convs = count(used, r"neck\.convs\.(\d+)\.")
    extra = [
        (rf"^neck\.extra_convs\.{i}\.", f"neck.convs.{convs + i}.")
        for i in range(count(used, r"neck\.extra_convs\.(\d+)\."))
    ]
    rules = _DETREX if layout == "detrex" else _MMDETECTION
    if any(re.fullmatch(r"(query_head\.transformer\.)?decoder\.norm\.weight", k) for k in used):
        rules = (*rules, (r"^query_embedding\.", "transformer.tgt_embed."))
    rules = (*extra, *_LAYERS, *rules, (r"^query_embedding\.", "query_embed."))
    names = translate(used, rules)
    renamed = carry(tensors, names)
    if layout == "detrex":
        offset = 0.5 if temperature == 10000 else 0.0
        arithmetic = Arithmetic(temperature, offset, 1e-3, 1e-3)
        return Source(layout, renamed, checkpoint, _DETREX_PREPROCESSING, arithmetic, names)
    # Two of DINO have equal tensors and other numbers.
    return Source(layout, renamed, checkpoint, names=names, **read_configuration(checkpoint))


def _of_official(checkpoint: Checkpoint) -> Source:
    """What the arguments in the file say; published files without any are as their code's defaults.

    DINO's sizes at test time are those of its augmentation.
    """
    settings = checkpoint.settings
    checkpoint.require_settings(_ARGUMENTS)
    plain = OFFICIAL_PREPROCESSING
    temperature = settings.get("pe_temperatureH")
    queries = settings.get("num_queries_one2one", settings.get("num_queries"))
    try:
        scale = float(settings.get("data_aug_scale_overlap") or 1)
        shortest = int(max(settings.get("data_aug_scales") or [plain.shortest_edge]) * scale)
        longest = int(float(settings.get("data_aug_max_size") or plain.longest_edge or 0) * scale)
        temperature = None if temperature is None else float(temperature)
        queries = None if queries is None else int(queries)
    except (TypeError, ValueError, OverflowError) as error:
        raise DetectorError(f"{checkpoint.path}: its arguments are damaged ({error})") from error
    if settings.get("pe_temperatureW", temperature) != temperature:
        raise DetectorError(f"{checkpoint.path}: pe_temperatureH and W differ, which is not read")
    dino = OFFICIAL_ARITHMETIC["dino"]
    return Source(
        "official",
        checkpoint.tensors,
        checkpoint,
        preprocessing=replace(plain, shortest_edge=shortest, longest_edge=longest),
        arithmetic=None
        if temperature in (None, dino.temperature)
        else replace(dino, temperature=temperature),
        num_queries=queries,
    )
