"""What an engine and the pool of engines may take of the machine. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Settings of every engine process."""

    threads: int = 2
    """OpenMP threads of a process; waiting is passive, so that a training job beside it keeps its cores."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    device: str = "auto"
    """Where the model lies: cpu, or cuda; auto is cuda where torch has it, else cpu."""
    rows: int = 16
    """Requests that generate at once."""
    waiting: int = 64
    """Requests that may wait for a row; one more is refused with 429."""
    cache_bytes: int = 2 << 30
    """Most bytes of keys and values; also bounds the context where the model's own is longer."""
    prefill_tokens: int = 256
    """Most prompt tokens between two decode steps: higher starts long prompts sooner, lower streams more evenly."""
    default_max_tokens: int = 1024
    """Where a request gives no max_tokens: this, or the rest of the context if that is less."""
    adapters: int = 8
    """LoRA adapters that one process holds; the least recently used makes room."""
    start_seconds: float = 120.0
    """Longest start of a process; then the requests that wait for it fail with 503."""
    log_directory: Path | None = None
    """Where processes write what they say (engine-<name>.log); None: to the service's own stderr."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions:
    """Settings of the pool."""

    memory_bytes: int = 8 << 30
    """Most memory of all engine processes together; the least recently used idle one ends when more is needed."""
    idle_seconds: float = 600.0
    """An engine without requests for this long ends."""
