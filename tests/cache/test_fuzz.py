"""Any bytes in any file of a cache: the right data, a refusal in one line, or a bug.

``MFDETR_FUZZ=1000000`` tries so many mutations of each kind; the suite tries some hundred.
"""

import json
import os
import resource
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mfdetr_pipelines.cache.verify import run_verify
from mfdetr_pipelines.config.cache import VerifyConfig

from mfdetr_cache.cache.foundation import FOUNDATION_KEY
from mfdetr_cache.errors import CacheError, MfdetrError
from mfdetr_cache.identity import identity_hash
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.sealed import seal
from tests.support.caches import (
    DictStorage,
    document_paths,
    everything,
    require_one_line,
    tiny_files,
    with_value,
)

EXAMPLES = int(os.environ.get("MFDETR_FUZZ", "300"))
# What a number or a frame of a hostile cache may take beside what the tests take anyway.
MOST_BYTES = 2 * 2**30
WHOLE = {compression: tiny_files(compression) for compression in ("zstd", "raw")}
OTHER = tiny_files("raw", seed=1)


def kind_of(key: str) -> str:
    if "/status/manifest/" in key or "/status/annotations/" in key:
        return "sealed documents"
    if key.endswith("zarr.json"):
        return "metadata"
    return "shards" if key.count("/c/") and "maps" in key else "tables and columns"


KINDS = ("sealed documents", "metadata", "shards", "tables and columns")


@st.composite
def mutations(draw: st.DrawFn, kind: str) -> tuple[str, str, bytes]:
    """Compression, key and other bytes of a file."""
    compression = draw(st.sampled_from(["zstd", "raw"]))
    whole = WHOLE[compression]
    key = draw(st.sampled_from([k for k in whole if kind_of(k) == kind]))
    data = bytearray(whole[key])
    for _ in range(draw(st.integers(1, 3))):
        what = draw(st.sampled_from(["flip", "cut", "insert", "repeat", "take", "zeros"]))
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(1, 64))
        if what == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del data[at : at + length if draw(st.booleans()) else len(data)]
        elif what == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=64))
        elif what == "repeat":
            data[at:at] = data[at : at + length]
        elif what == "take":
            data = bytearray(draw(st.sampled_from([whole[k] for k in whole if k != key])))
        else:
            data[at : at + length] = bytes(length)
    return compression, key, bytes(data)


def outcome(files: dict[str, bytes]) -> dict[str, Any] | None:
    """What reading gives; None where it is refused in one line. Anything else is raised."""
    try:
        return everything(DictStorage(files))
    except CacheError as error:
        require_one_line(error)
        return None


def faults_of(files: dict[str, bytes]) -> tuple[str, ...]:
    try:
        return run_verify(VerifyConfig(DictStorage(files), full=True), SilentReporter()).faults
    except CacheError as error:
        return (str(error),)


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files(kind: str) -> None:
    right = {c: everything(DictStorage(files)) for c, files in WHOLE.items()}

    @given(mutations(kind))
    @settings(max_examples=EXAMPLES // 3)
    def check(mutation: tuple[str, str, bytes]) -> None:
        compression, key, data = mutation
        if data == WHOLE[compression][key]:
            return
        files = {**WHOLE[compression], key: data}
        assert faults_of(files) != ()
        assert outcome(files) in (None, right[compression])

    check()


HOSTILE: list[Any] = [
    *(0, -1, 1, 3, 7, 2**31, 2**62, 2**63, 2**70, -(2**70), 0.5, 1e308, True, None, "", "x"),
    *("../../../etc/passwd", "\ud800", "\x1b[31m", [], {}, [[]], [1], {"a": 1}, ..., "0" * 64),
]


@st.composite
def resealed(draw: st.DrawFn) -> dict[str, bytes]:
    """A cache of somebody who changes documents and seals them again, all others with it."""
    files = dict(WHOLE[draw(st.sampled_from(["zstd", "raw"]))])
    sealed = [k for k in files if kind_of(k) == "sealed documents"]
    key = draw(st.sampled_from([*sealed, *[FOUNDATION_KEY] * len(sealed)]))
    document = json.loads(files[key])
    del document["sha256"]
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(document_paths(document)[1:]))
        document = with_value(document, path, draw(st.sampled_from(HOSTILE)))
        if not isinstance(document, dict) or not document:
            break
    files[key] = seal(document) if isinstance(document, dict) else json.dumps(document).encode()
    root = document.get("root") if key == FOUNDATION_KEY and isinstance(document, dict) else None
    if isinstance(root, dict) and draw(st.booleans()):
        _follow(files, root)
    return files


def _follow(files: dict[str, bytes], root: dict[str, Any]) -> None:
    """The identity's hash, the root and every sealed document as the new root would have them."""
    if isinstance(root.get("identity"), dict):
        root["cache_id"] = identity_hash(root["identity"])
    for key in [k for k in files if kind_of(k) == "sealed documents"]:
        document = json.loads(files[key])
        del document["sha256"]
        document["cache_id"] = root.get("cache_id")
        if key == FOUNDATION_KEY:
            document["root"] = root
        files[key] = seal(document)
    attributes = json.loads(files["zarr.json"])
    attributes["attributes"]["mfdetr_cache"] = root
    files["zarr.json"] = json.dumps(attributes).encode()


@given(resealed())
@settings(max_examples=EXAMPLES)
def test_hostile_documents(files: dict[str, bytes]) -> None:
    """Whatever they say, no traceback, no other error, and no more memory than a cache takes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome(files)
    faults_of(files)
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < MOST_BYTES


DEEP = ("[" * 200_000, '{"a":' * 100_000, "1" * 5000)


@pytest.mark.parametrize("text", ["", "{}", "[]", "5", '"x"', "null", "NaN", "\xff", *DEEP])
def test_documents_that_are_none(text: str) -> None:
    whole = WHOLE["zstd"]
    for key in [k for k in whole if kind_of(k) == "sealed documents" or k == "zarr.json"]:
        files = {**whole, key: text.encode("latin-1")}
        assert outcome(files) is None
        assert faults_of(files) != ()
        # The root or the foundation alone are enough to say what the cache is; both are needed.
        both = {**files, "zarr.json": text.encode("latin-1"), FOUNDATION_KEY: b"{}"}
        with pytest.raises(MfdetrError, match="is no feature cache"):
            run_verify(VerifyConfig(DictStorage(both)), SilentReporter())
