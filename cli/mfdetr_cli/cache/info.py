from dataclasses import asdict

from mfdetr_pipelines.cache.info import describe_cache
from mfdetr_pipelines.config.cache import InfoConfig
from mfdetr_pipelines.numbers import percent

from mfdetr_cli.console import human_bytes, print_facts, print_table
from mfdetr_cli.output import CommandOutput


def info(config: InfoConfig, out: CommandOutput) -> None:
    """Describe a cache, and list what is stored."""
    about = describe_cache(config.cache)
    out.write_json(asdict(about))
    whole = (
        "complete" if about.complete else f"{about.parts_missing} of {about.parts} parts missing"
    )
    others = about.annotations_versions
    facts = {
        "cache id": about.cache_id,
        "format": f"version {about.format_version}, maps as {about.preset}, {about.compression}",
        "detector": f"{about.detector}, weights {about.weights_sha256[:16]}",
        "dataset": f"{about.dataset}, annotations {about.annotations_id}",
        "annotations": f"version {about.annotations_version}"
        + ("" if len(others) < 2 else f"; @N chooses among {', '.join(map(str, others))}"),
        "images": f"{about.images} of {about.rows} ({len(about.skipped)} skipped), "
        f"{about.objects} objects",
        "views": ", ".join(about.views),
        "state": whole,
        "size": f"{human_bytes(about.stored_bytes)}, {human_bytes(about.bytes_per_image)} each, "
        f"{about.ratio:.2f} x smaller than float16",
    }
    for found in about.certificates:
        facts[f"certified {found.head[:8]}"] = (
            f"mask AP {percent(found.AP, 2)}, {percent(found.AP_reference, 2)} on "
            f"{found.reference} features: {100 * found.difference:+.2f} "
            f"[{100 * found.low:+.2f}, {100 * found.high:+.2f}]"
        )
    for skip in about.skipped[:10]:
        facts[f"skipped {skip['image_id']}"] = str(skip["reason"])
    print_facts(f"Cache {config.cache}", facts)
    rows = [
        [
            a.name.removesuffix("/values"),
            a.shape,
            a.dtype,
            human_bytes(a.stored_bytes),
            f"{a.share:.1%}",
            a.source,
        ]
        for a in about.arrays
    ]
    columns = ["array", "per image", "type", "stored", "share", "source"]
    print_table("What is stored", columns, rows)
