from dataclasses import asdict

from mfdetr_pipelines.cache.relabel import run_relabel
from mfdetr_pipelines.config.cache import RelabelConfig

from mfdetr_cli.console import counted, human_bytes, print_facts
from mfdetr_cli.output import CommandOutput


def relabel(config: RelabelConfig, out: CommandOutput) -> None:
    """Say which version was written, and of what."""
    found = run_relabel(config, out.reporter)
    out.write_json({"cache": str(config.cache), **asdict(found)})
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
