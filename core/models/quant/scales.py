"""The scales of a quantised model on their own: what tuning them changes, and which codes they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.models import manifest, policy
from core.models.headers import read_safetensors_header
from core.models.lock import appearing
from core.models.quant.linear import QuantLinear

FORMAT = "gradhelm-scales/1"
SCALES, SETTINGS = "scales.safetensors", "scales.json"
FROZEN = ("codes", "table", "zeros", "constants", "order", "bias", "fixed")


def identity(layers: Mapping[str, QuantLinear]) -> str:
    """Identifies everything of quantised layers but their scales, so that scales never meet other codes.

    Args:
        layers: by their full names.

    Returns:
        ``sha256:`` and 64 hexadecimal digits; the same on every device.
    """
    made = hashlib.sha256()
    for name, layer in sorted(layers.items()):
        made.update(json.dumps([name, layer.scheme, layer.group, layer.in_features, layer.out_features]).encode())
        for part in FROZEN:
            if (tensor := getattr(layer, part)) is not None:
                _add(made, part, tensor)
    return f"sha256:{made.hexdigest()}"


def digest(layers: Mapping[str, QuantLinear]) -> str:
    """The SHA-256 of the layers' scales, names and shapes included: ``sha256:`` and 64 hexadecimal digits."""
    made = hashlib.sha256()
    for name, layer in sorted(layers.items()):
        _add(made, name, layer.scales)
    return f"sha256:{made.hexdigest()}"


def describe(layers: Mapping[str, QuantLinear]) -> dict[str, Any]:
    """How the layers were quantised, as plain JSON.

    Args:
        layers: by their full names; at least one.

    Returns:
        ``scheme`` and ``group`` (each ``mixed`` where layers differ) and ``identity``. With a scheme of
        :func:`core.models.quant.quantise.quantise` the base's floats give the same codes again.
    """
    schemes, groups = {layer.scheme for layer in layers.values()}, {layer.group for layer in layers.values()}
    return {
        "scheme": schemes.pop() if len(schemes) == 1 else "mixed",
        "group": groups.pop() if len(groups) == 1 else "mixed",
        "identity": identity(layers),
    }


def save_scales(layers: Mapping[str, QuantLinear], directory: Path, *, card: Mapping[str, Any]) -> Path:
    """Saves the scales alone, as an artifact: less than a fifth of the codes' size.

    Args:
        layers: by their full names.
        directory: where they go; a directory of that name is replaced once the new one is complete.
        card: what is known about them, plain JSON; ``base``, the base model's reference, and ``base_fingerprint`` are
            required.

    Returns:
        ``directory``: ``scales.safetensors``, ``scales.json`` (quantiser, base's fingerprint, digest of the scales),
        ``README.md`` and ``manifest.json``.

    Raises:
        ValueError: if the card lacks the base, there are no layers, or a scale is not finite.
    """
    from safetensors.torch import save_file

    base, known = card.get("base"), card.get("base_fingerprint")
    if not isinstance(base, str) or not base or not isinstance(known, str) or not known:
        raise ValueError("the card must name the base model under 'base' and its weights under 'base_fingerprint'")
    if not layers:
        raise ValueError("the model has no quantised layers, so there are no scales to save")
    for name, layer in layers.items():
        if not bool(torch.isfinite(layer.scales).all()):
            raise ValueError(f"{name} has scales that are not finite; they will not be saved")
    settings = {
        "format": FORMAT,
        "base": base,
        "base_fingerprint": known,
        "quantiser": describe(layers),
        "digest": digest(layers),
    }
    with appearing(directory) as fresh:
        tensors = {name: layer.scales.detach().cpu().contiguous() for name, layer in layers.items()}
        save_file(tensors, fresh / SCALES, metadata={"format": "pt"})
        (fresh / SCALES).chmod(0o644)
        (fresh / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        manifest.write(fresh, kind="scales", base=base, base_fingerprint=known, fingerprint=None, card=card)
    return directory


def load_scales(layers: Mapping[str, QuantLinear], directory: Path, *, base_fingerprint: str) -> dict[str, Any]:
    """Puts saved scales into layers of the same codes, in place and bitwise.

    Args:
        layers: by their full names.
        directory: what :func:`save_scales` wrote.
        base_fingerprint: identity of the base that the layers belong to.

    Returns:
        What ``scales.json`` says.

    Raises:
        ValueError: if the files are not whole, or belong to another base or to other codes; the layers are unchanged.
    """
    from safetensors.torch import load_file

    settings = policy.read_json(directory / SETTINGS) if (directory / SETTINGS).is_file() else {}
    if settings.get("format") != FORMAT or not (directory / SCALES).is_file():
        raise ValueError(f"{directory} does not hold scales in the format {FORMAT}")
    if settings.get("base_fingerprint") != base_fingerprint:
        raise ValueError(f"the scales belong to the base {settings.get('base_fingerprint')}, not to {base_fingerprint}")
    quantiser, own = settings.get("quantiser"), describe(layers)
    if quantiser != own:
        raise ValueError(f"the scales belong to other codes than the model's: {quantiser!r:.300}, not {own!r}")
    read_safetensors_header(directory / SCALES)
    saved = load_file(directory / SCALES)
    if saved.keys() != layers.keys():
        raise ValueError(f"the scales are those of {len(saved)} layers, not of the model's {len(layers)}")
    for name, layer in layers.items():
        if saved[name].shape != layer.scales.shape or saved[name].dtype != torch.float32:
            raise ValueError(
                f"the scales of {name} are not the model's: {tuple(saved[name].shape)} {saved[name].dtype}"
            )
    made = hashlib.sha256()
    for name in sorted(saved):
        _add(made, name, saved[name])
    if settings.get("digest") != f"sha256:{made.hexdigest()}":
        raise ValueError(f"{directory / SCALES} has changed since it was written")
    with torch.no_grad():
        for name, layer in layers.items():
            layer.scales.copy_(saved[name])
    return settings


def _add(made: Any, name: str, tensor: Tensor) -> None:
    """Adds a tensor's name, dtype, shape and bytes to a hash."""
    plain = tensor.detach().cpu().contiguous()
    made.update(json.dumps([name, str(plain.dtype), list(plain.shape)]).encode())
    made.update(plain.view(torch.uint8).numpy())
