from pathlib import Path

import numpy as np

from mfdetr_cache.coco.annotations import load_coco_split
from mfdetr_cache.coco.synthetic import SHAPES, draw_scene, write_synthetic_split
from mfdetr_cache.ops.masks import decode_run_lengths


def test_scenes_are_reproducible_and_masks_do_not_overlap() -> None:
    for seed in range(12):
        image, objects = draw_scene(seed)
        again, _ = draw_scene(seed)
        assert image.tobytes() == again.tobytes()
        total = sum((o["mask"].astype(int) for o in objects), np.zeros((image.height, image.width)))
        assert total.max(initial=0) <= 1
        for found in objects:
            rows, columns = np.nonzero(found["mask"])
            x, y, w, h = found["box_xywh"]
            assert (columns.min(), rows.min()) == (x, y)
            assert (columns.max() + 1, rows.max() + 1) == (x + w, y + h)


def test_a_split_is_a_coco_dataset(tmp_path: Path) -> None:
    split = load_coco_split(write_synthetic_split(tmp_path, "train", 3, 6))
    assert [c.name for c in split.categories] == list(SHAPES)
    image, objects = draw_scene(3)
    truth = split.ground_truth(split.images[0], {})
    assert len(truth) == len(objects)
    mask = decode_run_lengths(truth.run_lengths[0], (image.height, image.width))
    assert (mask == objects[0]["mask"]).all()
