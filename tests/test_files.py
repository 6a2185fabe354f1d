import errno
import os
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from mfdetr_cache.cache.foundation import read_root
from mfdetr_cache.cache.locks import locked
from mfdetr_cache.cache.storage.local import LocalStorage
from mfdetr_cache.cache.storage.protocol import explained
from mfdetr_cache.errors import CacheError, HeadError, OutputError
from mfdetr_cache.files import (
    disk_error,
    is_taken,
    make_folder,
    owned_results,
    require_free,
    whole_file,
    write_atomically,
    writing,
)
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.folder import RunRecord, read_run_config, save_run_config
from mfdetr_cache.options import existing_folder, writable_file
from mfdetr_cache.training.run_folder import load_checkpoint, save_checkpoint
from mfdetr_cache.training.run_log import RunLog

# Every write to this device fails as on a full disk, by the kernel's own hand.
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "a.json"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    with pytest.raises(ZeroDivisionError), whole_file(path) as partial:
        partial.write_bytes(b"thr" * (1 // (partial.write_bytes(b"th") - 2)))
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]
    # Others may read it, as any file of this user.
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@needs_full
def test_a_full_disk_is_one_line_and_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, b"one")
    (tmp_path / "a.json.partial").symlink_to(FULL)
    with pytest.raises(OutputError, match=r"a\.json cannot be written, the disk is full; what was"):
        write_atomically(path, b"two")
    assert path.read_bytes() == b"one"
    # What was half written takes no room; the next time there is some.
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"


@needs_full
def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(tmp_path: Path) -> None:
    """torch raises its own exception here, with the system's behind it."""
    save_checkpoint(tmp_path, {"weights": torch.arange(100_000)})
    (tmp_path / "checkpoint.pt.partial").symlink_to(FULL)
    with pytest.raises(OutputError, match="the disk is full"):
        save_checkpoint(tmp_path, {"weights": torch.zeros(100_000)})
    assert load_checkpoint(tmp_path)["weights"][-1] == 99_999


def test_what_libraries_make_of_a_full_disk_is_known() -> None:
    assert disk_error(OSError(errno.EDQUOT, "")) == errno.EDQUOT
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert disk_error(SafetensorError(text)) == errno.ENOSPC
    consequence = RuntimeError("unexpected pos 64 vs 0")
    consequence.__context__ = OSError(errno.ENOSPC, "")
    assert disk_error(consequence) == errno.ENOSPC
    assert disk_error(OSError(errno.EINVAL, "")) == 0
    assert disk_error(ValueError("os error of another kind")) == 0


def test_a_limit_of_file_sizes_is_one_line(tmp_path: Path) -> None:
    """As ``ulimit -f`` sets it; FAT refuses files above 4 GB in the same way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OutputError, match=r"a\.json cannot be written: File too large"):
            write_atomically(tmp_path / "a.json", bytes(10_000))
        with pytest.raises(OutputError, match=r"checkpoint\.pt cannot be written: File too large"):
            save_checkpoint(tmp_path, {"weights": torch.zeros(100_000)})
        storage, said = LocalStorage(tmp_path), "cannot write to .*: File too large"
        with pytest.raises(CacheError, match=said), explained(storage):
            storage.write("a", [bytes(10_000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_nothing_is_written_through_a_half_written_file_that_is_a_link(
    tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    link(mine, tmp_path / "a.json.partial")
    with pytest.raises(OutputError, match=r"a\.json\.partial is a link, remove it"):
        write_atomically(tmp_path / "a.json", b"other")
    # What a cache leaves half written is nobody's: the link goes, and nothing else.
    LocalStorage(tmp_path).write("a.json", [b"other"])
    assert mine.read_bytes() == b"mine"
    assert (tmp_path / "a.json").read_bytes() == b"other"


def test_places_that_can_be_no_file_are_one_line(tmp_path: Path) -> None:
    for text in ("/", "", str(tmp_path)):
        with pytest.raises(ValueError, match="is a folder; name a file"):
            writable_file(text)
    with pytest.raises(OutputError, match="has too many above it"):
        make_folder(tmp_path / ("d/" * 1500))


def test_what_is_half_written_or_a_lock_takes_no_folder(tmp_path: Path) -> None:
    assert not is_taken(tmp_path / "absent")
    for name in ("config.json.partial", "writer.lock"):
        (tmp_path / name).write_text("")
    assert not is_taken(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    assert is_taken(tmp_path)
    assert is_taken(tmp_path / "notes.txt")


def test_a_disk_without_locks_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Lustre is mounted in many places; other errors are told."""

    def flock(_file: object, _kind: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("fcntl.flock", flock)
    error = errno.ENOSYS
    with owned_results(tmp_path / "results"), locked(LocalStorage(tmp_path / "a.zarr")):
        write_atomically(tmp_path / "results/a.json", b"one")
    assert (tmp_path / "results/a.json").read_bytes() == b"one"
    error = errno.EIO
    with (
        pytest.raises(CacheError, match="Input/output error"),
        locked(LocalStorage(tmp_path / "b")),
    ):
        pass


def test_a_flipped_bit_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    """torch writes checksums and reads past them."""
    save_checkpoint(tmp_path, {"weights": torch.arange(1000.0)})
    path = tmp_path / "checkpoint.pt"
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(1000.0).numpy().tobytes()) + 40] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["weights"][10] != 10
    with pytest.raises(HeadError, match=r"checkpoint\.pt is damaged; remove it to begin"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "x"), OSError(errno.EIO, "x")])
