"""What is written into a cache comes back, whatever happens on the way."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from mfdetr_pipelines.cache.verify import run_verify
from mfdetr_pipelines.config.cache import VerifyConfig

from mfdetr_cache.cache.creation import CacheContent
from mfdetr_cache.cache.manifest import manifest_key
from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.schema import PART_BYTES, CacheLayout, Part, plan_layout
from mfdetr_cache.cache.storage.local import LocalStorage
from mfdetr_cache.cache.writer import CacheWriter
from mfdetr_cache.choices import Compression, Preset
from mfdetr_cache.config import to_dict
from mfdetr_cache.errors import CacheError
from mfdetr_cache.fields import Fields
from mfdetr_cache.ops.quantisation import ENCODINGS, encode_map
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.types import DetectorSpec, ImageGeometry
from tests.support.caches import append, files_of
from tests.support.filled_caches import ALL_PARTS, SIZES, VIEWS, fill, make_content, make_output
from tests.support.images import make_spec


def test_everything_comes_back(filled: Path, content: CacheContent, spec: DetectorSpec) -> None:
    cache = FeatureCache.open(filled)
    cache.require_complete()
    assert cache.spec == spec
    assert cache.rows == (0, 1, 2, 3, 5, 6)
    assert [s["image_id"] for s in cache.skipped] == [41]
    for image in cache:
        output = make_output(spec, SIZES[image.row], image.row)
        entry = content.images[image.row]
        assert (image.image_id, image.file_name) == (entry.image_id, entry.file_name)
        assert image.geometry.original_hw == entry.size_hw
        assert image.geometry.input_hw == SIZES[image.row]
        assert (image.class_logits == output.class_logits[0].numpy()).all()
        assert (image.boxes_cxcywh_norm == output.boxes_cxcywh_norm[0].numpy()).all()
        assert (image.queries == output.queries[0].half().numpy()).all()
        for m in spec.maps:
            wanted = output.maps[m.name][0].permute(1, 2, 0).half().numpy()
            assert (image.maps[m.name].to_array() == wanted).all()
        truth = content.labels.objects["base"][image.row]
        assert (image.ground_truth.boxes_xyxy == truth.boxes_xyxy).all()
        assert (image.ground_truth.areas == truth.areas).all()
        for found, wanted_runs in zip(
            image.ground_truth.run_lengths, truth.run_lengths, strict=True
        ):
            assert (found == wanted_runs).all()


def test_a_stranger_reads_every_value_with_zarr_alone(filled: Path, spec: DetectorSpec) -> None:
    """What docs/cache-format.md promises; nothing of this package is used to read."""
    group = zarr.open_group(str(filled), mode="r")
    about: Any = group.attrs["mfdetr_cache"]
    assert (about["format"], about["format_version"]) == ("mfdetr-cache", 2)
    view: Any = group["views/base"]
    strides = {m.name: m.stride for m in spec.maps}
    for row in np.flatnonzero(view["status"][:] == 1):
        output = make_output(spec, SIZES[row], int(row))
        assert (view["class_logits"][row] == output.class_logits[0].numpy()).all()
        assert (view["queries"][row] == output.queries[0].half().numpy()).all()
        assert tuple(view["input_hw"][row]) == SIZES[row]
        for name, tensor in output.maps.items():
            stored = view[f"maps/{name}"]
            height, width = (int(v) for v in stored["hw"][row])
            first = int(stored["offset"][row])
            tokens = stored["values"][first : first + height * width]
            wanted = tensor[0].permute(1, 2, 0).half().numpy()
            assert (tokens.reshape(height, width, -1) == wanted).all()
            assert stored["values"].attrs["stride"] == strides[name]
    names, bounds = group["images/file_name_utf8"][:], group["images/file_name_offset"][:]  # type: ignore[index]
    assert bytes(names[bounds[2] : bounds[3]]).decode() == "folder/ü2.jpg"
    truth: Any = group["annotations/000000/views/base"]
    first, last = truth["offset"][2:4]
    runs = truth["run_length_offset"][first : last + 1]
    mask = truth["run_length"][runs[0] : runs[1]]
    height, width = group["images/original_hw"][2]  # type: ignore[index]
    assert mask.sum() == height * width


@pytest.mark.parametrize("compression", ["zstd", "raw"])
@pytest.mark.parametrize("preset", ["fp16", "int8", "int8-small", "int4"])
def test_every_preset_comes_back_bit_exact(
    tmp_path: Path, spec: DetectorSpec, preset: Preset, compression: Compression
) -> None:
    """Every view of every row gives the codes that the encoder makes of the detector's maps."""
    content = make_content(spec, SIZES, preset=preset, compression=compression)
    fill(tmp_path / "c.zarr", content, SIZES)
    cache = FeatureCache.open(tmp_path / "c.zarr")
    for number, view in enumerate(VIEWS):
        for row in cache.views[view].rows:
            image = cache.read(row, view=view)
            output = make_output(spec, SIZES[row], row + 100 * number)
            assert (image.class_logits == output.class_logits[0].numpy()).all()
            for m in spec.maps:
                tokens = output.maps[m.name][0].flatten(1).T.numpy()
                values, affine = encode_map(tokens, ENCODINGS[preset])
                stored = image.maps[m.name]
                assert (stored.values[: len(values)] == values).all()
                assert stored.affine is None if affine is None else (stored.affine == affine).all()
            wanted = content.labels.objects[view][row]
            assert (image.ground_truth.boxes_xyxy == wanted.boxes_xyxy).all()


@pytest.mark.parametrize("stop_after", [0, 1, 4])
def test_resumed_equals_uninterrupted_byte_for_byte(
    tmp_path: Path, filled: Path, content: CacheContent, stop_after: int
) -> None:
    path = tmp_path / "again.zarr"
    fill(path, content, SIZES, stop_after)
    cache = FeatureCache.open(path)
    assert len(cache.missing_parts) == 6 - stop_after
    with pytest.raises(CacheError, match=f"{6 - stop_after} of 6 parts are missing"):
        cache.require_complete()
    fill(path, content, SIZES)
    assert files_of(path) == files_of(filled)


def test_an_unsealed_part_leaves_no_trace(
    tmp_path: Path, filled: Path, content: CacheContent
) -> None:
    path = tmp_path / "again.zarr"
    with CacheWriter.open_or_create(path, content) as writer:
        writer.begin_part(Part("base", 0))
        geometry = ImageGeometry(content.images[0].size_hw, SIZES[0], SIZES[0])
        append(writer, 0, geometry, make_output(content.root.spec, SIZES[0], 7))
    assert FeatureCache.open(path).rows == ()
    fill(path, content, SIZES)
    assert files_of(path) == files_of(filled)


@given(st.lists(st.sampled_from(["part", "crash", "lose"]), max_size=8), st.integers(0, 9))
@settings(max_examples=25)
def test_any_history_ends_in_the_same_cache(
    tmp_path_factory: pytest.TempPathFactory, history: list[str], pick: int
) -> None:
    """Append, crash, lose a file, resume: in the end all bytes are those of one clean run."""
    spec = make_spec(strides=(16,), c1_channels=8, num_queries=4)
    content = make_content(spec, SIZES)
    folder = tmp_path_factory.mktemp("history")
    fill(folder / "clean.zarr", content, SIZES)
    path = folder / "c.zarr"
    for event in history:
        if event == "part":
            fill(path, content, SIZES, stop_after=1)
        elif event == "crash" and path.exists():
            (path / "views/base/status/c").mkdir(parents=True, exist_ok=True)
            (path / "views/base/status/c/0.partial").write_bytes(b"torn")
            with CacheWriter.open_or_create(path, content) as writer:
                for part in writer.pending_parts()[:1]:
                    writer.begin_part(part)
        elif event == "lose" and path.exists():
            shards = sorted(path.rglob("values/c/*/0"))
            if shards:
                shards[pick % len(shards)].unlink()
    fill(path, content, SIZES)
    found = {k: v for k, v in files_of(path).items() if not k.endswith(".partial")}
    assert found == files_of(folder / "clean.zarr")


