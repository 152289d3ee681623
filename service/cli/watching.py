"""Watching a job to its end as a command does it: the exit code, what Ctrl-C leaves behind, and what to do next."""

from __future__ import annotations

from typing import Any

import typer

from service.cli import follow
from service.cli.client import Client, segment
from service.cli.errors import CliError
from service.cli.output import note


def watch(client: Client, job_id: str, *, as_json: bool, retry_for: float = follow.RETRY_FOR) -> None:
    """Follow a job and print what comes; then say how its result is used.

    Args:
        client: the server.
        job_id: a job of either kind.
        as_json: lines of JSON instead of a bar or text.
        retry_for: seconds for which a server that does not answer is tried again.

    Raises:
        typer.Exit: 1 when the job failed or was cancelled, 130 on Ctrl-C, which ends the watching only.
    """
    view = follow.JsonView() if as_json else follow.make_view()
    try:
        job = follow.follow(client, f"/v1/fine_tuning/jobs/{segment(job_id)}", view, retry_for=retry_for)
    except KeyboardInterrupt:
        note(
            f"no longer watching; the job goes on. `gradhelm jobs follow {job_id}` watches it again, "
            f"`gradhelm jobs cancel {job_id}` ends it."
        )
        raise typer.Exit(130) from None
    if job["status"] in follow.BAD:
        raise typer.Exit(1)
    if job["status"] == "succeeded" and not as_json:
        _say_what_next(client, job)


def _say_what_next(client: Client, job: dict[str, Any]) -> None:
    model, vector = job.get("fine_tuned_model"), job.get("vector")
    if model:
        note(f"next: `gradhelm chat --model {model} --system '<from the training file>' --temperature 0 \"Hello\"`")
    elif vector:
        try:
            layers = client.get(f"/v1/steering/vectors/{segment(vector)}").get("layers") or []
        except CliError:
            layers = []  # a hint is worth no error
        # A little behind the middle, where steering works in small models: 16 of 30.
        where = f":{layers[len(layers) * 11 // 20]}" if layers else ""
        note(f'next: `gradhelm chat --model {job["model"]} --vector {vector}:1.5{where} "Hello"`')
