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
from typing import Any

import torch
from torch import Tensor, nn

from core.models.sites import blocks, site_modules
from steering.plan import Plan, SteeredRow, decode_phases, decode_plan, prefill_plan
from steering.shift import Shift, relative_shift
from steering.spec import Fused, Key, Receipt, RowSpec, SteeringError, Target, Term, fuse

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


class _Slot:
    """The hook of one module: `shift` is what to do next, `armed` whether the coming forward was announced."""

    def __init__(self, steering: Steering, key: Key, module: nn.Module) -> None:
        self.key = key
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
            return (self._steering._shifted(self.key, shift, output[0]), *output[1:])
        return self._steering._shifted(self.key, shift, output)


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
        self._steered: list[SteeredRow] = []
        self._devices: dict[Key, torch.device] = {}
        self._plan: Plan | None = None
        self._phases: tuple[int, ...] | None = None
        self._seen: dict[Key, tuple[Tensor, Tensor]] = {}  # decode: (h, steered h)
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
        if any(state is not None and state._steering is not self for state in states):
            raise ValueError("a row was opened in another steering scope; open it in this one")
        steered = [
            SteeredRow(row, state.fused, state.prompt_length, state.spec.preserve_norm)
            for row, state in enumerate(states)
            if state is not None
        ]
        needed = {key for row in steered for key in row.fused}
        for key in [key for key in self._slots if key not in needed]:
            self._slots.pop(key).handle.remove()
        for key in sorted(needed - self._slots.keys(), key=lambda key: (key[1], key[0])):
            self._slots[key] = _Slot(self, key, site_modules(self._model, key[0])[key[1]])
        for slot in self._slots.values():
            slot.armed = False
        layers = blocks(self._model) if steered else []
        self._devices = {key: next(layers[key[1]].parameters()).device for key in self._slots}
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
            phases = decode_phases(self._steered, position_ids, valid)
            if phases != self._phases or self._plan is None:
                self._phases, self._plan = phases, decode_plan(self._steered, self._devices, batch, phases)
        else:
            self._phases, self._plan = None, prefill_plan(self._steered, self._devices, position_ids, valid)
        shifts = self._plan.shifts
        for key, slot in self._slots.items():
            slot.shift = shifts.get(key)
            slot.armed = True

    def close(self) -> None:
        """Take every hook off; receipts stay readable."""
        for slot in self._slots.values():
            slot.handle.remove()
        self._slots.clear()
        self._settle()
        self._states, self._steered = [], []

    def _shifted(self, key: Key, shift: Shift, h: Tensor) -> Tensor:
        """Steer one layer's output, and keep what the receipts need."""
        plan = self._plan
        assert plan is not None
        if h.shape[:2] != plan.shape:
            raise RuntimeError(f"positions() announced {plan.shape}, the forward has {tuple(h.shape[:2])}")
        out = shift.apply(h)
        if plan.untouched is not None:
            self._seen[key] = (h.detach(), out.detach()) if h.requires_grad else (h, out)
        else:
            self._sums.append((shift, shift.sums(h.detach(), out.detach())))
        return out

    def _flush(self) -> None:
        """Count the last forward, if it was whole: a forward that failed half-way has steered nothing."""
        plan, seen, sums = self._plan, self._seen, self._sums
        if plan is None or not (seen or sums):
            return
        self._seen, self._sums = {}, []
        if len(seen) + len(sums) != len(plan.shifts):
            return
        if self._total is None:
            where = next(iter(self._devices.values()))
            self._total = torch.zeros(len(self._states), dtype=torch.float64, device=where)
        device = self._total.device
        if seen:
            assert plan.untouched is not None
            # In the plan's order, which need not be the order in which the modules ran.
            pairs = [seen[key] for key in plan.shifts]
            before, after = (torch.stack([pair[i].to(device) for pair in pairs]).squeeze(2) for i in (0, 1))
            self._total += relative_shift(before, after).masked_fill(plan.untouched.to(device), 0.0).sum(0)
        for shift, amount in sums:
            if shift.rows is None:
                self._total += amount.to(device)
            else:
                self._total.index_add_(0, shift.rows.to(device), amount.to(device))
        for row, gain in zip(self._steered, plan.gains, strict=True):
            state = self._states[row.row]
            assert state is not None
            state._layers |= gain.layers
            state._tokens += gain.tokens
            state._pairs += gain.pairs

    def _settle(self) -> None:
        """Bring the sums from the device into the rows' receipts."""
        self._flush()
        if self._total is None:
            return
        amounts = self._total.tolist()
        for amount, state in zip(amounts, self._states, strict=True):
            if state is not None:
                state._shift += amount
        self._total = None


@contextmanager
def steer(model: nn.Module, *, fingerprint: str) -> Iterator[Steering]:
    """Steer a model inside a `with` block; on the way out, by return or by error, every hook comes off.

    Args:
        model: A causal language model, or a PeftModel around one; one scope at a time.
        fingerprint: Of its base weights (`Loaded.fingerprint`).

    Yields:
        The scope, in which to `open` rows, set `rows`, announce `positions`, and run the model.

    Raises:
        RuntimeError: The model is being steered already.
    """
    anchor = blocks(model)[0]  # one module, whether the model comes bare or inside a PeftModel
    if anchor in _steered:
        raise RuntimeError("this model is being steered already; a second scope would steer it twice")
    steering = Steering(model, fingerprint)
    _steered.add(anchor)
    try:
        yield steering
    finally:
        _steered.discard(anchor)
        steering.close()
