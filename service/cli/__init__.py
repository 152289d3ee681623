"""The command line, `gradhelm`: one file per command group, everything but serve, doctor, keys and replay over HTTP."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer
from rich.text import Text

from service.cli import chat, doctor, files, jobs, keys, models, replay, serve, vectors
from service.cli.errors import CliError
from service.cli.output import err

app = typer.Typer(
    name="gradhelm",
    help="Fine-tune language models and steer them while they generate.",
    epilog="Exit codes: 0 done, 1 the server or the machine said no, 2 wrong usage, 130 Ctrl-C.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("serve")(serve.serve)
app.command("doctor")(doctor.doctor)
app.add_typer(models.app, name="models")
app.add_typer(files.app, name="files")
app.add_typer(jobs.app, name="jobs")
app.add_typer(vectors.app, name="vectors")
app.command("chat")(chat.chat)
app.add_typer(keys.app, name="keys")
app.command("replay")(replay.replay)


def _version(wanted: bool) -> None:
    if wanted:
        try:
            print(f"gradhelm {version('gradhelm')}")
        except PackageNotFoundError:
            print("gradhelm, a checkout that is not installed")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Options before a command."""


def main() -> None:
    """Entry point: runs the command and turns what went wrong into one message and an exit code."""
    try:
        app()
    except CliError as error:
        err().print(Text.assemble(("error: ", "bold red"), error.message))
        sys.exit(error.exit_code)
    except OSError as error:
        # A full disk, a folder without permission: the machine said no.
        where = f"{error.filename}: " if error.filename else ""
        err().print(Text.assemble(("error: ", "bold red"), f"{where}{error.strerror or error}"))
        sys.exit(1)
