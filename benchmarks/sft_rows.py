"""Chat rows of mixed length for timing, built from the demo's own tickets: one to six turns, seeded."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

TICKETS = Path(__file__).parents[1] / "demo" / "data" / "tickets_train.jsonl"


def conversations(count: int, seed: int) -> list[list[dict[str, Any]]]:
    """Chats whose last answer alone is trained; earlier answers carry weight 0, so that every arm trains the same."""
    rows = [json.loads(line)["messages"] for line in TICKETS.read_text(encoding="utf-8").splitlines()]
    draw = random.Random(seed)
    chats = []
    for _ in range(count):
        turns = draw.sample(rows, draw.randint(1, 6))
        chat: list[dict[str, Any]] = [turns[0][0]]
        for index, (_, question, answer) in enumerate(turns):
            last = index == len(turns) - 1
            chat += [question, answer if last else {**answer, "weight": 0}]
        chats.append(chat)
    return chats


def write(path: Path, count: int, seed: int) -> None:
    """Write the rows as a training file."""
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in conversations(count, seed)), encoding="utf-8")
