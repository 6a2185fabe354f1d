"""Annotations and results as other tools write them: the same content in many forms."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

Documents = tuple[dict[str, Any], list[dict[str, Any]]]


def detections(document: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Masks beside the annotated ones, wrong ones among them, with compressed RLE."""
    random = np.random.default_rng(seed)
    sizes = {i["id"]: (i["height"], i["width"]) for i in document["images"]}
    found = []
    for annotation in document["annotations"] * 2:
        h, w = sizes[annotation["image_id"]]
        rle = coco_mask.merge(coco_mask.frPyObjects(annotation["segmentation"], h, w))
        shifted = np.roll(coco_mask.decode(rle), random.integers(-6, 7, 2), axis=(0, 1))
        moved = coco_mask.encode(np.asfortranarray(shifted))
        found.append(
            {
                "image_id": annotation["image_id"],
                "category_id": int(random.choice([annotation["category_id"], 3, 7])),
                "score": float(random.integers(1, 20)) / 20,
                "bbox": coco_mask.toBbox(moved).tolist(),
                "segmentation": {"size": [h, w], "counts": moved["counts"].decode()},
            }
        )
    return found


def copied(documents: Documents) -> Documents:
    found: Documents = json.loads(json.dumps(documents))
    return found


def entries(documents: Documents) -> Iterator[dict[str, Any]]:
    yield from documents[0]["annotations"]
    yield from documents[1]


def renumber(new: Callable[[int], Any]) -> Callable[[Documents], None]:
    """Other ids of annotations; ``new`` gets their place."""

    def apply(documents: Documents) -> None:
        for place, annotation in enumerate(documents[0]["annotations"]):
            annotation["id"] = new(place)

    return apply


def rename(key: str, listed: str, new: Callable[[int], Any]) -> Callable[[Documents], None]:
    """Other ids of images or categories, the same everywhere, in the same order."""

    def apply(documents: Documents) -> None:
        for entry in documents[0][listed]:
            entry["id"] = new(entry["id"])
        for entry in entries(documents):
            entry[key] = new(entry[key])

    return apply


def rewrite(key: str, new: Callable[[Any], Any], *, results: bool) -> Callable[[Documents], None]:
    """Another way to write a field of all annotations, and of the results too."""

    def apply(documents: Documents) -> None:
        for entry in entries(documents) if results else documents[0]["annotations"]:
            entry[key] = new(entry[key])

    return apply


def drop(key: str) -> Callable[[Documents], None]:
    def apply(documents: Documents) -> None:
        for annotation in documents[0]["annotations"]:
            if not annotation[key]:
                del annotation[key]

    return apply


def files_for_ids(documents: Documents, those: Iterable[dict[str, Any]]) -> None:
    """Images named by their files, as tools do that have no ids."""
    names = {i["id"]: i["file_name"] for i in documents[0]["images"]}
    for number, entry in enumerate(those):
        name = names[entry["image_id"]]
        entry["image_id"] = name if number % 2 else name.removesuffix(".png")


def by_files_named_as_others(documents: Documents) -> None:
    """Annotations by files whose names are other images' ids."""
    ids = [i["id"] for i in documents[0]["images"]]
    for image, other in zip(documents[0]["images"], ids[1:] + ids, strict=False):
        image["file_name"] = f"photos/{other}.png"
    names = {i["id"]: i["file_name"] for i in documents[0]["images"]}
    for annotation in documents[0]["annotations"]:
        annotation["image_id"] = names[annotation["image_id"]].removeprefix("photos/")


def in_numbers(documents: Documents) -> None:
    """Results that name images by the number in their file's name, as ultralytics does."""
    for place, image in enumerate(documents[0]["images"]):
        image["file_name"] = f"photos/{place + 100:06d}.jpg"
    for result in documents[1]:
        result["image_id"] = 100 + (result["image_id"] - 100) // 5


def in_paths(documents: Documents) -> None:
    names = {i["id"]: i["file_name"] for i in documents[0]["images"]}
    for number, result in enumerate(documents[1]):
        path = f"/data/val/{names[result['image_id']]}"
        result["image_id"] = path if number % 2 else path.replace("/", "\\")


