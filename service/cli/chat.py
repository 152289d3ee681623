"""`gradhelm chat`: one streamed answer, steered if asked."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from service.cli.client import Client, segment
from service.cli.errors import CliError, ServerRefused, UsageProblem
from service.cli.options import DEFAULT_URL, AsJson, Key, Url
from service.cli.output import emit, note

ROUTE = "/v1/chat/completions"
MANY_LAYERS = 5
"""Layers of a vector from which on a note says that one is mostly better."""


def parse_vector(text: str) -> dict[str, Any]:
    """``ID:STRENGTH[:LAYERS]`` as one entry of the wire's steering object; layers are ``12,13`` or ``4-7``."""
    pieces = text.split(":")
    if len(pieces) not in {2, 3} or not pieces[0]:
        raise UsageProblem(f"--vector {text!r}: write ID:STRENGTH or ID:STRENGTH:LAYERS, like vec_abc:1.5:16.")
    try:
        strength = float(pieces[1])
    except ValueError:
        raise UsageProblem(f"--vector {text!r}: the strength {pieces[1]!r} is no number; write one like 1.5.") from None
    try:
        term: dict[str, Any] = {"id": pieces[0], "strength": strength}
        if len(pieces) == 3:
            term["layers"] = parse_layers(pieces[2])
    except ValueError as error:
        raise UsageProblem(f"--vector {text!r}: {error}.") from error
    return term


def parse_layers(text: str) -> list[int]:
    """``12,13`` or ``4-7`` or both mixed.

    Args:
        text: what the user wrote.

    Returns:
        Block indices from 0, sorted.

    Raises:
        ValueError: the text names no layers.
    """
    layers: set[int] = set()
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"layers {text!r} are not numbers like 12,13 or 4-7")
        layers.update(range(int(first), int(last or first) + 1))
    if not layers:
        raise ValueError(f"layers {text!r} name none")
    return sorted(layers)


def chat(
    prompt: Annotated[str, typer.Argument(help="What to say; - reads it from stdin.", show_default=False)],
    model: Annotated[str, typer.Option("--model", "-m", help="Base model or ft:... id.", show_default=False)],
    system: Annotated[str | None, typer.Option("--system", help="System message.", show_default=False)] = None,
    vector: Annotated[
        list[str] | None,
        typer.Option("--vector", metavar="ID:STRENGTH[:LAYERS]", help="Steering; repeat to add.", show_default=False),
    ] = None,
    preserve_norm: Annotated[
        bool, typer.Option("--preserve-norm", help="Keep each activation's length while steering.")
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Longest answer.", show_default=False)
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", min=0.0, max=2.0, help="0 is greedy; 1 unless set.", show_default=False),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Same seed, same answer.", show_default=False)] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Ask a model and print its answer as it comes."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": sys.stdin.read() if prompt == "-" else prompt})
    optional = {"max_completion_tokens": max_tokens, "temperature": temperature, "seed": seed}
    body: dict[str, Any] = {"model": model, "messages": messages}
    body.update({name: value for name, value in optional.items() if value is not None})
    if vector:
        body["steering"] = {"vectors": [parse_vector(text) for text in vector], "preserve_norm": preserve_norm}
    elif preserve_norm:
        raise UsageProblem("--preserve-norm does nothing without --vector.")
    with Client(url, key) as client:
        if not as_json:
            for term in body.get("steering", {}).get("vectors", []):
                _warn_of_many_layers(client, term)
        if as_json:
            emit(client.post(ROUTE, body))
        else:
            _print_stream(client, body)


def _warn_of_many_layers(client: Client, term: dict[str, Any]) -> None:
    """A vector that was fitted on all layers pushes in each of them, and the sum is mostly babble."""
    if "layers" in term:
        return
    try:
        layers = client.get(f"/v1/steering/vectors/{segment(term['id'])}").get("layers") or []
    except CliError:
        return  # the request itself says what is wrong
    if len(layers) >= MANY_LAYERS:
        # A little behind the middle, where steering works in small models.
        one = f"{term['id']}:{term['strength']:g}:{layers[len(layers) * 11 // 20]}"
        note(f"({term['id']} steers all its {len(layers)} layers at once, which is mostly too much: try {one})")


def _print_stream(client: Client, body: dict[str, Any]) -> None:
    finish, receipt = None, None
    for event in client.events("POST", ROUTE, body={**body, "stream": True}):
        chunk = event.json()
        if chunk is None:
            continue
        if "error" in chunk:
            # The status was sent long ago: an error in the middle of an answer comes as an event.
            detail = chunk["error"]
            print(flush=True)
            raise ServerRefused(str(detail.get("message")), status=200, code=detail.get("code"))
        for choice in chunk.get("choices", []):
            print(choice.get("delta", {}).get("content") or "", end="", flush=True)
            finish = choice.get("finish_reason") or finish
            receipt = choice.get("steering") or receipt
    print(flush=True)
    if finish == "length":
        note("(cut off at the token limit: --max-tokens allows more)")
    if receipt:
        shift = receipt.get("mean_relative_shift") or 0.0
        note(
            f"(steered layers {receipt.get('layers')}, {receipt.get('tokens')} tokens, mean relative shift {shift:.3g})"
        )
