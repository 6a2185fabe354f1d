"""The ``mfdetr`` command: registers the verbs, turns errors into one line and an exit code."""

import sys

import typer

import mfdetr_cache
from mfdetr_cache.errors import CheckFailedError, MfdetrError, StoppedError
from mfdetr_cache.files import disk_error
from mfdetr_cli.ablate import ablate
from mfdetr_cli.cache import cache_app
from mfdetr_cli.console import print_error
from mfdetr_cli.copy_paste import copy_paste
from mfdetr_cli.demo import demo
from mfdetr_cli.detectors import detectors
from mfdetr_cli.evaluate import evaluate
from mfdetr_cli.export import export
from mfdetr_cli.extract import extract
from mfdetr_cli.plan import plan
from mfdetr_cli.predict import predict
from mfdetr_cli.train_head import train_head
from mfdetr_cli.train_joint import train_joint

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a bug gets the plain traceback
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Instance masks for any frozen DETR: extract once, train from the cache.",
)
app.command()(extract)
app.command(name="train-head")(train_head)
app.command(name="train-joint")(train_joint)
app.command(name="copy-paste")(copy_paste)
app.command()(evaluate)
app.command()(predict)
app.command()(ablate)
app.command()(plan)
app.command()(export)
app.command()(demo)
app.command()(detectors)
app.add_typer(cache_app, name="cache")


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
    """Instance masks for any frozen DETR: extract once, train from the cache."""


def main() -> None:
    """Run the command line: exit 0 done, 1 a check found a fault, 2 wrong input, 130 stopped."""
    try:
        app()
    except StoppedError as error:
        print_error(error)
        sys.exit(130)
    except CheckFailedError as error:
        print_error(error)
        sys.exit(1)
    except MfdetrError as error:
        print_error(error)
        sys.exit(2)
    except OSError as error:
        # A disk that is full or may not be written is nobody's bug, wherever it was noticed.
        if not disk_error(error):
            raise
        print_error(error)
        sys.exit(2)
