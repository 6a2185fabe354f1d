from dataclasses import asdict

from mfdetr_pipelines.cache.repair import run_repair
from mfdetr_pipelines.config.cache import RepairConfig

from mfdetr_cache.errors import CheckFailedError
from mfdetr_cli.console import counted, print_facts, print_lines
from mfdetr_cli.output import CommandOutput


def repair(config: RepairConfig, out: CommandOutput) -> None:
    """Mend what is broken, and say what it was."""
    summary = run_repair(config, out.reporter)
    out.write_json({"cache": str(config.cache), **asdict(summary)})
    print_lines(*summary.faults[:20])
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
