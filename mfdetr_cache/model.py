"""A frozen detector and a trained mask network as one model, for use from Python."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mfdetr_cache.choices import Scoring
from mfdetr_cache.coco.categories import category_names
from mfdetr_cache.detectors.images import as_rgb, load_image
from mfdetr_cache.detectors.live import live_image
from mfdetr_cache.detectors.protocol import Detector
from mfdetr_cache.detectors.registry import load_same_detector
from mfdetr_cache.errors import ConfigError, HeadError
from mfdetr_cache.evaluation.inference import predict_masks
from mfdetr_cache.evaluation.objects import ShownObject, shown_objects
from mfdetr_cache.evaluation.overlay import draw_overlay
from mfdetr_cache.files import make_folder, whole_file
from mfdetr_cache.head.folder import CONFIG_FILE, HEAD_FILE, HeadFolder, load_head
from mfdetr_cache.identity import detector_identity, require_same
from mfdetr_cache.ops.devices import torch_device
from mfdetr_cache.ops.masks import RunLengths, compress_run_lengths, decode_run_lengths


@dataclass(frozen=True)
class Segmentation:
    """The objects of one image, by falling score.

    Attributes:
        size_hw: Height and width of the image in pixels.
        run_lengths: Mask of each object on the image, length N.
        boxes_xyxy: In pixels of the image, float32, shape (N, 4).
        scores: Final scores s_i in [0, 1], float32, shape (N,).
        category_ids: Of the dataset the head was trained on, int64, shape (N,).
        names: Category names, length N.
    """

    size_hw: tuple[int, int]
    run_lengths: tuple[RunLengths, ...]
    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    category_ids: NDArray[np.int64]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def masks(self) -> NDArray[np.bool_]:
        """True inside, at the image's size, shape (N, H, W); made anew at every call."""
        masks = np.empty((len(self), *self.size_hw), np.bool_)
        for mask, runs in zip(masks, self.run_lengths, strict=True):
            mask[:] = decode_run_lengths(runs, self.size_hw)
        return masks

    def draw(self, image: Image.Image) -> Image.Image:
        """A copy of the image with masks, outlines, boxes and labels."""
        return draw_overlay(image, [o.to_item() for o in reversed(self._objects())])

    def to_torchvision(self) -> dict[str, torch.Tensor]:
        """Torchvision's form: boxes (N, 4), labels (N,), scores (N,), binary masks (N, 1, H, W)."""
        return {
            "boxes": torch.from_numpy(self.boxes_xyxy),
            "labels": torch.from_numpy(self.category_ids),
            "scores": torch.from_numpy(self.scores),
            "masks": torch.from_numpy(self.masks[:, None].astype(np.float32)),
        }

    def to_supervision(self) -> Any:  # noqa: ANN401  an optional package
        """``supervision.Detections`` with masks and ``data["class_name"]``.

        ConfigError if the package ``supervision`` is not installed.
        """
        try:
            import supervision
        except ImportError:
            raise ConfigError("to_supervision needs: pip install supervision") from None
        return supervision.Detections(
            xyxy=self.boxes_xyxy,
            mask=self.masks,
            confidence=self.scores,
            class_id=self.category_ids.astype(int),
            data={"class_name": np.array(self.names)},
        )

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """COCO results, one per object, masks as compressed RLE."""
        results = []
        for found in self._objects():
            rle = compress_run_lengths(found.run_lengths, self.size_hw)
            x0, y0, x1, y1 = found.box_xyxy
            results.append(
                {
                    "image_id": image_id,
                    "category_id": found.category_id,
                    "score": found.confidence,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
        return results

    def _objects(self) -> list[ShownObject]:
        found = []
        for index, (name, runs) in enumerate(zip(self.names, self.run_lengths, strict=True)):
            x0, y0, x1, y1 = (float(v) for v in self.boxes_xyxy[index])
            category_id, score = int(self.category_ids[index]), float(self.scores[index])
            found.append(ShownObject(category_id, name, score, (x0, y0, x1, y1), runs))
        return found


@dataclass(frozen=True, slots=True)
class TimedSegmentation:
    """A segmentation with the seconds in preprocessing and detector, and in the mask network."""

    result: Segmentation
    detector_seconds: float
    head_seconds: float


class MaskFrozenDETR:
    """A frozen DETR with a mask network: an image in, instance masks out.

    Args:
        detector: The detector, on the device.
        head: The trained mask network with its category ids and detector identity.
        device: Device of both.

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

    def __init__(self, detector: Detector, head: HeadFolder, device: torch.device) -> None:
        self.device = device
        self.detector = detector.to(device)
        self.head = head.head.to(device).eval()
        self._folder = head
        self._label_categories = list(head.run.label_categories)
        self._names = category_names(head.run.categories)

    @classmethod
    def from_pretrained(
        cls,
        detector: str | Path,
        head: str | Path,
        *,
        kind: str = "auto",
        device: str = "auto",
    ) -> "MaskFrozenDETR":
        """Load a detector's weights and a head.

        Args:
            detector: Hub id, folder, or a checkpoint of the authors' code.
            head: Folder written by ``train-head --out`` or :meth:`save_pretrained`, or a hub id.
            kind: Detector name in ``mfdetr detectors``; ``auto`` infers it from the weights.
            device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.

        Returns:
            The model.

        Raises:
            DetectorError: If the detector cannot be loaded.
            HeadError: If the head is missing or damaged.
            IdentityError: If the head was trained with another detector.
        """
        folder = load_head(_local_folder(head))
        loaded = load_same_detector(kind, str(detector), folder.detector)
        require_same(
            folder.detector, f"head {head}", detector_identity(loaded.spec), f"detector {detector}"
        )
        return cls(loaded, folder, torch_device(device))

    def __call__(
        self,
        image: Image.Image | NDArray[np.uint8] | str | Path,
        threshold: float = 0.25,
        top_k: int = 100,
        scoring: Scoring = "auto",
    ) -> Segmentation:
        """Segment one image, with the best label of each query.

        Args:
            image: A PIL image, an RGB array of shape (H, W, 3), or a file.
            threshold: Lowest score kept.
            top_k: Maximum number of objects.
            scoring: How the class score becomes the final one.

        Returns:
            Its objects.

        Raises:
            ImageError: If a file cannot be read.
        """
        if isinstance(image, (str, Path)):
            picture = load_image(Path(image))
        else:
            picture = as_rgb(Image.fromarray(image) if isinstance(image, np.ndarray) else image)
        return self.timed(picture, threshold, top_k, scoring).result

    def timed(
        self,
        picture: Image.Image,
        threshold: float = 0.25,
        top_k: int = 100,
        scoring: Scoring = "auto",
    ) -> TimedSegmentation:
        """:meth:`__call__` for an RGB image, with the time of each network."""
        started = time.perf_counter()
        live = live_image(self.detector, picture, "", self.device)
        between = time.perf_counter()
        prediction = predict_masks(self.head, live, self.detector.spec, self.device, scoring)
        ended = time.perf_counter()
        size_hw = live.geometry.original_hw
        found = shown_objects(
            prediction, self._label_categories, self._names, size_hw, threshold, top_k
        )
        result = Segmentation(
            size_hw=size_hw,
            run_lengths=tuple(o.run_lengths for o in found),
            boxes_xyxy=np.array([o.box_xyxy for o in found], np.float32).reshape(-1, 4),
            scores=np.array([o.confidence for o in found], np.float32),
            category_ids=np.array([o.category_id for o in found], np.int64),
            names=tuple(o.name for o in found),
        )
        return TimedSegmentation(result, between - started, ended - between)

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
