import gzip
import os
from pathlib import Path

import pytest

from mfdetr_cache.coco.json_file import read_json
from mfdetr_cache.errors import DatasetError


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
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_no_json_is_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=f"annotation file .*a.json {message}"):
        read_json(path, "annotation file", "pass another")


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.json", tmp_path / "a.json.gz"
    plain.write_bytes(b"[1, NaN]")
    packed.write_bytes(gzip.compress(b"[1, NaN]"))
    one, other = (read_json(p, "file", "") for p in (plain, packed))
    assert (one.name, one.sha256) == (other.name, other.sha256) == ("a", one.sha256)


def test_no_pipe_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(DatasetError, match=r"pipe.json is no file; pass another"):
        read_json(tmp_path / "pipe.json", "annotation file", "pass another")
    with pytest.raises(DatasetError, match=r"absent.json does not exist; pass another"):
        read_json(tmp_path / "absent.json", "annotation file", "pass another")
