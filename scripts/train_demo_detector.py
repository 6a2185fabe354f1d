"""Trains the small detector of ``mfdetr demo`` from nothing on drawn scenes.

Rerunnable: ``python scripts/train_demo_detector.py --minutes 60 --out mfdetr_cache/demo/detector``.
With ``--init FOLDER --first-seed N`` it goes on from an earlier result with other scenes.
Writes a Hugging Face folder with half-precision weights and prints the box AP on held-out scenes.
"""

import argparse
import math
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.extraction import ExtractConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
)

from mfdetr_cache.coco.synthetic import SHAPES, draw_scene, write_synthetic_split
from mfdetr_cache.protocols import SilentReporter
from mfdetr_cache.training.memory import keep_freed_memory

SIDE = 160
# Seeds below this belong to the demo's own splits and are never trained on.
FIRST_TRAIN_SEED = 100_000
HELD_OUT_SEED, HELD_OUT = 50_000, 300


def build_model() -> RTDetrForObjectDetection:
    """A small RT-DETR: two-stage queries, deformable decoder, batch norms that learn."""
    backbone = RTDetrResNetConfig(
        embedding_size=40,
        hidden_sizes=[40, 72, 112, 144],
        depths=[1, 2, 2, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,
        d_model=96,
        encoder_hidden_dim=96,
        encoder_in_channels=[72, 112, 144],
        decoder_in_channels=[96, 96, 96],
        encoder_ffn_dim=192,
        decoder_ffn_dim=192,
        decoder_layers=3,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        hidden_expansion=0.5,
        num_queries=40,
        num_denoising=30,
        num_feature_levels=3,
        id2label=dict(enumerate(SHAPES)),
        label2id={s: i for i, s in enumerate(SHAPES)},
    )
    return RTDetrForObjectDetection(config)


def load_sample(seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A scene as the network takes it, and its targets; every scene is drawn once, none flipped."""
    image, objects = draw_scene(seed)
    resized = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
    boxes = torch.tensor([o["box_xywh"] for o in objects], dtype=torch.float32).reshape(-1, 4)
    boxes = boxes / torch.tensor([image.width, image.height] * 2)
    boxes[:, :2] += boxes[:, 2:] / 2
    labels = torch.tensor([o["label"] for o in objects], dtype=torch.long)
    return pixels, {"class_labels": labels, "boxes": boxes}


def main() -> None:
    """Train for the given time, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--first-seed", type=int, default=FIRST_TRAIN_SEED)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    if arguments.init is not None:
        model = RTDetrForObjectDetection.from_pretrained(arguments.init, dtype=torch.float32)
    else:
        model = build_model()
    model.train()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 1e-4}, {"params": plain, "weight_decay": 0.0}],
        lr=arguments.lr,
    )
    average = {k: v.clone() for k, v in model.state_dict().items()}
    started, seed, step = time.monotonic(), max(arguments.first_seed, FIRST_TRAIN_SEED), 0
    with ThreadPoolExecutor(2) as pool:

        def order(first: int) -> list:
            return [pool.submit(load_sample, s) for s in range(first, first + arguments.batch_size)]

        ahead = [order(seed), order(seed + arguments.batch_size)]
        while (done := (time.monotonic() - started) / 60 / arguments.minutes) < 1:
            samples = [f.result() for f in ahead.pop(0)]
            seed += arguments.batch_size
            ahead.append(order(seed + arguments.batch_size))
            rate = min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * done)) + 1e-3)
            for group in optimiser.param_groups:
                group["lr"] = arguments.lr * rate
            pixels = torch.stack([s[0] for s in samples])
            output = model(pixel_values=pixels, labels=[s[1] for s in samples])
            optimiser.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimiser.step()
            step += 1
            decay = min(0.998, (1 + step) / (10 + step))
            for name, value in model.state_dict().items():
                if value.dtype.is_floating_point:
                    average[name].lerp_(value, 1 - decay)
                else:
                    average[name] = value.clone()
            if step % 50 == 0:
                print(f"step {step}, {done:.0%}, loss {output.loss.item():.3f}", flush=True)
    model.load_state_dict(average)
    save(model, arguments.out)
    print(
        f"{step} steps, {step * arguments.batch_size} scenes; box AP {measure(arguments.out):.3f}"
    )


def save(model: RTDetrForObjectDetection, out: Path) -> None:
    """The model as a folder, weights rounded to half precision."""
    model.eval().save_pretrained(out)
    size = {"height": SIDE, "width": SIDE}
    RTDetrImageProcessor(size=size, do_normalize=False).save_pretrained(out)
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
