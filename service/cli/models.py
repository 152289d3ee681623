"""`gradhelm models`: bases, fine-tuned models and their checkpoints."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from core.models.catalog import CATALOG
from service.cli import archive
from service.cli.client import Client, segment
from service.cli.errors import CliError
from service.cli.options import DEFAULT_URL, AsJson, Key, Url
from service.cli.output import emit, fields, note, size, table

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

app = typer.Typer(help="List, pull, export and delete models.", no_args_is_help=True)

ModelId = Annotated[str, typer.Argument(metavar="MODEL", help="Model id, a base or ft:...", show_default=False)]
COLUMNS = {"id": "id", "kind": "kind", "base": "base", "created": "created"}
PULL_SECONDS = 3700.0  # the server's own limit, and a little


@app.command("list")
def list_models(url: Url = DEFAULT_URL, key: Key = None, as_json: AsJson = False) -> None:
    """List every model that may be named in a request."""
    with Client(url, key) as client:
        rows = client.get("/v1/models")["data"]
    if as_json:
        emit(rows)
    else:
        table(rows, COLUMNS, empty="No models yet: `gradhelm models pull smollm2-135m-instruct`.")


@app.command("get")
def get(model: ModelId, url: Url = DEFAULT_URL, key: Key = None, as_json: AsJson = False) -> None:
    """Show one model's record."""
    with Client(url, key) as client:
        answer = client.get(f"/v1/models/{segment(model)}")
    if as_json:
        emit(answer)
    else:
        fields(answer)


@app.command("pull")
def pull(
    reference: Annotated[
        str, typer.Argument(metavar="MODEL", help="Catalog name or org/name[@revision].", show_default=False)
    ],
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Let the server fetch a base model, so that jobs and requests may name it (needs an admin key)."""
    with Client(url, key) as client:
        if not as_json and not _is_here(client, reference):
            note(f"pulling {reference} ...{_size(reference)}")
        answer = client.post("/v1/models/pull", {"model": reference}, patience=PULL_SECONDS)
    if as_json:
        emit(answer)
    else:
        print(answer["id"])


@app.command("export")
def export(
    model: ModelId,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="New folder for the files.", show_default=False)],
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Download a model's files into DIR: adapter or merged weights, manifest and model card."""
    archive.check_target(directory)
    with Client(url, key) as client, client.stream("GET", f"/v1/models/{segment(model)}/content") as response:
        written = archive.unpack(io.BufferedReader(_Body(response.iter_bytes())), directory)
    if as_json:
        emit({"id": model, "directory": str(directory), "files": [str(path) for path in written]})
    else:
        for path in written:
            print(path)


@app.command("delete")
def delete(model: ModelId, url: Url = DEFAULT_URL, key: Key = None, as_json: AsJson = False) -> None:
    """Delete a fine-tuned model and its job's checkpoints, or one checkpoint; the job and its metrics stay."""
    with Client(url, key) as client:
        answer = client.delete(f"/v1/models/{segment(model)}")
    if as_json:
        emit(answer)
    else:
        note(f"deleted {model}{_freed(answer)}")


def _freed(answer: dict[str, Any]) -> str:
    """What a deletion took along, gave back and left."""
    count, kept = len(answer.get("checkpoints") or []), answer.get("kept_bytes") or 0
    also = f" and {count} checkpoint{'s' if count > 1 else ''} of its job" if count else ""
    stays = f"; {size(kept)} stay, shared with later jobs: delete their models too" if kept else ""
    return f"{also}: {size(answer.get('freed_bytes') or 0)} of the disk are free again{stays}"


def _is_here(client: Client, reference: str) -> bool:
    try:
        client.get(f"/v1/models/{segment(reference)}")
    except CliError:
        return False
    return True


def _size(reference: str) -> str:
    """What a pull takes, where the catalog knows."""
    entry = CATALOG.get(reference)
    if entry is None or entry.wheel is None:
        return ""
    return f" a download of {entry.wheel.megabytes} MB, then a conversion to float32; about a minute, once"


class _Body(io.RawIOBase):
    """A response's chunks as a readable stream, so that the tar is unpacked while it arrives."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """Always: that is all it can do."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill ``buffer`` from the front; 0 at the end of the body."""
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        target = memoryview(buffer)
        count = min(len(target), len(self._rest))
        target[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
