"""Which images go through the detector together."""

from collections.abc import Sequence

import torch

# Input pixels of a batch, and images of one. On one CPU thread DEIMv2-femto at 416 x 416 takes a
# tenth less time for an image among four or eight than alone. On an H200 16 or 64 of them take as
# long as one, 29 ms; H-DETR R50 takes 22 ms for one image and 18 ms an image among four.
_PIXELS = {"cpu": 2**20, "cuda": 2**22}
_MOST = {"cpu": 16, "cuda": 64}


def batches_of_part(
    rows: Sequence[int], inputs_hw: Sequence[tuple[int, int]], device: torch.device
) -> list[tuple[int, ...]]:
    """The rows of a part in batches of one input size, so that nothing is padded.

    They hang on the part's rows and the kind of device alone, never on what was extracted before or
    by whom, because the others of a batch decide the order of sums: a cache that was stopped,
    shared or repaired has the bytes of an uninterrupted one. Rows of a batch rise, batches go by
    their first row.
    """
    by_size: dict[tuple[int, int], list[int]] = {}
    for row, input_hw in zip(rows, inputs_hw, strict=True):
        by_size.setdefault(input_hw, []).append(row)
    batches = []
    for (height, width), members in by_size.items():
        kind = "cpu" if device.type == "cpu" else "cuda"
        most = min(_MOST[kind], max(1, _PIXELS[kind] // (height * width)))
        batches += [tuple(members[i : i + most]) for i in range(0, len(members), most)]
    return sorted(batches)
