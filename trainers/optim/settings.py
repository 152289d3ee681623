"""Which settings of FRUGAL and GaLore are allowed, alone and together; without torch, for whoever judges requests."""

from __future__ import annotations

from typing import Any

_WORDS = {
    "split": ("columns", "column_blocks", "rows", "randk", "block", "svd", "random"),
    "side": ("std", "reverse", "left", "right", "full"),
    "order": ("random", "ascending", "descending", "mirror"),
    "full": ("adamw", "lion", "sgdm"),
    "free": ("sign", "sgd", "none"),
    "state": ("reset", "keep", "project", "carry"),
    "select": ("random", "top"),
    "moments": ("float32", "int8"),
    "compat": (None, "official"),
    "role": ("projected", "full"),
}
_LINES = ("columns", "column_blocks", "rows")


def check_frugal(group: dict[str, Any]) -> None:
    """Checks the settings of a group of ``Frugal``.

    Args:
        group: All settings, defaults included.

    Raises:
        ValueError: A setting is out of range, or has no meaning beside another.
    """
    for name in _WORDS:
        _one_of(name, group[name])
    for name in ("lr", "weight_decay", "lr_scale", "free_lr_scale", "eps"):
        in_range(name, float(group[name]), low=0)
    in_range("density", group["density"], low=0, high=1)
    for name in ("update_gap", "block_columns"):
        in_range(name, group[name], low=1)
    _check_betas(group["betas"])
    in_range("momentum", group["momentum"], low=0, high=1, open_high=True)
    if (group["density_end"] is None) != (group["decay_steps"] is None):
        raise ValueError("density_end and decay_steps go together: the density to reach, and the steps to get there")
    if group["density_end"] is not None:
        in_range("density_end", group["density_end"], low=0, high=1)
        in_range("decay_steps", group["decay_steps"], low=1)
    split, state = group["split"], group["state"]
    if group["select"] == "top" and split not in _LINES:
        raise ValueError(f"select='top' picks among {', '.join(_LINES)}; split={split!r} has none")
    if state == "carry" and split not in _LINES:
        raise ValueError(f"state='carry' keeps an age a column or row; split={split!r} has none: use 'project'")
    if state != "reset" and split == "block":
        raise ValueError("split='block' drops the state of all its parameters at a refresh: use state='reset'")
    if group["stagger"] and split == "block":
        raise ValueError("split='block' changes all parameters of a group at once: stagger does not apply")
    if group["moments"] == "int8" and split == "block":
        raise ValueError("moments='int8' is for compact state; split='block' keeps whole tensors: use float32")


def check_galore(group: dict[str, Any]) -> None:
    """Checks the settings of a group of ``GaLore``.

    Args:
        group: All settings, defaults included.

    Raises:
        ValueError: A setting is out of range.
    """
    for name in ("side", "role"):
        _one_of(name, group[name])
    for name in ("lr", "scale", "weight_decay", "eps"):
        in_range(name, float(group[name]), low=0)
    in_range("density", group["density"], low=0, high=1)
    in_range("update_gap", group["update_gap"], low=1)
    if group["rank"] is not None:
        in_range("rank", group["rank"], low=1)
    _check_betas(group["betas"])


def in_range(name: str, value: float, *, low: float, high: float | None = None, open_high: bool = False) -> None:
    """Raises ``ValueError`` for a setting out of range.

    Args:
        name: Of the setting.
        value: As given.
        low: Smallest allowed value.
        high: Largest allowed value, or None.
        open_high: Whether ``high`` itself is not allowed.

    Raises:
        ValueError: The value is out of range or no number.
    """
    below = high is None or (value < high if open_high else value <= high)
    if not (value >= low and below):
        end = "" if high is None else f", {high}{')' if open_high else ']'}"
        wanted = f"at least {low}" if high is None else f"in [{low}{end}"
        raise ValueError(f"{name} must be {wanted}, not {value}")


def _one_of(name: str, value: object) -> None:
    if value not in _WORDS[name]:
        raise ValueError(f"{name} must be one of {', '.join(map(str, _WORDS[name]))}, not {value!r}")


def _check_betas(betas: tuple[float, float]) -> None:
    for number, beta in enumerate(betas):
        in_range(f"betas[{number}]", beta, low=0, high=1, open_high=True)
