from dataclasses import asdict

from mfdetr_pipelines.cache.certify import run_certify
from mfdetr_pipelines.config.cache import CertifyConfig
from mfdetr_pipelines.numbers import percent

from mfdetr_cli.console import print_facts
from mfdetr_cli.output import CommandOutput


def certify(config: CertifyConfig, out: CommandOutput) -> None:
    """Show both APs and the interval of their difference."""
    found = run_certify(config, out.reporter)
    out.write_json({"cache": str(config.cache), **asdict(found)})
    print_facts(
        f"Cache {config.cache}",
        {
            f"AP on {found.reference}": percent(found.AP_reference, 2),
            f"AP on {found.preset}": percent(found.AP, 2),
            "difference": f"{100 * found.difference:+.2f}, 95 % interval "
            f"[{100 * found.low:+.2f}, {100 * found.high:+.2f}] over {found.images} images",
        },
    )
