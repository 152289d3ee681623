"""Support tickets of an invented shop into strict JSON: the data, the prompts, and the measure."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI

DATA = Path(__file__).parent / "data"
TRAIN, TEST = DATA / "tickets_train.jsonl", DATA / "tickets_test.jsonl"
SHOTS = (0, 40, 70)  # rows of the training file that the 3-shot prompt shows: one of three categories, both urgencies
MAX_TOKENS = 24

Messages = list[dict[str, str]]


def rows(path: Path) -> list[Messages]:
    """Chat rows of a JSONL file."""
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def exact_match(client: OpenAI, model: str, *, shots: bool = False) -> float:
    """Share of the held-out tickets whose answer parses as JSON and equals the wanted object, greedy decoding.

    Args:
        client: an ``openai`` client pointed at the server.
        model: a base or a fine-tuned model.
        shots: put three solved training tickets before each question.
    """
    held_out = rows(TEST)
    shown = [m for i in SHOTS for m in rows(TRAIN)[i][1:]] if shots else []

    def hit(messages: Messages) -> bool:
        system, question, wanted = messages
        answer = client.chat.completions.create(
            model=model, messages=[system, *shown, question], temperature=0, max_tokens=MAX_TOKENS
        )
        return parsed(answer.choices[0].message.content or "") == json.loads(wanted["content"])

    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(hit, held_out)) / len(held_out)


def parsed(text: str) -> object:
    """The JSON value of ``text``, or None where it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None
