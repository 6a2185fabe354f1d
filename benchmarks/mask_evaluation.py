"""Masks to AP: paste, encode, match, accumulate; against the straightforward way, same numbers.

The straightforward way is what a pycocotools pipeline does: every mask into a full image
(torchvision's paste), encode each bitmap, COCOeval.

python benchmarks/mask_evaluation.py [--images 149] [--detections 100]
"""

import argparse
import contextlib
import io
import resource
import time

import numpy as np
import torch
from geometry import COCO_SIZES, made_ground_truth
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval
from torch.nn import functional

from mfdetr_cache.evaluation.coco_metrics import Result, coco_ground_truth, evaluate_results
from mfdetr_cache.ops.masks import compress_run_lengths
from mfdetr_cache.ops.masks_pasting import run_lengths_in_box

Made = list[tuple[int, tuple[int, int], NDArray[np.float64], NDArray[np.float32], NDArray]]


def made_detections(images: int, detections: int) -> tuple[Made, object]:
    """Blobs in boxes near made-up objects."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32] / 31 * 2 - 1
    made, truths = [], []
    for image in range(images):
        size = COCO_SIZES[image % len(COCO_SIZES)]
        truth = made_ground_truth(size, 7, image)
        truths.append((image + 1, size, truth))
        picked = random.integers(0, len(truth), detections)
        boxes = truth.boxes_xyxy[picked] + random.normal(0, 8, (detections, 4))
        boxes = np.sort(boxes.reshape(-1, 2, 2), axis=1).reshape(-1, 4).astype(np.float64)
        wobble = random.uniform(0.7, 1.2, (detections, 1, 1))
        masks = 1 / (1 + np.exp(8 * (x**2 + y**2 - wobble)))
        made.append((image + 1, size, boxes, masks.astype(np.float32), random.random(detections)))
    return made, coco_ground_truth(truths, [{"id": 1, "name": "thing"}])


def result(image_id: int, rle: dict[str, object], score: float) -> Result:
    return {"image_id": image_id, "category_id": 1, "segmentation": rle, "score": score}


def ours(made: Made, truth: object) -> float:
    results = []
    for image_id, size, boxes, masks, scores in made:
        for box, mask, score in zip(boxes, masks, scores, strict=True):
            runs = run_lengths_in_box(mask, box, size)
            results.append(result(image_id, compress_run_lengths(runs, size), float(score)))
    return evaluate_results(truth, results, "segm").AP  # type: ignore[arg-type]


def straightforward(made: Made, truth: object) -> float:
    results = []
    for image_id, size, boxes, masks, scores in made:
        height, width = size
        for box, mask, score in zip(boxes, masks, scores, strict=True):
            ys = (torch.arange(height) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
            xs = (torch.arange(width) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
            grid = torch.stack(torch.meshgrid(ys, xs, indexing="ij")[::-1], -1).float()
            full = functional.grid_sample(
                torch.from_numpy(mask)[None, None],
                grid[None],
                padding_mode="border",
                align_corners=False,
            )[0, 0]
            inside = (grid.abs() <= 1).all(-1)
            bitmap = ((full >= 0.5) & inside).numpy().astype(np.uint8)
            rle = coco_mask.encode(np.asfortranarray(bitmap))
            results.append(result(image_id, rle, float(score)))
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")  # type: ignore[attr-defined]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=149)
    parser.add_argument("--detections", type=int, default=100)
    options = parser.parse_args()
    made, truth = made_detections(options.images, options.detections)
    seconds = {}
    found = {}
    for way in (ours, straightforward):
        started = time.perf_counter()
        found[way.__name__] = way(made, truth)
        seconds[way.__name__] = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(
            f"{way.__name__}: AP {100 * found[way.__name__]:.3f}, "
            f"{seconds[way.__name__]:.1f} s, peak memory so far {peak:.2f} GB"
        )
    print(f"ratio {seconds['straightforward'] / seconds['ours']:.1f}")


if __name__ == "__main__":
    main()
