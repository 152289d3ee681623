"""A checkpoint is on the disk, not only in the kernel's memory, before it is called one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from core import checkpoint

TENSORS = {"w": torch.arange(4, dtype=torch.float32)}


def extra(folder: Path) -> None:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "config.json").write_text("{}")


@pytest.mark.parametrize("again", [False, True])
def test_every_file_and_folder_reaches_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    if again:
        checkpoint.save(tmp_path, step=3, tensors=TENSORS, state={}, extra=extra)
    sync, rename = os.fsync, Path.rename
    done: list[str] = []

    def synced(descriptor: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path)
        done.append("/".join(["/", *place.parts[1:]]) if place.parts else "root")  # without the hidden folder's name
        sync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        done.append(f"-> {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    checkpoint.save(tmp_path, step=3, tensors=TENSORS, state={"a": 1}, extra=extra)
    named = len(done) - 1 - done[::-1].index("-> step-00000003")
    files = {"tensors.safetensors", "state.json", "manifest.json", "adapter", "adapter/config.json"}
    whole = {"/", *(f"//{name}" for name in files)}
    assert whole <= set(done[:named])
    assert "root" in done[named:]
