"""Annotation files of other formats, told by what only they have."""

from collections.abc import Iterator

# A key, and whose it is. Where several are there, the first decides.
_TELLING = {
    "segments_info": "COCO panoptic",
    "caption": "COCO captions",
    "videos": "YouTube-VIS",
    "shapes": "labelme",
    "_via_img_metadata": "VIA",
    "assets": "VoTT",
    "regions": "VIA",
    "imgHeight": "Cityscapes",
    "classTitle": "Supervisely",
    "geometryType": "Supervisely",
    "item": "Darwin (V7)",
    "Labeled Data": "Labelbox",
    "data_row": "Labelbox",
    "task_id": "Scale",
    "z_order": "Datumaro",
    "samples": "FiftyOne",
    "features": "GeoJSON",
    "poly2d": "BDD100K",
    "box2d": "BDD100K",
    "bbox_mode": "detectron2",
    "data_list": "MMDetection",
    "coordinates": "CreateML",
    "annotator": "Label Studio",
    "from_name": "Label Studio",
    "completed_by": "Label Studio",
}
_EXPORT = "export COCO instances from its tool, or convert it (datumaro and fiftyone do)"
_DEEPEST, _BROADEST = 6, 20


def told_of_format(document: object) -> str:
    """What a document is that is no COCO instances, and what to do; empty if that is unknown."""
    keys = set(_keys(document, _DEEPEST))
    name = next((name for key, name in _TELLING.items() if key in keys), None)
    return f"looks like {name}, not COCO instances; {_EXPORT}" if name else ""


def told_of_xml(text: str) -> str:
    """The same of a text that is no JSON."""
    if "<annotation" not in text:
        return ""
    name = "CVAT's XML" if "<annotations" in text else "Pascal VOC's XML, which has boxes only"
    return f"it looks like {name}; {_EXPORT}"


def _keys(value: object, depth: int) -> Iterator[object]:
    """The keys of a document, of the first entry of each list in it, and so on."""
    inner: list[object] = value[:1] if isinstance(value, list) else []
    if isinstance(value, dict):
        yield from value
        inner = list(value.values())[:_BROADEST]
    for entry in inner if depth else ():
        yield from _keys(entry, depth - 1)
