"""Names of classes as checkpoints of today's DETRs hold them."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from mfdetr_cache.detectors.labels import COCO_NAMES, names_of_checkpoint
from mfdetr_cache.detectors.options import DetectorOptions, options_of
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.errors import DetectorError
from mfdetr_cache.identity import detector_identity
from tests.support.small_checkpoints import LABELS, state_dict, write_small


def test_names_of_classes(tmp_path: Path) -> None:
    assert names_of_checkpoint(80, ())[79] == "toothbrush"
    assert names_of_checkpoint(91, ()) == COCO_NAMES
    assert names_of_checkpoint(366, ()) == {}
    # Roboflow's root category; one class output that is never used; names by label.
    assert names_of_checkpoint(4, ("a", "b")) == {1: "a", 2: "b"}
    assert names_of_checkpoint(3, ("a", "b")) == {0: "a", 1: "b"}
    # Of the training before: they name none of the outputs.
    assert names_of_checkpoint(2, ("a", "b", "c")) == {}
    assert names_of_checkpoint(7, ("a", "b")) == {}
    torch.save({"model": state_dict("deimv2")}, tmp_path / "best.pth")
    path = str(tmp_path / "best.pth")
    assert load_detector("deimv2", path).spec.label_names == ("LABEL_0", "LABEL_1", "LABEL_2")
    named = load_detector("deimv2", path, DetectorOptions(labels=LABELS))
    assert named.spec.label_names == LABELS
    assert options_of(detector_identity(named.spec)).labels == LABELS
    with pytest.raises(DetectorError, match="--labels has 2 names and .* has 3 class outputs"):
        load_detector("deimv2", path, DetectorOptions(labels=LABELS[:2]))
    write_small(tmp_path / "rf.pth", "rf-detr")
    spare = load_detector("rf-detr", str(tmp_path / "rf.pth"), DetectorOptions(labels=LABELS[:2]))
    assert spare.spec.label_names == (*LABELS[:2], "LABEL_2")


@pytest.mark.parametrize(
    ("args", "first"),
    [
        # RF-DETR before 1.5: the root category counts, and ids are outputs.
        (argparse.Namespace(num_classes=3, class_names=["a", "b"]), 1),
        # Later ones number classes from 0 and make an output more.
        ({"num_classes": 2, "class_names": ["a", "b"]}, 0),
    ],
    ids=["1.3", "1.6"],
)
def test_names_of_rf_detr_stand_where_its_version_trained_them(
    tmp_path: Path, args: Any, first: int
) -> None:
    path = str(tmp_path / "checkpoint_best_total.pth")
    torch.save({"model": state_dict("rf-detr"), "args": args}, path)
    expected = ["LABEL_0", "LABEL_1", "LABEL_2"]
    expected[first : first + 2] = ["a", "b"]
    assert load_detector("auto", path).spec.label_names == tuple(expected)
    expected[first : first + 2] = ["c", "d"]
    given = load_detector("auto", path, DetectorOptions(labels=("c", "d")))
    assert given.spec.label_names == tuple(expected)


def test_names_by_output_are_read_whatever_they_are_keyed_by(tmp_path: Path) -> None:
    path = str(tmp_path / "best.pth")
    for key, names in (("names", {2: "c", 0: "a"}), ("id2label", {"2": "c", "0": "a"})):
        torch.save({"model": state_dict("deimv2"), key: names}, path)
        assert load_detector("auto", path).spec.label_names == ("a", "LABEL_1", "c")
