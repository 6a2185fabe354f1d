import gzip
import io
import os
import zipfile
from pathlib import Path

import pytest

from mfdetr_cache.coco.json_file import read_json
from mfdetr_cache.errors import DatasetError


def zipped(**files: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("readme.txt", "")
        for name, text in files.items():
            archive.writestr(f"{name}.json", text)
    return data.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"hello", "is not JSON"),
        (b"", "is empty"),
        (gzip.compress(b" "), "is empty"),
        (b"[" * 200_000, "is nested too deeply"),
        (b'{"a":' * 200_000, "is nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "is not JSON"),
        ('["\u00e9"]'.encode("latin-1"), r"is no text in UTF-8 or UTF-16 \(byte 2\); save it as"),
        (gzip.compress(b"[1]")[:-6], "cannot be read"),
        (b"\x1f\x8b nothing of gzip", "cannot be read"),
        (gzip.compress(b" " * 2**29), "unpacks to more than 67108864 bytes"),
        (b"<!DOCTYPE html><p>Sign in", "is not JSON .it begins with '<!DOCTYPE html><p>Sign in'"),
        (b'{"id": 1}\n{"id": 2}', "is not JSON .*several documents one behind the other"),
        (b'{"a": [1, 2], "b": "un', r"is not JSON .*it ends before it is complete: was it written"),
        (b'{"a": [1, 2], ', "is not JSON .*it ends before it is complete: was it written"),
        (b'{"a": [1, {"b": 2},], "c": 3}', r"is not JSON .*, behind '{\"a\": \[1, {\"b\": 2},'"),
        (zipped(a="[1]", b="[2]"), "is a zip archive with 2 JSON files; unpack one"),
        (zipped(a="[1]")[:-9], "cannot be read"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_no_json_is_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=f"annotation file .*a.json {message}"):
        read_json(path, "annotation file", "pass another")


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.json", "a.json.gz", "a.zip")]
    text = "[1, NaN]"
    contents = text.encode(), gzip.compress(text.encode()), zipped(inner=text)
    for path, data in zip(paths, contents, strict=True):
        path.write_bytes(data)
    files = [read_json(path, "file", "") for path in paths]
    assert {(f.name, f.sha256) for f in files} == {("a", files[0].sha256)}


def test_no_pipe_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(DatasetError, match=r"pipe.json is no file; pass another"):
        read_json(tmp_path / "pipe.json", "annotation file", "pass another")
    with pytest.raises(DatasetError, match=r"absent.json does not exist; pass another"):
        read_json(tmp_path / "absent.json", "annotation file", "pass another")
