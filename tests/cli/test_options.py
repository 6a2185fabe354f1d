"""Options are a contract: what exists stays, with its default; and help needs no torch."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from mfdetr_cli.app import app
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

KNOWN = Path(__file__).with_name("options.txt")
HEAVY = ("torch", "numpy", "scipy", "numba", "transformers", "rich", "PIL")


def leaves(command: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not hasattr(command, "list_commands"):
        yield names, command
        return
    for name in command.list_commands(None):
        yield from leaves(command.get_command(None, name), (*names, name))


COMMANDS = dict(leaves(typer.main.get_command(app)))


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


def modules_after(*arguments: str) -> tuple[int, set[str]]:
    """Exit code of the command line, and the packages that it imported."""
    code = (
        "import sys\nfrom mfdetr_cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    code = stop.code\n"
        "print('\\nMODULES', code, *{m.partition('.')[0] for m in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    _, exit_code, *names = done.stdout.splitlines()[-1].split()
    return int(exit_code), set(names)


@pytest.mark.parametrize("command", [*{names[0]: None for names in COMMANDS}, "cache info"])
def test_help_needs_no_torch(command: str) -> None:
    code, modules = modules_after(*command.split(), "--help")
    assert code == 0
    assert modules.isdisjoint(HEAVY)


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


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "--version",
        "extract --weight x",
        "extract --weights",
        "extract --limit many",
        "extract --weights a --images absent --annotations b --cache c",
        "train-head --cache . --out a --set lrr=1",
        "cache info absent.zarr",
    ],
)
def test_wrong_arguments_need_no_torch(arguments: str) -> None:
    code, modules = modules_after(*arguments.split())
    assert code == (2 if " " in arguments else 0)
    assert modules.isdisjoint(HEAVY)


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (("extract", "--weights", "a", "--images", "{data}", "--cache", "c"), 2),
        (("predict", "absent.jpg", "--weights", "a", "--head", ".", "--out", "b"), 2),
        (("ablate", "--table", "99", "--dry-run"), 2),
        (("ablate", "--table", "3", "--set", "lrr=1", "--dry-run"), 2),
        (("cache", "info", "{cache}"), 0),
    ],
)
def test_what_needs_no_network_needs_no_torch(
    arguments: tuple[str, ...], exit_code: int, drawn_cache: Path, tmp_path: Path
) -> None:
    """A mistake in a dataset, and what a cache is, are told without the seconds torch takes."""
    (tmp_path / "bad.json").write_text("{}")
    places = {"data": tmp_path, "cache": drawn_cache}
    given = [a.format(**places) for a in arguments]
    if given[0] == "extract":
        given += ["--annotations", str(tmp_path / "bad.json")]
    code, modules = modules_after(*given)
    assert code == exit_code
    assert modules.isdisjoint({"torch", "torchvision", "transformers"})
