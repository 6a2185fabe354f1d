import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mfdetr_cache.choices import Preset
from mfdetr_cache.errors import CacheError
from mfdetr_cache.ops.dequantisation import decode_groups, decode_maps
from mfdetr_cache.ops.quantisation import (
    ENCODINGS,
    StoredMap,
    encode_map,
)
from mfdetr_cache.ops.quantisation_torch import encode_maps

TOKENS = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=140),
    elements=st.floats(-6e4, 6e4, width=32),
)


def stored(tokens: np.ndarray, preset: Preset) -> StoredMap:
    encoding = ENCODINGS[preset]
    return StoredMap((1, len(tokens)), tokens.shape[1], encoding, *encode_map(tokens, encoding))


@given(TOKENS)
@pytest.mark.parametrize("preset", ["int8", "int8-small", "int4"])
def test_no_value_is_off_by_more_than_half_a_step(preset: Preset, tokens: np.ndarray) -> None:
    """Plus float32 rounding of low + step * code: three roundings of the block's largest value."""
    found = stored(tokens, preset)
    decoded = found.to_array()[0]
    encoding = ENCODINGS[preset]
    block = encoding.block_tokens or len(tokens)
    assert found.affine is not None
    step = np.repeat(found.affine[:, 1].astype(np.float32), block, axis=0)[: len(tokens)]
    largest = np.abs(tokens).max(initial=0) + np.abs(step).max(initial=0)
    bound = step / 2 * (1 + 1e-5) + 3 * np.float32(2.0**-23) * largest
    assert (np.abs(decoded - tokens) <= bound).all()


@given(TOKENS)
@pytest.mark.parametrize("preset", ["int8", "int8-small", "int4"])
def test_zeros_of_a_post_relu_map_stay_zero(preset: Preset, tokens: np.ndarray) -> None:
    tokens = np.maximum(tokens, 0)
    tokens[0] = 0
    first = ENCODINGS[preset].block_tokens or len(tokens)
    decoded = stored(tokens, preset).to_array()[0]
    assert (decoded[:first][tokens[:first] == 0] == 0).all()


def test_a_finer_preset_is_nearer() -> None:
    """Blocks follow the outliers of a channel; fewer bits cost sixteen times the error."""
    random = np.random.default_rng(0)
    tokens = random.normal(size=(4096, 16)).astype(np.float32)
    tokens[random.integers(0, 4096, 4), random.integers(0, 16, 4)] = 60
    error = {p: np.abs(stored(tokens, p).to_array()[0] - tokens).mean() for p in ENCODINGS}
    assert error["fp16"] < error["int8"] < error["int8-small"] < error["int4"]


def test_a_batch_decodes_as_its_maps_do() -> None:
    random = np.random.default_rng(0)
    for preset in ENCODINGS:
        maps = [stored(random.normal(size=(100, 5)).astype(np.float32), preset) for _ in range(3)]
        batch = decode_maps(maps)
        assert batch.shape == (3, 5, 1, 100)
        for index, one in enumerate(maps):
            assert (batch[index].permute(1, 2, 0).numpy() == one.to_array()).all()


@pytest.mark.parametrize("preset", list(ENCODINGS))
def test_images_of_different_sizes_decode_as_each_alone(preset: Preset) -> None:
    random = np.random.default_rng(0)

    def group(height: int, width: int, count: int) -> list[StoredMap]:
        found = []
        for _ in range(count):
            values = random.normal(size=(height * width, 5)).astype(np.float32)
            codes, affine = encode_map(values, ENCODINGS[preset])
            found.append(StoredMap((height, width), 5, ENCODINGS[preset], codes, affine))
        return found

    groups = [group(9, 15, 2), group(8, 16, 1), group(3, 7, 3)]
    for maps, decoded in zip(groups, decode_groups(groups), strict=True):
        assert torch.equal(decoded, decode_maps(maps))


