"""A step of the mask network against the same network with transformers' deformable layers.

The other network computes what a straightforward port would: transformers' deformable attention,
every token of the last image layer, keys and values of all cells. Both have the same parameters
and give the same masks; random features in the geometry of H-DETR R50.

python benchmarks/head_step.py [--batch 1] [--height 800] [--width 1066] [--device cpu] [--amp off]
"""

import argparse
import copy
import time

import torch
from torch import Tensor, nn
from transformers.models.deformable_detr.modeling_deformable_detr import (
    MultiScaleDeformableAttention as TransformersCore,
)

from mfdetr_cache.head.batch import HeadBatch, MapGroup
from mfdetr_cache.head.blocks import deformable
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.cost import paper_detector
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.ops.devices import keep_freed_memory
from mfdetr_cache.ops.packed_levels import SizesHw
from mfdetr_cache.training.learner import autocast
from mfdetr_cache.training.recipes import build_recipe

CORE = TransformersCore()


def transformers_attention(
    value: Tensor, sizes_hw: SizesHw, locations: Tensor, weights: Tensor
) -> Tensor:
    sizes = torch.tensor(sizes_hw, device=value.device)
    starts = torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))
    mixed: Tensor = CORE(value, sizes, list(sizes_hw), starts, locations, weights, 64)
    return mixed


def port(head: MaskHead) -> MaskHead:
    """The same parameters without what is saved in ours."""
    other = copy.deepcopy(head)
    other.image_encoder.every_token = True
    for module in other.modules():
        if hasattr(module, "folded"):
            module.folded = False
    return other


def step(head: nn.Module, batch: HeadBatch, amp: str) -> tuple[float, Tensor]:
    device = batch.queries.device
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    head.zero_grad(set_to_none=True)
    with autocast(amp, device):  # type: ignore[arg-type]
        logits = head(batch).mask_logits
    logits.float().square().mean().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, logits.detach().float()


def share_in_attention(head: nn.Module, batch: HeadBatch, amp: str) -> float:
    """Share of a step's time that is spent in the kernels of deformable attention."""
    with torch.profiler.profile() as profile:
        step(head, batch, amp)
    events = profile.key_averages()
    if batch.queries.device.type == "cuda":
        busy = {e.key: e.self_device_time_total for e in events}
        own = sum(t for k, t in busy.items() if k in {"_forward", "_backward"})
    else:
        busy = {e.key: e.self_cpu_time_total for e in events}
        own = sum(t for k, t in busy.items() if k in {"KernelAttention", "KernelAttentionBackward"})
    return own / sum(busy.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--regions", type=int, default=7)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1066)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", default="off")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    device, spec = torch.device(options.device), paper_detector()
    input_hw = (options.height, options.width)
    maps = {
        m.name: torch.randn(
            options.batch, m.channels, *(-(-s // m.stride) for s in input_hw), device=device
        )
        for m in spec.maps
    }
    count = options.batch * options.regions
    corners = torch.rand(count, 2, 2).sort(dim=1).values
    boxes = (corners * torch.tensor([options.width, options.height])).flatten(1).to(device)
    owner = torch.arange(options.batch, device=device)
    batch = HeadBatch(
        groups=(MapGroup(maps, input_hw, tuple(range(options.batch))),),
        queries=torch.randn(count, spec.query_dim, device=device),
        boxes_xyxy=boxes,
        image_index=owner.repeat_interleave(options.regions),
    )
    ours = build_head(build_recipe("paper", {}).head, spec).to(device).train()
    theirs = port(ours)
    own_core = deformable.deformable_attention
    seconds = {}
    logits = {}
    both = (
        ("ours", ours, own_core),
        ("port", theirs, transformers_attention),
    )
    for name, head, core in both:
        deformable.deformable_attention = core
        best = float("inf")
        for _ in range(options.repeats + 1):
            taken, logits[name] = step(head, batch, options.amp)
            best = min(best, taken)
        seconds[name] = best
        label = "ours" if name == "ours" else "with transformers' layers"
        print(f"{label}: {best:.2f} s, {options.batch / best:.2f} images/s", flush=True)
    gap = (logits["ours"] - logits["port"]).abs().max()
    print(
        f"ratio {seconds['port'] / seconds['ours']:.2f}; "
        f"largest difference of mask logits {gap:.1e} of {logits['ours'].abs().max():.1f}"
    )
    deformable.deformable_attention = own_core
    share = share_in_attention(ours, batch, options.amp)
    print(f"deformable attention is {share:.0%} of our step")
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
