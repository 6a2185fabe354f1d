"""Any history of a cache ends in the right data or in a refusal, and repair makes it whole.

Parts are written, killed, resumed; annotations replaced; files copied, swapped, damaged, lost;
caches verified and repaired. A dictionary says what must come out.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from mfdetr_pipelines.cache import repair
from mfdetr_pipelines.cache.verify import run_verify
from mfdetr_pipelines.config.cache import RepairConfig, VerifyConfig

from mfdetr_cache.cache.annotations import version_numbers, write_annotations
from mfdetr_cache.cache.creation import create_cache
from mfdetr_cache.cache.foundation import read_root
from mfdetr_cache.cache.writer import CacheWriter
from mfdetr_cache.errors import CacheError
from mfdetr_cache.extraction.stream import Extracted
from mfdetr_cache.reporter import SilentReporter
from tests.support.caches import (
    DictStorage,
    everything,
    fill_part,
    require_one_line,
    tiny_content,
)

LABELS = (0, 1, 2)


class Killed(BaseException):
    """What a kill looks like from inside."""


class KillableStorage(DictStorage):
    """Dies after so many files."""

    left: int | None = None

    def write(self, key: str, pieces: Any) -> None:
        if self.left == 0:
            raise Killed
        if self.left is not None:
            self.left -= 1
        super().write(key, pieces)


@functools.cache
def created() -> dict[str, bytes]:
    storage = DictStorage({})
    create_cache(storage, tiny_content())
    return storage.files


@functools.cache
def right_data(labels: int) -> dict[str, Any]:
    """What the whole cache gives with these labels."""
    storage = DictStorage(dict(created()))
    fill(storage)
    if labels:
        write_annotations(storage, read_root(storage), 1, tiny_content(labels=labels).labels)
    return everything(storage)


def fill(storage: DictStorage, parts: int = 99) -> None:
    content = tiny_content()
    with CacheWriter.open_or_create(storage, content) as writer:
        for part in writer.pending_parts()[:parts]:
            fill_part(writer, content, part)


class _Extraction:
    """The detector of these tests."""

    def __init__(self, _images: Any, _detector: Any, _device: Any, writer: Any, *_: Any, **__: Any):
        self._writer = writer

    def run(self, parts: Any) -> Extracted:
        for part in parts:
            fill_part(self._writer, self._writer.content, part)
        return Extracted(sum(len(self._writer.rows_of_part(part)) for part in parts))


class Histories(RuleBasedStateMachine):
    """A cache in a bucket beside what is known about it."""

    @initialize()
    def begin(self) -> None:
        self.storage = KillableStorage(dict(created()))
        # Labels of every version, and whether somebody has meddled with files.
        self.versions = [0]
        self.is_damaged = False

    @rule(parts=st.integers(1, 6), left=st.integers(0, 60))
    def extract(self, parts: int, left: int) -> None:
        """Killed somewhere, or not."""
        self.storage.left = left
        try:
            fill(self.storage, parts)
        except Killed:
            pass
        except CacheError as error:
            assert self.is_damaged
            require_one_line(error)
        finally:
            self.storage.left = None

    @rule(labels=st.sampled_from(LABELS), left=st.integers(0, 60))
    def relabel(self, labels: int, left: int) -> None:
        self.storage.left = left
        try:
            root = read_root(self.storage)
            number = max(version_numbers(self.storage)) + 1
            write_annotations(self.storage, root, number, tiny_content(labels=labels).labels)
        except Killed:
            return
        except (CacheError, ValueError):
            assert self.is_damaged
            return
        finally:
            self.storage.left = None
        self.versions.append(labels)

    @rule(data=st.data(), what=st.sampled_from(["copy", "swap", "flip", "cut", "lose"]))
    def meddle(self, data: st.DataObject, what: str) -> None:
        files = self.storage.files
        key = data.draw(st.sampled_from(sorted(files)))
        other = data.draw(st.sampled_from(sorted(files)))
        if what == "copy":
            files[key] = files[other]
        elif what == "swap":
            files[key], files[other] = files[other], files[key]
        elif what == "lose":
            del files[key]
        elif files[key]:
            at = data.draw(st.integers(0, len(files[key]) - 1))
            bit = 1 << data.draw(st.integers(0, 7))
            rest = b"" if what == "cut" else bytes([files[key][at] ^ bit]) + files[key][at + 1 :]
            files[key] = files[key][:at] + rest
        self.is_damaged = True

    @rule(labels=st.sampled_from(LABELS))
    def mend(self, labels: int) -> None:
        """With one of the annotation files; another one is refused, and nothing is changed."""
        before = dict(self.storage.files)
        content = tiny_content(labels=labels)
        with pytest.MonkeyPatch.context() as patch:
            for name in ("load_coco_split", "load_detector", "label_split"):
                patch.setattr(repair, name, lambda *_, **__: _Anything())
            for name in ("options_of", "choices_of"):
                patch.setattr(repair, name, lambda *_: ())
            patch.setattr(repair, "_labels_of_file", lambda *_: None)
            patch.setattr(repair, "plan_cache", lambda *_: content)
            patch.setattr(repair, "Extraction", _Extraction)
            try:
                config = RepairConfig(self.storage, "", Path(), Path(), device="cpu")
                summary = repair.run_repair(config, SilentReporter())
            except CacheError as error:
                require_one_line(error)
                assert self.storage.files == before
                return
        if summary.whole:
            assert everything(self.storage) in [right_data(v) for v in self.versions]

    @rule()
    def verify(self) -> None:
        """It finds nothing where nothing is wrong, and what it calls whole is right."""
        try:
            faults = run_verify(VerifyConfig(self.storage, full=True), SilentReporter()).faults
        except CacheError as error:
            faults = (str(error),)
        if not faults:
            assert everything(self.storage) in [right_data(v) for v in self.versions]
        elif not self.is_damaged:
            assert all("never sealed" in fault for fault in faults)

    @invariant()
    def data_or_refusal(self) -> None:
        try:
            found = everything(self.storage)
        except CacheError as error:
            require_one_line(error)
            is_unfinished = "parts are missing" in str(error)
            assert self.is_damaged or is_unfinished
            return
        # A version whose seal is lost is as one that was never finished.
        allowed = self.versions if self.is_damaged else self.versions[-1:]
        assert found in [right_data(v) for v in allowed]


class _Anything:
    """A split and a detector; nothing looks at these."""

    spec = sha256 = None


Histories.TestCase.settings = settings(
    max_examples=12, stateful_step_count=12, suppress_health_check=list(HealthCheck), deadline=None
)
TestHistories = Histories.TestCase
