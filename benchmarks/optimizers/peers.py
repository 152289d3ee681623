"""Published implementations that install beside ours, over one matrix: GaLore's and APOLLO's own packages.

BAdam's has no place here: of one matrix it is AdamW or nothing. FRUGAL and DCT-AdamW are published without a package
that imports on a current torch without a GPU.
"""

from __future__ import annotations

import sys
import warnings
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import nn

from benchmarks.optimizers.steps import DECAY, NEVER, Arm, Make

PACKAGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "galore-torch": ("galore_torch", "GaLoreAdamW", {"scale": 0.25, "proj_type": "std"}),
    "apollo-torch": (
        "apollo_torch",
        "APOLLOAdamW",
        {"scale": 1.0, "proj_type": "std", "proj": "random", "scale_type": "channel"},
    ),
}
"""Package -> module, class, and settings of its group."""


def peers(rank: int) -> list[Arm]:
    """Those that can be imported here."""
    settings = {name: {**given, "rank": rank, "update_proj_gap": NEVER} for name, (_, _, given) in PACKAGES.items()}
    return [Arm(name, _over(kind, settings[name]), None, heavy=True) for name, kind in _importable().items()]


@cache
def _importable() -> dict[str, Any]:
    """Their classes; those that are missing are named on stderr, once."""
    found = {}
    for name, (module, kind, _) in PACKAGES.items():
        try:
            found[name] = getattr(import_module(module), kind)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
    return found


def _over(kind: Any, settings: dict[str, Any]) -> Make:
    def make(parameter: nn.Parameter) -> torch.optim.Optimizer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            made: torch.optim.Optimizer = kind([{"params": [parameter], **settings}], lr=1e-6, weight_decay=DECAY)
        return made

    return make
