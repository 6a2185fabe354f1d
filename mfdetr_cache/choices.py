"""Names among which a user chooses, each a type; what they mean is defined where they are used."""

from typing import Literal

# How feature maps are stored, from large to small (ops/quantisation.py).
Preset = Literal["fp16", "int8", "int8-small", "int4"]
# Chunks of a cache: compressed, or as they are.
Compression = Literal["zstd", "raw"]
# The stride-4 map in a cache: whole, as crops around matched queries, or not at all.
C1Mode = Literal["full", "roi", "none"]
# How the images of augmented views are made (coco/augmentation.py).
Policy = Literal["deformable-detr", "large-scale-jitter"]
# The same for a training that makes its images anew in every epoch, or does not.
Augmentation = Literal["none", "deformable-detr", "large-scale-jitter"]
# What train-joint trains beside the head.
Tune = Literal["nothing", "encoder-decoder", "all"]
# Where a training's numbers go beside metrics.jsonl.
Tracker = Literal["tensorboard", "wandb", "mlflow"]
# Weights of the end of a training, or of its best validation.
Which = Literal["last", "best"]
# The final score of a mask: class score times predicted IoU (Eq. 13), times mean probability inside
# the mask (Eq. 2), or alone; ``auto`` is Eq. 13 where the head predicts IoUs, else Eq. 2.
Scoring = Literal["auto", "iou", "mean", "class"]
# faster-coco-eval gives pycocotools' numbers in half the time; pycocotools is the referee.
Evaluator = Literal["fast", "pycocotools"]
# What is measured beside mask and box AP: floor and ceiling; boundary AP; one thing made perfect;
# what objects are taken for.
Extra = Literal["baselines", "boundary", "oracles", "confusion"]
# An entry of a file that cannot be used: refuse the file, or leave it out and count it.
OnBad = Literal["stop", "skip"]
# Rows of an ablation that need no head.
Baseline = Literal["box", "ellipse", "oracle", "sam"]
