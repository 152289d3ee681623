"""What every optimizer here shares: one parameter is stepped at a time, and loading keeps every tensor as it was."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from trainers.optim.fit import Fit, check_fit
from trainers.optim.tensors import sharded

COUNTERS = ("step", "refreshes", "since", "learn_step")
"""State that is read as numbers, and so stays on the CPU."""

_BESIDE_SETTINGS = {
    *("params", "param_names", "name", "names", "role"),
    *("initial_lr", "min_lr", "max_lr", "base_momentum", "max_momentum"),  # Of torch's schedulers.
}

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
        self._places: dict[Tensor, tuple[int, int]] = {}
        super().__init__(params, defaults)

    @abstractmethod
    def check(self, group: dict[str, Any]) -> None:
        """Checks the settings of a group.

        Args:
            group: All settings, defaults included.

        Raises:
            ValueError: A setting is out of range, or has no meaning beside another.
        """

    @abstractmethod
    def fit(self, parameter: Tensor, group: dict[str, Any]) -> Fit:
        """What the state of a parameter looks like.

        Args:
            parameter: That has been stepped.
            group: Its settings.

        Returns:
            Shapes of its state, and what has to be there.
        """

    @abstractmethod
    def update(self, parameter: Tensor, group: dict[str, Any], place: int) -> None:
        """Takes one step of one parameter, which has a gradient.

        Args:
            parameter: To be changed in place.
            group: Its settings.
            place: Its number among all parameters, the same on every process.
        """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group after checking its settings; see ``torch.optim.Optimizer.add_param_group``.

        Args:
            param_group: As torch takes it.

        Raises:
            ValueError: There is no such setting, or it is out of range.
        """
        for name in param_group:
            if name not in self.defaults and name not in _BESIDE_SETTINGS:
                near = get_close_matches(name, self.defaults, 1)
                raise ValueError(
                    f"{type(self).__name__} has no setting {name!r} for a group"
                    + (f"; did you mean {near[0]}?" if near else f": it has {', '.join(self.defaults)}")
                )
        self.check(self.defaults | param_group)
        super().add_param_group(param_group)
        self._forget()

    def place(self, parameter: Tensor) -> int:
        """A parameter's number among all parameters of all groups."""
        return self._find(parameter)[1]

    def group(self, parameter: Tensor) -> dict[str, Any]:
        """A parameter's group as it is now; loading a state replaces all groups by new ones."""
        return self.param_groups[self._find(parameter)[0]]

    def _find(self, parameter: Tensor) -> tuple[int, int]:
        if parameter not in self._places:
            everything = [(p, number) for number, group in enumerate(self.param_groups) for p in group["params"]]
            self._places = {p: (number, place) for place, (p, number) in enumerate(everything)}
        return self._places[parameter]

    def take(self, parameter: Tensor) -> None:
        """Takes one step of one parameter, which has a gradient, after checking what ``update`` relies on.

        Args:
            parameter: To be changed in place.

        Raises:
            ValueError: The gradient is sparse, the weights are complex, sharded other than by rows, or the state does
                not fit them.
        """
        sharded(parameter)
        if parameter.is_complex():
            raise ValueError(
                f"{type(self).__name__} takes no complex weights; give it torch.view_as_real of them as a parameter"
            )
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise ValueError(f"{type(self).__name__} takes no sparse gradients; give the embedding sparse=False")
        group = self.group(parameter)
        self._check_state(parameter, group)
        self.update(parameter, group, self.place(parameter))

    def _check_state(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state.get(parameter, {})
        if "step" in state:
            check_fit(parameter, state, self.fit(parameter, group))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step of every parameter that has a gradient.

        Args:
            closure: Computes the loss, with gradients on, before the step.

        Returns:
            What the closure returned, or None.
        """
        loss = loss_of(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.take(parameter)
        return loss

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` gave, bit for bit.

        torch's own loading casts all state to the parameter's dtype, which would spoil indices, 8-bit codes, and
        float32 moments of bfloat16 weights; here every tensor keeps its dtype and goes to the parameter's device, and
        the counters stay on the CPU.

        Args:
            state_dict: Of an optimizer with the same groups.

        Raises:
            ValueError: It does not fit the parameters; the optimizer is then as it was.
        """
        before = {"state": self.state, "param_groups": self.param_groups}
        super().load_state_dict({**state_dict, "state": {}})
        try:
            self._load(state_dict)
        except ValueError:
            self.__setstate__(before)
            raise

    def _load(self, state_dict: Mapping[str, Any]) -> None:
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for number, parameter in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    device = torch.device("cpu") if name in COUNTERS else parameter.device
                    value = value.detach().to(device, copy=True)
                self.state[parameter][name] = value
            self._check_state(parameter, self.group(parameter))

    def __setstate__(self, state: dict[str, Any]) -> None:  # Loading a state goes through here too.
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        """Drops what can be worked out again."""
        self._places = {}


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What a closure returns, computed with gradients on.

    Args:
        closure: Of ``step``, or None.

    Returns:
        The loss, or None.
    """
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
