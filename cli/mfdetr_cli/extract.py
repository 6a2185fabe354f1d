from collections.abc import Sequence
from dataclasses import asdict, replace

from mfdetr_pipelines.config.extract import ExtractConfig
from mfdetr_pipelines.extract import run_extract

from mfdetr_cache.cache.partition import partition_of_environment
from mfdetr_cache.coco.categories import MatchedCategory
from mfdetr_cli.console import (
    human_bytes,
    human_time,
    print_facts,
    print_lines,
    print_metrics,
    print_next,
    print_table,
)
from mfdetr_cli.output import CommandOutput

_SHOWN = 12


def extract(config: ExtractConfig, out: CommandOutput) -> None:
    """Extract, and show what the cache is and how good its boxes are."""
    if config.work.part is None:
        config = replace(config, work=replace(config.work, part=partition_of_environment()))
    summary = run_extract(config, out.reporter)
    out.write_json({**asdict(summary), "cache": str(config.cache)})
    facts = {
        "cache id": summary.cache_id,
        "images": f"{summary.num_images} ({summary.num_extracted} extracted now)",
        "size": f"{human_bytes(summary.stored_bytes)} "
        f"({summary.raw_bytes / max(summary.stored_bytes, 1):.2f} x smaller than float16)",
        "time": f"{human_time(summary.seconds)}; in the detector "
        f"{human_time(summary.detector_seconds)}",
    }
    facts |= {f"{noun} left out": str(n) for noun, n in summary.left_out.items() if n}
    if summary.skipped:
        names = ", ".join(str(s["image_id"]) for s in summary.skipped[:10])
        facts["skipped"] = f"{len(summary.skipped)} images: {names}"
    print_facts(f"Cache {config.cache}", facts)
    print_categories(summary.categories)
    if summary.box is not None:
        print_metrics("What is cached, in percent", {"box": summary.box.to_dict()})
    if summary.parts_missing:
        print_lines(
            f"parts of the cache that are not there yet: {summary.parts_missing}; when the other "
            f"processes are done: mfdetr cache finish {config.cache}"
        )
    else:
        print_next(("train-head", "--cache", config.cache, "--out", "runs/fast"))


def print_categories(categories: Sequence[MatchedCategory]) -> None:
    """The matching of categories and labels; of many, the ones that need attention first."""
    order = {"": 0, "order": 1, "id": 1, "map": 2, "name": 3, "any": 3}
    found = sorted((c for c in categories if c.objects), key=lambda c: (order[c.rule], -c.objects))
    rows = [[c.name, str(c.objects), c.label or "-", c.rule or "-"] for c in found[:_SHOWN]]
    more = f", {_SHOWN} of {len(found)}" if len(found) > _SHOWN else ""
    if rows:
        print_table(f"Annotated categories{more}", ["", "objects", "label", "matched by"], rows)
