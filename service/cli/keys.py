"""`gradhelm keys`: API keys, straight in the database of this machine's data folder; no server is needed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from core.home import home
from service.cli.errors import CliError, UsageProblem
from service.cli.options import AsJson
from service.cli.output import emit, note, table

if TYPE_CHECKING:
    from sqlalchemy import Engine

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


@contextmanager
def database() -> Iterator[Engine]:
    """The job database of this machine, migrated; a server may be running on it."""
    from service.db.engine import DatabaseBusy, connect, migrate
    from service.settings import load_settings

    try:
        settings = load_settings()
        settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        engine = connect(settings.database)
        try:
            migrate(engine)
            yield engine
        finally:
            engine.dispose()
    except DatabaseBusy as error:
        raise CliError(f"{error}.") from error
    except OSError as error:
        raise CliError(
            f"Cannot use {home()}: {error.strerror or error}. Name another folder in GRADHELM_HOME."
        ) from error


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
        shown = _shown(row)
    if as_json:
        emit({**shown, "key": secret})
    else:
        print(secret)
        note(f"{shown['id']}: keep it safe, it is not shown again; `gradhelm keys revoke {shown['id']}` ends it")


@app.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List keys, never the secret itself."""
    from service.security import keys

    with database() as engine:
        rows = [_shown(row) for row in keys.listed(engine)]
    if as_json:
        emit(rows)
    else:
        table(rows, COLUMNS, empty="No keys yet: `gradhelm keys create --name NAME`.")


@app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="KEY_ID", help="Id of a key, key_...", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """End a key at once, on a running server too."""
    from service.security import keys

    with database() as engine:
        if not keys.revoke(engine, key_id):
            raise CliError(f"No key {key_id!r} that still works: `gradhelm keys list` shows what there is.")
    if as_json:
        emit({"id": key_id, "revoked": True})
    else:
        note(f"revoked {key_id}")


def _shown(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in COLUMNS}
