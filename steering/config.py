"""A fit file: which vector to fit, on what, and where it goes. Filled by YAML and `key=value`; torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steering.registry import get_method


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """Settings of a fit. Paths are relative to the working directory."""

    model: str
    """The model whose activations are compared: a catalog name, `org/name@revision`, or a directory."""
    data_file: str
    """JSON lines of pairs: {"prompt": text or messages, "positive": text, "negative": text}; without a prompt the two
    texts stand alone."""
    output_dir: str
    """Where events.jsonl and artifact/vector.safetensors go."""
    method: str = "mean_difference"
    """Name of the fitting method."""
    layers: tuple[int, ...] | None = None
    """0-based blocks to fit; without it, all. Fewer only make the file smaller: layers can be chosen when applying."""
    site: Literal["block", "attention", "mlp"] = "block"
    """Whose output is compared, and later steered: the whole block's, or that of its attention or MLP alone."""
    positions: Literal["last", "answer", "all"] = "answer"
    """Tokens that count: the last one of each answer, the mean over the answer, or the mean over prompt and answer. The
    very first token of a text never counts: models park large activations there, whatever it says."""
    batch_size: int = 8
    """Texts in one forward pass: higher is faster and takes more memory."""
    max_length: int = 1024
    """Longest prompt with answer in tokens; a longer row is an error, since cutting it would cut the answer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in; sums are float64 either way."""
    seed: int = 0
    """Seeds methods that draw at random; mean_difference draws nothing."""
    threads: int | None = None
    """CPU threads; without it, what OMP_NUM_THREADS says. Bits are the same for the same number."""
    heartbeat_seconds: float = 5.0
    """Seconds between heartbeat events."""

    def __post_init__(self) -> None:
        """Check what the annotations cannot say."""
        get_method(self.method)
        if self.layers is not None:
            if not self.layers or len(set(self.layers)) != len(self.layers) or min(self.layers) < 0:
                raise ValueError(f"layers must be different block indices from 0, not {list(self.layers)}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, not {self.max_length}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, not {self.threads}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), not {self.seed}")
        if not 0 < self.heartbeat_seconds < float("inf"):
            raise ValueError(f"heartbeat_seconds must be positive, not {self.heartbeat_seconds}")
