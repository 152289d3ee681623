"""See what a vector does: greedy continuations of prompts, some steered and some not, in one batch.

Plain and short, for the command line and for experiments; the service's engine is the fast way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from core.models.load import Loaded
from steering.apply import Receipt, RowSpec, steer


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model says after one prompt."""

    tokens: list[int]
    """Token ids, without the one that ended it."""
    text: str
    receipt: Receipt | None
    """None where the row was not steered."""


@torch.no_grad()
def preview(
    loaded: Loaded, rows: Sequence[tuple[Sequence[int], RowSpec | None]], *, max_tokens: int, stop: Sequence[int] = ()
) -> list[Continuation]:
    """Continue prompts greedily.

    Args:
        loaded: The model, in eval mode.
        rows: A prompt's token ids (at least one) and what steers it; None: nothing.
        max_tokens: Most tokens a row.
        stop: Token ids that end a row, besides the model's own.

    Returns:
        One continuation a row, in order.

    Raises:
        SteeringError: A spec that cannot be met.
        ValueError: No row, an empty prompt, or `max_tokens` below 1.
    """
    if not rows or max_tokens < 1 or not all(prompt for prompt, _ in rows):
        raise ValueError("give at least one prompt, none empty, and max_tokens of at least 1")
    device = next(loaded.model.parameters()).device
    width = max(len(prompt) for prompt, _ in rows)
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt, _ in rows])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in rows])
    places = (mask.cumsum(1) - 1).clamp_min(0)
    ends = {*stop, *_ends(loaded)}
    tokens: list[list[int]] = [[] for _ in rows]
    live = [True] * len(rows)
    cache = DynamicCache(config=loaded.model.config)
    with steer(loaded.model, fingerprint=loaded.fingerprint) as steering:
        states = [
            None if spec is None else steering.open(spec, prompt_length=len(prompt), max_tokens=max_tokens)
            for prompt, spec in rows
        ]
        steering.rows(states)
        valid = mask.bool()
        while True:
            steering.positions(places, valid)
            logits: Tensor = loaded.model(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                position_ids=places.to(device),
                past_key_values=cache,
                logits_to_keep=1,
            ).logits
            for row, token in enumerate(logits[:, -1].argmax(-1).tolist()):
                live[row] = live[row] and token not in ends
                if live[row]:
                    tokens[row].append(token)
                    live[row] = len(tokens[row]) < max_tokens
            if not any(live):
                break
            ids = torch.tensor([[own[-1] if own else 0] for own in tokens])
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            places = places[:, -1:] + 1
            valid = torch.tensor(live).unsqueeze(1)
        receipts = [None if state is None else state.receipt() for state in states]
    texts = [str(loaded.tokenizer.decode(own, skip_special_tokens=True)) for own in tokens]
    return [Continuation(*made) for made in zip(tokens, texts, receipts, strict=True)]


def _ends(loaded: Loaded) -> list[int]:
    """Give the tokens that end a text by the model's own settings."""
    ends = loaded.model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
