"""A frozen detector and a trained mask network as one model, for use from Python."""

import itertools
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mfdetr_cache.choices import Scoring
from mfdetr_cache.coco.categories import category_names
from mfdetr_cache.coco.options import CLASS_AGNOSTIC
from mfdetr_cache.detectors.images import as_rgb, load_image
from mfdetr_cache.detectors.protocol import Detector
from mfdetr_cache.detectors.registry import load_same_detector
from mfdetr_cache.errors import HeadError, ImageError
from mfdetr_cache.evaluation.inference import MaskPrediction, predict_live
from mfdetr_cache.evaluation.segmentation import Segmentation, TimedSegmentation
from mfdetr_cache.files import make_folder, whole_file
from mfdetr_cache.head.folder import CONFIG_FILE, HEAD_FILE, HeadFolder, load_head
from mfdetr_cache.ops.devices import to_device, torch_device
from mfdetr_cache.read_ahead import read_ahead
from mfdetr_cache.types import ImageGeometry

ItemT = TypeVar("ItemT")
# A prediction, with the seconds in the detector and in the head.
_Timed = tuple[MaskPrediction, float, float]
_THREADS = 2
# Pictures that are read before the networks need them; batches whose masks are being finished.
_AHEAD, _BEHIND = 3, 3
# Pictures that a detector takes at once, by kind of device; on a CPU each takes as long as alone.
_TOGETHER = {"cpu": 1, "cuda": 8}


# What one image can be: opened, as an RGB array of shape (H, W, 3), or a file.
Picture = Image.Image | NDArray[np.uint8] | str | Path
Pictures = list[Picture] | list[Path] | list[str] | list[Image.Image] | tuple[Picture, ...]


@dataclass(frozen=True, slots=True)
class _Prepared(Generic[ItemT]):
    """A picture on its way to the detector; an error in place of one that cannot be read."""

    item: ItemT
    picture: Image.Image | ImageError
    geometry: ImageGeometry | None = None
    pixels: Tensor | None = None

    @property
    def input_hw(self) -> tuple[int, int] | None:
        return None if self.geometry is None else self.geometry.input_hw


