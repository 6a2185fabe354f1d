"""Reading and writing video files with PyAV, if it is installed."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from mfdetr_cache.errors import ConfigError, ImageError
from mfdetr_cache.files import disk_error

# In the metadata of what the command writes: only that may be written over by a later run.
WRITTEN_BY = "mfdetr predict"
# What holds its pictures itself: a playlist under another name would lead to other files.
_CONTAINERS = {"format_whitelist": "mov,matroska,webm,avi", "protocol_whitelist": "file"}


class Video:
    """A video file, opened for reading and for an annotated copy of the same size and frame rate.

    The copy is an MP4 whatever its name says, and has no sound. ConfigError if PyAV is not
    installed, ImageError if the file cannot be read.
    """

    def __init__(self, path: Path, copy: Path) -> None:
        self._av = _decoder(path)
        self._path = path
        try:
            if not path.is_file():
                raise ImageError(f"video {path} is no regular file")
            self._source: Any = self._av.open(str(path), options=_CONTAINERS)
            self._stream: Any = self._source.streams.video[0]
        except (OSError, IndexError, self._av.FFmpegError) as error:
            raise ImageError(f"video {path} cannot be decoded: {error}") from error
        if min(self._stream.width, self._stream.height) < 2:
            raise ImageError(f"video {path} has a side of one pixel, which no MP4 can have")
        self.frames = int(self._stream.frames or 0)
        self._copy: Any = self._av.open(str(copy), "w", format="mp4")
        self._copy.metadata["comment"] = WRITTEN_BY
        codec = "libx264" if "libx264" in self._av.codecs_available else "mpeg4"
        self._out = self._copy.add_stream(codec, rate=self._stream.average_rate or 25)
        self._out.pix_fmt = "yuv420p"
        # This way of storing colour takes even sizes only.
        self._out.width = self._stream.width // 2 * 2
        self._out.height = self._stream.height // 2 * 2

    def __enter__(self) -> "Video":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._source.close()
        if kind is not None:
            # Nobody gets the copy, and what was wrong is known.
            with contextlib.suppress(self._av.FFmpegError):
                self._copy.close()
            return
        with self._encoding():
            for packet in self._out.encode():
                self._copy.mux(packet)
            self._copy.close()

    def __iter__(self) -> Iterator[Image.Image]:
        try:
            for frame in self._source.decode(self._stream):
                yield frame.to_image().convert("RGB")
        except self._av.FFmpegError as error:
            raise ImageError(f"video {self._path} cannot be decoded: {error}") from error

    def add(self, picture: Image.Image) -> None:
        """Append an RGB frame of the video's size to the copy."""
        kept = picture.crop((0, 0, self._out.width, self._out.height))
        with self._encoding():
            for packet in self._out.encode(self._av.VideoFrame.from_image(kept)):
                self._copy.mux(packet)

    @contextlib.contextmanager
    def _encoding(self) -> Iterator[None]:
        """Turn what the encoder does not take into an ImageError."""
        try:
            yield
        except self._av.FFmpegError as error:
            if disk_error(error):
                raise
            raise ImageError(f"video {self._path} cannot be written as MP4: {error}") from error


def was_written_by_predict(path: Path) -> bool:
    """Whether a file is a video written by ``mfdetr predict``; False if it is no video."""
    av = _decoder(path)
    try:
        with av.open(str(path), options=_CONTAINERS) as video:
            return bool(video.metadata.get("comment") == WRITTEN_BY)
    except (OSError, av.FFmpegError):
        return False


def _decoder(path: Path) -> Any:  # noqa: ANN401  an optional package
    try:
        return importlib.import_module("av")
    except ImportError:
        raise ConfigError(
            f"{path} is a video and no decoder is installed; pip install 'mfdetr-cache[video]'"
        ) from None
