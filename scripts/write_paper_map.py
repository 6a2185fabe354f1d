"""Write docs/paper-map.md: where each equation and table of the paper is, and every cost counted.

python scripts/write_paper_map.py [FILE]
"""

import sys
from pathlib import Path

from mfdetr_pipelines.ablation.comparison import PAPER_TABLES

from mfdetr_cache.head.cost import MEAN_COCO_INPUT_HW, head_cost, paper_detector

ROOT = Path(__file__).resolve().parents[1]
COUNTED = (1, 2, 3, 4, 5, 6, 9, 12)

EQUATIONS = [
    ("Eq. 1, 5, 14", "fusion with C1, neck", "mfdetr_cache/head/fusion.py"),
    ("Eq. 2, 13", "final score of a mask", "mfdetr_cache/evaluation/scoring.py"),
    ("Eq. 1, 3-12", "one after the other", "mfdetr_cache/head/mask_head.py"),
    ("Eq. 3", "RoIAlign", "mfdetr_cache/ops/roi_align.py"),
    ("Eq. 4", "dot product of query and region", "mfdetr_cache/head/mask_predictor.py"),
    ("Eq. 6", "deformable blocks", "mfdetr_cache/head/blocks/deformable.py"),
    ("Eq. 7", "Swin blocks", "mfdetr_cache/head/blocks/swin.py"),
    ("Eq. 8", "ConvNeXt blocks", "mfdetr_cache/head/blocks/convnext.py"),
    ("Eq. 6-8", "image feature encoder", "mfdetr_cache/head/image_encoder.py"),
    ("Eq. 9", "box feature encoder", "mfdetr_cache/head/box_encoder.py"),
    ("Eq. 10, 11", "query encoder", "mfdetr_cache/head/query_encoder.py"),
    ("Eq. 12", "mask scoring", "mfdetr_cache/head/mask_scoring.py"),
]
TABLES = [
    ("1", "training-free baselines", "`roialign`, `use_c1`"),
    ("2, 15", "image feature encoder", "`image_block`, `image_layers`"),
    ("3, 15", "box feature encoder", "`box_block`, `box_layers`"),
    ("4", "hidden dimension", "`hidden_dim`"),
    ("5", "query encoder", "`query_ffn`, `query_o2o`, `query_b2o`"),
    ("6", "neck, sampled points, mask scoring", "`neck`, `points`, `mask_scoring`"),
    (
        "7, 8",
        "systems",
        "this detector's row beside what others published, AP against hours; test-dev by "
        "`evaluate --save-results NAME.zip`",
    ),
    ("9", "RoIAlign output size", "`roi_size`"),
    ("10", "training epochs", "`steps`, or `train-head --epochs`"),
    ("11", "large-scale jittering", "`extract --view-policy`, a cache for each row"),
    ("12", "mask head", "`mask_predictor`"),
    ("13", "batch size", "`batch_size`"),
    ("14", "encoder layer", "`extract --encoder-layer`, two caches for each row"),
    ("16", "fine-tuning the detector", "`train-joint --tune`, the detector in every step"),
    (
        "Fig. 1",
        "AP against hours",
        "the chart that `ablate --table 7` writes",
    ),
    (
        "Fig. 4, 8",
        "probability maps",
        "`mfdetr predict --probabilities`; as a heat map among the pictures of `mfdetr fit`",
    ),
]
# What the reviews ask for, with what stands beside --cache, --val-cache and --out.
REVIEWS = [
    (
        "How many masks does it need?",
        "`mfdetr ablate --recipe fast --label-fraction 0.01 --label-fraction 0.05 "
        "--label-fraction 0.1 --label-fraction 0.3 --label-fraction 1 --seeds 3`",
        "a table and a curve, [measured](ablations.md#how-many-masks-does-it-need)",
    ),
    (
        "How many views are worth extracting?",
        "`mfdetr ablate --recipe fast --vary views=1,2,4,8 --seeds 3`",
        "rows of the first so many [views](choosing-a-cache.md#views) of one cache, in equal steps",
    ),
    (
        "How small may the head be?",
        "`mfdetr ablate --recipe paper --smaller`",
        "widths of 32, 16 and 8, and RoIAlign of 8 x 8, after every row",
    ),
    (
        "Does an FFN do, where no cell sees another (Tables 2 and 3)?",
        "`mfdetr ablate rows.toml`",
        'rows with `image_block = "ffn"` or `box_block = "ffn"`, '
        "[written out](ablations.md#is-an-ffn-enough)",
    ),
    (
        "What do other papers' mask branches reach on the same features?",
        "`mfdetr ablate --branches --seeds 3`",
        "Mask R-CNN, PointRend, QueryInst, ISTR, Mask2Former, [what each row is](branches.md)",
    ),
    (
        "Is that more than a box, an ellipse, SAM?",
        "`mfdetr ablate --recipe fast --baseline box --baseline ellipse --baseline oracle "
        "--baseline sam --sam-weights NAME --images FOLDER`",
        "on the very same detections",
    ),
    (
        "Does it mask what it was never shown?",
        "`mfdetr train-head --hold-out person --hold-out dog`",
        "`evaluate` then shows AP of seen and unseen categories",
    ),
    (
        "What does it cost with the detector?",
        "`mfdetr ablate --recipe paper --detector-hours 40`",
        "its training and the extraction, added to every row's own hours",
    ),
    (
        "Was it chosen on the validation split?",
        "`mfdetr ablate --recipe fast --val-split 5`",
        "in place of `--val-cache`: every fifth image is left out of training and measured on",
    ),
    (
        "Does freezing cost anything?",
        "`mfdetr ablate --table 16 --extract`",
        "the detector frozen, partly tuned and tuned, each measured through itself",
    ),
    (
        "Is the difference real?",
        "`mfdetr compare runs/a runs/b`",
        "a paired bootstrap over the images, also in every ablation's `vs first`",
    ),
]


