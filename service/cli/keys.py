"""`gradhelm keys`: API keys, straight in the database of this machine's data folder; no server is needed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from core.home import home
from service.cli import neighbour
from service.cli.errors import CliError, UsageProblem
from service.cli.options import DEFAULT_URL, AsJson
from service.cli.output import emit, note, table

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from service.settings import Settings

app = typer.Typer(help="Make, list and revoke API keys on this machine.", no_args_is_help=True)

COLUMNS = {
    "id": "id",
    "name": "name",
    "hint": "key",
    "scopes": "scopes",
    "created_at": "created",
    "expires_at": "expires",
    "last_used_at": "last used",
    "revoked_at": "revoked",
}


def settings_here() -> Settings:
    """The server's settings as the environment gives them."""
    from service.settings import load_settings

    try:
        return load_settings()
    except ValueError as error:
        raise UsageProblem(f"The settings are not valid: {error}.") from error


@contextmanager
def database() -> Iterator[Engine]:
    """The job database of this machine, migrated; a server may be running on it."""
    from service.db.engine import DatabaseBusy, DatabaseNewer, connect, migrate

    try:
        settings = settings_here()
        settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        engine = connect(settings.database)
        try:
            migrate(engine)
            yield engine
        finally:
            engine.dispose()
    except (DatabaseBusy, DatabaseNewer) as error:
        raise CliError(f"{error}.") from error
    except OSError as error:
        raise CliError(
            f"Cannot use {home()}: {error.strerror or error}. Name another folder in GRADHELM_HOME."
        ) from error


def absent() -> bool:
    """Whether there is no database to look into: one is made by a start and by `keys create`, never by a look."""
    settings = settings_here()
    return settings.database_url is None and not (settings.home / "gradhelm.db").exists()


def warn_of_another_folder() -> None:
    """Say so when the server that the other commands would talk to does not use this data folder."""
    parts = urlsplit(os.environ.get("GRADHELM_URL") or DEFAULT_URL)
    if parts.hostname in {"127.0.0.1", "localhost", "::1"}:
        elsewhere = neighbour.other_folder(parts.hostname, parts.port or 80, home())
        if elsewhere is not None:
            note(f"warning: the server that commands talk to will not take this key. {elsewhere}")


@app.command("create")
def create(
    name: Annotated[str, typer.Option("--name", help="Whom or what it is for.")] = "made by gradhelm keys",
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", help="read, jobs, generate or admin; repeat for more. Without: read, jobs, generate."),
    ] = None,
    days: Annotated[
        int | None, typer.Option("--days", min=1, help="Valid for so many days; for ever without.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it. This is the only time it is shown: the database holds a hash."""
    from service.security import keys

    expires_at = None if days is None else int(time.time()) + days * 86_400
    with database() as engine:
        try:
            row, secret = keys.create(engine, name, scope or ["read", "jobs", "generate"], expires_at=expires_at)
        except ValueError as error:
            raise UsageProblem(str(error)) from error
        shown, where = _shown(row), _place(engine)
    if as_json:
        emit({**shown, "key": secret})
    else:
        print(secret)
        note(f"made in {where}, for the server on it")
        note(f"{shown['id']}: keep it safe, it is not shown again; `gradhelm keys revoke {shown['id']}` ends it")
    warn_of_another_folder()


@app.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List keys, never the secret itself."""
    from service.security import keys

    if absent():
        if as_json:
            emit([])
        note(f"No keys in {home()}, which holds no database yet: `gradhelm keys create --name NAME`.")
        return
    with database() as engine:
        where = _place(engine)
        rows = [_shown(row) for row in keys.listed(engine)]
    if as_json:
        emit(rows)
    else:
        table(rows, COLUMNS, empty=f"No keys in {where} yet: `gradhelm keys create --name NAME`.")


@app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="KEY_ID", help="Id of a key, key_...", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """End a key at once, on a running server too."""
    from service.security import keys

    missing = f"No key {key_id!r} that still works in {home()}: `gradhelm keys list` shows what there is."
    if absent():
        raise CliError(missing)
    with database() as engine:
        if not keys.revoke(engine, key_id):
            raise CliError(missing)
    if as_json:
        emit({"id": key_id, "revoked": True})
    else:
        note(f"revoked {key_id}")


def _place(engine: Engine) -> str:
    """Where keys are: the data folder's database, or that of GRADHELM_DATABASE_URL without its password."""
    return str(engine.url.database) if engine.url.get_backend_name() == "sqlite" else str(engine.url)


def _shown(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in COLUMNS}
