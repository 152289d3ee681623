"""`gradhelm jobs`: create, watch and steer the course of fine-tuning jobs."""

from __future__ import annotations

import json
import re
import sys
import uuid
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from service.cli import follow as following
from service.cli.client import Client, segment
from service.cli.errors import CliError, UsageProblem
from service.cli.files import data_files
from service.cli.options import DEFAULT_URL, After, AsJson, Key, Limit, Url
from service.cli.output import emit, fields, note, table, when
from service.cli.watching import watch

app = typer.Typer(help="Create, follow and control fine-tuning jobs.", no_args_is_help=True)

ROUTE = "/v1/fine_tuning/jobs"
JobId = Annotated[str, typer.Argument(metavar="JOB_ID", help="Id of a job, ftjob-...", show_default=False)]
COLUMNS = {
    "id": "id",
    "status": "status",
    "model": "model",
    "fine_tuned_model": "result",
    "trained_tokens": "tokens",
    "created_at": "created",
}
_SUFFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
Retry = Annotated[float, typer.Option("--retry-for", min=0, help="Seconds to wait for a server that does not answer.")]


def path(job_id: str, *rest: str) -> str:
    """Route of one job, or of something below it."""
    return "/".join([ROUTE, segment(job_id), *rest])


def pairs(texts: Iterable[str] | None, option: str) -> dict[str, str]:
    """Repeated ``name=value`` options as a dictionary."""
    result: dict[str, str] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageProblem(f"{option} {text!r}: write name=value.")
        result[name] = value
    return result


def scalar(text: str) -> Any:
    """A hyperparameter's value: JSON where it is JSON (4, 1e-4, true, [1]), else the text itself (auto, cosine)."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def hyperparameters(texts: Iterable[str] | None) -> dict[str, Any]:
    """What the --set options say."""
    return {name: scalar(value) for name, value in pairs(texts, "--set").items()}


@app.command("create")
def create(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="What to tune: a base, or an earlier result (ft:...).", show_default=False),
    ],
    training_file: Annotated[
        str, typer.Option("--file", "-f", help="Training data: a file id, or a path to upload.", show_default=False)
    ],
    validation_file: Annotated[
        str | None, typer.Option("--validation-file", help="Held-out data: id or path.", show_default=False)
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="Training method; docs/configuration.md lists them.")
    ] = "lora",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Hyperparameter; repeat for more.", show_default=False),
    ] = None,
    suffix: Annotated[
        str | None, typer.Option("--suffix", help="Part of the new model's id.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=2**31 - 1, help="Drawn when not given.", show_default=False)
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(
            "--metadata", metavar="NAME=VALUE", help="Note kept on the job; repeat for more.", show_default=False
        ),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(
            "--idempotency-key",
            help="Same key, same job: a path is then not uploaded anew where its bytes are.",
            show_default=False,
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Then watch it to its end.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Start a job and print its id."""
    if suffix is not None and not _SUFFIX.fullmatch(suffix):
        raise UsageProblem(
            f"--suffix {suffix!r}: 1 to 64 letters, digits, dots, hyphens and underscores, the first no sign: my-model."
        )
    method_settings, notes = hyperparameters(settings), pairs(metadata, "--metadata")
    with Client(url, key) as client:
        with data_files(client, reuse=idempotency_key is not None) as file_id:
            body: dict[str, Any] = {
                "model": model,
                "training_file": file_id(training_file),
                "method": {"type": method, method: {"hyperparameters": method_settings}},
            }
            optional = {
                "validation_file": None if validation_file is None else file_id(validation_file),
                "suffix": suffix,
                "seed": seed,
                "metadata": notes or None,
            }
            body.update({name: value for name, value in optional.items() if value is not None})
            job = client.post(ROUTE, body, headers={"Idempotency-Key": idempotency_key or str(uuid.uuid4())})
        if follow:
            watch(client, job["id"], as_json=as_json)
        elif as_json:
            emit(job)
        else:
            print(job["id"])
            note(f"watch it with `gradhelm jobs follow {job['id']}`")


