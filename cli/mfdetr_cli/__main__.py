"""``python -m mfdetr_cli``."""

from mfdetr_cli.app import main

main()
