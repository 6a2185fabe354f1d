"""Grounding DINO from its authors' file beside numbers of their code (../shared/goldens-2)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.protocol import Detector
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.detectors.translated import loading
from tests.support.authors import golden_weights
from tests.support.official import load_rule

pytestmark = pytest.mark.large


class _Tokenizer:
    """Splits the phrases of the numbers as BERT's does."""

    cls_token_id, sep_token_id = 101, 102

    def __init__(self, ids: list[int]) -> None:
        self._ids = {"a cat": ids[1:3], "remote control": ids[4:6], "dog": ids[7:8]}

    def convert_tokens_to_ids(self, token: str) -> int:
        assert token == "."
        return 1012

    def __call__(self, words: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": self._ids[words]}


@pytest.fixture(scope="module")
def detector(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Detector:
    """From a file as the authors write it, with the caption of the numbers and the last maps."""
    folder = shared / "goldens-2/groundingdino_swint"
    if not folder.is_dir():
        pytest.skip("../shared/goldens-2 is not there")
    made = golden_weights(folder.parent, folder.name, without="relative_position_index")
    # What the published files have besides.
    made["label_enc.weight"] = torch.zeros(2001, 256)
    made["bert.embeddings.position_ids"] = torch.arange(512)[None]
    path = tmp_path_factory.mktemp("authors") / "groundingdino_swint_ogc.pth"
    torch.save({"model": {f"module.{k}": v for k, v in made.items()}}, path)
    ids = np.load(folder / "single.npz")["input_ids"][0].tolist()
    phrases = ("a cat", "remote control", "dog")
    options = DetectorOptions(encoder_layer=6, input_size=(256, 1333), prompt=phrases)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loading, "text_splitter", lambda _: _Tokenizer(ids))
        found = load_detector("auto", str(path), options)
    path.unlink()
    assert found.spec.name == "grounding-dino"
    assert found.spec.label_names == phrases
    return found


@pytest.mark.parametrize("case", ["single", "padded_image"])
def test_the_numbers_of_the_authors(shared: Path, detector: Detector, case: str) -> None:
    """Pictures of one caption: of several, the authors' heads take each other's masks."""
    folder = shared / "goldens-2/groundingdino_swint"
    expected = np.load(folder / f"{case}.npz")
    meta = json.loads((folder / "meta.json").read_text())["cases"][case]
    rule, sizes = load_rule(folder.parent, "rule2"), meta["sizes_hw"]
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