@pytest.mark.parametrize("preset", ["int8", "int8-small", "int4"])
@pytest.mark.parametrize("shape", [(1, 1), (63, 5), (64, 4), (130, 33)])
def test_codes_are_those_of_the_definition(preset: Preset, shape: tuple[int, int]) -> None:
    """Written with arrays, one block after the other, from the description of the format."""
    rng = np.random.default_rng(0)
    count, channels = shape
    encoding = ENCODINGS[preset]
    # As a detector gives them, a plane per channel; one channel is constant, one is zeros.
    tokens = (rng.standard_normal((channels, count)) * 10.0 ** rng.integers(-5, 4)).T
    tokens = tokens.astype(np.float32)
    tokens[:, 0] = tokens[0, 0]
    tokens[:, channels // 2] = [0.0, -0.0][count % 2]
    codes, affine = encode_map(tokens, encoding)
    assert affine is not None
    most = 2**encoding.bits - 1
    wanted = np.empty(shape, np.uint8)
    block = encoding.block_tokens or count
    for number, first in enumerate(range(0, count, block)):
        values = tokens[first : first + block]
        low, step = affine[number].astype(np.float32)
        below = np.nextafter(affine[number, 0], np.float16(np.inf)).astype(np.float32)
        assert (low <= values.min(0)).all()
        assert (below > values.min(0)).all()
        covered = low.astype(np.float64) + most * step.astype(np.float64)
        # The spread was taken in float32.
        assert (covered >= values.max(0) - 2**-23 * np.abs(values).max(0)).all()
        scaled = (values - low) / np.where(step > 0, step, np.float32(1))
        wanted[first : first + block] = np.clip(np.rint(scaled), 0, most)
    if encoding.bits == 4:
        codes = np.stack((codes & 15, codes >> 4), axis=-1).reshape(count, -1)[:, :channels]
    np.testing.assert_array_equal(codes, wanted)
    assert not np.signbit(affine[:, 0, channels // 2]).any()


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf, 65520.0, -65520.0])
@pytest.mark.parametrize("preset", list(ENCODINGS))
def test_what_float16_cannot_hold_is_refused(preset: Preset, value: float) -> None:
    """At any place: kernels look at many values at once, and the last ones alone."""
    values = np.zeros((131, 3), np.float32)
    values[7, 1], values[3, 0] = 65504, -65504
    assert np.isfinite(stored(values, preset).to_array()).all()
    for place in ((0, 0), (40, 1), (130, 2)):
        broken = values.copy()
        broken[place] = value
        with pytest.raises(CacheError, match="not finite as float16"):
            encode_map(broken, ENCODINGS[preset])


MAPS = arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 14), st.integers(1, 14)),
    elements=st.floats(-65504, 65504, width=32)
    | st.floats(-(2.0**-20), 2.0**-20, width=32)
    | st.sampled_from([0.0, -0.0, 65504.0, -65504.0, 2.0**-24, 2.0**-130]),
)


@given(MAPS)
@pytest.mark.parametrize("preset", ENCODINGS)
def test_a_batch_on_its_device_has_the_bytes_of_each_image_on_a_cpu(
    preset: Preset, maps: np.ndarray
) -> None:
    encoding = ENCODINGS[preset]
    batch = encode_maps(torch.from_numpy(maps), encoding)
    assert batch.largest.tolist() == np.abs(maps).max((1, 2, 3)).tolist()
    for index, image in enumerate(maps):
        found = batch.of_image(index).stored()
        values, affine = encode_map(image.reshape(len(image), -1).T, encoding)
        assert found.hw == image.shape[1:]
        assert found.values.tobytes() == values.tobytes()
        assert found.values.shape == values.shape
        assert (found.affine is None) == (affine is None)
        if found.affine is not None and affine is not None:
            assert found.affine.tobytes() == affine.tobytes()
            assert found.affine.shape == affine.shape


@pytest.mark.parametrize("value", [65504, 65504 + 2**-8, 65520 - 2**-8, 65520, np.inf, np.nan])
@pytest.mark.parametrize("preset", ENCODINGS)
def test_what_is_too_large_is_the_same_for_a_batch(preset: Preset, value: float) -> None:
    encoding = ENCODINGS[preset]
    maps = torch.tensor([1.0, -value]).reshape(1, 1, 1, 2)
    fits = bool(encode_maps(maps, encoding).largest <= encoding.largest)
    if fits:
        encode_map(maps.reshape(2, 1).numpy(), encoding)
    else:
        with pytest.raises(CacheError, match="not finite as float16"):
            encode_map(maps.reshape(2, 1).numpy(), encoding)
