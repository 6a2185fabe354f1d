"""DEIMv2-femto, trained on COCO, from its authors' names and from transformers' folder."""

import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.config.export import ExportConfig
from mfdetr_pipelines.config.extract import ExtractConfig
from mfdetr_pipelines.config.predict import PredictConfig
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.evaluate import run_evaluate
from mfdetr_pipelines.export import run_export
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.predict import run_predict
from mfdetr_pipelines.train_head import run_train_head
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.reporter import SilentReporter
from tests.pipelines.test_train_head import small_recipe

# transformers' names back to the authors', written down here and not taken from the reader.
_BACK = [
    (r"^model\.conv_encoder\.model\.embedder\.", "backbone.stem."),
    (r"^model\.conv_encoder\.model\.encoder\.", "backbone."),
    (r"^(backbone\..*)\.convolution\.", r"\1.conv."),
    (r"^(backbone\..*)\.normalization\.", r"\1.bn."),
    (r"^model\.encoder\.down_conv([12])\.conv\.", r"encoder.down_sample\1.1."),
    (r"^model\.encoder\.down_conv([12])\.norm\.", r"encoder.down_sample\1.2."),
    (r"^model\.encoder\.bi_fusion_conv\.", "encoder.bi_fusion.cv."),
    (r"(fpn|pan)_block\.conv1\.", r"\1_block.cv1."),
    (r"(fpn|pan)_block\.conv2\.", r"\1_block.cv4."),
    (r"csp_rep1\.conv2\.", "cv2.1."),
    (r"csp_rep2\.conv2\.", "cv3.1."),
    (r"csp_rep1\.", "cv2.0."),
    (r"csp_rep2\.", "cv3.0."),
    (r"^model\.encoder\.", "encoder."),
    (r"^model\.decoder\.class_embed\.", "decoder.dec_score_head."),
    (r"^model\.decoder\.bbox_embed\.", "decoder.dec_bbox_head."),
    (r"^model\.decoder\.(layers|lqe_layers)\.", r"decoder.decoder.\1."),
    (r"^model\.decoder\.", "decoder."),
    (r"^model\.", "decoder."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.self_attn_layer_norm\.weight", ".norm1.scale"),
    (r"\.encoder_attn_layer_norm\.weight", ".norm2.scale"),
    (r"\.final_layer_norm\.weight", ".norm3.scale"),
    (r"\.mlp\.down_proj\.", ".swish_ffn.w3."),
    (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
]
_PACKED = [
    ("self_attn.{}_proj.", "qkv", r"self_attn.in_proj_"),
    ("mlp.{}_proj.", ("gate", "up"), "swish_ffn.w12."),
]


def authors_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found = dict(weights)
    for pattern, parts, packed in _PACKED:
        first = pattern.format(parts[0])
        for name in [n for n in found if first in n]:
            pieces = [found.pop(name.replace(first, pattern.format(p))) for p in parts]
            found[name.replace(first, packed)] = torch.cat(pieces)
    for pattern, replacement in _BACK:
        found = {re.sub(pattern, replacement, name): v for name, v in found.items()}
    # The projection before query selection is transformers' own.
    return {k: v for k, v in found.items() if not k.startswith("decoder.enc_output.")}


@pytest.mark.slow
def test_both_layouts_are_the_same_detector(shared: Path, tmp_path: Path) -> None:
    folder = shared / "detectors/deimv2-femto-coco"
    torch.save(
        {"model": authors_names(load_file(folder / "model.safetensors"))}, tmp_path / "a.pth"
    )
    authors = load_detector("auto", str(tmp_path / "a.pth"))
    converted = load_detector("auto", str(folder))
    assert (authors.spec.name, converted.spec.name) == ("deimv2", "hf:deimv2")
    # The side is the published one, as the folder's weights hold no anchors.
    for field in ("label_names", "num_queries", "maps", "preprocessing"):
        assert getattr(authors.spec, field) == getattr(converted.spec, field), field
    for file in sorted((shared / "coco-mini/val2017").iterdir())[:2]:
        pixels = converted.preprocess(Image.open(file).convert("RGB"))[None]
        one, two = authors.forward(pixels), converted.forward(pixels)
        assert torch.equal(one.class_logits, two.class_logits)
        assert torch.equal(one.boxes_cxcywh_norm, two.boxes_cxcywh_norm)
        assert all(torch.equal(one.maps[m.name], two.maps[m.name]) for m in authors.spec.maps)


@pytest.mark.large
def test_a_trained_file_of_the_authors_goes_the_whole_way(shared: Path, tmp_path: Path) -> None:
    """In the container of their trainings: averaged weights, an optimiser, settings, last ones."""
    folder = shared / "detectors/deimv2-femto-coco"
    weights = authors_names(load_file(folder / "model.safetensors"))
    document = {
        "date": "2026-11-26",
        "last_epoch": 131,
        "model": {f"module.{k}": torch.zeros_like(v) for k, v in weights.items()},
        "ema": {"module": weights, "updates": 9000},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]},
        "args": Namespace(output_dir=Path("out"), best=np.float64(0.3)),
    }
    path, cache, head = str(tmp_path / "best_stg2.pth"), tmp_path / "c.zarr", tmp_path / "head"
    torch.save(document, path)
    config = ExtractConfig(
        path,
        str(cache),
        images=shared / "coco-mini/val2017",
        annotations=shared / "coco-mini/annotations/instances_val2017.json",
        limit=12,
        device="cpu",
    )
    found = run_extract(config, SilentReporter())
    same = replace(config, weights=str(folder), cache=str(tmp_path / "hf.zarr"))
    wanted = run_extract(same, SilentReporter())
    assert found.box == wanted.box
    assert found.box is not None
    assert found.box.AP > 0.2  # published: 31.0 on all of val2017
    run_train_head(TrainHeadConfig(str(cache), head, small_recipe(steps=3)), SilentReporter())
    assert run_evaluate(EvaluateConfig(str(cache), head), SilentReporter()).box == found.box
    photo = str(min((shared / "coco-mini/val2017").iterdir()))
    seen = run_predict(PredictConfig((photo,), path, head, tmp_path / "masks"), SilentReporter())
    assert seen.images[0].num_objects > 0
    run_export(ExportConfig(head, tmp_path / "model.onnx", weights=path), SilentReporter())
    graph = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    assert graph.get_inputs()[0].shape == [1, 3, 416, 416]
