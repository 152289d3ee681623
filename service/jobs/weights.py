"""What the weights of a job that is over take on the disk: what can be served, until its model is deleted.

While a job lives, a checkpoint holds what a resume needs (``tensors.safetensors``: trained weights and the optimizer's
state) beside what can be served (``adapter/`` or ``merged/``). One that succeeded or was cancelled is never resumed, so
only the second stays. One that failed keeps its checkpoints whole: its run file can still be run by hand.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.models.manifest import NAME as MANIFEST
from service.jobs import names

RESUME = "tensors.safetensors"
"""In a checkpoint: what only a resume reads."""
_SERVED = ("adapter", "merged")


@dataclass(frozen=True, slots=True)
class Freed:
    """What deleting files gave back."""

    freed: int = 0
    """Bytes that the disk has again."""
    kept: int = 0
    """Bytes that stay, since files of later jobs are the same ones (hard links)."""


def settle(home: Path, job_id: str) -> None:
    """Let go of what only a resume could use, once a job succeeded or was cancelled; repeated, it does nothing.

    The last checkpoint mostly holds the very files of the artifact; they are kept once.

    Args:
        home: the data folder.
        job_id: the job; no process of it may be left.
    """
    folder = names.job_directory(home, job_id)
    for step in _steps(names.checkpoints_directory(home, job_id)):
        served = next((step / kind for kind in _SERVED if (step / kind / MANIFEST).is_file()), None)
        if served is None:
            shutil.rmtree(step, ignore_errors=True)
            continue
        with suppress(OSError):
            (step / RESUME).unlink(missing_ok=True)
        _once(folder / "artifact", served)


def remove(folders: Iterable[Path]) -> Freed:
    """Delete folders and say what that gave back.

    Args:
        folders: of one job; those that are not there count nothing, nor those inside another.

    Returns:
        Bytes freed, and bytes that other names still hold.
    """
    seen: dict[tuple[int, int], tuple[int, int, int]] = {}
    found = {folder for folder in folders if folder.is_dir() and not folder.is_symlink()}
    gone = [folder for folder in found if found.isdisjoint(folder.parents)]
    for folder in gone:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                stat = path.stat()
                known = seen.get((stat.st_dev, stat.st_ino), (0, 0, 0))[0]
                seen[stat.st_dev, stat.st_ino] = (known + 1, stat.st_nlink, stat.st_size)
    for folder in gone:
        shutil.rmtree(folder, ignore_errors=True)
    return Freed(
        sum(size for names_, links, size in seen.values() if names_ >= links),
        sum(size for names_, links, size in seen.values() if names_ < links),
    )


def _steps(root: Path) -> list[Path]:
    if root.is_symlink() or not root.is_dir():
        return []
    return [path for path in sorted(root.glob("step-*")) if path.is_dir() and not path.is_symlink()]


def _once(artifact: Path, served: Path) -> None:
    """Replace files of a checkpoint by links to the same ones of the artifact, as their manifests say."""
    first, second = _listed(artifact), _listed(served)
    for name, entry in second.items():
        mine, other = artifact / name, served / name
        if first.get(name) != entry or not mine.is_file() or not other.is_file() or mine.samefile(other):
            continue
        partial = other.with_name(f".{other.name}.link")
        with suppress(OSError):  # a disk without links keeps both
            partial.unlink(missing_ok=True)
            os.link(mine, partial)
            partial.replace(other)


def _listed(folder: Path) -> dict[str, Any]:
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {name: entry for name, entry in files.items() if Path(name).name == name}
