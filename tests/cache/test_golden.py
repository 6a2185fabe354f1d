"""A small cache of the format stays readable, value by value; one of the version before is refused.

The caches were written once by ``python -m tests.cache.test_golden`` and are never written again;
their expected values follow from a formula and not from this version's writer.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import CacheError
from mfdetr_cache.ops.quantisation import ENCODINGS
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.types import DetectorOutput, DetectorSpec
from tests.support.images import make_spec

GOLDEN = Path(__file__).parent / "golden"
SIZES = [(32, 48), (32, 32), (16, 40)]
VERSIONS = ("v2-fp16", "v2-int8", "v2-int4")


def wave(shape: tuple[int, ...], phase: int) -> np.ndarray:
    """Values between -1 and 1 that repeat nowhere soon."""
    count = int(np.prod(shape))
    index = np.arange(count, dtype=np.float64) + 1000 * phase
    return np.sin(0.7 * index + 0.001 * index**1.5).reshape(shape).astype(np.float32)


def expected(spec: DetectorSpec, size_hw: tuple[int, int], row: int) -> DetectorOutput:
    height, width = size_hw

    def values(*shape: int, phase: int) -> torch.Tensor:
        return torch.from_numpy(wave((1, *shape), 10 * row + phase))

    return DetectorOutput(
        4 * values(spec.num_queries, spec.num_labels, phase=0),
        0.5 + 0.4 * values(spec.num_queries, 4, phase=1),
        values(spec.num_queries, spec.query_dim, phase=2),
        {
            m.name: values(m.channels, -(-height // m.stride), -(-width // m.stride), phase=3 + i)
            for i, m in enumerate(spec.maps)
        },
    )


@pytest.mark.parametrize("name", VERSIONS)
def test_every_version_is_read_value_by_value(name: str) -> None:
    from mfdetr_pipelines.cache.verify import run_verify
    from mfdetr_pipelines.config.cache import VerifyConfig

    cache = FeatureCache.open(GOLDEN / name)
    cache.require_complete()
    assert run_verify(VerifyConfig(GOLDEN / name, full=True), SilentReporter()).faults == ()
    assert cache.rows == (0, 2)
    assert cache.skipped[0]["reason"] == "left out"
    for row in cache.rows:
        image, wanted = cache.read(row), expected(cache.spec, SIZES[row], row)
        assert image.file_name == f"bild-{row}-ü.jpg"
        assert image.geometry.original_hw == (2 * SIZES[row][0], 2 * SIZES[row][1])
        assert (image.class_logits == wanted.class_logits[0].numpy()).all()
        assert (image.boxes_cxcywh_norm == wanted.boxes_cxcywh_norm[0].numpy()).all()
        halves = wanted.queries[0].numpy().astype(np.float16)
        assert (image.queries == halves).all()
        for m in cache.spec.maps:
            found = np.asarray(image.maps[m.name].to_array(), np.float32)
            tokens = wanted.maps[m.name][0].flatten(1).T.numpy()
            bits = ENCODINGS[cache.layout.preset].bits
            # Values span 2 at most; a code is off by half a step, float16 by 2^-12.
            tolerance = 2**-11 if bits == 16 else 2 / (2**bits - 1) / 2 + 2e-3
            assert np.abs(found.reshape(tokens.shape) - tokens).max() <= tolerance
    truth = cache.ground_truth(2)
    assert len(truth) == 2
    assert truth.run_lengths[0].sum() <= 4 * SIZES[2][0] * SIZES[2][1]


@pytest.mark.parametrize("name", ["v1-fp16", "v1-int8"])
def test_version_1_is_refused_with_what_to_do(name: str) -> None:
    """Its checksums are those of data followed by their checksum: one constant."""
    from mfdetr_pipelines.cache.verify import run_verify
    from mfdetr_pipelines.config.cache import VerifyConfig

    for attempt in (
        FeatureCache.open,
        lambda p: run_verify(VerifyConfig(p, full=True), SilentReporter()),
    ):
        with pytest.raises(CacheError, match=r"has cache format 1, .*: extract again into another"):
            attempt(GOLDEN / name)


def write_golden(name: str) -> None:
    """Write one of the caches; for a new format version only."""
    from mfdetr_cache.cache.annotations import AnnotationContent
    from mfdetr_cache.cache.creation import CacheContent
    from mfdetr_cache.cache.root import Root
    from mfdetr_cache.cache.schema import BASE_VIEW, FORMAT_VERSION, plan_layout
    from mfdetr_cache.cache.writer import CacheWriter
    from mfdetr_cache.coco.augmentation import identity_transform
    from mfdetr_cache.coco.image_list import ImageEntry
    from mfdetr_cache.identity import detector_identity
    from mfdetr_cache.types import ImageGeometry
    from tests.support.caches import append
    from tests.support.images import make_ground_truth

    spec = make_spec(strides=(8, 16), backbone8=False)
    preset = name.split("-")[1]
    originals = [(2 * h, 2 * w) for h, w in SIZES]
    identity = {
        "format_version": FORMAT_VERSION,
        "detector": detector_identity(spec),
        "images": {"count": 3, "sha256": "0" * 64},
        "views": [BASE_VIEW],
        "view_seed": None,
        "preset": preset,
        "compression": "zstd",
        "c1": "full",
        "c1_roi": None,
    }
    layout = plan_layout(spec, set(SIZES), len(SIZES), preset)  # type: ignore[arg-type]
    objects = [make_ground_truth(hw, count=i, seed=i) for i, hw in enumerate(originals)]
    content = CacheContent(
        root=Root(identity, spec, layout),
        images=[ImageEntry(7 + i, f"bild-{i}-ü.jpg", hw, i) for i, hw in enumerate(originals)],
        transforms={BASE_VIEW: [identity_transform(hw) for hw in originals]},
        labels=AnnotationContent(
            {"name": "golden", "sha256": "0" * 64},
            [{"id": 1, "name": "thing"}],
            (1, -1, -1),
            {BASE_VIEW: objects},
        ),
    )
    with CacheWriter.open_or_create(GOLDEN / name, content) as writer:
        for part in writer.pending_parts():
            writer.begin_part(part)
            for row in writer.rows_of_part(part):
                if row == 1:
                    writer.skip(row, "left out")
                    continue
                geometry = ImageGeometry(originals[row], SIZES[row], SIZES[row])
                append(writer, row, geometry, expected(spec, SIZES[row], row))
            writer.seal_part()
    for lock in (GOLDEN / name).rglob("*.lock"):
        lock.unlink()


if __name__ == "__main__":
    for golden in VERSIONS:
        write_golden(golden)
