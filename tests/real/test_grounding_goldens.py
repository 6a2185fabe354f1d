"""Grounding DINO of transformers beside numbers of its authors' code (../shared/goldens-2)."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

from mfdetr_cache.detectors.huggingface.adapter import HuggingFaceDetector, Origin
from mfdetr_cache.detectors.huggingface.families import FAMILIES
from mfdetr_cache.detectors.huggingface.prompt import Prompt
from mfdetr_cache.detectors.official.adapter import OFFICIAL_PREPROCESSING
from mfdetr_cache.detectors.options import DetectorOptions
from tests.support.authors import golden_weights, load_rule2

pytestmark = pytest.mark.large

# The authors' names and transformers', in the order they are applied.
RENAMES = (
    (r"^backbone\.0\.norm(\d)", lambda m: f"B.hidden_states_norms.stage{int(m[1]) + 1}"),
    (r"^backbone\.0\.patch_embed\.proj", "B.swin.embeddings.patch_embeddings.projection"),
    (r"^backbone\.0\.patch_embed\.norm", "B.swin.embeddings.norm"),
    (r"^backbone\.0\.layers", "B.swin.encoder.layers"),
    (r"(blocks\.\d+)\.norm1", r"\1.layernorm_before"),
    (r"(blocks\.\d+)\.norm2", r"\1.layernorm_after"),
    (r"\.attn\.relative_position_bias_table", ".attention.relative_position_bias\\g<0>"),
    (r"relative_position_bias\.attn", "relative_position_bias"),
    (r"(blocks\.\d+)\.attn\.proj", r"\1.attention.o_proj"),
    (r"(blocks\.\d+)\.attn\.", r"\1.attention."),
    (r"^B\.", "model.backbone.conv_encoder.model."),
    (r"^bert\.", "model.text_backbone."),
    (r"^feat_map", "model.text_projection"),
    (r"^input_proj", "model.input_proj_vision"),
    (r"^transformer\.tgt_embed", "model.query_position_embeddings"),
    (r"^transformer\.enc_out_bbox_embed", "model.encoder_output_bbox_embed"),
    (r"^transformer\.encoder\.text_layers\.(\d)", r"T.encoder.layers.\1.text_enhancer_layer"),
    (r"^transformer\.encoder\.fusion_layers\.(\d)", r"T.encoder.layers.\1.fusion_layer"),
    (r"^transformer\.encoder\.layers\.(\d)", r"T.encoder.layers.\1.deformable_layer"),
    (r"(deformable_layer\.)norm1", r"\1self_attn_layer_norm"),
    (r"(deformable_layer\.)norm2", r"\1final_layer_norm"),
    (r"(text_enhancer_layer\.)norm1", r"\1layer_norm_before"),
    (r"(text_enhancer_layer\.)norm2", r"\1layer_norm_after"),
    (r"gamma_v", "vision_param"),
    (r"gamma_l", "text_param"),
    (r"layer_norm_v", "layer_norm_vision"),
    (r"layer_norm_l\b", "layer_norm_text"),
    (r"(fusion_layer\.attn\.(values_|out_)?)v_proj", r"\1vision_proj"),
    (r"(fusion_layer\.attn\.(values_|out_)?)l_proj", r"\1text_proj"),
    (r"^transformer\.decoder\.norm", "T.decoder.layer_norm"),
    (r"^transformer\.decoder\.ref_point_head", "T.decoder.reference_points_head"),
    (r"^transformer\.", "T."),
    (r"(decoder\.layers\.\d\.)cross_attn", r"\1encoder_attn"),
    (r"(decoder\.layers\.\d\.)norm1", r"\1encoder_attn_layer_norm"),
    (r"(decoder\.layers\.\d\.)norm2", r"\1self_attn_layer_norm"),
    (r"(decoder\.layers\.\d\.)norm3", r"\1final_layer_norm"),
    (r"(decoder\.layers\.\d\.)ca_text", r"\1encoder_attn_text"),
    (r"(decoder\.layers\.\d\.)catext_norm", r"\1encoder_attn_text_layer_norm"),
    (r"(layers\.\d\..*)linear([12])", r"\1fc\2"),
    (r"^T\.", "model."),
)


def of_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, value in weights.items():
        if key.startswith("bert.pooler"):
            continue
        name = key
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if name.endswith(("in_proj_weight", "in_proj_bias")):
            module, kind = name.rsplit(".in_proj_", 1)
            parts = [f"{module}.{part}.{kind}" for part in ("query", "key", "value")]
        elif ".attention.qkv." in name:
            parts = [name.replace("qkv", f"{part}_proj") for part in "qkv"]
        else:
            parts = [name]
        found.update(zip(parts, value.chunk(len(parts)), strict=True))
    return found


@pytest.fixture(scope="module")
def detector(shared: Path) -> HuggingFaceDetector:
    """With the caption of the numbers, and the maps of the encoder's end."""
    folder = shared / "goldens-2/groundingdino_swint"
    if not folder.is_dir():
        pytest.skip("../shared/goldens-2 is not there")
    made = golden_weights(folder.parent, folder.name, without="relative_position_index")
    model = GroundingDinoForObjectDetection(GroundingDinoConfig(num_queries=100)).eval()
    result = model.load_state_dict(of_transformers(made), strict=False)
    assert not result.unexpected_keys
    # A norm behind the whole Swin, whose output nobody reads.
    assert all("swin.layernorm" in k for k in result.missing_keys)
    ids = tuple(np.load(folder / "single.npz")["input_ids"][0].tolist())
    stops = [i for i, token in enumerate(ids) if token in (101, 1012)]
    spans = tuple((a + 1, b) for a, b in pairwise(stops))
    prompt = Prompt(("a cat", "remote control", "dog"), ids, spans)
    return HuggingFaceDetector(
        model,
        FAMILIES["grounding-dino"],
        Origin("hf:grounding-dino", "", {}, {}, str, prompt=prompt),
        replace(OFFICIAL_PREPROCESSING, shortest_edge=256),
        DetectorOptions(encoder_layer=6),
    )


