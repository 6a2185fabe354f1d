from dataclasses import asdict

from mfdetr_pipelines.cache.bench import run_bench
from mfdetr_pipelines.config.cache import BenchConfig

from mfdetr_cli.console import human_bytes, print_facts, print_table
from mfdetr_cli.output import CommandOutput


def bench(config: BenchConfig, out: CommandOutput) -> None:
    """Show every way of reading, and the ratios."""
    found = run_bench(config, out.reporter)
    out.write_json({"cache": str(config.cache), **asdict(found)})
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
