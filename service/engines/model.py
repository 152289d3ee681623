"""The one function between scheduler and model: (tokens, positions, cache, a spec for each row) -> logits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from core.data.chat import end_of_turn_id
from core.models.load import Loaded
from service.engines.adapters import Adapters
from service.engines.cache import RowCache
from service.engines.masks import Masks
from steering.apply import RowState, steer


@dataclass(frozen=True, slots=True)
class Row:
    """What is special about one row of a forward: its adapter's name in the model, its steering."""

    adapter: str | None = None
    steering: RowState | None = None


class TransformersModel:
    """A causal language model of transformers under the batch's contract; later decoders take this class's place.

    Args:
        loaded: the base, without an adapter.
        max_adapters: LoRA adapters held at once.
    """

    def __init__(self, loaded: Loaded, *, max_adapters: int = 8) -> None:
        self.loaded = loaded
        self.tokenizer = loaded.tokenizer
        self._model: Any = loaded.model
        text = self._model.config.get_text_config(decoder=True)
        self.layers: int = text.num_hidden_layers
        self.vocabulary: int = text.vocab_size
        self.context: int = text.max_position_embeddings
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        dtype = self._model.dtype
        self._device: torch.device = self._model.device
        self.token_bytes: int = 2 * self.layers * heads * size * dtype.itemsize
        self.eos = _eos(self._model, self.tokenizer)
        self.adapters = Adapters(loaded, limit=max_adapters)
        self._masks = Masks(text, dtype)
        self._scope = steer(self._model, fingerprint=loaded.fingerprint)
        self.steering = self._scope.__enter__()
        self.check()

    def close(self, error: BaseException | None = None, trace: TracebackType | None = None) -> None:
        """Take the steering hooks off."""
        self._scope.__exit__(type(error) if error else None, error, trace)

    def new_cache(self, rows: int = 1) -> RowCache:
        """An empty cache for this model."""
        cache = RowCache(self.layers, device=self._device)
        cache.add_rows(rows)
        return cache

    @torch.inference_mode()
    def logits(self, tokens: Sequence[Sequence[int]], cache: RowCache, rows: Sequence[Row], *, room: int = 0) -> Tensor:
        """Run one forward and store its keys and values.

        Args:
            tokens: the new tokens of each row; rows may differ in number, the input is padded on the left.
            cache: holds the rows' past; its rows and these are in the same order.
            rows: adapter and steering of each row.
            room: columns that the rows will need later on, so that the cache need not grow.

        Returns:
            (B, V) float32 on the CPU, the logits after each row's last token.
        """
        counts = [len(t) for t in tokens]
        steps = max(counts)
        width = cache.begin(counts, steps, room)
        if steps == 1:
            ids = torch.tensor(tokens)
            positions = torch.tensor(cache.lengths).unsqueeze(1)
            valid = torch.ones_like(positions, dtype=torch.bool)
        else:
            ids, positions, valid = _pad(tokens, cache.lengths, steps)
        self.steering.rows([row.steering for row in rows])
        self.steering.positions(positions, valid)
        self.adapters.names([row.adapter for row in rows])
        placed = positions.to(self._device)
        output = self._model(
            input_ids=ids.to(self._device),
            attention_mask=self._masks.build(placed, width),
            position_ids=placed,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.commit()
        last: Tensor = output.logits[:, -1]
        return last.float().cpu()

    @torch.inference_mode()
    def check(self) -> None:
        """Compare this path, in two chunks and a padded batch, with the model's own plain forward.

        Raises:
            ValueError: if they differ: the family needs masks or a cache that this engine does not know.
        """
        kind = self._model.config.model_type
        try:
            worst = self._difference()
        except (AttributeError, TypeError, RuntimeError, KeyError) as error:
            raise ValueError(f"this engine cannot run {kind!r} models: {error}") from error
        if not worst < (1e-3 if self._model.dtype == torch.float32 else 0.1):
            raise ValueError(f"this engine cannot run {kind!r} models: its logits are {worst:.1g} off the model's own")

    def _difference(self) -> float:
        """Largest difference between the two paths' logits, relative to the largest logit."""
        probe = [i % self.vocabulary for i in range(5, 12)]
        ids = torch.tensor([probe], device=self._device)
        plain = self._model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float().cpu()
        cache = self.new_cache(2)
        self.logits([probe[:2], probe[:4]], cache, [Row(), Row()])
        ours = self.logits([probe[2:], probe[4:]], cache, [Row(), Row()])
        scale = float(plain.abs().max()) or 1.0
        return float((ours - plain).abs().max()) / scale


def _pad(tokens: Sequence[Sequence[int]], lengths: Sequence[int], steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, absolute positions and validity, each (B, steps), padded on the left with 0."""
    ids = torch.zeros(len(tokens), steps, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    valid = torch.zeros_like(ids, dtype=torch.bool)
    for row, (new, past) in enumerate(zip(tokens, lengths, strict=True)):
        ids[row, steps - len(new) :] = torch.tensor(new)
        positions[row, steps - len(new) :] = torch.arange(past, past + len(new))
        valid[row, steps - len(new) :] = True
    return ids, positions, valid


def _eos(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: the generation config's, else the tokenizer's; and the template's end of a turn."""
    named = getattr(model.generation_config, "eos_token_id", None)
    if named is None:
        named = tokenizer.eos_token_id
    ids = {named} if isinstance(named, int) else set(named or [])
    if tokenizer.chat_template:
        with suppress(ValueError):
            ids.add(end_of_turn_id(tokenizer))
    return frozenset(ids)
