"""A base model for tests that never load one."""

from __future__ import annotations

from pathlib import Path

BASE = "tiny-llama"


def make_base(home: Path) -> None:
    """The files that a base's name is looked up by, without weights that anyone could load."""
    directory = home / "models" / BASE
    directory.mkdir(parents=True)
    (directory / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")
