"""The ``mfdetr`` command, also as ``python -m mfdetr_cli``."""

import atexit
import sys

from mfdetr_cache.signals import KEPT, StoppedBySignal, ending_on_signals, ignore_signals


def main() -> None:
    """Run the command line; signals end it in one line while it is still being imported, too."""
    try:
        with ending_on_signals():
            from mfdetr_cli.app import main as run
        run()
    except StoppedBySignal as signal:
        print(f"error: stopped by {signal}; {KEPT}", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    finally:
        # Leaving Python takes some tenths of a second, in which its exit code stands already.
        atexit.register(ignore_signals)


if __name__ == "__main__":
    main()
