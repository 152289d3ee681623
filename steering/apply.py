"""Steer some rows of a batch while a model runs: `with steer(model, fingerprint=...) as steering:`.

A row is opened once (`open` checks its spec and fuses it), put into the batch's composition (`rows`), and each forward
is announced with absolute positions (`positions`), so padding, chunked prefill and a KV cache mean nothing special.
Hooks sit only on the layers that a row of the present composition steers, and always come off again.
Not covered: packed batches, and a module that runs twice in one forward.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.models.sites import blocks, site_modules
from steering.plan import Shift, decode_shift, prefill_shift, relative_shift
from steering.spec import GENERATED, NEITHER, PROMPT, Fused, Key, Receipt, RowSpec, SteeringError, Target, Term, fuse

__all__ = ["Receipt", "RowSpec", "RowState", "Steering", "SteeringError", "Term", "steer"]

_steered: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class RowState:
    """One row's steering: its fused deltas, and what they have done so far. Made by `Steering.open`."""

    def __init__(self, steering: Steering, spec: RowSpec, fused: dict[Key, Fused], prompt_length: int) -> None:
        """Start with nothing touched.

        Args:
            steering: The scope that the row lives in.
            spec: What was asked.
            fused: (site, layer) -> deltas.
            prompt_length: Tokens of the row's prompt; positions below it are in the prompt.
        """
        self.spec = spec
        self.fused = fused
        self.prompt_length = prompt_length
        self._steering = steering
        self._layers: set[int] = set()
        self._tokens = 0
        self._pairs = 0
        self._shift = 0.0

    def receipt(self) -> Receipt:
        """Say what was done to this row up to the last whole forward."""
        self._steering._settle()
        mean = self._shift / self._pairs if self._pairs else 0.0
        return Receipt(tuple(sorted(self._layers)), self._tokens, mean)


@dataclass(slots=True)
class _Gain:
    """What one forward adds to a row's receipt."""

    state: RowState
    layers: set[int]
    tokens: int
    pairs: int


@dataclass(slots=True)
class _Plan:
    """One forward: the shift of every hooked layer, and what it adds to the receipts."""

    shape: tuple[int, int]
    """(B, T)."""
    shifts: dict[Key, Shift]
    gains: list[_Gain]
    touched: Tensor | None
    """(layers, B) bool in a decode step: which rows are touched; None otherwise."""


class _Slot:
    """The hook of one module: `shift` is what to do next, `armed` whether the coming forward was announced."""

    def __init__(self, steering: Steering, module: nn.Module) -> None:
        self.armed = False
        self.shift: Shift | None = None
        self._steering = steering
        self.handle = module.register_forward_hook(self)

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        if not self.armed:
            raise RuntimeError("a forward ran unannounced: call positions() before each forward of a steered batch")
        self.armed = False
        shift = self.shift
        if shift is None:
            return None
        if isinstance(output, tuple):
            return (self._steering._shifted(shift, output[0]), *output[1:])
        return self._steering._shifted(shift, output)


