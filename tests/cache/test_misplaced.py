"""Intact files in the wrong place: named by verify, and never read as another row's."""

import functools
from typing import Any

import pytest
from mfdetr_pipelines.cache.verify import run_verify
from mfdetr_pipelines.config.cache import VerifyConfig

from mfdetr_cache.errors import CacheError
from mfdetr_cache.reporter import SilentReporter
from tests.support.caches import DictStorage, everything, require_one_line, tiny_files

COMPRESSIONS = ("raw", "zstd")


def faults_of(files: dict[str, bytes]) -> tuple[str, ...]:
    return run_verify(VerifyConfig(DictStorage(files), full=True), SilentReporter()).faults


def require_noticed(files: dict[str, bytes], compression: str = "zstd") -> None:
    """Every file that is not its own is named; reading gives the right data or stops."""
    whole = tiny_files(compression)
    wrong = [k for k in whole if files.get(k) != whole[k]]
    assert wrong
    faults = faults_of(files)
    assert [k for k in wrong if not _is_named(k, faults)] == []
    try:
        found = everything(DictStorage(files))
    except CacheError as error:
        require_one_line(error)
    else:
        assert found == right_data(compression)


@functools.lru_cache
def right_data(compression: str) -> dict[str, Any]:
    return everything(DictStorage(tiny_files(compression)))


def _is_named(key: str, faults: tuple[str, ...]) -> bool:
    """The file itself; or the document that seals it, without which nothing can be said of it."""
    if any(key in fault for fault in faults):
        return True
    if key.startswith("annotations/0"):
        return any("status/annotations/000000.json" in fault for fault in faults)
    if "/c/" not in key:
        return any("foundation.json" in fault for fault in faults)
    view, number = key.split("/")[1], int(key.partition("/c/")[2].split("/")[0])
    manifest = f"views/{view}/status/manifest/{number:06d}.json"
    return any(manifest in fault or "foundation.json" in fault for fault in faults)


def exchangeable(whole: dict[str, bytes]) -> list[tuple[str, str]]:
    """A file, and another part's or view's of the same array."""
    pairs = []
    for key in whole:
        if "/c/" not in key or not key.startswith("views/base/"):
            continue
        array, _, place = key.partition("/c/")
        numbers = place.split("/")
        others = (
            "/".join([array, "c", str(int(numbers[0]) + 1), *numbers[1:]]),
            key.replace("views/base", "views/mirrored-0"),
        )
        pairs += [(key, other) for other in others if other in whole]
    return pairs


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_file_of_another_part_or_view(compression: str) -> None:
    whole = tiny_files(compression)
    tried = 0
    for key, other in exchangeable(whole):
        if whole[key] == whole[other]:
            continue
        require_noticed({**whole, key: whole[other]}, compression)
        require_noticed({**whole, key: whole[other], other: whole[key]}, compression)
        tried += 1
    assert tried > 40


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_file_of_another_cache_or_age(compression: str) -> None:
    """Every file, manifests and root among them; then all files of a part with its manifest."""
    whole, other = tiny_files(compression), tiny_files(compression, seed=1)
    different = [k for k in whole if whole[k] != other[k]]
    for key in different:
        require_noticed({**whole, key: other[key]}, compression)
    part = [k for k in different if "/c/1/" in k or k.endswith("/c/1") or "000001.json" in k]
    require_noticed({**whole, **{k: other[k] for k in part}}, compression)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_all_data_of_a_part_rotated(compression: str) -> None:
    """Data of parts 0, 1, 2 moved on by one, without and with their manifests."""
    whole = tiny_files(compression)
    for with_manifests in (False, True):
        files = dict(whole)
        for key in whole:
            for number in range(3):
                after = (number + 1) % 3
                if f"/c/{number}" in key and key.replace(f"/c/{number}", "/c/2", 1) in whole:
                    files[key] = whole[key.replace(f"/c/{number}", f"/c/{after}", 1)]
                if with_manifests and key.endswith(f"base/status/manifest/{number:06d}.json"):
                    files[key] = whole[key.replace(f"{number:06d}", f"{after:06d}")]
        require_noticed(files, compression)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_shard_spliced_from_two(compression: str) -> None:
    """Whole chunks of another part before whole chunks of its own, as an rsync leaves it."""
    whole = tiny_files(compression)
    for key, other in exchangeable(whole):
        # With raw chunks the two are equally long and cut at the same places.
        if len(whole[key]) == len(whole[other]) and whole[key] != whole[other]:
            half = len(whole[key]) // 2
            for cut in range(max(1, half - 40), half + 40):
                spliced = whole[other][:cut] + whole[key][cut:]
                if spliced not in (whole[key], whole[other]):
                    require_noticed({**whole, key: spliced}, compression)
                    break


def test_every_file_cut_off_longer_empty_or_gone() -> None:
    """One after the other in one of these ways; the fuzzer knows more of them."""
    whole = tiny_files()
    for number, (key, data) in enumerate(whole.items()):
        files = {**whole, key: (data[:-1], data + b" ", b"")[number % 3]}
        if number % 4 == 3:
            del files[key]
        require_noticed(files)


def test_a_manifest_that_names_too_little() -> None:
    """Sealed again by whoever changed it."""
    from mfdetr_cache.cache.document import read_sealed
    from mfdetr_cache.sealed import seal

    whole = tiny_files()
    sealed = [k for k in whole if "/status/manifest/" in k or "/status/annotations/" in k]
    assert len(sealed) == 8
    for key in sealed:
        fields = dict(read_sealed(DictStorage(whole), key).values)
        del fields["sha256"]
        for files in ({}, dict(list(fields["files"].items())[1:])):
            require_noticed({**whole, key: seal({**fields, "files": files})})
        require_noticed({**whole, key: seal({**fields, "cache_id": "0" * 16})})


def test_a_file_where_none_belongs_is_named() -> None:
    """No fault, since nothing reads it; what a killed writing left is not named."""
    whole = tiny_files()
    stranger = "views/base/queries/c/7/0/0"
    files = {
        **whole,
        stranger: whole["views/base/queries/c/0/0/0"],
        "views/base/queries/c/1/0/0.partial": b"torn",
        "views/base/status/.writer.lock": b"",
        "annotations/000001/zarr.json": b"{}",
    }
    found = run_verify(VerifyConfig(DictStorage(files), full=True), SilentReporter())
    assert found.faults == ()
    assert found.unknown_files == ("annotations/000001/zarr.json", stranger)
