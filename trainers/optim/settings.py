"""Which settings of FRUGAL and GaLore are allowed, alone and together; without torch, for whoever judges requests."""

from __future__ import annotations

from typing import Any, Protocol

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
        whole(name, group[name])
    _check_betas(group["betas"])
    in_range("momentum", group["momentum"], low=0, high=1, open_high=True)
    if (group["density_end"] is None) != (group["decay_steps"] is None):
        raise ValueError("density_end and decay_steps go together: the density to reach, and the steps to get there")
    if group["density_end"] is not None:
        in_range("density_end", group["density_end"], low=0, high=1)
        whole("decay_steps", group["decay_steps"])
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
    if group["density"] == 0:
        raise ValueError("density 0 would train no matrix: GaLore drops what lies outside its subspace")
    whole("update_gap", group["update_gap"])
    if group["rank"] is not None:
        whole("rank", group["rank"])
    _check_betas(group["betas"])


class Basis(Protocol):
    """What the jobs of DCT-AdamW and Trion have in common."""

    @property
    def rank(self) -> int:
        """Basis vectors kept."""

    @property
    def density(self) -> float | None:
        """Share of them, instead."""

    @property
    def basis(self) -> str:
        """Where to look for them."""

    @property
    def learn_steps(self) -> int:
        """Steps that a learned one is made of."""

    @property
    def learn_gap(self) -> int:
        """Steps between two."""

    @property
    def weight_decay(self) -> float:
        """Decoupled."""

    @property
    def compat(self) -> str | None:
        """The published code's bases."""


def check_basis(config: Basis) -> None:
    """Checks what the jobs of DCT-AdamW and Trion have in common.

    Args:
        config: Of a job.

    Raises:
        ValueError: A setting is out of range, or does not go with another.
    """
    whole("rank", config.rank)
    if config.density is not None and not 0 < config.density <= 1:
        raise ValueError(f"density must be in (0, 1], not {config.density}")
    if not 1 <= config.learn_steps <= config.learn_gap:
        raise ValueError(f"learn_steps must be in [1, learn_gap], not {config.learn_steps}")
    in_range("weight_decay", config.weight_decay, low=0)
    if config.compat == "official" and config.basis != "dct":
        raise ValueError(f"compat official is for basis dct, not {config.basis}")


def basis_warnings(config: Basis) -> list[str]:
    """Settings of a job of DCT-AdamW or Trion that have no effect.

    Args:
        config: Of a job.

    Returns:
        One sentence each.
    """
    found = []
    if config.density is not None and config.rank != 256:
        found.append("rank has no effect beside density")
    if config.basis != "learned" and (config.learn_steps, config.learn_gap) != (10, 200):
        found.append("learn_steps and learn_gap have no effect unless basis is learned")
    return found


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


def whole(name: str, value: object) -> None:
    """Raises ``ValueError`` for a setting that counts something and is no whole number of at least 1.

    Args:
        name: Of the setting.
        value: As given.

    Raises:
        ValueError: It is less than 1, or not whole.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


def _one_of(name: str, value: object) -> None:
    if value not in _WORDS[name]:
        raise ValueError(f"{name} must be one of {', '.join(map(str, _WORDS[name]))}, not {value!r}")


def _check_betas(betas: tuple[float, float]) -> None:
    for number, beta in enumerate(betas):
        in_range(f"betas[{number}]", beta, low=0, high=1, open_high=True)
