"""Steering towards cheerful or gloomy answers, measured by counting words of two fixed lists."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from openai import OpenAI

DATA = Path(__file__).parent / "data"
PAIRS, PROMPTS = DATA / "mood_pairs.jsonl", DATA / "mood_prompts.txt"
# Layer and strength were chosen on twenty other prompts; these twenty were not looked at before.
LAYER, STRENGTH = 16, 1.5
MAX_TOKENS = 32

CHEERFUL = frozenset(
    "amazing beautiful best bright brilliant charming cheerful cozy delicious delight delightful enjoy enjoyed "
    "excellent fantastic fresh friendly fun gentle glad good gorgeous great happy hope hopeful joy kind love loved "
    "lovely loves magical peaceful perfect pleasant pleasure proud smile stunning sweet vibrant warm wonderful".split()
)
GLOOMY = frozenset(
    "afraid angry awful bad bitter boring broken cold cruel cry dangerous dark dead deadly death difficult dirty "
    "disaster dreadful fear filthy gloomy grim harsh hate hated hates hopeless horrible lonely lost miserable nasty "
    "nightmare pain painful poor rotten rude sad sick sorrow struggle suffer suffered suffering terrible tired "
    "trouble ugly weak worst".split()
)


def mood(text: str) -> int:
    """1 where cheerful words outnumber gloomy ones, -1 the other way round, 0 on a tie."""
    words = re.findall(r"[a-z]+", text.lower())
    balance = sum(w in CHEERFUL for w in words) - sum(w in GLOOMY for w in words)
    return (balance > 0) - (balance < 0)


def shift(client: OpenAI, model: str, vector: str | None, strength: float) -> tuple[float, str]:
    """Mean mood over the held-out prompts, from -1 (all gloomy) to 1 (all cheerful), and the first answer.

    Args:
        client: an ``openai`` client pointed at the server.
        model: the model to steer.
        vector: id of a steering vector, or None for no steering.
        strength: plain multiplier of the vector.
    """
    body = {"steering": {"vectors": [{"id": vector, "strength": strength, "layers": [LAYER]}]}} if vector else None

    def answer(prompt: str) -> str:
        made = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=MAX_TOKENS,
            extra_body=body,
        )
        return made.choices[0].message.content or ""

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(answer, PROMPTS.read_text(encoding="utf-8").splitlines()))
    return sum(map(mood, answers)) / len(answers), answers[0]


def fit(client: OpenAI, model: str) -> str:
    """Upload the pairs, fit a mean-difference vector as a job, wait for it, and return its id."""
    with PAIRS.open("rb") as handle:
        uploaded = client.files.create(file=handle, purpose="fine-tune")
    body = {"model": model, "training_file": uploaded.id, "method": "mean_difference", "layers": [LAYER]}
    vector = client.post("/steering/vectors", body=body, cast_to=dict[str, Any])
    while vector["status"] not in ("ready", "succeeded", "failed", "cancelled"):
        time.sleep(1)
        vector = client.get(f"/steering/vectors/{vector['id']}", cast_to=dict[str, Any])
    if vector["status"] not in ("ready", "succeeded"):
        raise SystemExit(f"The vector could not be fitted: {vector.get('error')}")
    return str(vector["id"])


def random_like(client: OpenAI, vector: str, seed: int) -> str:
    """Import the placebo: a seeded random vector whose norm at every layer equals that of ``vector``."""
    import torch

    from steering.vector import SteeringVector

    fitted = SteeringVector.from_bytes(client.get(f"/steering/vectors/{vector}/content", cast_to=bytes))
    draw = torch.Generator().manual_seed(seed)
    directions = {}
    for layer, direction in fitted.directions.items():
        noise = torch.randn(direction.shape, generator=draw)
        directions[layer] = noise * (direction.norm() / noise.norm())
    placebo = replace(fitted, directions=directions, method="random")
    made = client.post(
        "/steering/vectors/import",
        files={"file": ("random.safetensors", placebo.to_bytes())},
        options={"headers": {"Content-Type": "multipart/form-data"}},
        cast_to=dict[str, Any],
    )
    return str(made["id"])
