import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from mfdetr_cache.detectors.official.positions import map_position
from mfdetr_cache.errors import HeadError
from mfdetr_cache.head.batch import HeadBatch, MapGroup, QueryContext
from mfdetr_cache.head.blocks.convnext import ConvNeXtBlock, init_convnext
from mfdetr_cache.head.blocks.deformable import FfnBlock, cell_centres
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.image_encoder import DeformableImageEncoder
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.head.position import DINO_SINE, SineEncoding, sine_position
from mfdetr_cache.head.query_encoder import BoxToObject
from tests.support.images import make_batch, make_spec

SMALL = HeadConfig(hidden_dim=16, roi_size=8, image_layers=1, box_layers=1)

VARIANTS: list[dict[str, Any]] = [
    {},
    {"image_block": "swin", "image_layers": 2},
    {"image_block": "convnext", "image_layers": 2},
    {"image_block": "ffn", "image_layers": 2},
    {"image_layers": 0, "box_layers": 0},
    {"box_block": "swin", "box_layers": 2},
    {"box_block": "convnext"},
    {"box_block": "ffn"},
    {"query_ffn": False, "query_b2o": False},
    {"query_o2o": True},
    {"mask_predictor": "segmenter"},
    {"mask_predictor": "embedding", "mask_embedding_dim": 70},
    {"mask_predictor": "fcn", "box_layers": 0, "query_ffn": False, "query_b2o": False},
    {"mask_predictor": "dynamic", "box_layers": 0, "query_ffn": False, "query_b2o": False},
    {"mask_scoring": False},
    {"use_c1": False},
    {"roi_size": 24, "hidden_dim": 8},
    {"fuse_stride": 16},
    {"hidden_dim": 32},
    {"roi_sampling_ratio": 2},
    {"fine_size": 24, "fine_dim": 8},
]


def build(config: HeadConfig = SMALL, **spec: Any) -> MaskHead:
    torch.manual_seed(0)
    return build_head(config, make_spec(**spec))


def randomise(head: nn.Module) -> nn.Module:
    """Weights with which every path carries a signal; fresh offsets and biases are too regular."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return head


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_variant_runs_and_every_parameter_learns(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(SMALL, **changes)
    head = build(config)
    randomise(head)
    batch = make_batch(make_spec(), [(96, 128), (64, 64)])
    output = head(batch)
    side = config.grid_size
    assert output.mask_logits.shape == (6, side, side)
    assert torch.isfinite(output.mask_logits).all()
    total = output.mask_logits.square().mean()
    if config.mask_scoring:
        assert output.mask_iou is not None
        assert output.mask_iou.shape == (6, 3)
        total = total + output.mask_iou.square().mean()
    total.backward()
    idle = [
        n
        for n, p in head.named_parameters()
        if p.grad is None or (not p.grad.abs().any() and not n.endswith("key.bias"))
    ]
    # The key bias of box-to-object attention shifts a softmax and has gradient zero by theory.
    assert idle == []


@pytest.mark.parametrize(
    "spec",
    [
        {"strides": (16, 32), "backbone8": True, "width": 48, "c1_channels": 64},
        {"strides": (4, 8, 16, 32, 64), "c1_channels": 12},
        {"strides": (16,), "c1_channels": None, "backbone8": False},
        {"strides": (8, 16), "level_embed": True, "query_dim": 40},
    ],
    ids=str,
)
def test_any_levels_and_widths(spec: dict[str, Any]) -> None:
    made = make_spec(**spec)
    output = build_head(SMALL, made)(make_batch(made, [(90, 130), (64, 64)]))
    assert output.mask_logits.shape == (6, 8, 8)


def select(batch: HeadBatch, image: int) -> HeadBatch:
    """The same image on its own."""
    for group in batch.groups:
        if image in group.members:
            place = group.members.index(image)
            maps = {k: v[place : place + 1] for k, v in group.maps.items()}
            keep = batch.image_index == image
            return HeadBatch(
                (MapGroup(maps, group.input_hw, (0,)),),
                batch.queries[keep],
                batch.boxes_xyxy[keep],
                torch.zeros(int(keep.sum()), dtype=torch.long),
            )
    raise AssertionError(image)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_output_does_not_depend_on_the_rest_of_the_batch(changes: dict[str, Any]) -> None:
    spec = make_spec()
    head = randomise(build_head(dataclasses.replace(SMALL, **changes), spec).double())
    batch = make_batch(spec, [(96, 128), (64, 64), (96, 128), (72, 100)], dtype=torch.float64)
    together = head(batch)
    for image in range(4):
        alone = head(select(batch, image))
        rows = batch.image_index == image
        assert torch.allclose(together.mask_logits[rows], alone.mask_logits, atol=1e-10)
        if alone.mask_iou is not None:
            assert torch.allclose(together.mask_iou[rows], alone.mask_iou, atol=1e-10)


@pytest.mark.parametrize("o2o", [False, True])
def test_output_follows_the_order_of_the_queries(o2o: bool) -> None:
    spec = make_spec()
    head = randomise(build_head(dataclasses.replace(SMALL, query_o2o=o2o), spec).double())
    batch = make_batch(spec, [(96, 128), (64, 64)], dtype=torch.float64)
    order = torch.randperm(len(batch.queries))
    shuffled = HeadBatch(
        batch.groups, batch.queries[order], batch.boxes_xyxy[order], batch.image_index[order]
    )
    assert torch.allclose(head(shuffled).mask_logits, head(batch).mask_logits[order], atol=1e-10)


def test_without_roialign_queries_of_an_image_see_one_another() -> None:
    """Object-to-object attention, as with RoIAlign: another query changes the masks of all."""
    spec = make_spec()
    changes = {"roialign": False, "box_layers": 0, "query_b2o": False, "mask_scoring": False}
    head = randomise(build_head(dataclasses.replace(SMALL, **changes, query_o2o=True), spec))
    batch = make_batch(spec, [(64, 64)])
    other = batch.queries.clone()
    other[0] += 1
    masks = head(batch).mask_logits, head(dataclasses.replace(batch, queries=other)).mask_logits
    assert not torch.allclose(masks[0][1:], masks[1][1:], atol=1e-2)


@pytest.mark.parametrize("fine_size", [0, 16])
def test_no_region_gives_no_mask(fine_size: int) -> None:
    spec = make_spec()
    batch = make_batch(spec, [(96, 128)], regions_per_image=0)
    output = build_head(dataclasses.replace(SMALL, fine_size=fine_size), spec)(batch)
    assert output.mask_logits.shape == (0, fine_size or 8, fine_size or 8)


def test_a_finer_mask_begins_as_the_coarse_one() -> None:
    """With the weights of a head without the finer grid: its mask, up-sampled.

    RoIAlign with one sample per fine cell and the mean over 2 x 2 of them is RoIAlign with 2 x 2
    samples per cell, so the coarse masks are equal but for the order of a sum.
    """
    coarse = build(dataclasses.replace(SMALL, roi_sampling_ratio=2)).double()
    finer = build(dataclasses.replace(SMALL, roi_sampling_ratio=1, fine_size=16)).double()
    missing = finer.load_state_dict(coarse.state_dict(), strict=False).missing_keys
    assert missing
    assert all(name.startswith("fine.") for name in missing)
    batch = make_batch(make_spec(), [(96, 128), (64, 64)], dtype=torch.float64)
    before, after = coarse(batch), finer(batch)
    assert after.coarse_logits is not None
    torch.testing.assert_close(after.coarse_logits, before.mask_logits, rtol=0, atol=1e-10)
    up = functional.interpolate(before.mask_logits[:, None], scale_factor=2, mode="bilinear")
    torch.testing.assert_close(after.mask_logits, up[:, 0], rtol=0, atol=1e-10)


def test_last_layer_computes_only_what_is_used() -> None:
    """Refining every token and throwing most away gives the same."""
    encoder = DeformableImageEncoder(16, 3, 2, fused_level=1, level_embed=None).double()
    randomise(encoder)
    levels = [torch.randn(2, 16, s, s + 1, dtype=torch.float64) for s in (8, 4, 2)]
    short = encoder(levels)
    sizes = tuple((m.shape[-2], m.shape[-1]) for m in levels)
    memory = torch.cat([m.flatten(2).transpose(1, 2) for m in levels], 1)
    centres = cell_centres(sizes, memory.device).double()
    counts = torch.tensor([h * w for h, w in sizes])
    position = sine_position(centres, 16) + encoder.level_embed.repeat_interleave(counts, dim=0)
    for layer in encoder.layers:
        memory = layer(memory, position, centres, memory, sizes)
    wanted = memory[:, 72:92].transpose(1, 2).unflatten(2, sizes[1])
    assert torch.allclose(short, wanted, atol=1e-12)


def test_box_to_object_equals_attention_written_out() -> None:
    attention = randomise(BoxToObject(16, 8)).double()
    queries, regions = torch.randn(5, 16).double(), torch.randn(5, 9, 8).double()
    query = attention.query(queries).view(5, 1, 8, 2).transpose(1, 2)
    key = attention.key(regions).view(5, 9, 8, 2).transpose(1, 2)
    value = attention.value(regions).view(5, 9, 8, 2).transpose(1, 2)
    wanted = nn.functional.scaled_dot_product_attention(query, key, value)
    assert torch.allclose(
        attention(queries, regions), wanted.transpose(1, 2).flatten(1), atol=1e-12
    )


def test_sine_position_is_that_of_deformable_detr() -> None:
    from transformers.models.deformable_detr import modeling_deformable_detr as reference

    theirs = reference.DeformableDetrSinePositionEmbedding(8, normalize=True)
    mask = torch.ones(1, 5, 7, dtype=torch.bool)
    wanted = theirs((1, 16, 5, 7), torch.device("cpu"), torch.float32, mask=mask)
    wanted = wanted.reshape(1, -1, 16) if wanted.ndim == 3 else wanted.flatten(2).transpose(1, 2)
    ours = sine_position(cell_centres(((5, 7),), torch.device("cpu")), 16)
    assert torch.allclose(ours, wanted[0], atol=1e-5)


@pytest.mark.parametrize(
    ("sine", "temperature", "offset"), [(SineEncoding(), 10000, 0.5), (DINO_SINE, 20, 0)]
)
def test_positions_are_those_of_the_official_encoders(
    sine: SineEncoding, temperature: float, offset: float
) -> None:
    like = torch.zeros(1, dtype=torch.float64)
    wanted = map_position(torch.zeros(1, 5, 7, dtype=torch.bool), temperature, offset, like)[0]
    cells = cell_centres(((5, 7),), torch.device("cpu"), sine.shift).double()
    # The official code divides by the size and 1e-6, which turns an angle of 2 pi by 1e-6 at most.
    assert torch.allclose(sine_position(cells, 256, sine.temperature), wanted, atol=3e-6)


def test_a_head_has_the_position_encoding_of_its_detector() -> None:
    plain = make_spec()
    dino = dataclasses.replace(plain, settings={"scheme": "dino"})
    heads = [build_head(SMALL, spec).eval() for spec in (plain, dino)]
    heads[1].load_state_dict(randomise(heads[0]).state_dict())
    assert [h.image_encoder.sine for h in heads] == [SineEncoding(), DINO_SINE]
    # Few regions and many: the encoder over sampled cells, and over whole maps.
    for regions in (1, 40):
        batch = make_batch(plain, [(96, 128)], regions_per_image=regions)
        ours, other = (h(batch).mask_logits for h in heads)
        assert not torch.allclose(ours, other, atol=1e-3)
        encoder = heads[1].image_encoder
        assert isinstance(encoder, DeformableImageEncoder)
        encoder.every_token = True
        assert torch.allclose(heads[1](batch).mask_logits, other, atol=1e-4)
        encoder.every_token = False


def test_regions_in_training_see_the_queries_that_they_see_in_evaluation() -> None:
    """Eq. 10: a mask does not change when only some of the detected queries are regions."""
    spec = make_spec()
    head = randomise(build(dataclasses.replace(SMALL, query_o2o=True)).eval())
    batch = make_batch(spec, [(96, 128), (64, 64)], regions_per_image=4)
    wanted = head(batch).mask_logits
    few = torch.tensor([1, 6])
    some = dataclasses.replace(
        batch,
        queries=batch.queries[few],
        boxes_xyxy=batch.boxes_xyxy[few],
        image_index=batch.image_index[few],
        counts=(1, 1),
    )
    context = QueryContext(batch.queries, batch.image_index)
    found = head(dataclasses.replace(some, context=context)).mask_logits
    assert torch.allclose(found, wanted[few], atol=1e-5)
    assert not torch.allclose(head(some).mask_logits, wanted[few], atol=1e-3)


def test_an_ffn_block_mixes_no_cells() -> None:
    block = randomise(FfnBlock(8))
    maps = torch.randn(1, 4, 5, 8)
    changed = maps.clone()
    changed[0, 1, 2] += 1
    same = torch.isclose(block(maps), block(changed), atol=1e-6).all(-1)[0]
    assert same.sum() == 19
    assert not same[1, 2]


def test_a_convnext_block_begins_as_the_identity_and_old_weights_have_no_scale() -> None:
    block = ConvNeXtBlock(8)
    init_convnext(block)
    maps = torch.randn(1, 4, 5, 8)
    assert torch.allclose(block(maps), maps, atol=1e-5)
    old = {k: v for k, v in block.state_dict().items() if k != "scale"}
    block.load_state_dict(old)
    assert block.scale.tolist() == [1.0] * 8


def test_heads_that_cannot_be_built_say_why() -> None:
    with pytest.raises(HeadError, match="c1 has 24 channels, the encoder 32: set neck=true"):
        build(dataclasses.replace(SMALL, neck=False))
    with pytest.raises(HeadError, match=r"fuse_stride 64: the levels have strides \[8, 16, 32\]"):
        build(dataclasses.replace(SMALL, fuse_stride=64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fine_size": 8}, r"fine_size must be 0, or 2 or more times roi_size \(8\), not 8"),
        ({"fine_size": 20}, "not 20"),
        ({"fine_size": 16, "fine_layers": 9}, "fine_layers 0 to 8"),
        ({"fine_size": 16, "mask_predictor": "embedding"}, "a mask_predictor that is no code"),
    ],
)
def test_a_finer_grid_that_cannot_be_says_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize("changes", [*VARIANTS, {"use_c1": False, "upsample_without_c1": True}])
@pytest.mark.parametrize("seed", [0, 1])
def test_training_computes_less_and_the_same(changes: dict[str, Any], seed: int) -> None:
    """In training, what no region reads is left out: outputs and gradients in float64 agree.

    Sizes that are no multiples of the strides, boxes of all kinds; the group norm's variance comes
    from moments, which costs a few of sixteen digits.
    """
    config = dataclasses.replace(SMALL, **changes)
    head = randomise(build(config).double())
    batch = make_batch(make_spec(), [(100, 130), (70, 100), (100, 130)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(len(batch.boxes_xyxy), 2, 2, generator=generator).sort(dim=1).values
    boxes = (corners * torch.tensor([150.0, 120.0]) - 10).flatten(1).double()
    batch = dataclasses.replace(batch, boxes_xyxy=boxes)
    results = []
    for training in (False, True):
        head.train(training)
        head.zero_grad()
        output = head(batch)
        output.mask_logits.tanh().square().sum().backward()
        grads = [p.grad.flatten() for p in head.parameters() if p.grad is not None]
        results.append((output.mask_logits.detach(), torch.cat(grads)))
    (whole, whole_grad), (less, less_grad) = results
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(less, whole, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(less_grad, whole_grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_image_without_regions_does_not_matter(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training none of its tokens is refined; the kernels then have nothing to do."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    head = randomise(build()).train()
    batch = make_batch(make_spec(), [(96, 128), (96, 128)])
    mine = batch.image_index == 0
    alone = dataclasses.replace(
        batch,
        queries=batch.queries[mine],
        boxes_xyxy=batch.boxes_xyxy[mine],
        image_index=batch.image_index[mine],
    )
    output = head(alone).mask_logits
    output.square().mean().backward()
    torch.testing.assert_close(output, head(batch).mask_logits[mine], atol=1e-4, rtol=1e-4)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in head.parameters())


def test_the_last_layer_sees_only_what_is_read() -> None:
    head = build(dataclasses.replace(SMALL, image_layers=2)).train()
    batch = make_batch(make_spec(), [(256, 256)])
    few = torch.tensor([[40.0, 40.0, 90.0, 80.0]]).expand(len(batch.boxes_xyxy), -1)
    seen: list[int] = []
    for layer in head.image_encoder.layers:
        layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[-2]))
    for training in (True, False):
        head.train(training)(dataclasses.replace(batch, boxes_xyxy=few))
    head.image_encoder.every_token = True
    head.train()(dataclasses.replace(batch, boxes_xyxy=few))
    every, read, again, whole, *asked_for = seen
    assert every == again > whole == 32 * 32
    assert asked_for == [every, every]
    assert read <= (8 + 2 * 3) * (6 + 2 * 3)
