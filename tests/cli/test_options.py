"""Options are a contract: what exists stays, with its default; and help needs no torch."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mfdetr_cli.signature import built
from mfdetr_pipelines.config.ablate import AblateConfig
from mfdetr_pipelines.config.cache import SuggestConfig
from mfdetr_pipelines.config.copy_paste import CopyPasteConfig
from mfdetr_pipelines.config.extract import ExtractConfig
from mfdetr_pipelines.config.fit import FitConfig
from mfdetr_pipelines.config.plan import PlanConfig
from mfdetr_pipelines.config.predict import PredictConfig

from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.extraction.options import ViewOptions
from tests.support.command import COMMANDS

KNOWN = Path(__file__).with_name("options.txt")
HEAVY = ("torch", "numpy", "scipy", "numba", "transformers", "rich", "PIL")


def options_of(names: tuple[str, ...], command: Any) -> Iterator[str]:
    for option in command.params:
        is_option = option.param_type_name == "option"
        words = [*names, *(option.opts if is_option else [option.name.upper()])]
        words += ["repeatable"] if getattr(option, "multiple", False) or option.nargs != 1 else []
        words += ["required"] if option.required else []
        default = option.default
        shown = default is not None and default is not False and "UNSET" not in repr(default)
        yield " ".join([*words, f"= {default}"] if shown else words)


def test_every_option_is_known_with_its_default() -> None:
    found = {line for names, command in COMMANDS.items() for line in options_of(names, command)}
    known = set(KNOWN.read_text().splitlines())
    assert known - found == set(), "an option that people use has gone or changed"
    assert found - known == set(), "a new option: add it to options.txt"


_RUN = """
import json, sys
from mfdetr_cli.app import main
codes = []
for line in json.loads(sys.argv[1]):
    sys.argv = ["mfdetr", *line]
    try:
        main()
    except SystemExit as stop:
        codes.append(stop.code)
packages = {name.partition(".")[0] for name in sys.modules}
print(f"\\n{json.dumps([codes, sorted(packages)])}")
"""


def run_in_a_new_process(lines: list[list[str]]) -> tuple[list[int], set[str]]:
    """Exit codes of command lines, one after the other, and the packages that they imported."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN, json.dumps(lines)], capture_output=True, text=True, check=True
    )
    codes, packages = json.loads(done.stdout.splitlines()[-1])
    return codes, set(packages)


def test_help_needs_no_torch() -> None:
    lines = [[*names, "--help"] for names in COMMANDS]
    codes, packages = run_in_a_new_process(lines)
    assert codes == [0] * len(lines)
    assert packages.isdisjoint(HEAVY)


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        (DetectorOptions, "num_queries", 0),
        (DetectorOptions, "num_queries", 2**40),
        (ExtractConfig, "limit", 0),
        (PredictConfig, "top_k", -1),
        (PredictConfig, "threshold", -0.1),
        (PredictConfig, "threshold", float("nan")),
        (PlanConfig, "epochs", float("inf")),
        (PlanConfig, "epochs", 0.0),
        (AblateConfig, "label_fraction", [0.5, 0.0]),
        (ViewOptions, "views", -1),
        (CopyPasteConfig, "seed", -1),
    ],
)
def test_numbers_out_of_bounds_are_refused(kind: type[Any], option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^--{option.replace('_', '-')} .*: must be "):
        built(kind, {option: value})


def test_zero_is_a_number_where_it_means_something() -> None:
    assert built(ViewOptions, {"view_seed": 0, "views": 0}) == ViewOptions()
    # Nothing is wrong with the number: the rest is missing.
    for kind, option in (
        (PredictConfig, "threshold"),
        (SuggestConfig, "threshold"),
        (FitConfig, "views"),
    ):
        with pytest.raises(TypeError, match="required"):
            built(kind, {option: 0})


def test_wrong_arguments_need_no_torch() -> None:
    lines = [
        "--help",
        "--version",
        "extract --weight x",
        "extract --weights",
        "extract --limit many",
        "extract --weights a --images absent --annotations b --cache c",
        "train-head --cache . --out a --set lrr=1",
        "cache info absent.zarr",
    ]
    codes, packages = run_in_a_new_process([line.split() for line in lines])
    assert codes == [0, 0, 2, 2, 2, 2, 2, 2]
    assert packages.isdisjoint(HEAVY)


def test_what_needs_no_network_needs_no_torch(drawn_cache: Path, tmp_path: Path) -> None:
    """A mistake in a dataset, and what a cache is, are told without the seconds torch takes."""
    (tmp_path / "bad.json").write_text("{}")
    lines = [
        f"extract --weights a --images {tmp_path} --annotations {tmp_path}/bad.json --cache c",
        "predict absent.jpg --weights a --head . --out b",
        "ablate --table 99 --dry-run",
        "ablate --table 3 --set lrr=1 --dry-run",
        f"cache info {drawn_cache}",
    ]
    codes, packages = run_in_a_new_process([line.split() for line in lines])
    assert codes == [2, 2, 2, 2, 0]
    assert packages.isdisjoint({"torch", "torchvision", "transformers"})
