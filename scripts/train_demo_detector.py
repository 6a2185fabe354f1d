"""Trains the small detector of ``mfdetr demo`` from nothing on drawn scenes.

Rerunnable: ``python scripts/train_demo_detector.py --minutes 60 --out mfdetr_cache/demo/detector``.
With ``--init FOLDER --first-seed N`` it goes on from an earlier result with other scenes.
A Deformable DETR (two-stage, box refinement) of transformers with a narrow ResNet, saved in half
precision; the box AP on held-out scenes is printed at the end.

DETRs learn slowly because few queries are matched. Three helpers that are gone after training:
every object is also taught to five more of 64 proposals in a second pass of the decoder (H-DETR,
arXiv 2207.13080), and to boxes around it (in the spirit of DN-DETR, arXiv 2203.01305); tokens say
which shape covers them. Scores learn the IoU of their box (varifocal loss, arXiv 2008.13367).
"""

import argparse
import math
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from demo_scenes import SIDE, Batch, Scenes
from mfdetr_pipelines.config.extract import ExtractConfig
from mfdetr_pipelines.extract import run_extract
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import generalized_box_iou_loss
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    RTDetrResNetConfig,
)
from transformers.models.deformable_detr import modeling_deformable_detr

from mfdetr_cache.coco.synthetic import SHAPES, write_synthetic_split
from mfdetr_cache.matching.matchers import (
    CLASS_COST,
    FOCAL_ALPHA,
    FOCAL_GAMMA,
    GIOU_COST,
    L1_COST,
)
from mfdetr_cache.matching.pair_costs_numba import pair_costs
from mfdetr_cache.ops.boxes import box_iou, cxcywh_to_xyxy
from mfdetr_cache.ops.deformable_attention import deformable_attention
from mfdetr_cache.ops.devices import keep_freed_memory
from mfdetr_cache.reporter import SilentReporter

STRIDES, WIDTH = (8, 16, 32), 96
NUM_QUERIES, NUM_MANY, REPEATS, AROUND = 40, 64, 5, 1
# Seeds below this belong to the demo's own splits and are never trained on.
FIRST_TRAIN_SEED = 100_000
HELD_OUT_SEED, HELD_OUT = 50_000, 300


