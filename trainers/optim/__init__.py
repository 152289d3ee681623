"""Optimizers that need little memory, for anyone's own training loop: torch is all that they import.

Names are imported when they are asked for, so that settings can be checked where there is no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainers.optim.dct_adamw import DctAdamW as DctAdamW
    from trainers.optim.frugal import Frugal as Frugal
    from trainers.optim.galore import GaLore as GaLore
    from trainers.optim.parameters import split_parameters as split_parameters
    from trainers.optim.qzo import Qzo as Qzo
    from trainers.optim.release import release_gradients as release_gradients
    from trainers.optim.trion import Trion as Trion

_HOMES = {
    "DctAdamW": "dct_adamw",
    "Frugal": "frugal",
    "GaLore": "galore",
    "Qzo": "qzo",
    "Trion": "trion",
    "release_gradients": "release",
    "split_parameters": "parameters",
}

__all__ = ["DctAdamW", "Frugal", "GaLore", "Qzo", "Trion", "release_gradients", "split_parameters"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
