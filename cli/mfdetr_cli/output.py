"""Where a command's progress and its result go."""

import json
from collections.abc import Mapping
from pathlib import Path

from mfdetr_cache.errors import OutputError
from mfdetr_cache.files import WRITTEN_BY, require_free, write_atomically
from mfdetr_cli.progress import ConsoleReporter

_MARK = f'"written_by": "{WRITTEN_BY}"'.encode()


class CommandOutput:
    """Progress on standard error, and the result in the file of ``--json``, if one is given.

    Nothing of the user's is written over: OutputError where another file is. A result that cannot
    be written is not lost with it: it is shown all the same, and :meth:`require_written` raises.
    """

    def __init__(self, path: Path | None) -> None:
        self.reporter = ConsoleReporter()
        self._path = path
        self._error: OutputError | None = None
        self._require_place()

    def write_json(self, document: Mapping[str, object]) -> None:
        """Write a command's result, as soon as it is there."""
        path = self._path
        if path is None:
            return
        marked = {"written_by": WRITTEN_BY, **document}
        data = f"{json.dumps(marked, indent=2, default=str)}\n".encode()
        try:
            self._require_place()
            if path.is_symlink() or _is_device(path):
                path.write_bytes(data)  # such as /dev/stdout, which must stay what it is
            else:
                write_atomically(path, data)
        except OutputError as error:
            self._error = error
        except OSError as error:
            self._error = OutputError(f"--json {path} cannot be written: {error.strerror}")

    def require_written(self) -> None:
        """Raise OutputError if the result could not be written."""
        if self._error is not None:
            raise self._error

    def _require_place(self) -> None:
        if self._path is not None and not _is_device(self._path):
            require_free(self._path, "--json", _MARK)


def _is_device(path: Path) -> bool:
    try:
        return path.exists() and not path.is_file() and not path.is_dir()
    except OSError:
        return False
