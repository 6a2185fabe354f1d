import torch
from torch.nn import functional

from mfdetr_cache.head.mask_predictor import DynamicConvPredictor, FcnPredictor
from tests.head.test_mask_head import randomise


def test_a_query_makes_the_kernels_of_two_convolutions() -> None:
    """Against conv2d with each region's own kernels, layer norm by its definition, then the FCN."""
    predictor = randomise(DynamicConvPredictor(16))
    assert isinstance(predictor, DynamicConvPredictor)
    queries, regions = torch.randn(3, 16), torch.randn(3, 8, 8, 16)
    found, _ = predictor(queries, regions)
    kernels = predictor.weights(queries)
    mixed = []
    for kernel, region in zip(kernels, regions, strict=True):
        into, out = kernel.split(16 * 8)
        maps = region.permute(2, 0, 1)[None]
        for weight, norm in (
            (into.view(16, 8).T, predictor.norms[0]),
            (out.view(8, 16).T, predictor.norms[1]),
        ):
            maps = functional.conv2d(maps, weight[:, :, None, None])
            mean, variance = maps.mean(1, keepdim=True), maps.var(1, keepdim=True, correction=0)
            maps = (maps - mean) / (variance + norm.eps).sqrt()
            maps = functional.relu(maps * norm.weight[:, None, None] + norm.bias[:, None, None])
        mixed.append(maps[0].permute(1, 2, 0))
    wanted, _ = predictor.fcn(queries, torch.stack(mixed))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_fcn_does_not_see_the_query() -> None:
    predictor, regions = FcnPredictor(16), torch.randn(2, 8, 8, 16)
    first, second = (predictor(torch.randn(2, 16), regions)[0] for _ in range(2))
    assert torch.equal(first, second)
