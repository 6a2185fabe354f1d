from dataclasses import asdict

from mfdetr_pipelines.cache.finish import run_finish
from mfdetr_pipelines.config.cache import FinishConfig

from mfdetr_cache.errors import CheckFailedError
from mfdetr_cli.console import print_lines, print_metrics
from mfdetr_cli.output import CommandOutput


def finish(config: FinishConfig, out: CommandOutput) -> None:
    """Name the missing parts, or show the box AP."""
    found = run_finish(config.cache, out.reporter)
    out.write_json({"cache": str(config.cache), **asdict(found)})
    if found.missing:
        print_lines(*found.missing[:20])
        raise CheckFailedError(
            f"{config.cache}: {found.parts_missing} of {found.parts} parts are missing; run the "
            "processes that fill them again"
        )
    assert found.box is not None
    print_metrics("What is cached, in percent", {"box": found.box.to_dict()})