def test_a_full_disk_keeps_what_was_sealed(
    tmp_path: Path, filled: Path, content: CacheContent, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "again.zarr"
    fill(path, content, SIZES, stop_after=1)
    real = LocalStorage.write

    def full(self: LocalStorage, key: str, pieces: list[bytes]) -> None:
        if "queries" in key:
            raise OSError(28, "No space left on device")
        real(self, key, pieces)

    monkeypatch.setattr(LocalStorage, "write", full)
    with pytest.raises(CacheError, match="is full; sealed parts are kept, make room"):
        fill(path, content, SIZES)
    monkeypatch.undo()
    assert FeatureCache.open(path).missing_parts == ALL_PARTS[1:]
    fill(path, content, SIZES)
    assert files_of(path) == files_of(filled)


def test_a_lost_file_is_noticed_and_written_again(filled: Path, content: CacheContent) -> None:
    whole = files_of(filled)
    (filled / "views/base/maps/c1/values/c/1/0").unlink()
    assert FeatureCache.open(filled).missing_parts == (Part("base", 1),)
    fill(filled, content, SIZES)
    assert files_of(filled) == whole


def test_a_damaged_manifest_is_named(filled: Path) -> None:
    (filled / manifest_key(Part("base", 1))).write_text("{")
    with pytest.raises(
        CacheError,
        match=r"000001\.json is damaged: its bytes are not .*; mend it with: mfdetr cache repair",
    ):
        FeatureCache.open(filled).require_complete()


def test_values_that_do_not_fit_float16_are_refused(tmp_path: Path, content: CacheContent) -> None:
    output = make_output(content.root.spec, SIZES[0], 0)
    output.maps["c1"][0, 0, 0, 0] = 1e6
    with CacheWriter.open_or_create(tmp_path / "c.zarr", content) as writer:
        writer.begin_part(Part("base", 0))
        geometry = ImageGeometry(content.images[0].size_hw, SIZES[0], SIZES[0])
        with pytest.raises(CacheError, match=r"map c1 of row 0 is not finite as float16 .*1e\+06"):
            append(writer, 0, geometry, output)


def test_parts_stay_below_their_bound() -> None:
    big = make_spec(
        width=256, c1_channels=256, strides=(8, 16, 32, 64), num_queries=300, num_labels=91
    )
    layout = plan_layout(big, {(800, 1066)}, 1000, "fp16")
    tokens = sum(layout.maps[m.name].part_tokens * m.channels * 2 for m in big.maps)
    assert layout.images_per_part >= 4
    assert tokens < 1.2 * PART_BYTES
    small = make_spec(width=8, c1_channels=8, strides=(16,), num_queries=4)
    assert plan_layout(small, {(64, 64)}, 1000, "int8").images_per_part == 64
    plain = to_dict(layout)
    assert CacheLayout.from_fields(Fields(plain, "layout", CacheError)) == layout


def test_moving_a_cache_changes_nothing(tmp_path: Path, filled: Path) -> None:
    moved = shutil.move(filled, tmp_path / "elsewhere")
    assert len(FeatureCache.open(moved)) == 6


def test_verify_finds_every_kind_of_damage(filled: Path) -> None:
    def faults(*, full: bool) -> tuple[str, ...]:
        return run_verify(VerifyConfig(filled, full=full), SilentReporter()).faults

    assert faults(full=False) == faults(full=True) == ()
    shard = filled / "views/base/maps/c1/values/c/1/0"
    whole = shard.read_bytes()

    def damaged(position: int) -> bytes:
        changed = bytearray(whole)
        changed[position] ^= 1
        return bytes(changed)

    # A flipped byte of data is seen by --full and by reading, one of the index always.
    shard.write_bytes(damaged(40))
    assert faults(full=False) == ()
    assert (
        "part 1 of view base: views/base/maps/c1/values/c/1/0 has a wrong checksum"
        in faults(full=True)[0]
    )
    with pytest.raises(CacheError, match="has a wrong checksum: its bytes changed on disk"):
        FeatureCache.open(filled).read(3)
    shard.write_bytes(damaged(len(whole) - 20))
    assert "has a damaged index" in faults(full=False)[0]
    shard.write_bytes(b"")
    assert "has 0 bytes instead of" in faults(full=False)[0]
    shard.unlink()
    assert "is missing" in faults(full=False)[0]
    shard.write_bytes(whole)
    (filled / manifest_key(Part("base", 2))).unlink()
    summary = run_verify(VerifyConfig(filled, full=True), SilentReporter())
    assert summary.broken_parts == (Part("base", 2),)
    assert "part 2 of view base was never sealed" in summary.faults[0]


def test_links_that_leave_the_cache_are_named(tmp_path: Path, filled: Path) -> None:
    shard = filled / "views/base/maps/c1/values/c/1/0"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    (fault,) = run_verify(VerifyConfig(filled, full=True), SilentReporter()).faults
    assert "views/base/maps/c1/values/c/1/0 is a link that leaves the cache" in fault
    # One inside of it is a file like any other; so is a cache behind a link.
    shard.unlink()
    (tmp_path / "elsewhere").rename(shard.with_name("1"))
    shard.symlink_to("1")
    linked = tmp_path / "linked.zarr"
    linked.symlink_to(filled)
    assert run_verify(VerifyConfig(linked, full=True), SilentReporter()).faults == ()
