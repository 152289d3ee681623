"""`gradhelm replay`: from the journal of a zeroth-order run to its tuned model, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.cli.errors import CliError
from service.cli.output import out


def replay(
    journal: Annotated[Path, typer.Argument(metavar="JOURNAL", help="Journal of the run.", show_default=False)],
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder for the artifact.", show_default=False)],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Base, where the journal names none.", show_default=False)
    ] = None,
    step: Annotated[int | None, typer.Option("--step", help="Last step; all without.", show_default=False)] = None,
) -> None:
    """Make the tuned model of a zeroth-order run from its journal, on this machine and without a server."""
    from trainers.journal.command import make
    from trainers.journal.reader import read

    try:
        out().print(make(read(journal), output, model=model, step=step), markup=False)
    except ValueError as error:
        raise CliError(str(error)) from error
