"""SteeringVector: one direction per layer, and what must be known to apply it to the right model.

The file is safetensors: one float32 tensor `layer.<k>` per layer (k is the 0-based index of the block) and one metadata
entry, JSON. Nothing in it is code, and one vector always gives the same bytes, so its sha256 is its identity.
Not covered: control vectors in GGUF, whose `direction.k` belongs to block k-1.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from core.models.sites import SITES

FORMAT = "gradhelm-vector/1"
MAX_BYTES = 64 * 2**20  # 128 layers of width 8192 are 4 MiB; what is larger is no steering vector
_KEY = "gradhelm"
_TEXTS = ("site", "fingerprint", "base", "method", "data_hash")


class VectorError(ValueError):
    """A steering vector that cannot be used; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class SteeringVector:
    """Directions in a model's hidden states, with the model and the data that they come from.

    Directions are what the method produced, unscaled: for a mean difference the raw difference of the means.
    Two vectors are equal only when they are one object; compare `sha256` to compare contents.
    """

    directions: Mapping[int, Tensor]
    """0-based block index -> direction (D,), float32, on the CPU."""
    site: str
    """Whose output is steered: "block", "attention" or "mlp"."""
    fingerprint: str
    """Fingerprint of the weights that the vector was fitted on; applying it to others is refused."""
    base: str
    """The model reference as it was given, for people."""
    method: str
    """Name of the fitting method."""
    data_hash: str
    """sha256 of the data file, "sha256:<hex>"."""
    norms: Mapping[int, float] = field(default_factory=dict)
    """Block index -> median Euclidean norm of the activations that the fit saw there: the scale for a strength."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Anything else that is worth knowing, as JSON: the fit's resolved config, row counts."""

    def __post_init__(self) -> None:
        """Refuse what could not be applied or saved."""
        if not self.directions:
            raise VectorError("a steering vector needs the direction of at least one layer")
        if self.site not in SITES:
            raise VectorError(f"unknown site {self.site!r}; sites are {', '.join(SITES)}")
        for name in _TEXTS:
            if not isinstance(getattr(self, name), str):
                raise VectorError(f"{name} must be text")
        shape = next(iter(self.directions.values())).shape
        for layer, direction in self.directions.items():
            _check_layer(layer)
            if direction.dtype != torch.float32 or direction.dim() != 1 or direction.shape != shape:
                raise VectorError(
                    f"layer {layer}: directions are float32 of one width (D,), "
                    f"not {direction.dtype} of shape {tuple(direction.shape)}"
                )
            if direction.numel() == 0 or not bool(torch.isfinite(direction).all()):
                raise VectorError(f"layer {layer}: the direction is empty, or holds NaN or infinity")
        for layer, norm in self.norms.items():
            if layer not in self.directions:
                raise VectorError(f"norms name layer {layer}, which has no direction")
            if isinstance(norm, bool) or not isinstance(norm, int | float) or not 0 <= norm <= sys.float_info.max:
                raise VectorError(f"layer {layer}: the norm must be a finite number >= 0")
        try:
            json.dumps(dict(self.metadata), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise VectorError(f"metadata must be plain JSON without NaN: {error}") from None

    @property
    def layers(self) -> tuple[int, ...]:
        """Block indices that have a direction, ascending."""
        return tuple(sorted(self.directions))

    @property
    def width(self) -> int:
        """D, the width of every direction."""
        return next(iter(self.directions.values())).numel()

    @property
    def sha256(self) -> str:
        """Content identity: "sha256:<hex>" of `to_bytes()`."""
        return "sha256:" + hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Give the safetensors file; the same vector always gives the same bytes."""
        about: dict[str, Any] = {name: getattr(self, name) for name in _TEXTS}
        about["format"] = FORMAT
        about["norms"] = {str(layer): float(self.norms[layer]) for layer in sorted(self.norms)}
        about["metadata"] = dict(self.metadata)
        tensors = {f"layer.{layer}": self.directions[layer].detach().cpu().contiguous() for layer in self.layers}
        # One metadata entry: safetensors orders several by hash, which differs from process to process.
        data: bytes = save_tensors(tensors, {_KEY: json.dumps(about, sort_keys=True, allow_nan=False)})
        return data

    @classmethod
    def from_bytes(cls, data: bytes, limit: int = MAX_BYTES) -> SteeringVector:
        """Read a vector from the bytes of its file; the bytes may come from anyone.

        Args:
            data: The whole safetensors file.
            limit: Most bytes that are looked at.

        Returns:
            The vector, on the CPU.

        Raises:
            VectorError: For more than `limit` bytes, what is not safetensors, another format version, missing or
                unknown fields, wrong shapes or dtypes, NaN or infinity.
        """
        if len(data) > limit:
            raise VectorError(f"a steering vector may have {limit} bytes, this has {len(data)}")
        about = _about(data)
        try:
            tensors: dict[str, Tensor] = load_tensors(data)
        except (SafetensorError, KeyError, ValueError, RuntimeError, OverflowError) as error:
            raise VectorError(f"not a valid safetensors file: {error}") from None
        directions: dict[int, Tensor] = {}
        for name, tensor in tensors.items():
            prefix, _, digits = name.partition(".")
            if prefix != "layer" or not _is_index(digits):
                raise VectorError(f"unknown tensor {name!r}; a vector holds layer.<k>, k the 0-based block index")
            directions[int(digits)] = tensor
        norms, metadata = about["norms"], about["metadata"]
        if not isinstance(norms, dict) or not isinstance(metadata, dict) or not all(map(_is_index, norms)):
            raise VectorError("norms must map layers to numbers, and metadata must be an object")
        return cls(
            directions=dict(sorted(directions.items())),
            norms={int(layer): norm for layer, norm in norms.items()},
            metadata=metadata,
            **{name: about[name] for name in _TEXTS},
        )

    def save(self, path: Path) -> Path:
        """Write the file: whole or not at all.

        Args:
            path: Where; its folder must exist, an older file is replaced.

        Returns:
            The same path.
        """
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return path

    @classmethod
    def load(cls, path: Path, limit: int = MAX_BYTES) -> SteeringVector:
        """Read a vector's file; see `from_bytes` for what is refused.

        Args:
            path: The file.
            limit: Most bytes that are read.

        Returns:
            The vector, on the CPU.
        """
        with path.open("rb") as file:
            return cls.from_bytes(file.read(limit + 1), limit)


def _check_layer(layer: object) -> None:
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise VectorError(f"layers are block indices from 0, not {layer!r}")


def _is_index(text: str) -> bool:
    """Say whether the text is a block index in its one spelling."""
    return text.isascii() and text.isdigit() and len(text) <= 5 and str(int(text)) == text


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _about(data: bytes) -> dict[str, Any]:
    """Read the JSON metadata from a safetensors header: u64 little-endian length, then that many bytes of JSON."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise VectorError("not a safetensors file: the header is cut off")
    try:
        header = json.loads(data[8 : 8 + size], parse_constant=_no_constant)
        about = json.loads(header["__metadata__"][_KEY], parse_constant=_no_constant)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise VectorError(f"the file carries no {_KEY} metadata; it is no steering vector of this service") from None
    expected = {*_TEXTS, "format", "norms", "metadata"}
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise VectorError(f"unknown format {about.get('format') if isinstance(about, dict) else None!r}; use {FORMAT}")
    if set(about) != expected:
        raise VectorError(f"the metadata must have exactly these fields: {', '.join(sorted(expected))}")
    return about