@pytest.mark.parametrize("case", ["single", "padded_image"])
def test_the_numbers_of_the_authors(shared: Path, detector: HuggingFaceDetector, case: str) -> None:
    """Pictures of one caption: of several, the authors' heads take each other's masks."""
    folder = shared / "goldens-2/groundingdino_swint"
    expected = np.load(folder / f"{case}.npz")
    meta = json.loads((folder / "meta.json").read_text())["cases"][case]
    rule, sizes = load_rule2(folder.parent), meta["sizes_hw"]
    height, width = (max(s[axis] for s in sizes) for axis in (0, 1))
    pixels = torch.zeros(len(sizes), 3, height, width)
    padding = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        pixels[i, :, :h, :w] = torch.from_numpy(rule.image(h, w, i))
        padding[i, :h, :w] = False
    with torch.no_grad():
        output = detector.forward(pixels, padding)
    tokens = torch.from_numpy(expected["pred_logits"]).double().sigmoid()
    # [CLS] a cat . remote control . dog . [SEP]
    means = [tokens[..., a:b].mean(-1) for a, b in ((1, 3), (4, 6), (7, 8))]
    wanted = torch.logit(torch.stack(means, dim=-1)).float()
    for i in range(len(sizes)):
        theirs = torch.cat((wanted[i], torch.from_numpy(expected["pred_boxes"][i])), 1)
        ours = torch.cat((output.class_logits[i], output.boxes_cxcywh_norm[i]), 1)
        partner = torch.cdist(ours, theirs).argmin(1)
        assert len(partner.unique()) == 100
        gaps = (ours - theirs[partner]).abs()
        queries = torch.from_numpy(expected["queries_last"][i])[partner]
        # The tolerances of the goldens' README.
        assert gaps[:, :3].max() < 5e-4
        assert gaps[:, 3:].max() < 2e-5
        assert (output.queries[i] - queries).abs().max() < 5e-4
    levels = [output.maps[f"encoder{s}"].flatten(2).transpose(1, 2) for s in (8, 16, 32, 64)]
    found = torch.cat(levels, 1)[..., ::16].numpy()
    np.testing.assert_allclose(found, expected["encoder_out_every16"], rtol=0, atol=5e-4)
    c1 = output.maps["c1"][:, ::8, ::4, ::4].numpy()
    spread = meta["full_map_stats"]["c1"]["std"]
    np.testing.assert_allclose(c1, expected["c1_ch_every8_yx_every4"], rtol=0, atol=5e-4 * spread)
