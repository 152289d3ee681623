"""What one hooked layer does in one forward, as tensors: no Python work is left for the hook but one or two kernels.

B batch, K steered rows of a layer, T tokens of the forward, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steering.spec import Fused

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Shift:
    """The change of one layer's output in one forward."""

    rows: Tensor | None
    """(K,) int64, the batch rows that are steered here; None: every row."""
    delta: Tensor
    """(K, 1, D) float32 in a decode step, else (K, 3, D): one delta per phase."""
    phase: Tensor | None
    """(K, T) int64 phases of the tokens; None in a decode step, whose delta is already chosen."""
    touched: Tensor
    """(K, T) bool: tokens that the delta changes."""
    restore: bool
    """Whether the norm of some tokens is restored."""
    keep: Tensor | None
    """(K, T, 1) bool: those tokens; None: all, or none without `restore`."""

    def apply(self, h: Tensor) -> Tensor:
        """Steer a layer's output.

        The sum is taken in float32 (or wider) and rounded once to the dtype of `h`. Rows that are not in `rows` are
        copied, so they keep every bit.

        Args:
            h: (B, T, D), any floating dtype; not changed.

        Returns:
            (B, T, D) of the same dtype.
        """
        delta = self.delta
        if self.phase is not None:
            delta = delta.gather(1, self.phase.unsqueeze(2).expand(-1, -1, delta.shape[2]))
        if not self.restore and h.dtype is torch.float32:
            return h + delta if self.rows is None else h.index_add(0, self.rows, delta)
        x = h if self.rows is None else h.index_select(0, self.rows)
        x = x.to(torch.promote_types(h.dtype, torch.float32))
        y = x + delta
        if self.restore:
            scale = _norm(x) / _norm(y).clamp_min(_TINY)
            y = y * (scale if self.keep is None else torch.where(self.keep, scale, 1.0))
        y = y.to(h.dtype)
        return y if self.rows is None else h.index_copy(0, self.rows, y)

    def sums(self, before: Tensor, after: Tensor) -> Tensor:
        """Sum |dh| / |h| over the touched tokens of each row.

        Args:
            before: (B, T, D), the layer's output.
            after: (B, T, D), the steered output.

        Returns:
            (K,) float64.
        """
        if self.rows is not None:
            before, after = before.index_select(0, self.rows), after.index_select(0, self.rows)
        ratio = relative_shift(before, after)
        return torch.where(self.touched, ratio, torch.zeros_like(ratio)).sum(1, dtype=torch.float64)


def relative_shift(before: Tensor, after: Tensor) -> Tensor:
    """Measure |after - before| / |before| over the last dimension: differences in float32, norms in float64.

    The square of a float32 overflows float32 from 1.8e19 on; in float64 none does.

    Args:
        before: (..., D).
        after: (..., D).

    Returns:
        (...) float64; where `before` is zero, it counts as float32's smallest normal number.
    """
    before = before.float()
    ratio = torch.linalg.vector_norm(after.float() - before, dim=-1, dtype=torch.float64)
    shift: Tensor = ratio / torch.linalg.vector_norm(before, dim=-1, dtype=torch.float64).clamp_min(_TINY)
    return shift


def decode_shift(rows: Sequence[int], batch: int, fused: Sequence[Fused], phases: Sequence[int], keep: Sequence[bool],
                 device: torch.device) -> Shift:  # fmt: skip
    """Build the shift of a one-token forward.

    Args:
        rows: Batch rows that are touched, K of them.
        batch: B.
        fused: Their deltas at this layer.
        phases: The phase of each row's token.
        keep: Whether each row restores norms.
        device: Where the layer's output lies.

    Returns:
        The shift, with deltas (K, 1, D).
    """
    delta = torch.stack([f.table[phase] for f, phase in zip(fused, phases, strict=True)]).unsqueeze(1)
    some = torch.tensor(keep, device=device).reshape(-1, 1, 1) if any(keep) and not all(keep) else None
    touched = torch.ones(len(rows), 1, dtype=torch.bool, device=device)
    return Shift(_index(rows, batch, device), delta.to(device), None, touched, any(keep), some)


def prefill_shift(rows: Sequence[int], batch: int, fused: Sequence[Fused], phase: Tensor, keep: Sequence[bool],
                  device: torch.device) -> Shift:  # fmt: skip
    """Build the shift of a forward of several tokens a row.

    Args:
        rows: Batch rows that may be touched, K of them.
        batch: B.
        fused: Their deltas at this layer.
        phase: (K, T) int64 phases of their tokens.
        keep: Whether each row restores norms.
        device: Where the layer's output lies.

    Returns:
        The shift, with deltas (K, 3, D).
    """
    phase = phase.to(device)
    table = torch.stack([f.table for f in fused]).to(device)
    touched = torch.tensor([f.active for f in fused], device=device).gather(1, phase)
    some = (touched & torch.tensor(keep, device=device).unsqueeze(1)).unsqueeze(2) if any(keep) else None
    return Shift(_index(rows, batch, device), table, phase, touched, any(keep), some)


def _index(rows: Sequence[int], batch: int, device: torch.device) -> Tensor | None:
    return None if len(rows) == batch else torch.tensor(rows, dtype=torch.int64, device=device)


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm
