"""A baseline after ISTR (Hu et al., 2021): the query predicts a short code of its whole mask.

A basis of 28 x 28 masks is learned once from the ground truth; a mask is its mean plus a weighted
sum of the basis, and the code is the weights.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

SIDE = 28
# Cells of the region features the code is read from, along an axis; divides every RoI size.
_POOLED = 8
# A decoded mask lies around [0, 1]; this makes logits of +-6, near the sigmoid's limits.
_LOGIT_SCALE = 12.0
# Of the autoencoder.
_LEARNING_STEPS, _LEARNING_BATCH = 1000, 128


def _cosines(width: int) -> Tensor:
    """The first vectors of the two-dimensional cosine transform, orthonormal, (width, 784)."""
    at = (torch.arange(SIDE, dtype=torch.float64) + 0.5) * torch.pi / SIDE
    waves = torch.cos(torch.arange(SIDE)[:, None] * at)
    waves /= waves.norm(dim=1, keepdim=True)
    frequency = torch.arange(SIDE)
    order = (frequency[:, None] + frequency).flatten().argsort(stable=True)[:width]
    return torch.einsum("uy,vx->uvyx", waves, waves).flatten(2).flatten(0, 1)[order].float()


class LinearCodec(nn.Module):
    """Principal components of masks, as buffers.

    Until it is fitted, the basis holds the lowest frequencies of a cosine transform.
    """

    mean: Tensor
    basis: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((SIDE * SIDE,), 0.5))
        self.register_buffer("basis", _cosines(width))

    def fit(self, masks: Tensor) -> float:
        """Learn the basis from coverage of objects over their boxes, shape (N, 28, 28).

        Returns the share of the masks' variance that the basis keeps, in [0, 1].
        """
        flat = masks.flatten(1).double()
        mean = flat.mean(0)
        values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean))
        chosen = vectors.flip(1)[:, : len(self.basis)].T
        # The sign of an eigenvector is arbitrary: its largest element is made positive.
        largest = chosen.gather(1, chosen.abs().argmax(1, keepdim=True))
        self.mean.copy_(mean)
        self.basis.copy_(chosen * largest.sign())
        values = values.clamp(min=0).flip(0)
        return float(values[: len(self.basis)].sum() / values.sum().clamp(min=1e-12))

    def encode(self, masks: Tensor) -> Tensor:
        """Codes (R, K) of masks given as coverage over each box, (R, t, t)."""
        small = functional.adaptive_avg_pool2d(masks[:, None], SIDE).flatten(1)
        return (small - self.mean) @ self.basis.T

    def decode(self, codes: Tensor) -> Tensor:
        """Mask logits (R, 28, 28) of codes (R, K); 0 where the decoded mask is a half."""
        masks: Tensor = self.mean + codes @ self.basis
        return (_LOGIT_SCALE * (masks - 0.5)).view(-1, SIDE, SIDE)


class CosineCodec(LinearCodec):
    """The lowest frequencies of a cosine transform, whatever the masks are."""

    def fit(self, masks: Tensor) -> float:
        """The share that the basis keeps; there is nothing to learn."""
        flat = masks.flatten(1)
        decoded = self.mean + self.encode(masks) @ self.basis
        total = (flat - flat.mean(0)).square().sum().clamp(min=1e-12)
        return float(1 - (decoded - flat).square().sum() / total)


class LearnedCodec(nn.Module):
    """A small autoencoder, which the head's own training leaves as it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        cells = SIDE * SIDE
        self.encoder = nn.Sequential(nn.Linear(cells, 256), nn.ELU(), nn.Linear(256, width))
        self.decoder = nn.Sequential(nn.Linear(width, 256), nn.ELU(), nn.Linear(256, cells))
        self.requires_grad_(requires_grad=False)

    @torch.enable_grad()
    def fit(self, masks: Tensor) -> float:
        """Learn to restore masks by cross entropy, in the terms of :class:`LinearCodec`."""
        self.requires_grad_()
        optimiser = torch.optim.Adam(self.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(0)
        for _ in range(_LEARNING_STEPS):
            some = masks[torch.randint(len(masks), (_LEARNING_BATCH,), generator=generator)]
            logits = self.decode(self.encode(some))
            optimiser.zero_grad()
            functional.binary_cross_entropy_with_logits(logits, some).backward()
            optimiser.step()
        self.requires_grad_(requires_grad=False)
        self.zero_grad(set_to_none=True)
        left = (self.decode(self.encode(masks)).sigmoid() - masks).square().sum()
        return float(1 - left / (masks - masks.mean(0)).square().sum().clamp(min=1e-12))

    def encode(self, masks: Tensor) -> Tensor:
        """Codes (R, K) of masks (R, t, t)."""
        small = functional.adaptive_avg_pool2d(masks[:, None], SIDE).flatten(1)
        codes: Tensor = self.encoder(small - 0.5)
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Mask logits (R, 28, 28) of codes (R, K)."""
        logits: Tensor = self.decoder(codes)
        return logits.view(-1, SIDE, SIDE)


MaskCodec = LinearCodec | LearnedCodec
CodecKind = Literal["pca", "dct", "learned"]


def build_codec(kind: CodecKind, width: int) -> MaskCodec:
    """A codec with codes of a length."""
    kinds: dict[CodecKind, type[MaskCodec]] = {
        "pca": LinearCodec,
        "dct": CosineCodec,
        "learned": LearnedCodec,
    }
    return kinds[kind](width)


class RegionToQuery(nn.Module):
    """What a query reads out of its region, by a dynamic convolution as in Sparse R-CNN."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = max(width // 4, 8)
        self.kernels = nn.Linear(width, 2 * width * self.inner)
        self.norms = nn.ModuleList(nn.LayerNorm(n) for n in (self.inner, width, width))
        self.join = nn.Linear(_POOLED**2 * width, width)

    def joined(self, queries: Tensor, regions: Tensor) -> Tensor:
        """Shape (R, d), of queries (R, d) and regions (R, r, r, d)."""
        # Cells pooled to 8 x 8, then two layers whose weights come from the query.
        step = regions.shape[1] // _POOLED
        cells = functional.avg_pool2d(regions.permute(0, 3, 1, 2), step).flatten(2).transpose(1, 2)
        first, second = self.kernels(queries).chunk(2, -1)
        mixed = cells @ first.unflatten(-1, (-1, self.inner))
        mixed = functional.relu(self.norms[0](mixed))
        mixed = functional.relu(self.norms[1](mixed @ second.unflatten(-1, (self.inner, -1))))
        return functional.relu(self.norms[2](self.join(mixed.flatten(1))))


class EmbeddingPredictor(RegionToQuery):
    """A mask code from the query and its region."""

    def __init__(self, width: int, code_width: int, codec: MaskCodec | None = None) -> None:
        super().__init__(width)
        self.codec = codec or LinearCodec(code_width)
        self.code = nn.Sequential(
            nn.Linear(width, 256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Linear(256, code_width),
        )

    def forward(self, queries: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Mask logits (R, r, r), and the codes (R, K) they are decoded from."""
        codes = self.codes(queries, regions)
        masks = self.codec.decode(codes)[:, None]
        side = regions.shape[1]
        return functional.interpolate(masks, (side, side), mode="bilinear")[:, 0], codes

    def codes(self, queries: Tensor, regions: Tensor) -> Tensor:
        """Mask codes (R, K) of queries (R, d) and regions (R, r, r, d)."""
        codes: Tensor = self.code(self.joined(queries, regions))
        return codes
