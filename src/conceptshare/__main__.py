"""Command line as ``python -m conceptshare``."""

from conceptshare.cli import main

main()
