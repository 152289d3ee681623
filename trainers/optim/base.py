"""What every optimizer here shares: one parameter is stepped at a time, and loading keeps every tensor as it was."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class LowMemoryOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer whose step is a loop over parameters, each with a clock of its own.

    A parameter without a gradient is passed over and may get its first gradient late. ``p.grad`` is never written to.
    """

    def __init__(self, params: Parameters, defaults: dict[str, Any]) -> None:
        """Keeps the groups.

        Args:
            params: Parameters, named parameters, or groups.
            defaults: Settings of every group that does not bring its own.
        """
        super().__init__(params, defaults)
        self._places: dict[Tensor, int] = {}

    @abstractmethod
    def update(self, parameter: Tensor, group: dict[str, Any], place: int) -> None:
        """Takes one step of one parameter, which has a gradient.

        Args:
            parameter: To be changed in place.
            group: Its settings.
            place: Its number among all parameters, the same on every process.
        """

    def place(self, parameter: Tensor) -> int:
        """A parameter's number among all parameters of all groups."""
        if parameter not in self._places:
            everything = [p for group in self.param_groups for p in group["params"]]
            self._places = {p: number for number, p in enumerate(everything)}
        return self._places[parameter]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step of every parameter that has a gradient.

        Args:
            closure: Computes the loss, with gradients on, before the step.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if parameter.grad.is_sparse:
                        raise ValueError(
                            f"{type(self).__name__} takes no sparse gradients; give the embedding sparse=False"
                        )
                    self.update(parameter, group, self.place(parameter))
        return loss

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` gave, bit for bit.

        torch's own loading casts all state to the parameter's dtype, which would spoil indices, 8-bit codes, and
        float32 moments of bfloat16 weights; here every tensor keeps its dtype and goes to the parameter's device, and
        the counters stay on the CPU.

        Args:
            state_dict: Of an optimizer with the same groups.
        """
        super().load_state_dict({**state_dict, "state": {}})
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for number, parameter in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    device = torch.device("cpu") if value.dim() == 0 else parameter.device
                    value = value.detach().to(device, copy=True)
                self.state[parameter][name] = value

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._places = {}
