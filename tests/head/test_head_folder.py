"""A head's folder: what was saved is loaded, and what was changed is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mfdetr_cache.errors import HeadError, MfdetrError
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.folder import RunRecord, load_head, save_head, save_run_config
from mfdetr_cache.identity import detector_identity
from tests.head.test_mask_head import SMALL, randomise
from tests.support.images import make_batch, make_spec


def test_saved_and_loaded_heads_agree(tmp_path: Path) -> None:
    spec = make_spec(level_embed=True)
    head = build_head(SMALL, spec).eval()
    randomise(head)
    save_run_config(tmp_path, SMALL, RunRecord(detector=detector_identity(spec)))
    save_head(tmp_path, head.state_dict())
    loaded = load_head(tmp_path)
    assert loaded.head.config == SMALL
    batch = make_batch(spec, [(64, 64)])
    assert torch.equal(loaded.head(batch).mask_logits, head(batch).mask_logits)


def test_faulty_head_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(HeadError, match=r"is no trained head: it has no config\.json"):
        load_head(tmp_path)
    spec = make_spec()
    save_run_config(tmp_path, SMALL, RunRecord(detector=detector_identity(spec)))
    with pytest.raises(HeadError, match=r"it has no head\.safetensors"):
        load_head(tmp_path)
    save_head(tmp_path, build_head(dataclasses.replace(SMALL, hidden_dim=8), spec).state_dict())
    with pytest.raises(HeadError, match="does not fit its config.json"):
        load_head(tmp_path)
    (tmp_path / "head.safetensors").write_bytes(b"torn")
    with pytest.raises(HeadError, match="head.safetensors is damaged"):
        load_head(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(HeadError, match="config.json is damaged"):
        load_head(tmp_path)


def test_a_head_that_was_changed_is_refused(tmp_path: Path) -> None:
    spec = make_spec()
    for seed, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        record = RunRecord(detector=detector_identity(spec), train={"seed": seed})
        save_run_config(tmp_path / name, SMALL, record)
        save_head(tmp_path / name, build_head(SMALL, spec).state_dict())
    whole = {f.name: f.read_bytes() for f in (tmp_path / "a").iterdir()}
    load_head(tmp_path / "a")
    random = np.random.default_rng(0)
    for name, data in whole.items():
        for place in random.integers(0, len(data), 150).tolist():
            flipped = bytearray(data)
            flipped[place] ^= 1 << int(random.integers(8))
            (tmp_path / "a" / name).write_bytes(flipped)
            with pytest.raises(MfdetrError) as caught:
                load_head(tmp_path / "a")
            assert "\n" not in str(caught.value)
        (tmp_path / "a" / name).write_bytes(data)
    # Whole, and in the wrong place.
    (tmp_path / "a/head.safetensors").write_bytes((tmp_path / "b/head.safetensors").read_bytes())
    with pytest.raises(HeadError, match=r"head\.safetensors is of another run than its config"):
        load_head(tmp_path / "a")


def test_sizes_in_a_config_take_no_memory(tmp_path: Path) -> None:
    spec = make_spec()
    save_run_config(tmp_path, SMALL, RunRecord(detector=detector_identity(spec)))
    document = json.loads((tmp_path / "config.json").read_bytes())
    del document["sha256"], document["run"]
    (tmp_path / "config.json").write_text(json.dumps(document))
    save_head(tmp_path, build_head(SMALL, spec).state_dict())
    for key, value, said in (
        ("hidden_dim", 2**40, "hidden_dim must be a multiple of 8 from 8 to 8192"),
        ("roi_size", 10**6, "roi_size must be a multiple of 8"),
        ("hidden_dim", 8192, "does not fit its config.json"),
    ):
        changed = {**document, "head": {**document["head"], key: value}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(MfdetrError, match=said):
            load_head(tmp_path)
