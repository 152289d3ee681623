"""`gradhelm files`: training data on the server."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from service.cli.client import Client, segment
from service.cli.errors import CliError, ServerGone, ServerRefused, UsageProblem
from service.cli.options import DEFAULT_URL, After, AsJson, Key, Limit, Url
from service.cli.output import emit, fields, note, table
from service.cli.saving import save_new

app = typer.Typer(help="Upload and look after data files.", no_args_is_help=True)

FileId = Annotated[str, typer.Argument(metavar="FILE_ID", help="Id of a file, file-...", show_default=False)]
COLUMNS = {"id": "id", "filename": "name", "bytes": "size", "purpose": "purpose", "created_at": "created"}


def upload_file(client: Client, path: Path, purpose: str = "fine-tune") -> str:
    """Upload ``path`` and return the new file's id."""
    identifier = str(client.upload("/v1/files", path, {"purpose": purpose})["id"])
    note(f"uploaded {path} as {identifier}")
    return identifier


def same_upload(client: Client, path: Path, purpose: str) -> str | None:
    """The oldest file of the server with the bytes, name and purpose of a local one: the same at every look."""
    size = path.stat().st_size
    known = client.list("/v1/files", limit=10_000, purpose=purpose)
    alike = [row["id"] for row in known if row.get("bytes") == size and row.get("filename") == path.name]
    with path.open("rb") as file:
        wanted = hashlib.file_digest(file, "sha256").digest()
    for identifier in reversed(alike):
        digest = hashlib.sha256()
        with client.stream("GET", f"/v1/files/{segment(identifier)}/content") as response:
            for chunk in response.iter_bytes():
                digest.update(chunk)
        if digest.digest() == wanted:
            return str(identifier)
    return None


def file_id(client: Client, given: str, purpose: str = "fine-tune") -> str:
    """The id of a data file named by id or by local path; a path is uploaded first.

    What exists on disk wins: a file that happens to be called like an id is still that file.
    """
    path = Path(given).expanduser()
    if path.is_file():
        return upload_file(client, path, purpose)
    if "/" in given or path.suffix:
        raise UsageProblem(f"There is no file {given} here, and ids of uploaded files look like file-...")
    return given


@contextmanager
def data_files(client: Client, purpose: str = "fine-tune", *, reuse: bool = False) -> Iterator[Callable[[str], str]]:
    """``file_id`` for the data of one request: what it uploads is deleted again when the request is refused.

    Nothing is deleted where the server may have taken the request: no answer came, or one of its own failures.

    Args:
        client: the server.
        purpose: what the files are for.
        reuse: name a file that the server has already instead of uploading the same bytes once more.

    Yields:
        Callable[[str], str]: from an id or a path to an id.
    """
    uploaded: list[str] = []

    def resolve(given: str) -> str:
        path = Path(given).expanduser()
        known = same_upload(client, path, purpose) if reuse and path.is_file() else None
        if known is not None:
            note(f"{path} is there already as {known}")
            return known
        identifier = file_id(client, given, purpose)
        if identifier != given:
            uploaded.append(identifier)
        return identifier

    try:
        yield resolve
    except CliError as error:
        unsure = isinstance(error, ServerGone) or (isinstance(error, ServerRefused) and error.status >= 500)
        for identifier in () if unsure else uploaded:
            with suppress(CliError):
                client.delete(f"/v1/files/{segment(identifier)}")
                note(f"deleted {identifier} again: the request was refused")
        raise


@app.command("upload")
def upload(
    path: Annotated[Path, typer.Argument(help="JSON lines, one example a line.", show_default=False)],
    purpose: Annotated[
        str, typer.Option("--purpose", help="What the file is for: fine-tune or steering.")
    ] = "fine-tune",
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Upload a file and print its id."""
    with Client(url, key) as client:
        answer = client.upload("/v1/files", path, {"purpose": purpose})
    if as_json:
        emit(answer)
    else:
        print(answer["id"])


@app.command("list")
def list_files(
    limit: Limit = 100, after: After = None, url: Url = DEFAULT_URL, key: Key = None, as_json: AsJson = False
) -> None:
    """List files, newest first."""
    with Client(url, key) as client:
        rows = client.list("/v1/files", limit=limit, after=after)
    if as_json:
        emit(rows)
    else:
        table(rows, COLUMNS, empty="No files yet: `gradhelm files upload PATH`.")


@app.command("get")
def get(file_id: FileId, url: Url = DEFAULT_URL, key: Key = None, as_json: AsJson = False) -> None:
    """Show one file's record."""
    with Client(url, key) as client:
        answer = client.get(f"/v1/files/{segment(file_id)}")
    if as_json:
        emit(answer)
    else:
        fields(answer)


@app.command("content")
def content(
    file_id: FileId,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write here instead of stdout.", show_default=False)
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Print what a file holds (a job's result file is its metrics as CSV)."""
    route = f"/v1/files/{segment(file_id)}/content"
    with Client(url, key) as client:
        if output is None and not as_json:
            client.save(route, sys.stdout.buffer)
            return
        target = output or Path(Path(file_id).name)
        written = save_new(client, route, target)
    if as_json:
        emit({"id": file_id, "path": str(target), "bytes": written})
    else:
        note(f"wrote {written} bytes to {target}")


@app.command("delete")
def delete(file_id: FileId, url: Url = DEFAULT_URL, key: Key = None, as_json: AsJson = False) -> None:
    """Delete a file that no unfinished job needs."""
    with Client(url, key) as client:
        answer = client.delete(f"/v1/files/{segment(file_id)}")
    if as_json:
        emit(answer)
    else:
        note(f"deleted {file_id}")