def paper_map() -> str:
    """The page."""
    height, width = MEAN_COCO_INPUT_HW
    lines = [
        "# Where the paper is",
        "",
        "Mask Frozen-DETR, arXiv 2308.03747. Written by `python scripts/write_paper_map.py`.",
        "",
        "| equation | what | file |",
        "|---|---|---|",
        *(f"| {e} | {what} | [{Path(f).name}](../{f}) |" for e, what, f in EQUATIONS),
        "",
        "| table | what | setting |",
        "|---|---|---|",
        *(f"| {t} | {what} | {setting} |" for t, what, setting in TABLES),
        "",
        "`mfdetr ablate --table N --cache TRAIN --val-cache VAL --out FOLDER` trains and compares "
        "the rows of one, with `--extract` those of",
        "[11, 14 and 16](paper-tables.md#tables-with-caches-of-their-own); `--table N --dry-run` "
        "shows it. They are configurations in",
        "[paper_tables.toml](../pipelines/mfdetr_pipelines/ablation/paper_tables.toml).",
        "",
        "## What reviewers ask",
        "",
        "| question | command, beside `--cache`, `--val-cache` and `--out` | |",
        "|---|---|---|",
        *(f"| {question} | {command} | {about} |" for question, command, about in REVIEWS),
        "",
        "## Parameters and multiply-adds",
        "",
        f"Counted from the modules while they run, for H-DETR R50, one image of {height} x {width} "
        "and 100 boxes, by the rule",
        "in [cost.py](../mfdetr_cache/head/cost.py). The paper does not state its rule or its "
        "images; with this size all rows of",
        "Tables 2 to 6 and 12 but the empty one come out within 0.03 %, the Swin rows with their "
        "padded windows among them. *Executed* is what is",
        "computed here for the same result: no token of the last image layer that nobody reads, "
        "and box-to-object attention",
        "with folded projections (`tests/head/test_cost.py` shows that neither changes output or "
        "gradients).",
        "",
        "| table | row | M params | paper | G MACs | paper | off | executed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    spec = paper_detector()
    for number in COUNTED:
        for row in PAPER_TABLES[number].rows:
            cost = head_cost(row.recipe.head, spec)
            paper = row.paper
            assert paper.params_m is not None
            assert paper.macs_g is not None
            macs = cost.macs / 1e9
            lines.append(
                f"| {number} | {row.name} | {cost.parameters / 1e6:.2f} | {paper.params_m:.2f} | "
                f"{macs:.2f} | {paper.macs_g:.2f} | {100 * (macs / paper.macs_g - 1):+.2f} % | "
                f"{cost.executed_macs / 1e9:.2f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/paper-map.md"
    target.write_text(paper_map())
