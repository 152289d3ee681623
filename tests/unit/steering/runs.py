"""Two ways to run steered rows: the product's, in a left-padded batch, and the plainest, one row with forward hooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from core.models.load import Loaded
from core.models.sites import site_modules
from steering.apply import Receipt, RowSpec, RowState, steer


@dataclass
class Run:
    tokens: list[list[int]]  # per row, greedy
    logits: Tensor  # (B, steps, V): what each token was chosen from
    receipts: list[Receipt | None]


def run_batch(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    specs: Sequence[RowSpec | None],
    *,
    steps: int = 5,
    chunk: int | None = None,
    extra_padding: int = 0,
) -> Run:
    """Greedy decode of a left-padded batch with a DynamicCache; the prefill in chunks where asked."""
    width = max(map(len, prompts)) + extra_padding
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    places = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache(config=loaded.model.config)
    chosen: list[Tensor] = []
    logits: list[Tensor] = []
    with torch.inference_mode(), steer(loaded.model, fingerprint=loaded.fingerprint) as steering:
        states: list[RowState | None] = [
            None if spec is None else steering.open(spec, prompt_length=len(prompt))
            for spec, prompt in zip(specs, prompts, strict=True)
        ]
        for start in range(0, width, chunk or width):
            part = slice(start, min(start + (chunk or width), width))
            steering.rows(states)
            steering.positions(places[:, part], mask[:, part].bool())
            out = loaded.model(
                input_ids=ids[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=places[:, part],
                past_key_values=cache,
            )
        place = places[:, -1:]
        for step in range(steps):
            logits.append(out.logits[:, -1].clone())
            chosen.append(logits[-1].argmax(-1))
            if step + 1 == steps:
                break
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            place = place + 1
            steering.rows(states)
            steering.positions(place, torch.ones_like(place, dtype=torch.bool))
            out = loaded.model(
                input_ids=chosen[-1][:, None], attention_mask=mask, position_ids=place, past_key_values=cache
            )
        receipts = [None if state is None else state.receipt() for state in states]
    return Run(torch.stack(chosen, 1).tolist(), torch.stack(logits, 1), receipts)


def run_plain(
    loaded: Loaded, prompt: Sequence[int], spec: RowSpec | None, *, steps: int = 5
) -> tuple[Run, list[float]]:
    """Greedy decode of one row: no cache, no padding, the whole text again for each token, bare forward hooks.

    Gives also |dh| / |h| of each token and layer in the last forward.
    """
    shifts: list[float] = []
    handles = []
    keys = sorted({(t.vector.site, k) for t in spec.terms for k in (t.layers or t.vector.layers)}) if spec else []
    for site, layer in keys:
        assert spec is not None
        module = site_modules(loaded.model, site)[layer]
        handles.append(module.register_forward_hook(_plain_hook(spec, site, layer, len(prompt), shifts)))
    ids, rows = list(prompt), []
    try:
        for _ in range(steps):
            shifts.clear()
            with torch.inference_mode():
                rows.append(loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].clone())
            ids.append(int(rows[-1].argmax()))
    finally:
        for handle in handles:
            handle.remove()
    return Run([ids[len(prompt) :]], torch.stack(rows)[None], [None]), list(shifts)


def _plain_hook(spec: RowSpec, site: str, layer: int, prompt_length: int, shifts: list[float]) -> Any:
    def hook(module: Any, args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        new = h.clone()
        for place in range(h.shape[1]):
            phase = "prompt" if place < prompt_length else "generated"
            terms = [
                t
                for t in spec.terms
                if t.vector.site == site and layer in (t.layers or t.vector.layers) and t.positions in ("all", phase)
            ]
            for term in terms:
                new[0, place] += term.strength * term.vector.directions[layer].to(h.dtype)
            if terms:
                if spec.preserve_norm:
                    new[0, place] *= h[0, place].norm() / new[0, place].norm()
                shifts.append(float((new[0, place] - h[0, place]).norm() / h[0, place].norm()))
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook
