"""Ground truth into RoI grids, against decoding whole masks and cropping them.

python benchmarks/rasterise.py [--objects 400]
"""

import argparse
import time

import numpy as np
import torch
from geometry import COCO_SIZES, made_ground_truth
from torchvision.ops import roi_align

from mfdetr_cache.ops.masks import decode_run_lengths, rasterise_in_boxes

GRID = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=400)
    options = parser.parse_args()
    images = []
    for number in range(-(-options.objects // 7)):
        size = COCO_SIZES[number % len(COCO_SIZES)]
        truth = made_ground_truth(size, 7, number)
        images.append((truth.run_lengths, size, truth.boxes_xyxy.astype(np.float64)))
    rasterise_in_boxes(*images[0], GRID)  # compiles, or loads what was compiled
    started = time.perf_counter()
    ours = np.concatenate([rasterise_in_boxes(*image, GRID)[0] for image in images])
    fast = time.perf_counter() - started
    started = time.perf_counter()
    whole = []
    for run_lengths, size, boxes in images:
        for runs, box in zip(run_lengths, boxes, strict=True):
            mask = torch.from_numpy(decode_run_lengths(runs, size)).float()[None, None]
            roi = torch.tensor([[0, *box]]).float()
            whole.append(roi_align(mask, roi, (GRID, GRID), sampling_ratio=2, aligned=True)[0, 0])
    slow = time.perf_counter() - started
    # RoIAlign interpolates between pixels where coverage samples them: they differ at the outline.
    gap = np.abs(ours - torch.stack(whole).numpy()).mean()
    print(
        f"{len(ours)} objects on {GRID} x {GRID}: {1e3 * fast / len(ours):.2f} ms each, decoded "
        f"whole and cropped {1e3 * slow / len(ours):.2f} ms, ratio {slow / fast:.1f}; mean "
        f"difference {gap:.4f}"
    )


if __name__ == "__main__":
    main()