def by_converted_files(documents: Documents) -> None:
    """Numbered anew in every folder, and results of them as another format in another place."""
    for place, image in enumerate(documents[0]["images"]):
        image["file_name"] = f"camera{place % 2}/{place // 2:04d}.png"
    names = {i["id"]: i["file_name"] for i in documents[0]["images"]}
    for result in documents[1]:
        result["image_id"] = f"/data/{names[result['image_id']]}"
    for image in documents[0]["images"][:1]:
        image["file_name"] = image["file_name"].replace("0000.png", "first.tif")
    for result in documents[1]:
        result["image_id"] = result["image_id"].replace("camera0/0000.png", "x/First.JPG")


def in_capitals(documents: Documents) -> None:
    by_name(documents)
    for result in documents[1]:
        result["category_id"] = result["category_id"].upper()


def names_for_ids(documents: Documents, those: Iterable[dict[str, Any]]) -> None:
    names = {c["id"]: c["name"] for c in documents[0]["categories"]}
    for entry in those:
        entry["category_id"] = names[entry["category_id"]]


def by_name(documents: Documents) -> None:
    names_for_ids(documents, documents[1])


def padded(documents: Documents) -> None:
    for entry in documents[0]["images"] + documents[0]["categories"]:
        entry["id"] = f"{entry['id']:06d}"


def in_parts(documents: Documents, every: int = 1) -> None:
    """Polygons in parts of the sides of the image, of every so many annotations."""
    sizes = {i["id"]: (i["width"], i["height"]) for i in documents[0]["images"]}
    for annotation in documents[0]["annotations"][::every]:
        sides = sizes[annotation["image_id"]]
        annotation["segmentation"] = of_polygons(
            lambda s, sides=sides: [[v / sides[i % 2] for i, v in enumerate(p)] for p in s]
        )(annotation["segmentation"])


def in_parts_as(change: Callable[[Any], Any]) -> Callable[[Documents], None]:
    """Polygons in parts of the sides, and in another form too."""

    def apply(documents: Documents) -> None:
        in_parts(documents)
        rewrite("segmentation", of_polygons(change), results=False)(documents)

    return apply


def counts_list(segmentation: Any) -> Any:
    if isinstance(segmentation, list):
        return segmentation
    flat = coco_mask.decode(segmentation).flatten(order="F")
    ends = np.flatnonzero(np.diff(flat, prepend=0))
    return {**segmentation, "counts": np.diff(ends, prepend=0, append=flat.size).tolist()}


def pairs(segmentation: Any) -> Any:
    if isinstance(segmentation, dict):
        return segmentation
    return [np.reshape(p, (-1, 2)).tolist() for p in segmentation]


def as_points(polygons: Any) -> Any:
    return [[{"x": x, "y": y} for x, y in p] for p in pairs(polygons)]


