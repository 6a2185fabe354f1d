"""What every view of a cache shares: where it is, its layout, and the images it is of."""

import functools

from mfdetr_cache.cache.columns import Columns
from mfdetr_cache.cache.manifest import whole_parts
from mfdetr_cache.cache.schema import CacheLayout, Part
from mfdetr_cache.cache.storage.protocol import Storage
from mfdetr_cache.types import DetectorSpec


class Foundation:
    """The part of a cache that is written when it is created.

    Args:
        storage: Where the cache is.
        spec: The detector it was made with.
        layout: Rows, parts and tokens.

    Attributes:
        storage: Where the cache is.
        path: Name of that place, for messages.
        spec: The detector it was made with.
        layout: Rows, parts and tokens.
        columns: Ids, names, transforms and ground truth.
    """

    def __init__(self, storage: Storage, spec: DetectorSpec, layout: CacheLayout) -> None:
        self.storage = storage
        self.path = storage.name
        self.spec = spec
        self.layout = layout
        self.columns = Columns(storage)

    @functools.cached_property
    def missing_parts(self) -> tuple[Part, ...]:
        """Parts that were never sealed or have lost a file."""
        whole = whole_parts(self.storage, self.layout.parts)
        return tuple(p for p in self.layout.parts if p not in whole)

    def image_id(self, row: int) -> int:
        """COCO image id of a row.

        Args:
            row: Row in the cache.

        Returns:
            The id.
        """
        return int(self.columns["images/image_id"][row])

    def file_name(self, row: int) -> str:
        """Name of a row's image, relative to the image folder.

        Args:
            row: Row in the cache.

        Returns:
            The name.
        """
        first, last = self.columns["images/file_name_offset"][row : row + 2]
        return bytes(self.columns["images/file_name_utf8"][first:last]).decode()

    def original_hw(self, row: int) -> tuple[int, int]:
        """Annotated height and width of a row's image in pixels.

        Args:
            row: Row in the cache.

        Returns:
            Height and width.
        """
        height, width = self.columns["images/original_hw"][row]
        return int(height), int(width)
