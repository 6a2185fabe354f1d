import numpy as np
import pytest
import torch
from scipy import fft
from torch.nn import functional

from mfdetr_cache.head import mask_embedding
from mfdetr_cache.head.mask_embedding import (
    SIDE,
    EmbeddingPredictor,
    LinearCodec,
    build_codec,
)


def blobs(count: int) -> torch.Tensor:
    """Smooth random masks: what real objects look like to a basis."""
    noise = torch.randn(count, 1, 5, 5, generator=torch.Generator().manual_seed(1))
    return (functional.interpolate(noise, SIDE, mode="bicubic")[:, 0] > 0).float()


@pytest.mark.parametrize("width", [1, 20, 64])
def test_the_basis_keeps_as_much_as_any_basis_of_its_size_can(width: int) -> None:
    """The error of the best approximation is what numpy's singular values leave (Eckart-Young)."""
    masks = blobs(300)
    codec = LinearCodec(width)
    kept = codec.fit(masks)
    decoded = codec.decode(codec.encode(masks)) / 12.0 + 0.5
    flat = masks.flatten(1).double().numpy()
    singular = np.linalg.svd(flat - flat.mean(0), compute_uv=False)
    left = float((singular[width:] ** 2).sum())
    error = float((decoded - masks).double().square().sum())
    # float32 buffers: some 1e-7 of the total.
    assert error == pytest.approx(left, rel=1e-4, abs=1e-6 * float((singular**2).sum()))
    assert kept == pytest.approx(1 - left / float((singular**2).sum()), abs=1e-9)


def test_a_code_as_long_as_the_mask_loses_nothing() -> None:
    masks = blobs(2000)
    codec = LinearCodec(SIDE * SIDE)
    codec.fit(masks)
    restored = codec.decode(codec.encode(masks[:50]))
    torch.testing.assert_close(restored / 12.0 + 0.5, masks[:50], atol=1e-4, rtol=0)
    # Masks on a finer grid have the code of their average.
    fine = functional.interpolate(masks[:50, None], 2 * SIDE, mode="nearest")[:, 0]
    torch.testing.assert_close(codec.encode(fine), codec.encode(masks[:50]))


def test_fitting_twice_gives_the_same_basis() -> None:
    first, second = LinearCodec(30), LinearCodec(30)
    first.fit(blobs(100))
    second.fit(blobs(100).flip(0))
    torch.testing.assert_close(first.basis, second.basis, atol=1e-5, rtol=0)


def test_the_predictor_learns_masks_from_queries() -> None:
    """Each of twelve queries stands for a mask; nothing in the regions tells them apart."""
    masks = blobs(12)
    predictor = EmbeddingPredictor(16, 20)
    predictor.codec.fit(masks)
    queries, regions = torch.randn(12, 16), torch.randn(1, 16, 16, 16).expand(12, -1, -1, -1)
    optimiser = torch.optim.AdamW(predictor.parameters(), lr=3e-3)
    for _ in range(150):
        codes = predictor.codes(queries, regions)
        loss = (1 - functional.cosine_similarity(codes, predictor.codec.encode(masks))).mean()
        loss = loss + functional.mse_loss(codes, predictor.codec.encode(masks)) / 20
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    logits, _ = predictor(queries, regions)
    wanted = functional.adaptive_avg_pool2d(masks[:, None], 16)[:, 0]
    agree = ((logits > 0) == (wanted > 0.5)).float().mean()
    assert logits.shape == (12, 16, 16)
    assert agree > 0.9


def test_a_cosine_transform_keeps_what_its_frequencies_hold() -> None:
    """Against scipy's transform: the lowest diagonals of it, the rest set to zero."""
    masks = blobs(20)
    codec = build_codec("dct", 15)
    kept = codec.fit(masks)
    coefficients = fft.dctn(masks.numpy() - 0.5, axes=(1, 2), norm="ortho")
    y, x = np.indices((SIDE, SIDE))
    coefficients[:, y + x > 4] = 0  # 1 + 2 + 3 + 4 + 5 frequencies
    wanted = fft.idctn(coefficients, axes=(1, 2), norm="ortho") + 0.5
    decoded = codec.decode(codec.encode(masks)) / 12.0 + 0.5
    np.testing.assert_allclose(decoded.numpy(), wanted, atol=1e-4)
    error = ((wanted - masks.numpy()) ** 2).sum() / float((masks - masks.mean(0)).square().sum())
    assert kept == pytest.approx(1 - error, abs=1e-4)


def test_an_autoencoder_learns_masks_and_then_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than principal components of that size keep, in a fifth of its steps."""
    monkeypatch.setattr(mask_embedding, "_LEARNING_STEPS", 200)
    masks = blobs(300)
    torch.manual_seed(0)
    learned, linear = build_codec("learned", 20), build_codec("pca", 20)
    assert learned.fit(masks) > linear.fit(masks)
    assert not any(p.requires_grad for p in learned.parameters())
    codes = learned.encode(masks[:2]).requires_grad_()
    learned.decode(codes).sum().backward()
    assert codes.grad is not None
    assert codes.grad.abs().sum() > 0
