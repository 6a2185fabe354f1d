"""Cache verify: whether a cache is whole, with the way to mend it."""

from dataclasses import dataclass
from pathlib import Path

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.schema import Part
from mfdetr_cache.cache.verify import check_parts
from mfdetr_cache.protocols import Reporter


@dataclass(frozen=True, slots=True)
class VerifySummary:
    """What was found.

    Attributes:
        parts: How many parts were checked.
        bytes_checked: Bytes of their files.
        full: Whether every byte was read.
        faults: One line per fault.
        broken_parts: Parts with a fault.
    """

    parts: int
    bytes_checked: int
    full: bool
    faults: tuple[str, ...]
    broken_parts: tuple[Part, ...]


def run_verify(path: Path, reporter: Reporter, *, full: bool) -> VerifySummary:
    """Check a cache.

    Args:
        path: The cache.
        reporter: Who is told about progress.
        full: Read every byte.

    Returns:
        What was found; nothing is changed.

    Raises:
        CacheError: If there is no cache at the path.
    """
    cache = FeatureCache.open(path)
    reporter.start("verify", len(cache.layout.parts), "parts")
    faults: list[str] = []
    broken: list[Part] = []
    total = 0
    for check in check_parts(cache, full=full):
        total += check.num_bytes
        faults += check.faults
        if check.faults:
            broken.append(check.part)
        reporter.advance(num_bytes=check.num_bytes)
    reporter.finish()
    return VerifySummary(len(cache.layout.parts), total, full, tuple(faults), tuple(broken))
