"""Additive attention masks from positions: a token sees its own row's columns up to its own, or a window of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Families whose forward takes one mask per kind of layer; the others take one mask for all layers.
PER_KIND = frozenset({"qwen2", "qwen3", "gemma2", "gemma3", "gemma3_text", "smollm3"})


class Masks:
    """Masks as one model wants them.

    Args:
        config: the text model's configuration.
        dtype: of the hidden states.
    """

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        self._per_kind = config.model_type in PER_KIND
        self._kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) | {"full_attention"}
        self._window: int = getattr(config, "sliding_window", None) or 0  # 0: no layer has one
        if not self._window:
            self._kinds &= {"full_attention"}
        self._hidden = torch.finfo(dtype).min
        self._dtype = dtype

    def build(self, positions: Tensor, width: int) -> Tensor | dict[str, Tensor]:
        """Masks of one forward.

        Args:
            positions: (B, T) int64, absolute; what stands at padding does not matter, its result is not used.
            width: W, columns of the cache that attention sees.

        Returns:
            (B, 1, T, W) in the model's dtype, 0 where seen and the smallest number elsewhere; or one of these per kind.
        """
        columns = torch.arange(width, device=positions.device)
        seen = columns <= positions[:, None, :, None]
        if not self._per_kind:
            return self._additive(self._near(seen, columns, positions) if self._window else seen)
        masks = {"full_attention": self._additive(seen)}
        if "sliding_attention" in self._kinds:
            masks["sliding_attention"] = self._additive(self._near(seen, columns, positions))
        return masks

    def _near(self, seen: Tensor, columns: Tensor, positions: Tensor) -> Tensor:
        return seen & (columns > positions[:, None, :, None] - self._window)

    def _additive(self, seen: Tensor) -> Tensor:
        return torch.zeros(seen.shape, dtype=self._dtype, device=seen.device).masked_fill_(~seen, self._hidden)
