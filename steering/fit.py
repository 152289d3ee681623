"""The run of a fit: read pairs, load the model, fit, write the vector, read it back. Torch is imported on the way."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from core.config import dump
from core.events import EventLog
from core.models.lock import appearing
from steering.config import FitConfig
from steering.pairs import read_pairs
from steering.registry import get_method
from steering.stop import StopSignals

if TYPE_CHECKING:
    from core.models.load import Loaded
    from steering.vector import SteeringVector

VECTOR = "vector.safetensors"
MANIFEST = "manifest.json"


class ModelError(ValueError):
    """The model cannot be had: unknown, refused by the policy, or of an unknown family."""


def fit(config: FitConfig, log: EventLog, stop: StopSignals, *, origin: Mapping[str, str] | None = None) -> Path:
    """Fit a vector and write `output_dir/artifact/vector.safetensors` with a manifest, whole or not at all.

    Args:
        config: What to fit.
        log: Takes `message`, `progress` and `artifact` events.
        stop: Looked at between batches.
        origin: Where each setting came from, to be kept in the manifest.

    Returns:
        The vector's file.

    Raises:
        DataError: The pairs cannot be used.
        ModelError: The model cannot be used.
        ValueError: Settings that do not fit the model or the data.
        StoppedError: A stop was asked for; nothing was written.
        OSError: A file cannot be read or written.
    """
    data_file = Path(config.data_file)
    pairs = read_pairs(data_file)
    with data_file.open("rb") as file:
        data_hash = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    for warning in pairs.warnings:
        log.emit("message", level="warn", message=f"line {warning.line}: {warning.message}", code=warning.code)
    stop.check()
    loaded = _load(config)
    stop.check()
    log.emit("message", level="info", message=f"fitting {config.method} on {len(pairs.rows)} pairs with {config.model}")
    started = last = time.monotonic()

    def advance(done: int, total: int, tokens: int) -> None:
        nonlocal last
        now = time.monotonic()
        log.emit(
            "progress",
            step=done,
            total_steps=total,
            trained_tokens=tokens,
            eta_seconds=(now - started) / done * (total - done),
            peak_memory_bytes=_peak_memory(),
            micro_batch_seconds=now - last,
            save_seconds=0.0,
        )
        last = now
        stop.check()

    fitted = get_method(config.method).fit(loaded, pairs.rows, config, advance)

    from steering.vector import SteeringVector

    vector = SteeringVector(
        directions=fitted.directions,
        site=config.site,
        fingerprint=loaded.fingerprint,
        base=config.model,
        method=config.method,
        data_hash=data_hash,
        norms=fitted.norms,
        metadata={**fitted.metadata, "config": _portable(config)},
    )
    path = _write(Path(config.output_dir) / "artifact", vector, config, origin or {})
    log.emit("artifact", artifact="vector", path=str(path), sha256=vector.sha256, layers=list(vector.layers))
    return path


def _load(config: FitConfig) -> Loaded:
    import torch

    from core.models.load import load
    from core.models.sites import blocks

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        loaded = load(config.model, dtype=config.dtype)
        blocks(loaded.model)
    except ValueError as error:
        raise ModelError(str(error)) from error
    if torch.cuda.is_available():
        loaded.model.to("cuda")
    return loaded


def _portable(config: FitConfig) -> dict[str, object]:
    """Give the settings that shape the vector; paths and threads would make equal vectors differ in their bytes."""
    return {name: getattr(config, name) for name in ("positions", "max_length", "batch_size", "dtype", "seed")}


def _write(directory: Path, vector: SteeringVector, config: FitConfig, origin: Mapping[str, str]) -> Path:
    """Write the artifact's folder and check that it reads back as the same vector."""
    manifest = {
        "format": "gradhelm-artifact/1",
        "kind": "vector",
        "base": vector.base,
        "base_fingerprint": vector.fingerprint,
        "fingerprint": None,
        "files": {VECTOR: vector.sha256.removeprefix("sha256:")},
        "card": {
            "method": vector.method,
            "site": vector.site,
            "layers": list(vector.layers),
            "width": vector.width,
            "data_hash": vector.data_hash,
            **vector.metadata,
            "config": dump(config),
            "origin": dict(origin),
        },
    }
    with appearing(directory) as fresh:
        vector.save(fresh / VECTOR)
        text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
        (fresh / MANIFEST).write_text(text + "\n", encoding="utf-8")
        if type(vector).load(fresh / VECTOR).sha256 != vector.sha256:
            raise RuntimeError("the vector's file does not hold what was fitted")
    return directory / VECTOR


def _peak_memory() -> int:
    """Give the process's peak resident memory in bytes; Linux counts KiB, macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
