import math
from dataclasses import asdict

from mfdetr_pipelines.config.plan import PlanConfig
from mfdetr_pipelines.plan import Plan, run_plan

from mfdetr_cli.console import (
    counted,
    human_bytes,
    human_time,
    print_facts,
    print_next,
    print_table,
)
from mfdetr_cli.output import CommandOutput


def plan(config: PlanConfig, out: CommandOutput) -> None:
    """Measure, and show what each preset would cost."""
    found = run_plan(config, out.reporter)
    out.write_json(asdict(found))
    print_facts(
        f"{found.images} images, {found.views} passes each",
        {
            "detector": f"{1000 * found.detector_seconds:.0f} ms an image",
            "head": f"{1000 * found.head_seconds:.0f} ms an image, forward and backward "
            f"({config.recipe.name})",
            "disk": f"{found.disk}: {human_bytes(found.free_bytes)} free, writes "
            f"{human_bytes(found.write_bytes_per_second)}/s, reads "
            f"{human_bytes(found.read_bytes_per_second)}/s",
            "live": f"{human_time(3600 * found.live_hours)} for {found.epochs:.3g} epochs with the "
            "detector in the loop",
            "augmentation": _augmentation(found),
        },
    )
    rows = [
        [
            p.preset,
            human_bytes(p.bytes_per_image),
            human_bytes(p.total_bytes) + ("" if p.fits else " !"),
            human_time(3600 * p.extract_hours),
            human_time(3600 * p.cached_hours),
            "never" if p.pays_after is None else str(p.pays_after),
        ]
        for p in found.presets
    ]
    columns = ["preset", "an image", "cache", "extract", "one training", "pays after"]
    print_table("Presets (! does not fit the disk)", columns, rows)
    images = config.images or "IMAGES"
    print_next(
        ("extract", "--weights", config.weights, "--images", images, "--annotations",
         config.annotations, "--cache", "train.zarr"),
    )  # fmt: skip


def _augmentation(found: Plan) -> str:
    more = math.ceil(found.epochs) - found.views
    own = f"; --views {math.ceil(found.epochs) - 1} gives every epoch its own" if more > 0 else ""
    views = counted(found.views, "view")
    return f"{views} of an image from the cache, a new one in every epoch live{own}"
