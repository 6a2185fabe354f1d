"""``mfdetr predict``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mfdetr_cli.console import ConsoleReporter, print_table, write_json
from mfdetr_cli.options import DeviceOption, JsonOption

_SHOWN = 20


def predict(
    images: Annotated[list[str], typer.Argument(help="Image and video files, folders, patterns.")],
    weights: Annotated[str, typer.Option(help="The detector the head was trained with.")],
    head: Annotated[Path, typer.Option(help="Run folder of train-head.")],
    out: Annotated[Path, typer.Option(help="Where pictures and predictions.json go.")],
    detector: Annotated[str, typer.Option(help="See: mfdetr detectors.")] = "hf",
    threshold: Annotated[float, typer.Option(help="Least confidence of what is kept.")] = 0.25,
    top_k: Annotated[int, typer.Option(help="At most N objects per image.")] = 100,
    device: DeviceOption = "auto",
    json: JsonOption = None,
) -> None:
    """Segment images and videos: pictures with masks on them, and the masks as COCO RLE.

    Example:
    mfdetr predict photos/ --weights PekingU/rtdetr_r50vd --head runs/paper --out masks
    """
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_pipelines.predict import PredictConfig, run_predict

    config = PredictConfig(
        images=tuple(images),
        detector=detector,
        weights=weights,
        head=head,
        out=out,
        threshold=threshold,
        top_k=top_k,
        device=device,
    )
    summary = run_predict(config, ConsoleReporter())
    rows = [
        [Path(i.picture).name, str(i.num_objects), f"{i.detector_ms:.0f}", f"{i.head_ms:.0f}"]
        for i in summary.images[:_SHOWN]
    ]
    columns = ["picture", "objects", "detector, ms", "head, ms"]
    more = len(summary.images) - len(rows)
    title = f"{out}, {len(summary.images)} images" + (f", the first {_SHOWN}" if more > 0 else "")
    print_table(title, columns, rows)
    write_json(json, {**asdict(summary), "results": str(summary.results)})
