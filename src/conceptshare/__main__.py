"""``python -m conceptshare`` is the command line."""

from conceptshare.cli import main

main()
