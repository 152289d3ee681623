"""Next-token loss that projects to the vocabulary only where a label is trained.

Legend: B batch, T tokens, D width, N trained positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.data.example import IGNORED


class TokenLoss(nn.Module):
    """Sum of the loss over the trained tokens of a batch, and how many of them the model ranks first.

    Equal to the naive implementation, which holds logits of shape (B, T, V)::

        logits_BTV = model(input_ids=input_ids).logits[:, :-1].float()
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")

    The rows are selected by a hook on the model's output head, so whatever the model does around its head (tied
    weights, logit soft-capping, scaling, an adapter on the head) happens as the model says. The hook acts only inside
    this module's forward; call ``detach()`` to remove it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._rows_BT: Tensor | None = None
        head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        self._hook = head.register_forward_pre_hook(self._select)

    def _select(self, head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        del head
        return None if self._rows_BT is None else (inputs[0][self._rows_BT], *inputs[1:])

    def forward(self, labels: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and hits of a batch.

        Args:
            labels: (B, T) int64; -100 is not trained. Position t is predicted from position t - 1.
            **inputs: ``input_ids`` (B, T) and the model's other inputs.

        Returns:
            Sum of the cross-entropy in nats over the N trained tokens, a float32 scalar (without gradients float64:
            differences of losses count); and the number of them whose most likely token is the label, an int64 scalar.
        """
        targets_BT = labels[:, 1:]
        trained_BT = targets_BT != IGNORED
        self._rows_BT = F.pad(trained_BT, (0, 1))
        try:
            logits_NV: Tensor = self.model(**inputs, use_cache=False).logits
        finally:
            self._rows_BT = None
        targets_N = targets_BT[trained_BT]
        if torch.is_grad_enabled():
            loss = F.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
        else:
            loss = F.cross_entropy(logits_NV.float(), targets_N, reduction="none").sum(dtype=torch.float64)
        hits = (logits_NV.detach().argmax(-1) == targets_N).sum()
        return loss, hits

    def detach(self) -> None:
        """Removes the hook from the model."""
        self._hook.remove()