def build_model() -> DeformableDetrForObjectDetection:
    """A small Deformable DETR: two-stage queries, deformable encoder and decoder."""
    backbone = RTDetrResNetConfig(
        embedding_size=40,
        hidden_sizes=[40, 80, 128, 160],
        depths=[1, 2, 2, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = DeformableDetrConfig(
        backbone_config=backbone,
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=3,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        num_feature_levels=len(STRIDES),
        two_stage=True,
        with_box_refine=True,
        num_queries=NUM_QUERIES,
        two_stage_num_proposals=NUM_QUERIES,
        dropout=0.0,
        disable_custom_kernels=True,
        id2label=dict(enumerate(SHAPES)),
        label2id={s: i for i, s in enumerate(SHAPES)},
    )
    model = DeformableDetrForObjectDetection(config)
    prior = -math.log((1 - 0.02) / 0.02)
    for head in model.class_embed:
        nn.init.constant_(head.bias, prior)
    model.model.backbone.requires_grad_(True)
    # The fused one is slow backwards in bfloat16 on a CPU.
    model.set_attn_implementation("eager")
    return model


def thaw_batch_norms(module: nn.Module) -> None:
    """Let them learn: transformers freezes them. Their names in a checkpoint stay the same."""
    for name, child in module.named_children():
        if isinstance(child, modeling_deformable_detr.DeformableDetrFrozenBatchNorm2d):
            learning = nn.BatchNorm2d(len(child.weight))
            learning.load_state_dict(child.state_dict(), strict=False)
            setattr(module, name, learning)
        else:
            thaw_batch_norms(child)


class Helpers(nn.Module):
    """What only training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.second_pass = nn.Parameter(torch.zeros(WIDTH))
        self.cover_of_source = nn.Linear(WIDTH, 1 + len(SHAPES))
        self.cover_of_memory = nn.Linear(WIDTH, 1 + len(SHAPES))


@dataclass(frozen=True)
class Pass:
    """What a pass of the decoder, or the encoder, says: logits and boxes (cxcywh) of each layer."""

    logits: list[Tensor]
    boxes: list[Tensor]


class Trainer:
    """A Deformable DETR in parts, as its forward pass has them.

    Args:
        model: The network.
        helpers: What only training needs.
    """

    def __init__(self, model: DeformableDetrForObjectDetection, helpers: Helpers) -> None:
        self.model, self.helpers = model, helpers
        self.sizes = [(SIDE // s, SIDE // s) for s in STRIDES]
        self.shapes = torch.tensor(self.sizes)
        starts = self.shapes.prod(1).cumsum(0)
        self.extra = {
            "spatial_shapes": self.shapes,
            "spatial_shapes_list": self.sizes,
            "level_start_index": torch.cat([starts.new_zeros(1), starts[:-1]]),
        }

    def loss(self, batch: Batch, random: torch.Generator) -> Tensor:
        """Everything that is learned from a batch."""
        with torch.autocast("cpu", torch.bfloat16):
            source, memory = self._encode(batch.pixels)
        base = self.model.model
        nothing = torch.zeros(memory.shape[:2], dtype=torch.bool)
        tokens, anchors = base.gen_encoder_output_proposals(memory, nothing, self.sizes)
        objectness = base.decoder.class_embed[-1](tokens)[..., :1]
        coordinates = base.decoder.bbox_embed[-1](tokens) + anchors
        best = objectness[..., 0].topk(NUM_MANY, dim=1).indices[..., None]
        proposals = coordinates.gather(1, best.expand(-1, -1, 4)).detach()
        around = torch.logit(_boxes_around(batch, random), 1e-4)
        one = self._decode(proposals[:, :NUM_QUERIES], memory)
        many = self._decode(torch.cat([proposals, around], 1), memory, second=True)
        zeros = [torch.zeros_like(x) for x in batch.labels]
        objects = max(sum(len(x) for x in batch.labels), 1)
        total = _pass_loss(Pass([objectness], [coordinates.sigmoid()]), zeros, batch.boxes, 4)
        total = total + _pass_loss(one, batch.labels, batch.boxes, 1)
        total = total + _pass_loss(many, batch.labels, batch.boxes, REPEATS, known=AROUND)
        covers = torch.cat(
            [batch.covers[:, s // 2 :: s, s // 2 :: s].flatten(1) for s in STRIDES], 1
        )
        for head, values in (
            (self.helpers.cover_of_source, source),
            (self.helpers.cover_of_memory, memory),
        ):
            dense = functional.cross_entropy(head(values).flatten(0, 1), covers.flatten())
            total = total + objects * dense
        return total / objects

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens before and after the encoder, shape (B, S, WIDTH)."""
        base = self.model.model
        maps = base.backbone.model(pixels.contiguous(memory_format=torch.channels_last))
        levels = [p(m) for p, m in zip(base.input_proj, maps.feature_maps, strict=True)]
        source = torch.cat([x.float().flatten(2).transpose(1, 2) for x in levels], 1)
        positions = []
        for level, x in enumerate(levels):
            mask = torch.ones(1, *x.shape[2:], dtype=torch.bool)
            place = base.position_embedding(
                shape=(1, *x.shape[1:]), device=x.device, dtype=torch.float32, mask=mask
            )
            positions.append(place.flatten(2).transpose(1, 2) + base.level_embed[level])
        memory = base.encoder(
            inputs_embeds=source,
            spatial_position_embeddings=torch.cat(positions, 1).expand_as(source),
            valid_ratios=torch.ones(len(source), len(STRIDES), 2),
            **self.extra,
        ).last_hidden_state
        return source, memory.float()

    def _decode(self, proposals: Tensor, memory: Tensor, *, second: bool = False) -> Pass:
        base = self.model.model
        placed = base.pos_trans_norm(base.pos_trans(base.get_proposal_pos_embed(proposals)))
        position, start = placed.split(WIDTH, dim=2)
        if second:
            start = start + self.helpers.second_pass
        reference = proposals.sigmoid()
        with torch.autocast("cpu", torch.bfloat16):
            out = base.decoder(
                inputs_embeds=start,
                object_queries_position_embeddings=position,
                encoder_hidden_states=memory,
                reference_points=reference,
                valid_ratios=torch.ones(len(memory), len(STRIDES), 2),
                **self.extra,
            )
        logits, boxes = [], []
        for layer in range(self.model.config.decoder_layers):
            hidden = out.intermediate_hidden_states[:, layer].float()
            logits.append(self.model.class_embed[layer](hidden))
            delta = self.model.bbox_embed[layer](hidden)
            boxes.append((delta + torch.logit(reference, 1e-5)).sigmoid())
            reference = out.intermediate_reference_points[:, layer].float()
        return Pass(logits, boxes)


def _boxes_around(batch: Batch, random: torch.Generator) -> Tensor:
    """AROUND boxes near each object, moved and scaled by up to 40 % of its size; padded."""
    longest = max(1, *(len(b) for b in batch.boxes))
    around = torch.rand(len(batch.boxes), AROUND, longest, 4, generator=random) * 0.3 + 0.3
    for row, boxes in zip(around, batch.boxes, strict=True):
        noise = torch.rand(AROUND, len(boxes), 4, generator=random) * 0.8 - 0.4
        row[:, : len(boxes), :2] = boxes[:, :2] + noise[..., :2] * boxes[:, 2:]
        row[:, : len(boxes), 2:] = boxes[:, 2:] * (1 + noise[..., 2:])
    return around.flatten(1, 2).clamp(0.001, 0.999)


def _pass_loss(
    found: Pass, labels: list[Tensor], boxes: list[Tensor], repeats: int, known: int = 0
) -> Tensor:
    """Varifocal, L1 and GIoU losses of all layers, summed over objects."""
    longest = max(1, *(len(b) for b in boxes))
    total = found.logits[0].sum() * 0
    for logits, predicted in zip(found.logits, found.boxes, strict=True):
        searched = logits.shape[1] - known * longest
        scenes, queries, objects = [], [], []
        found_here = zip(logits.detach(), predicted.detach(), labels, boxes, strict=True)
        for scene, of_scene in enumerate(found_here):
            arrays = [values.numpy() for values in of_scene]
            cost, _ = pair_costs(
                *arrays, (CLASS_COST, FOCAL_ALPHA, FOCAL_GAMMA), (L1_COST, GIOU_COST)
            )
            rows, columns = linear_sum_assignment(np.repeat(cost[:searched], repeats, axis=1))
            number = cost.shape[1]
            given = [(searched + k * longest + i, i) for k in range(known) for i in range(number)]
            queries += [*rows.tolist(), *(q for q, _ in given)]
            objects += [*(columns // repeats).tolist(), *(o for _, o in given)]
            scenes += [scene] * (len(rows) + len(given))
        if not scenes:
            continue
        scene_index, query_index = torch.tensor(scenes), torch.tensor(queries)
        starts = np.cumsum([0, *(len(b) for b in boxes)])
        wanted = torch.tensor([int(starts[s]) + o for s, o in zip(scenes, objects, strict=True)])
        target = torch.cat(boxes)[wanted]
        chosen = predicted[scene_index, query_index]
        giou = generalized_box_iou_loss(
            cxcywh_to_xyxy(chosen), cxcywh_to_xyxy(target), reduction="sum"
        )
        overlap = box_iou(cxcywh_to_xyxy(chosen.detach()), cxcywh_to_xyxy(target)).diagonal()
        goal = torch.zeros_like(logits)
        goal[scene_index, query_index, torch.cat(labels)[wanted]] = overlap.clamp(0.01)
        score = logits.detach().sigmoid()
        weight = torch.where(goal > 0, goal, 0.75 * score**2)
        classes = functional.binary_cross_entropy_with_logits(logits, goal, weight, reduction="sum")
        l1 = functional.l1_loss(chosen, target, reduction="sum")
        share = 1 / (1 + 0.25 * (repeats + known - 1))
        total = total + share * (classes + 5 * l1 + 2 * giou)
    return total


def _attend(
    _self: nn.Module,
    value: Tensor,
    _shapes: Tensor,
    shapes_list: list[tuple[int, int]],
    _starts: Tensor,
    locations: Tensor,
    weights: Tensor,
    _step: int,
) -> Tensor:
    """In place of transformers' own: the same sums, several times faster on a CPU."""
    return deformable_attention(value, tuple(map(tuple, shapes_list)), locations, weights)


def main() -> None:
    """Train for the given time, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=12_000)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--first-seed", type=int, default=FIRST_TRAIN_SEED)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=6e-4)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    modeling_deformable_detr.MultiScaleDeformableAttention.forward = _attend
    model, helpers = build_model(), Helpers()
    if arguments.init is not None:
        model = DeformableDetrForObjectDetection.from_pretrained(
            arguments.init, dtype=torch.float32, attn_implementation="eager"
        )
        model.model.backbone.requires_grad_(True)
    thaw_batch_norms(model.model.backbone)
    model.train()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    scenes = Scenes(max(arguments.first_seed, FIRST_TRAIN_SEED), arguments.scenes)
    print("scenes are drawn", flush=True)
    parameters = [*model.parameters(), *helpers.parameters()]
    decayed = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 1e-4}, {"params": plain, "weight_decay": 0.0}]
    )
    average = {k: v.clone() for k, v in model.state_dict().items()}
    trainer, random = Trainer(model, helpers), torch.Generator().manual_seed(0)
    started, step, recent = time.monotonic(), 0, 0.0
    batches = scenes.batches(arguments.batch_size)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(next, batches)
        while (done := (time.monotonic() - started) / 60 / arguments.minutes) < 1:
            batch, ahead = ahead.result(), pool.submit(next, batches)
            rate = min((step + 1) / 300, 0.5 * (1 + math.cos(math.pi * done)) + 1e-3)
            for group in optimiser.param_groups:
                group["lr"] = arguments.lr * rate
            loss = trainer.loss(batch, random)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            step += 1
            recent = 0.98 * recent + 0.02 * loss.item() if recent else loss.item()
            decay = min(0.999, (1 + step) / (10 + step))
            for name, value in model.state_dict().items():
                if value.dtype.is_floating_point:
                    average[name].lerp_(value, 1 - decay)
            if step % 50 == 0:
                print(f"step {step}, {done:.0%}, loss {recent:.3f}", flush=True)
            if step % 1000 == 0:
                save(average, arguments.out)
    save(average, arguments.out)
    print(
        f"{step} steps, {step * arguments.batch_size} scenes; box AP {measure(arguments.out):.3f}"
    )


def save(weights: dict[str, Tensor], out: Path) -> None:
    """The network as a folder, weights rounded to half precision."""
    model = build_model()
    model.load_state_dict(
        {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    )
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
            str(out),
            folder / "heldout.zarr",
            images=folder / "heldout",
            annotations=annotations,
            device="cpu",
        )
        return run_extract(config, SilentReporter()).box.AP


if __name__ == "__main__":
    main()
