"""Region features from crops of C1 instead of the map: the same training, less work and bytes.

A cache with ``--c1 roi`` holds such crops; from a whole map they are cut while training, because
a few regions are smaller than the image.

In the full network a region is RoIAlign(m(GN(W c + b) + u) + a): C1 through the neck, the
up-sampled encoder level u added, the channel mapper m with bias a, then RoIAlign. RoIAlign is
linear in each channel, so it can come first; the group norm is an affine map per channel once the
mean and variance of W c + b over the image are known, and these follow from the moments of c.
A constant does not commute with RoIAlign where samples fall outside the map (zeros there): it is
multiplied with the region's coverage, RoIAlign of a map of ones.
"""

import torch
from torch import Tensor, nn


def neck_affine(neck: nn.Module | None, moments: Tensor) -> tuple[Tensor, Tensor]:
    """The neck as one affine map per image: matrices (B, D, C) and constants (B, D), float64.

    The neck is a 1x1 convolution and group norm, or the identity for None; ``moments`` are the
    means of c c^T and of c, float64, shape (B, C + 1, C).
    """
    batch, _, channels = moments.shape
    if neck is None:
        identity = torch.eye(channels, dtype=moments.dtype, device=moments.device)
        return identity.expand(batch, -1, -1), moments.new_zeros(batch, channels)
    conv, norm = neck[0], neck[1]  # type: ignore[index]
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.GroupNorm)
    assert conv.bias is not None
    weight, bias = conv.weight[:, :, 0, 0].to(moments.dtype), conv.bias.to(moments.dtype)
    second, mean = moments[:, :channels], moments[:, channels]
    # E[y] and E[y^2] of each output channel, then of each group.
    linear = mean @ weight.T
    squares = torch.einsum("dc,bce,de->bd", weight, second, weight)
    squares = squares + 2 * bias * linear + bias.square()
    groups = (batch, norm.num_groups, -1)
    centre = (linear + bias).view(groups).mean(-1, keepdim=True)
    variance = squares.view(groups).mean(-1, keepdim=True) - centre.square()
    scale = (variance + norm.eps).rsqrt().expand(groups[0], groups[1], len(bias) // groups[1])
    scale = scale.reshape(batch, -1) * norm.weight.to(moments.dtype)
    shift = norm.bias.to(moments.dtype) - scale * centre.expand(
        batch, groups[1], len(bias) // groups[1]
    ).reshape(batch, -1)
    return scale[:, :, None] * weight, scale * bias + shift


def moments_of(c1: Tensor) -> Tensor:
    """Mean of c c^T in the first C rows, mean of c in the last: (B, C, h, w) to (B, C + 1, C).

    float64. Products are summed around the mean, so that float32 is enough for float32 maps: the
    group norm divides by a standard deviation, which would vanish beside large means.
    """
    with torch.autocast(c1.device.type, enabled=False):
        cells = c1.flatten(2)
        cells = cells.to(torch.promote_types(cells.dtype, torch.float32))
        mean = cells.mean(2, keepdim=True)
        centred = cells - mean
        spread = (centred @ centred.transpose(1, 2)).double() / cells.shape[2]
        mean = mean.double()
        return torch.cat((spread + mean @ mean.transpose(1, 2), mean.transpose(1, 2)), dim=1)
