"""Checkpoints that are whole or not there: safetensors + JSON in a folder with a manifest of sha256 sums.

`torch.save` would be shorter and runs code on load, so nothing here knows pickle. A checkpoint is written beside its
final name, synced, and renamed; a reader believes only what matches the manifest. So a kill, a full disk or a flipped
bit at any moment costs at most the checkpoint being written, never the one before.

Layout: `root/step-00000010/{tensors.safetensors, state.json, manifest.json}` and whatever `extra` wrote.
Not covered: sharded saving (each process has all tensors), and two processes saving into one root.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from core.checkpoint_state import flatten_optimizer as flatten_optimizer
from core.checkpoint_state import rng_state as rng_state
from core.checkpoint_state import set_rng_state as set_rng_state
from core.checkpoint_state import unflatten_optimizer as unflatten_optimizer

FORMAT = "gradhelm-checkpoint/1"
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_DEBRIS = ".tmp-"
_REPLACED = "-replaced-"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    step: int
    """Optimizer steps done."""
    tensors: dict[str, torch.Tensor]
    """Bitwise what was saved, on the CPU."""
    state: dict[str, Any]
    """The JSON state that was saved."""


def save(
    root: Path,
    *,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    keep: Container[int] | None = None,
    extra: Callable[[Path], object] | None = None,
) -> Path:
    """Write one checkpoint, whole or not at all. A checkpoint of the same step is replaced.

    Args:
        root: folder of all checkpoints of one run; created when missing.
        step: optimizer steps done, not negative.
        tensors: by name, any shape, dtype and device; tied or overlapping ones are stored once each.
        state: JSON data with text keys; tuples come back as lists.
        keep: after success, other checkpoints whose step is not in it are deleted; None deletes none.
        extra: called with the folder while it is still hidden; all that it writes there belongs to the checkpoint
            and is covered by the manifest (an adapter to serve, say).

    Returns:
        The folder, `root/step-<8 digits>`.

    Raises:
        ValueError: a negative step, or state that JSON cannot hold without loss of keys.
        OSError: the disk is full or not writable; earlier checkpoints are untouched and nothing half-written stays.
    """
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    _check_keys(state, "state")
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    final = root / f"step-{step:08d}"
    hidden = root / f"{_DEBRIS}{os.getpid()}-{final.name}"
    try:
        hidden.mkdir()
        with _as_os_error(hidden):
            save_file(_storable(tensors), hidden / TENSORS)
        (hidden / STATE).write_text(json.dumps(state), encoding="utf-8")
        if extra is not None:
            extra(hidden)
        files = {path.relative_to(hidden).as_posix(): _entry(path) for path in _files(hidden)}
        manifest = {"format": FORMAT, "step": step, "files": dict(sorted(files.items()))}
        (hidden / MANIFEST).write_text(_canonical(manifest), encoding="utf-8")
        _sync_tree(hidden)
        _swap_in(hidden, final)
        _sync(root)
    finally:
        _sweep(root)
    if keep is not None:
        for other, path in _steps(root):
            if other != step and other not in keep:
                _remove(path)
    return final


def load(path: Path, *, verified: bool = False) -> Checkpoint:
    """Read a checkpoint after checking every byte against its manifest.

    Args:
        path: a folder that `save` returned.
        verified: the caller has just had the folder from `latest`; skip the second reading.

    Returns:
        Step, tensors and state, bitwise as saved.

    Raises:
        ValueError: files are missing, altered or cut short.
    """
    if not verified and (reason := damage(path)) is not None:
        raise ValueError(f"checkpoint {path} cannot be used: {reason}")
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    return Checkpoint(manifest["step"], load_file(path / TENSORS), state)


def latest(root: Path) -> Path | None:
    """Find the newest checkpoint that verifies; anything half-written or altered is passed over.

    One that a save was just replacing when it was killed is put back in its place first.

    Args:
        root: folder of all checkpoints of one run; may not exist.

    Returns:
        The folder of the checkpoint, or None.
    """
    _put_back(root)
    return next((path for _, path in _steps(root) if damage(path) is None), None)


def prune(root: Path, keep_last: int, protect: Container[int] = ()) -> list[int]:
    """Delete old checkpoints. The newest that is complete always stays, whatever `keep_last` says.

    Complete means all files with their sizes; hashing gigabytes after every save would cost more than it tells.

    Args:
        root: folder of all checkpoints of one run.
        keep_last: how many of the newest to keep, besides the protected ones.
        protect: steps never to delete (the best one, or one that is being served).

    Returns:
        The steps that were deleted.
    """
    newest = next((path for _, path in _steps(root) if damage(path, hashes=False) is None), None)
    deleted = []
    candidates = [(step, path) for step, path in _steps(root) if step not in protect]
    for step, path in candidates[max(keep_last, 0) :]:
        if path != newest:
            _remove(path)
            deleted.append(step)
    return deleted


def damage(path: Path, *, hashes: bool = True) -> str | None:
    """Say what is wrong with a checkpoint on disk.

    Args:
        path: the folder.
        hashes: read and hash all files; without, only their presence and sizes are compared.

    Returns:
        None when every listed file has its listed bytes, else the reason.
    """
    name = _NAME.fullmatch(path.name)
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        # Not only equal but written the same way: so a flipped bit anywhere in the manifest shows.
        if text != _canonical(manifest) or manifest.keys() != {"format", "step", "files"}:
            return "the manifest is altered"
        if manifest["format"] != FORMAT or name is None or manifest["step"] != int(name[1]):
            return f"the manifest is not that of {path.name} in format {FORMAT}"
        files = manifest["files"]
        if not {TENSORS, STATE} <= files.keys():
            return "the manifest does not list tensors and state"
        for file, entry in files.items():
            target = path / file
            if ".." in Path(file).parts or Path(file).is_absolute() or target.is_symlink() or not target.is_file():
                return f"{file} is missing"
            if entry["bytes"] != target.stat().st_size or (hashes and entry != _entry(target)):
                return f"{file} is altered"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _steps(root: Path) -> list[tuple[int, Path]]:
    """All folders that are named like a checkpoint, newest first."""
    if not root.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in root.iterdir())
    return sorted(((int(name[1]), path) for name, path in named if name), reverse=True)


def _storable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Bring tensors to the CPU, contiguous, and none sharing memory with another, as safetensors asks."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.numel() * plain.element_size():
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        result[name] = plain
    return result


def _check_keys(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(
                    f"{where} has the key {key!r}; JSON keeps only text keys, so it would come back changed"
                )
            _check_keys(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_keys(item, f"{where}[{index}]")
    elif value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"{where} is a {type(value).__name__}; put tensors under `tensors`, and plain data here")


@contextlib.contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """Raise what safetensors reports about the disk as what it is."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error


