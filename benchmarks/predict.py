"""Images per second of predict: each step of today's beside none of them, in the same run.

A detector and a head on photos, by turns: one picture after the other with a mask for every
detection, as before; the same with masks for what is above the threshold only; and overlapped.

python benchmarks/predict.py --weights DETECTOR --head RUN --images FOLDER
    [--count 40] [--rounds 3] [--threshold 0.25] [--device cpu]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from mfdetr_pipelines.config.predict import PredictConfig
from mfdetr_pipelines.predict import run_predict

from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.evaluation.inference import predict_live
from mfdetr_cache.evaluation.segmentation import Segmentation
from mfdetr_cache.model import MaskFrozenDETR
from mfdetr_cache.ops.devices import keep_freed_memory
from mfdetr_cache.reporter import SilentReporter


def one_after_the_other(
    model: MaskFrozenDETR, files: list[Path], out: Path, threshold: float, *, drop: bool
) -> int:
    """What predict did before, with or without leaving queries out; the objects shown."""
    count = 0
    spec = model.detector.spec
    for file in files:
        image = load_image(file)
        output = model.detector.forward(model.detector.preprocess(image)[None].to(model.device))
        size_hw = (image.height, image.width)
        geometry = model.detector.input_geometry(size_hw)
        found = predict_live(
            model.head, output, geometry, spec, threshold=threshold if drop else 0.0
        )
        labels = range(spec.num_labels)
        shown = Segmentation.of(found, labels, {}, size_hw, threshold)
        shown.draw(image).save(out / f"{file.stem}.png")
        count += len(shown)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threshold", type=float, default=0.25)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    keep_freed_memory()
    files = sorted(options.images.glob("*.jpg"))[: options.count]
    model = MaskFrozenDETR.from_pretrained(options.weights, options.head, device=options.device)
    # Loading is not what is timed.
    MaskFrozenDETR.from_pretrained = lambda *_, **__: model  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        config = PredictConfig(
            tuple(str(f) for f in files),
            options.weights,
            options.head,
            out / "masks",
            threshold=options.threshold,
            device=options.device,
        )

        def whole() -> int:
            summary = run_predict(config, SilentReporter())
            return sum(i.num_objects for i in summary.images)

        ways: dict[str, Callable[[], int]] = {
            "every detection": lambda: one_after_the_other(
                model, files, out, options.threshold, drop=False
            ),
            "above the threshold": lambda: one_after_the_other(
                model, files, out, options.threshold, drop=True
            ),
            "overlapped": whole,
        }
        one_after_the_other(model, files[:2], out, options.threshold, drop=False)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        objects = {}
        for _ in range(options.rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                objects[name] = way()
                seconds[name].append(time.perf_counter() - started)
    first = seconds["every detection"]
    report = {}
    for name, each in seconds.items():
        ratios = [a / b for a, b in zip(first, each, strict=True)]
        report[name] = {
            "images_per_second": len(files) / statistics.median(each),
            "faster": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "objects": objects[name],
        }
    print(json.dumps(report, indent=1))
    print(f"{len(files)} photos, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
