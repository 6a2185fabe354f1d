"""``mfdetr cache``."""

from dataclasses import asdict
from pathlib import Path

from mfdetr_pipelines.cache.bench import run_bench
from mfdetr_pipelines.cache.certify import run_certify
from mfdetr_pipelines.cache.finish import run_finish
from mfdetr_pipelines.cache.info import describe_cache
from mfdetr_pipelines.cache.relabel import run_relabel
from mfdetr_pipelines.cache.repair import run_repair
from mfdetr_pipelines.cache.show import run_view
from mfdetr_pipelines.cache.suggest import run_suggest
from mfdetr_pipelines.cache.verify import LiveSource, run_verify
from mfdetr_pipelines.config.cache import (
    BenchConfig,
    CertifyConfig,
    FinishConfig,
    InfoConfig,
    RelabelConfig,
    RepairConfig,
    SuggestConfig,
    VerifyConfig,
    ViewConfig,
)

from mfdetr_cache.errors import CheckFailedError
from mfdetr_cli.console import (
    counted,
    human_bytes,
    metric_rows,
    percent,
    print_facts,
    print_lines,
    print_table,
    write_json,
)
from mfdetr_cli.progress import ConsoleReporter


def info(config: InfoConfig, json: Path | None) -> None:
    """Describe a cache, and list what is stored."""
    about = describe_cache(config.cache)
    write_json(json, about.to_dict())
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


def verify(config: VerifyConfig, json: Path | None) -> None:
    """Check a cache, and name its faults."""
    live, source = config.detector, None
    if live.weights is not None and live.images is not None:
        source = LiveSource(live.weights, live.images, config.device)
    summary = run_verify(
        config.cache, ConsoleReporter(), full=config.full, live=config.live, source=source
    )
    write_json(json, {"cache": str(config.cache), **asdict(summary)})
    for fault in summary.faults[:20]:
        print_lines(fault)
    if summary.faults:
        raise CheckFailedError(
            f"{config.cache}: {counted(len(summary.faults), 'fault')}, "
            f"{len(summary.broken_parts)} of {counted(summary.parts, 'part')} broken; mend them "
            f"with: mfdetr cache repair {config.cache}"
        )
    how = "every byte read" if config.full else "sizes and indexes; --full reads every byte"
    facts = {
        "whole": f"{counted(summary.parts, 'part')}, {human_bytes(summary.bytes_checked)} ({how})"
    }
    for key in summary.unknown_files[:20]:
        print_lines(f"{key} is no file of this cache; nothing reads it")
    if summary.live_images:
        facts["live"] = (
            f"{summary.live_images} images as the detector gives them now, largest mean "
            f"difference {summary.live_difference:.1e} of a map's spread"
        )
    print_facts(f"Cache {config.cache}", facts)


def view(config: ViewConfig, json: Path | None) -> None:
    """Draw the page."""
    summary = run_view(
        config.cache, config.out, ConsoleReporter(), images=config.images, count=config.count
    )
    document = {"cache": str(config.cache), "page": str(summary.page), "images": summary.images}
    write_json(json, document)
    print_facts(f"Cache {config.cache}", {"page": str(summary.page), "images": str(summary.images)})


def finish(config: FinishConfig, json: Path | None) -> None:
    """Name the missing parts, or show the box AP."""
    found = run_finish(config.cache, ConsoleReporter())
    write_json(json, {"cache": str(config.cache), **asdict(found)})
    if found.missing:
        for line in found.missing[:20]:
            print_lines(line)
        raise CheckFailedError(
            f"{config.cache}: {found.parts_missing} of {found.parts} parts are missing; run the "
            "processes that fill them again"
        )
    assert found.box is not None
    box = found.box.to_dict()
    print_table("What is cached, in percent", ["", *box], metric_rows({"box": box}))