class Steering:
    """The scope in which a model is steered; made by `steer`."""

    def __init__(self, model: nn.Module, fingerprint: str) -> None:
        """Look at the model; change nothing yet.

        Args:
            model: A causal language model, or a PeftModel around one.
            fingerprint: Of its base weights; vectors of others are refused.
        """
        self._model = model
        dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
        self.target = Target(
            fingerprint=fingerprint,
            layers=len(blocks(model)),
            width=int(model.get_input_embeddings().embedding_dim),  # type: ignore[operator]
            largest=torch.finfo(dtypes[0]).max,
        )
        self._slots: dict[Key, _Slot] = {}
        self._states: list[RowState | None] = []
        self._steered: list[tuple[int, RowState]] = []
        self._plan: _Plan | None = None
        self._phases: tuple[int, ...] | None = None
        self._seen: list[tuple[Tensor, Tensor]] = []  # decode: (h, steered h) of each layer
        self._sums: list[tuple[Shift, Tensor]] = []  # prefill: (K,) sums of each layer
        self._total: Tensor | None = None  # (B,) float64: sums of |dh| / |h| since the composition changed

    def open(self, spec: RowSpec, *, prompt_length: int, max_tokens: int | None = None) -> RowState:
        """Check a row's spec and fuse it; nothing is hooked yet.

        Args:
            spec: What to add, where.
            prompt_length: Tokens of the row's prompt, padding not counted.
            max_tokens: Most tokens that the row may generate, where known.

        Returns:
            The row's state, to be given to `rows`.

        Raises:
            SteeringError: The spec does not fit the model, or can touch nothing.
        """
        return RowState(self, spec, fuse(spec, self.target, max_tokens=max_tokens), prompt_length)

    def rows(self, states: Sequence[RowState | None]) -> None:
        """Set the batch's composition; cheap when nothing changed, so it may be called before every forward.

        Args:
            states: One entry per batch row; None: not steered.
        """
        if len(states) == len(self._states) and all(a is b for a, b in zip(states, self._states, strict=True)):
            return
        self._settle()
        self._states, self._steered, self._plan, self._phases = [], [], None, None
        steered = [(row, state) for row, state in enumerate(states) if state is not None]
        if any(state._steering is not self for _, state in steered):
            raise ValueError("a row was opened in another steering scope; open it in this one")
        needed = {key for _, state in steered for key in state.fused}
        for key in [key for key in self._slots if key not in needed]:
            self._slots.pop(key).handle.remove()
        for key in sorted(needed - self._slots.keys(), key=lambda key: (key[1], key[0])):
            self._slots[key] = _Slot(self, site_modules(self._model, key[0])[key[1]])
        for slot in self._slots.values():
            slot.armed = False
        self._states, self._steered = list(states), steered

    def positions(self, position_ids: Tensor, valid: Tensor) -> None:
        """Announce the coming forward. Tensors on the CPU cost no device synchronisation.

        Args:
            position_ids: (B, T) int, absolute positions in each row: 0 is its first real token.
            valid: (B, T) bool, False on padding and in rows that do not take part.

        Raises:
            ValueError: Another batch size than `rows` was given.
        """
        if not self._steered:
            return
        self._flush()
        batch, length = position_ids.shape
        if batch != len(self._states) or valid.shape != position_ids.shape:
            raise ValueError(f"rows() was given {len(self._states)} rows, positions() {tuple(position_ids.shape)}")
        if length == 1:
            places, real = position_ids[:, 0].tolist(), valid[:, 0].tolist()
            phases = tuple(
                NEITHER if not real[row] else PROMPT if places[row] < state.prompt_length else GENERATED
                for row, state in self._steered
            )
            if phases != self._phases:
                self._phases, self._plan = phases, self._decode_plan(batch, phases)
        else:
            self._phases, self._plan = None, self._prefill_plan(position_ids, valid)
        plan = self._plan
        assert plan is not None
        for key, slot in self._slots.items():
            slot.shift = plan.shifts.get(key)
            slot.armed = True

    def close(self) -> None:
        """Take every hook off; receipts stay readable."""
        for slot in self._slots.values():
            slot.handle.remove()
        self._slots.clear()
        self._settle()
        self._states, self._steered = [], []

    def _device(self, key: Key) -> torch.device:
        """Give the device of a layer; its output lies there."""
        return next(blocks(self._model)[key[1]].parameters()).device

    def _decode_plan(self, batch: int, phases: tuple[int, ...]) -> _Plan:
        shifts: dict[Key, Shift] = {}
        gains = [_Gain(state, set(), 0, 0) for _, state in self._steered]
        touched = []
        for key in self._slots:
            hit = [
                (index, row, state.fused[key])
                for index, (row, state) in enumerate(self._steered)
                if key in state.fused and state.fused[key].active[phases[index]]
            ]
            if not hit:
                continue
            rows = [row for _, row, _ in hit]
            keep = [self._steered[index][1].spec.preserve_norm for index, _, _ in hit]
            fused = [f for _, _, f in hit]
            shifts[key] = decode_shift(rows, batch, fused, [phases[i] for i, _, _ in hit], keep, self._device(key))
            touched.append([row in rows for row in range(batch)])
            for index, _, _ in hit:
                gains[index].layers.add(key[1])
                gains[index].tokens = 1
                gains[index].pairs += 1
        return _Plan((batch, 1), shifts, [g for g in gains if g.pairs], torch.tensor(touched) if touched else None)

    def _prefill_plan(self, position_ids: Tensor, valid: Tensor) -> _Plan:
        batch, length = position_ids.shape
        chosen = torch.tensor([row for row, _ in self._steered], device=position_ids.device)
        lengths = torch.tensor([[state.prompt_length] for _, state in self._steered], device=position_ids.device)
        phase = (position_ids[chosen] >= lengths).long().masked_fill(~valid[chosen].bool(), NEITHER)  # (S, T)
        counts = torch.stack([(phase == p).sum(1) for p in (PROMPT, GENERATED)], 1).tolist()
        shifts: dict[Key, Shift] = {}
        gains = [_Gain(state, set(), 0, 0) for _, state in self._steered]
        alive = [[False, False] for _ in self._steered]
        for key in self._slots:
            hit = []
            for index, (row, state) in enumerate(self._steered):
                present = [
                    p
                    for p in (PROMPT, GENERATED)
                    if key in state.fused and state.fused[key].active[p] and counts[index][p]
                ]
                for p in present:
                    gains[index].layers.add(key[1])
                    gains[index].pairs += counts[index][p]
                    alive[index][p] = True
                if present:
                    hit.append((index, row, state))
            if hit:
                rows, keep = [row for _, row, _ in hit], [state.spec.preserve_norm for _, _, state in hit]
                fused = [state.fused[key] for _, _, state in hit]
                own = phase if len(hit) == len(self._steered) else phase[[index for index, _, _ in hit]]
                shifts[key] = prefill_shift(rows, batch, fused, own, keep, self._device(key))
        for gain, count, live in zip(gains, counts, alive, strict=True):
            gain.tokens = sum(number for number, on in zip(count, live, strict=True) if on)
        return _Plan((batch, length), shifts, [g for g in gains if g.pairs], None)

    def _shifted(self, shift: Shift, h: Tensor) -> Tensor:
        """Steer one layer's output, and keep what the receipts need."""
        plan = self._plan
        assert plan is not None
        if h.shape[:2] != plan.shape:
            raise RuntimeError(f"positions() announced {plan.shape}, the forward has {tuple(h.shape[:2])}")
        out = shift.apply(h)
        if plan.touched is not None:
            self._seen.append((h.detach(), out.detach()) if h.requires_grad else (h, out))
        else:
            self._sums.append((shift, shift.sums(h.detach(), out.detach())))
        return out

    def _flush(self) -> None:
        """Count the last forward, if it was whole: a forward that failed half-way has steered nothing."""
        plan, seen, sums = self._plan, self._seen, self._sums
        if plan is None or not (seen or sums):
            return
        self._seen, self._sums = [], []
        if len(seen) + len(sums) != len(plan.shifts):
            return
        device = (seen[0][0] if seen else sums[0][1]).device
        if self._total is None:
            self._total = torch.zeros(len(self._states), dtype=torch.float64, device=device)
        if seen:
            assert plan.touched is not None
            before, after = (torch.stack([pair[i][:, 0].to(device) for pair in seen]) for i in (0, 1))
            plan.touched = plan.touched.to(device)
            self._total += relative_shift(before, after).masked_fill(~plan.touched, 0.0).sum(0)
        for shift, amount in sums:
            if shift.rows is None:
                self._total += amount.to(device)
            else:
                self._total.index_add_(0, shift.rows.to(device), amount.to(device))
        for gain in plan.gains:
            gain.state._layers |= gain.layers
            gain.state._tokens += gain.tokens
            gain.state._pairs += gain.pairs

    def _settle(self) -> None:
        """Bring the sums from the device into the rows' receipts."""
        self._flush()
        if self._total is None:
            return
        amounts = self._total.tolist()
        for row, state in self._steered:
            state._shift += amounts[row]
        self._total = None


@contextmanager
def steer(model: nn.Module, *, fingerprint: str) -> Iterator[Steering]:
    """Steer a model inside a `with` block; on the way out, by return or by error, every hook comes off.

    Args:
        model: A causal language model, or a PeftModel around one; one scope at a time.
        fingerprint: Of its base weights (`Loaded.fingerprint`).

    Yields:
        The scope: `open` rows, set `rows`, announce `positions`, run the model.

    Raises:
        RuntimeError: The model is being steered already.
    """
    if model in _steered:
        raise RuntimeError("this model is being steered already; a second scope would steer it twice")
    steering = Steering(model, fingerprint)
    _steered.add(model)
    try:
        yield steering
    finally:
        _steered.discard(model)
        steering.close()
