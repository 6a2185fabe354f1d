import pytest
import torch
from torchvision import ops

from mfdetr_cache.ops.roi_align import RoIAlign

STRIDE = 4


def example(
    images: int, channels: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps of 11 x 13, regions inside, across every border, outside, empty and inverted."""
    maps = torch.randn(images, channels, 11, 13, dtype=dtype, requires_grad=True)
    low = torch.rand(20, 2, dtype=dtype) * 70 - 15
    rois = torch.cat((low, low + torch.rand(20, 2, dtype=dtype) * 40), dim=1)
    rois[0] = torch.tensor([0.0, 0.0, 52.0, 44.0])
    rois[1] = torch.tensor([-30.0, -30.0, 90.0, 90.0])
    rois[2] = torch.tensor([200.0, 10.0, 240.0, 30.0])
    rois[3] = torch.tensor([10.0, 10.0, 10.0, 20.0])
    rois[4] = torch.tensor([20.0, 20.0, 12.0, 30.0])
    rois[5] = torch.tensor([50.0, 42.0, 52.0, 44.0])
    owner = torch.randint(0, images, (20, 1)).to(dtype)
    return maps, torch.cat((owner, rois), dim=1)


def torchvisions(maps: torch.Tensor, rois: torch.Tensor, size: int, ratio: int) -> torch.Tensor:
    found = ops.roi_align(maps, rois, (size, size), 1 / STRIDE, ratio or -1, aligned=True)
    return found.permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("images", "channels", "size", "ratio"), [(2, 7, 8, 0), (1, 40, 5, 2), (3, 64, 4, 1)]
)
def test_values_and_gradients_are_torchvisions(
    images: int, channels: int, size: int, ratio: int
) -> None:
    maps, rois = example(images, channels)
    ours = RoIAlign(size, STRIDE, ratio)(maps, rois)
    theirs = torchvisions(maps, rois, size, ratio)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    above = torch.randn_like(ours)
    (mine,) = torch.autograd.grad(ours, maps, above)
    (wanted,) = torch.autograd.grad(theirs, maps, above)
    torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    maps, rois = example(2, 40, torch.float32)
    results = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        found = RoIAlign(8, STRIDE, 2)(maps, rois)
        results.append((found, *torch.autograd.grad(found.square().sum(), maps)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_half_precision_maps_keep_exact_places() -> None:
    maps, rois = example(1, 16, torch.float32)
    half = maps.detach().bfloat16()
    found = RoIAlign(8, STRIDE, 2)(half, rois)
    exact = RoIAlign(8, STRIDE, 2)(half.float(), rois)
    assert found.dtype == torch.bfloat16
    # Only the result is rounded, to 8 bits.
    torch.testing.assert_close(found.float(), exact, rtol=2**-8, atol=1e-6)


def test_no_region_is_no_region() -> None:
    maps, rois = example(1, 4)
    found = RoIAlign(8, STRIDE, 2)(maps, rois[:0])
    assert found.shape == (0, 8, 8, 4)
    (grad,) = torch.autograd.grad(found.sum(), maps)
    assert not grad.any()


def test_graphs_are_captured_with_operators() -> None:
    maps, rois = (t.detach().float() for t in example(1, 4))

    def function(m: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return RoIAlign(8, STRIDE, 2)(m, r)

    wanted = function(maps, rois)
    compiled = torch.compile(function, backend="eager")
    # Sums in another order.
    torch.testing.assert_close(compiled(maps, rois), wanted, rtol=1e-4, atol=1e-5)
    with torch.device("meta"):
        assert function(maps.to("meta"), rois.to("meta")).shape == wanted.shape
