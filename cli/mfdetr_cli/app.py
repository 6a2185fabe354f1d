"""The ``mfdetr`` command: its verbs, and errors as one line and an exit code."""

import importlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import typer
from mfdetr_pipelines.config.ablate import AblateConfig
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
from mfdetr_pipelines.config.compare import CompareConfig
from mfdetr_pipelines.config.copy_paste import CopyPasteConfig
from mfdetr_pipelines.config.demo import DemoConfig, DetectorsConfig
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.config.export import ExportConfig
from mfdetr_pipelines.config.extract import ExtractConfig
from mfdetr_pipelines.config.fit import FitConfig
from mfdetr_pipelines.config.plan import PlanConfig
from mfdetr_pipelines.config.predict import PredictConfig
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.config.train_joint import TrainJointConfig
from mfdetr_pipelines.config.training import RecipesConfig

import mfdetr_cache
from mfdetr_cache.errors import CheckFailedError, ConfigError, MfdetrError, StoppedError
from mfdetr_cache.files import disk_error
from mfdetr_cache.signals import ending_on_signals
from mfdetr_cli.help import HelpfulCommand, HelpfulGroup
from mfdetr_cli.signature import command_of, help_of
from mfdetr_cli.text import harmless, put

_ABOUT = "Instance masks for any frozen DETR: extract once, train from the cache."
# What the import of torch, its CPU and GPU allocators, and Python's threads say.
_TOO_LITTLE = (
    "failed to map segment",
    "can't allocate memory",
    "out of memory",
    "can't start new thread",
)
_SETTINGS: dict[str, Any] = {
    "no_args_is_help": True,
    "cls": HelpfulGroup,
    "rich_markup_mode": None,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}

app = typer.Typer(help=_ABOUT, pretty_exceptions_enable=False, **_SETTINGS)
cache_app = typer.Typer(help="Look after feature caches.", **_SETTINGS)


def _register(to: typer.Typer, name: str, kind: type[Any]) -> None:
    """Add a command, whose file is imported when it runs: torch and rich take their time."""
    verb = name.replace("-", "_")
    module = f"mfdetr_cli.cache.{verb}" if to is cache_app else f"mfdetr_cli.{verb}"

    def run(config: Any, json: Path | None) -> None:  # noqa: ANN401
        from mfdetr_cli.output import CommandOutput

        out = CommandOutput(json)
        try:
            getattr(importlib.import_module(module), verb)(config, out)
        finally:
            # Where a task was stopped the cursor of the terminal is still hidden.
            out.reporter.finish()
        out.require_written()

    summary, about = help_of(kind)
    to.command(name, cls=HelpfulCommand, help=about, short_help=summary)(command_of(kind, run))


_register(app, "fit", FitConfig)
_register(app, "extract", ExtractConfig)
_register(app, "train-head", TrainHeadConfig)
_register(app, "train-joint", TrainJointConfig)
_register(app, "copy-paste", CopyPasteConfig)
_register(app, "evaluate", EvaluateConfig)
_register(app, "compare", CompareConfig)
_register(app, "predict", PredictConfig)
_register(app, "ablate", AblateConfig)
_register(app, "plan", PlanConfig)
_register(app, "export", ExportConfig)
_register(app, "demo", DemoConfig)
_register(app, "recipes", RecipesConfig)
_register(app, "detectors", DetectorsConfig)
app.add_typer(cache_app, name="cache", short_help="Look after feature caches.")
_register(cache_app, "info", InfoConfig)
_register(cache_app, "verify", VerifyConfig)
_register(cache_app, "view", ViewConfig)
_register(cache_app, "finish", FinishConfig)
_register(cache_app, "repair", RepairConfig)
_register(cache_app, "relabel", RelabelConfig)
_register(cache_app, "suggest", SuggestConfig)
_register(cache_app, "certify", CertifyConfig)
_register(cache_app, "bench", BenchConfig)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"mfdetr-cache {mfdetr_cache.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Show the version."
    ),
) -> None:
    """Options of ``mfdetr`` itself."""


def main() -> None:
    """Run the command line: exit 0 done, 1 a check found a fault, 2 wrong input, 130 stopped."""
    warnings.formatwarning = _one_line
    if not os.environ.get("COLUMNS", "1").strip("0"):
        del os.environ["COLUMNS"]  # 0 is nobody's width
    try:
        if sys.flags.optimize > 1:
            raise ConfigError(
                "python -OO (PYTHONOPTIMIZE=2) drops the texts that options and transformers' "
                "classes are made of; use -O"
            )
        with ending_on_signals():
            app(prog_name="mfdetr")
    except StoppedError as error:
        _end(error, 130)
    except CheckFailedError as error:
        _end(error, 1)
    except MfdetrError as error:
        _end(error, 2)
    except (ImportError, MemoryError, RuntimeError) as error:
        # A limit (ulimit -v, ulimit -u) or a small machine; any other is a bug.
        text = str(error)
        if not (isinstance(error, MemoryError) or any(said in text for said in _TOO_LITTLE)):
            raise
        reason = f": {text.splitlines()[0]}" if text else ""
        _end(f"there is not enough memory, or too few threads{reason}", 2)
    except OSError as error:
        # A disk that is full or may not be written is nobody's bug, wherever it was noticed.
        if not disk_error(error):
            raise
        _end(error, 2)


def _one_line(message: Warning | str, *_: object, **__: object) -> str:
    """A warning without the line of source that gave it."""
    return f"warning: {harmless(' '.join(str(message).split()))}\n"


def _end(error: Exception | str, code: int) -> None:
    text = " ".join(str(error).split())
    put(sys.stderr, f"error: {harmless(text)}\n")
    sys.exit(code)
