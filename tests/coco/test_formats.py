"""Files of other formats than COCO instances are called by their name."""

import json
from pathlib import Path
from typing import Any

import pytest

from mfdetr_cache.coco.annotations import load_coco_split
from mfdetr_cache.errors import DatasetError

POLYGON = {"label": "a", "points": [[1, 2], [3, 4], [5, 6]]}


@pytest.mark.parametrize(
    ("document", "name"),
    [
        ({"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a"}]}, "COCO capt"),
        ({"videos": [], "categories": [], "annotations": []}, "YouTube-VIS"),
        ({"version": "5.0", "shapes": [POLYGON], "imagePath": "a.jpg"}, "labelme"),
        ({"a.jpg12": {"filename": "a.jpg", "regions": []}}, "VIA"),
        ({"_via_settings": {}, "_via_img_metadata": {}}, "VIA"),
        ({"imgHeight": 9, "imgWidth": 9, "objects": []}, "Cityscapes"),
        ({"size": {}, "objects": [{"classTitle": "a", "points": {"exterior": []}}]}, "Supervisely"),
        ({"version": "2.0", "item": {"name": "a.jpg"}, "annotations": [{}]}, "Darwin"),
        ([{"task_id": "a", "response": {"annotations": [POLYGON]}}], "Scale"),
        ([{"ID": "a", "Labeled Data": "http://x/a.jpg"}], "Labelbox"),
        ([{"name": "a.jpg", "labels": [{"category": "car", "poly2d": []}]}], "BDD100K"),
        ([{"data": {"image": "a.jpg"}, "annotations": [{"completed_by": 1}]}], "Label Studio"),
        ([{"image": "a.jpg", "label": [POLYGON], "annotator": 1}], "Label Studio"),
        ("<?xml version='1.0'?>\n<annotations><image id='0'/></annotations>", "CVAT's XML"),
        ("<annotation><filename>a.jpg</filename></annotation>", "Pascal VOC's XML, which has box"),
    ],
)
def test_other_formats_are_called_by_their_name(tmp_path: Path, document: Any, name: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(DatasetError, match=rf"looks like {name}.*; export COCO instances from"):
        load_coco_split(path)


def test_what_is_of_no_known_format_is_described(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    nested: Any = []
    for _ in range(500):
        nested = [nested]
    path.write_text(json.dumps([{"file_name": "a.jpg", "objects": nested}]))
    with pytest.raises(DatasetError, match="a list, as results are .its first entry has 'file_n"):
        load_coco_split(path)
