"""Bytes that an optimizer holds between steps, wherever it keeps them: in its state, its groups or a cache."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
from torch import Tensor


class Held:
    """Counts what came to live since it was made, but for parameters and their gradients.

    Make it before the optimizer and read it after a step, in a process where nothing else leaves tensors behind. What
    lives already is frozen, so that the collector neither lists it nor looks through it.
    """

    def __init__(self) -> None:
        gc.unfreeze()
        gc.collect()
        gc.freeze()

    def bytes(self, parameters: Iterable[Tensor]) -> int:
        """Bytes of storages that new tensors look at and that belong to no parameter or gradient, each counted once."""
        parameters = list(parameters)
        own = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
        theirs = {tensor.untyped_storage().data_ptr() for tensor in own}
        gc.collect()
        # By type, not isinstance: that would ask lazy modules of other packages for their class, and import them.
        tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
        stores = [tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta"]
        new = {store.data_ptr(): store.nbytes() for store in stores}
        return sum(size for pointer, size in new.items() if pointer not in theirs)


def state_bytes(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Bytes of all tensors in the optimizers' state, each storage once."""
    stores = {}
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    stores[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(stores.values())