def test_nobody_is_told_to_remove_what_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    save_checkpoint(tmp_path, {"weights": torch.arange(10.0)})

    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(zipfile, "ZipFile", failing)
    with pytest.raises(HeadError, match=r"checkpoint\.pt cannot be read: ") as caught:
        load_checkpoint(tmp_path)
    assert "remove it" not in str(caught.value)
    save_run_config(tmp_path, HeadConfig(), RunRecord(detector={}))
    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(HeadError, match=r"config\.json cannot be read: x"):
        read_run_config(tmp_path)
    LocalStorage(tmp_path).write("zarr.json", [b"{}"])
    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(CacheError, match="json cannot be read: x"):
        read_root(LocalStorage(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="may not be read by this user"):
        existing_folder(str(tmp_path))


def test_a_checkpoint_that_unpacks_to_more_than_its_size_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, {"weights": torch.zeros(1000)})
    with zipfile.ZipFile(tmp_path / "checkpoint.pt", "a", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("archive/data/9", bytes(2**24))
    monkeypatch.setattr(zipfile.ZipFile, "open", None)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(HeadError, match=r"checkpoint\.pt is damaged") as caught:
        load_checkpoint(tmp_path)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_checkpoint_of_tensors_that_claim_more_than_they_hold_is_damaged(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"losses": [{"a": torch.zeros(1).expand(10**9)}]})
    with pytest.raises(HeadError, match=r"checkpoint\.pt is damaged"):
        load_checkpoint(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="the folder .*deeper cannot be made: Not a directory"):
        make_folder(tmp_path / "file" / "deeper")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder cannot be written: Is a directory"):
        write_atomically(tmp_path / "folder", b"")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_what_is_wrong_with_the_input_is_not_blamed_on_the_disk(tmp_path: Path) -> None:
    with pytest.raises(HeadError, match="unreadable"), writing(tmp_path):
        raise HeadError("unreadable") from OSError(errno.EACCES, "")
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        _ = 1 / 0


def test_two_processes_do_not_fill_one_file_at_once(tmp_path: Path) -> None:
    """Locks of another descriptor count as those of another process."""
    path = tmp_path / "a.json"
    with whole_file(path) as partial:
        partial.write_bytes(b"first")
        with pytest.raises(OutputError, match="is being written by another process"):
            write_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    # What a kill left is nobody's.
    partial.write_bytes(b"half")
    write_atomically(path, b"third")
    assert list(tmp_path.iterdir()) == [path]


def test_devices_are_not_written_over(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="is no regular file: it would be replaced by one"):
        write_atomically(tmp_path / "pipe", b"data")
    assert (tmp_path / "pipe").is_fifo()
    # Nor waited for: nobody reads them.
    (tmp_path / "metrics.jsonl").symlink_to("pipe")
    log = RunLog(tmp_path)
    with pytest.warns(UserWarning, match=r"metrics\.jsonl cannot be written.*; training goes on"):
        log.add({"step": 1})
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("metrics.jsonl")
    with pytest.raises(OutputError, match=r"metrics\.jsonl cannot be written: Too many levels"):
        log.close()


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_log_is_not_appended_to_through_a_link(
    tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    """As a run folder of somebody else could bring one."""
    mine, log = tmp_path / "mine", tmp_path / "metrics.jsonl"
    mine.write_bytes(b'{"step": 1}\n')
    link(mine, log)
    RunLog(tmp_path).add({"step": 2})
    assert mine.read_bytes() == b'{"step": 1}\n'
    assert log.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert not log.is_symlink()
    log.unlink()
    log.symlink_to(tmp_path / "new")
    RunLog(tmp_path).add({"step": 3})
    assert not (tmp_path / "new").exists()


def test_a_place_with_something_else_in_it_is_not_free(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    for mark in (b"", b"ours"):
        require_free(path, "--out", mark)
    path.write_bytes(b"")
    require_free(path, "--out")
    path.write_bytes(b"<ours>")
    require_free(path, "--out", b"ours")
    (tmp_path / "link").symlink_to(path)
    for taken, mark in ((path, b""), (path, b"theirs"), (tmp_path / "link", b"")):
        with pytest.raises(OutputError, match=r"--out .* is there and was not written by this"):
            require_free(taken, "--out", mark)
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path, tmp_path / "pipe", path / "below"):
        with pytest.raises(OutputError, match=r"--out .* cannot be written"):
            require_free(odd, "--out")


def test_a_folder_of_results_has_one_writer(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    for _ in range(2):
        with owned_results(out):
            with pytest.raises(OutputError, match="is being written by another process"):
                owned_results(out).__enter__()
            assert not is_taken(out)
        assert not list(out.iterdir())