def of_polygons(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda s: change(s) if isinstance(s, list) else s


def of_rles(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda s: change(s) if isinstance(s, dict) else s


WAYS: dict[str, Callable[[Documents], None]] = {
    "as it is": lambda _: None,
    "annotation ids from 0": renumber(lambda i: i),
    "negative": renumber(lambda i: i - 7),
    "all the same": renumber(lambda _: 4),
    "repeated per image": renumber(lambda i: i % 2),
    "text": renumber(lambda i: f"c0ffee-{i}"),
    "null": renumber(lambda _: None),
    "above 2**63": renumber(lambda i: 2**70 + i),
    "floats": renumber(lambda i: i + 0.5),
    "image ids as text": rename("image_id", "images", str),
    "as floats": rename("image_id", "images", float),
    "negative image ids": rename("image_id", "images", lambda i: i - 1000),
    "image ids from 0": rename("image_id", "images", lambda i: (i - 100) // 5),
    "image ids that no double holds": rename("image_id", "images", lambda i: 2**62 + i),
    "image ids with zeros before them": rename("image_id", "images", lambda i: f"{i:06d}"),
    "zeros in the images alone": padded,
    "image names as ids": rename("image_id", "images", lambda i: f"f{i}"),
    "results by file name": lambda d: files_for_ids(d, d[1]),
    "annotations by file name": lambda d: files_for_ids(d, d[0]["annotations"]),
    "annotations by files named as other ids": by_files_named_as_others,
    "results by a number in the file's name": in_numbers,
    "results by a path": in_paths,
    "results by the category's name": by_name,
    "by its name in capitals": in_capitals,
    "all by the category's name": lambda d: names_for_ids(d, entries(d)),
    "results by files that were converted": by_converted_files,
    "category ids as text": rename("category_id", "categories", str),
    "category ids as floats": rename("category_id", "categories", float),
    "category ids as text of floats": rename("category_id", "categories", lambda i: f"{i}.0"),
    "category ids from 0": rename("category_id", "categories", lambda i: i - 3),
    "negative category ids": rename("category_id", "categories", lambda i: i - 12),
    "category names as ids": rename("category_id", "categories", lambda i: f"k{i:02d}"),
    "no iscrowd where it is 0": drop("iscrowd"),
    "iscrowd as text": rewrite("iscrowd", str, results=False),
    "iscrowd as truth": rewrite("iscrowd", bool, results=False),
    "iscrowd as float": rewrite("iscrowd", float, results=False),
    "iscrowd NaN": rewrite("iscrowd", lambda v: v or math.nan, results=False),
    "is_crowd": lambda d: [a.update(is_crowd=a.pop("iscrowd")) for a in d[0]["annotations"]],
    "iscrowd null": rewrite("iscrowd", lambda v: v or None, results=False),
    "boxes as text": rewrite("bbox", str, results=True),
    "corners": rewrite("bbox", lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]], results=True),
    "flat polygons": rewrite("segmentation", of_polygons(lambda s: s[0]), results=False),
    "points as dictionaries": rewrite("segmentation", of_polygons(as_points), results=False),
    "points as dictionaries in parts of the sides": in_parts_as(as_points),
    "polygons as text in parts of the sides": in_parts_as(json.dumps),
    "Python's tuples as text in parts of the sides": in_parts_as(
        lambda s: str([tuple(map(tuple, p)) for p in pairs(s)])
    ),
    "bare points as dictionaries": rewrite(
        "segmentation",
        of_polygons(lambda s: [{"y": y, "x": x} for x, y in pairs(s)[0]]),
        results=False,
    ),
    "points": rewrite("segmentation", pairs, results=False),
    "bare points": rewrite("segmentation", of_polygons(lambda s: pairs(s)[0]), results=False),
    "empty polygons beside": rewrite(
        "segmentation", of_polygons(lambda s: [[], *s]), results=False
    ),
    "a list too many": rewrite("segmentation", of_polygons(lambda s: [s]), results=False),
    "two lists too many around points": rewrite(
        "segmentation", of_polygons(lambda s: [[pairs(s)]]), results=False
    ),
    "null beside polygons": rewrite(
        "segmentation", of_polygons(lambda s: [None, *s]), results=False
    ),
    "polygons in parts of the sides": in_parts,
    "polygons in parts of the sides beside others in pixels": lambda d: in_parts(d, every=3),
    "empty polygons beside parts of the sides": in_parts_as(lambda s: [[], *s]),
    "polygons as text": rewrite("segmentation", of_polygons(json.dumps), results=False),
    "a polygon far outside beside": rewrite(
        "segmentation", of_polygons(lambda s: [*s, [400, 400, 500, 400, 500, 500]]), results=False
    ),
    "counts in a list": rewrite("segmentation", counts_list, results=True),
    "Python as text": rewrite("segmentation", str, results=True),
    "numbers as text in parts of the sides": in_parts_as(
        lambda s: [[str(v) for v in p] for p in s]
    ),
    "points of numbers as text in parts of the sides": in_parts_as(
        lambda s: [[{"x": str(x), "y": str(y)} for x, y in pairs(s)[0]]]
    ),
    "null beside parts of the sides": in_parts_as(lambda s: [None, *s]),
    "Python's tuples as text": rewrite(
        "segmentation", of_polygons(lambda s: str(tuple(map(tuple, pairs(s)[0])))), results=False
    ),
    "numpy's boxes as text": rewrite("bbox", lambda b: f"[{' '.join(map(str, b))}]", results=True),
    "counts on a line": rewrite(
        "segmentation", of_rles(lambda s: {**s, "counts": s["counts"] + "\n"}), results=True
    ),
    "RLE as text": rewrite("segmentation", of_rles(json.dumps), results=True),
    "counts alone": rewrite("segmentation", of_rles(lambda s: s["counts"]), results=True),
    "bytes as text": rewrite(
        "segmentation", of_rles(lambda s: {**s, "counts": str(s["counts"].encode())}), results=True
    ),
    "RLE in a list": rewrite("segmentation", of_rles(lambda s: [s]), results=True),
    "RLE without a size": rewrite(
        "segmentation", of_rles(lambda s: {"counts": s["counts"]}), results=True
    ),
    "sizes as floats": rewrite(
        "segmentation",
        of_rles(lambda s: {**s, "size": [float(v) for v in s["size"]]}),
        results=True,
    ),
}
