"""The mask network (Fig. 2). `mask_head.py` is the way through it, one part a file.

| equation | part | file |
|---|---|---|
| 1, 5, 14 | fusion with C1, neck | `fusion.py` |
| 3 | RoIAlign | `ops/roi_align.py` |
| 4, Table 12 | mask predictors | `mask_predictor.py`, `mask_embedding.py` (ISTR's) |
| 6, 7, 8 | image encoder F_e | `image_encoder.py`, blocks in `blocks/` |
| 9 | box encoder F_b | `box_encoder.py` |
| 10, 11 | query encoder F_q | `query_encoder.py` |
| 12 | mask scoring | `mask_scoring.py` |
| 13 | final score | `evaluation/scoring.py` |

`config.py` is what can be chosen, `build.py` what follows from it. `whole_image.py` is the form
without RoIAlign, `refining_head.py` the one that moves boxes, in the stages of `refinement.py`.
`sampled_cells.py` computes the same in training with less work, from packed tokens (`packing.py`)
and crops (`c1_crops.py`).
"""
