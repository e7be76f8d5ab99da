"""The command line: one subcommand per stage. The workflow's rules call these; they also work without Snakemake."""

import sys
from typing import NoReturn

import typer

from conceptshare.cli import comparing, figures, pages, stages, study, tables
from conceptshare.cli.options import go_offline
from conceptshare.io import provenance
from conceptshare.io.errors import AlreadyMadeError, ConceptshareError, system_error_message

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)
for _commands in (study, stages, comparing):
    app.add_typer(_commands.app)
app.add_typer(tables.app, name="metrics")
app.add_typer(figures.app, name="figures")
app.add_typer(pages.app, name="pages")

# Commands that may access a hub. All others run offline: compute nodes often have no internet, and the files that a run
# reads are recorded by then. Of those in `sae`, one fetches.
_FETCHING = {"check", "dataset", "weights", "doctor", "publish", "sae"}


@app.callback()
def _start(context: typer.Context) -> None:
    provenance.begin(sys.argv[1:])
    # The libraries read these variables when they are imported, which each command does later.
    if context.invoked_subcommand not in _FETCHING:
        go_offline()


def main() -> NoReturn:
    """Run the command line; user errors are printed as one message, without a traceback."""
    try:
        app(standalone_mode=True)
    except AlreadyMadeError as notice:
        print(notice, file=sys.stderr)
    except Exception as error:
        message = str(error) if isinstance(error, ConceptshareError) else system_error_message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)
