from dataclasses import asdict

from mfdetr_pipelines.cache.suggest import run_suggest
from mfdetr_pipelines.config.cache import SuggestConfig

from mfdetr_cli.console import counted, print_facts, print_table
from mfdetr_cli.output import CommandOutput


def suggest(config: SuggestConfig, out: CommandOutput) -> None:
    """List the images, the most worthwhile first."""
    found = run_suggest(config, out.reporter)
    out.write_json({"cache": str(config.cache), "head": str(config.head), **asdict(found)})
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
