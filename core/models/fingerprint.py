"""A cheap identity of a model's weights: which vector or adapter belongs to which base."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from core.models.headers import TensorInfo, read_safetensors_header

EDGE = 4096
"""Bytes hashed at each end of each tensor."""

# What may change without changing what the model computes, or only says who wrote the file.
_VOLATILE = frozenset(
    {
        *("transformers_version", "_name_or_path", "_model_name_or_path", "_commit_hash", "architectures", "use_cache"),
        *("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"),
    }
)


def fingerprint(directory: Path) -> str:
    """Identifies the model in a directory, independent of how it is split into files.

    Covers the configuration (less what does not affect the computation), every tensor's name, dtype and shape, and the
    first and last 4 KiB of its bytes. A change in the middle of a large tensor alone goes unseen: training touches
    all of a matrix, and hashing whole files would cost minutes on large models.

    Args:
        directory: a model directory with ``config.json`` and safetensors files.

    Returns:
        ``sha256:`` and 64 hexadecimal digits.

    Raises:
        ValueError: if the directory has no ``config.json`` or no safetensors, or a header is malformed.
    """
    config = directory / "config.json"
    files = weight_files(directory)
    if not config.is_file() or not files:
        raise ValueError(f"{directory} is not a model directory: it needs config.json and *.safetensors")
    digest = hashlib.sha256()
    digest.update(json.dumps(_essential(json.loads(config.read_text("utf-8"))), sort_keys=True).encode())
    tensors = [(name, file, info) for file in files for name, info in read_safetensors_header(file).items()]
    for name, file, info in sorted(tensors, key=lambda item: item[0]):
        digest.update(json.dumps([name, info.dtype, info.shape]).encode())
        digest.update(_edges(file, info))
    return f"sha256:{digest.hexdigest()}"


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that make up the model in a directory: those that its index names, or the only one."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return [directory / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    single = directory / "model.safetensors"
    return [single] if single.is_file() else []


def _edges(file: Path, info: TensorInfo) -> bytes:
    with file.open("rb") as handle:
        handle.seek(info.start)
        head = handle.read(min(EDGE, info.end - info.start))
        handle.seek(max(info.start, info.end - EDGE))
        return head + handle.read(info.end - handle.tell())


def _essential(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _essential(item) for key, item in value.items() if key not in _VOLATILE and item is not None}
    if isinstance(value, list):
        return [_essential(item) for item in value]
    return value
