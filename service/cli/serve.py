"""`gradhelm serve`: the server in this process."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from pathlib import Path
from typing import Annotated

import typer

from service.cli import neighbour
from service.cli.errors import CliError, UsageProblem


def serve(
    host: Annotated[
        str | None, typer.Option("--host", help="Address to listen on; 127.0.0.1 unless set.", show_default=False)
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one; 8000 unless set.", show_default=False),
    ] = None,
    home: Annotated[
        Path | None, typer.Option("--home", help="Data folder; ~/.gradhelm unless set.", show_default=False)
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="Settings file (YAML).", show_default=False)] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option("--allowed-host", help="Name the server is reached under; repeat for more.", show_default=False),
    ] = None,
) -> None:
    """Start the server, print its address, and serve until SIGTERM or Ctrl-C. Jobs outlive it."""
    # The environment is the settings' own highest source, and it reaches the runs and engines started below us.
    given = {
        "GRADHELM_HOST": host,
        "GRADHELM_PORT": None if port is None else str(port),
        "GRADHELM_HOME": None if home is None else str(home.expanduser().absolute()),
        "GRADHELM_ALLOWED_HOSTS": json.dumps(allowed_host) if allowed_host else None,
    }
    os.environ.update({name: value for name, value in given.items() if value is not None})
    from service.app import create_app
    from service.cli.server import GracefulServer
    from service.db.engine import DatabaseNewer
    from service.jobs.lock import FolderInUse
    from service.log import configure
    from service.settings import load_settings

    try:
        settings = load_settings(config)
    except ValueError as error:
        raise UsageProblem(f"The settings are not valid: {error}.") from error
    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        raise CliError(neighbour.about_port(error, settings.host, settings.port, settings.home)) from error
    configure(settings.log_level)

    def ready() -> None:
        print(f"Gradhelm listens on {address(listener)} with its data in {settings.home}", flush=True)

    try:
        asyncio.run(GracefulServer(create_app(settings), settings, ready=ready).serve_app(listener))
    except FolderInUse as error:
        listener.close()
        raise CliError(neighbour.about_folder(settings.home, error.pid)) from error
    except DatabaseNewer as error:
        listener.close()
        raise CliError(str(error)) from error


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, bound before anything is loaded so that a taken port is known at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named so that asyncio turns Nagle off: else each answer waits 40 ms for a delayed ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    return listener


def address(listener: socket.socket) -> str:
    """URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return neighbour.url(host, port)