class MaskFrozenDETR:
    """A frozen DETR with a mask network: images in, instance masks out.

    Args:
        detector: The detector, on the device.
        head: The trained mask network with its category ids and detector identity.
        device: Device of both.
        prompt: Names of the detector's labels where they are not those of the head; their category
            ids are 1, 2 and so on.

    Attributes:
        unfinished: At which step its training was when the head was written; empty if at its end.

    Examples:
        >>> from mfdetr_cache.coco.synthetic import draw_scene
        >>> from mfdetr_cache.demo import demo_detector, demo_head
        >>> model = MaskFrozenDETR.from_pretrained(demo_detector(), demo_head())
        >>> image, _ = draw_scene(seed=7)
        >>> found = model(image)
        >>> found.masks.shape == (len(found), image.height, image.width)
        True
        >>> sorted(found.to_torchvision())
        ['boxes', 'labels', 'masks', 'scores']
    """

    def __init__(
        self,
        detector: Detector,
        head: HeadFolder,
        device: torch.device,
        prompt: Sequence[str] = (),
    ) -> None:
        self.device = device
        self.detector = detector.to(device)
        self.head = head.head.to(device).eval()
        self.unfinished = head.unfinished
        self._folder = head
        self._label_categories = list(head.run.label_categories)
        self._names = category_names(head.run.categories)
        if prompt:
            self._names = dict(enumerate(prompt, 1))
            self._label_categories = list(self._names)

    @classmethod
    def from_pretrained(
        cls,
        detector: str | Path,
        head: str | Path,
        *,
        kind: str = "auto",
        device: str = "auto",
        prompt: Sequence[str] = (),
    ) -> "MaskFrozenDETR":
        """Load a detector's weights and a head.

        DetectorError if the detector cannot be loaded, HeadError if the head is missing or damaged,
        or has classes and a prompt is given, IdentityError if it was trained with another detector.

        Args:
            detector: Hub id, folder, or a checkpoint of the authors' code.
            head: Folder written by ``train-head --out`` or :meth:`save_pretrained`, or a hub id.
            kind: Detector name in ``mfdetr detectors``; ``auto`` infers it from the weights.
            device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
            prompt: Other classes for an open-vocabulary detector than the head learned from, which
                must be class-agnostic then.
        """
        folder = load_head(_local_folder(head))
        if prompt and not folder.detector["settings"].get(CLASS_AGNOSTIC):
            raise HeadError(
                f"--prompt: head {head} learned masks of its classes; one that was trained with "
                "--class-agnostic takes any word"
            )
        loaded = load_same_detector(kind, str(detector), folder.detector, f"head {head}", prompt)
        return cls(loaded, folder, torch_device(device), prompt)

    @overload
    def __call__(
        self,
        image: Picture,
        threshold: float = 0.25,
        top_k: int = 100,
        scoring: Scoring = "auto",
    ) -> Segmentation: ...

    @overload
    def __call__(
        self,
        image: Pictures,
        threshold: float = 0.25,
        top_k: int = 100,
        scoring: Scoring = "auto",
    ) -> list[Segmentation]: ...

    def __call__(
        self,
        image: Picture | Pictures,
        threshold: float = 0.25,
        top_k: int = 100,
        scoring: Scoring = "auto",
    ) -> Segmentation | list[Segmentation]:
        """Segment an image, or a list of them, with the best label of each query.

        An image is opened, an RGB array of shape (H, W, 3), or a file. Objects have at least a
        score of ``threshold``, at most ``top_k`` of each image; ``scoring`` turns the class score
        into theirs. ImageError if a file cannot be read.
        """
        images = image if isinstance(image, (list, tuple)) else [image]
        results = []
        for _, result in self.stream(images, _as_picture, threshold, top_k, scoring):
            if isinstance(result, ImageError):
                raise result
            results.append(result.result)
        return results if images is image else results[0]

    def stream(
        self,
        items: Iterable[ItemT],
        load: Callable[[ItemT], Image.Image],
        threshold: float = 0.25,
        top_k: int = 100,
        scoring: Scoring = "auto",
    ) -> Iterator[tuple[ItemT, TimedSegmentation | ImageError]]:
        """Segment any number of pictures, in order; a few are in memory at a time.

        Threads load and preprocess the next pictures and finish the masks of the last ones while
        the networks run. On a GPU the detector takes neighbours of one input size together.
        ``load``, called in threads, gives the picture of an item, RGB. Yields each item with its
        segmentation, or with the ImageError that ``load`` raised; the rest is as in a call of the
        model.
        """
        most = _TOGETHER.get(self.device.type, _TOGETHER["cuda"])
        with ThreadPoolExecutor(_THREADS, "pictures") as pool:

            def prepare(item: ItemT) -> Callable[[], _Prepared[ItemT]]:
                return pool.submit(self._prepare, item, load).result

            def segment(
                batch: list[_Prepared[ItemT]],
            ) -> Callable[[], Sequence[tuple[ItemT, TimedSegmentation | ImageError]]]:
                unread = [(p.item, p.picture) for p in batch if isinstance(p.picture, ImageError)]
                if unread:
                    return lambda: unread
                predictions = self._predict(batch, scoring, threshold)
                return pool.submit(self._finish, batch, predictions, threshold, top_k).result

            batches = _of_one_size(read_ahead(prepare, items, most + _AHEAD), most)
            for results in read_ahead(segment, batches, _BEHIND):
                yield from results

    def _prepare(self, item: ItemT, load: Callable[[ItemT], Image.Image]) -> _Prepared[ItemT]:
        try:
            picture = load(item)
        except ImageError as error:
            return _Prepared(item, error)
        geometry = self.detector.input_geometry((picture.height, picture.width))
        return _Prepared(item, picture, geometry, self.detector.preprocess(picture))

    def _predict(
        self, batch: list[_Prepared[ItemT]], scoring: Scoring, threshold: float
    ) -> list[_Timed]:
        """Run both networks, the head on one image after the other."""
        started = time.perf_counter()
        pixels = torch.stack([p.pixels for p in batch if p.pixels is not None])
        output = self.detector.forward(to_device(pixels, self.device))
        # This waits for the detector; what is detected is chosen on the CPU.
        output = replace(
            output,
            class_logits=output.class_logits.cpu(),
            boxes_cxcywh_norm=output.boxes_cxcywh_norm.cpu(),
        )
        each = (time.perf_counter() - started) / len(batch)
        predictions = []
        for index, prepared in enumerate(batch):
            assert prepared.geometry is not None
            between = time.perf_counter()
            prediction = predict_live(
                self.head,
                output.of_image(index),
                prepared.geometry,
                self.detector.spec,
                scoring,
                threshold,
            )
            predictions.append((prediction, each, time.perf_counter() - between))
        return predictions

    def _finish(
        self,
        batch: list[_Prepared[ItemT]],
        predictions: list[_Timed],
        threshold: float,
        top_k: int,
    ) -> list[tuple[ItemT, TimedSegmentation]]:
        """Masks at the size of their pictures."""
        finished = []
        for prepared, (prediction, *seconds) in zip(batch, predictions, strict=True):
            picture = prepared.picture
            assert isinstance(picture, Image.Image)
            size_hw = (picture.height, picture.width)
            result = Segmentation.of(
                prediction, self._label_categories, self._names, size_hw, threshold, top_k
            )
            finished.append((prepared.item, TimedSegmentation(picture, result, *seconds)))
        return finished

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the head for :meth:`from_pretrained`; the detector is not copied."""
        target = Path(folder)
        make_folder(target)
        for name in (CONFIG_FILE, HEAD_FILE):
            source = self._folder.path / name
            if source.resolve() != (target / name).resolve():
                with whole_file(target / name) as partial:
                    shutil.copyfile(source, partial)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload the head to a repository such as ``me/mask-head``; returns the commit's URL.

        The Hugging Face token comes from the environment; ``private`` applies to a new repository.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        uploaded = api.upload_folder(
            repo_id=repo_id,
            folder_path=str(self._folder.path),
            allow_patterns=[CONFIG_FILE, HEAD_FILE],
        )
        return str(uploaded)


def _local_folder(head: str | Path) -> Path:
    """The folder of a head; one on the hub is downloaded, or found where it was before."""
    folder = Path(head)
    if folder.is_dir() or isinstance(head, Path) or str(head).count("/") != 1:
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(head), allow_patterns=[CONFIG_FILE, HEAD_FILE]))
    except Exception as error:  # the hub's client raises its own, requests' and the system's
        reason = str(error).splitlines()[0]
        raise HeadError(f"{head} is no folder and not on the hub: {reason}") from error


def _as_picture(image: Picture) -> Image.Image:
    if isinstance(image, (str, Path)):
        return load_image(Path(image))
    return as_rgb(Image.fromarray(image) if isinstance(image, np.ndarray) else image)


def _of_one_size(
    pictures: Iterable[_Prepared[ItemT]], most: int
) -> Iterator[list[_Prepared[ItemT]]]:
    """Neighbours with inputs of one size, at most so many, or that cannot be read."""
    for _, alike in itertools.groupby(pictures, lambda picture: picture.input_hw):
        while batch := list(itertools.islice(alike, most)):
            yield batch
