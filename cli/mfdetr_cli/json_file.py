"""The file of ``--json``: nothing of the user's is written over, and no result is lost with it."""

import json
from collections.abc import Mapping
from pathlib import Path

from mfdetr_cache.errors import OutputError
from mfdetr_cache.files import WRITTEN_BY, require_free, write_atomically

_MARK = f'"written_by": "{WRITTEN_BY}"'.encode()
# A result that could not be written is shown all the same; the command ends with this then.
_unwritten: list[OutputError] = []


def require_json_place(path: Path | None) -> None:
    """Refuse a place for a command's result where another file is; OutputError."""
    if path is not None and not _is_device(path):
        require_free(path, "--json", _MARK)


def write_json(path: Path | None, document: Mapping[str, object]) -> None:
    """Write a command's result, unless ``path`` is None; see :func:`require_written`."""
    if path is None:
        return
    marked = {"written_by": WRITTEN_BY, **document}
    data = f"{json.dumps(marked, indent=2, default=str)}\n".encode()
    try:
        require_json_place(path)
        if path.is_symlink() or _is_device(path):
            path.write_bytes(data)  # such as /dev/stdout, which must stay what it is
        else:
            write_atomically(path, data)
    except OutputError as error:
        _unwritten.append(error)
    except OSError as error:
        _unwritten.append(OutputError(f"--json {path} cannot be written: {error.strerror}"))


def require_written() -> None:
    """Raise OutputError if a result could not be written."""
    if _unwritten:
        raise _unwritten.pop()


def _is_device(path: Path) -> bool:
    """Whether a path is that of a pipe or a device."""
    try:
        return path.exists() and not path.is_file() and not path.is_dir()
    except OSError:
        return False