def repair(config: RepairConfig, json: Path | None) -> None:
    """Mend what is broken, and say what it was."""
    summary = run_repair(
        config.cache,
        config.weights,
        config.images,
        config.annotations,
        ConsoleReporter(),
        device=config.device,
    )
    write_json(json, {"cache": str(config.cache), **asdict(summary)})
    for fault in summary.faults[:20]:
        print_lines(fault)
    if not summary.whole:
        raise CheckFailedError(
            f"{config.cache} still has faults; see: mfdetr cache verify --full {config.cache}"
        )
    mended = "nothing was broken"
    if summary.faults:
        mended = (
            f"{counted(len(summary.parts), 'part')} extracted again "
            f"({counted(summary.num_images, 'image')}), "
            f"{counted(summary.foundation_files, 'file')} of the foundation rewritten"
        )
    print_facts(f"Cache {config.cache}", {"whole": mended})


def relabel(config: RelabelConfig, json: Path | None) -> None:
    """Say which version was written, and of what."""
    found = run_relabel(config, ConsoleReporter())
    write_json(json, {"cache": str(config.cache), **asdict(found)})
    state = "written" if found.is_new else "there already"
    facts = {
        "annotations": f"version {found.version} ({found.annotations_id}), {state}",
        "images": f"{found.images} of the cache, {found.objects} objects",
        "took": f"{found.seconds:.1f} s, {human_bytes(found.num_bytes)}",
    }
    if found.unused:
        facts["not in the cache"] = counted(found.unused, "image")
    if found.images_extracted:
        facts["extracted again"] = f"crops of C1 of {counted(found.images_extracted, 'image')}"
    print_facts(f"Cache {config.cache}", facts)


def suggest(config: SuggestConfig, json: Path | None) -> None:
    """List the images, the most worthwhile first."""
    found = run_suggest(config, ConsoleReporter())
    write_json(json, {"cache": str(config.cache), "head": str(config.head), **asdict(found)})
    rows = [
        [
            image.file_name,
            f"{image.uncertainty:.3f}",
            ", ".join(f"{count} {name}" for name, count in image.objects.items()),
        ]
        for image in found.images
    ]
    print_table("Masks to draw next", ["image", "uncertainty", "objects found"], rows, "left")
    facts = {"looked at": counted(found.looked_at, "image")}
    if found.without_objects:
        facts["nothing found in"] = counted(found.without_objects, "image")
    if found.drawn:
        facts["drawn already"] = counted(found.drawn, "image")
    print_facts(f"Cache {config.cache}", facts)


def certify(config: CertifyConfig, json: Path | None) -> None:
    """Show both APs and the interval of their difference."""
    found = run_certify(config, ConsoleReporter())
    write_json(json, {"cache": str(config.cache), **asdict(found)})
    print_facts(
        f"Cache {config.cache}",
        {
            f"AP on {found.reference}": percent(found.AP_reference, 2),
            f"AP on {found.preset}": percent(found.AP, 2),
            "difference": f"{100 * found.difference:+.2f}, 95 % interval "
            f"[{100 * found.low:+.2f}, {100 * found.high:+.2f}] over {found.images} images",
        },
    )


def bench(config: BenchConfig, json: Path | None) -> None:
    """Show every way of reading, and the ratios."""
    found = run_bench(config.cache, ConsoleReporter(), images=config.images)
    write_json(json, {"cache": str(config.cache), **asdict(found)})
    rows = [
        [
            s.what,
            str(s.threads),
            "cold" if s.cold else "warm",
            f"{s.images_per_second:.1f}",
            f"{s.megabytes_per_second:.0f}",
        ]
        for s in sorted(found.speeds, key=lambda s: (s.cold, s.threads, s.what))
    ]
    columns = ["read by", "threads", "from", "images/s", "MB/s"]
    print_table(f"{found.images} images, {human_bytes(found.bytes_per_image)} each", columns, rows)
    print_facts(
        "Against the floor",
        {
            "decoded": f"{found.ratio_decode:.2f} of a plain read and decode, warm",
            "cold": f"{found.ratio_cold:.2f} of a plain read",
            "recommended": f"--set num_threads={found.num_threads}",
        },
    )
