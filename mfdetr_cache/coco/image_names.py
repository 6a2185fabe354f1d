"""Images as annotations and results name them: by id, by file, or by the number in its name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Generic, TypeVar

from mfdetr_cache.coco.ids import SourceId, by_unique_name, known_id, number_of, with_numbers

_Image = TypeVar("_Image")


@dataclass(frozen=True, slots=True)
class NamedImages(Generic[_Image]):
    """Images by everything that can only mean one of them."""

    by_name: Mapping[SourceId, _Image]

    @classmethod
    def of(
        cls,
        by_id: Mapping[SourceId, _Image],
        files: Iterable[tuple[str, _Image]],
        wanted: set[SourceId | None],
    ) -> "NamedImages[_Image]":
        """Every id that can only mean one image: its own, its file's name, that without its ending.

        The numbers that files are named by are taken where all that are ``wanted`` are such, and
        not all are ids: so ultralytics writes results. Names of files are not looked at where all
        are ids.
        """
        ids = with_numbers(by_id)
        if wanted <= ids.keys():
            return cls(ids)
        names = [
            (name, image)
            for file_name, image in files
            if file_name
            for file in [PurePosixPath(file_name.replace("\\", "/"))]
            for name in {str(file), file.name, file.stem}
        ]
        by_name = {**by_unique_name(names, str.lower), **ids}
        numbers = [(number, i) for name, i in names if (number := number_of(name)) is not None]
        by_number: dict[SourceId, _Image] = dict(numbers)
        only_one = len(by_number) == len(numbers)
        if only_one and not wanted <= by_name.keys() and wanted <= by_number.keys():
            return cls(by_number)
        return cls(by_name)

    def find(self, written: SourceId | None) -> _Image | None:
        """An image by its id, its file's name with any ending, or a path that ends in it."""
        if written is None or (known := known_id(written, self.by_name)) is None:
            return None
        if known in self.by_name or not isinstance(written, str):
            return self.by_name.get(known)
        path = PurePosixPath(written.replace("\\", "/"))
        ends = ("/".join(path.parts[start:]) for start in range(len(path.parts)))
        # The number in a converted file's name is no id, unlike one that is the whole name.
        found = (*(known_id(end, self.by_name) for end in ends), path.stem)
        spelled = (n for e in found for n in ((e, e.lower()) if isinstance(e, str) else (e,)))
        there = (n for n in spelled if n is not None and n in self.by_name)
        return next((self.by_name[n] for n in there), None)