def _canonical(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1, ensure_ascii=True) + "\n"


def _entry(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _sync_tree(folder: Path) -> None:
    for path in _files(folder):
        _sync(path)
    for path in sorted(path for path in folder.rglob("*") if path.is_dir()):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _swap_in(hidden: Path, final: Path) -> None:
    if not final.exists():
        hidden.rename(final)
        return
    replaced = final.with_name(f"{_DEBRIS}{os.getpid()}{_REPLACED}{final.name}")
    final.rename(replaced)
    try:
        hidden.rename(final)
    except OSError:
        replaced.rename(final)
        raise


def _remove(path: Path) -> None:
    """Delete a checkpoint so that a kill half-way leaves no folder that looks like one."""
    hidden = path.with_name(f"{_DEBRIS}{os.getpid()}-removed-{path.name}")
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _put_back(root: Path) -> None:
    """Undo half a swap: a kill between its two renames leaves the folder that was replaced without its name."""
    for path in root.glob(f"{_DEBRIS}*{_REPLACED}*"):
        writer, _, name = path.name.removeprefix(_DEBRIS).partition(_REPLACED)
        if (root / name).exists() or (writer != str(os.getpid()) and Path("/proc", writer).exists()):
            continue  # swapped, or somebody else is at it just now
        with contextlib.suppress(OSError):  # another rank was faster
            path.rename(root / name)


def _sweep(root: Path) -> None:
    """Clear what killed or failed saves left."""
    _put_back(root)
    for path in root.glob(f"{_DEBRIS}*"):
        shutil.rmtree(path, ignore_errors=True)
