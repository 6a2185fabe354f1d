"""Stored bytes of one image of 800 x 1333 through H-DETR R50, by preset and C1 mode.

python benchmarks/bytes_per_image.py

Features are made up (smooth noise, C1 after a ReLU), so the compression is not a real detector's;
the uncompressed column does not depend on it. COCO has 7.3 objects an image; 7 are stored here.
"""

import numpy as np
from geometry import made_ground_truth, made_output

from mfdetr_cache.cache.schema import C1RoiLayout
from mfdetr_cache.cache.shards import encode_chunk
from mfdetr_cache.head.cost import paper_detector
from mfdetr_cache.matching.crops import c1_crops
from mfdetr_cache.ops.quantisation import ENCODINGS, Encoding, encode_map
from mfdetr_cache.types import ImageGeometry

INPUT_HW, ORIGINAL_HW = (800, 1333), (480, 800)


def size_of(arrays: list[np.ndarray]) -> tuple[int, int]:
    return sum(a.nbytes for a in arrays), sum(len(encode_chunk(a)) for a in arrays)


def encoded(tokens: np.ndarray, encoding: Encoding) -> list[np.ndarray]:
    return [a for a in encode_map(tokens, encoding) if a is not None]


def main() -> None:
    spec = paper_detector()
    output = made_output(spec, INPUT_HW, seed=0)
    truth = made_ground_truth(ORIGINAL_HW, count=7, seed=0)
    geometry = ImageGeometry(ORIGINAL_HW, INPUT_HW, INPUT_HW)
    crops = c1_crops(output, truth, geometry, C1RoiLayout(32, 0, 7))
    rows = [
        output.class_logits.numpy(),
        output.boxes_cxcywh_norm.numpy(),
        output.queries.half().numpy(),
    ]
    print("| C1 | preset | MB uncompressed | MB stored |")
    print("|---|---|---|---|")
    for mode in ("full", "roi", "none"):
        for preset, encoding in ENCODINGS.items():
            arrays = list(rows)
            for m in spec.maps:
                if m.role != "c1" or mode == "full":
                    arrays += encoded(output.maps[m.name][0].flatten(1).T.numpy(), encoding)
            if mode == "roi":
                below = np.asarray(crops.crops.to_array(), np.float32)
                arrays += [*encoded(below.reshape(-1, below.shape[2]), encoding), crops.moments]
            plain, stored = size_of(arrays)
            print(f"| {mode} | {preset} | {plain / 1e6:.1f} | {stored / 1e6:.1f} |")


if __name__ == "__main__":
    main()
