from dataclasses import asdict

from mfdetr_pipelines.cache.verify import run_verify
from mfdetr_pipelines.config.cache import VerifyConfig

from mfdetr_cache.errors import CheckFailedError
from mfdetr_cli.console import counted, human_bytes, print_facts, print_lines
from mfdetr_cli.output import CommandOutput


def verify(config: VerifyConfig, out: CommandOutput) -> None:
    """Check a cache, and name its faults."""
    summary = run_verify(config, out.reporter)
    out.write_json({"cache": str(config.cache), **asdict(summary)})
    print_lines(*summary.faults[:20])
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
