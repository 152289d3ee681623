"""`gradhelm vectors`: fit, import, list and export steering vectors."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.chat import parse_layers
from service.cli.client import Client, segment
from service.cli.errors import UsageProblem
from service.cli.files import data_files
from service.cli.jobs import hyperparameters
from service.cli.options import DEFAULT_URL, After, AsJson, Key, Limit, Url
from service.cli.output import emit, fields, note, table
from service.cli.saving import save_new
from service.cli.watching import watch

app = typer.Typer(help="Fit steering vectors and look after them.", no_args_is_help=True)

ROUTE = "/v1/steering/vectors"
VectorId = Annotated[str, typer.Argument(metavar="VECTOR_ID", help="Id of a vector, vec_...", show_default=False)]
COLUMNS = {
    "id": "id",
    "status": "status",
    "name": "name",
    "model": "model",
    "method": "method",
    "created_at": "created",
}


@app.command("fit")
def fit(
    model: Annotated[str, typer.Option("--model", "-m", help="Model whose activations are read.", show_default=False)],
    data: Annotated[
        str,
        typer.Option("--file", "-f", help="Pairs (positive, negative): a file id or a path.", show_default=False),
    ],
    layers: Annotated[
        str | None, typer.Option("--layers", help="Blocks like 12,13 or 4-7; all without.", show_default=False)
    ] = None,
    method: Annotated[str, typer.Option("--method", help="How the direction is found.")] = "mean_difference",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Setting of the fit; repeat for more.", show_default=False),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Shown in lists only; requests name the id.", show_default=False)
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Then watch it to its end.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Fit a vector as a job and print its id."""
    optional: dict[str, Any] = {"name": name, **hyperparameters(settings)}
    if layers is not None:
        try:
            optional["layers"] = parse_layers(layers)
        except ValueError as error:
            raise UsageProblem(f"--layers: {error}.") from error
    with Client(url, key) as client:
        with data_files(client, "steering") as file_id:
            body: dict[str, Any] = {"model": model, "training_file": file_id(data), "method": method}
            body.update({field: value for field, value in optional.items() if value is not None})
            answer = client.post(ROUTE, body, headers={"Idempotency-Key": str(uuid.uuid4())})
        if follow:
            watch(client, answer["job_id"], as_json=as_json)
        elif as_json:
            emit(answer)
        else:
            print(answer["id"])
            note(f"watch it with `gradhelm jobs follow {answer.get('job_id')}`")


@app.command("import")
def import_vector(
    path: Annotated[Path, typer.Argument(help="A .safetensors file of ours.", show_default=False)],
    name: Annotated[
        str | None, typer.Option("--name", help="Shown in lists only; requests name the id.", show_default=False)
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Import a vector from a file and print its id."""
    with Client(url, key) as client:
        answer = client.upload(f"{ROUTE}/import", path, {} if name is None else {"name": name})
    if as_json:
        emit(answer)
    else:
        print(answer["id"])


@app.command("list")
def list_vectors(
    limit: Limit = 100, after: After = None, url: Url = DEFAULT_URL, key: Key = None, as_json: AsJson = False
) -> None:
    """List vectors, newest first, and fits under way; a fit that failed is in `jobs list --all`."""
    with Client(url, key) as client:
        rows = client.list(ROUTE, limit=limit, after=after)
    if as_json:
        emit(rows)
    else:
        table(
            rows,
            COLUMNS,
            empty="No vectors yet: `gradhelm vectors fit --model MODEL --file PAIRS`. Fits that failed: "
            "`gradhelm jobs list --all`.",
        )


@app.command("get")
def get(vector_id: VectorId, url: Url = DEFAULT_URL, key: Key = None, as_json: AsJson = False) -> None:
    """Show one vector: its model, layers, norms and where it came from."""
    with Client(url, key) as client:
        answer = client.get(f"{ROUTE}/{segment(vector_id)}")
    if as_json:
        emit(answer)
    else:
        about = answer.get("metadata") or {}
        if isinstance(about.get("norms"), dict):  # by layer: 2 before 10
            ordered = sorted(about["norms"].items(), key=lambda item: (len(item[0]), item[0]))
            answer = {**answer, "metadata": {**about, "norms": dict(ordered)}}
        fields(answer)


@app.command("export")
def export(
    vector_id: VectorId,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="New .safetensors file.", show_default=False)],
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Download a vector as one safetensors file."""
    with Client(url, key) as client:
        written = save_new(client, f"{ROUTE}/{segment(vector_id)}/content", path)
    if as_json:
        emit({"id": vector_id, "path": str(path), "bytes": written})
    else:
        note(f"wrote {written} bytes to {path}")


@app.command("delete")
def delete(vector_id: VectorId, url: Url = DEFAULT_URL, key: Key = None, as_json: AsJson = False) -> None:
    """Delete a vector."""
    with Client(url, key) as client:
        answer = client.delete(f"{ROUTE}/{segment(vector_id)}")
    if as_json:
        emit(answer)
    else:
        note(f"deleted {vector_id}")
