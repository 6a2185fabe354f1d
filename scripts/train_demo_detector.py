"""Trains the small detector of ``mfdetr demo`` from nothing on drawn scenes.

Rerunnable: ``python scripts/train_demo_detector.py --minutes 90 --out mfdetr_cache/demo/detector``.
Writes a Hugging Face folder with half-precision weights and prints the box AP on held-out scenes.

A two-stage Deformable DETR needs many epochs because one query per object is all its loss looks
at. Two things make an hour of CPU enough: every encoder token near an object learns to propose it
(as dense one-stage detectors do), and the early decoder layers take several queries per object.
The last layer is trained one to one and removes the duplicates.
"""

import argparse
import math
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.extraction import ExtractConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import box_iou, generalized_box_iou_loss
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    RTDetrResNetConfig,
)

from mfdetr_cache.attention import deformable_attention
from mfdetr_cache.boxes import cxcywh_to_xyxy
from mfdetr_cache.coco.synthetic import SHAPES, draw_scene, write_synthetic_split
from mfdetr_cache.protocols import SilentReporter
from mfdetr_cache.training.memory import keep_freed_memory

SIDE = 160
# Seeds below this belong to the demo's own splits and are never trained on.
FIRST_TRAIN_SEED = 100_000
HELD_OUT_SEED, HELD_OUT = 50_000, 300
# Tokens and queries that may learn one object, where several may.
PER_OBJECT = 5


@dataclass(frozen=True)
class Objects:
    """What is in a scene: labels (N,) and boxes_cxcywh (N, 4) relative to the image."""

    labels: Tensor
    boxes_cxcywh: Tensor