@app.command("list")
def list_jobs(
    limit: Limit = 20,
    after: After = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option("--metadata", metavar="NAME=VALUE", help="Only jobs with this note.", show_default=False),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="The jobs that fit vectors too, failed ones among them.")
    ] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    wanted = {f"metadata[{name}]": value for name, value in pairs(metadata, "--metadata").items()}
    with Client(url, key) as client:
        rows = client.list(ROUTE, limit=limit, after=after, kind="all" if every else None, **wanted)
        here = None if as_json else _models(client)
    if as_json:
        emit(rows)
    else:
        rows = [{**row, "fine_tuned_model": _result(row, here)} for row in rows]
        table(rows, COLUMNS, empty="No jobs yet: `gradhelm jobs create --model MODEL --file PATH`.")


def _models(client: Client) -> set[str] | None:
    """Ids of the models that exist; None where the server does not say."""
    try:
        return {str(row["id"]) for row in client.get("/v1/models")["data"]}
    except (CliError, KeyError):
        return None


def _result(row: dict[str, Any], here: set[str] | None) -> str | None:
    """What a job made, and whether it was deleted since."""
    model: str | None = row.get("fine_tuned_model")
    if model is not None and here is not None and model not in here:
        return f"{model} (deleted)"
    return model or row.get("vector")


@app.command("get")
def get(job_id: JobId, url: Url = DEFAULT_URL, key: Key = None, as_json: AsJson = False) -> None:
    """Show one job with its resolved settings."""
    with Client(url, key) as client:
        _show(client.get(path(job_id)), as_json)


@app.command("follow")
def follow(
    job_id: JobId,
    retry_for: Retry = following.RETRY_FOR,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Watch a job to its end: progress, loss, messages. The job does not need you: Ctrl-C only stops watching.

    Exit code 0 when it succeeded or paused, 1 when it failed or was cancelled. With --json each event is one line.
    """
    with Client(url, key) as client:
        watch(client, job_id, as_json=as_json, retry_for=retry_for)


@app.command("cancel")
def cancel(job_id: JobId, url: Url = DEFAULT_URL, key: Key = None, as_json: AsJson = False) -> None:
    """Stop a job for good; it writes a last checkpoint if there is time."""
    _act(job_id, "cancel", url, key, as_json)


@app.command("pause")
def pause(job_id: JobId, url: Url = DEFAULT_URL, key: Key = None, as_json: AsJson = False) -> None:
    """Stop a job at a checkpoint, to go on later."""
    _act(job_id, "pause", url, key, as_json)


@app.command("resume")
def resume(job_id: JobId, url: Url = DEFAULT_URL, key: Key = None, as_json: AsJson = False) -> None:
    """Go on with a paused job where it stopped."""
    _act(job_id, "resume", url, key, as_json)


@app.command("events")
def events(
    job_id: JobId,
    limit: Limit = 50,
    after: After = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """List a job's events, newest first."""
    with Client(url, key) as client:
        rows = client.list(path(job_id, "events"), limit=limit, after=after)
    if as_json:
        emit(rows)
        return
    for row in rows:
        print(f"{when(row.get('created_at'))}  {row.get('level', ''):<5}  {row.get('message', '')}")


@app.command("checkpoints")
def checkpoints(
    job_id: JobId,
    limit: Limit = 50,
    after: After = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """List a job's checkpoints; each may be named as a model."""
    with Client(url, key) as client:
        rows = client.list(path(job_id, "checkpoints"), limit=limit, after=after)
    if as_json:
        emit(rows)
        return
    columns = {
        "fine_tuned_model_checkpoint": "model",
        "step_number": "step",
        "metrics": "metrics",
        "created_at": "created",
    }
    table(rows, columns, empty="No checkpoints yet.")


@app.command("logs")
def logs(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job settles.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Print what the run itself wrote; with --json each piece as a line with its byte offset."""
    route = path(job_id, "logs")
    with Client(url, key) as client:
        if not follow and not as_json:
            client.save(route, sys.stdout.buffer)
            return
        for piece in following.pieces(client, route, wait=follow):
            if as_json:
                emit(piece, indent=None)
            else:
                print(piece["text"], end="", flush=True)


def _act(job_id: str, action: str, url: str, key: str | None, as_json: bool) -> None:
    with Client(url, key) as client:
        job = client.post(path(job_id, action))
    if as_json:
        emit(job)
    else:
        print(f"{job['id']}  {job['status']}")


def _show(job: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit(job)
    else:
        fields(job)