def build_model() -> DeformableDetrForObjectDetection:
    """A small two-stage Deformable DETR; its batch norms learn until it is saved."""
    backbone = RTDetrResNetConfig(
        embedding_size=40,
        hidden_sizes=[40, 72, 112, 144],
        depths=[1, 2, 2, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = DeformableDetrConfig(
        backbone_config=backbone,
        d_model=96,
        encoder_layers=2,
        decoder_layers=3,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        num_feature_levels=3,
        num_queries=40,
        two_stage=True,
        two_stage_num_proposals=40,
        with_box_refine=True,
        dropout=0.0,
        id2label=dict(enumerate(SHAPES)),
        label2id={s: i for i, s in enumerate(SHAPES)},
    )
    model = DeformableDetrForObjectDetection(config)
    for heads in (model.class_embed, model.bbox_embed):
        for head in heads:
            last = head if isinstance(head, nn.Linear) else head.layers[-1]
            nn.init.zeros_(last.weight)
            nn.init.constant_(last.bias, -3.0 if last is head else 0.0)
    return model


class _FasterAttention(nn.Module):
    """The library's deformable attention under the arguments of transformers' module."""

    def forward(
        self,
        value: Tensor,
        shapes: Tensor,
        shapes_list: list[tuple[int, int]],
        starts: Tensor,
        locations: Tensor,
        weights: Tensor,
        step: int,
    ) -> Tensor:
        del shapes, starts, step
        return deformable_attention(value, shapes_list, locations, weights)


def use_faster_attention(model: nn.Module) -> None:
    """Exchange the part of transformers' model that takes longest on a CPU."""
    for module in model.modules():
        if hasattr(module, "attn") and type(module.attn).__name__.startswith("MultiScale"):
            module.attn = _FasterAttention()


def let_batch_norms_learn(module: nn.Module) -> None:
    """Put ordinary batch norms in the place of frozen ones; the names of the weights stay."""
    for name, child in module.named_children():
        if type(child).__name__.endswith("FrozenBatchNorm2d"):
            norm = nn.BatchNorm2d(len(child.weight))
            norm.load_state_dict(child.state_dict(), strict=False)
            setattr(module, name, norm)
        else:
            let_batch_norms_learn(child)


def draw(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A scene as the network sees it, (SIDE, SIDE, 3), its labels and relative boxes_cxcywh."""
    image, objects = draw_scene(seed)
    resized = np.array(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    boxes = np.array([o["box_xywh"] for o in objects], dtype=np.float32).reshape(-1, 4)
    boxes /= np.array([image.width, image.height] * 2, dtype=np.float32)
    boxes[:, :2] += boxes[:, 2:] / 2
    return resized, np.array([o["label"] for o in objects], dtype=np.int64), boxes


def turned(pixels: Tensor, boxes: Tensor, turn: int) -> tuple[Tensor, Tensor]:
    """One of the eight ways to turn and mirror a square scene; every shape stays what it is."""
    boxes = boxes.clone()
    if turn & 1:
        pixels, boxes[:, 0] = pixels.flip(2), 1 - boxes[:, 0]
    if turn & 2:
        pixels, boxes[:, 1] = pixels.flip(1), 1 - boxes[:, 1]
    if turn & 4:
        pixels, boxes = pixels.transpose(1, 2), boxes[:, [1, 0, 3, 2]]
    return pixels, boxes


class DetectionLoss(nn.Module):
    """Losses of the proposals, dense, and of the decoder layers.

    The classes of the encoder tokens are learned by a linear layer that is dropped after training.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token_classes = nn.Linear(width, len(SHAPES))
        nn.init.constant_(self.token_classes.bias, -3.0)

    def forward(
        self, model: DeformableDetrForObjectDetection, pixels: Tensor, objects: list[Objects]
    ) -> dict[str, Tensor]:
        """The parts of the loss of a batch (B, 3, SIDE, SIDE)."""
        found = model.model(pixel_values=pixels)
        total = max(sum(len(o.labels) for o in objects), 1)
        parts = {"tokens": self._tokens(found, objects) / total}
        reference = found.init_reference_points
        layers = found.intermediate_hidden_states.shape[1]
        for layer in range(layers):
            hidden = found.intermediate_hidden_states[:, layer]
            logits = model.class_embed[layer](hidden)
            boxes = (model.bbox_embed[layer](hidden) + torch.logit(reference, 1e-5)).sigmoid()
            last = layer == layers - 1
            loss = _set_loss(logits, boxes, objects, 1) / total
            if not last:
                # One to one, so that the layers agree, and one to many, so that all queries learn.
                loss = loss + _set_loss(logits, boxes, objects, PER_OBJECT) / total / PER_OBJECT
            parts[f"layer {layer}"] = loss
            reference = found.intermediate_reference_points[:, layer].detach()
        return parts

    def _tokens(self, found: object, objects: list[Objects]) -> Tensor:
        boxes = found.enc_outputs_coord_logits.sigmoid()
        objectness = found.enc_outputs_class[..., 0]
        classes = self.token_classes(found.encoder_last_hidden_state)
        loss = boxes.sum() * 0
        places = _token_centres(boxes.device)
        targets, class_targets = torch.zeros_like(objectness), torch.zeros_like(classes)
        for i, wanted in enumerate(objects):
            if not len(wanted.labels):
                continue
            with torch.no_grad():
                iou = box_iou(cxcywh_to_xyxy(boxes[i]), cxcywh_to_xyxy(wanted.boxes_cxcywh))
                iou = iou.nan_to_num()
                offset = (places[:, None] - wanted.boxes_cxcywh[:, :2]).abs()
                inside = (offset < wanted.boxes_cxcywh[:, 2:] / 2).all(-1)
                right = classes[i].sigmoid()[:, wanted.labels]
                # While nothing is learned yet, the nearest tokens come first.
                near = torch.exp(-(offset / wanted.boxes_cxcywh[:, 2:]).square().sum(-1))
                score = (iou.square() * right.sqrt() + 1e-3 * near) * inside
                tokens, which = _several_per_object(score, PER_OBJECT)
            if not len(tokens):
                continue
            loss = loss + _box_loss(boxes[i, tokens], wanted.boxes_cxcywh[which]) / PER_OBJECT
            quality = iou[tokens, which].clamp(0.1)
            targets[i, tokens] = quality
            class_targets[i, tokens, wanted.labels[which]] = quality
        loss = loss + _quality_focal(objectness, targets) / PER_OBJECT
        return loss + _quality_focal(classes, class_targets) / PER_OBJECT


def _token_centres(device: torch.device) -> Tensor:
    centres = []
    for side in (SIDE // 8, SIDE // 16, SIDE // 32):
        at = (torch.arange(side, device=device) + 0.5) / side
        y, x = torch.meshgrid(at, at, indexing="ij")
        centres.append(torch.stack([x, y], -1).reshape(-1, 2))
    return torch.cat(centres)


def _several_per_object(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best few rows of every column of a score (R, N); a row serves one column only."""
    value, rows = score.topk(count, 0)
    taken = torch.zeros_like(score).scatter_(0, rows, value)
    best, which = taken.max(1)
    chosen = torch.nonzero(best > 0)[:, 0]
    return chosen, which[chosen]


def _set_loss(logits: Tensor, boxes: Tensor, objects: list[Objects], per_object: int) -> Tensor:
    """Quality focal, L1 and GIoU loss of a layer, matched with every object some times."""
    targets = torch.zeros_like(logits)
    loss = logits.sum() * 0
    for i, wanted in enumerate(objects):
        if not len(wanted.labels):
            continue
        with torch.no_grad():
            iou = box_iou(cxcywh_to_xyxy(boxes[i]), cxcywh_to_xyxy(wanted.boxes_cxcywh))
            score = logits[i].sigmoid()[:, wanted.labels]
            distance = torch.cdist(boxes[i], wanted.boxes_cxcywh, p=1)
            gain = 2 * score + 2 * iou - 2 * distance
            if per_object == 1:
                rows, columns = linear_sum_assignment(-gain.numpy())
                queries, which = torch.as_tensor(rows), torch.as_tensor(columns)
            else:
                queries, which = _several_per_object(gain.exp() * (iou > 0.4), per_object)
            targets[i, queries, wanted.labels[which]] = iou[queries, which].clamp(0.05)
        if len(queries):
            loss = loss + _box_loss(boxes[i, queries], wanted.boxes_cxcywh[which])
    return loss + _quality_focal(logits, targets)


def _box_loss(boxes: Tensor, wanted: Tensor) -> Tensor:
    overlap = generalized_box_iou_loss(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted))
    return 5 * (boxes - wanted).abs().sum() + 2 * overlap.sum()


def _quality_focal(logits: Tensor, targets: Tensor) -> Tensor:
    """The target is the quality of the box (Li et al. 2020); what is unlike it weighs more."""
    weight = (logits.sigmoid() - targets).detach().square()
    loss = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return 2 * (weight * loss).sum()


def main() -> None:
    """Draw, train for the given time, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=24_000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    model = build_model()
    let_batch_norms_learn(model)
    use_faster_attention(model)
    loss_of = DetectionLoss(model.config.d_model)
    parameters = [*model.parameters(), *loss_of.parameters()]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    with ProcessPoolExecutor() as pool:
        seeds = range(FIRST_TRAIN_SEED, FIRST_TRAIN_SEED + arguments.scenes)
        scenes = list(pool.map(draw, seeds, chunksize=100))
    print(f"{len(scenes)} scenes drawn", flush=True)
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 1e-4},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=arguments.lr,
    )
    average = {k: v.clone() for k, v in model.state_dict().items()}
    generator = np.random.default_rng(0)
    started, step = time.monotonic(), 0
    order: list[int] = []
    model.train()
    while (done := (time.monotonic() - started) / 60 / arguments.minutes) < 1:
        if len(order) < arguments.batch_size:
            order = generator.permutation(len(scenes)).tolist()
        chosen, order = order[: arguments.batch_size], order[arguments.batch_size :]
        batch, objects = [], []
        for number in chosen:
            image, labels, boxes = scenes[number]
            pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 255
            pixels, turned_boxes = turned(
                pixels, torch.from_numpy(boxes), int(generator.integers(8))
            )
            batch.append(pixels)
            objects.append(Objects(torch.from_numpy(labels), turned_boxes))
        # Level for three quarters of the time, then down to nothing.
        rate = min((step + 1) / 200, 0.5 * (1 + math.cos(math.pi * max(0.0, 4 * done - 3))) + 1e-3)
        for group in optimiser.param_groups:
            group["lr"] = arguments.lr * rate
        parts = loss_of(model, torch.stack(batch), objects)
        optimiser.zero_grad()
        sum(parts.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        decay = min(0.999, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.dtype.is_floating_point:
                average[name].lerp_(value, 1 - decay)
            else:
                average[name] = value.clone()
        if step % 100 == 0:
            shown = ", ".join(f"{k} {v.item():.2f}" for k, v in parts.items())
            print(f"step {step}, {done:.0%}: {shown}", flush=True)
        if step % 1000 == 0:
            save(average, arguments.out)
            print(f"step {step}: box AP {measure(arguments.out):.3f}", flush=True)
    save(average, arguments.out)
    seen = step * arguments.batch_size
    print(f"{step} steps, {seen} scenes seen; box AP {measure(arguments.out):.3f}")


def save(weights: dict[str, Tensor], out: Path) -> None:
    """A model of these weights as a folder, rounded to half precision."""
    model = build_model()
    model.load_state_dict(weights, strict=False)
    model.eval().save_pretrained(out)
    size = {"height": SIDE, "width": SIDE}
    DeformableDetrImageProcessor(size=size, do_normalize=False, do_pad=False).save_pretrained(out)
    path = out / "model.safetensors"
    half = {k: v.half() if v.dtype == torch.float32 else v for k, v in load_file(path).items()}
    save_file(half, path, metadata={"format": "pt"})


def measure(out: Path) -> float:
    """Box AP on held-out scenes, through the door every user takes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        annotations = write_synthetic_split(folder, "heldout", HELD_OUT_SEED, HELD_OUT)
        config = ExtractConfig(
            "hf", str(out), folder / "heldout", annotations, folder / "heldout.zarr"
        )
        return run_extract(config, SilentReporter()).box.AP


if __name__ == "__main__":
    main()
